"""A model's own half-drawn pictures, and what a judge says of the pictures that became of them.

The adapter chooses between half-drawn pictures; here it can learn from such pictures. `python -m dpt.data
trajectories CONFIG` draws several noises for each prompt, keeps the latents that chosen steps read, and lets a scorer
judge each finished picture. A folder holds

    trajectories.json    what everything in it depends on
    shards.jsonl         a line a shard: its file, SHA-256, prompts, categories and seeds
    00000.safetensors    `latents` (P, N, K, C, h, w) and `final` (P, N, C, h, w), float16
    labels_NAME.jsonl    a line a picture: prompt, seed, the scorer's value, and whose it is; one file a scorer
    pictures/            with `pictures: true`, PNG files for a judge of your own

Shapes: P prompts of a shard, N noises a prompt, K kept steps, C latent channels, (h, w) latent size.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dpt.base_models import DTYPE_NAMES, known_name, recommended
from dpt.bounds import bounded, check_bounds, one_of
from dpt.config import differences
from dpt.data.collate import sample_generator
from dpt.files import read_json, read_json_lines, replacing, write_text
from dpt.images import append_line, to_images
from dpt.settings import values

MANIFEST, SHARDS = "trajectories.json", "shards.jsonl"


@dataclass
class TrajectorySettings:
    """What `python -m dpt.data trajectories` draws; every key of its YAML file."""

    output: str = ""
    """the folder that they go to"""
    model: str = "sd21-base"
    dpt: str = "none"
    """weights whose LoRA draws; none: the base model"""
    prompts: str = ""
    """a prompt set of evaluate.py, such as a file of one prompt a line"""
    per_category: int | None = bounded(None, at_least=1)
    """only the first so many prompts of each category"""
    excluded: list[str] = field(default_factory=list)
    """prompt sets that are evaluated on: a prompt that is in one is refused"""
    noises: int = bounded(8, at_least=2, at_most=1024)
    seed: int = bounded(500, at_least=0, below=1000)
    """of each prompt's first noise, beside those of evaluate.py: it draws seeds from 0 on"""
    guidance_scale: float | None = bounded(None, at_least=0, below=1000)
    num_inference_steps: int | None = bounded(None, at_least=1, at_most=500)
    """by default what is recommended for the model"""
    steps: list[int] = bounded([0, 2, 5, 8, 12, 17], at_least=0)
    """which steps' latents are kept; 0 is the noise itself"""
    scorer: str = "oracle"
    """oracle, shapes-clip, clip, blip, or a .jsonl file of {"picture": NAME, "value": NUMBER}; none: draw alone"""
    clip_model: str = "ViT-H-14"
    clip_weights: str | None = None
    blip: str | None = None
    """weights of the scorers, as evaluate.py's flags name them"""
    pictures: bool = False
    prompts_per_shard: int = bounded(4, at_least=1, at_most=4096)
    dtype: str = one_of("float32", *DTYPE_NAMES)

    def __post_init__(self):
        check_bounds(self)
        if len(set(self.steps)) < len(self.steps) or not self.steps:
            raise ValueError(f"steps is {self.steps}; it must name at least one step, each once")


class Manifest(Struct):
    """What all trajectories of a folder depend on."""

    model: str
    weights: str
    """fingerprint of text encoder, U-Net (with LoRA) and autoencoder"""
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


class Label(Struct):
    """A line of labels_NAME.jsonl."""

    prompt: str
    seed: int
    value: float
    judge: str
    """the scorer and a fingerprint of its weights"""


class PictureValue(Struct):
    """A line of a user's own judgements."""

    picture: str
    value: float


def picture_name(number: int, k: int) -> str:
    """The file of the k-th noise of the number-th prompt in `pictures/`."""
    return f"{number:06d}_{k:03d}.png"


def label_file(folder: Path, scorer: str) -> Path:
    """Where a scorer's values are; of a file of one's own by its stem."""
    return folder / f"labels_{Path(scorer).stem if scorer.endswith('.jsonl') else scorer}.jsonl"


