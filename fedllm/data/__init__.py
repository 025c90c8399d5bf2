"""Readers, prompts, tokenised cache, client index."""
