"""The programs that jobs run: prepare, train, aggregate, evaluate, inspect."""
