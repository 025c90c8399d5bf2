"""Commands that make a run go on, or clean up behind it."""
