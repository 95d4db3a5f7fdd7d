"""Parts of the samples: mini-batches without replacement, shuffled by each replica once an epoch, and slices."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, stream: str, counter: int = 0) -> torch.Generator:
    """Random numbers that depend on (seed, stream, counter) alone, so that no generator state is carried along:
    a replica draws the same in any stack, and after a resume."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), counter))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def minibatches(samples: int, batch_size: int, seeds: Sequence[int], epoch: int, device: torch.device) -> list[Tensor]:
    """Indices [S, B] of an epoch's mini-batches: every sample once a replica; the last batch may be smaller.

    Raises ValueError unless 1 <= batch_size <= samples.
    """
    check_batch_size(batch_size, samples)
    orders = [torch.randperm(samples, generator=generator(seed, "minibatches", epoch)) for seed in seeds]
    return list(torch.stack(orders).to(device).split(batch_size, dim=1))


def check_batch_size(batch_size: int, samples: int) -> None:
    """Raises ValueError unless 1 <= batch_size <= samples."""
    if not isinstance(batch_size, int) or not 1 <= batch_size <= samples:
        raise ValueError(f"optimizer.batch_size: {batch_size!r} is not between 1 and the {samples} training samples")


def rows(data: Tensor, indices: Tensor) -> Tensor:
    """Samples of shared data [N, ...] for each replica's indices [S, B]: [S, B, ...]."""
    return data.index_select(0, indices.flatten()).view(*indices.shape, *data.shape[1:])


def slices(samples: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` samples."""
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
