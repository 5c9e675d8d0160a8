"""The caption grammar of the `shapes` world: meaning, wording, parsing, truth.

    prompt   = [frame] phrase {("," | "and" | "with" | ", and") phrase | relation phrase} ["."]
    phrase   = ("a" | "an" | "one" | "two" | "three" | "four") [size] [colour] (shape | "shape" | "object")
    relation = "left of" | "to the left of" | ... | "above" | "below"

A `Description` is what a caption means. The world is closed: a caption names every object of its scene, so "a red
circle" is true of a scene with exactly one object. A relation between groups holds for each pair of their members.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from dpt.shapes.scenes import COLORS, MAX_OBJECTS, SHAPES, SIZES, direction
from dpt.shapes.settings import WebNoise

CATEGORIES = ("single", "attribute", "size", "numeracy", "spatial", "complex")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
FRAMES = ("a picture of", "an image of", "a drawing of", "a photo of")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Pairs that no training caption with two or more objects contains.
UNSEEN_PAIRS = (("red", "star"), ("blue", "triangle"), ("yellow", "cross"), ("green", "circle"), ("purple", "square"))


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one kind; an attribute that is None is left open."""

    count: int
    size: str | None
    color: str | None
    shape: str | None

    def fits(self, obj) -> bool:
        """Whether an object (anything with size, color, shape) is of this kind."""
        return self.size in (None, obj.size) and self.color in (None, obj.color) and self.shape in (None, obj.shape)

    def name(self) -> str:
        """The kind in plain words, without number."""
        return " ".join(word for word in (self.size, self.color, self.shape or "shape") if word)


@dataclass(frozen=True)
class Description:
    """The meaning of a caption: phrases, and relations (i, direction, j) between phrases i and j."""

    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    @property
    def num_objects(self) -> int:
        return sum(phrase.count for phrase in self.phrases)

    def key(self) -> str:
        """The same text for every wording of the same meaning."""
        order = sorted(range(len(self.phrases)), key=lambda i: str(self.phrases[i]))
        rank = {i: k for k, i in enumerate(order)}
        relations = set()
        for i, relation, j in self.relations:
            if relation in ("right", "below"):
                i, relation, j = j, OPPOSITE[relation], i
            relations.add(f"{rank[i]} {relation} {rank[j]}")
        return "; ".join([f"{self.phrases[i].count} {self.phrases[i].name()}" for i in order] + sorted(relations))

    def category(self) -> str:
        """One of `CATEGORIES`; "complex" is two of size, numeracy and spatial, or a relation among three phrases."""
        sized = any(phrase.size for phrase in self.phrases)
        counted = any(phrase.count > 1 for phrase in self.phrases)
        related = bool(self.relations)
        if sized + counted + related > 1 or (related and len(self.phrases) > 2):
            return "complex"
        if related:
            return "spatial"
        if counted:
            return "numeracy"
        if sized:
            return "size"
        return "single" if len(self.phrases) == 1 else "attribute"

    def failure(self, objects) -> str | None:
        """Why the description is false of the objects (each with size, color, shape, x, y); None when it is true."""
        if len(objects) != self.num_objects:
            return f"{self.num_objects} objects are asked for, {len(objects)} are there"
        slots = [i for i, phrase in enumerate(self.phrases) for _ in range(phrase.count)]
        unrelated = None
        for order in permutations(objects):
            if all(self.phrases[i].fits(obj) for i, obj in zip(slots, order, strict=True)):
                unrelated = self._broken_relation(list(zip(slots, order, strict=True)))
                if unrelated is None:
                    return None
        if unrelated:
            return unrelated
        for phrase in self.phrases:
            found = sum(phrase.fits(obj) for obj in objects)
            if found < phrase.count:
                return f"{phrase.count} x {phrase.name()} asked for, {found} there"
        return "the objects cannot be assigned to the phrases"

    def _broken_relation(self, assigned: list[tuple[int, object]]) -> str | None:
        for i, relation, j in self.relations:
            groups = ([obj for slot, obj in assigned if slot == phrase] for phrase in (i, j))
            if any(direction(a, b) != relation for a, b in product(*groups)):
                return f"the {self.phrases[i].name()} should be {relation} of the {self.phrases[j].name()}"
        return None

    def holds(self, objects) -> bool:
        """Whether the description is true of the objects and names all of them."""
        return self.failure(objects) is None


# Held-out meanings


def has_unseen_pair(description: Description) -> bool:
    """Whether an unseen (colour, shape) pair appears among two or more objects."""
    return description.num_objects > 1 and any((p.color, p.shape) in UNSEEN_PAIRS for p in description.phrases)


