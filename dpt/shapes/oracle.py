"""The oracle of the `shapes` world: objects of a picture, and whether a prompt is true of it. numpy and scipy only.

Objects are connected regions that differ from the background. A region is well-formed when it is of one colour of the
palette, is not cut off by the border, is as large as an object can be, and has the outline of one of the five shapes.
Anything else that can be seen - merged, half-drawn, faint or speckled - makes the picture malformed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from dpt.shapes.grammar import Description, parse
from dpt.shapes.scenes import (
    COLORS,
    IMAGE_SIZE,
    OUTLINES,
    SHAPES,
    SIZE_BOUNDARY,
    SIZES,
    UNIT_AREAS,
    Scene,
    SceneObject,
    render,
)

VISIBLE = 40.0  # RGB distance from the background at which a pixel belongs to something
FAINT = 24.0  # distance at which many pixels together can be seen
MIN_AREA = 40.0  # pixels; a smaller region is a speck
SPECK_AREA = 14.0  # pixels of specks or faint remains that are overlooked
# Of an outline from the best shape's, on average, in units of sqrt(area). Chosen on the even-numbered half of the
# pictures labelled by eye, from 0.030 to 0.060; `dpt.shapes.quality oracle` shows the agreement on the other half.
MAX_DISPLACEMENT = 0.038
MAX_AT_BORDER = 8  # pixels of an object that lie at the border; chosen on the first two sets of labelled pictures
MAX_COLOR_DISTANCE = 75.0  # from a region's colour to its name's
MAX_IMPURITY = 0.12  # share of a region's inner pixels that are of another colour
RADIUS_SLACK = 2.5  # pixels beyond the radii that scenes have
_PALETTE = np.array(list(COLORS.values()), np.float32)
_PERIMETERS = {  # in units of sqrt(area)
    shape: float(np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum() / UNIT_AREAS[shape] ** 0.5)
    for shape, points in OUTLINES.items()
}
_CANON = 32  # side of the frame in which outlines are compared
_CANON_SPAN = 1.75  # half of that side, in units of sqrt(area)


Label = Literal["correct", "misaligned", "malformed"]
LABELS = get_args(Label)


@dataclass(frozen=True)
class Detection:
    """An object found in a picture: names, centre in pixels, radius as in `scenes`, box normalised cxcywh.

    `fault` is the reason why it is no well-formed object, or None.
    """

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    box: tuple[float, float, float, float]
    fault: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A label, what failed, and what was found."""

    label: Label
    reason: str
    objects: tuple[Detection, ...]


def _canonical(alpha: np.ndarray, *, x: float, y: float, area: float) -> np.ndarray:
    """Coverage resampled so that centroid and area are those of the frame, flattened."""
    steps = (np.arange(_CANON) + 0.5) / _CANON * 2 - 1
    reach = steps * _CANON_SPAN * np.sqrt(area)
    grid = np.meshgrid(y + reach, x + reach, indexing="ij")
    return ndimage.map_coordinates(alpha, grid, order=1, mode="constant", cval=0.0).astype(np.float32).ravel()


def _moments(alpha):
    area = float(alpha.sum())
    ys, xs = np.indices(alpha.shape, dtype=np.float32)
    return float((xs * alpha).sum() / area), float((ys * alpha).sum() / area), area


