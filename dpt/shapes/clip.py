"""The small CLIP of the `shapes` world: tokenizer, text and image tower, contrastive training.

The text tower, frozen, conditions the U-Net; the image tower is this world's "CLIP score" and mines its negatives.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dpt.images import to_pixels
from dpt.shapes.edited_negatives import edit_description
from dpt.shapes.grammar import CATEGORIES, caption_text, sample_description
from dpt.shapes.scenes import IMAGE_SIZE, render
from dpt.shapes.world import ShapesWorld

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are the grammar's; any other text falls back to bytes. "!" (id 0) pads, as in SD 2.

    The end-of-text id is the highest of the vocabulary.
    """
    rng = np.random.default_rng(0)
    texts = [caption_text(sample_description(rng, c), rng) for c in CATEGORIES for _ in range(2000)]
    texts += ["a picture of a shape, an object, shapes and objects."] * 200
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((text.lower() for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = ["!"] + [c for c in alphabet if c != "!"] + [c + "</w>" for c in alphabet]
    words += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, pad_token="!")


def make_clip(tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int) -> CLIPModel:
    """A CLIP with both towers of the given size, random weights."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": IMAGE_SIZE, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, (B, 32), padded and truncated."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def embed_images(clip: CLIPModel, images: list[np.ndarray]) -> torch.Tensor:
    """Unit image embeddings, (B, D)."""
    return F.normalize(clip.get_image_features(to_pixels(images)).pooler_output, dim=-1)


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Unit text embeddings, (B, D)."""
    return F.normalize(clip.get_text_features(tokenize(tokenizer, texts)).pooler_output, dim=-1)


def contrastive_loss(clip, tokenizer, world: ShapesWorld, step: int, *, batch_size: int, hard_share: float):
    """CLIP's symmetric cross-entropy over a batch; `hard_share` of it are pairs of an example and its hard negative."""
    hard = round(batch_size * hard_share / 2)
    texts, images = [], []
    for k in range(batch_size - hard):
        index = step * batch_size + k
        rng = world.generator(index, 7)
        if k < hard:
            example = world[index]
            texts += [example.caption, example.negative.caption]
            images += [render(example.scene), render(example.negative.scene)]
        else:
            description, scene = world.scene(index)
            texts.append(caption_text(description, rng))
            images.append(render(scene))
    logits = clip.logit_scale.exp() * embed_texts(clip, tokenizer, texts) @ embed_images(clip, images).T
    target = torch.arange(len(texts))
    return {"loss_clip": (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.float().T, target)) / 2}


def wording_loss(clip, tokenizer, world: ShapesWorld, step: int, *, batch_size: int):
    """Cross-entropy of finding a caption's other wording among those of the batch and of all hard negatives.

    It trains the text tower alone. Pictures teach it relations too late: without this a caption and its flip were
    pooled at cosine 0.996, with it at 0.76 (docs/log/base.md).
    """
    captions, others, negatives = [], [], []
    for index in range(step * batch_size, (step + 1) * batch_size):
        rng = world.generator(index, 9)
        description, _ = world.scene(index)
        captions.append(caption_text(description, rng))
        others.append(caption_text(description, rng))
        negatives.append(caption_text(edit_description(description, rng, "train")[1], rng))
    embeddings = embed_texts(clip, tokenizer, captions + others + negatives)
    logits = clip.logit_scale.exp() * embeddings[:batch_size] @ embeddings[batch_size:].T
    return {"loss_wording": F.cross_entropy(logits.float(), torch.arange(batch_size))}


@torch.no_grad()
def retrieval(clip, tokenizer) -> dict[str, float]:
    """Share of val captions whose own scene ranks first of 512, and of captions preferred to their hard negative."""
    world = ShapesWorld("val")
    examples = [world[i] for i in range(512)]
    images = embed_images(clip, [render(e.scene) for e in examples])
    texts = embed_texts(clip, tokenizer, [e.caption for e in examples])
    hard = embed_texts(clip, tokenizer, [e.negative.caption for e in examples])
    scores = texts @ images.T
    return {
        "retrieval_at_1": (scores.argmax(1) == torch.arange(len(examples))).float().mean().item(),
        "hard_negative_accuracy": (scores.diagonal() > (hard * images).sum(1)).float().mean().item(),
    }


@torch.no_grad()
def pooled_cosines(clip, tokenizer, *, size: int = 2000) -> dict[str, float]:
    """Mean cosine of the pooled state (`pooler_output`) of val captions to their hard negatives', per kind of edit."""
    world, by_kind = ShapesWorld("val"), {}
    examples = [world[i] for i in range(size)]
    pooled = [
        clip.text_model(tokenize(tokenizer, texts)).pooler_output
        for texts in ([e.caption for e in examples], [e.negative.caption for e in examples])
    ]
    for example, cosine in zip(examples, F.cosine_similarity(*pooled).tolist(), strict=True):
        by_kind.setdefault(example.negative.kind, []).append(cosine)
    return {kind: float(np.mean(values)) for kind, values in sorted(by_kind.items())}


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes model and tokenizer for `load_clip`."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_clip(folder: str | Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The CLIP and tokenizer that `save_clip` wrote, in float32."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)
