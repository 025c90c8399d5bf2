"""Sweeps: which runs they are, and what their arms must share."""
