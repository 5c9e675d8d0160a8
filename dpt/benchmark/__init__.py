"""Costs of sampling, training and starting: `python -m dpt.benchmark`."""

CORRECTED = {"corrected": "conditional", "corrected_latent": "latent", "corrected_noise": "noise"}
"""kind of sampling step -> correction_target"""
BATCH_SIZES = {
    "shapes": (8, 16),
    "random-145m": (2, 8),
    "random-sd21": (1, 1),
    "random-xl-94m": (2, 8),
    "random-sd3-102m": (2, 8),
    "random-flux-106m": (2, 4),
    "random-sdxl": (1, 1),
    "random-sd35": (1, 1),
}
"""model -> batch sizes that are timed, and whose peak memory of a tune step is measured: the paper's 8 where it fits"""
TRAINING_KINDS = ("batched", "sequential", "sequential_full", "tune", "tune_checkpointed")
