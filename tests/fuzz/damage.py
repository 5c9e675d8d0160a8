"""What can be wrong with a file: each damage changes one thing of it and says whether a reader has to refuse it.

A damage returns its description, and True where the file is unusable for whatever reads the damaged part, None where
either may be right, such as for a number that is as good as another.
"""

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

Damaged = tuple[str, bool | None]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
DEEP = 100_000

# JSON values by name; the kinds of field that have to refuse them. "id" is a whole number or a text.
VALUES = {
    "null": ("null", "str int id float list"),
    "a list": ("[1]", "str int id float"),
    "an object": ('{"a": 1}', "str int id float list"),
    "NaN": ("NaN", "str int id float list"),
    "Infinity": ("Infinity", "str int id float list"),
    "-Infinity": ("-Infinity", "str int id float list"),
    "10**400": ("1" + "0" * 400, "str int id float list"),
    "2**63": (str(2**63), "str list"),
    "1e308": ("1e308", "str list"),
    "-1": ("-1", "str list"),
    "0": ("0", "str list"),
    "1.5": ("1.5", "str list int id"),
    "true": ("true", "str list"),
    "a text": ('"text"', "int float list"),
    "an empty text": ('""', "int float list"),
    "a lone surrogate": ('"\\ud800"', "str int id float list"),
    "U+2028": ('"a\\u2028b"', "int float list"),
    "a long text": ('"' + "x" * 5000 + '"', "int float list"),
    "a place outside": ('"../../x"', "int float list"),
    "a deep list": ("[" * DEEP + "]" * DEEP, "str int id float"),
    "nothing": (None, "str int id float list"),
}
MARK = "value to be damaged"


def marker(folder: Path) -> Path:
    """The file that pickled code would make, were it run."""
    return folder.parent / f"{folder.name}.marker"


class _Code:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# Any file


def whole(path: Path, rng: random.Random, *, lines: bool = False, folder: Path) -> Damaged:
    """The file as a whole: cut, emptied, replaced.

    Args:
        lines: whether any text is a file of that kind, so that only what is no text at all has to be refused.
    """
    content = path.read_bytes()
    kinds = {
        "truncated": (content[: rng.randrange(1, max(2, len(content) - 1))], None if lines else True),
        "empty": (b"", None if lines else True),
        "garbage": (b"\x93\xff" + rng.randbytes(200), True),
        "a git-lfs pointer": (POINTER, None if lines else True),
        "with a byte-order mark": (b"\xef\xbb\xbf" + content, None),
        "a pickle with code": (pickle.dumps(_Code(marker(folder))), None if lines else True),
        "zeros": (bytes(len(content)), None if lines else True),
        "a folder": (None, True),
        "missing": (None, None),
    }
    name = rng.choice(list(kinds))
    replaced, refused = kinds[name]
    path.unlink()
    if replaced is not None:
        path.write_bytes(replaced)
    elif name == "a folder":
        path.mkdir()
    return name, refused


# JSON


def of_json(field: str) -> Callable:
    """Damages a field of a JSON document, or of one line of a file of JSON lines.

    Args:
        field: its path and kind, "images.*.file_name:str"; "*" stands for any entry, "@1." at the beginning for the
            second line, "?" behind the kind for what may be left out, "any" for a kind that is not checked.
    """
    where, kind = field.split(":")

    def spoil(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
        text = path.read_text()
        parts = text.rstrip("\n").split("\n") if path.suffix == ".jsonl" or where.startswith("@") else [text]
        line = int(where[1]) if where.startswith("@") else rng.randrange(len(parts))
        steps = where[3:] if where.startswith("@") else where
        document = json.loads(parts[line])
        holder, key = {"": document}, ""
        for step in steps.split(".") if steps else ():
            holder = holder[key]
            key = _entry(holder, step, rng)
        name = rng.choice(list(VALUES))
        raw, refusing = VALUES[name]
        if raw is None and isinstance(holder, dict) and key != "":
            holder.pop(key, None)
        else:
            raw = raw or "null"
            holder[key] = MARK
        document = document if steps else holder[""]
        parts[line] = json.dumps(document).replace(json.dumps(MARK), raw or "")
        path.write_text("\n".join(parts) + "\n" * (len(parts) > 1))
        optional = kind.endswith("?") and name in ("null", "nothing")
        return f"{where} is {name}", (kind.rstrip("?") in refusing.split() and not optional) or None

    return spoil


def _entry(holder, step: str, rng: random.Random):
    if step != "*":
        return int(step) if isinstance(holder, list) else step
    return rng.randrange(len(holder)) if isinstance(holder, list) else rng.choice(list(holder))


def literal(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
    """The list that a text of a hard-negatives file stands for, in JSON or in a table."""
    name, text = rng.choice(
        [
            ("a deep list", "[" * DEEP),
            ("a deep sum", "-" * DEEP + "1"),
            ("an open list", "['a'"),
            ("a number", "7"),
            ("a list of numbers", "[1, 2]"),
            ("an empty list", "[]"),
            ("code", f"[open({str(marker(folder))!r}, 'w')]"),
        ]
    )
    key = rng.choice(["neg_caption", "neg_image"])
    if path.suffix == ".tsv":
        head, *rows = path.read_text().splitlines()
        cells = rows[0].split("\t")
        cells[head.split("\t").index(key)] = text
        path.write_text("\n".join([head, "\t".join(cells), *rows[1:]]) + "\n")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: text}))
    return f"{key} is {name}", True


# Text


