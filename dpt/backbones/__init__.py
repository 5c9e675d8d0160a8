"""Denoiser families: how each is loaded, encodes prompts and images, predicts, and gives feature maps."""
