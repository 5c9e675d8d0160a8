"""Choosing among candidates: the schedule, the choice, and the pictures that come of it."""

from dataclasses import replace

import numpy as np
import pytest

from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import CKPT_FOLDER
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.choosing_rules import CANDIDATES_APART, Round, best, candidate_seeds, rounds
from dpt.drawing import Artist
from dpt.sampling_settings import PAPER, Sampling

PROMPTS = ["a red circle and a blue square", "two green stars"]
STEPS = Sampling(guidance_scale=5, num_inference_steps=6, height=64, width=64)


@pytest.fixture(scope="module")
def artist():
    sd = load_stable_diffusion("shapes")
    return Artist(sd, load_checkpoint(CKPT_FOLDER / "shapes-dpt").attach(sd))


@pytest.mark.parametrize(
    ("candidates", "choose_at", "expected"),
    [
        (1, (), [Round(0, 20, 1)]),
        (4, (0.25,), [Round(0, 5, 1), Round(5, 20, 1)]),
        (8, (0.1, 0.25, 0.5), [Round(0, 2, 4), Round(2, 5, 2), Round(5, 10, 1), Round(10, 20, 1)]),
        (8, (0.25, 0.5), [Round(0, 5, 3), Round(5, 10, 1), Round(10, 20, 1)]),
        (2, (1.0,), [Round(0, 20, 1)]),
        (2, (0.001,), [Round(0, 1, 1), Round(1, 20, 1)]),
    ],
)
def test_rounds(candidates, choose_at, expected):
    assert rounds(20, candidates, choose_at) == expected


def test_two_fractions_on_one_step_are_refused():
    with pytest.raises(ValueError, match=r"choose_at is \[0.25, 0.26\]; of 20 steps two .* are step 5"):
        rounds(20, 4, (0.25, 0.26))


