"""What `evaluate.py` does: one module a subcommand."""