def make(settings: TrajectorySettings, *, device: torch.device | str) -> tuple[int, int]:
    """Draws and judges what is missing; a killed run goes on with the same settings.

    Returns:
        How many prompts were drawn, and how many pictures judged.

    Raises:
        ValueError: settings, prompts, weights or a folder that cannot be used; it is named.
    """
    from dpt.evaluation.prompts import load_prompt_set
    from dpt.stable_diffusion import DTYPES, load_stable_diffusion

    for name in ("output", "prompts"):
        if not getattr(settings, name):
            raise ValueError(f"{name} is missing; name a folder (output) and a prompt set (prompts) in the config")
    prompts = load_prompt_set(settings.prompts, per_category=settings.per_category)
    for other in settings.excluded:
        known = {_normal(prompt.text) for prompt in load_prompt_set(other)}
        if both := [prompt.text for prompt in prompts if _normal(prompt.text) in known]:
            raise ValueError(
                f"{len(both)} prompts of {settings.prompts} are in {other}, which is evaluated on, such as "
                f"{both[0]!r}: leave them out"
            )
    folder = Path(settings.output)
    sd = load_stable_diffusion(settings.model, dtype=DTYPES[settings.dtype], device=device)
    drawn = draw_missing(settings, sd, prompts, folder)
    return drawn, 0 if settings.scorer == "none" else label_missing(settings, sd, folder)


def _normal(text: str) -> str:
    """A prompt without what makes no other of it: case, spaces, the last full stop."""
    return " ".join(text.casefold().split()).rstrip(".")


def draw_missing(settings: TrajectorySettings, sd, prompts: list, folder: Path) -> int:
    """Draws the shards that the folder lacks; returns how many prompts they hold."""
    from dpt.checkpoint import load_checkpoint
    from dpt.choosing import candidate_seeds
    from dpt.drawing import Artist, without_correction
    from dpt.evaluation.generate import noise_seed
    from dpt.schedulers import make_scheduler, set_timesteps
    from dpt.stable_diffusion import weights_fingerprint

    checkpoint = None if settings.dpt == "none" else load_checkpoint(settings.dpt)
    if checkpoint:
        checkpoint.attach(sd)
    sampling = recommended(settings.model, checkpoint and checkpoint.config).changed(
        guidance_scale=settings.guidance_scale, num_inference_steps=settings.num_inference_steps
    )
    sampling = replace(without_correction(sampling), candidates=1, choose_at=())
    if max(settings.steps) >= sampling.num_inference_steps:
        raise ValueError(f"steps names step {max(settings.steps)}; {sampling.num_inference_steps} steps are 0 to "
                         f"{sampling.num_inference_steps - 1}")  # fmt: skip
    scheduler = make_scheduler(sd.scheduler, sampling.scheduler, parity=sampling.parity)
    set_timesteps(scheduler, sampling.num_inference_steps, "cpu")
    about = Manifest(
        model=settings.model,
        weights=weights_fingerprint(sd.text_encoder, sd.vae, sd.unet),
        sampling=msgspec.to_builtins(values(sampling)),
        dtype=settings.dtype,
        prompts=settings.prompts,
        noises=settings.noises,
        seed=settings.seed,
        steps=sorted(settings.steps),
        timesteps=[float(scheduler.timesteps[step]) for step in sorted(settings.steps)],
    )
    _check_or_write(folder, about)
    shards = read_shards(folder)
    there = {prompt.text for shard in shards for prompt in shard.prompts}
    missing = [prompt for prompt in _mixed(prompts) if prompt.text not in there]
    artist = Artist(sd)
    for start in tqdm(range(0, len(missing), settings.prompts_per_shard), desc="trajectories", mininterval=2):
        part = missing[start : start + settings.prompts_per_shard]
        seeds = [candidate_seeds(noise_seed(prompt, settings.seed), settings.noises) for prompt in part]
        texts = [prompt.text for prompt in part for _ in range(settings.noises)]
        kept: list[torch.Tensor] = []
        drawings = artist.draw(texts, list(chain(*seeds)), sampling, method=_keeper(kept, about.steps))
        final = torch.stack([drawing.latents for drawing in drawings])
        tensors = {"latents": torch.stack(kept, dim=1), "final": final}  # (P * N, ...)
        tensors = {
            name: x.half().cpu().unflatten(0, (len(part), settings.noises)).contiguous() for name, x in tensors.items()
        }
        rows = [DrawnPrompt(p.text, p.categories[0], own) for p, own in zip(part, seeds, strict=True)]
        shards.append(_write_shard(folder / f"{len(shards):05d}.safetensors", tensors, rows))
    return len(missing)


