"""Hard negatives: minimally different captions that are false of a scene, and scenes that show them."""

from dataclasses import dataclass, replace

import numpy as np

from dpt.shapes.compose import compose, refer
from dpt.shapes.grammar import OPPOSITE, Description, Phrase, split_of
from dpt.shapes.scenes import COLORS, IMAGE_SIZE, MAX_OBJECTS, SHAPES, Scene, layout_is_valid, sample_object


@dataclass(frozen=True)
class HardNegative:
    """A minimally different caption, false of the scene, and a scene that shows it."""

    kind: str
    description: Description
    caption: str
    scene: Scene


def edit_description(description: Description, rng: np.random.Generator, split: str) -> tuple[str, Description]:
    """The kind of edit (attribute, count, relation or size) and a minimally different description.

    It is one of the split's or of "train", never another held-out one.
    """
    phrases, relations = description.phrases, description.relations
    kinds = ["attribute"]  # half as often as what the caption allows besides: every caption allows it
    kinds += ["relation"] * 2 if relations else []
    kinds += ["count"] * 2 if any(p.count > 1 for p in phrases) else []
    kinds += ["size"] * 2 if any(p.size for p in phrases) else []
    while True:
        kind = kinds[int(rng.random() * len(kinds))]
        edited, new_relations = list(phrases), relations
        if kind == "relation":
            new_relations = tuple((i, OPPOSITE[r], j) for i, r, j in relations)
        else:
            k = int(rng.integers(len(phrases)))
            if kind == "count":
                count = phrases[k].count + (1 if rng.random() < 0.5 else -1)
                edited[k] = replace(phrases[k], count=max(1, count))
            elif kind == "size":
                if phrases[k].size:
                    edited[k] = replace(phrases[k], size="small" if phrases[k].size == "large" else "large")
            else:  # two phrases trade an attribute; where they can't, or now and then, one phrase gets another
                name, names = (("color", tuple(COLORS)), ("shape", SHAPES))[int(rng.random() < 0.5)]
                m = (k + int(rng.integers(len(phrases)))) % len(phrases)
                here, there = getattr(phrases[k], name), getattr(phrases[m], name)
                if here != there and rng.random() < 0.8:
                    edited[k], edited[m] = replace(phrases[k], **{name: there}), replace(phrases[m], **{name: here})
                else:
                    edited[k] = replace(phrases[k], **{name: names[int(rng.random() * len(names))]})
        result = Description(tuple(edited), new_relations)
        num_large = sum(p.count for p in edited if p.size == "large")
        if new_relations and result.num_objects == MAX_OBJECTS:  # directions keep no margin there
            continue
        if result.num_objects > MAX_OBJECTS or num_large == MAX_OBJECTS:  # four large ones hardly fit
            continue
        if not _distinct(edited) or result.key() == description.key():
            continue
        if split_of(result) in (split, "train"):
            return kind, result


def _distinct(phrases: list[Phrase]) -> bool:
    """Whether no object could belong to two of the phrases."""
    return all(
        any(None not in (x, y) and x != y for x, y in ((a.size, b.size), (a.color, b.color), (a.shape, b.shape)))
        for k, a in enumerate(phrases)
        for b in phrases[:k]
    )


def edit_scene(scene: Scene, description: Description, negative: Description, rng: np.random.Generator) -> Scene:
    """A scene of `negative` that keeps as much of the given scene as fits; a new one where nothing does."""
    for attempt in range(4):
        if attempt and description.relations != negative.relations:
            objects = _mirrored(scene, description.relations[0][1])
        else:
            objects = _matched(scene, description, negative, rng)
        if layout_is_valid(objects) and negative.holds(objects) and not description.holds(objects):
            edited = Scene(tuple(objects), scene.background)
            if refer(edited, rng):
                return edited
    while True:
        edited = compose(negative, rng)
        if not description.holds(edited.objects):
            return edited


def _mirrored(scene, relation):
    """The scene's objects, left and right, or above and below, exchanged."""
    if relation in ("left", "right"):
        return [replace(o, x=IMAGE_SIZE - o.x, rotation=-o.rotation) for o in scene.objects]
    return [replace(o, y=IMAGE_SIZE - o.y) for o in scene.objects]


def _matched(scene, description, negative, rng):
    """The scene's objects, group by group, renamed to the edited phrases; removed or added where counts differ."""
    left, groups = list(scene.objects), []
    for phrase in sorted(description.phrases, key=lambda p: p.size is None):
        group = [o for o in left if phrase.fits(o)][: phrase.count]
        left = [o for o in left if o not in group]
        groups.append((description.phrases.index(phrase), group))
    groups = [group for _, group in sorted(groups, key=lambda pair: pair[0])]
    if description.relations != negative.relations and len(groups[0]) == len(groups[1]) == 1:
        (a,), (b,) = groups[:2]
        groups[:2] = [replace(a, x=b.x, y=b.y)], [replace(b, x=a.x, y=a.y)]
    objects = []
    for phrase, group in zip(negative.phrases, groups, strict=True):
        for obj in group[: phrase.count]:
            new = sample_object(rng, color=phrase.color, shape=phrase.shape, size=phrase.size or obj.size)
            kept = {"x": obj.x, "y": obj.y, "rotation": obj.rotation}
            kept |= {"rgb": obj.rgb} if new.color == obj.color else {}
            kept |= {"radius": obj.radius} if new.size == obj.size else {}
            objects.append(replace(new, **kept))
        for _ in range(phrase.count - len(group)):
            for _ in range(20):
                new = sample_object(rng, color=phrase.color, shape=phrase.shape, size=phrase.size or group[0].size)
                if layout_is_valid([*objects, new]):
                    break
            objects.append(new)
    return objects