def text_lines(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
    """A text file, of one thing a line."""
    name, added, refused = rng.choice(
        [
            ("U+2028 in a line", "a red\u2028circle\n".encode(), None),
            ("a lone surrogate", b"a red \xed\xa0\x80 circle\n", True),
            ("no UTF-8", b"a red \xff circle\n", True),
            ("a NUL", b"a red \0 circle\n", None),
            ("a line of 100,000 words", b"red " * 100_000 + b"\n", None),
            ("a dollar sign", b"a $red $circle^\n", None),
            ("Windows' line ends", b"a blue star\r\n", None),
        ]
    )
    path.write_bytes(path.read_bytes() + added)
    return name, refused


# YAML


def of_yaml(key: str, text: str) -> Callable:
    """Sets a dotted key of a YAML file to a value that is given as YAML."""

    def spoil(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
        document = yaml.safe_load(path.read_text())
        holder = document
        *steps, last = key.split(".")
        for step in steps:
            holder = holder.setdefault(step, {})
        holder[last] = MARK
        path.write_text(yaml.safe_dump(document).replace(MARK, text))
        return f"{key} is {text}", None

    return spoil


# Weights


def of_tensors(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
    """A file of weights, safetensors or pickled, whose content is not what it should be."""
    pickled = path.suffix != ".safetensors"
    state = torch.load(path, weights_only=True) if pickled else load_file(path)
    first = rng.choice(sorted(state))
    changed: dict[str, tuple[dict, bool | None]] = {
        "a tensor is missing": ({k: v for k, v in state.items() if k != first}, True),
        "a tensor has another name": ({f"{k}x" if k == first else k: v for k, v in state.items()}, True),
        "a tensor is a number": (state | {first: torch.tensor(1.0)}, True if state[first].ndim else None),
        "a tensor has another shape": (state | {first: torch.zeros(3, 5, 7)}, True),
        "a tensor is empty": (state | {first: torch.zeros(0)}, True),
        "a tensor is NaN": (state | {first: torch.full_like(state[first], torch.nan)}, None),
        "a tensor is of whole numbers": (state | {first: torch.zeros_like(state[first], dtype=torch.int64)}, None),
        "no tensor is left": ({}, True),
    }
    raw: dict[str, Callable[[], bytes]] = {
        "it is text": lambda: b"a: 1\nthese are no weights\n",
        "it begins like a pickle": lambda: rng.choice([b"(", b".", b"]", b"a", b"b", b"q", b"u", b"}"]) + b"text",
        "it holds code in a zip": lambda: _zipped(pickle.dumps(_Code(marker(folder)))),
        "it holds a deep pickle in a zip": lambda: _zipped(b"\x80\x02" + b"(" * 3_000_000 + b"."),
        "its header is too long": lambda: struct.pack("<Q", 2**62) + b"{}",
        "its header is no JSON": lambda: struct.pack("<Q", 8) + b"[[[[[[[[",
        "its header is deep": lambda: struct.pack("<Q", DEEP) + b"[" * DEEP,
        "its header has negative sizes": lambda: _header(
            {first: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}
        ),
    }
    if pickled:
        changed |= {
            "a key is a number": (state | {7: torch.zeros(1)}, True),
            "a key is None": (state | {None: torch.zeros(1)}, True),
            "a value is a text": (state | {first: "text"}, True),
            "a value is on no device": (state | {first: state[first].to("meta")}, True),
            "it is a list": ([1, 2], True),
        }
    name = rng.choice([*changed, *raw])
    if name in raw:
        path.write_bytes(raw[name]())
        return name, True
    content, refused = changed[name]
    path.unlink()
    if pickled:
        torch.save(content, path)
    else:
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    return name, refused


def _zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _header(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def of_array(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
    """Cached latents."""
    array = np.load(path)
    kinds = {
        "of another shape": (array[:, :1], True),
        "of texts": (array.astype(str), True),
        "of NaN": (np.full_like(array, np.nan), True),
        "of complex numbers": (array.astype(complex), None),
        "of objects with code": (np.array([_Code(marker(folder))], object), True),
        "a number": (np.float32(1), True),
    }
    name = rng.choice(list(kinds))
    np.save(path, kinds[name][0], allow_pickle=True)
    return f"latents are {name}", kinds[name][1]


# Images


def of_image(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
    """A picture of another kind, or one that says it is huge."""
    name = rng.choice(
        ["16 bits deep", "of a palette", "with alpha", "of one pixel", "of 3.6 billion pixels", "cut off"]
    )
    if name == "of 3.6 billion pixels":
        path.write_bytes(_huge_png())
    elif name == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        picture = Image.open(path).convert("RGB")
        path.unlink()
        {
            "16 bits deep": lambda: Image.fromarray(np.full((120, 160), 40_000, np.uint16)),
            "of a palette": lambda: picture.convert("P"),
            "with alpha": lambda: picture.convert("RGBA"),
            "of one pixel": lambda: picture.resize((1, 1)),
        }[name]().save(path, "PNG")
    return f"an image {name}", True if name == "of 3.6 billion pixels" else None


def _huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


# Folders


def foreign(where: str) -> Callable:
    """Puts what somebody else made into a folder of ours."""

    def spoil(path: Path, rng: random.Random, *, folder: Path) -> Damaged:
        place = path / where
        place.mkdir(parents=True, exist_ok=True)
        name = rng.choice(["holiday.png", "00000_000000_9.png", ".hidden.tmp", "notes.txt", "a red circle_000007.png"])
        Image.new("RGB", (8, 8), "white").save(place / name, "PNG")
        shutil.copyfile(place / name, place / f"copy of {name}")
        return f"{name}, not ours, lies in it", None

    return spoil
