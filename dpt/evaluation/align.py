"""`evaluate.py align`: how well pictures show their prompts.

    python evaluate.py align outputs/evaluation/base outputs/evaluation/dpt --metrics oracle

A folder is an arm's, with its `metadata.jsonl`. Scores go to `<metric>.jsonl` in it, a line a picture with the hash of
its file; what is there for the same file is not computed again. `oracle` says correct, misaligned or malformed (shapes
prompts only); `shapes-clip` is the cosine by the small CLIP of the shapes world.
"""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dpt.images import append_line, read_lines, read_metadata
from dpt.shapes.clip import embed_images, embed_texts, load_clip
from dpt.shapes.oracle import judge
from dpt.stable_diffusion import CKPT_FOLDER

Metric = Callable[[list[np.ndarray], list[str]], list[dict]]
"""Maps pictures (H, W, 3) uint8 and their prompts to a record each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms")
    parser.add_argument("--metrics", nargs="+", choices=tuple(METRICS), required=True)
    parser.add_argument("--batch_size", type=int, default=64)


def run(args: argparse.Namespace) -> dict:
    """Scores what has no score yet; returns the number of new scores by folder and metric.

    Raises:
        ValueError: a folder without pictures, a picture that cannot be read, or a score that is no number.
    """
    metrics = {name: METRICS[name]() for name in args.metrics}
    return {
        str(folder): {name: score(folder, name, metric, args.batch_size) for name, metric in metrics.items()}
        for folder in args.folders
    }


def score(folder: Path, name: str, metric: Metric, batch_size: int) -> int:
    """Adds the missing scores of a folder and returns how many they were."""
    records = read_metadata(folder)
    if not records:
        raise ValueError(f"{folder} holds no pictures with a {folder / 'metadata.jsonl'}")
    path = folder / f"{name}.jsonl"
    known = {(r["file"], r["sha256"]) for r in read_lines(path)}
    hashes = {r["file"]: hashlib.sha256((folder / r["file"]).read_bytes()).hexdigest() for r in records}
    missing = [r for r in records if (r["file"], hashes[r["file"]]) not in known]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"{folder.name} {name}", mininterval=2):
        batch = missing[start : start + batch_size]
        images = [read_image(folder / record["file"]) for record in batch]
        for record, result in zip(batch, metric(images, [record["prompt"] for record in batch]), strict=True):
            bad = [key for key, value in result.items() if isinstance(value, float) and not np.isfinite(value)]
            if bad:
                raise ValueError(f"{folder / record['file']}: {name} gives no number for {bad[0]}")
            append_line(path, {"file": record["file"], "sha256": hashes[record["file"]]} | result)
    return len(missing)


def read_image(path: Path) -> np.ndarray:
    """A picture (H, W, 3) uint8. Raises ValueError where it is missing or damaged."""
    try:
        return np.array(Image.open(path).convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); remove it and generate again") from error


def oracle() -> Metric:
    """What the shapes world's oracle says: `label` and `reason`."""

    def judged(images, prompts):
        verdicts = [judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [{"label": verdict.label, "reason": verdict.reason} for verdict in verdicts]

    return judged


def shapes_clip() -> Metric:
    """The cosine of picture and prompt by the small CLIP: `cosine`."""
    clip, tokenizer = load_clip(CKPT_FOLDER / "shapes/clip")

    @torch.no_grad()
    def cosines(images, prompts):
        pictures, texts = embed_images(clip, images), embed_texts(clip, tokenizer, prompts)
        return [{"cosine": value} for value in (pictures * texts).sum(1).tolist()]

    return cosines


METRICS = {"oracle": oracle, "shapes-clip": shapes_clip}
