"""The stages of the embedded model's pretraining. Each keeps its results in the folder and does nothing twice."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.backbones.unet import set_cpu_attention
from dpt.base_models import recommended
from dpt.config import differences, flatten, load_config, save_config
from dpt.files import read_json, write_text
from dpt.images import numbered
from dpt.shapes import clip as clips
from dpt.shapes.oracle import LABELS
from dpt.shapes.pretraining_loop import read_state, train_stage
from dpt.shapes.quality_tables import judge_prompts
from dpt.shapes.settings import IMAGE_SIZE, Optimization, PretrainConfig
from dpt.shapes.unet import denoising_losses, make_scheduler, make_unet, validation_losses
from dpt.shapes.vae import (
    Latents,
    make_vae,
    measure_scaling_factor,
    reconstruction_error,
    scene_latents,
    vae_losses,
    whiten,
)
from dpt.shapes.world import PROMPT_CATEGORIES, ShapesWorld, load_prompts
from dpt.training.curves import plot_curves


def run_clip(config: PretrainConfig, folder: Path) -> None:
    """Trains the CLIP and writes it to `folder/clip`, or takes that of `init_from`."""
    if (folder / "clip/model.safetensors").exists():
        return
    if config.init_from:
        save_folder(folder / "clip", partial(clips.save_clip, *clips.load_clip(Path(config.init_from) / "clip")))
        return
    torch.manual_seed(0)
    tokenizer, settings, size = clips.make_tokenizer(), config.clip, config.clip.train.part_size
    clip = clips.make_clip(tokenizer, width=settings.width, layers=settings.layers, heads=settings.heads)
    drawn = clip, tokenizer, ShapesWorld("train", seed=1)

    def losses_at(step):
        losses = clips.contrastive_loss(*drawn, step, batch_size=size, hard_share=settings.hard_share)
        return losses | clips.wording_loss(*drawn, step, batch_size=size // 4)

    def evaluate(average, step):
        return clips.retrieval(average, tokenizer)

    average = train_stage("clip", folder, clip, losses_at, evaluate=evaluate, **_loop(settings.train))
    save_folder(folder / "clip", partial(clips.save_clip, average, tokenizer))
    print("pooled cosine to the hard negative:", clips.pooled_cosines(average, tokenizer))


def run_vae(config: PretrainConfig, folder: Path) -> None:
    """Trains the autoencoder and writes it to `folder/vae`."""
    if (folder / "vae/config.json").exists():
        return
    if config.init_from:
        save_folder(folder / "vae", AutoencoderKL.from_pretrained(config.init_from, subfolder="vae").save_pretrained)
        return
    torch.manual_seed(1)
    vae = make_vae(config.vae.channels)
    vae = _train_vae("vae", config, folder, vae, config.vae.train, seed=2, crop=config.vae.crop)
    whiten(vae, scene_latents(vae, ShapesWorld("train", seed=4), folder / "latents", count=2000))
    save_folder(folder / "vae", vae.save_pretrained)


def run_decoder(config: PretrainConfig, folder: Path) -> None:
    """Trains the decoder on and writes the autoencoder to `folder/vae-decoder`; its encoder stays as it is."""
    if (folder / "vae-decoder/config.json").exists():
        return
    vae, settings = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False), config.vae
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    options = {"seed": 3, "crop": IMAGE_SIZE, "latent_noise": settings.decoder_noise}
    vae = _train_vae("decoder", config, folder, vae, settings.decoder, **options)
    save_folder(folder / "vae-decoder", vae.save_pretrained)


def _train_vae(name, config, folder, vae, train, *, seed, **options):
    options |= {"batch_size": train.part_size, "kl_weight": config.vae.kl_weight}
    losses_at = partial(vae_losses, vae, ShapesWorld("train", seed=seed), **options)

    def evaluate(average, step):
        return reconstruction_error(average)

    return train_stage(name, folder, vae, losses_at, evaluate=evaluate, **_loop(train))


def run_latents(config: PretrainConfig, folder: Path) -> dict[str, np.ndarray]:
    """Caches latents of the train scenes and of 512 val scenes."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    counts = {"train": config.unet.num_latents, "val": 512}
    return {s: scene_latents(vae, ShapesWorld(s), folder / "latents", count=n) for s, n in counts.items()}


