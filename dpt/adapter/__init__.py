"""The discriminative adapter: a DETR-style transformer that reads feature maps of the denoiser."""