def split_of(description: Description) -> str:
    """The split of a meaning: "train", "val" or "test". One in 16 each is held out for val and test.

    Meanings with an unseen pair are always held out. One-object captions without a size are too few to hold out: all of
    them may be trained on, and "train" is returned for them.
    """
    if description.category() == "single":
        return "train"
    bucket = hashlib.sha256(description.key().encode()).digest()[0]
    if has_unseen_pair(description):
        return "val" if bucket % 2 else "test"
    return {0: "val", 1: "test"}.get(bucket % 16, "train")


# Sampling meanings


def _choice(rng, options):
    return options[int(rng.random() * len(options))]


def _sample_pairs(rng, n):
    pairs = []
    while len(pairs) < n:
        pair = (_choice(rng, tuple(COLORS)), _choice(rng, SHAPES))
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def sample_description(rng: np.random.Generator, category: str) -> Description:
    """A random description of the category, of any split."""
    one_object = category == "single" or (category == "size" and rng.random() < 0.25)
    if one_object:
        size = _choice(rng, tuple(SIZES)) if category == "size" else None
        return Description((Phrase(1, size, *_sample_pairs(rng, 1)[0]),))
    counts, sized, related = [1, 1], False, False
    if category == "attribute":
        counts = [1, 1] if rng.random() < 0.7 else [1, 1, 1]
    elif category == "size":
        sized = True
    elif category == "numeracy":
        counts = _choice(rng, ([2], [3], [4], [2, 1], [1, 2], [2, 2], [3, 1], [1, 3]))
    elif category == "spatial":
        related = True
    elif category == "complex":
        counts, sized, related = _choice(
            rng,
            (
                ([1, 1], True, True),
                ([2, 1], False, True),
                ([1, 2], False, True),
                ([1, 1, 1], False, True),
                ([2, 1], True, False),
                ([1, 2], True, False),
            ),
        )
    else:
        raise ValueError(f"category is {category!r}; it must be one of {', '.join(CATEGORIES)}")
    pairs = _sample_pairs(rng, len(counts))
    if sized and len(counts) == 2 and rng.random() < 0.25:  # "a small red star and a large red star"
        sizes = list(SIZES) if rng.random() < 0.5 else list(SIZES)[::-1]
        pairs[1] = pairs[0]
    else:
        sizes = [_choice(rng, tuple(SIZES)) if sized else None for _ in counts]
    phrases = tuple(Phrase(n, s, *pair) for n, s, pair in zip(counts, sizes, pairs, strict=True))
    relations = ((0, _choice(rng, tuple(OPPOSITE)), 1),) if related else ()
    return Description(phrases, relations)


# Wording


def phrase_text(phrase: Phrase, rng: np.random.Generator) -> str:
    """A noun phrase: "a small red circle", "two stars"."""
    noun = phrase.shape or _choice(rng, ("shape", "object"))
    if phrase.count > 1:
        noun += "es" if noun == "cross" else "s"
    size = _choice(rng, SIZE_WORDS[phrase.size]) if phrase.size else None
    words = [word for word in (size, phrase.color, noun) if word]
    if phrase.count > 1:
        number = list(NUMBERS)[phrase.count - 1]
    else:
        number = "an" if words[0][0] in "aeiou" else "a"
        number = "one" if rng.random() < 0.1 else number
    return " ".join([number, *words])


def caption_text(description: Description, rng: np.random.Generator) -> str:
    """One of the wordings of a description (at most one relation, between the first two phrases)."""
    texts = [phrase_text(phrase, rng) for phrase in description.phrases]
    if description.relations:
        ((i, relation, j),) = description.relations
        if {i, j} != {0, 1}:
            raise ValueError(f"relations is {description.relations}; wording needs one between the first two phrases")
        if rng.random() < 0.5:
            i, relation, j = j, OPPOSITE[relation], i
        text = f"{texts[i]} {_choice(rng, RELATION_WORDS[relation])} {texts[j]}"
        text = ", and ".join([text, *texts[2:]])
    else:
        order = rng.permutation(len(texts))
        texts = [texts[k] for k in order]
        if len(texts) == 2:
            text = _choice(rng, ("{} and {}", "{} and {}", "{} with {}")).format(*texts)
        elif len(texts) > 2:
            text = ", ".join(texts[:-1]) + _choice(rng, (" and ", ", and ")) + texts[-1]
        else:
            text = texts[0]
    return f"{_choice(rng, FRAMES)} {text}" if rng.random() < 0.3 else text


