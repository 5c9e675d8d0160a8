"""DPT: discriminative probing and tuning for text-to-image generation (Qu et al., CVPR 2024)."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "SelfCorrectionPipeline":  # diffusers' pipelines are slow to import
        from dpt.pipeline import SelfCorrectionPipeline

        return SelfCorrectionPipeline
    raise AttributeError(f"module 'dpt' has no attribute {name!r}")