def _write_shard(path: Path, tensors: dict[str, torch.Tensor], prompts: list[DrawnPrompt]) -> Shard:
    """Writes a shard, and its line behind the others' once the file is whole."""
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({error}); finished shards are kept: free some space") from error
    shard = Shard(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), prompts)
    append_line(path.parent / SHARDS, msgspec.to_builtins(shard))
    return shard


def _keeper(kept: list[torch.Tensor], steps: list[int]):
    """A guidance method that changes nothing, and keeps what the U-Net reads at some steps."""

    def method(guidance, sampling, prompts, seeds, trace):
        def denoise(latents, timestep, step):
            if step in steps:
                kept.append(guidance.scheduler.scale_model_input(latents, timestep).clone())
            return guidance(latents, timestep, step)

        return denoise

    return method


def _mixed(prompts: list) -> list:
    """Prompts of all categories in turn, so that what is drawn first is a fair part of the whole."""
    rank: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        category = prompt.categories[0]
        keys.append(rank.setdefault(category, 0))
        rank[category] += 1
    return [prompt for _, prompt in sorted(zip(keys, prompts, strict=True), key=lambda pair: pair[0])]


def _check_or_write(folder: Path, about: Manifest) -> None:
    """Raises ValueError where the folder's trajectories are others; a new folder gets its manifest."""
    if (folder / MANIFEST).exists():
        before, now = (_flat(manifest) for manifest in (read_json(folder / MANIFEST, Manifest), about))
        if differing := differences(before, now):
            raise ValueError(f"{folder} holds trajectories of {'; '.join(differing)}: choose another output")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output {folder} holds other files, and no {MANIFEST}; choose an empty folder")
    write_text(folder / MANIFEST, json.dumps(msgspec.to_builtins(about), indent=1) + "\n")


def _flat(about: Manifest) -> dict:
    """A manifest's values by name, but for the prompt set: others may follow."""
    flat = msgspec.json.decode(msgspec.json.encode(about))
    del flat["prompts"]
    return flat | flat.pop("sampling")


def read_shards(folder: Path) -> list[Shard]:
    """The shards that a folder lists; none where it has no list yet."""
    return read_json_lines(folder / SHARDS, Shard) if (folder / SHARDS).exists() else []


def read_shard(folder: Path, shard: Shard) -> dict[str, torch.Tensor]:
    """A shard's tensors. Raises ValueError where the file is missing or is not the one that was written."""
    path = folder / shard.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ValueError(f"{path} is damaged: it differs from its checksum in {SHARDS}; take its line out of there "
                         "and draw it again")  # fmt: skip
    return load_file(path)


def label_missing(settings: TrajectorySettings, sd, folder: Path) -> int:
    """Judges pictures that the scorer has not judged yet; returns how many."""
    path = label_file(folder, settings.scorer)
    labels = read_labels(path) if path.exists() else []
    known, (name, judge) = {(label.prompt, label.seed) for label in labels}, _judge(settings)
    if others := {label.judge for label in labels} - {name}:
        raise ValueError(f"{path} holds values by {others.pop()}; these would be by {name}: move that file away")
    number, judged = 0, 0
    for shard in tqdm(read_shards(folder), desc=f"labels by {settings.scorer}", mininterval=2):
        numbers = range(number, number + len(shard.prompts))
        number += len(shard.prompts)
        if all((prompt.text, seed) in known for prompt in shard.prompts for seed in prompt.seeds):
            continue
        tensors = read_shard(folder, shard)
        pictures = [to_images(sd.decode_latents(row.float().to(sd.device))) for row in tensors["final"]]
        if settings.pictures:
            write_pictures(folder / "pictures", numbers, pictures)
        for k, prompt in enumerate(shard.prompts):
            names = [picture_name(numbers[k], n) for n in range(len(prompt.seeds))]
            values = judge(list(pictures[k]), [prompt.text] * len(names), names)
            for seed, value in zip(prompt.seeds, values, strict=True):
                if (prompt.text, seed) not in known:
                    append_line(path, msgspec.to_builtins(Label(prompt.text, seed, value, name)))
                    judged += 1
    return judged


