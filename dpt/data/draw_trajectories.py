"""Draws a model's own trajectories, and lets a scorer judge the pictures: `python -m dpt.data trajectories CONFIG`.

Several noises are drawn for each prompt; the latents that chosen steps read are kept, and each finished picture is
judged. `dpt.data.trajectories` describes the folder.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from dpt.backbones.stable_diffusion import weights_fingerprint
from dpt.base_models import DTYPE_NAMES
from dpt.bounds import bounded, check_bounds, one_of
from dpt.choosing_rules import candidate_seeds
from dpt.config import differences
from dpt.data.trajectories import (
    MANIFEST,
    SHARDS,
    DrawnPrompt,
    PictureLabel,
    Shard,
    TrajectoriesManifest,
    label_file,
    numbered_shards,
    read_labels,
    read_shard,
    read_shards,
)
from dpt.device import DTYPES
from dpt.drawing import Artist
from dpt.evaluation.flags import BLIP_FOLDER, METRICS
from dpt.evaluation.generate import noise_seed
from dpt.evaluation.judges import make_judge, value_of
from dpt.evaluation.prompts import load_prompt_set
from dpt.files import append_line, read_json, read_json_lines, replacing, write_text
from dpt.images import to_images
from dpt.sampling_settings import values
from dpt.schedulers import make_scheduler, set_timesteps


@dataclass
class TrajectorySettings:
    """Settings of `python -m dpt.data trajectories`: every key of its YAML file."""

    output: str = ""
    """the folder of the trajectories"""
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
    """seed of each prompt's first noise; the seeds of evaluate.py begin at 0"""
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


class PictureValue(Struct):
    """A line of a user's own judgements."""

    picture: str
    value: float


def make(settings: TrajectorySettings, *, device: torch.device | str) -> tuple[int, int]:
    """Draws and judges the missing pictures; a killed run goes on with the same settings.

    Returns:
        How many prompts were drawn, and how many pictures judged.

    Raises:
        ValueError: settings, prompts, weights or a folder that cannot be used; it is named.
    """
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
    folder, judge = Path(settings.output), _judge(settings)  # what is missing is said before anything is drawn
    artist = Artist.load(settings.model, settings.dpt, dtype=DTYPES[settings.dtype], device=device)
    drawn = draw_missing(settings, artist, prompts, folder)
    if settings.pictures:
        save_pictures(artist.sd, folder)
    return drawn, 0 if judge is None else label_missing(settings, artist.sd, folder, *judge)


def _normal(text: str) -> str:
    """A prompt in lower case, with single spaces and without a full stop at its end."""
    return " ".join(text.casefold().split()).rstrip(".")


