"""Prompt sets, in the files that users have.

shapes:val  shapes:test          the embedded world's, by category
shapes:train                     2,500 more by category, to train on: no meaning of val's or test's
nss1k:FOLDER                     COCO-NSS1K: every JSON part in the folder, a category each
compbench:FOLDER                 T2I-CompBench: every <category>_val.txt in the folder
cc500:FILE  abc6k:FILE  FILE     one prompt a line
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from dpt.files import read_json, read_text, text_lines
from dpt.shapes.grammar import CATEGORIES
from dpt.shapes.world import PROMPT_CATEGORIES, load_prompts, training_prompts

TRAINING_PROMPTS = 500  # a category
NUM_CONJUNCTIONS = 446  # lines at the head of CC-500 that join two coloured objects


class Nss1kEntry(msgspec.Struct):
    """An entry of a part of COCO-NSS1K, whose caption has either name."""

    captions: str | msgspec.UnsetType = msgspec.UNSET
    caption: str | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Prompt:
    """A prompt, its number in the set, and its categories: COCO-NSS1K's whole holds its parts."""

    number: int
    categories: tuple[str, ...]
    text: str


def load_prompt_set(name: str, *, per_category: int | None = None) -> list[Prompt]:
    """The distinct prompts of a set, in the files' order.

    Args:
        per_category: only the first so many of each category; their numbers, and so their noise, are the whole set's.

    Raises:
        ValueError: the set is unknown, or a file holds something else; it is named.
    """
    if per_category is not None and per_category < 1:
        raise ValueError(f"per_category is {per_category}; it must be at least 1")
    kind, _, where = name.partition(":")
    groups = READERS[kind](where) if kind in READERS else {"prompts": _lines(Path(name))}
    categories: dict[str, dict[str, None]] = {}  # of each text, in order, those that it is chosen for
    for category, texts in groups.items():
        for k, text in enumerate(texts):
            found = categories.setdefault(text, {})
            if per_category is None or k < per_category:
                found[category] = None
    if not categories:
        raise ValueError(f"prompts {name}: nothing there")
    return [Prompt(number, tuple(found), text) for number, (text, found) in enumerate(categories.items()) if found]


def _shapes(split: str) -> dict[str, tuple[str, ...]]:
    if split == "train":
        return {category: training_prompts(category, TRAINING_PROMPTS) for category in CATEGORIES[1:]}
    if split not in ("val", "test"):
        raise ValueError(f"prompts shapes:{split}: the sets are shapes:train, shapes:val and shapes:test")
    return {category: load_prompts(split, category) for category in PROMPT_CATEGORIES}


def _lines(path: Path) -> list[str]:
    try:
        lines = text_lines(read_text(path))
    except ValueError as error:
        known = "save it as UTF-8 text" if path.exists() else f"name a text file, or {', '.join(READERS)} and a colon"
        raise ValueError(f"prompts {error}; {known}") from error
    return [line.strip() for line in lines if line.strip()]


def _cc500(where: str) -> dict[str, list[str]]:
    texts = _lines(Path(where))
    return {"conjunction": texts[:NUM_CONJUNCTIONS], "other": texts[NUM_CONJUNCTIONS:]}


def _nss1k(where: str) -> dict[str, list[str]]:
    groups = {}
    for path in _files(where, "*.json"):
        try:
            entries = read_json(path, list[Nss1kEntry])
        except ValueError as error:
            raise ValueError(f"{path} is no part of COCO-NSS1K: {error}") from error
        groups[path.stem] = [e.caption if e.captions is msgspec.UNSET else e.captions for e in entries]
        if msgspec.UNSET in groups[path.stem]:
            number = groups[path.stem].index(msgspec.UNSET)
            raise ValueError(f"{path} is no part of COCO-NSS1K: entry {number} has neither captions nor caption")
    return groups


def _compbench(where: str) -> dict[str, list[str]]:
    return {path.name.removesuffix("_val.txt"): _lines(path) for path in _files(where, "*_val.txt")}


def _files(where: str, pattern: str) -> list[Path]:
    path = Path(where)
    found = [path] if path.is_file() else sorted(path.glob(pattern))
    if not found:
        raise ValueError(f"prompts: {path} holds no {pattern}")
    return found


READERS = {
    "shapes": _shapes,
    "nss1k": _nss1k,
    "compbench": _compbench,
    "cc500": _cc500,
    "abc6k": lambda where: {"abc6k": _lines(Path(where))},
}
