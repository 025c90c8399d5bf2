"""The end of rounds: their records, and the end of a run before its last round."""
