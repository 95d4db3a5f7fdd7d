"""Mini-batches without replacement, shuffled once per epoch and replica, and slices of the samples."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from admm.checks import check_batch_size
from admm.numbers import plain


def stateless_rng(seed: int, stream: str, counter: int = 0) -> torch.Generator:
    """Return a generator of random numbers that depend on (seed, stream, counter) alone.

    No generator has to be stored, so that a replica draws the same numbers in any stack, and after a resume.
    """
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
    group_size: int = 1,
) -> list[Tensor]:
    """Return the indices [S, B] of each mini-batch of an iteration, which is an epoch or a part of one.

    In an epoch each replica sees every sample once, in the order of its seed; the last mini-batch may be smaller.

    Args:
        samples: N.
        batch_size: B.
        seeds: one per replica; replicas of one seed share their mini-batches.
        iteration: counted from 0.
        device: where the indices are.
        parts: how many iterations an epoch has; None means one.
        groups: a number [N] per sample, the group that it belongs to.
        group_size: with `groups`, how many samples of a group follow one another.

    Raises:
        ValueError: unless 1 <= batch_size <= samples, and 1 <= parts <= the number of an epoch's mini-batches.
    """
    check_batch_size(batch_size, samples, parts)
    batch_size, parts = plain(batch_size), plain(parts)
    epoch, part = divmod(iteration, parts or 1)
    orders = {}
    for seed in dict.fromkeys(seeds):
        rng = stateless_rng(seed, "minibatches", epoch)
        order = torch.randperm(samples, generator=rng)
        orders[seed] = order if groups is None else _in_runs(order, groups.cpu(), group_size, rng)
    batches = torch.stack([orders[seed] for seed in seeds]).to(device).split(batch_size, dim=1)
    begin, end = (number * len(batches) // (parts or 1) for number in (part, part + 1))
    return list(batches[begin:end])


def gather_shared(data: Tensor, indices: Tensor) -> Tensor:
    """Return the samples [S, B, ...] of data [N, ...], which all replicas share, at each replica's indices [S, B]."""
    return data.index_select(0, indices.flatten()).view(*indices.shape, *data.shape[1:])


def expand(tree: Any, replicas: int) -> Any:
    """Return views [S, n, ...] of the tensors [n, ...] of a nested structure, the same for all replicas."""
    return tree_map(lambda leaf: leaf.expand(replicas, *leaf.shape), tree)


def slices(samples: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` samples."""
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def gather_per_replica(variables: Tensor, indices: Tensor) -> Tensor:
    """Return the samples [S, B, ...] of variables [S, N, ...] at `flat_indices` [S, B], on the indices' device."""
    values = variables.flatten(0, 1).index_select(0, indices.flatten().to(variables.device))
    return values.view(*indices.shape, *variables.shape[2:]).to(indices.device)


def scatter_per_replica(variables: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite, in place, the samples that `gather_per_replica` returns by `values` [S, B, ...]."""
    variables.view(-1 if variables.numel() else 0, *variables.shape[2:]).index_copy_(
        0, indices.flatten().to(variables.device), values.flatten(0, 1).to(variables.device)
    )


def flat_indices(batch: Tensor, samples: int) -> Tensor:
    """Return the places [S, B], in variables [S·N, ...] of N samples, of a mini-batch [S, B]."""
    return batch + torch.arange(0, len(batch) * samples, samples, device=batch.device)[:, None]


def _in_runs(order: Tensor, groups: Tensor, group_size: int, rng: torch.Generator) -> Tensor:
    """Return a random order in which each group's samples, themselves in `order`, come in runs of `group_size`."""
    by_group = order[groups[order].argsort(stable=True)]
    _, sizes = groups[by_group].unique_consecutive(return_counts=True)
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # within its group
    starts = place % group_size == 0
    run = starts.cumsum(0) - 1
    keys = torch.randperm(int(starts.sum()), generator=rng)
    return by_group[keys[run].argsort(stable=True)]
