"""`evaluate.py align`: how well pictures show their prompts.

    python evaluate.py align outputs/evaluation/base outputs/evaluation/dpt --metrics oracle

A folder is an arm's, with its `metadata.jsonl`, or holds pictures named as T2I-CompBench names them, <prompt>_<6
digits>.png, in itself or in samples/. Scores go to `<metric>.jsonl` in it, a line a picture with the hashes of its file
and of the scorer; what is there for the same of both is not computed again. `oracle` says correct, misaligned or
malformed (shapes prompts only); `shapes-clip` is the cosine by the small CLIP of the shapes world; `clip` the CLIP
score by OpenCLIP; `blip` BLIP's matching and contrastive heads. The latter two read weights that you put into ckpt/.
"""

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dpt.evaluation.scorers import METRICS, Scorer
from dpt.evaluation.scorers import add_arguments as add_scorers
from dpt.images import METADATA_FILE, append_line, read_lines, read_metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms")
    parser.add_argument("--metrics", nargs="+", choices=tuple(METRICS), required=True)
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once (default: 64)")
    add_scorers(parser)


def run(args: argparse.Namespace) -> dict:
    """Scores what has no score yet; returns the number of new scores by folder and metric.

    Raises:
        ValueError: a folder without pictures, a picture that cannot be read, or a score that is no number.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; it must be at least 1")
    scorers = [METRICS[name](args) for name in args.metrics]
    return {
        str(folder): {scorer.name: score(folder, scorer, args.batch_size) for scorer in scorers}
        for folder in args.folders
    }


def score(folder: Path, scorer: Scorer, batch_size: int) -> int:
    """Adds the missing scores of a folder and returns how many they were."""
    records = pictures(folder)
    path, hashes = folder / f"{scorer.name}.jsonl", file_hashes(folder, records)
    known = {(r["file"], r["sha256"], r.get("scorer")) for r in read_lines(path)}
    missing = [r for r in records if (r["file"], hashes[r["file"]], scorer.fingerprint) not in known]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"{folder.name} {scorer.name}", mininterval=2):
        batch = missing[start : start + batch_size]
        images = [read_image(folder / record["file"]) for record in batch]
        try:
            results = scorer.metric(images, [record["prompt"] for record in batch])
        except ValueError as error:
            raise ValueError(f"{folder}, {batch[0]['file']} and what follows: {error}") from error
        for record, result in zip(batch, results, strict=True):
            bad = [key for key, value in result.items() if isinstance(value, float) and not np.isfinite(value)]
            if bad:
                raise ValueError(f"{folder / record['file']}: {scorer.name} gives no number for {bad[0]}")
            identity = {"file": record["file"], "sha256": hashes[record["file"]], "scorer": scorer.fingerprint}
            append_line(path, identity | result)
    return len(missing)


def file_hashes(folder: Path, records: list[dict]) -> dict[str, str]:
    """SHA-256 of the records' files."""
    return {r["file"]: hashlib.sha256((folder / r["file"]).read_bytes()).hexdigest() for r in records}


def read_scores(folder: Path, hashes: dict[str, str]) -> dict[str, dict[str, dict]]:
    """Metric -> file -> its newest score, of the files as `file_hashes` finds them now."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != METADATA_FILE:
            scores = {r["file"]: r for r in read_lines(path) if hashes.get(r["file"]) == r.get("sha256")}
            found[path.stem] = scores
    return found


def pictures(folder: Path) -> list[dict]:
    """The folder's pictures by its metadata or, without one, by their names: at least file, prompt, category, seed.

    Raises:
        ValueError: there are none, or the metadata names pictures that are not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there, or no folder")
    if (folder / METADATA_FILE).exists():
        records, there = read_lines(folder / METADATA_FILE), read_metadata(folder)
        known = {record["file"] for record in there}
        missing = sorted({record["file"] for record in records} - known)
        drawn = {(record["prompt"], record.get("seed")) for record in there}
        lost = [r["file"] for r in records if r["file"] in missing and (r["prompt"], r.get("seed")) not in drawn]
        if lost:
            raise ValueError(f"{folder}: {len(lost)} pictures are missing, such as {lost[0]}; generate them again")
        if there:
            return [{"category": "all"} | record for record in there]
    names = [path for sub in (folder, folder / "samples") for path in sorted(sub.glob("*.png"))]
    matches = {str(path.relative_to(folder)): re.fullmatch(r"(.+)_(\d{6})", path.stem) for path in names}
    records = [
        {"file": name, "prompt": match[1], "category": "all", "seed": int(match[2])}
        for name, match in matches.items()
        if match
    ]
    if not records:
        raise ValueError(
            f"{folder} holds no pictures: neither a {METADATA_FILE} nor files named <prompt>_<6 digits>.png"
        )
    return records


def read_image(path: Path) -> np.ndarray:
    """A picture (H, W, 3) uint8. Raises ValueError where it is missing or damaged."""
    try:
        return np.array(Image.open(path).convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); remove it and generate again") from error
