"""`evaluate.py quality`: does an arm gain alignment at the cost of quality or diversity (shapes prompts only)?

    python evaluate.py quality outputs/evaluation/base outputs/evaluation/dpt

Writes quality.json into each arm's folder, which `table` shows: `frechet`, the Frechet distance between the arm's
pictures and as many fresh renders of the same prompts, in the latent space of the embedded model's autoencoder, and
`diversity`, the mean distance between pictures of one prompt from different noise, as a share of that between renders.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm

from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.evaluation.align import file_hashes, pictures
from dpt.evaluation.pack import QUALITY_FILE, pictures_hash, read_quality
from dpt.files import write_text
from dpt.images import read_image, to_pixels
from dpt.shapes.compose import compose
from dpt.shapes.grammar import parse
from dpt.shapes.scenes import render

POOL = 2  # latent cells, each way, whose mean is one coordinate: 256 of them, far fewer than there are pictures
RENDER_SEED = 7_000_000


def run(args: argparse.Namespace) -> dict:
    """Writes the figures of every folder; returns them by folder."""
    return guard_folders(args.folders)


def guard_folders(folders: list[Path]) -> dict:
    """Writes the figures of folders whose figures are missing or out of date; returns all figures by folder.

    Raises:
        ValueError: a folder without pictures, a picture that cannot be read, or a prompt outside the shapes grammar.
    """
    shown = {folder: sorted(pictures(folder), key=lambda r: (r["prompt"], r["seed"])) for folder in folders}
    hashes = {folder: file_hashes(folder, records) for folder, records in shown.items()}
    results = {str(folder): read_quality(folder, hashes[folder]) for folder in shown}
    sd, renders = load_stable_diffusion("shapes"), {}
    for folder, records in shown.items():
        prompts = tuple(record["prompt"] for record in records)
        if results[str(folder)]:
            continue
        if prompts not in renders:
            renders[prompts] = embed(sd, [render_prompt(prompt, k) for k, prompt in enumerate(prompts)])
        drawn = embed(sd, [read_image(folder / record["file"]) for record in records])
        figures = {"frechet": frechet_distance(drawn, renders[prompts])}
        if between := spread(renders[prompts], prompts):  # else every prompt has one picture
            figures["diversity"] = spread(drawn, prompts) / between
        write_text(folder / QUALITY_FILE, json.dumps(figures | {"pictures": pictures_hash(hashes[folder])}) + "\n")
        results[str(folder)] = figures
    return results


def render_prompt(prompt: str, number: int) -> np.ndarray:
    """A fresh picture (H, W, 3) uint8 of which the prompt is true."""
    return render(compose(parse(prompt), np.random.default_rng((RENDER_SEED, number))))


@torch.no_grad()
def embed(sd: StableDiffusion, images: list[np.ndarray]) -> np.ndarray:
    """Pooled latents of pictures, (N, D)."""
    rows = []
    for start in range(0, len(images), 64):
        latents = sd.encode_images(to_pixels(images[start : start + 64]))
        rows.append(torch.nn.functional.avg_pool2d(latents, POOL).flatten(1).cpu())
    return torch.cat(rows).double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of Gaussians fitted to rows (N, D) and (M, D).

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a Frechet distance needs at least two pictures")
    gap = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(gap @ gap + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real))


def spread(rows: np.ndarray, prompts: tuple[str, ...]) -> float:
    """Mean distance between the rows of one prompt; 0 where no prompt has two."""
    groups: dict[str, list[np.ndarray]] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        groups.setdefault(prompt, []).append(row)
    distances = [np.linalg.norm(x - y) for group in groups.values() for x, y in combinations(group, 2)]
    return float(np.mean(distances)) if distances else 0.0
