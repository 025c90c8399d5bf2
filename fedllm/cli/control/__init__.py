"""Commands that drive a run, or clean up after it."""
