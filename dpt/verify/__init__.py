"""Checks of a model with its adapter on the user's own machine: `python -m dpt.verify`."""
