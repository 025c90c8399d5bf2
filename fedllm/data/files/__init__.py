"""Files of rows: which file of a folder belongs to which split, and how each kind is read."""
