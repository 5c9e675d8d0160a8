"""Mirroring a sample: the image, its boxes, and the words that name a side."""

import re

_SIDE = re.compile(r"\b(left|right)(?=(?:most|ward|wards|hand|side)?\b)", re.IGNORECASE)
_UNSURE = re.compile(
    r"\bright\s+(?:above|after|at|before|behind|below|beneath|beside|by|here|in|near|next|now|on\s+top|over|there|under)\b"
    r"|\bleft\s+(?:alone|behind|over)\b|clockwise|o'?clock|\b(?:lft|rt|rgt|rite)\b",
    re.IGNORECASE,
)


def can_mirror(text: str) -> bool:
    """Whether a text with "left" and "right" swapped is true of the mirrored image ("right behind" names no side)."""
    return not _UNSURE.search(text)


def mirror_text(text: str, spans: list[tuple[int, int]] = ()) -> tuple[str, list[tuple[int, int]]]:
    """The text with "left" and "right" swapped, case kept, and its [begin, end) character spans moved along."""
    shifts, parts, last = [], [], 0
    for match in _SIDE.finditer(text):
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        other = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
        parts += [text[last : match.start()], other]
        shifts.append((match.end(), len(other) - len(word)))
        last = match.end()

    def moved(position):
        return position + sum(shift for end, shift in shifts if end <= position)

    return "".join([*parts, text[last:]]), [(moved(begin), moved(end)) for begin, end in spans]
