"""Examples of the `shapes` world by (split, seed, index): scene, captions, expressions and hard negatives.

Every example is drawn from its own random generator; nothing is kept between examples.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from dpt.files import read_text, text_lines
from dpt.shapes.captions import (
    CATEGORIES,
    OPPOSITE,
    Description,
    Phrase,
    WebNoise,
    caption_text,
    has_unseen_pair,
    parse,
    sample_description,
    split_of,
    web_like,
)
from dpt.shapes.scenes import (
    COLORS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    direction,
    layout_is_valid,
    sample_background,
    sample_object,
)

SPLITS = {"train": 0, "val": 1, "test": 2}
CATEGORY_WEIGHTS = {"single": 0.08, "attribute": 0.2, "size": 0.2, "numeracy": 0.16, "spatial": 0.2, "complex": 0.16}
LARGE_SHARE = {1: 0.5, 2: 0.5, 3: 0.4, 4: 0.2}  # of objects whose caption leaves the size open, by number of objects
EXTREME_MARGIN = 8.0  # pixels by which "the leftmost" leads
_EXTREMES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1)}


@dataclass(frozen=True)
class Expression:
    """A phrase with one referent in its scene: `span` is the referent's [begin, end) in `text`, `index` its object."""

    text: str
    span: tuple[int, int]
    index: int


@dataclass(frozen=True)
class HardNegative:
    """A minimally different caption, false of the scene, and a scene that shows it."""

    kind: str
    description: Description
    caption: str
    scene: Scene


@dataclass(frozen=True)
class Example:
    """One scene with all its texts; `random_*` come from another scene, and each is false of the other."""

    scene: Scene
    description: Description
    caption: str
    web_caption: str
    expressions: tuple[Expression, ...]
    negative: HardNegative
    random_caption: str
    random_scene: Scene


# Scenes


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
                        rng,
                        color=phrase.color,
                        shape=phrase.shape,
                        size=phrase.size or ("large" if large else "small"),
                    )
                    if layout_is_valid([*objects, candidate]):
                        break
                objects.append(candidate)
        if layout_is_valid(objects) and description.holds(objects):
            order = rng.permutation(len(objects))
            scene = Scene(tuple(objects[k] for k in order), background)
            if refer(scene, rng):
                return scene


def sample_scene(split: str, rng: np.random.Generator) -> tuple[Description, Scene]:
    """A description that may appear in the split, and a scene of it."""
    categories, weights = tuple(CATEGORY_WEIGHTS), np.cumsum(list(CATEGORY_WEIGHTS.values()))
    category = categories[int(np.searchsorted(weights, rng.random() * weights[-1]))]
    while True:
        description = sample_description(rng, category)
        if split_of(description) == split or (category == "single" and split != "train"):
            return description, compose(description, rng)


# Referring expressions


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
    """Such as "the star above the blue square": the anchor is unique, and one star lies above it."""
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


# Hard negatives


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
            same_color, same_size = new.color == obj.color, new.size == obj.size
            objects.append(
                replace(
                    new,
                    x=obj.x,
                    y=obj.y,
                    rotation=obj.rotation,
                    rgb=obj.rgb if same_color else new.rgb,
                    radius=obj.radius if same_size else new.radius,
                )
            )
        for _ in range(phrase.count - len(group)):
            for _ in range(20):
                new = sample_object(rng, color=phrase.color, shape=phrase.shape, size=phrase.size or group[0].size)
                if layout_is_valid([*objects, new]):
                    break
            objects.append(new)
    return objects


# Examples


class ShapesWorld:
    """Random access to the examples of one split and seed; splits never share a scene.

    Args:
        split: "train", "val" or "test".
        seed: another seed gives other examples of the same split.
        noise: how faulty the web-like captions are.
    """

    def __init__(self, split: str, *, seed: int = 0, noise: WebNoise | None = None):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        self.split, self.seed, self.noise = split, seed, noise or WebNoise()

    def key(self) -> str:
        """Tells the world's scenes from other splits', other seeds' and another mix of categories."""
        return f"{self.split} {self.seed} {CATEGORY_WEIGHTS}"

    def generator(self, index: int, stream: int = 0) -> np.random.Generator:
        """The example's random generator; `stream` gives independent ones."""
        return np.random.default_rng((SPLITS[self.split], self.seed, index, stream))

    def scene(self, index: int) -> tuple[Description, Scene]:
        """The example's description and scene alone: all that drawing needs."""
        return sample_scene(self.split, self.generator(index))

    def caption(self, index: int) -> str:
        """One clean caption of the example."""
        return caption_text(self.scene(index)[0], self.generator(index, 2**31 + 1))

    def web_caption(self, index: int, description: Description, epoch: int = 0) -> str:
        """A web-like caption of the example, another one each epoch."""
        rng = self.generator(index, 1 + epoch)
        return caption_text(web_like(description, rng, self.noise), rng)

    def __getitem__(self, index: int) -> Example:
        description, scene = self.scene(index)
        rng = self.generator(index, 2**31)
        kind, negative = edit_description(description, rng, self.split)
        negative_scene = edit_scene(scene, description, negative, rng)
        while True:
            other, other_scene = self.scene(int(rng.integers(2**31)))
            if not description.holds(other_scene.objects) and not other.holds(scene.objects):
                break
        return Example(
            scene=scene,
            description=description,
            caption=caption_text(description, rng),
            web_caption=self.web_caption(index, description),
            expressions=refer(scene, rng),
            negative=HardNegative(kind, negative, caption_text(negative, rng), negative_scene),
            random_caption=caption_text(other, rng),
            random_scene=other_scene,
        )


# Committed prompts

PROMPT_FOLDER = Path(__file__).parent / "prompts"
PROMPT_CATEGORIES = (*CATEGORIES, "unseen")


@cache
def load_prompts(split: str, category: str) -> tuple[str, ...]:
    """The committed prompts of "val" or "test" in one of `PROMPT_CATEGORIES`."""
    return tuple(text_lines(read_text(PROMPT_FOLDER / f"{split}_{category}.txt")))


def training_prompts(category: str, count: int) -> list[str]:
    """Prompts of a category whose meanings are none of val's and test's, distinct; "single" and "unseen" have none."""
    rng, texts, seen = np.random.default_rng((1, CATEGORIES.index(category))), [], set()
    held_out = {parse(text).key() for s in ("val", "test") for c in PROMPT_CATEGORIES for text in load_prompts(s, c)}
    while len(texts) < count:
        description = sample_description(rng, category)
        if split_of(description) == "train" and description.key() not in seen | held_out:
            seen.add(description.key())
            texts.append(caption_text(description, rng))
    return texts


def make_prompts(category: str, *, per_category: int = 100, seed: int = 0) -> dict[str, list[str]]:
    """The prompts of a category for "val" and "test": distinct meanings, each in one split only.

    "single" has 40 meanings, half for each split. "unseen" mixes the other categories.
    """
    rng = np.random.default_rng((seed, PROMPT_CATEGORIES.index(category)))
    prompts, seen = {"val": [], "test": []}, set()
    wanted = 20 if category == "single" else per_category
    while min(len(texts) for texts in prompts.values()) < wanted:
        source = CATEGORIES[1 + int(rng.integers(5))] if category == "unseen" else category
        description = sample_description(rng, source)
        if category == "single":
            split = min(prompts, key=lambda s: len(prompts[s]))
        elif has_unseen_pair(description) == (category == "unseen"):
            split = split_of(description)
        else:
            continue
        if split in prompts and description.key() not in seen and len(prompts[split]) < wanted:
            seen.add(description.key())
            prompts[split].append(caption_text(description, rng))
    return prompts
