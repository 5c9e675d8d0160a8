"""Examples of the `shapes` world by (split, seed, index), and its committed prompts.

Every example is drawn from its own random generator; nothing is kept between examples.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dpt.files import read_text, text_lines
from dpt.shapes.compose import Expression, compose, refer
from dpt.shapes.edited_negatives import HardNegative, edit_description, edit_scene
from dpt.shapes.grammar import CATEGORIES, Description, caption_text, parse, sample_description, split_of, web_like
from dpt.shapes.scenes import Scene
from dpt.shapes.settings import WebNoise

SPLITS = {"train": 0, "val": 1, "test": 2}
CATEGORY_WEIGHTS = {"single": 0.08, "attribute": 0.2, "size": 0.2, "numeracy": 0.16, "spatial": 0.2, "complex": 0.16}
PROMPT_FOLDER = Path(__file__).parent / "prompts"
PROMPT_CATEGORIES = (*CATEGORIES, "unseen")


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


def sample_scene(split: str, rng: np.random.Generator) -> tuple[Description, Scene]:
    """A description that may appear in the split, and a scene of it."""
    categories, weights = tuple(CATEGORY_WEIGHTS), np.cumsum(list(CATEGORY_WEIGHTS.values()))
    category = categories[int(np.searchsorted(weights, rng.random() * weights[-1]))]
    while True:
        description = sample_description(rng, category)
        if split_of(description) == split or (category == "single" and split != "train"):
            return description, compose(description, rng)


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
        """The name of the world's scenes, which differs by split, seed and mix of categories."""
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


@cache
def load_prompts(split: str, category: str) -> tuple[str, ...]:
    """The committed prompts of "val" or "test" in one of `PROMPT_CATEGORIES`."""
    return tuple(text_lines(read_text(PROMPT_FOLDER / f"{split}_{category}.txt")))


def training_prompts(category: str, count: int) -> list[str]:
    """Distinct prompts of a category, of no meaning of val's or test's; "single" and "unseen" have none."""
    rng, texts, seen = np.random.default_rng((1, CATEGORIES.index(category))), [], set()
    held_out = {parse(text).key() for s in ("val", "test") for c in PROMPT_CATEGORIES for text in load_prompts(s, c)}
    while len(texts) < count:
        description = sample_description(rng, category)
        if split_of(description) == "train" and description.key() not in seen | held_out:
            seen.add(description.key())
            texts.append(caption_text(description, rng))
    return texts
