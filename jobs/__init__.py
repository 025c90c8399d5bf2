"""The programs that a scheduler starts."""
