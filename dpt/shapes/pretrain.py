"""Makes the embedded model from nothing: CLIP, autoencoder, cached latents, U-Net, and the diffusers folder.

    python -m dpt.shapes.pretrain configs/shapes/pretrain.yaml [key=value ...]

Every stage can be killed at any moment; the same command goes on where it stopped.
"""

import sys

from dpt.commands.pretrain import main

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.exit(main())

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from dpt.base_models import recommended
from dpt.config import flatten, load_config, save_config
from dpt.curves import plot_curves
from dpt.shapes.clip import (
    contrastive_loss,
    load_clip,
    make_clip,
    make_tokenizer,
    pooled_cosines,
    retrieval,
    save_clip,
    wording_loss,
)
from dpt.shapes.oracle import LABELS
from dpt.shapes.quality import judge_prompts
from dpt.shapes.scenes import render
from dpt.shapes.settings import IMAGE_SIZE, Optimization, PretrainConfig
from dpt.shapes.training import read_state, save_folder, train_stage
from dpt.shapes.unet import Latents, denoising_losses, make_scheduler, make_unet, validation_losses
from dpt.shapes.vae import cache_latents, make_vae, measure_scaling_factor, reconstruction_error, vae_losses, whiten
from dpt.shapes.world import PROMPT_CATEGORIES, ShapesWorld, load_prompts
from dpt.stable_diffusion import StableDiffusion
from dpt.unet_features import set_cpu_attention


