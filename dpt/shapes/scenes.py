"""Scenes of the `shapes` world and how they are drawn.

Coordinates are pixels, x to the right and y down; boxes are normalised cxcywh.

A scene holds 1 to 4 objects. An object's `radius` is the circle's radius; the other shapes are scaled to look as large
(`OUTLINES`). Two margins make every statement about a scene decidable:

- sizes: small objects have radius 11 to 12.5, large ones 17 to 19.5, and `SIZE_BOUNDARY` lies between;
- directions: one object is *left of* another when it lies to the left and further left than up or down (below, right
  and above likewise). In scenes of two or three objects no pair lies nearer the diagonal than `DIRECTION_MARGIN`
  allows; scenes of four objects are never described by relations.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dpt.shapes.settings import IMAGE_SIZE

MAX_OBJECTS = 4

COLORS = {
    "red": (214, 38, 42),
    "orange": (245, 140, 20),
    "yellow": (240, 210, 30),
    "green": (36, 158, 72),
    "cyan": (40, 195, 215),
    "blue": (38, 70, 210),
    "purple": (150, 48, 172),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": (11.0, 12.5), "large": (17.0, 19.5)}
SIZE_BOUNDARY = 14.6

DIRECTION_MARGIN = 0.75  # of a pair's two axis distances, the smaller is at most this share of the larger
GAP = 5.0  # least distance between two objects' bounding circles, and twice that to the border
MAX_ROTATION = 10.0  # degrees either way
COLOR_JITTER = 10  # levels either way
SUPERSAMPLING = 4


def _polygon(radii_and_degrees):
    return np.array([(r * np.sin(np.radians(a)), -r * np.cos(np.radians(a))) for r, a in radii_and_degrees])


_ARM, _HALF_WIDTH = 1.15, 0.42
OUTLINES = {
    "circle": _polygon([(1.0, a) for a in range(0, 360, 6)]),
    "square": _polygon([(0.9 * 2**0.5, a) for a in (45, 135, 225, 315)]),
    "triangle": _polygon([(1.35, a) for a in (0, 120, 240)]) + (0.0, 0.15),
    "star": _polygon([(1.4 if k % 2 == 0 else 0.62, 36 * k) for k in range(10)]),
    "cross": np.array(
        [(_HALF_WIDTH, -_ARM), (_HALF_WIDTH, -_HALF_WIDTH), (_ARM, -_HALF_WIDTH)]
        + [(_ARM, _HALF_WIDTH), (_HALF_WIDTH, _HALF_WIDTH), (_HALF_WIDTH, _ARM)]
        + [(-_HALF_WIDTH, _ARM), (-_HALF_WIDTH, _HALF_WIDTH), (-_ARM, _HALF_WIDTH)]
        + [(-_ARM, -_HALF_WIDTH), (-_HALF_WIDTH, -_HALF_WIDTH), (-_HALF_WIDTH, -_ARM)]
    ),
}
BOUNDING = {shape: float(np.linalg.norm(points, axis=1).max()) for shape, points in OUTLINES.items()}


def polygon_area(points: np.ndarray) -> float:
    """Area of a simple polygon given as an (N, 2) array."""
    x, y = points.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


UNIT_AREAS = {shape: polygon_area(points) for shape, points in OUTLINES.items()}


@dataclass(frozen=True)
class SceneObject:
    """One object: its names, centre and radius in pixels, rotation in degrees and exact colour (RGB, 0 to 255)."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]

    @property
    def bounding_radius(self) -> float:
        return self.radius * BOUNDING[self.shape]

    def outline(self) -> np.ndarray:
        """The outline as an (N, 2) array of pixel coordinates."""
        a = np.radians(self.rotation)
        rotation = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        return OUTLINES[self.shape] @ rotation * self.radius + (self.x, self.y)

    def box(self) -> tuple[float, float, float, float]:
        """The tight box, normalised cxcywh."""
        (x0, y0), (x1, y1) = self.outline().min(0), self.outline().max(0)
        return tuple(float(v) / IMAGE_SIZE for v in ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))


@dataclass(frozen=True)
class Scene:
    """Objects on a light background (RGB, 0 to 255)."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]

    def boxes(self) -> np.ndarray:
        """Boxes of all objects, (N, 4) normalised cxcywh."""
        return np.array([o.box() for o in self.objects])


def direction(a, b) -> str:
    """Where `a` lies as seen from `b`: "left", "right", "above" or "below" (anything with x and y will do)."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def layout_is_valid(objects) -> bool:
    """Whether nothing overlaps or leaves the picture and every direction keeps its margin."""
    for i, a in enumerate(objects):
        reach = a.bounding_radius + GAP / 2
        if not (reach <= a.x <= IMAGE_SIZE - reach and reach <= a.y <= IMAGE_SIZE - reach):
            return False
        for b in objects[:i]:
            dx, dy = abs(a.x - b.x), abs(a.y - b.y)
            if dx * dx + dy * dy < (a.bounding_radius + b.bounding_radius + GAP) ** 2:
                return False
            if len(objects) < MAX_OBJECTS and min(dx, dy) > DIRECTION_MARGIN * max(dx, dy):
                return False
    return True


def sample_object(rng: np.random.Generator, *, color: str, shape: str, size: str) -> SceneObject:
    """An object of the given names; place, radius, rotation and exact colour are random."""
    low, high = SIZES[size]
    u = rng.random(4).tolist()
    radius = low + (high - low) * u[0]
    reach = radius * BOUNDING[shape] + GAP / 2
    return SceneObject(
        color=color,
        shape=shape,
        size=size,
        x=reach + (IMAGE_SIZE - 2 * reach) * u[1],
        y=reach + (IMAGE_SIZE - 2 * reach) * u[2],
        radius=radius,
        rotation=MAX_ROTATION * (2 * u[3] - 1),
        rgb=tuple(min(255, max(0, c + d)) for c, d in zip(COLORS[color], _jitter(rng), strict=True)),
    )


def _jitter(rng):
    return rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3).tolist()


def sample_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light, nearly neutral colour."""
    return tuple(int(v) for v in rng.integers(226, 249) + rng.integers(-6, 7, 3))


def render(scene: Scene) -> np.ndarray:
    """Draws the scene, anti-aliased: (128, 128, 3) uint8."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = scene.background
    for obj in scene.objects:
        points = obj.outline()
        x0, y0 = (int(v) for v in np.floor(points.min(0)) - 1)
        x1, y1 = (int(v) for v in np.ceil(points.max(0)) + 1)
        patch = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING))
        corners = ((points - (x0, y0)) * SUPERSAMPLING).ravel().tolist()
        ImageDraw.Draw(patch).polygon(corners, fill=255)
        alpha = np.asarray(patch.reduce(SUPERSAMPLING), np.float32)[..., None] / 255
        region = canvas[y0:y1, x0:x1]
        region += alpha * (np.array(obj.rgb, np.float32) - region)
    return np.round(canvas).astype(np.uint8)
