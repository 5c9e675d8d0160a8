"""`Sampling`: everything that a picture depends on but its prompt, its seed and the weights.

The fields are the keys of an arm and, as flags, those of txt2img.py; `SelfCorrectionPipeline` takes those of correcting
and choosing beside `StableDiffusionPipeline`'s own arguments. Each default and each bound stands here once. Weights and
base models recommend values of their own: see `dpt.base_models.recommended`.
"""

from dataclasses import dataclass, fields, replace

from dpt.bounds import bounded, check_bounds, one_of
from dpt.choosing_rules import rounds

SEED_LIMIT = 2**62  # seeds of noise are below it
CORRECTION_TARGETS = ("conditional", "latent", "noise")


@dataclass(frozen=True)
class Sampling:
    """The settings that pictures are drawn with; the defaults are the paper's sampling without self-correction."""

    guidance_scale: float = bounded(7.5, at_least=0, below=1000)
    """of classifier-free guidance; up to 1 the negative prompt is not evaluated"""
    guidance_rescale: float = bounded(0.0, at_least=0, at_most=1)
    """share of the guided prediction that gets the conditional one's deviation (Lin et al. 2024, section 3.4)"""
    distilled_guidance: float | None = bounded(None, at_least=0, below=1000)
    """the guidance scale that models which were distilled from guided ones take as an input (FLUX.1-dev; by default
    3.5)"""
    num_inference_steps: int = bounded(50, at_least=1, at_most=500)
    scheduler: str = one_of("ddim", "ddim", "euler", "dpm++")
    """of the noise levels and the steps between them"""
    height: int | None = bounded(None, at_least=1, at_most=8192)
    width: int | None = bounded(None, at_least=1, at_most=8192)
    """in pixels; by default the model's own"""
    negative_prompt: str = ""

    correction_factor: float = bounded(0.0, at_least=0, at_most=1e6)
    """the paper's eta: self-correction's step is the factor times the gradient of the matching score"""
    correction_norm: float | None = bounded(None, at_least=0, at_most=1e3)
    """instead: the length of the step, as a share of the latent's norm"""
    correction_target: str = one_of("conditional", *CORRECTION_TARGETS)
    """what the step moves. conditional: the input of guidance's conditional half alone, as in the reference. latent:
    the latent that everything goes on from, as in the paper's figure. noise: the noise prediction, as in classifier
    guidance"""
    correction_start: float = bounded(0.0, at_least=0, at_most=1)
    correction_stop: float = bounded(1.0, at_least=0, at_most=1)
    """the corrected steps, as fractions of all: start <= step / steps < stop"""
    on_nan: str = one_of("raise", "raise", "skip")
    """a score that is not finite: stop, or leave that step of that picture uncorrected"""

    candidates: int = bounded(1, at_least=1, at_most=1024)
    """noises that a picture is chosen from by the matching score"""
    choose_at: tuple[float, ...] = ()
    """when, as fractions of the steps. Several fractions narrow the candidates down in equal proportions"""

    correct_candidates: bool = False
    """correct candidates too; by default only what has been chosen is corrected, so that scores are read before any
    correction has followed them"""

    attend_and_excite: bool = False
    """Attend-and-Excite (Chefer et al. 2023) in place of self-correction"""
    attention_resolution: int | None = bounded(None, at_least=1, at_most=256)
    """side of the attention maps that it reads; by default a quarter of the latent's"""
    attention_step: float | None = bounded(None, above=0, at_most=1e6)
    """how far it moves the latent; by default 20, its authors' value for Stable Diffusion"""

    parity: bool = False
    """end the sampling as the reference does: its last step runs off the schedule and is discarded"""

    def __post_init__(self):
        if not isinstance(self.choose_at, list | tuple):
            raise ValueError(f"choose_at is {self.choose_at!r}; it must be a list of fractions, such as [0.25]")
        object.__setattr__(self, "choose_at", tuple(self.choose_at))  # YAML gives lists
        check_bounds(self)
        if self.correction_start > self.correction_stop:
            raise ValueError(
                f"correction_start and correction_stop are {self.correction_start} and {self.correction_stop}; "
                "they need start <= stop"
            )
        self._check_choosing()
        if self.attend_and_excite and self.corrects:
            raise ValueError("attend_and_excite and self-correction exclude each other: set one of them")
        if self.attend_and_excite and (self.correction_start, self.correction_stop) != (0, 1):
            raise ValueError(
                "correction_start or correction_stop is set; Attend-and-Excite has steps of its own: leave them out"
            )
        for name in ("attention_resolution", "attention_step"):
            if getattr(self, name) is not None and not self.attend_and_excite:
                raise ValueError(f"{name} is set; it is for attend_and_excite, which is off")
        if self.parity:
            reference = Sampling(correction_factor=self.correction_factor)
            allowed = (
                "guidance_scale",
                "num_inference_steps",
                "height",
                "width",
                "negative_prompt",
                "on_nan",
                "parity",
            )
            for entry in fields(Sampling):
                if entry.name not in allowed and getattr(self, entry.name) != getattr(reference, entry.name):
                    raise ValueError(
                        f"parity is the reference's sampling, which has no {entry.name} (it is "
                        f"{getattr(self, entry.name)}): leave it out"
                    )

    def _check_choosing(self) -> None:
        points = self.choose_at
        if self.correct_candidates and not (self.corrects and self.candidates > 1):
            raise ValueError("correct_candidates is set; it needs candidates and a correction")
        if self.candidates > 1 and self.parity:
            raise ValueError("parity is set; the reference chooses nothing: leave candidates out")
        if self.candidates == 1 and points:
            raise ValueError(f"choose_at is {list(points)} and candidates is 1; choosing needs at least 2 candidates")
        if self.candidates > 1 and not points:
            raise ValueError(f"candidates is {self.candidates}; choose_at says when to choose, such as 0.25")
        if any(not 0 < point <= 1 for point in points) or sorted(set(points)) != list(points):
            raise ValueError(f"choose_at is {list(points)}; it must hold growing fractions above 0 and at most 1")
        if not points:
            return
        chosen_at = rounds(self.num_inference_steps, self.candidates, points)[len(points) - 1].stop
        left = [
            self.is_corrected(step, self.num_inference_steps) for step in range(chosen_at, self.num_inference_steps)
        ]
        if self.corrects and not self.correct_candidates and not any(left):
            raise ValueError(
                f"choose_at is {list(points)} and no step behind it is corrected (correction_start "
                f"{self.correction_start:g}, correction_stop {self.correction_stop:g}): set correct_candidates, choose "
                "earlier, or leave the correction out"
            )

    def without_correction(self) -> "Sampling":
        """The same settings without self-correction."""
        return replace(self, correction_factor=0.0, correction_norm=None, correct_candidates=False)

    def is_corrected(self, step: int, num_steps: int) -> bool:
        """Whether a step of so many is corrected."""
        return self.corrects and self.correction_start <= step / num_steps < self.correction_stop

    @property
    def corrects(self) -> bool:
        """Whether any step is corrected."""
        length = self.correction_factor if self.correction_norm is None else self.correction_norm
        return length != 0 and self.correction_start < self.correction_stop

    @property
    def needs_adapter(self) -> bool:
        """Whether the matching score is read."""
        return self.corrects or self.candidates > 1

    def changed(self, **given) -> "Sampling":
        """These settings with some of them given anew; None stands for a setting that is not given.

        A new value also removes the recommended ones it excludes: a `correction_factor` removes `correction_norm`, and
        the target that was chosen for it; `parity` removes everything that the reference does not have.
        """
        given = {name: value for name, value in given.items() if value is not None}
        new = values(self)
        if {"correction_factor", "correction_norm"} <= given.keys():
            raise ValueError("correction_factor and correction_norm exclude each other: pass one of them")
        if given.get("parity"):
            kept = ("guidance_scale", "num_inference_steps", "height", "width")
            new = values(Sampling()) | {name: new[name] for name in kept}
            new["correction_factor"] = PAPER.correction_factor if self.needs_adapter else 0.0
        elif "correction_factor" in given and "correction_norm" not in given:
            new |= {"correction_norm": None, "correction_target": Sampling.correction_target}
        if given.get("attend_and_excite"):
            new |= {"correction_factor": 0.0, "correction_norm": None, "correction_target": Sampling.correction_target}
            new |= {"correction_start": 0.0, "correction_stop": 1.0}
        if given.get("candidates") == 1:
            new["choose_at"] = ()
        elif "candidates" in given and not new["choose_at"]:
            new["choose_at"] = DEFAULT_CHOOSE_AT
        new |= given
        length = new["correction_factor"] if new["correction_norm"] is None else new["correction_norm"]
        if "correct_candidates" not in given and (new["candidates"] == 1 or not length):
            new["correct_candidates"] = False
        return Sampling(**new)


def values(sampling: Sampling) -> dict:
    """The settings by name, those that stand at their default too."""
    return {entry.name: getattr(sampling, entry.name) for entry in fields(Sampling)}


DEFAULT_CHOOSE_AT = (0.25,)
PAPER = Sampling(correction_factor=0.5)
"""the paper's sampling with self-correction"""
