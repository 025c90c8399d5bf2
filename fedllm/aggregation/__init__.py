"""Routes to a truncated SVD: pure."""
