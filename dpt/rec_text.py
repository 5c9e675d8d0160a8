"""The frozen text encoder with whose token states REC is aligned: RoBERTa (the paper's), or the base model's own CLIP.

Shapes: B texts, T tokens, R width.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import CKPT_FOLDER
from dpt.bounds import Bounds
from dpt.weights import UNPICKLING_ERRORS

MOST = {"hidden_size": 16_384, "num_hidden_layers": 200, "intermediate_size": 65_536, "vocab_size": 2_000_000}
"""sizes of an encoder's config that memory is taken for"""
ENCODER_ERRORS = (*UNPICKLING_ERRORS, SafetensorError, StrictDataclassError)
"""Errors of transformers and torch's unpickler at files that are damaged, hold code or are of something else."""


@dataclass
class RecTextEncoder:
    """A tokenizer, for the class targets, and a model, for contrastive alignment (None without it)."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    width: int
    """R, with or without a model"""

    def tokenize(self, texts: list[str]) -> BatchEncoding:
        """Padded to the longest text, cut at the model's limit; `char_to_token` finds the tokens of spans."""
        return self.tokenizer(texts, padding="longest", truncation=True, return_tensors="pt")

    @torch.no_grad()
    def encode(self, encoding: BatchEncoding) -> torch.Tensor:
        """Token states (B, T, R) float32. Equal texts are encoded once."""
        distinct, rows = torch.unique(encoding.input_ids, dim=0, return_inverse=True)
        first = torch.stack([(rows == row).nonzero()[0, 0] for row in range(len(distinct))])
        mask = encoding.attention_mask[first]
        output = self.model(distinct.to(self.model.device), attention_mask=mask.to(self.model.device))
        return output.last_hidden_state.float()[rows]


def load_rec_text_encoder(
    name: str, sd: StableDiffusion, *, with_model: bool, local_files_only: bool = False
) -> RecTextEncoder:
    """Loads the encoder, frozen, in evaluation mode; it is never part of what is trained or saved.

    Args:
        name: "clip" for the base model's own text encoder, "roberta-base", a local folder or a hub id.
        with_model: False where only the tokens are needed: then no weights are loaded.

    Raises:
        ValueError: nothing usable there; the message says what to do.
    """
    if name == "clip":
        width = sd.text_encoder.config.hidden_size
        return RecTextEncoder(sd.tokenizer, sd.text_encoder if with_model else None, width)
    folder = CKPT_FOLDER / name
    source = str(folder) if folder.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, use_fast=True)
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        for size, most in MOST.items():
            Bounds(at_least=1, at_most=most).check(f"its {size}", getattr(config, size))
        if not with_model:
            return RecTextEncoder(tokenizer, None, config.hidden_size)
        model, found = AutoModel.from_pretrained(
            source, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True
        )
        # transformers would draw at random what is missing; the pooler, which RoBERTa's files lack, is not used
        if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
    except ENCODER_ERRORS as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"rec_text_encoder {name!r} cannot be loaded from {source} ({reason}): put its files into {folder}, name a "
            "folder that holds them, or use clip"
        ) from error
    return RecTextEncoder(tokenizer, model.to(sd.device).eval().requires_grad_(False), config.hidden_size)
