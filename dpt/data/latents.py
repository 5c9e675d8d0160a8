"""Latents of image files, encoded once: `<image stem>.npy`, one array a file, already scaled.

Beside them `latents.json` names the autoencoder, and `checksums_*.jsonl` holds every file's SHA-256. A folder without
`latents.json`, such as the reference's, is read as it is.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from tqdm import tqdm

from dpt.array_files import read_array
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data.coco import load_pixels
from dpt.files import append_line, read_json, read_json_lines, write_bytes, write_text

MANIFEST = "latents.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Manifest:
    """The model and size that latents depend on."""

    model: str
    vae: list[float]
    """its fingerprint"""
    scaling_factor: float
    size: int
    shape: list[int]


class Checksum(Struct):
    """A line of `checksums_*.jsonl`."""

    file: str
    sha256: str


def vae_fingerprint(vae: torch.nn.Module) -> list[float]:
    """One weight of each of an autoencoder's 64 largest tensors; the same in any precision but for rounding."""
    tensors = sorted(vae.state_dict().items(), key=lambda item: (-item[1].numel(), item[0]))[:64]
    return [tensor.flatten()[tensor.numel() // 2].item() for _, tensor in tensors]


def manifest(sd: StableDiffusion, size: int) -> Manifest:
    """The manifest of latents of a model and size."""
    shape = list(sd.latent_shape(size, size))
    return Manifest(sd.name, vae_fingerprint(sd.vae), sd.vae.config.scaling_factor, size, shape)


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest. Raises ValueError naming file and field."""
    return read_json(folder / MANIFEST, Manifest)


def check_manifest(folder: Path, expected: Manifest) -> None:
    """Raises ValueError where the folder says that its latents are another model's or size's."""
    if not (folder / MANIFEST).exists():
        return
    found = read_manifest(folder)
    same_vae = len(found.vae) == len(expected.vae) and np.allclose(found.vae, expected.vae, rtol=0.01, atol=1e-4)
    both = {name: (getattr(found, name), getattr(expected, name)) for name in ("scaling_factor", "size")}
    differing = [f"{name} {there}, here {here}" for name, (there, here) in both.items() if there != here]
    if differing or not same_vae:
        raise ValueError(
            f"latents in {folder} were made by {found.model}; this model is {expected.model} "
            f"({', '.join(differing) or 'other weights'}): cache them again into another folder"
        )


class LatentFolder:
    """Reads cached latents.

    Raises:
        ValueError: no such folder, or one of another model.
    """

    def __init__(self, folder: Path, sd: StableDiffusion, size: int):
        if not folder.is_dir():
            raise ValueError(f"latents: {folder} is no folder; python -m dpt.data cache-latents makes one")
        check_manifest(folder, manifest(sd, size))
        self.folder, self.shape = folder, sd.latent_shape(size, size)

    def read(self, stem: str) -> torch.Tensor:
        """Scaled latents (C, h, w) float32 of an image. Raises ValueError naming the file where that fails."""
        path = self.folder / f"{stem}.npy"
        latents = read_array(path, remedy="python -m dpt.data cache-latents makes it")
        if latents.size != np.prod(self.shape) or latents.shape[-3:] != self.shape:
            raise ValueError(f"{path} is {latents.shape}; the model's latents are {self.shape}")
        array = np.array(latents, np.float32).reshape(self.shape)
        if not np.isfinite(array).all():
            raise ValueError(f"{path} holds no latents: some of its numbers are not finite")
        return torch.from_numpy(array)


def cache_folder(
    sd: StableDiffusion, images: Path, folder: Path, *, size: int, batch_size: int = 8, shard: tuple[int, int] = (0, 1)
) -> int:
    """Encodes every image of a folder into `folder` and returns how many were new; files already there are kept.

    Latents are the posterior's mean, float16.

    Args:
        shard: (k, n): take every n-th image, from the k-th.

    Raises:
        ValueError: no images, an unreadable one, or latents of another model in `folder`.
    """
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if images.is_dir() else []
    if not files:
        raise ValueError(f"{images} holds no images")
    stems = [path.stem for path in files]
    if len(set(stems)) < len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"{images} has several images named {double}; latents are named by the stem")
    folder.mkdir(parents=True, exist_ok=True)
    expected = manifest(sd, size)
    check_manifest(folder, expected)
    if not (folder / MANIFEST).exists() and any(folder.glob("*.npy")):
        raise ValueError(f"{folder} holds latents of an unknown model (no {MANIFEST}): choose another --output")
    write_text(folder / MANIFEST, json.dumps(asdict(expected), indent=1))
    k, n = shard
    missing = [path for path in files[k::n] if not (folder / f"{path.stem}.npy").exists()]
    sums = folder / f"checksums_{k}_of_{n}.jsonl"
    for start in tqdm(range(0, len(missing), batch_size), desc="latents", mininterval=2):
        part = missing[start : start + batch_size]
        latents = sd.encode_images(torch.stack([load_pixels(path, size) for path in part])).half().cpu().numpy()
        for path, array in zip(part, latents, strict=True):
            np.save(buffer := io.BytesIO(), array)
            content = buffer.getvalue()
            name, digest = f"{path.stem}.npy", hashlib.sha256(content).hexdigest()
            append_line(sums, {"file": name, "sha256": digest})  # before the array: a file without a sum can't be
            write_bytes(folder / name, content)
    return len(missing)


def verify_folder(folder: Path) -> list[str]:
    """Problems of cached latents: files that differ from their checksum or are missing.

    A file that was encoded again, in another batch or shard, has several; any of them is right.

    Raises:
        ValueError: a list of checksums cannot be read; file and line are named.
    """
    sums: dict[str, set[str]] = {}
    for path in sorted(folder.glob("checksums_*.jsonl")):
        for record in read_json_lines(path, Checksum):
            sums.setdefault(record.file, set()).add(record.sha256)
    problems = []
    for name, expected in sums.items():
        path = folder / name
        if path.name != name:
            problems.append(f"{name} in the checksums is no name of a file here")
        elif not path.exists():
            problems.append(f"{path} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() not in expected:
            problems.append(f"{path} differs from its checksum")
    return problems
