"""The order of samples: a function of seed and step alone, for any number of processes and after any resumption."""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dpt.data.collate import Batch, collate


def step_indices(step: int, *, count: int, num_samples: int, seed: int) -> list[tuple[int, int]]:
    """The (sample, epoch) pairs of one update: they run through permutations of the samples, one an epoch."""
    pairs = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, num_samples)
        pairs.append((int(_permutation(num_samples, seed, epoch)[offset]), epoch))
    return pairs


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class Reader(Dataset):
    """Samples with their epoch, by (index, epoch)."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, pair: tuple[int, int]):
        return self.samples.get(*pair), pair[1]


def _collate(pairs: list) -> Batch:
    samples, epochs = zip(*pairs, strict=True)
    return collate(list(samples), list(epochs))


def micro_batches(
    samples,
    step: int,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    collate_fn: Callable = _collate,
) -> Iterator:
    """One process's batches from a step on, `accumulation` of them a step, without end.

    Args:
        samples: gives `get(index, epoch)`.
        collate_fn: makes a batch of (sample, epoch) pairs.
        num_workers: processes that read ahead; they change nothing but the speed.
    """

    def order():
        for k in itertools.count(step):
            pairs = step_indices(k, count=batch_size * accumulation * world, num_samples=len(samples), seed=seed)
            micro = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
            yield from micro[rank::world]

    return iter(DataLoader(Reader(samples), batch_sampler=order(), collate_fn=collate_fn, num_workers=num_workers))
