"""A model's own half-drawn pictures, and a judge's values of the finished ones.

The adapter chooses between half-drawn pictures; on these it can learn to. `python -m dpt.data
trajectories CONFIG` (`dpt.data.draw_trajectories`) fills a folder:

    trajectories.json    the model and settings that everything in it depends on
    shards.jsonl         a line a shard: its file, SHA-256, prompts, categories and seeds
    00000.safetensors    `latents` (P, N, K, C, h, w) and `final` (P, N, C, h, w), float16
    labels_NAME.jsonl    a line a picture: prompt, seed, the scorer's value, and whose it is; one file a scorer
    pictures/            with `pictures: true`, PNG files for a judge of your own

Shapes: P prompts of a shard, N noises a prompt, K kept steps, C latent channels, (h, w) latent size.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from safetensors.torch import load

from dpt.base_models import known_name
from dpt.data.collate import sample_generator
from dpt.files import read_bytes, read_json, read_json_lines

MANIFEST, SHARDS = "trajectories.json", "shards.jsonl"


class TrajectoriesManifest(Struct):
    """The model and settings that all trajectories of a folder depend on."""

    model: str
    weights: str
    """fingerprint of text encoder, denoiser (with LoRA) and autoencoder"""
    sampling: dict
    dtype: str
    prompts: str
    noises: int
    seed: int
    steps: list[int]
    timesteps: list[float]
    """of the kept steps"""


class DrawnPrompt(Struct):
    """A prompt of a shard."""

    text: str
    category: str
    seeds: list[int]


class Shard(Struct):
    """A line of shards.jsonl."""

    file: str
    sha256: str
    prompts: list[DrawnPrompt]


class PictureLabel(Struct):
    """A line of labels_NAME.jsonl."""

    prompt: str
    seed: int
    value: float
    judge: str
    """the scorer and a fingerprint of its weights"""


def label_file(folder: Path, scorer: str) -> Path:
    """The file of a scorer's values; a user's own file of values gives it its stem."""
    return folder / f"labels_{Path(scorer).stem if scorer.endswith('.jsonl') else scorer}.jsonl"


def read_shards(folder: Path) -> list[Shard]:
    """The shards that a folder lists; none where it has no list yet."""
    return read_json_lines(folder / SHARDS, Shard) if (folder / SHARDS).exists() else []


def numbered_shards(folder: Path) -> Iterator[tuple[range, Shard]]:
    """The shards with the numbers of their prompts in the folder."""
    stop = 0
    for shard in read_shards(folder):
        stop += len(shard.prompts)
        yield range(stop - len(shard.prompts), stop), shard


def read_shard(folder: Path, shard: Shard) -> dict[str, torch.Tensor]:
    """A shard's tensors. Raises ValueError where the file is missing or has changed."""
    content = read_bytes(folder / shard.file)
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ValueError(
            f"{folder / shard.file} is damaged: it differs from its checksum in {SHARDS}; take its line out of there "
            "and draw it again"
        )
    return load(content)


def read_labels(path: Path) -> list[PictureLabel]:
    """A scorer's values. Raises ValueError naming a line that cannot be read, or whose value is not finite."""
    labels = read_json_lines(path, PictureLabel)
    for n, label in enumerate(labels, 1):
        if not np.isfinite(label.value):
            raise ValueError(f"{path}, record {n}: value is {label.value}; it must be a finite number")
    return labels


@dataclass
class Ranked:
    """Half-drawn pictures of one prompt at one step."""

    text: str
    category: str
    timestep: float
    latents: torch.Tensor
    """(N, C, h, w) float32, as the denoiser reads them"""
    values: torch.Tensor
    """(N,), of the finished pictures"""


