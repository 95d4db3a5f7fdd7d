"""Checks that a problem has what an algorithm needs; each raises ValueError that says what is missing."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from admm.checks import at_least_one, check_batch_size, has_type
from admm.comparison import evaluate_one
from admm.losses import Loss, ProximalLoss
from admm.optimizers.protocol import Problem
from admm.optimizers.rules import UpdateRule
from admm.random_numbers import random_numbers_kept
from admm.user_warnings import warn

_UPDATES = 20  # that a rule is tried for: one may wait for several gradients


def check_prox(loss: Loss, algorithm: str) -> ProximalLoss:
    """Return the loss, for `algorithm`. Raises ValueError if it has no proximal operator."""
    if not isinstance(loss, ProximalLoss):
        raise ValueError(
            f"loss: {type(loss).__name__} has no prox; {algorithm} needs an admm.losses.ProximalLoss, such as "
            "SquaredError or CrossEntropy, or ProximalFunctionLoss of a plain function"
        )
    return loss


def check_minibatch_options(
    problem: Problem,
    seeds: Sequence[int],
    iterations: int,
    theta_update: UpdateRule,
    batch_size: int,
    epoch_parts: int | None = None,
) -> None:
    """Raise ValueError for an option of a mini-batch method that is out of range, an update rule that is none, and for
    several seeds, each with its own mini-batches, whose samples are shared out."""
    if problem.parallel.shares("samples") and len(set(seeds)) > 1:
        raise ValueError(
            f"seeds: {list(seeds)}, but with parallel='samples' a mini-batch method trains one seed at a time, since "
            "each seed has other mini-batches; start a run per seed"
        )
    at_least_one("iterations", iterations)
    has_type("theta_update", theta_update, UpdateRule, "admm.optimizers.Adam()")
    _warn_of_no_change("theta_update", theta_update)
    check_batch_size(batch_size, problem.n_samples, epoch_parts)
    check_last_part(problem, "batch_size", batch_size)


def _warn_of_no_change(name: str, rule: UpdateRule) -> None:
    """Warn of a rule that in some updates of one number leaves it, or all of its moments, as they are."""
    theta, gradient = [torch.ones(1, 1)], [torch.ones(1, 1)]
    try:
        with random_numbers_kept():
            moments = rule.init(theta)
            kept = {"parameters": theta, "moments": [v for v in tree_leaves(moments) if isinstance(v, Tensor)]}
            before = copy.deepcopy(kept)
            for _ in range(_UPDATES):
                rule.apply(theta, gradient, moments, 1.0)
    except Exception:  # whatever a rule raises that is for the parameters of one network
        return
    for what, tensors in kept.items():
        if tensors and all(map(torch.equal, tensors, before[what])):
            warn(
                f"{name}: the `apply` of {type(rule).__name__} leaves the {what} as they are; it must change them in "
                "place, as `p.sub_(…)` does, where `p = p - …` makes a new tensor"
            )


def check_last_part(problem: Problem, name: str, size: int) -> None:
    """Raise ValueError where parts of `size` samples leave a single one, on which the network cannot be trained.

    Networks that normalise over the samples cannot. `name` is the argument that has the size.
    """
    if size == 1 or problem.n_samples % size == 1:
        try:
            evaluate_one(problem.blocks, problem.data.examples[0])
        except ValueError as error:
            raise ValueError(
                f"{name}: {size} leaves one of the {problem.n_samples} samples alone, and {error}; take another {name}"
            ) from error


def same_samples(problem: Problem, variables: Tensor) -> None:
    """Raise ValueError unless variables [S, N, ...] of a state are of as many samples as the problem has."""
    if variables.shape[1] != problem.n_held:
        raise ValueError(
            f"problem: {problem.n_held} samples, but the state has variables of {variables.shape[1]}; a step takes "
            "the problem that the state was made for"
        )
