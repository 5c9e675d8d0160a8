"""DPT: discriminative probing and tuning for text-to-image generation (Qu et al., CVPR 2024)."""

import importlib

__version__ = "0.1.0"
_HOMES = {"Artist": "dpt.drawing", "Sampling": "dpt.sampling_settings", "SelfCorrectionPipeline": "dpt.pipeline"}


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:  # some are slow to import
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dpt' has no attribute {name!r}")
