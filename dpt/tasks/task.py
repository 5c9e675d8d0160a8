"""The interface of a task that reads the adapter's queries, and the passes of the denoiser that tasks ask for.

Shapes: B batch, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpt.adapter.adapter import DiscriminativeAdapter
    from dpt.config import AdapterConfig
    from dpt.data.collate import Batch, Sample
    from dpt.rec_text import RecTextEncoder
    from dpt.tasks import LossWeights


class Pass(NamedTuple):
    """An image under a text, through the denoiser up to the probed block."""

    image: int
    """0 the image of the pair, 1 its hard negative, 2 a random one"""
    text: int | None
    """0 the caption of the pair, 1 its hard negative, 2 a random one; None the referring expression"""


TRUE_PAIR, EXPRESSION = Pass(0, 0), Pass(0, None)


class Task:
    """A task that reads the adapter's queries. Loss `loss_x` is multiplied by the setting `loss.weights.x`.

    In all methods `hs` are the queries after each decoder layer, (layers, B, Q, D), by pass.
    """

    name: str
    losses: tuple[str, ...]
    """names of the losses, without `loss_`"""
    passes: tuple[Pass, ...]
    """that the losses compare"""
    measured: tuple[Pass, ...]
    """that the metric compares"""
    figures: tuple[str, ...]
    """the numbers of a record, 0 to 1"""

    def head(self, config: AdapterConfig) -> nn.Module:
        """The task's part of an adapter, which calls it `<name>_head`."""
        raise NotImplementedError

    def is_weighted(self, weights: LossWeights) -> bool:
        """Whether one of its losses counts."""
        return any(getattr(weights, name) for name in self.losses)

    def takes(self, sample: Sample) -> bool:
        """Whether a sample has what the metric needs."""
        return True

    def targets(self, batch: Batch, rec_text: RecTextEncoder, device: torch.device) -> dict:
        """The targets of the losses, to be added to the input of `DPT.forward`."""
        return {}

    def loss(self, adapter: DiscriminativeAdapter, hs: dict[Pass, torch.Tensor], inputs: dict) -> dict:
        """The losses, unweighted: `loss_<name>` of each of `losses`."""
        raise NotImplementedError

    def records(
        self, adapter: DiscriminativeAdapter, hs: dict[Pass, torch.Tensor], inputs: dict, samples: tuple[Sample, ...]
    ) -> list[dict]:
        """One record a sample: its figures, and other facts to keep."""
        raise NotImplementedError


def passes_of(tasks: Iterable[Task]) -> list[Pass]:
    """The passes that the tasks' losses compare, each once, in the order of a batch.

    The expression is first. The true pair is last, where a pass through the whole denoiser can stand in for it.
    """
    passes = {one for task in tasks for one in task.passes}
    return sorted(passes, key=lambda p: (p == TRUE_PAIR, p.text is not None, p.image, p.text or 0))
