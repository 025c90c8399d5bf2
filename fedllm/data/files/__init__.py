"""Files of rows: which of a folder belong to which split, and how each kind is read."""
