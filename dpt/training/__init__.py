"""Training runs: the trainer of probe and tune, a plain loop for other models, run folders, validation."""