def _judge(settings: TrajectorySettings):
    """The judge's name, and a function that maps (pictures, prompts, names) to values."""
    if settings.scorer.endswith(".jsonl"):
        values = {row.picture: row.value for row in read_json_lines(settings.scorer, PictureValue)}

        def by_file(pictures, prompts, names):
            if lacking := [name for name in names if name not in values]:
                raise ValueError(f"{settings.scorer} has no value for {lacking[0]}")
            return [values[name] for name in names]

        return settings.scorer, by_file
    from dpt.evaluation.flags import BLIP_FOLDER, METRICS
    from dpt.evaluation.scorers import METRICS as SCORERS
    from dpt.evaluation.scorers import value_of

    if settings.scorer not in METRICS:
        raise ValueError(f"scorer is {settings.scorer!r}; it must be {', '.join(METRICS)}, none or a .jsonl file")
    given = argparse.Namespace(
        clip_model=settings.clip_model,
        clip_weights=settings.clip_weights and Path(settings.clip_weights),
        blip=Path(settings.blip) if settings.blip else BLIP_FOLDER,
    )
    scorer = SCORERS[settings.scorer](given)

    def by_scorer(pictures, prompts, names):
        return [value_of(record) for record in scorer.metric(pictures, prompts)]

    return f"{scorer.name} {scorer.fingerprint}", by_scorer


def write_pictures(folder: Path, numbers: range, pictures: list[np.ndarray]) -> None:
    """PNG files of a shard's pictures, (N, H, W, 3) a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in zip(numbers, pictures, strict=True):
        for k, picture in enumerate(row):
            Image.fromarray(picture).save(folder / picture_name(number, k))


def read_labels(path: Path) -> list[Label]:
    """A scorer's values. Raises ValueError naming a line that is none, or whose value is not finite."""
    labels = read_json_lines(path, Label)
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
    """(N, C, h, w) float32, as the U-Net reads them"""
    values: torch.Tensor
    """(N,), of the finished pictures"""


class RankedPrompts:
    """Random access to the prompts of a folder whose pictures differ in value, by (index, epoch).

    Each epoch takes one of the kept steps of each prompt. All latents are kept in memory, in half precision.

    Args:
        scorer: whose values.
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
        self.about = read_json(folder / MANIFEST, Manifest)
        if (known_name(self.about.model) or self.about.model) != (known_name(model) or model):
            raise ValueError(f"{folder} holds trajectories of {self.about.model}; model.name is {model}")
        path = label_file(folder, scorer)
        if not path.exists():
            there = ", ".join(sorted(p.stem.removeprefix("labels_") for p in folder.glob("labels_*.jsonl")))
            raise ValueError(f"data.labels is {scorer!r}; {folder} has values by {there or 'no scorer yet'}")
        values = {(label.prompt, label.seed): label.value for label in read_labels(path)}
        self.prompts, self.latents, self.values = [], [], []
        number = 0
        for shard in read_shards(folder):
            rows = range(number, number + len(shard.prompts))
            number += len(shard.prompts)
            wanted = [k for k, n in enumerate(rows) if (n % 10 == 9) == held_out and n < (num_prompts or n + 1)]
            if not wanted:
                continue
            latents = read_shard(folder, shard)["latents"]
            if latents.shape[3:] != latent_shape or latents.shape[2] != len(self.about.steps):
                raise ValueError(f"{folder / shard.file} holds latents {tuple(latents.shape[2:])}; {model} has "
                                 f"{latent_shape}, at {len(self.about.steps)} steps")  # fmt: skip
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
            raise ValueError(
                f"{path}: the values are equal within every prompt{' held out' * held_out}; nothing to rank"
            )

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
    context, pooled = sd.encode_prompts([prompt.text for prompt in prompts])
    return {
        "noisy_latents": torch.cat([prompt.latents for prompt in prompts]).to(sd.device),
        "timesteps": torch.tensor([prompt.timestep for prompt in prompts], device=sd.device).repeat_interleave(count),
        "context": context.repeat_interleave(count, dim=0),
        "pooled": pooled.repeat_interleave(count, dim=0),
        "values": torch.stack([prompt.values for prompt in prompts]).to(sd.device),
    }
