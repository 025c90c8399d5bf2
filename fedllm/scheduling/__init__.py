"""The schedulers that start jobs: inline, local processes, Slurm; and the interface they share."""
