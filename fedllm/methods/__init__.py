"""One federated method, one file, one paper: pure."""
