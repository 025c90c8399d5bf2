"""Methods whose state is a pair of factors, A and B: means of factors."""
