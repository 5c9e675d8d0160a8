"""Keeping the best of several noises, on the way or at the end.

The score of a half-drawn picture tells early which noise will draw its prompt right. All candidates take the first
steps; those of the highest score go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are read before anything heavy is imported
    import numpy as np

CANDIDATES_APART = 10**9  # candidate k of a picture is drawn from the noise of its seed + k * CANDIDATES_APART


@dataclass(frozen=True)
class Round:
    """The steps from `first` up to `stop`, after which `keep` candidates of each picture go on."""

    first: int
    stop: int
    keep: int


def stop_of(fraction: float, num_steps: int) -> int:
    """The number of steps that a fraction of them means, at least one."""
    return max(1, round(fraction * num_steps))


def rounds(num_steps: int, candidates: int, choose_at: tuple[float, ...]) -> list[Round]:
    """The rounds of drawing one of `candidates` pictures, the last of which ends at `num_steps` with one kept.

    Of m fractions in `choose_at`, fraction j keeps candidates^(1 - j/m) of the candidates, rounded: eight are narrowed
    to one at once, to 3 and 1, or to 4, 2 and 1 (successive halving).

    Raises:
        ValueError: two fractions that fall on one step.
    """
    stops = [stop_of(fraction, num_steps) for fraction in choose_at]
    if len(set(stops)) < len(stops):
        raise ValueError(
            f"choose_at is {list(choose_at)}; of {num_steps} steps two of these fractions are step {max(stops)}: "
            "name fractions further apart, or fewer"
        )
    kept = [max(1, round(candidates ** (1 - j / len(stops)))) for j in range(1, len(stops) + 1)]
    found = [Round(first, stop, keep) for first, stop, keep in zip([0, *stops], stops, kept, strict=False)]
    return found if stops and stops[-1] == num_steps else [*found, Round(stops[-1] if stops else 0, num_steps, 1)]


def with_numbers(schedule: list[Round], candidates: int) -> list[tuple[Round, int]]:
    """Each round with how many of a picture's candidates go through it."""
    entering = [candidates, *(part.keep for part in schedule)]
    return list(zip(schedule, entering, strict=False))


def candidate_seeds(seed: int, candidates: int) -> list[int]:
    """The seeds of a picture's candidates; the first is the picture's own."""
    return [seed + k * CANDIDATES_APART for k in range(candidates)]


def best(scores: np.ndarray, pictures: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` highest scores of each picture, in their order; of equal scores the first.

    Args:
        scores: (B,); one that is not finite loses against all others.
        pictures: (B,), the picture that each candidate belongs to.
    """
    import numpy as np

    scores = np.where(np.isfinite(scores), scores, -np.inf)
    chosen = []
    for picture in dict.fromkeys(pictures.tolist()):
        own = np.flatnonzero(pictures == picture)
        chosen.append(np.sort(own[np.argsort(-scores[own], kind="stable")[:keep]]))
    return np.concatenate(chosen)
