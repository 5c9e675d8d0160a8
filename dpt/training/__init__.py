"""Training runs: the trainer of probe and tune, run folders, validation."""
