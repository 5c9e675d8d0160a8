"""DPT: discriminative probing and tuning for text-to-image generation (Qu et al., CVPR 2024)."""

__version__ = "0.1.0"
