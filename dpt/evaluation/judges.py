"""Judges of pictures: the oracle and small CLIP of the shapes world, OpenCLIP, BLIP.

A judge's metric maps pictures (H, W, 3) uint8 and their prompts to a record each. Networks are read from disk alone; an
error says which weights are missing, from where they come, and into which folder they go.
"""

import hashlib
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
from dpt.evaluation.flags import BLIP_FOLDER, OPEN_CLIP_FOLDER, OPEN_CLIP_MODEL
from dpt.evaluation.generate import process_state
from dpt.shapes import oracle
from dpt.shapes.clip import embed_images, embed_texts, load_clip
from dpt.weights import UNPICKLING_ERRORS

ORACLE = "fb307538d353"
"""Names the oracle's rules in scores: another name for other verdicts."""
OPEN_CLIP_SOURCE = "huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K, its open_clip_model.safetensors"
BLIP_SOURCE = "huggingface.co/Salesforce/blip-itm-base-coco (or a larger one), its whole folder"
BROKEN = (*UNPICKLING_ERRORS, SafetensorError)
"""Errors of the libraries' readers of weights at files that are damaged or something else."""


@dataclass(frozen=True)
class Judge:
    """A metric, the name of its file of scores, and the fingerprint of its weights or rules."""

    name: str
    fingerprint: str
    metric: Callable[[list[np.ndarray], list[str]], list[dict]]


def make_judge(
    metric: str,
    *,
    clip_model: str = OPEN_CLIP_MODEL,
    clip_weights: Path | None = None,
    blip: Path = BLIP_FOLDER,
) -> Judge:
    """The judge of a metric's name, one of `dpt.evaluation.flags.METRICS`.

    Args:
        clip_model: of OpenCLIP; clip_weights: by default a file of that name in ckpt/open_clip.
        blip: a folder of transformers.

    Raises:
        ValueError: no such model, or weights that are missing or damaged.
    """
    makers = {
        "oracle": _oracle,
        "shapes-clip": _shapes_clip,
        "clip": lambda: _clip(clip_model, clip_weights),
        "blip": lambda: _blip(blip),
    }
    return makers[metric]()


def fingerprint(*paths: Path) -> str:
    """A short hash of the files' content."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def value_of(record: dict) -> float:
    """A judge's record as one number: of the oracle 1 for correct and 0 else, of others the first figure."""
    if "label" in record:
        return float(record["label"] == "correct")
    return float(next(iter(record.values())))


def _oracle() -> Judge:
    """Records of `label`, `reason`, and `objects`, name and cxcywh box of each object that was found."""

    def judged(images, prompts):
        return [record(oracle.judge(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def record(verdict):
        names = [f"{found.size} {found.color} {found.shape}" for found in verdict.objects]
        boxes = [[round(float(x), 3) for x in found.box] for found in verdict.objects]
        objects = [[name, *box] for name, box in zip(names, boxes, strict=True)]
        return {"label": verdict.label, "reason": verdict.reason, "objects": objects}

    return Judge("oracle", ORACLE, judged)


def _shapes_clip() -> Judge:
    """Cosines of picture and prompt by the small CLIP."""
    folder = CKPT_FOLDER / "shapes/clip"
    clip, tokenizer = load_clip(folder)

    @torch.no_grad()
    def cosines(images, prompts):
        pictures, texts = embed_images(clip, images), embed_texts(clip, tokenizer, prompts)
        return [{"cosine": value} for value in (pictures * texts).sum(1).tolist()]

    return Judge("shapes-clip", fingerprint(folder / "model.safetensors"), cosines)


def _clip(name: str, path: Path | None) -> Judge:
    """CLIP score by OpenCLIP: 100 times the cosine of picture and prompt, not below 0 (Hessel et al. 2021)."""
    path, device = path or OPEN_CLIP_FOLDER / f"{name}.safetensors", process_state().device
    if name not in open_clip.list_models():
        raise ValueError(f"--clip_model is {name!r}; OpenCLIP knows {', '.join(open_clip.list_models()[:8])}, ...")
    if not path.is_file():
        source = OPEN_CLIP_SOURCE if name == OPEN_CLIP_MODEL else f"a file of OpenCLIP's {name}"
        raise ValueError(f"--metrics clip needs weights of {name}: put {source}, into {path}")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=str(path), device=device)
    except BROKEN as error:  # OpenCLIP asserts that shapes of another model's weights are its own
        raise ValueError(f"{path} does not hold weights of {name}: {' '.join(str(error).split())[:200]}") from error
    tokenizer, model = open_clip.get_tokenizer(name), model.eval()

    @torch.no_grad()
    def scores(images, prompts):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images]).to(device)
        pictures = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(prompts).to(device), normalize=True)
        cosines = (pictures * texts).sum(1).float().clamp(min=0)
        return [{f"CLIP score ({name}, {path.stem})": 100 * value} for value in cosines.tolist()]

    return Judge(f"clip.{name}.{path.stem}", fingerprint(path), scores)


def _blip(folder: Path) -> Judge:
    """BLIP's matching head, P(match), and its contrastive cosine."""
    name, device = folder.name, process_state().device
    if not (folder / "config.json").is_file():
        raise ValueError(f"--metrics blip needs BLIP's weights: put {BLIP_SOURCE}, into {folder}")
    try:
        model = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True).to(device).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except BROKEN as error:
        raise ValueError(f"{folder} does not hold a BLIP-ITM: {' '.join(str(error).split())[:200]}") from error

    @torch.no_grad()
    def scores(images, prompts):
        pictures = [Image.fromarray(image) for image in images]
        inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True, truncation=True).to(device)
        # both heads from one pass of the vision tower, which the model's forward gives one by one
        states = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state  # (B, P, D)
        texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        valid = torch.ones(states.shape[:-1], dtype=torch.long, device=device)
        fused = model.text_encoder(**texts, encoder_hidden_states=states, encoder_attention_mask=valid)
        matches = model.itm_head(fused.last_hidden_state[:, 0]).float().softmax(-1)[:, 1]
        own = torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)
        other = model.text_proj(model.text_encoder(**texts).last_hidden_state[:, 0])
        cosines = (own * torch.nn.functional.normalize(other, dim=-1)).sum(1).float()
        pairs = zip(matches.tolist(), cosines.tolist(), strict=True)
        return [{f"BLIP-ITM ({name})": match, f"BLIP-ITC ({name})": cosine} for match, cosine in pairs]

    return Judge(f"blip.{name}", fingerprint(*sorted(folder.glob("*.safetensors")), *folder.glob("*.bin")), scores)
