"""Publication of files and folders: they appear whole or not at all."""
