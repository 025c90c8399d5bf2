"""Rounds: the whole course of a run, without torch."""