def test_the_highest_scores_of_each_picture_are_kept():
    scores = np.array([0.1, 0.3, 0.3, np.nan, 0.9, 0.2])
    pictures = np.array([0, 0, 0, 1, 1, 1])
    assert best(scores, pictures, 1).tolist() == [1, 4]
    assert best(scores, pictures, 2).tolist() == [1, 2, 4, 5]
    assert candidate_seeds(7, 3) == [7, 7 + CANDIDATES_APART, 7 + 2 * CANDIDATES_APART]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"candidates": 0}, "candidates is 0; it must be"),
        ({"candidates": 2}, "choose_at says when to choose"),
        ({"choose_at": (0.5,)}, "candidates is 1; choosing needs at least 2"),
        ({"candidates": 2, "choose_at": (0.0,)}, "growing fractions above 0 and at most 1"),
        ({"candidates": 4, "choose_at": (0.5, 0.25)}, "growing fractions"),
        ({"candidates": 2, "choose_at": (0.5,), "parity": True}, "parity is set; the reference chooses nothing"),
        ({"candidates": 2, "choose_at": (1.0,), "correction_norm": 0.01}, "no step behind it is corrected"),
        ({"candidates": 2, "choose_at": (0.99,), "correction_norm": 0.01}, "no step behind it is corrected"),
        ({"candidates": 2, "choose_at": (0.5,), "correction_norm": 0.01, "correction_stop": 0.5}, "no step behind it"),
        ({"candidates": 4, "choose_at": (0.01, 0.02), "num_inference_steps": 20}, "two of these fractions are step 1"),
        ({"candidates": 2, "choose_at": 0.25}, "it must be a list of fractions"),
        ({"candidates": 2.5, "choose_at": (0.25,)}, "candidates is 2.5; it must be a whole number"),
        ({"correct_candidates": True}, "needs candidates and a correction"),
        ({"attend_and_excite": True, "correction_factor": 1.0}, "exclude each other"),
        ({"attend_and_excite": True, "correction_start": 0.5}, "Attend-and-Excite has steps of its own"),
        ({"height": "128"}, "height is '128'; it must be a whole number"),
        ({"height": 128.5}, "height is 128.5; it must be a whole number"),
        ({"attention_step": 3.0}, "for attend_and_excite, which is off"),
        ({"parity": True, "correction_norm": 0.01}, "parity is the reference's sampling, which has no correction_norm"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"scheduler": "plms"}, "scheduler is 'plms'; it must be ddim, euler or dpm"),
    ],
)
def test_settings_that_exclude_each_other(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_settings_that_are_given_anew_take_along_what_belongs_to_them():
    shapes = Sampling(correction_norm=0.012, correction_target="latent", candidates=2, choose_at=(0.2,))
    assert shapes.changed() == shapes
    assert shapes.changed(correction_factor=0.5) == Sampling(correction_factor=0.5, candidates=2, choose_at=(0.2,))
    assert shapes.changed(parity=True) == Sampling(correction_factor=PAPER.correction_factor, parity=True)
    assert shapes.changed(candidates=1) == Sampling(correction_norm=0.012, correction_target="latent")
    assert shapes.changed(attend_and_excite=True, candidates=1) == Sampling(attend_and_excite=True)
    assert Sampling().changed(candidates=4).choose_at == (0.25,)
    with pytest.raises(ValueError, match="exclude each other"):
        shapes.changed(correction_factor=1.0, correction_norm=0.01)
    everyone = shapes.changed(correct_candidates=True)
    for given in ({"candidates": 1}, {"correction_factor": 0.0}, {"correction_norm": 0.0}):
        assert not everyone.changed(**given).correct_candidates


def differs(images, others):
    """The largest difference in grey levels."""
    return max(np.abs(a.image.astype(int) - b.image).max() for a, b in zip(images, others, strict=True))


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_a_candidate_is_the_picture_that_its_own_seed_draws(artist, scheduler):
    """Within a grey level: in batches of another size float32 sums in another order."""
    plain = replace(STEPS, scheduler=scheduler)
    chosen = artist.draw(PROMPTS, [3, 4], replace(plain, candidates=4, choose_at=(0.2, 0.5)))
    alone = artist.draw(PROMPTS, [drawing.seed for drawing in chosen], plain)
    assert differs(chosen, alone) <= 1
    assert any(drawing.seed >= CANDIDATES_APART for drawing in chosen)
    for drawing, seed in zip(chosen, (3, 4), strict=True):
        assert [c["seed"] for c in drawing.candidates] == candidate_seeds(seed, 4)
        assert sorted(c["steps"] for c in drawing.candidates) == [1, 1, 3, 6]
        kept = next(c for c in drawing.candidates if c["seed"] == drawing.seed)
        at_half = [c for c in drawing.candidates if c["steps"] >= 3]
        assert kept["score"] == max(c["score"] for c in at_half)
    assert chosen[0].cost["whole_passes"] == 2 * (4 * 1 + 2 * 2 + 1 * 3)
    again = artist.draw(PROMPTS, [3, 4], replace(plain, candidates=4, choose_at=(0.2, 0.5)), batch_size=3)
    assert [drawing.seed for drawing in again] == [drawing.seed for drawing in chosen]
    assert differs(chosen, again) <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_who_is_told_of_choices_changes_nothing(artist, scheduler):
    settings, told = replace(STEPS, scheduler=scheduler, candidates=4, choose_at=(0.5, 1.0)), []
    silent = artist.draw(PROMPTS, [3, 4], settings, batch_size=3)
    drawn = artist.draw(PROMPTS, [3, 4], settings, batch_size=3, on_choice=lambda *choice: told.append(choice))
    assert all((a.latents == b.latents).all() for a, b in zip(drawn, silent, strict=True))
    assert [(step, len(found)) for step, found in told] == [(3, 8), (6, 4)]
    scores = {c["seed"]: c["score"] for drawing in drawn for c in drawing.candidates}
    for drawing, kept in zip(drawn, [c for c in told[1][1] if c["kept"]], strict=True):
        assert (kept["seed"], kept["score"]) == (drawing.seed, scores[drawing.seed])
        assert np.abs(kept["image"].astype(int) - drawing.image).mean() < 3  # predicted at the last step
    assert [c["seed"] for c in told[0][1] if c["kept"]] == [c["seed"] for c in told[1][1]]


def test_survivors_alone_are_corrected_unless_candidates_are_too(artist):
    settings = replace(STEPS, candidates=2, choose_at=(0.5,), correction_norm=0.02, correction_target="latent")
    survivors = artist.draw(PROMPTS, [3, 4], settings, trace=True)
    everyone = artist.draw(PROMPTS, [3, 4], replace(settings, correct_candidates=True), trace=True)
    for drawing in survivors:
        assert [r["length"] > 0 for r in drawing.trace] == [False] * 3 + [True] * 3
    for drawing in everyone:
        assert all(r["length"] > 0 for r in drawing.trace)
    assert survivors[0].cost["truncated_passes"] == 3
    again = settings.changed(candidates=1, correction_start=survivors[0].corrected_from)
    assert survivors[0].corrected_from == 0.5
    assert differs(survivors, artist.draw(PROMPTS, [drawing.seed for drawing in survivors], again)) <= 1
    assert everyone[0].cost["truncated_passes"] == 9


def test_choosing_needs_an_adapter_and_finite_scores(artist, monkeypatch):
    settings = replace(STEPS, candidates=2, choose_at=(0.5,))
    with pytest.raises(ValueError, match="need an adapter"):
        Artist(artist.sd).draw(PROMPTS, [3, 4], settings)
    monkeypatch.setattr("dpt.matching_score.score_of_features", lambda *inputs: inputs[-1][:, 0] * float("nan"))
    with pytest.raises(FloatingPointError, match="score after step 3 is not finite"):
        artist.draw(PROMPTS, [3, 4], settings)
    drawn = artist.draw(PROMPTS, [3, 4], replace(settings, on_nan="skip"))
    assert [drawing.seed for drawing in drawn] == [3, 4]
