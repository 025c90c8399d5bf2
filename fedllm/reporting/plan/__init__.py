"""The plan of a run before it starts: jobs, time, bytes, files."""
