"""What a configuration would take: jobs, time, bytes, files."""
