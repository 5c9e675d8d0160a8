"""Arrays of numbers that are kept in files."""

import tokenize
from pathlib import Path

import numpy as np

from dpt.files import replacing


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def read_array(
    path: Path, shape: tuple[int | None, ...] | None = None, *, remedy: str = "remove it, and it is made again"
) -> np.ndarray:
    """The array of floats or integers in a `.npy` file, memory-mapped: a false size in its head takes no memory.

    Args:
        shape: the expected shape; None in it stands for any length.

    Raises:
        ValueError: the file holds no such array; the message names the file and the remedy.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, EOFError, ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path} cannot be read as one array of floats or integers ({error}); {remedy}") from error
    if array.dtype.kind not in "fi":
        raise ValueError(f"{path} cannot be read as one array of floats or integers; {remedy}")
    if shape and (
        len(array.shape) != len(shape) or any(a not in (None, b) for a, b in zip(shape, array.shape, strict=True))
    ):
        raise ValueError(f"{path} holds no array of shape {shape}; {remedy}")
    return array
