"""Training data: what a batch holds, and where it comes from."""
