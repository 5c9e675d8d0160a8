"""Verifies a data folder before a long run: what would stop training, and which images leak into evaluation."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dpt.data.coco import read_json
from dpt.data.itm import INDEX_FILE, ItmNegatives
from dpt.data.latents import IMAGE_SUFFIXES, MANIFEST, verify_folder

ORIENTATION = 0x0112  # EXIF's tag
SHOWN = 3  # examples of each problem
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}


@dataclass
class Findings:
    """What was found in one file or folder: how much it holds, and its problems by kind with where they are."""

    name: str
    holds: str = ""
    errors: dict[str, list[str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    """names of the images it speaks of"""

    def add(self, kind: str, where: str) -> None:
        self.errors.setdefault(kind, []).append(where)


def find(root: Path, pattern: str) -> list[Path]:
    """Files of that name in the folder or up to two folders down."""
    return sorted(path for depth in ("", "*/", "*/*/") for path in root.glob(depth + pattern))


def image_index(root: Path) -> dict[str, Path]:
    """Every image file of the folder's subfolders by its name."""
    folders = [p for p in root.iterdir() if p.is_dir()]
    return {p.name: p for folder in folders for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}


def check_images(paths: list[Path], *, decode: bool = False) -> tuple[Findings, dict[str, tuple[int, int]]]:
    """Whether images can be read and end where they should; also their sizes (width, height) by name.

    Args:
        decode: read every pixel instead of header and last bytes.
    """
    findings, sizes = Findings("images", f"{len(paths)} images"), {}
    for path in tqdm(paths, desc="images", mininterval=2, disable=len(paths) < 1000):
        try:
            with Image.open(path) as image:
                # a quarter turn, which loading undoes; other formats would be decoded to find it
                turned = image.format in ("JPEG", "MPO") and image.getexif().get(ORIENTATION, 1) >= 5
                sizes[path.name] = image.size[::-1] if turned else image.size
                if decode:
                    image.convert("RGB")
                elif not _ends_well(path):
                    findings.add("truncated image", path.name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            kind = "truncated image" if "truncated" in str(error) else "unreadable image"
            findings.add(kind, f"{path.name} ({' '.join(str(error).split())[:60]})")
    return findings, sizes


def _ends_well(path: Path) -> bool:
    end = _ENDS.get(path.suffix.lower())
    if end is None:
        return True
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return end in file.read()  # some writers pad the end


def check_annotations(path: Path, sizes: dict[str, tuple[int, int]]) -> Findings:
    """Ids, images, boxes, spans of a COCO-style file: captions, or MDETR's expressions."""
    findings = Findings(path.name)
    try:
        content = read_json(path)
        images, annotations = content["images"], content["annotations"]
        expressions = path.name.startswith("finetune_")
        findings.holds = f"{len(images)} {'expressions' if expressions else 'images'}, {len(annotations)} annotations"
        for kind, entries in (("image", images), ("annotation", annotations)):
            for value, count in Counter(entry["id"] for entry in entries if "id" in entry).items():
                if count > 1:
                    findings.add(f"duplicate {kind} id", str(value))
        by_id = {image["id"]: image for image in images}
        for image in images:
            findings.files.add(image["file_name"])
            found = sizes.get(image["file_name"])
            if found is None:
                findings.add("missing or unreadable image", image["file_name"])
            elif {"width", "height"} <= image.keys() and found != (image["width"], image["height"]):
                findings.add("image of another size", f"{image['file_name']} is {found[0]}x{found[1]}")
        for annotation in annotations:
            if annotation["image_id"] not in by_id:
                findings.add("annotation of an unknown image", str(annotation["image_id"]))
            elif expressions:
                _check_box(findings, annotation, by_id[annotation["image_id"]])
            elif not annotation["caption"].strip():
                findings.add("empty caption", str(annotation["image_id"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        findings.add("unreadable file", str(error) if isinstance(error, ValueError) else f"{error!r} is missing")
    return findings


def _check_box(findings: Findings, annotation: dict, image: dict) -> None:
    x, y, width, height = annotation["bbox"]
    where = f"expression {image['id']}"
    if (
        width <= 0
        or height <= 0
        or x < -1
        or y < -1
        or x + width > image["width"] + 1
        or y + height > image["height"] + 1
    ):
        findings.add("box outside its image", f"{where}: {annotation['bbox']}")
    for begin, end in annotation["tokens_positive"]:
        if not 0 <= begin < end <= len(image["caption"]):
            findings.add("span outside its expression", f"{where}: [{begin}, {end}) of {len(image['caption'])}")


def check_negatives(path: Path, sizes: dict[str, tuple[int, int]]) -> Findings:
    """Items of hard negatives: readable, with images that exist, and not the positive itself."""
    findings = Findings(path.name if path.suffix == ".tsv" else f"{path.parent.name}/{path.name}")
    try:
        negatives = ItmNegatives(path)
    except (ValueError, TypeError, AttributeError) as error:
        findings.add("unreadable file", str(error))
        return findings
    findings.holds, findings.files = f"{len(negatives)} captions", set(negatives.texts_of)
    for text_id, count in Counter(negatives.ids).items():
        if count > 1:
            findings.add("duplicate text id", str(text_id))
    for text_id in tqdm(negatives.ids, desc=findings.name, mininterval=2, disable=len(negatives) < 1000):
        try:
            item = negatives.item(text_id)
        except ValueError as error:
            findings.add("unreadable item", str(error))
            continue
        if text_id not in negatives.texts_of.get(item.image, ()):
            findings.add("item listed for another image", f"text {text_id} is of {item.image}")
        findings.files.update(item.neg_images)
        for name in (item.image, *item.neg_images):
            if name not in sizes:
                findings.add("missing or unreadable image", name)
        if item.title in item.neg_captions:
            findings.add("negative equal to the positive", f"caption of text {text_id}")
        if item.image in item.neg_images:
            findings.add("negative equal to the positive", f"image of text {text_id}")
    return findings


def leakage(lists: list[Findings]) -> list[tuple[str, str, int, int]]:
    """(training list, evaluation list, images of both, images of the evaluation list), by the files' names."""
    training = [f for f in lists if "train" in f.name]
    evaluation = [f for f in lists if any(word in f.name for word in ("val", "test"))]
    return [(t.name, e.name, len(t.files & e.files), len(e.files)) for t in training for e in evaluation]


def write_leak_free(annotations: Path, evaluation: list[Path], target: Path) -> tuple[int, int]:
    """Writes a training list without the images of evaluation lists; returns expressions kept and left out."""
    held_out = {image["file_name"] for path in evaluation for image in read_json(path)["images"]}
    content = read_json(annotations)
    kept = [image for image in content["images"] if image["file_name"] not in held_out]
    ids = {image["id"] for image in kept}
    annotated = [a for a in content["annotations"] if a["image_id"] in ids]
    target.write_text(json.dumps(content | {"images": kept, "annotations": annotated}))
    return len(kept), len(content["images"]) - len(kept)


def check_tree(root: Path, *, decode: bool = False) -> list[Findings]:
    """Findings of everything under a data folder: images, annotation files, hard negatives, cached latents.

    Raises:
        ValueError: no such folder, or nothing in it to check.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; docs/data.md shows what it should hold")
    images = image_index(root)
    findings, sizes = check_images(list(images.values()), decode=decode)
    lists = [check_annotations(p, sizes) for name in ("captions_*.json", "finetune_*.json") for p in find(root, name)]
    lists += [check_negatives(p.parent, sizes) for p in find(root, INDEX_FILE)]
    lists += [check_negatives(p, sizes) for p in find(root, "*.tsv")]
    latents = []
    for path in find(root, MANIFEST):
        cached = Findings(path.parent.name, f"latents of {read_json(path).get('model')}")
        for problem in verify_folder(path.parent):
            cached.add("damaged latents", problem)
        latents.append(cached)
    if not images and not lists:
        raise ValueError(f"{root} holds no images and no annotation files; docs/data.md shows what it should hold")
    return [findings, *lists, *latents]