def run_clip(config: PretrainConfig, folder: Path) -> None:
    """Trains the CLIP and writes it to `folder/clip`, or takes that of `init_from`."""
    if (folder / "clip/model.safetensors").exists():
        return
    if config.init_from:
        save_folder(folder / "clip", partial(save_clip, *load_clip(Path(config.init_from) / "clip")))
        return
    torch.manual_seed(0)
    tokenizer, train = make_tokenizer(), config.clip.train
    clip = make_clip(tokenizer, width=config.clip.width, layers=config.clip.layers, heads=config.clip.heads)
    world = ShapesWorld("train", seed=1)
    average = train_stage(
        "clip",
        folder,
        clip,
        lambda step: (
            contrastive_loss(
                clip, tokenizer, world, step, batch_size=train.part_size, hard_share=config.clip.hard_share
            )
            | wording_loss(clip, tokenizer, world, step, batch_size=train.part_size // 4)
        ),
        evaluate=lambda model, step: retrieval(model, tokenizer),
        **_loop(train),
    )
    save_folder(folder / "clip", partial(save_clip, average, tokenizer))
    print("pooled cosine to the hard negative:", pooled_cosines(average, tokenizer))


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
    world = ShapesWorld("train", seed=4)
    whiten(
        vae,
        cache_latents(vae, lambda i: render(world.scene(i)[1]), folder / "latents", key=world.key(), count=2000),
    )
    save_folder(folder / "vae", vae.save_pretrained)


def run_decoder(config: PretrainConfig, folder: Path) -> None:
    """Trains the decoder on and writes the autoencoder to `folder/vae-decoder`; its encoder stays as it is."""
    if (folder / "vae-decoder/config.json").exists():
        return
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    vae = _train_vae(
        "decoder",
        config,
        folder,
        vae,
        config.vae.decoder,
        seed=3,
        crop=IMAGE_SIZE,
        latent_noise=config.vae.decoder_noise,
    )
    save_folder(folder / "vae-decoder", vae.save_pretrained)


def _train_vae(name, config, folder, vae, train, *, seed, crop, latent_noise=0.0):
    world = ShapesWorld("train", seed=seed)
    return train_stage(
        name,
        folder,
        vae,
        lambda step: vae_losses(
            vae,
            world,
            step,
            batch_size=train.part_size,
            crop=crop,
            kl_weight=config.vae.kl_weight,
            latent_noise=latent_noise,
        ),
        evaluate=lambda model, step: reconstruction_error(model),
        **_loop(train),
    )


def run_latents(config: PretrainConfig, folder: Path) -> dict[str, np.ndarray]:
    """Caches latents of the train scenes and of 512 val scenes."""
    vae, unet = AutoencoderKL.from_pretrained(folder / "vae").eval(), config.unet
    posteriors = {}
    for split, count in {"train": unet.num_latents, "val": 512}.items():
        world = ShapesWorld(split)
        posteriors[split] = cache_latents(
            vae, lambda i, world=world: render(world.scene(i)[1]), folder / "latents", key=world.key(), count=count
        )
    return posteriors


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
        sd.unet = UNet2DConditionModel.from_pretrained(config.init_from, subfolder="unet", torch_dtype=torch.float32)
    set_cpu_attention(sd.unet)
    clip, _ = load_clip(folder / "clip")
    sd.text_encoder = clip.text_model
    cached = {split: Latents(rows, sd.vae.config.scaling_factor) for split, rows in posteriors.items()}
    worlds = {split: ShapesWorld(split, noise=settings.web_noise) for split in cached}
    pairs = ShapesWorld("train", seed=5)

    def losses_at(step):
        losses = denoising_losses(
            sd,
            cached["train"],
            worlds["train"],
            step,
            batch_size=train.part_size,
            caption_dropout=settings.caption_dropout,
        )
        sizes = (settings.contrastive_batch_size // train.parts, settings.wording_batch_size // train.parts)
        of_clip = contrastive_loss(clip, sd.tokenizer, pairs, step, batch_size=sizes[0], hard_share=1.0)
        losses["loss_clip"] = settings.contrastive_weight * of_clip["loss_clip"]
        return losses | wording_loss(clip, sd.tokenizer, pairs, step, batch_size=sizes[1])

    def evaluate(average, step):
        averaged = replace(sd, unet=average["unet"], text_encoder=average["clip"].text_model)
        with torch.autocast("cpu", torch.bfloat16):
            losses = validation_losses(averaged, cached["val"], worlds["val"])
        verdicts = judge_prompts(
            averaged,
            {c: load_prompts("val", c)[: settings.prompts_per_category] for c in PROMPT_CATEGORIES},
            sampling=recommended("shapes").changed(guidance_scale=settings.guidance_scale),
            folder=folder / f"samples/step_{step:07d}",
        )
        labels = [record["label"] for record in verdicts]
        cosines = pooled_cosines(average["clip"], sd.tokenizer, size=500)
        losses |= {label: labels.count(label) / len(labels) for label in LABELS}
        return losses | {f"cosine_{kind}": cosine for kind, cosine in cosines.items()}

    average = train_stage(
        "unet",
        folder,
        nn.ModuleDict({"unet": sd.unet, "clip": clip}),
        losses_at,
        evaluate=evaluate,
        clip_groups=[list(sd.unet.parameters()), list(clip.parameters())],
        **_loop(train),
    )
    if (folder / "unet.metrics.jsonl").exists():
        plot_curves(folder / "unet.metrics.jsonl", folder / "unet.png")
    save_folder(folder / "unet", average["unet"].save_pretrained)


def assemble(config: PretrainConfig, folder: Path, scaling_factor: float) -> StableDiffusion:
    """The trained frozen parts with a new U-Net."""
    clip, tokenizer = load_clip(folder / "clip")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    decoder = folder / "vae-decoder"
    vae = AutoencoderKL.from_pretrained(decoder if decoder.exists() else folder / "vae")
    vae.register_to_config(scaling_factor=scaling_factor)
    torch.manual_seed(2)
    unet = make_unet(
        channels=config.unet.channels,
        heads=config.unet.heads,
        context_width=config.clip.width,
        sample_size=IMAGE_SIZE // 2 ** (len(config.vae.channels) - 1),
    )
    for module in (vae, text_encoder):
        module.eval().requires_grad_(False)
    return StableDiffusion("shapes", str(folder), tokenizer, text_encoder, vae, unet, make_scheduler())


def run_export(config: PretrainConfig, folder: Path) -> None:
    """Writes the model as a `StableDiffusionPipeline` folder in float16, the CLIP beside it."""
    scaling_factor = measure_scaling_factor(run_latents(config, folder)["train"])
    sd = assemble(config, folder, scaling_factor)
    clip, tokenizer = load_clip(folder / "clip")
    state = read_state(folder / "unet.pt")
    try:
        nn.ModuleDict({"unet": sd.unet, "clip": clip}).load_state_dict(state["average"])
    except RuntimeError as error:
        raise ValueError(f"{folder / 'unet.pt'} is of another model: {error}") from error
    sd.text_encoder.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=sd.vae.half(),
        text_encoder=sd.text_encoder.half(),
        tokenizer=sd.tokenizer,
        unet=sd.unet.half(),
        scheduler=sd.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def write(output: Path):
        pipeline.save_pretrained(output)
        # transformers loads a tower in the precision its config names; the stock pipeline expects float32 by default
        text_config = output / "text_encoder/config.json"
        text_config.write_text(json.dumps(json.loads(text_config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        save_clip(clip.half(), tokenizer, output / "clip")

    save_folder(Path(config.output), write)
    print(f"{config.output}: U-Net of step {state['step']}, scaling factor {scaling_factor:.4f}")


def _loop(train: Optimization) -> dict:
    names = ("steps", "lr", "warmup", "decay", "ema", "parts", "save_every", "evaluate_every")
    return {name: getattr(train, name) for name in names}


def check_settings(config: PretrainConfig, stage: str, folder: Path) -> None:
    """Raises ValueError where the folder's stage was begun with other settings; what differs is named."""
    path = folder / f"{stage}.yaml"
    if not path.exists() or not ((folder / f"{stage}.pt").exists() or (folder / stage).exists()):
        return
    now, before = (flatten(c) for c in (config, load_config(PretrainConfig, path)))
    differing = [
        f"{key} {before[key]} (now {value})"
        for key, value in now.items()
        if before[key] != value and key.startswith(SETTINGS[stage]) and not key.endswith("_every")
    ]
    if differing:
        raise ValueError(
            f"stage {stage} in {folder} was begun with other settings: {', '.join(differing)}; name another folder"
        )


SETTINGS = {
    "clip": ("clip.", "init_from"),
    "vae": ("vae.channels", "vae.crop", "vae.kl_weight", "vae.train.", "init_from"),
    "latents": (),
    "unet": (
        *("unet.channels", "unet.heads", "unet.num_latents", "unet.caption_dropout", "unet.web_noise.", "unet.train."),
        *("unet.contrastive", "unet.wording"),
        "init_from",
    ),
    "decoder": ("vae.decoder", "vae.kl_weight"),
    "export": (),
}
"""of each stage: the keys, or beginnings of keys, of what it depends on"""
NEEDED = {
    "clip": (),
    "vae": (),
    "latents": ("vae",),
    "unet": ("clip", "vae"),
    "decoder": ("vae",),
    "export": ("clip", "vae", "unet.pt"),
}
"""of each stage: what earlier ones have left in the folder"""
STAGES = {
    "clip": run_clip,
    "vae": run_vae,
    "latents": run_latents,
    "unet": run_unet,
    "decoder": run_decoder,
    "export": run_export,
}


def run(config: PretrainConfig) -> None:
    """Runs the stages that the config names. Raises ValueError for what is missing, or made with other settings."""
    torch.set_num_threads(config.threads)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        needed = [name for name in NEEDED[stage] if not (folder / name).exists()]
        if needed:
            raise ValueError(f"stage {stage} needs {folder / needed[0]}, which an earlier stage makes: {list(STAGES)}")
        check_settings(config, stage, folder)
        save_config(config, folder / f"{stage}.yaml")
        STAGES[stage](config, folder)
