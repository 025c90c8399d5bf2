"""What one process of a job is made of: what it has loaded, its signals, log and clock."""
