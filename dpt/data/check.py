"""Verifies a data folder before a long run: files that would stop training, and images that leak into evaluation."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dpt.data.coco import base_name, read_captions, read_coco_json, stable_id
from dpt.data.hard_negative_files import INDEX_FILE, ItmNegatives
from dpt.data.latents import IMAGE_SUFFIXES, MANIFEST, read_manifest, verify_folder
from dpt.data.refcoco import Expression, ExpressionBox, load_expressions, read_expressions
from dpt.files import write_text
from dpt.images import UNSCALED, upright_rgb

ORIENTATION = 0x0112  # EXIF's tag
SHOWN = 3  # examples of each problem
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}


@dataclass
class Findings:
    """The state of one file or folder: how much it holds, and its problems by kind, with their places."""

    name: str
    holds: str = ""
    errors: dict[str, list[str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    """names of the images it speaks of"""

    def add(self, kind: str, where: str) -> None:
        self.errors.setdefault(kind, []).append(where)


def find(root: Path, pattern: str) -> list[Path]:
    """Files of a name in the folder itself or up to two folders deeper."""
    return sorted(path for depth in ("", "*/", "*/*/") for path in root.glob(depth + pattern))


def image_index(root: Path) -> dict[str, Path]:
    """Every image file in the folder or up to two folders deeper, by its name; of equal names the least deep one."""
    deepest_first = sorted(find(root, "*"), key=lambda path: -len(path.parts))
    return {path.name: path for path in deepest_first if path.suffix.lower() in IMAGE_SUFFIXES}


def check_images(paths: list[Path], *, decode: bool = False) -> tuple[Findings, dict[str, tuple[int, int]]]:
    """Findings of unreadable or truncated images, and the sizes (width, height) of all by name.

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
                if decode or image.mode in UNSCALED:
                    upright_rgb(image)
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
    """Findings in a COCO-style file of captions or MDETR's expressions: ids, images, boxes, spans."""
    findings, are_expressions = Findings(path.name), path.name.startswith("finetune_")
    try:
        content, problems = (read_expressions if are_expressions else read_captions)(path)
    except ValueError as error:
        findings.add("unreadable file", str(error))
        return findings
    for problem in problems:
        findings.add("unreadable record", problem)
    images, annotations = content.images, content.annotations
    findings.holds = f"{len(images)} {'expressions' if are_expressions else 'images'}, {len(annotations)} annotations"
    for kind, entries in (("image", images), ("annotation", annotations)):
        for value, count in Counter(stable_id(entry.id) for entry in entries if entry.id is not None).items():
            if count > 1:
                findings.add(f"duplicate {kind} id", str(value))
    for image in images:
        name = base_name(image.file_name)
        findings.files.add(name)
        if name not in sizes:
            findings.add("missing or unreadable image", image.file_name)
        elif image.width and image.height and sizes[name] != (image.width, image.height):
            findings.add("image of another size", f"{name} is {sizes[name][0]}x{sizes[name][1]}")
    if are_expressions and images and not annotations:
        findings.add("no expression has a box", path.name)
    by_id = {stable_id(image.id): image for image in images}
    for annotation in annotations:
        image = by_id.get(stable_id(annotation.image_id))
        if image is None:
            if not problems:  # else it may be one of those that are left out
                findings.add("annotation of an unknown image", str(annotation.image_id))
        elif are_expressions:
            _check_box(findings, annotation, image)
        elif not annotation.caption.strip():
            findings.add("empty caption", str(annotation.image_id))
    return findings


def _check_box(findings: Findings, annotation: ExpressionBox, expression: Expression) -> None:
    x, y, width, height = annotation.bbox
    where = f"expression {expression.id}"
    right, bottom = x + width, y + height
    inside = x >= -1 and y >= -1 and right <= expression.width + 1 and bottom <= expression.height + 1
    if width <= 0 or height <= 0 or not inside:
        findings.add("box outside its image", f"{where}: {list(annotation.bbox)}")
    for begin, end in annotation.tokens_positive:
        if not 0 <= begin < end <= len(expression.caption):
            findings.add("span outside its expression", f"{where}: [{begin}, {end}) of {len(expression.caption)}")


def check_negatives(path: Path, sizes: dict[str, tuple[int, int]]) -> Findings:
    """Findings in hard negatives: unreadable items, missing images, and negatives that are the positive itself."""
    findings = Findings(path.name if path.suffix == ".tsv" else f"{path.parent.name}/{path.name}")
    try:
        negatives = ItmNegatives(path)
    except ValueError as error:
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
        image, *others = map(base_name, (item.image, *item.neg_images))
        if text_id not in negatives.texts_of.get(image, ()):
            findings.add("item listed for another image", f"text {text_id} is of {item.image}")
        findings.files.update(others)
        for name in (image, *others):
            if name not in sizes:
                findings.add("missing or unreadable image", name)
        if item.title in item.neg_captions:
            findings.add("negative equal to the positive", f"caption of text {text_id}")
        if image in others:
            findings.add("negative equal to the positive", f"image of text {text_id}")
    return findings


def check_latents(folder: Path) -> Findings:
    """Findings in cached latents: an unreadable manifest, and files that have changed since they were written."""
    findings = Findings(folder.name)
    try:
        findings.holds = f"latents of {read_manifest(folder).model}"
        for problem in verify_folder(folder):
            findings.add("damaged latents", problem)
    except ValueError as error:
        findings.add("unreadable file", str(error))
    return findings


def leakage(lists: list[Findings]) -> list[tuple[str, str, int, int]]:
    """Overlaps by file names: (training list, evaluation list, images in both, images in the latter)."""
    training = [f for f in lists if "train" in f.name]
    evaluation = [f for f in lists if any(word in f.name for word in ("val", "test"))]
    return [(t.name, e.name, len(t.files & e.files), len(e.files)) for t in training for e in evaluation]


def write_leak_free(annotations: Path, evaluation: list[Path], target: Path) -> tuple[int, int]:
    """Writes a training list without the images of evaluation lists; returns expressions kept and left out.

    Raises:
        ValueError: a list that training would refuse; it is named.
    """
    held_out = {expression.path.name for path in evaluation for expression in load_expressions(path, path.parent)}
    left = {e.id for e in load_expressions(annotations, annotations.parent) if e.path.name in held_out}
    content = read_coco_json(annotations)  # with what is not read here
    images = [image for image in content["images"] if stable_id(image["id"]) not in left]
    boxes = [box for box in content["annotations"] if stable_id(box["image_id"]) not in left]
    write_text(target, json.dumps(content | {"images": images, "annotations": boxes}))
    return len(images), len(left)


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
    latents = [check_latents(path.parent) for path in find(root, MANIFEST)]
    if not images and not lists:
        raise ValueError(f"{root} holds no images and no annotation files; docs/data.md shows what it should hold")
    return [findings, *lists, *latents]
