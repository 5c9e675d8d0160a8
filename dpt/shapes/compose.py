"""Scenes that a description is true of, and expressions that refer to one object of a scene."""

from dataclasses import dataclass

import numpy as np

from dpt.shapes.grammar import Description
from dpt.shapes.scenes import MAX_OBJECTS, Scene, direction, layout_is_valid, sample_background, sample_object

LARGE_SHARE = {1: 0.5, 2: 0.5, 3: 0.4, 4: 0.2}  # of objects whose caption leaves the size open, by number of objects
EXTREME_MARGIN = 8.0  # pixels by which "the leftmost" leads
_EXTREMES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1)}


@dataclass(frozen=True)
class Expression:
    """A phrase with one referent in its scene: `span` is the referent's [begin, end) in `text`, `index` its object."""

    text: str
    span: tuple[int, int]
    index: int


def compose(description: Description, rng: np.random.Generator) -> Scene:
    """A random scene that the description is true of and in which at least one object can be referred to."""
    background = sample_background(rng)
    while True:
        objects = []
        for phrase in description.phrases:
            for _ in range(phrase.count):
                large = rng.random() < LARGE_SHARE[description.num_objects]
                for _ in range(8):
                    candidate = sample_object(
                        rng, color=phrase.color, shape=phrase.shape, size=phrase.size or ("large" if large else "small")
                    )
                    if layout_is_valid([*objects, candidate]):
                        break
                objects.append(candidate)
        if layout_is_valid(objects) and description.holds(objects):
            order = rng.permutation(len(objects))
            scene = Scene(tuple(objects[k] for k in order), background)
            if refer(scene, rng):
                return scene


def refer(scene: Scene, rng: np.random.Generator) -> tuple[Expression, ...]:
    """Expressions with a unique referent: by attributes, by an extreme place, or by a relation to another object."""
    objects, found = scene.objects, []
    for index, obj in enumerate(objects):
        names = [("", obj.color, obj.shape), (obj.size, obj.color, obj.shape), (obj.size, "", obj.shape)]
        names += [("", "", obj.shape)]
        for size, color, shape in names:
            same = [
                o for o in objects if o.shape == shape and o.color == (color or o.color) and o.size == (size or o.size)
            ]
            phrase = " ".join(w for w in ("the", size, color, shape) if w)
            if len(same) == 1:
                found.append(Expression(phrase, (0, len(phrase)), index))
                continue
            if size:
                continue
            for extreme, (axis, sign) in _EXTREMES.items():
                first, second = sorted(same, key=lambda o, axis=axis, sign=sign: sign * getattr(o, axis))[:2]
                if first is obj and abs(getattr(second, axis) - getattr(first, axis)) >= EXTREME_MARGIN:
                    phrase = " ".join(w for w in ("the", extreme, color, shape) if w)
                    found.append(Expression(phrase, (0, len(phrase)), index))
        if 1 < len(objects) < MAX_OBJECTS:
            found += _refer_by_relation(objects, index)
    return tuple(found[k] for k in rng.permutation(len(found)))


def _refer_by_relation(objects, index):
    """Expressions such as "the star above the blue square": the anchor is unique, and one star lies above it."""
    obj, found = objects[index], []
    for anchor in objects:
        unique = sum((o.color, o.shape) == (anchor.color, anchor.shape) for o in objects) == 1
        relation = direction(obj, anchor)
        rivals = [o for o in objects if o is not anchor and o.shape == obj.shape and direction(o, anchor) == relation]
        if anchor is not obj and unique and len(rivals) == 1:
            place = f"{relation} of" if relation in ("left", "right") else relation
            found.append(
                Expression(f"the {obj.shape} {place} the {anchor.color} {anchor.shape}", (0, 4 + len(obj.shape)), index)
            )
    return found
