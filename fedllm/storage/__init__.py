"""Every path, atomic publication, records, tensor files."""
