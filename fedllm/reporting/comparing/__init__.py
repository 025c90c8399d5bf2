"""Comparisons of runs: these models, and these methods, which are two questions."""
