"""The Python interface: runs as data frames, runs from a program, adapters combined."""
