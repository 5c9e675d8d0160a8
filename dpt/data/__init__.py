"""Training data: samples, batches, and the files that they come from."""
