"""Attempts of a round: their plans, their submission, and their workers."""
