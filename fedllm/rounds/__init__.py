"""Advance: the whole story of a run, without torch."""
