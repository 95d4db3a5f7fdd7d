"""Parts of the samples: mini-batches without replacement, shuffled by each replica once an epoch, and slices."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from admm.numbers import is_whole, plain


def stateless_rng(seed: int, stream: str, counter: int = 0) -> torch.Generator:
    """Random numbers that depend on (seed, stream, counter) alone, so that no generator state is carried along:
    a replica draws the same in any stack, and after a resume."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), counter))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def minibatches(
    samples: int,
    batch_size: int,
    seeds: Sequence[int],
    iteration: int,
    device: torch.device,
    parts: int | None = None,
    groups: Tensor | None = None,
    together: int = 1,
) -> list[Tensor]:
    """Indices [S, B] of an iteration's mini-batches. In an epoch each replica sees every sample once; the last batch
    may be smaller. An iteration is an epoch, or one of its `parts`. With `groups` [N], a group's samples
    come in runs of `together`.

    Raises ValueError unless 1 <= batch_size <= samples.
    """
    check_batch_size(batch_size, samples, parts)
    batch_size, parts = plain(batch_size), plain(parts)
    epoch, part = divmod(iteration, parts or 1)
    orders = {}
    for seed in dict.fromkeys(seeds):
        random = stateless_rng(seed, "minibatches", epoch)
        order = torch.randperm(samples, generator=random)
        orders[seed] = order if groups is None else _in_runs(order, groups.cpu(), together, random)
    batches = torch.stack([orders[seed] for seed in seeds]).to(device).split(batch_size, dim=1)
    begin, end = (number * len(batches) // (parts or 1) for number in (part, part + 1))
    return list(batches[begin:end])


def check_batch_size(batch_size: int, samples: int, parts: int | None = None) -> None:
    """Raises ValueError unless 1 <= batch_size <= samples, with a mini-batch at least for each of an epoch's parts."""
    if not is_whole(batch_size, 1) or batch_size > samples:
        raise ValueError(f"optimizer.batch_size: {batch_size!r} is not between 1 and the {samples} training samples")
    batches = math.ceil(samples / batch_size)
    if parts is not None and (not is_whole(parts, 1) or parts > batches):
        raise ValueError(f"optimizer.epoch_parts: {parts!r} is not null or between 1 and an epoch's {batches} batches")


def rows(data: Tensor, indices: Tensor) -> Tensor:
    """Samples of shared data [N, ...] for each replica's indices [S, B]: [S, B, ...]."""
    return data.index_select(0, indices.flatten()).view(*indices.shape, *data.shape[1:])


def slices(samples: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` samples."""
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def gather_per_replica(variables: Tensor, own: Tensor) -> Tensor:
    """Of each replica's own variables [S, N, ...] its samples, given by `flat_indices` [S, B]: [S, B, ...] on the
    device of these."""
    found = variables.flatten(0, 1).index_select(0, own.flatten().to(variables.device))
    return found.view(*own.shape, *variables.shape[2:]).to(own.device)


def scatter_per_replica(variables: Tensor, own: Tensor, values: Tensor) -> None:
    """Overwrites what `gather_per_replica` returns, in place, by `values` [S, B, ...]."""
    variables.view(-1, *variables.shape[2:]).index_copy_(
        0, own.flatten().to(variables.device), values.flatten(0, 1).to(variables.device)
    )


def flat_indices(batch: Tensor, samples: int) -> Tensor:
    """Where a mini-batch [S, B] of N samples is among the rows of variables [S·N, ...], [S, B]."""
    return batch + torch.arange(0, len(batch) * samples, samples, device=batch.device)[:, None]


def _in_runs(order: Tensor, groups: Tensor, together: int, random: torch.Generator) -> Tensor:
    """A random order in which each group's samples, themselves in `order`, come in runs of `together`."""
    by_group = order[groups[order].argsort(stable=True)]
    _, sizes = groups[by_group].unique_consecutive(return_counts=True)
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # within its group
    starts = place % together == 0
    run = starts.cumsum(0) - 1
    keys = torch.randperm(int(starts.sum()), generator=random)
    return by_group[keys[run].argsort(stable=True)]
