"""Latents of image files, encoded once: `<image stem>.npy`, one array a file, already scaled.

Beside them `latents.json` names the autoencoder, and `checksums_*.jsonl` holds every file's SHA-256. A folder without
`latents.json`, such as the reference's, is read as it is.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dpt.data.coco import load_pixels, read_json
from dpt.stable_diffusion import StableDiffusion

MANIFEST = "latents.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def vae_fingerprint(vae: torch.nn.Module) -> list[float]:
    """One weight of each of an autoencoder's 64 largest tensors; the same in any precision but for rounding."""
    tensors = sorted(vae.state_dict().items(), key=lambda item: (-item[1].numel(), item[0]))[:64]
    return [tensor.flatten()[tensor.numel() // 2].item() for _, tensor in tensors]


def manifest(sd: StableDiffusion, size: int) -> dict:
    """What latents depend on."""
    return {
        "model": sd.name,
        "vae": vae_fingerprint(sd.vae),
        "scaling_factor": sd.vae.config.scaling_factor,
        "size": size,
        "shape": list(sd.latent_shape(size, size)),
    }


def check_manifest(folder: Path, expected: dict) -> None:
    """Raises ValueError where the folder says that its latents are another model's or size's."""
    path = folder / MANIFEST
    if not path.exists():
        return
    found = read_json(path)
    same_vae = len(found.get("vae", [])) == len(expected["vae"]) and np.allclose(
        found["vae"], expected["vae"], rtol=0.01, atol=1e-4
    )
    differing = [key for key in ("scaling_factor", "size") if found.get(key) != expected[key]]
    if differing or not same_vae:
        what = ", ".join(f"{key} {found.get(key)}, here {expected[key]}" for key in differing) or "other weights"
        raise ValueError(
            f"latents in {folder} were made by {found.get('model')}; this model is {expected['model']} ({what}): cache "
            "them again into another folder"
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
        try:
            latents = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as latents: {error}") from error
        if latents.size != np.prod(self.shape) or latents.shape[-3:] != self.shape:
            raise ValueError(f"{path} is {latents.shape}; the model's latents are {self.shape}")
        return torch.from_numpy(latents.reshape(self.shape)).float()


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
    _write(folder / MANIFEST, json.dumps(expected, indent=1).encode())
    k, n = shard
    missing = [path for path in files[k::n] if not (folder / f"{path.stem}.npy").exists()]
    sums = folder / f"checksums_{k}_of_{n}.jsonl"
    for start in tqdm(range(0, len(missing), batch_size), desc="latents", mininterval=2):
        part = missing[start : start + batch_size]
        latents = sd.encode_images(torch.stack([load_pixels(path, size) for path in part])).half().cpu().numpy()
        for path, array in zip(part, latents, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = buffer.getvalue()
            with sums.open("a") as file:  # before the array: a file without a sum can't be
                file.write(
                    json.dumps({"file": f"{path.stem}.npy", "sha256": hashlib.sha256(content).hexdigest()}) + "\n"
                )
            _write(folder / f"{path.stem}.npy", content)
    return len(missing)


def verify_folder(folder: Path) -> list[str]:
    """What is wrong with cached latents: files that differ from their checksum or are missing."""
    sums = {}
    for path in sorted(folder.glob("checksums_*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                sums[record["file"]] = record["sha256"]
    problems = []
    for name, expected in sums.items():
        path = folder / name
        if not path.exists():
            problems.append(f"{path} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            problems.append(f"{path} differs from its checksum")
    return problems


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