def run_unet(config: PretrainConfig, folder: Path) -> None:
    """Trains the U-Net on cached latents and web-like captions, and CLIP along with it; writes `folder/unet`.

    A text tower that was trained contrastively and then frozen tells words of place and size apart too little for the
    U-Net, so it learns from both losses. `export` takes both from the stage's state.
    """
    if (folder / "unet/config.json").exists():
        return
    settings, train = config.unet, config.unet.train
    posteriors = run_latents(config, folder)
    sd = assemble(config, folder, measure_scaling_factor(posteriors["train"]))
    if config.init_from:
        sd.denoiser = UNet2DConditionModel.from_pretrained(
            config.init_from, subfolder="unet", torch_dtype=torch.float32
        )
    set_cpu_attention(sd.denoiser)
    clip, _ = clips.load_clip(folder / "clip")
    sd.text_encoder = clip.text_model
    cached = {split: Latents(rows, sd.vae.config.scaling_factor) for split, rows in posteriors.items()}
    worlds = {split: ShapesWorld(split, noise=settings.web_noise) for split in cached}
    pairs = clip, sd.tokenizer, ShapesWorld("train", seed=5)
    options = {"batch_size": train.part_size, "caption_dropout": settings.caption_dropout}
    pair_size, wording_size = settings.contrastive_batch_size // train.parts, settings.wording_batch_size // train.parts

    def losses_at(step):
        losses = denoising_losses(sd, cached["train"], worlds["train"], step, **options)
        of_clip = clips.contrastive_loss(*pairs, step, batch_size=pair_size, hard_share=1.0)
        losses["loss_clip"] = settings.contrastive_weight * of_clip["loss_clip"]
        return losses | clips.wording_loss(*pairs, step, batch_size=wording_size)

    def evaluate(average, step):
        averaged = replace(sd, denoiser=average["unet"], text_encoder=average["clip"].text_model)
        with torch.autocast("cpu", torch.bfloat16):
            losses = validation_losses(averaged, cached["val"], worlds["val"])
        prompts = {c: load_prompts("val", c)[: settings.prompts_per_category] for c in PROMPT_CATEGORIES}
        sampling = recommended("shapes").changed(guidance_scale=settings.guidance_scale)
        verdicts = judge_prompts(averaged, prompts, sampling=sampling, folder=folder / f"samples/step_{step:07d}")
        labels = [record["label"] for record in verdicts]
        cosines = clips.pooled_cosines(average["clip"], sd.tokenizer, size=500)
        losses |= {label: labels.count(label) / len(labels) for label in LABELS}
        return losses | {f"cosine_{kind}": cosine for kind, cosine in cosines.items()}

    both = nn.ModuleDict({"unet": sd.denoiser, "clip": clip})
    groups = [list(part.parameters()) for part in both.values()]
    average = train_stage("unet", folder, both, losses_at, evaluate=evaluate, clip_groups=groups, **_loop(train))
    if (folder / "unet.metrics.jsonl").exists():
        plot_curves(folder / "unet.metrics.jsonl", folder / "unet.png")
    save_folder(folder / "unet", average["unet"].save_pretrained)


def assemble(config: PretrainConfig, folder: Path, scaling_factor: float) -> StableDiffusion:
    """A pipeline of the trained, frozen parts and a new U-Net."""
    clip, tokenizer = clips.load_clip(folder / "clip")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    decoder = folder / "vae-decoder"
    vae = AutoencoderKL.from_pretrained(decoder if decoder.exists() else folder / "vae")
    vae.register_to_config(scaling_factor=scaling_factor)
    torch.manual_seed(2)
    size = IMAGE_SIZE // 2 ** (len(config.vae.channels) - 1)
    shape = {"channels": config.unet.channels, "heads": config.unet.heads, "sample_size": size}
    unet = make_unet(context_width=config.clip.width, **shape)
    for module in (vae, text_encoder):
        module.eval().requires_grad_(False)
    return StableDiffusion("shapes", str(folder), tokenizer, text_encoder, vae, unet, make_scheduler())


