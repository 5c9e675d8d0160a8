"""Command lines of modules that are slow to import, which answer `--help` and bad arguments before that."""
