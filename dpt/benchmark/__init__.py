"""Costs of sampling, training and starting: `python -m dpt.benchmark`."""

CORRECTED = {"corrected": "conditional", "corrected_latent": "latent", "corrected_noise": "noise"}
"""kind of sampling step -> correction_target"""
TRAINING_KINDS = ("batched", "sequential", "sequential_full", "tune", "tune_checkpointed")