def run_export(config: PretrainConfig, folder: Path) -> None:
    """Writes the model as a `StableDiffusionPipeline` folder in float16, the CLIP beside it."""
    scaling_factor = measure_scaling_factor(run_latents(config, folder)["train"])
    sd = assemble(config, folder, scaling_factor)
    clip, tokenizer = clips.load_clip(folder / "clip")
    state = read_state(folder / "unet.pt")
    try:
        nn.ModuleDict({"unet": sd.denoiser, "clip": clip}).load_state_dict(state["average"])
    except RuntimeError as error:
        raise ValueError(f"{folder / 'unet.pt'} is of another model: {error}") from error
    sd.text_encoder.load_state_dict(clip.text_model.state_dict())
    parts = {"vae": sd.vae.half(), "text_encoder": sd.text_encoder.half(), "unet": sd.denoiser.half()}
    parts |= {"tokenizer": sd.tokenizer, "scheduler": sd.scheduler, "safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)

    def write(output: Path):
        pipeline.save_pretrained(output)
        # transformers loads a tower in the precision its config names; the stock pipeline expects float32 by default
        text_config = output / "text_encoder/config.json"
        write_text(text_config, json.dumps(read_json(text_config, dict) | {"dtype": "float32"}, indent=2) + "\n")
        clips.save_clip(clip.half(), tokenizer, output / "clip")

    save_folder(Path(config.output), write)
    print(f"{config.output}: U-Net of step {state['step']}, scaling factor {scaling_factor:.4f}")


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder under a temporary name, then puts it in the place of one of that name.

    Other files of the folder before stay, in a folder whose name is printed.

    Raises:
        ValueError: the folder before is not empty and no model's.
    """
    models = any((folder / name).exists() for name in ("config.json", "model_index.json"))
    if folder.exists() and not models and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there, and no model's folder; name another")
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    if old.exists() and any(not (folder / path.relative_to(old)).exists() for path in old.rglob("*")):
        aside = next(path for path in numbered(folder.parent, f"{folder.name}-before-{{}}", 1) if not path.exists())
        old.rename(aside)
        print(f"the {folder.name} before held other files too and is now {aside}")
    shutil.rmtree(old, ignore_errors=True)


def _loop(train: Optimization) -> dict:
    return {name: value for name, value in vars(train).items() if name != "batch_size"}


class Stage(NamedTuple):
    run: Callable[[PretrainConfig, Path], object]
    needed: tuple[str, ...] = ()
    """files of earlier stages that it needs"""
    settings: tuple[str, ...] = ()
    """keys, or beginnings of keys, of the settings that it depends on"""


OF_UNET = ("unet.channels", "unet.heads", "unet.num_latents", "unet.caption_dropout", "unet.web_noise.", "unet.train.")
PRETRAINING_STAGES = {
    "clip": Stage(run_clip, (), ("clip.", "init_from")),
    "vae": Stage(run_vae, (), ("vae.channels", "vae.crop", "vae.kl_weight", "vae.train.", "init_from")),
    "latents": Stage(run_latents, ("vae",)),
    "unet": Stage(run_unet, ("clip", "vae"), (*OF_UNET, "unet.contrastive", "unet.wording", "init_from")),
    "decoder": Stage(run_decoder, ("vae",), ("vae.decoder", "vae.kl_weight")),
    "export": Stage(run_export, ("clip", "vae", "unet.pt")),
}


def check_settings(config: PretrainConfig, stage: str, folder: Path) -> None:
    """Raises ValueError where the folder's stage was begun with other settings; what differs is named."""
    path = folder / f"{stage}.yaml"
    if not path.exists() or not ((folder / f"{stage}.pt").exists() or (folder / stage).exists()):
        return
    now, before = (flatten(c) for c in (config, load_config(PretrainConfig, path)))
    own = [key for key in now if key.startswith(PRETRAINING_STAGES[stage].settings) and not key.endswith("_every")]
    if differing := differences(before, {key: now[key] for key in own}):
        raise ValueError(
            f"stage {stage} in {folder} was begun with other settings: {', '.join(differing)}; name another folder"
        )


def run(config: PretrainConfig) -> None:
    """Runs the stages that the config names. Raises ValueError for what is missing, or made with other settings."""
    torch.set_num_threads(config.threads)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        if lacking := [name for name in PRETRAINING_STAGES[stage].needed if not (folder / name).exists()]:
            raise ValueError(
                f"stage {stage} needs {folder / lacking[0]}, which an earlier stage makes: {list(PRETRAINING_STAGES)}"
            )
        check_settings(config, stage, folder)
        save_config(config, folder / f"{stage}.yaml")
        PRETRAINING_STAGES[stage].run(config, folder)
