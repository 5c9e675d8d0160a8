import time
from collections import Counter

import numpy as np
import pytest

from dpt.shapes.grammar import CATEGORIES, caption_text, has_unseen_pair, parse, sample_description, split_of
from dpt.shapes.scenes import DIRECTION_MARGIN, SIZES, direction, layout_is_valid, render
from dpt.shapes.world import PROMPT_CATEGORIES, PROMPT_FOLDER, ShapesWorld, load_prompts


@pytest.fixture(scope="module")
def examples():
    world = ShapesWorld("train", seed=5)
    return [world[i] for i in range(400)]


def test_access_is_random_and_repeatable():
    world = ShapesWorld("train", seed=3)
    late = world[1000]
    assert world[7] == ShapesWorld("train", seed=3)[7]
    assert world[1000] == late
    assert world[7] != ShapesWorld("train", seed=4)[7]
    assert world.scene(7)[1] == world[7].scene
    scenes = {s: ShapesWorld(s).scene(0)[1] for s in ("train", "val", "test")}
    assert len(set(scenes.values())) == 3


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split is 'dev'"):
        ShapesWorld("dev")


def test_captions_are_true_and_negatives_false(examples):
    for e in examples:
        assert e.description.holds(e.scene.objects)
        assert parse(e.caption).holds(e.scene.objects)
        negative = parse(e.negative.caption)
        assert not negative.holds(e.scene.objects)
        assert negative.holds(e.negative.scene.objects)
        assert not e.description.holds(e.negative.scene.objects)
        assert not parse(e.random_caption).holds(e.scene.objects)
        assert not e.description.holds(e.random_scene.objects)
        assert parse(e.random_caption).holds(e.random_scene.objects)
    assert set(Counter(e.negative.kind for e in examples)) == {"attribute", "count", "relation", "size"}
    assert {e.description.category() for e in examples} == set(CATEGORIES)


def test_hard_negatives_are_minimal(examples):
    kept = []
    for e in examples:
        others = e.negative.scene.objects  # mirrored ones keep one coordinate
        kept.append(sum(any(o.x == other.x or o.y == other.y for other in others) for o in e.scene.objects))
    share = np.mean([k >= len(e.scene.objects) - 1 for k, e in zip(kept, examples, strict=True)])
    assert share > 0.85  # the others had no room for the edit


def test_training_texts_are_of_train_meanings(examples):
    for e in examples:
        for text in (e.caption, e.web_caption, e.negative.caption, e.random_caption):
            description = parse(text)
            assert split_of(description) == "train", text
            assert not has_unseen_pair(description), text


def test_scenes_keep_their_margins(examples):
    for e in examples:
        for scene in (e.scene, e.negative.scene):
            assert 1 <= len(scene.objects) <= 4
            assert layout_is_valid(scene.objects)
            for obj in scene.objects:
                low, high = SIZES[obj.size]
                assert low <= obj.radius <= high
            if len(scene.objects) in (2, 3):
                for a in scene.objects:
                    for b in scene.objects:
                        dx, dy = sorted((abs(a.x - b.x), abs(a.y - b.y)))
                        assert dx <= DIRECTION_MARGIN * dy + 1e-9
        for description in (e.description, e.negative.description):
            assert not (description.relations and description.num_objects == 4)


def test_expressions_name_one_object(examples):
    kinds = Counter()
    for e in examples:
        assert e.expressions
        for expression in e.expressions:
            begin, end = expression.span
            referent = e.scene.objects[expression.index]
            assert expression.text[begin:end].startswith("the ")
            assert expression.text[begin:end].endswith(referent.shape)
            words = expression.text.split()
            kinds.update(words)
            if words[1].endswith("most"):
                sign = 1 if words[1] in ("leftmost", "topmost") else -1
                axis = "x" if words[1] in ("leftmost", "rightmost") else "y"
                same = [
                    o for o in e.scene.objects if o.shape == referent.shape and (len(words) == 3 or o.color == words[2])
                ]
                assert min(same, key=lambda o, s=sign, a=axis: s * getattr(o, a)) is referent
            elif " of " not in expression.text and "above" not in words and "below" not in words:
                names = set(words[1:])
                assert sum(names <= {o.color, o.shape, o.size} for o in e.scene.objects) == 1
            else:  # "the star above the blue square"
                relation = next(w for w in ("left", "right", "above", "below") if w in words)
                (anchor,) = [o for o in e.scene.objects if [o.color, o.shape] == words[-2:]]
                others = [o for o in e.scene.objects if o is not anchor and o.shape == words[1]]
                assert [o for o in others if direction(o, anchor) == relation] == [referent]
    assert min(kinds[w] for w in ("small", "red", "leftmost", "above", "left")) > 0


def test_boxes_cover_the_drawing(examples):
    for e in examples[:50]:
        image = render(e.scene).astype(int)
        changed = np.abs(image - np.array(e.scene.background)).max(2) > 8
        covered = np.zeros_like(changed)
        for cx, cy, w, h in e.scene.boxes() * 128:
            covered[int(cy - h / 2) : int(np.ceil(cy + h / 2)), int(cx - w / 2) : int(np.ceil(cx + w / 2))] = True
        assert changed.any()
        assert not (changed & ~covered).any()


@pytest.mark.slow
def test_at_least_300_scenes_a_second():
    world, best = ShapesWorld("train", seed=6), 0.0
    for start in range(0, 900, 300):
        began = time.perf_counter()
        for i in range(start, start + 300):
            render(world.scene(i)[1])
        best = max(best, 300 / (time.perf_counter() - began))
    assert best >= 300


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


@pytest.mark.parametrize("category", PROMPT_CATEGORIES)
def test_committed_prompts(category):
    made = make_prompts(category)
    keys = {}
    for split in ("val", "test"):
        prompts = load_prompts(split, category)
        assert list(prompts) == made[split]
        assert len(prompts) == (20 if category == "single" else 100)
        keys[split] = {parse(p).key() for p in prompts}
        assert len(keys[split]) == len(prompts)
        for prompt in prompts:
            description = parse(prompt)
            assert has_unseen_pair(description) == (category == "unseen")
            if category == "single":
                continue
            assert split_of(description) == split
            if category != "unseen":
                assert description.category() == category
    assert not keys["val"] & keys["test"]


def test_no_prompt_file_is_left_over():
    expected = {f"{split}_{category}.txt" for split in ("val", "test") for category in PROMPT_CATEGORIES}
    assert {path.name for path in PROMPT_FOLDER.iterdir()} == expected
