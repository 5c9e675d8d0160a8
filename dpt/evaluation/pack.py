"""`evaluate.py pack`: the figures of arms in one small file, to keep without the pictures.

    python evaluate.py pack outputs/experiment/shapes-test/{base,dpt/0} --output docs/shapes-test.json
    python evaluate.py table docs/shapes-test.json --against base --output outputs/tables

`table` and `pareto` take the file for the folders that went into it, and an experiment's `packed` for arms that need
not be drawn again. The file grows with each call; an arm that is packed once more takes its own place.
"""

import argparse
import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np

from dpt.evaluation.align import file_hashes, pictures, read_scores
from dpt.evaluation.arms import SETTINGS_FILE, Settings, folder_name, read_settings
from dpt.files import decode, read_json, read_text, text_lines, write_text
from dpt.shapes.oracle import LABELS

QUALITY_FILE = "quality.json"
COSTS = ("seconds", "whole_passes", "truncated_passes", "peak_mb")


class PackedPictures(msgspec.Struct):
    """The first line of a packed file: (prompt, seed) of each picture, and the categories of each prompt."""

    pictures: list[tuple[str, int]]
    categories: dict[str, list[str]]


class PackedArm(msgspec.Struct):
    """Each further line: an arm, its figures in the pictures' order."""

    arm: str
    settings: Settings
    costs: dict[str, float]
    figures: dict[str, str | list[float]]


class Quality(msgspec.Struct, omit_defaults=True):
    """`quality.json`: the figures of `evaluate.py quality`, and a hash of the pictures they are of."""

    pictures: str
    frechet: float
    diversity: float | None = None


def run(args: argparse.Namespace) -> dict:
    """Packs the folders; returns the names of all arms in the file, and how many pictures each has.

    Raises:
        ValueError: a folder without scores, or of other pictures than the file's.
    """
    packed = read_packed(args.output) if args.output.exists() else {}
    for path in args.folders:
        arms = read_packed(path) if path.is_file() else {folder_name(path): _with_settings(path)}
        for name, arm in arms.items():
            if args.only and name.split("/")[0] not in args.only:
                continue
            seeds = args.seeds or {seed for _, seed in arm["values"]}
            packed[name] = of_pictures(arm, {pair for pair in arm["values"] if pair[1] in seeds})
    if not packed:
        raise ValueError(f"--only names {', '.join(args.only)}; there is none of them")
    write_packed(packed, args.output)
    return {name: len(arm["values"]) for name, arm in packed.items()}


def _with_settings(folder: Path) -> dict:
    found = read_settings(folder) if (folder / SETTINGS_FILE).exists() else {}  # others' pictures have none
    return read_arm(folder) | {"settings": found}


def of_pictures(arm: dict, wanted: set[tuple[str, int]]) -> dict:
    """An arm's figures of some of its pictures, without those of all pictures together."""
    if arm["values"].keys() == wanted:
        return arm
    values = {key: row for key, row in arm["values"].items() if key in wanted}
    categories = {prompt: arm["categories"][prompt] for prompt, _ in values}
    costs = {name: value for name, value in arm["costs"].items() if name in COSTS}
    return arm | {"values": values, "categories": categories, "costs": costs}


def write_packed(packed: dict[str, dict], path: Path) -> None:
    """Writes arms, a line each; `packed` holds what `read_arm` gives and the `settings`, by name.

    Raises:
        ValueError: arms of different pictures.
    """
    (first, arm), *others = packed.items()
    for name, other in others:
        if other["values"].keys() != arm["values"].keys():
            raise ValueError(
                f"{first} and {name} do not show the same prompts and seeds; pack them into files of their own"
            )
    pairs = sorted(arm["values"])
    head = {"pictures": pairs, "categories": arm["categories"]}
    lines = [json.dumps(head)]
    for name, one in sorted(packed.items()):
        figures = {key: _encoded([one["values"][pair][key] for pair in pairs]) for key in sorted(one["figures"])}
        lines.append(json.dumps({"arm": name, "settings": one["settings"], "costs": one["costs"], "figures": figures}))
    write_text(path, "\n".join(lines) + "\n")


def _encoded(values: list[float]) -> str | list[float]:
    """A column of figures: truth values as a string of 1 and 0, numbers to five places."""
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return [round(value, 5) for value in values]


