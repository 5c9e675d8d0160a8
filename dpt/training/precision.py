"""The precision of frozen weights in training, by the setting `optim.mixed_precision`."""

import torch

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""of the frozen weights; trained weights are float32"""