def draw_missing(settings: TrajectorySettings, artist: Artist, prompts: list, folder: Path) -> int:
    """Draws the shards that the folder lacks; returns how many prompts they hold."""
    sd = artist.sd
    sampling = artist.sampling.changed(
        guidance_scale=settings.guidance_scale, num_inference_steps=settings.num_inference_steps
    )
    sampling = replace(sampling.without_correction(), candidates=1, choose_at=())
    if max(settings.steps) >= sampling.num_inference_steps:
        last = sampling.num_inference_steps - 1
        raise ValueError(f"steps names step {max(settings.steps)}; {last + 1} steps are 0 to {last}")
    scheduler = make_scheduler(sd.scheduler, sampling.scheduler, parity=sampling.parity)
    shape = sd.latent_shape(sampling.height, sampling.width)
    set_timesteps(scheduler, sampling.num_inference_steps, "cpu", shape=shape)
    about = TrajectoriesManifest(
        model=settings.model,
        weights=weights_fingerprint(*sd.parts.values()),
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
    for start in tqdm(range(0, len(missing), settings.prompts_per_shard), desc="trajectories", mininterval=2):
        part = missing[start : start + settings.prompts_per_shard]
        seeds = [candidate_seeds(noise_seed(prompt, settings.seed), settings.noises) for prompt in part]
        texts = [prompt.text for prompt in part for _ in range(settings.noises)]
        kept: list[torch.Tensor] = []
        drawings = artist.draw(texts, list(chain(*seeds)), sampling, method=_keeper(kept, about.steps))
        tensors = {"latents": torch.stack(kept, dim=1), "final": torch.stack([one.latents for one in drawings])}
        shape = (len(part), settings.noises)  # of prompts and noises, which were one dimension
        tensors = {name: x.half().cpu().unflatten(0, shape).contiguous() for name, x in tensors.items()}
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
    """A guidance method that changes nothing, and keeps the latents that the denoiser reads at some steps."""

    def method(guidance, sampling, prompts, seeds, trace):
        def denoise(latents, timestep, step):
            if step in steps:
                kept.append(guidance.scheduler.scale_model_input(latents, timestep).clone())
            return guidance(latents, timestep, step)

        return denoise

    return method


def _mixed(prompts: list) -> list:
    """Prompts of all categories in turn, so that the first ones are a fair part of the whole."""
    before, ranks = Counter(), []
    for prompt in prompts:
        ranks.append(before[prompt.categories[0]])
        before[prompt.categories[0]] += 1
    return [prompts[k] for k in sorted(range(len(prompts)), key=ranks.__getitem__)]


def _check_or_write(folder: Path, about: TrajectoriesManifest) -> None:
    """Raises ValueError where the folder's trajectories are others; a new folder gets its manifest."""
    if (folder / MANIFEST).exists():
        before, now = (_flat(manifest) for manifest in (read_json(folder / MANIFEST, TrajectoriesManifest), about))
        if differing := differences(before, now):
            raise ValueError(f"{folder} holds trajectories of {'; '.join(differing)}: choose another output")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output {folder} holds other files, and no {MANIFEST}; choose an empty folder")
    write_text(folder / MANIFEST, json.dumps(msgspec.to_builtins(about), indent=1) + "\n")


def _flat(about: TrajectoriesManifest) -> dict:
    """A manifest's values by name, without the prompt set: another set may be added."""
    flat = msgspec.json.decode(msgspec.json.encode(about))
    del flat["prompts"]
    return flat | flat.pop("sampling")


def picture_names(number: int, count: int) -> list[str]:
    """Names of a prompt's pictures, by its number."""
    return [f"{number:06d}_{k:03d}.png" for k in range(count)]


def save_pictures(sd, folder: Path) -> None:
    """Writes the finished pictures that are not there yet into `pictures/`."""
    (folder / "pictures").mkdir(exist_ok=True)
    for numbers, shard in numbered_shards(folder):
        for number, final in zip(numbers, read_shard(folder, shard)["final"], strict=True):
            paths = [folder / "pictures" / name for name in picture_names(number, len(final))]
            if not all(path.exists() for path in paths):
                for path, picture in zip(paths, to_images(sd.decode_latents(final)), strict=True):
                    with replacing(path) as temporary:
                        Image.fromarray(picture).save(temporary, "png")


def label_missing(settings: TrajectorySettings, sd, folder: Path, name: str, judge) -> int:
    """Judges pictures that the scorer has not judged yet; returns how many.

    Args:
        name, judge: as `_judge` gives them.
    """
    path, judged = label_file(folder, settings.scorer), 0
    labels = read_labels(path) if path.exists() else []
    known = {(label.prompt, label.seed) for label in labels}
    if others := {label.judge for label in labels} - {name}:
        raise ValueError(f"{path} holds values by {others.pop()}; these would be by {name}: move that file away")
    shards = list(numbered_shards(folder))
    for numbers, shard in tqdm(shards, desc=f"labels by {settings.scorer}", mininterval=2):
        if all((prompt.text, seed) in known for prompt in shard.prompts for seed in prompt.seeds):
            continue
        for number, prompt, final in zip(numbers, shard.prompts, read_shard(folder, shard)["final"], strict=True):
            pictures = list(to_images(sd.decode_latents(final)))
            names = picture_names(number, len(pictures))
            for seed, value in zip(prompt.seeds, judge(pictures, [prompt.text] * len(names), names), strict=True):
                if (prompt.text, seed) not in known:
                    append_line(path, msgspec.to_builtins(PictureLabel(prompt.text, seed, value, name)))
                    judged += 1
    return judged


def _judge(settings: TrajectorySettings):
    """The judge's name, and a function that maps (pictures, prompts, names) to values; None for no scorer."""
    if settings.scorer == "none":
        return None
    if settings.scorer.endswith(".jsonl"):
        values = {row.picture: row.value for row in read_json_lines(settings.scorer, PictureValue)}

        def by_file(pictures, prompts, names):
            if lacking := [name for name in names if name not in values]:
                raise ValueError(f"{settings.scorer} has no value for {lacking[0]}")
            return [values[name] for name in names]

        return settings.scorer, by_file
    if settings.scorer not in METRICS:
        raise ValueError(f"scorer is {settings.scorer!r}; it must be {', '.join(METRICS)}, none or a .jsonl file")
    scorer = make_judge(
        settings.scorer,
        clip_model=settings.clip_model,
        clip_weights=settings.clip_weights and Path(settings.clip_weights),
        blip=Path(settings.blip) if settings.blip else BLIP_FOLDER,
    )

    def by_scorer(pictures, prompts, names):
        return [value_of(record) for record in scorer.metric(pictures, prompts)]

    return f"{scorer.name} {scorer.fingerprint}", by_scorer
