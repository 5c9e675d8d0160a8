import numpy as np
import pytest

from dpt.shapes.grammar import (
    CATEGORIES,
    UNSEEN_PAIRS,
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
from dpt.shapes.scenes import SceneObject


def thing(color, shape, size="small", x=0.0, y=0.0):
    return SceneObject(color, shape, size, x, y, 12.0, 0.0, (0, 0, 0))


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_wording_parses_to_its_meaning(category):
    rng = np.random.default_rng(1)
    for _ in range(500):
        description = sample_description(rng, category)
        assert description.category() == category
        assert parse(caption_text(description, rng)).key() == description.key()


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("A red circle.", "single"),
        ("a photo of an orange star", "single"),
        ("a red circle and a blue square", "attribute"),
        ("three green stars", "numeracy"),
        ("a red circle to the left of a blue square", "spatial"),
        ("a little red circle with one big blue square", "size"),
        ("two red circles above a blue square", "complex"),
        ("there are two red circles", "numeracy"),
    ],
)
def test_prompts_people_type(prompt, category):
    assert parse(prompt).category() == category


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "red circle", "two red circle", "a red circles", "a red circle and", "five red stars", "🙂"]
)
def test_other_prompts_are_outside_the_grammar(prompt):
    with pytest.raises(ValueError, match="outside the shapes grammar"):
        parse(prompt)


def test_more_objects_than_a_scene_holds():
    with pytest.raises(ValueError, match="names 5 objects"):
        parse("three red stars and two blue squares")


def test_a_caption_names_all_objects():
    circle, square = thing("red", "circle"), thing("blue", "square")
    assert parse("a red circle").holds([circle])
    assert not parse("a red circle").holds([circle, square])
    assert not parse("a red circle and a blue square").holds([circle])
    assert parse("a blue square and a red circle").holds([circle, square])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a blue circle and a blue square", "1 x blue circle asked for, 0 there"),
        ("a large red circle and a blue square", "1 x large red circle asked for"),
        ("a red circle right of a blue square", "should be right of"),
        ("two red circles", "2 x red circle asked for, 1 there"),
        ("a red circle", "1 objects are asked for, 2 are there"),
    ],
)
def test_the_failing_requirement_is_named(prompt, reason):
    objects = [thing("red", "circle", x=20, y=60), thing("blue", "square", x=80, y=64)]
    assert reason in parse(prompt).failure(objects)
    assert parse("a red circle left of a blue square").failure(objects) is None


def test_a_relation_holds_for_all_members():
    above, below = thing("red", "star", x=60, y=20), thing("red", "star", x=60, y=110)
    square = thing("blue", "square", x=60, y=64)
    assert not parse("two red stars above a blue square").holds([above, below, square])
    assert parse("two red stars above a blue square").holds([above, thing("red", "star", x=70, y=21), square])


def test_overlapping_phrases_are_assigned():
    objects = [thing("red", "star", "small"), thing("red", "star", "large")]
    assert parse("a red star and a small red star").holds(objects)
    assert not parse("a large red star and a large red star").holds(objects)


def test_wording_does_not_change_the_key():
    assert parse("a red star left of a blue cross").key() == parse("a blue cross on the right of a red star").key()
    assert parse("a red star left of a blue cross").key() != parse("a red star right of a blue cross").key()
    assert parse("a red star and a blue cross").key() == parse("a photo of a blue cross with one red star").key()


def test_web_like_captions_are_faulty_at_the_stated_rates_and_never_held_out():
    rng, noise = np.random.default_rng(0), WebNoise()
    description = parse("a small red circle left of a large black square")
    assert split_of(description) == "train"
    results = [web_like(description, rng, noise) for _ in range(4000)]
    assert all(split_of(result) == "train" for result in results)
    kept = [r for r in results if len(r.phrases) == 2]
    share = np.mean([len(r.phrases) < 2 for r in results])
    assert abs(share - (1 - (1 - noise.drop_object) ** 2) * noise.drop_relation) < 0.02  # an anchor never goes
    colors = np.mean([p.color is None for r in kept for p in r.phrases])
    assert abs(colors - noise.drop_color) < 0.02
    swapped = np.mean([(r.phrases[0].color == "black") or (r.phrases[0].shape == "square") for r in kept])
    assert abs(swapped - noise.swap_attributes) < 0.03
    clean = WebNoise(0, 0, 0, 0, 0, 0, 0)
    assert web_like(description, rng, clean) == description


def test_unseen_pairs_are_held_out_unless_alone():
    color, shape = UNSEEN_PAIRS[0]
    pair = Description((Phrase(1, None, color, shape), Phrase(1, None, "cyan", "cross")))
    assert has_unseen_pair(pair)
    assert split_of(pair) in ("val", "test")
    assert split_of(Description((Phrase(2, None, color, shape),))) in ("val", "test")
    assert split_of(Description((Phrase(1, None, color, shape),))) == "train"


@pytest.mark.parametrize("prompt", ["two red stars left of two blue stars", "a photo ofa red circle"])
def test_prompts_that_only_look_like_the_grammar(prompt):
    with pytest.raises(ValueError, match="outside the shapes grammar"):
        parse(prompt)
