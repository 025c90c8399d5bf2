"""Programs that a scheduler starts."""
