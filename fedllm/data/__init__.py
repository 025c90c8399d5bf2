"""Data: readers, prompts, the cache of tokens and its index of clients."""
