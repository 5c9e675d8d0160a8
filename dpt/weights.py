"""Files of weights: checked before memory is allocated for their contents, and never run as code."""

import pickle
import pickletools
import struct
import warnings
import zipfile
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

MAX_OPCODES = 1_000_000  # of a pickle; a tensor takes about 40, a full Stable Diffusion has 1,700 tensors
MAX_PICKLE_BYTES = 2**26
LEGACY_PICKLES = 5  # in a file of torch's older format: magic number, version, system, the object, its storages' keys

UNPICKLING_ERRORS = (
    *(OSError, EOFError, MemoryError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
)
"""Errors of damaged zips, and of torch's unpickler at opcodes that do not find their operands on the stack."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A flat dict of tensors from a `.safetensors` or `torch.save` file, memory-mapped.

    Raises:
        ValueError: unreadable, or a pickle that holds anything but tensors with values.
    """
    if is_safetensors(path):
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(_unreadable(path, error)) from error
    return check_state(path, read_pickle(path))


def check_state(path: Path, state: object) -> dict[str, torch.Tensor]:
    """The content of a pickle, if it is a flat dict of tensors with values; else ValueError."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds something other than a flat dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path} holds something other than a flat dict of tensors: a key is {type(key).__name__}")
        check_tensor(path, key, value)
    return {key: value.detach() for key, value in state.items()}


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name; reads no values. Raises ValueError as `read_tensors` does."""
    if not is_safetensors(path):
        return {name: list(value.shape) for name, value in read_tensors(path).items()}
    try:
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(_unreadable(path, error)) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format by its name or its first bytes. Raises ValueError where it cannot be opened."""
    return path.suffix == ".safetensors" or _first_bytes(path)[8:9] == b"{"


def read_pickle(path: Path) -> object:
    """The content of a `torch.save` file, memory-mapped; tensors and plain containers alone, no code is run.

    Raises:
        ValueError: unreadable, larger than what it should hold, or something else in it.
    """
    try:
        is_zip = _check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which `check_tensor` refuses
            # files of the older format can be read, not mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNPICKLING_ERRORS as error:
        raise ValueError(_unreadable(path, error)) from error


def check_tensor(path: Path, name: str, value: object) -> None:
    """Raises ValueError where a value of a pickle is no tensor, or one whose values are not in the file."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{path} holds something other than a flat dict of tensors: {name} is {type(value).__name__}")
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(f"{path}: tensor {name} holds no plain values (it is meta, sparse, quantized or nested)")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path}: tensor {name} is {tuple(value.shape)}, which is more than the file holds of it")


def _check_pickle(path: Path) -> bool:
    """Counts a pickle's opcodes; returns whether it lies in a zip. Raises ValueError for what torch.save cannot have
    written."""
    if not zipfile.is_zipfile(path):
        if not _first_bytes(path).startswith(b"\x80"):
            raise ValueError("it is neither a file of torch.save nor of safetensors, or it is cut off")
        with path.open("rb") as file:
            _count_opcodes(file, LEGACY_PICKLES)
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        inner = next((member for member in members if member.filename.endswith("/data.pkl")), None)
        if inner is None:
            raise ValueError("it is a zip file without data.pkl")
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or inner.file_size > MAX_PICKLE_BYTES:
            raise ValueError("it is compressed, or its pickle is too large; torch.save writes neither")
        with archive.open(inner) as file:
            _count_opcodes(BufferedReader(file), 1)
    return True


def _count_opcodes(file, num_pickles: int) -> None:
    count = 0
    for _ in range(num_pickles):
        for _ in pickletools.genops(file):
            count += 1
            if count > MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _unreadable(path: Path, error: BaseException) -> str:
    """A line that says what is wrong with a file of weights."""
    if not path.is_file():
        return f"{path} is no readable weights file (it is {'a folder' if path.is_dir() else 'not there'})"
    first = _first_bytes(path)
    if first.startswith(b"version https://git-lfs"):
        reason = "it is a git-lfs pointer in place of the weights: run git lfs pull, or download the file itself"
    elif not first:
        reason = "it is empty"
    else:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if not isinstance(error, OSError | SafetensorError) and first.startswith((b"\x80", b"PK")):
            reason = f"it holds something other than tensors, and is not run: {reason}"
    return f"{path} is no readable weights file ({reason})"