class RankedPrompts:
    """Random access to the prompts of a folder whose pictures differ in value, by (index, epoch).

    Each epoch takes one of the kept steps of each prompt. All latents are kept in memory, in half precision.

    Args:
        scorer: the name of the scorer whose values count.
        held_out: the tenth prompts that are left out of training, instead of the others.
        num_prompts: the first so many of the folder.
        latent_shape: of the model that is to learn.

    Raises:
        ValueError: a folder of another model, labels missing, or all equal within every prompt.
    """

    def __init__(
        self,
        folder: str | Path,
        scorer: str,
        *,
        model: str,
        latent_shape: tuple[int, int, int],
        held_out: bool = False,
        num_prompts: int | None = None,
        seed: int = 0,
    ):
        folder, self.seed = Path(folder), seed
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"data.trajectories {folder} holds no {MANIFEST}; `python -m dpt.data trajectories` makes it"
            )
        self.about = read_json(folder / MANIFEST, TrajectoriesManifest)
        if (known_name(self.about.model) or self.about.model) != (known_name(model) or model):
            raise ValueError(f"{folder} holds trajectories of {self.about.model}; model.name is {model}")
        path = label_file(folder, scorer)
        if not path.exists():
            there = ", ".join(sorted(p.stem.removeprefix("labels_") for p in folder.glob("labels_*.jsonl")))
            raise ValueError(f"data.labels is {scorer!r}; {folder} has values by {there or 'no scorer yet'}")
        values = {(label.prompt, label.seed): label.value for label in read_labels(path)}
        self.prompts, self.latents, self.values = [], [], []
        for numbers, shard in numbered_shards(folder):
            wanted = [k for k, n in enumerate(numbers) if (n % 10 == 9) == held_out and n < (num_prompts or n + 1)]
            if not wanted:
                continue
            latents = read_shard(folder, shard)["latents"]
            if latents.shape[3:] != latent_shape or latents.shape[2] != len(self.about.steps):
                raise ValueError(
                    f"{folder / shard.file} holds latents {tuple(latents.shape[2:])}; {model} has {latent_shape}, at "
                    f"{len(self.about.steps)} steps"
                )
            for k in wanted:
                prompt = shard.prompts[k]
                if lacking := [seed for seed in prompt.seeds if (prompt.text, seed) not in values]:
                    raise ValueError(
                        f"{path} has no value for seed {lacking[0]} of {prompt.text!r}: run `python -m dpt.data "
                        "trajectories` again"
                    )
                own = torch.tensor([values[prompt.text, seed] for seed in prompt.seeds])
                if own.min() < own.max():
                    self.prompts.append(prompt)
                    self.latents.append(latents[k])
                    self.values.append(own)
        if not self.prompts:
            which = "every prompt held out" if held_out else "every prompt"
            raise ValueError(f"{path}: the values are equal within {which}; nothing to rank")

    def __len__(self) -> int:
        return len(self.prompts)

    def get(self, index: int, epoch: int) -> Ranked:
        """A prompt's pictures at a step that (seed, prompt, epoch) choose."""
        generator = sample_generator(self.seed, index, epoch, "draw")
        return self.at(index, int(torch.randint(len(self.about.steps), (1,), generator=generator)))

    def at(self, index: int, k: int) -> Ranked:
        """A prompt's pictures at the k-th of the kept steps."""
        prompt, latents = self.prompts[index], self.latents[index][:, k].float()
        return Ranked(prompt.text, prompt.category, self.about.timesteps[k], latents, self.values[index])


@torch.no_grad()
def encode_ranked(prompts: list[Ranked], sd) -> dict:
    """Prompts of equally many noises as the `ranked` part of `DPT.forward`'s input."""
    count = len(prompts[0].values)
    conditioning = sd.condition([prompt.text for prompt in prompts])
    conditioning = conditioning.map(lambda value: value.repeat_interleave(count, dim=0))
    return {
        "noisy_latents": torch.cat([prompt.latents for prompt in prompts]).to(sd.device),
        "timesteps": torch.tensor([prompt.timestep for prompt in prompts], device=sd.device).repeat_interleave(count),
        "context": conditioning.encoder_hidden_states,
        "pooled": conditioning.pooled_prompt_embeds,
        "further": conditioning.further,
        "values": torch.stack([prompt.values for prompt in prompts]).to(sd.device),
    }
