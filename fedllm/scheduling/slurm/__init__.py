"""Slurm: submission, questions, limits and notations. Nothing of it is known elsewhere."""
