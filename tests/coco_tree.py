"""A small data folder in the layouts that users have: COCO images and captions, MDETR's REC files, hard negatives."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dpt.data.hard_negative_files import ItmItem, write_items, write_tsv
from dpt.shapes.scenes import render
from dpt.shapes.world import ShapesWorld

WIDTH, HEIGHT = 160, 120


def make_tree(root: Path, *, num_train: int = 8, num_val: int = 6) -> Path:
    """Scenes of the shapes world as JPEGs of another aspect; RefCOCO's val images lie in train2014, as they do."""
    world = ShapesWorld("train", seed=9)
    captions = {"train": [], "val": []}
    for split, count in {"train": num_train + 3, "val": num_val}.items():
        folder = root / f"{split}2014"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for k in range(count):
            index = k + 100 * (split == "val")
            name = f"COCO_{split}2014_{index:012d}.jpg"
            picture = Image.fromarray(render(world.scene(index)[1])).resize((WIDTH, HEIGHT))
            picture.save(folder / name, quality=90)
            images.append({"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for n in range(2):
                text = world.caption(index) if n == 0 else f"{world.caption(index)} again"
                annotations.append({"id": 10 * index + n, "image_id": index, "caption": text})
                captions[split].append((text, name))
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations}
        (root / f"annotations/captions_{split}2014.json").write_text(json.dumps(content))
    refer(root / "annotations/finetune_refall_train.json", world, range(num_train))
    for k, name in enumerate(("refcoco", "refcoco+", "refcocog")):
        refer(root / f"annotations/finetune_{name}_val.json", world, [num_train + k])
    write_items(root / "itm/train", negatives(captions["train"]))
    write_tsv(root / "itm/val.tsv", negatives(captions["val"]))
    return root


def refer(path: Path, world: ShapesWorld, indices) -> None:
    images, annotations = [], []
    for index in indices:
        example = world[index]
        scale = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
        for expression in example.expressions[:2]:
            cx, cy, w, h = example.scene.boxes()[expression.index] * scale
            images.append(
                {
                    "id": 1000 + len(images),
                    "file_name": f"COCO_train2014_{index:012d}.jpg",
                    "original_id": index,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "caption": expression.text,
                    "dataset_name": "refcoco",
                }
            )
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": images[-1]["id"],
                    "bbox": [cx - w / 2, cy - h / 2, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "category_id": 1,
                    "tokens_positive": [list(expression.span)],
                }
            )
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def negatives(captions: list[tuple[str, str]]) -> dict[int, ItmItem]:
    items = {}
    for k, (text, name) in enumerate(captions):
        others = [(t, n) for t, n in captions if n != name and t != text]
        items[k] = ItmItem(text, name, tuple(t for t, _ in others[:4]), tuple(sorted({n for _, n in others})[:3]))
    return items
