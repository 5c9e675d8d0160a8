"""The page on which prompts are drawn: `python -m dpt.demo`."""
