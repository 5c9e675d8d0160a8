"""Who scores pictures: the oracle and small CLIP of the shapes world, OpenCLIP, BLIP.

A metric maps pictures (H, W, 3) uint8 and their prompts to a record each. Networks are read from disk alone: whose
weights are not there says which they are, from where, and into which folder.
"""

import argparse
import hashlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoProcessor, BlipForImageTextRetrieval

from dpt.base_models import CKPT_FOLDER
from dpt.evaluation.flags import OPEN_CLIP_FOLDER, OPEN_CLIP_MODEL
from dpt.evaluation.generate import process_state
from dpt.shapes import grammar, scenes
from dpt.shapes import oracle as oracle_module
from dpt.shapes.clip import embed_images, embed_texts, load_clip

Metric = Callable[[list[np.ndarray], list[str]], list[dict]]


@dataclass(frozen=True)
class Scorer:
    """A metric, the name of its file of scores, and what tells its weights, or code, from others."""

    name: str
    fingerprint: str
    metric: Metric


BROKEN = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError),
    *(pickle.UnpicklingError, SafetensorError),
)
"""what the libraries' readers of weights raise at files that are damaged or something else"""
OPEN_CLIP_SOURCE = "huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K, its open_clip_model.safetensors"
BLIP_SOURCE = "huggingface.co/Salesforce/blip-itm-base-coco (or a larger one), its whole folder"


def fingerprint(*paths: Path) -> str:
    """What scores depend on, by the files' content."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def oracle(args: argparse.Namespace) -> Scorer:
    """What the shapes world's oracle says: `label`, `reason`, and `objects`, name and cxcywh box of each it found."""

    def judged(images, prompts):
        verdicts = [oracle_module.judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [
            {
                "label": verdict.label,
                "reason": verdict.reason,
                "objects": [
                    [f"{found.size} {found.color} {found.shape}", *(round(float(x), 3) for x in found.box)]
                    for found in verdict.objects
                ],
            }
            for verdict in verdicts
        ]

    sources = [Path(inspect.getfile(module)) for module in (oracle_module, grammar, scenes)]
    return Scorer("oracle", fingerprint(*sources), judged)


def shapes_clip(args: argparse.Namespace) -> Scorer:
    """The cosine of picture and prompt by the small CLIP."""
    clip, tokenizer = load_clip(CKPT_FOLDER / "shapes/clip")

    @torch.no_grad()
    def cosines(images, prompts):
        pictures, texts = embed_images(clip, images), embed_texts(clip, tokenizer, prompts)
        return [{"cosine": value} for value in (pictures * texts).sum(1).tolist()]

    return Scorer("shapes-clip", fingerprint(CKPT_FOLDER / "shapes/clip/model.safetensors"), cosines)


def clip(args: argparse.Namespace) -> Scorer:
    """CLIP score by OpenCLIP: 100 times the cosine of picture and prompt, not below 0 (Hessel et al. 2021).

    Raises:
        ValueError: no such model, or no weights of it.
    """
    name, device = args.clip_model, process_state().device
    path = args.clip_weights or OPEN_CLIP_FOLDER / f"{name}.safetensors"
    if name not in open_clip.list_models():
        raise ValueError(f"--clip_model is {name!r}; OpenCLIP knows {', '.join(open_clip.list_models()[:8])}, ...")
    if not path.is_file():
        source = OPEN_CLIP_SOURCE if name == OPEN_CLIP_MODEL else f"a file of OpenCLIP's {name}"
        raise ValueError(f"--metrics clip needs weights of {name}: put {source}, into {path}")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=str(path), device=device)
    except (*BROKEN, AssertionError) as error:  # OpenCLIP asserts that shapes of another model's weights are its own
        raise ValueError(f"{path} does not hold weights of {name}: {' '.join(str(error).split())[:200]}") from error
    tokenizer, model = open_clip.get_tokenizer(name), model.eval()

    @torch.no_grad()
    def scores(images, prompts):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images]).to(device)
        pictures = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(prompts).to(device), normalize=True)
        cosines = (pictures * texts).sum(1).float().clamp(min=0)
        return [{f"CLIP score ({name}, {path.stem})": 100 * value} for value in cosines.tolist()]

    return Scorer(f"clip.{name}.{path.stem}", fingerprint(path), scores)


def blip(args: argparse.Namespace) -> Scorer:
    """BLIP's matching head, P(match), and its contrastive cosine.

    Raises:
        ValueError: no weights there.
    """
    folder, device = args.blip, process_state().device
    if not (folder / "config.json").is_file():
        raise ValueError(f"--metrics blip needs BLIP's weights: put {BLIP_SOURCE}, into {folder}")
    try:
        model = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True).to(device).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except BROKEN as error:
        raise ValueError(f"{folder} does not hold a BLIP-ITM: {' '.join(str(error).split())[:200]}") from error
    name = folder.name

    @torch.no_grad()
    def scores(images, prompts):
        inputs = processor(
            images=[Image.fromarray(image) for image in images],
            text=prompts,
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(device)
        # both heads from one pass of the vision tower, which the model's forward gives one by one
        states = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state  # (B, P, D)
        texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        valid = torch.ones(states.shape[:-1], dtype=torch.long, device=device)
        fused = model.text_encoder(**texts, encoder_hidden_states=states, encoder_attention_mask=valid)
        matches = model.itm_head(fused.last_hidden_state[:, 0]).float().softmax(-1)[:, 1]
        own = torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)
        other = model.text_proj(model.text_encoder(**texts).last_hidden_state[:, 0])
        cosines = (own * torch.nn.functional.normalize(other, dim=-1)).sum(1).float()
        return [
            {f"BLIP-ITM ({name})": match, f"BLIP-ITC ({name})": cosine}
            for match, cosine in zip(matches.tolist(), cosines.tolist(), strict=True)
        ]

    return Scorer(f"blip.{name}", fingerprint(*sorted(folder.glob("*.safetensors")), *folder.glob("*.bin")), scores)


def value_of(record: dict) -> float:
    """What a scorer's record says in one number: the oracle's 1 for correct, else its first figure."""
    if "label" in record:
        return float(record["label"] == "correct")
    return float(next(iter(record.values())))


METRICS = {"oracle": oracle, "shapes-clip": shapes_clip, "clip": clip, "blip": blip}
"""name -> what makes the scorer of the command line's flags"""
