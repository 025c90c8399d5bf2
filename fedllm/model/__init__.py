"""The base model and its tokenizer: found, checked, loaded."""
