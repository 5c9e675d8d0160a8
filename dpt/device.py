"""Devices and precisions. Imports torch alone."""

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""precision of the frozen weights in training by `optim.mixed_precision`; trained weights are float32"""


def usable_device(name: str | None = None) -> torch.device:
    """The device of a name; by default the first accelerator, or the CPU where there is none.

    Raises:
        ValueError: this machine has none of that name that keeps values.
    """
    if name is None:
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else other)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def gpu(number: int) -> torch.device:
    """The GPU of that number; the CPU where there is no CUDA. Raises ValueError where there are fewer."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise ValueError(f"--gpuid is {number}; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device("cuda", number)
