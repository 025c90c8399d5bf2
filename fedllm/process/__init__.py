"""A process of a job: what it has loaded, its signals, its log and its clock."""
