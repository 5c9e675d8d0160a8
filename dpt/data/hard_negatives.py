"""Mines hard negatives by CLIP: for each caption the most similar captions, and images, of other images.

Embeddings lie in files, and similarities are computed in blocks, so that memory does not grow with the data.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dpt.array_files import save_array
from dpt.data.coco import CaptionedImage
from dpt.data.hard_negative_files import ItmItem
from dpt.files import replacing

Embedder = Callable[[list], torch.Tensor]


def embed_to_file(
    items: Sequence, embed: Embedder, path: Path, *, key: str, batch_size: int, chunk: int = 4096
) -> np.ndarray:
    """Unit vectors (N, D) float16 of items, memory-mapped from `path`; a killed run goes on with the chunk it was in.

    Args:
        embed: a list of items -> (B, D).
        key: names the model and the items; a file made for another key is made anew.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    parts, done = path.with_name(f"{path.name}.{digest}"), path.with_name(f"{path.name}.{digest}.npy")
    if not done.exists():
        for start in tqdm(range(0, len(items), chunk), desc=path.stem, mininterval=2):
            part = parts / f"{start:08d}.npy"
            if not part.exists():
                stop = min(start + chunk, len(items))
                rows = [embed(list(items[i : min(i + batch_size, stop)])) for i in range(start, stop, batch_size)]
                vectors = torch.nn.functional.normalize(torch.cat(rows).float(), dim=1).half().cpu().numpy()
                save_array(part, vectors)
        files = sorted(parts.glob("????????.npy"))
        width = np.load(files[0], mmap_mode="r").shape[1]
        with replacing(done) as temporary:
            whole = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(items), width))
            for file in files:
                rows = np.load(file)
                whole[int(file.stem) : int(file.stem) + len(rows)] = rows
            whole.flush()
        shutil.rmtree(parts)
    return np.load(done, mmap_mode="r")


def most_similar(
    queries: np.ndarray,
    query_groups: np.ndarray,
    keys: np.ndarray,
    key_groups: np.ndarray,
    count: int,
    *,
    block: int = 4096,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """For each query the keys of other groups with the largest dot products, best first.

    Args:
        queries (N, D), keys (M, D): arrays or memory maps; `block` rows of each are in memory at once.
        query_groups (N, G), key_groups (M, G): a pair that agrees in a column is left out; such as captions of one
            image.

    Returns:
        Indices (N, count) of keys; -1 where there are fewer keys of other groups.
    """
    found = np.full((len(queries), count), -1, np.int64)
    for start in tqdm(range(0, len(queries), block), desc="most similar", mininterval=2):
        rows = torch.from_numpy(np.asarray(queries[start : start + block], np.float32)).to(device)
        groups = torch.from_numpy(query_groups[start : start + block]).to(device)
        best = torch.full((len(rows), count), -torch.inf, device=device)
        index = torch.full((len(rows), count), -1, dtype=torch.long, device=device)
        for first in range(0, len(keys), block):
            columns = torch.from_numpy(np.asarray(keys[first : first + block], np.float32)).to(device)
            others = torch.from_numpy(key_groups[first : first + block]).to(device)
            same = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=device)
            for column in range(groups.shape[1]):
                same |= groups[:, column, None] == others[None, :, column]
            scores = (rows @ columns.T).masked_fill(same, -torch.inf)
            values, places = scores.topk(min(count, len(columns)), dim=1)
            best, chosen = torch.cat([best, values], dim=1).topk(count, dim=1)
            index = torch.cat([index, places + first], dim=1).gather(1, chosen)
        found[start : start + block] = torch.where(best.isneginf(), -1, index).cpu().numpy()
    return found


def mine(
    captions: list[CaptionedImage],
    embed_texts: Embedder,
    embed_images: Embedder,
    work: Path,
    *,
    key: str,
    num_texts: int = 20,
    num_images: int = 4,
    batch_size: int = 64,
    block: int = 4096,
    device: torch.device | str = "cpu",
) -> dict[int, ItmItem]:
    """Hard negatives of every caption, by its place in the list.

    Args:
        embed_texts, embed_images: captions, and paths of image files, to vectors in one space.
        work: where embeddings are kept.
        key: names the model.

    Raises:
        ValueError: fewer than two images.
    """
    files = sorted({c.path for c in captions})
    if len(files) < 2:
        raise ValueError(f"hard negatives need captions of at least 2 images, not {len(files)}")
    number = {path: k for k, path in enumerate(files)}
    image_of = np.array([number[c.path] for c in captions])
    texts = list(dict.fromkeys(c.caption for c in captions))  # each once, whatever images it is of
    distinct = {text: k for k, text in enumerate(texts)}
    text_of = np.array([distinct[c.caption] for c in captions])
    own: list[set[int]] = [set() for _ in files]
    shown: list[set[int]] = [set() for _ in texts]  # images that a text is of
    for image, text in zip(image_of.tolist(), text_of.tolist(), strict=True):
        own[image].add(text)
        shown[text].add(image)
    keys = [json.dumps([key, *contents]) for contents in (texts, [path.name for path in files])]
    text_rows = embed_to_file(texts, embed_texts, work / "texts", key=keys[0], batch_size=batch_size)
    image_rows = embed_to_file(files, embed_images, work / "images", key=keys[1], batch_size=batch_size)
    # of each text so many that enough are left without an image's own texts, or without the text's own images
    limits = {"block": block, "device": device}
    of_none, all_texts, all_images = (np.full((len(x), 1), k) for k, x in enumerate((texts, texts, files)))
    most_own = max(map(len, own))
    texts_near = most_similar(text_rows, of_none, text_rows, all_texts, num_texts + most_own, **limits)
    images_near = list(most_similar(text_rows, of_none, image_rows, all_images, num_images + 1, **limits))
    for text in (k for k, images in enumerate(shown) if len(images) > 1):  # few texts are of several images
        rows, groups, count = text_rows[[text]], of_none[[text]], num_images + len(shown[text])
        (images_near[text],) = most_similar(rows, groups, image_rows, all_images, count, **limits)
    items = {}
    for k, (caption, text, image) in enumerate(zip(captions, text_of.tolist(), image_of.tolist(), strict=True)):
        others = [texts[i] for i in texts_near[text] if i >= 0 and i not in own[image]]
        pictures = [files[i].name for i in images_near[text] if i >= 0 and i not in shown[text]]
        items[k] = ItmItem(caption.caption, caption.path.name, tuple(others[:num_texts]), tuple(pictures[:num_images]))
    return items
