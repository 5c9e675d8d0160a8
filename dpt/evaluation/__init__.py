"""The subcommands of `evaluate.py`, one module each."""