@cache
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Canonical outlines of all shapes, several rotations and both sizes, (T, 1024), and their names."""
    rows, names = [], []
    for shape in SHAPES:
        for rotation in range(-15, 16, 5) if shape != "circle" else (0,):
            for low, high in SIZES.values():
                middle = IMAGE_SIZE / 2
                obj = SceneObject("black", shape, "", middle, middle, (low + high) / 2, rotation, (0, 0, 0))
                alpha = 1 - render(Scene((obj,), (255, 255, 255)))[..., 0].astype(np.float32) / 255
                x, y, area = _moments(alpha)
                rows.append(_canonical(alpha, x=x, y=y, area=area))
                names.append(shape)
    return np.stack(rows), tuple(names)


def find_objects(image: np.ndarray) -> tuple[list[Detection], list[str]]:
    """All objects in a (128, 128, 3) uint8 picture, and faults that belong to no object.

    Raises:
        ValueError: another shape or dtype.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image is {image.dtype} {image.shape}; the oracle reads uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
        )
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    if background.min() < 190:
        return [], ["the background is not light"]
    distance = np.linalg.norm(pixels - background, axis=2)
    labels, _ = ndimage.label(distance > VISIBLE)
    detections, faults, specks = [], [], 0
    seen = np.zeros(labels.shape, bool)
    for k, window in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[window] == k
        if region.sum() < MIN_AREA:
            specks += int(region.sum())
            continue
        detections.append(_detect(pixels, background, distance, labels == k, window))
        seen |= labels == k
    if specks > SPECK_AREA:
        faults.append(f"{specks} pixels of specks")
    faint = (distance > FAINT) & ~ndimage.binary_dilation(seen, iterations=4)
    faint = ndimage.binary_opening(faint, np.ones((2, 2)))
    if faint.sum() - specks > SPECK_AREA:
        faults.append(f"{int(faint.sum())} pixels of faint remains")
    return detections, faults


def _detect(pixels, background, distance, region, window) -> Detection:
    core = ndimage.binary_erosion(region, iterations=2)
    if not core.any():
        core = region & (distance >= np.quantile(distance[region], 0.7))
    color = np.median(pixels[core], axis=0)
    from_palette = np.linalg.norm(_PALETTE - color, axis=1)
    name = list(COLORS)[int(from_palette.argmin())]
    axis = color - background
    alpha = np.clip((pixels - background) @ axis / (axis @ axis), 0, 1)
    alpha[~ndimage.binary_dilation(region, iterations=1)] = 0
    x, y, area = _moments(alpha)
    bank, names = _templates()
    outline = _canonical(alpha, x=x, y=y, area=area)
    overlap = np.minimum(bank, outline).sum(1) / np.maximum(bank, outline).sum(1)
    best = int(overlap.argmax())
    radius = float(np.sqrt(area / UNIT_AREAS[names[best]]))
    impure = np.linalg.norm(pixels[core] - color, axis=1) > 50
    (low, _), (_, high) = SIZES["small"], SIZES["large"]
    rows, columns = window
    fault = None
    at_border = sum(int(edge.sum()) for edge in (region[0], region[-1], region[:, 0], region[:, -1]))
    if at_border > MAX_AT_BORDER:
        fault = "cut off at the border"
    elif from_palette.min() > MAX_COLOR_DISTANCE:
        fault = "of no known colour"
    elif impure.mean() > MAX_IMPURITY:
        fault = "of several colours"
    elif 1 - overlap[best] > MAX_DISPLACEMENT * _PERIMETERS[names[best]]:  # what a displaced outline takes or leaves
        fault = "of no known shape"
    elif not low - RADIUS_SLACK <= radius <= high + RADIUS_SLACK:
        fault = "of no known size"
    box = ((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
    box += (columns.stop - columns.start, rows.stop - rows.start)
    return Detection(
        color=name,
        shape=names[best],
        size="small" if radius < SIZE_BOUNDARY else "large",
        x=x + 0.5,  # from pixel indices to coordinates, where a pixel's centre is at its index plus a half
        y=y + 0.5,
        radius=radius,
        box=tuple(v / IMAGE_SIZE for v in box),
        fault=fault,
    )


def judge(image: np.ndarray, prompt: str | Description) -> Verdict:
    """Whether a picture shows what the prompt says.

    Args:
        image: (128, 128, 3) uint8.
        prompt: a prompt of the grammar, or its meaning.

    Raises:
        ValueError: the prompt is outside the grammar, or the image of another size.
    """
    description = parse(prompt) if isinstance(prompt, str) else prompt
    detections, faults = find_objects(image)
    faults += [f"something {d.color} is {d.fault}" for d in detections if d.fault]
    objects = tuple(detections)
    if faults:
        return Verdict("malformed", "; ".join(faults), objects)
    failure = description.failure(objects)
    return Verdict("misaligned" if failure else "correct", failure or "", objects)
