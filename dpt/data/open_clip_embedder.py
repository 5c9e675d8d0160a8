"""open_clip models as functions from captions and image files to vectors."""

import logging
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError

from dpt.data.coco import open_image
from dpt.data.hard_negatives import Embedder
from dpt.files import read_json
from dpt.weights import UNPICKLING_ERRORS


def load_embedders(name: str, pretrained: str | None, *, device: torch.device | str) -> tuple[Embedder, Embedder]:
    """Functions from a list of captions, and of image paths, to vectors (B, D).

    Args:
        name: a model of open_clip, or the JSON file of one's config.
        pretrained: open_clip's tag, or a file of weights.

    Raises:
        ValueError: no such model or weights.
    """
    if name.endswith(".json") and not Path(name).is_file():
        raise ValueError(f"--clip is {name}, which is no file")
    logging.disable(logging.ERROR)  # OpenCLIP logs what the error says again
    try:
        if name.endswith(".json"):
            read_json(name, dict[str, object])  # what OpenCLIP could not read would stay among its configs
            open_clip.add_model_config(name)
            name = Path(name).stem
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (*UNPICKLING_ERRORS, SafetensorError) as error:  # damaged files, code, or weights of another model
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"CLIP {name!r} with weights {pretrained!r} cannot be loaded ({reason}): download the weights and name the "
            "file with --pretrained"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    model.eval()

    @torch.no_grad()
    def embed_texts(captions: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(captions).to(device))

    @torch.no_grad()
    def embed_images(paths: list[Path]) -> torch.Tensor:
        return model.encode_image(torch.stack([preprocess(open_image(path)) for path in paths]).to(device))

    return embed_texts, embed_images
