"""From character spans of an expression to the tokens and class slots that its boxes are matched with."""

import torch
from transformers import BatchEncoding

from dpt.adapter import NUM_TOKEN_SLOTS


def token_mask(encoding: BatchEncoding, index: int, spans: list[tuple[int, int]], length: int) -> torch.Tensor:
    """The tokens that character spans of text `index` cover, (length,) bool.

    A span that begins or ends on a blank is narrowed to the words inside (the reference looks them up in another text
    of the batch then).

    Args:
        encoding: of a fast tokenizer.
        spans: [begin, end) pairs of characters.
        length: of the mask; tokens beyond it are left out.
    """
    mask = torch.zeros(length, dtype=torch.bool)
    for begin, end in spans:
        tokens = [encoding.char_to_token(index, character) for character in range(begin, end)]
        tokens = [token for token in tokens if token is not None and token < length]
        if tokens:
            mask[min(tokens) : max(tokens) + 1] = True
    return mask


def positive_map(masks: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Class targets of boxes, (N, 256), of their token masks (N, L).

    Args:
        normalize: rows sum to one, as MDETR means it; without it they are 0/1, which is what the reference trains on.
    """
    slots = torch.zeros(len(masks), NUM_TOKEN_SLOTS + 1)
    width = min(masks.shape[1], NUM_TOKEN_SLOTS)
    slots[:, :width] = masks[:, :width].float()
    return slots / (slots.sum(1, keepdim=True) + 1e-6) if normalize else slots
