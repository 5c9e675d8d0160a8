"""The prompts that a base model knows: those of a grammar for the embedded model; of others nothing is known."""

from dpt.base_models import known_name
from dpt.shapes.grammar import parse
from dpt.shapes.scenes import SHAPES


def grammar_note(model: str, prompts: list[str]) -> str | None:
    """A note on the first prompt that the model does not know; None where it knows all, or where nothing is known."""
    if known_name(model) != "shapes":
        return None
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError as error:
            return f"this model only knows shapes, and {error}"
    return None


def is_subject(model: str, word: str) -> bool:
    """Whether a word of a prompt is known to name an object."""
    return known_name(model) == "shapes" and (word.removesuffix("es") in SHAPES or word.removesuffix("s") in SHAPES)
