"""Commands that make and score adapters."""
