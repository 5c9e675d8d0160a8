"""The demo's model and adapter. A drawing stops when nobody waits for it any more."""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dpt.base_models import DPT_WEIGHTS, default_dtype, known_name
from dpt.device import DTYPES, usable_device
from dpt.drawing import Artist
from dpt.files import check_text
from dpt.hub import is_hub_id
from dpt.images import with_boxes
from dpt.sampling_settings import SEED_LIMIT, Sampling
from dpt.worlds import grammar_note

THREAD = "drawing"
MOST_CANDIDATES = 8  # of a picture; they are drawn at once
COLORS = ("lime", "orange", "magenta")  # of boxes, the surest first
FRAME = [([0.5, 0.5, side, side], "lime") for side in (0.99, 0.97)]  # of the kept candidate, as boxes


class Stopped(Exception):
    """Raised inside a drawing that nobody waits for any more."""


def in_steps(work: Callable[[Callable], object]) -> Iterator[object]:
    """Runs `work(report)` in a thread and yields what it reports, then its result; closing it stops the work.

    Args:
        work: calls `report(value)` now and then, which raises `Stopped` when the iterator was closed.
    """
    values, stop = queue.Queue(), threading.Event()

    def report(value):
        if stop.is_set():
            raise Stopped
        values.put((False, value))

    def run():
        try:
            values.put((True, work(report)))
        except Stopped:
            pass
        except Exception as error:
            values.put((True, error))

    thread = threading.Thread(target=run, daemon=True, name=THREAD)
    thread.start()
    try:
        final = False
        while not final:
            final, value = values.get()
            if isinstance(value, Exception):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


class Studio:
    """A model with its adapter, as the page uses it."""

    def __init__(self, artist: Artist, sampling: Sampling):
        self.artist, self.sampling = artist, sampling
        self.sd, self.scorer = artist.sd, artist.scorer

    def draw(
        self,
        prompt: str,
        seed: int,
        norm: float,
        target: str,
        phrase: str,
        candidates: int = 1,
        choose_at: float = 0.25,
    ) -> Iterator[tuple]:
        """(plain, corrected, points of the score, candidates, what to say) after every step and choice.

        Pictures are None until done. Candidates are those of the last choice, (predicted picture, caption) each.

        Raises:
            ValueError: an empty prompt or length, text that is none, or a number that cannot be.
        """
        check_request(prompt, phrase, seed, norm, candidates, choose_at)
        images, points, gallery, note = {}, [], [], grammar_note(self.sd.name, [prompt])
        num_steps, fractions = self.sampling.num_inference_steps, (choose_at,) if candidates > 1 else None
        corrected = self.sampling.changed(
            correction_norm=norm, correction_target=target, candidates=candidates, choose_at=fractions
        )
        choice, kept, start = "", int(seed), None
        for arm in ("plain", "corrected"):
            sampling = corrected.without_correction() if arm == "plain" else corrected
            if start is not None:  # what is corrected is the picture that was kept
                sampling = sampling.changed(candidates=1, choose_at=(), correction_start=start)
            for value in in_steps(partial(self._draw_one, prompt, kept, sampling)):
                if isinstance(value, dict):
                    points.append((value["step"], max(value["score"]), arm))  # of candidates the leading one
                    say = f"{arm}: step {value['step'] + 1} of {num_steps}"
                elif isinstance(value, tuple):
                    step, found = value
                    gallery = [captioned(candidate) for candidate in found]
                    chosen = next(candidate["seed"] for candidate in found if candidate["kept"])
                    choice = f"; {candidates} candidates, kept seed {chosen} after step {step} of {num_steps}"
                else:
                    (drawing,) = value
                    if candidates > 1 and not corrected.correct_candidates:
                        kept, start = drawing.seed, drawing.corrected_from
                    images[arm] = drawing.image
                    points = [point for point in points if point[2] != arm]
                    points += [(record["step"], record["score"], arm) for record in drawing.trace]
                    say = f"{arm}: done" + f" ({note})" * bool(note and arm == "corrected")
                yield images.get("plain"), images.get("corrected"), list(points), gallery, say + choice
        if (phrase or "").strip():
            say = f"boxes for {phrase.strip()!r} and how sure they are (1: certain)"
            for arm, image in images.items():
                found = list(zip(self.artist.find(image, phrase), COLORS, strict=False))
                say += f"; {arm}: " + ", ".join(f"{color} {sureness:.2f}" for (sureness, _), color in found)
                images[arm] = with_boxes(image, [(box, color) for (_, box), color in found][::-1])  # the surest on top
            yield images["plain"], images["corrected"], list(points), gallery, say + choice

    def _draw_one(self, prompt, seed, sampling, report):
        tell = {"on_step": lambda step, record: report(record), "on_choice": lambda *choice: report(choice)}
        return self.artist.draw([prompt], [seed], sampling, trace=True, **tell)


def check_request(
    prompt: str | None,
    phrase: str | None,
    seed: float | None,
    norm: float | None,
    candidates: float | None,
    choose_at: float | None,
) -> None:
    """Raises ValueError where a field of the page is empty or out of bounds."""
    for name, text in {"the prompt": prompt, "the phrase": phrase}.items():
        check_text(name, text or "")
    if not (prompt or "").strip():
        raise ValueError("the prompt is empty; say what to draw")
    if seed is None or not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"the seed is {seed}; it must be a number from 0 to 2**62")
    if norm is None:
        raise ValueError("the correction's length is empty; give a number")
    if candidates is None or not 1 <= candidates <= MOST_CANDIDATES:
        raise ValueError(f"candidates is {candidates}; it must be a number from 1 to {MOST_CANDIDATES}")
    if choose_at is None or not 0 < choose_at <= 1:
        raise ValueError(f"choose at is {choose_at}; it must be a fraction of the steps, above 0 and at most 1")


def captioned(candidate: dict) -> tuple[np.ndarray, str]:
    """A candidate's picture and caption; a frame marks those that are kept."""
    caption = f"seed {candidate['seed']}: {candidate['score']:.3f}"
    if not candidate["kept"]:
        return candidate["image"], caption
    return with_boxes(candidate["image"], FRAME), f"{caption}, kept"


def open_studio(
    model: str,
    *,
    dpt: Path | None = None,
    scale: float | None = None,
    steps: int | None = None,
    device: str | None = None,
    local_files_only: bool = False,
) -> Studio:
    """Loads a model with its adapter; None stands for the model's own choice.

    Raises:
        ValueError: something that cannot be used; it is named.
    """
    weights = dpt or DPT_WEIGHTS.get(known_name(model))
    if weights is None:
        raise ValueError(f"--model is {model!r}, of which no adapter is known; pass --dpt PATH, or --model shapes")
    if not weights.exists() and not is_hub_id(weights):
        raise ValueError(f"self-correction needs an adapter: {weights} is not there; pass --dpt PATH")
    place = usable_device(device)
    dtype = DTYPES[default_dtype(model, place.type)]
    artist = Artist.load(model, weights, dtype=dtype, device=place, local_files_only=local_files_only)
    return Studio(artist, artist.sampling.changed(guidance_scale=scale, num_inference_steps=steps))
