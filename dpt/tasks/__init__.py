"""The tasks that a run trains on, one a file: its head, loss, target and metric.

`itm` and `rec` (Qu et al. 2024, section 3.2) read the adapter's queries after passes of the denoiser. `denoising`
keeps a tuned denoiser a generator. `ranking` orders half-drawn pictures of one prompt; `reward` tunes by their score.
Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpt.bounds import bounded

if TYPE_CHECKING:
    from dpt.config import AdapterSettings, LossSettings
    from dpt.tasks.task import Task


@dataclass
class LossWeights:
    """Factor of each named loss; a task whose factors are all 0 is not computed."""

    itm_i2t: float = bounded(1.0, at_least=0)
    itm_t2i: float = bounded(1.0, at_least=0)
    ce: float = bounded(1.0, at_least=0)
    bbox: float = bounded(5.0, at_least=0)
    giou: float = bounded(2.0, at_least=0)
    contrastive_align: float = bounded(1.0, at_least=0)
    denoise: float = bounded(1.0, at_least=0)
    rank: float = bounded(1.0, at_least=0)
    reward: float = bounded(0.0, at_least=0)

    def total(self, losses: dict):
        """The weighted sum of `loss_*` values."""
        return sum(getattr(self, name.removeprefix("loss_")) * value for name, value in losses.items())

    @property
    def itm(self) -> bool:
        return bool(self.itm_i2t or self.itm_t2i)

    @property
    def rec(self) -> bool:
        return bool(self.ce or self.bbox or self.giou or self.contrastive_align)


def all_tasks(loss: LossSettings | None = None, *, itm_layer: int = -1) -> tuple[Task, ...]:
    """Every task that reads the adapter's queries. A new head is added here.

    Args:
        loss: the settings of the losses; by default the paper's.
        itm_layer: the decoder layer that ITM reads; the reference reads the first (0).
    """
    from dpt.tasks.itm import ImageTextMatching
    from dpt.tasks.rec import ReferringExpressions

    return ImageTextMatching(itm_layer), ReferringExpressions(loss)


def tasks_of(config: AdapterSettings, loss: LossSettings | None = None, *, itm_layer: int = -1) -> tuple[Task, ...]:
    """The tasks that an adapter has heads for.

    Raises:
        ValueError: a head of that name is unknown.
    """
    known = {task.name: task for task in all_tasks(loss, itm_layer=itm_layer)}
    for name in config.heads:
        if name not in known:
            raise ValueError(f"adapter.heads is {config.heads}; it may name some of {', '.join(known)}")
    return tuple(task for name, task in known.items() if name in config.heads)
