"""Guidance methods: a file each, with a callable around classifier-free guidance; settings are fields of `Sampling`.

To add one: write its file; add its settings to `dpt.sampling_settings.Sampling`, with what they exclude, and their
flags to `dpt.sampling_flags.FLAGS`; add a line to `guided`. It is then a flag of txt2img.py and a key of arms.
"""

from dpt.guidance.attend_and_excite import AttendAndExcite
from dpt.guidance.self_correction import SelfCorrection
from dpt.sampling import ClassifierFreeGuidance, Guidance
from dpt.sampling_settings import Sampling


def guided(
    guidance: ClassifierFreeGuidance, sampling: Sampling, *, scorer=None, subjects=None, trace: list[dict] | None = None
) -> Guidance:
    """The guidance of the method that the settings ask for, or plain classifier-free guidance.

    Args:
        scorer: reads the matching score, for self-correction.
        subjects: gives positions of the subjects' tokens for each image, for Attend-and-Excite.
        trace: gets a record of every corrected step; see `SelfCorrection`.
    """
    if sampling.corrects:
        return SelfCorrection(guidance, scorer, sampling, trace)
    if sampling.attend_and_excite:
        return AttendAndExcite(guidance, subjects(), sampling)
    return guidance
