"""A visit of some samples: what all evaluations of the blocks on them have in common."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class Visit:
    """Some samples, evaluated together, and what fixes the random numbers of layers such as dropout.

    All evaluations of a block within one visit draw the same random numbers. They follow from the replica's seed, the
    counter and the block, so that another seed or visit has others, and a resumed run the same.

    Args:
        seeds: one per replica; with None a replica draws from PyTorch's global generators as they are.
        counter: whole numbers from 0 up that tell the visits of a run apart, such as the iteration and the number of
            the mini-batch in it.
        training: whether blocks are evaluated in training mode, as `torch.nn.Module.train` has it.
        x: inputs [S, n, ...], or a tuple or a dictionary of such tensors.
        y: targets [S, n, ...].
        count: how many samples are visited together; x has fewer if other processes hold the rest (see
            `admm.parallel.Parallel`). 0 stands for those of x.
        carried: what else than coupling variables has crossed each cut in this visit, by the number of the block before
            it; `admm.crossings` describes it.

    >>> Visit([0, 1], (3,)).draws(0, block=1) == Visit([0, 5], (3,)).draws(0, block=1)
    True
    """

    seeds: Sequence[int | None]
    counter: tuple[int, ...] = ()
    training: bool = True
    x: Any = None
    y: Any = None
    count: int = 0
    carried: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of samples that are visited together."""
        return self.count or tree_leaves(self.x)[0].shape[1]

    def draws(self, replica: int, block: int) -> int | None:
        """Return the seed of the random numbers that a replica of a block draws in this visit."""
        if (seed := self.seeds[replica]) is None:
            return None
        entropy = np.random.SeedSequence((seed, zlib.crc32(b"layers"), block, *self.counter))
        return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluation(replicas: int, x: Any = None) -> Visit:
    """Return a visit in evaluation mode, for S replicas."""
    return Visit([0] * replicas, training=False, x=x)