# Parsing


def _one_of(words) -> re.Pattern:
    return re.compile(rf"({'|'.join(sorted(words, key=len, reverse=True))})\b *")


_FRAME = _one_of([*FRAMES, "there is", "there are"])
_COUNTS = {"a": 1, "an": 1} | NUMBERS
_COUNT = _one_of(_COUNTS)
_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_SIZE, _COLOR = _one_of(_SIZES), _one_of(COLORS)
_SINGULAR = {shape: shape for shape in SHAPES} | {"shape": None, "object": None}
_PLURAL = {noun + ("es" if noun == "cross" else "s"): shape for noun, shape in _SINGULAR.items()}
_NOUN, _NOUNS = _one_of(_SINGULAR), _one_of(_PLURAL)
_RELATIONS = {word: relation for relation, words in RELATION_WORDS.items() for word in words}
_RELATION, _JOIN = _one_of(_RELATIONS), re.compile(r"(, *and\b|,|and\b|with\b) *")


def parse(prompt: str) -> Description:
    """The meaning of a prompt of the grammar, whatever its wording.

    Raises:
        ValueError: the prompt is outside the grammar; the message says where it left it.
    """
    text = " ".join(prompt.lower().split()).removesuffix(".").strip()
    at, phrases, relations = 0, [], []

    def outside(reason: str) -> ValueError:
        return ValueError(f"prompt {prompt!r} is outside the shapes grammar: {reason}")

    def take(pattern: re.Pattern, expected: str | None = None) -> str | None:
        """The words that the pattern matches next, and moves behind them; None without a match."""
        nonlocal at
        match = pattern.match(text, at)
        if match:
            at = match.end()
        elif expected:
            raise outside(f"expected {expected} at {text[at:][:30]!r}")
        return match and match[1]

    take(_FRAME)
    while True:
        count = _COUNTS[take(_COUNT, "a number (a, one, two, three, four)")]
        size, color = _SIZES.get(take(_SIZE)), take(_COLOR)
        if count > 1:
            shape = _PLURAL[take(_NOUNS, f"one of {', '.join(SHAPES)} in the plural")]
        else:
            shape = _SINGULAR[take(_NOUN, f"one of {', '.join(SHAPES)}")]
        phrases.append(Phrase(count, size, color, shape))
        if at == len(text):
            break
        if relation := take(_RELATION):
            relations.append((len(phrases) - 1, _RELATIONS[relation], len(phrases)))
        else:
            take(_JOIN, "a relation, a comma or 'and'")
    description = Description(tuple(phrases), tuple(relations))
    if description.num_objects > MAX_OBJECTS:
        raise outside(f"it names {description.num_objects} objects, a scene holds at most {MAX_OBJECTS}")
    if relations and description.num_objects == MAX_OBJECTS:
        raise outside(f"a relation among {MAX_OBJECTS} objects is not decidable")
    return description


# The captions that the base model is trained on


def web_like(description: Description, rng: np.random.Generator, noise: WebNoise) -> Description:
    """A partial, now and then wrong, description of the same scene; where that is held out, the given one."""
    phrases, relations = list(description.phrases), list(description.relations)
    if len(phrases) > 1 and rng.random() < noise.swap_attributes:
        i, j = rng.permutation(len(phrases))[:2]
        name = "color" if rng.random() < 0.5 else "shape"
        a, b = getattr(phrases[i], name), getattr(phrases[j], name)
        phrases[i], phrases[j] = replace(phrases[i], **{name: b}), replace(phrases[j], **{name: a})
    for k, phrase in enumerate(phrases):
        if phrase.size and rng.random() < noise.drop_size:
            phrase = replace(phrase, size=None)
        if rng.random() < noise.drop_color:
            phrase = replace(phrase, color=None)
        elif rng.random() < noise.drop_shape:
            phrase = replace(phrase, shape=None)
        phrases[k] = phrase
    if relations:
        if rng.random() < noise.drop_relation:
            relations = []
        elif rng.random() < noise.flip_relation:
            relations = [(i, OPPOSITE[r], j) for i, r, j in relations]
    if description.num_objects > 1:
        kept = [replace(p, count=sum(rng.random(p.count) >= noise.drop_object)) for p in phrases]
        if sum(p.count for p in kept) and not (relations and min(p.count for p in kept[:2]) == 0):
            phrases = [p for p in kept if p.count]
    result = Description(tuple(phrases), tuple(relations))
    return result if split_of(result) == "train" else description
