"""The angle between what an optimizer does to Θ and what back-propagation would do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from admm.blocks import Parameters, flattened
from admm.checks import shown
from admm.numbers import is_whole
from admm.optimizers.backprop import mean_loss_gradient
from admm.optimizers.protocol import Problem


def check_angle_samples(samples: object, n_samples: int) -> None:
    """Raise ValueError unless `samples` is None or a number of training samples, of which there are `n_samples`."""
    if samples is not None and (not is_whole(samples, 1) or samples > n_samples):
        found = shown(samples)
        raise ValueError(f"angle_samples: {found} is neither None nor from 1 to the {n_samples} training samples")


def cosines(
    problem: Problem, seeds: Sequence[int], before: Parameters, after: Parameters, samples: int
) -> dict[str, Tensor]:
    """Return `cosine_t` [S] of each block t with trained parameters: the cosine of the angle between −ΔΘ_t and g_t.

    ΔΘ_t is the update of the block's parameters, all that happens to them from `before` to `after`: of a mini-batch
    method the sum of an epoch's steps, or of a part of one with `epoch_parts`, with what the update rule makes of the
    gradients (Adam's scaling, momentum, weight decay). g_t is the gradient of the mean loss at `before`, by
    back-propagation through the whole network, of a fixed batch of samples from evenly spaced places. The cosine is 1
    for a step of gradient descent on that batch. It is far below 1 for many steps along a curved path, too, so that
    methods are compared with one another, and with back-propagation of the same mini-batches, rather than with 1.

    The batch is evaluated in training mode, as in training: batch normalisation takes the statistics of the batch, and
    dropout draws the same numbers each time. A parameter that several blocks share counts in the first of them, with
    its whole gradient. Frozen parameters do not count. The cosine is NaN where the update or the gradient is zero.

    Args:
        problem: what is trained on.
        seeds: one whole number per replica.
        before: Θ before the update; its running statistics are overwritten.
        after: Θ after the update, which stays as it is.
        samples: the number of samples in the batch.

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> blocks = split(torch.nn.Sequential(torch.nn.Linear(1, 1)), n_blocks=1)
    >>> problem = Problem(x, 3 * x, blocks, SquaredError(), initialiser("uniform", a=0.0, b=0.0))
    >>> before = problem.initial([0])  # weight and bias are 0, their gradient is (−15, −9)
    >>> after = blocks.parameters(torch.tensor([[9.0, -15.0]]))
    >>> cosines(problem, [0], before, after, samples=2)
    {'cosine_1': tensor([0.], dtype=torch.float64)}
    """
    visit = problem.visit(seeds, problem.evenly_spaced(samples, before.replicas))
    gradients = mean_loss_gradient(problem, before, visit)
    numbers, pairs = problem.blocks.numbers_of_parameters(), dict[int, list[tuple[Tensor, Tensor]]]()
    for (name, old), new, gradient in zip(before.stacks.items(), after.stacks.values(), gradients, strict=True):
        pairs.setdefault(numbers[name], []).append((old.double() - new.double(), gradient.double()))
    return {f"cosine_{t}": _cosine(*map(flattened, zip(*pairs[t], strict=True))) for t in sorted(pairs)}


def _cosine(steps: Tensor, gradients: Tensor) -> Tensor:
    """Return the cosine [S] of the angle between the rows of tensors [S, P], however short they are."""
    return torch.cosine_similarity(steps, gradients, dim=1, eps=0.0)
