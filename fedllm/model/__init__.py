"""Base model, tokenizer, adapter slots."""
