"""DPT: discriminative probing and tuning for text-to-image generation (Qu et al., CVPR 2024)."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    where = {"Artist": "dpt.drawing", "Sampling": "dpt.settings", "SelfCorrectionPipeline": "dpt.pipeline"}
    if name in where:  # some are slow to import
        return getattr(importlib.import_module(where[name]), name)
    raise AttributeError(f"module 'dpt' has no attribute {name!r}")
