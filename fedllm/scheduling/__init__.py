"""The scheduler seam: inline, local processes, Slurm."""