def read_packed(path: Path) -> dict[str, dict]:
    """The arms that `write_packed` was given, scores to five places.

    Raises:
        ValueError: the file is not one of `write_packed`; it is named.
    """
    try:
        return _unpacked(text_lines(read_text(path)))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as what evaluate.py pack writes: {error}") from error


def _unpacked(lines: list[str]) -> dict[str, dict]:
    if not lines:
        raise ValueError("it is empty")
    head = decode(lines[0], PackedPictures, "line 1")
    if lacking := {prompt for prompt, _ in head.pictures} - head.categories.keys():
        raise ValueError(f"line 1: categories lack {min(lacking)!r}")
    found = {}
    for n, line in enumerate(lines[1:], 2):
        arm = decode(line, PackedArm, f"line {n}")
        columns = {key: _decoded(row, f"line {n}: figures: {key}") for key, row in arm.figures.items()}
        for key, column in columns.items():
            if len(column) != len(head.pictures):
                raise ValueError(f"line {n}: figures: {key} has {len(column)} values, of {len(head.pictures)} pictures")
        values = {pair: {key: row[k] for key, row in columns.items()} for k, pair in enumerate(head.pictures)}
        found[arm.arm] = {
            "values": values,
            "figures": set(columns),
            "categories": head.categories,
            "costs": arm.costs,
            "settings": arm.settings,
        }
    return found


def _decoded(row: str | list[float], where: str) -> list[float]:
    if isinstance(row, str) and set(row) - {"0", "1"}:
        raise ValueError(f"{where} is no string of 0 and 1")
    return [float(value) for value in row]


def collect(paths: list[Path]) -> dict[str, dict]:
    """Figures of the arms in folders and packed files, by name, as `read_arm` gives them.

    Raises:
        ValueError: folders without scores, or two arms of one name.
    """
    places: dict[str, Path] = {}  # of each arm; training seeds of one lie together
    found: dict[str, dict] = {}
    for path in paths:
        arms = read_packed(path) if path.is_file() else {folder_name(path): read_arm(path)}
        for full, arm in arms.items():
            name, _, seed = full.partition("/")
            place = path.parent if seed and path.is_dir() else path
            if full in found or places.get(name, place) != place:
                raise ValueError(
                    f"two arms are named {name!r}: {places[name]} and {place}; rename a folder, or name one"
                )
            places[name], found[full] = place, arm
    return found


def read_arm(folder: Path) -> dict:
    """An arm's figures by (prompt, seed), the categories of its prompts, its costs, and the figures of `quality`."""
    records, values = pictures(folder), {}
    hashes = file_hashes(folder, records)
    scores = read_scores(folder, hashes)
    for record in records:
        row = values.setdefault((record["prompt"], record["seed"]), {})
        for scored in (found.get(record["file"], {}) for found in scores.values()):
            row |= {label: float(scored["label"] == label) for label in LABELS} if "label" in scored else {}
            row |= {key: float(value) for key, value in scored.items() if isinstance(value, int | float)}
    figures = {figure for row in values.values() for figure in row}
    if not figures:
        raise ValueError(f"{folder} holds no scores: run evaluate.py align first")
    if lacking := [record["file"] for record in records if figures - values[record["prompt"], record["seed"]].keys()]:
        raise ValueError(f"{folder}: {len(lacking)} pictures lack a score, such as {lacking[0]}: run evaluate.py align")
    known = [cost for cost in COSTS if all(cost in r for r in records)]
    costs = {cost: float(np.mean([r[cost] for r in records])) for cost in known}
    categories = {r["prompt"]: r.get("categories", [r["category"]]) for r in records}
    costs |= read_quality(folder, hashes)
    return {"values": values, "figures": figures, "categories": categories, "costs": costs}


def read_quality(folder: Path, hashes: dict[str, str]) -> dict[str, float]:
    """Figures of `quality` where they are of pictures with these `file_hashes`; else an empty dict."""
    path = folder / QUALITY_FILE
    if not path.exists():
        return {}
    found = msgspec.to_builtins(read_json(path, Quality))
    return found if found.pop("pictures") == pictures_hash(hashes) else {}


def pictures_hash(hashes: dict[str, str]) -> str:
    """One hash of all pictures whose hashes `file_hashes` gives."""
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()[:12]
