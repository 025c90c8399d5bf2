"""Statistics for comparisons: bootstrap intervals, paired tests and their adjustment; pure."""
