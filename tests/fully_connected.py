"""Problems and starting variables for the tests of algorithms on fully connected networks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from admm.blocks import split
from admm.losses import Loss, SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import Problem

SEEDS = (5, 0, 11)
SAMPLES, INPUTS, CLASSES = 60, 6, 3
depths = pytest.mark.parametrize("hidden", [[5], [5, 4], [4, 7, 5]], ids=["two", "three", "four layers"])


def make(hidden: list[int], loss: Any = None, dtype: torch.dtype = torch.float64) -> Problem:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 2, INPUTS // 2, dtype=torch.float64, generator=random).to(dtype)
    y = one_hot(x.flatten(1)[:, :CLASSES].argmax(1), CLASSES, x)
    blocks = split(mlp(INPUTS, hidden, CLASSES), per_layer=True)
    return Problem(x, y, blocks, loss or SquaredError(0.7), initialiser("pytorch"))


def gaussian(hidden: list[int], replicas: int, names: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Starting variables, float64."""
    random, widths = np.random.default_rng(1), [*hidden, CLASSES]
    samples, hidden_samples = [(SAMPLES, d) for d in widths], [(SAMPLES, d) for d in hidden]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "weight": list(zip(widths, [INPUTS, *widths], strict=False)),
        "bias": [(d,) for d in widths],
        "z": samples,
        "u": samples,
        "a": hidden_samples,
        "v": hidden_samples,
        "multiplier": samples[-1:],
    }
    return {name: [torch.tensor(random.normal(size=(replicas, *shape))) for shape in shapes[name]] for name in names}


def converted(variables: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    return {name: [t.to(dtype) for t in tensors] for name, tensors in variables.items()}


def assert_close(ours: dict[str, list[Tensor]], s: int, expected: dict[str, list[Any]], tolerance: float) -> None:
    """Relative to each variable's largest entry."""
    for name, tensors in expected.items():
        for mine, theirs in zip(ours[name], tensors, strict=True):
            difference = np.abs(mine[s].numpy() - np.asarray(theirs)).max()
            assert difference <= tolerance * np.abs(np.asarray(theirs)).max(), name


def trained(optimizer: Any, problem: Problem, seeds: tuple[int, ...], steps: int = 4) -> Any:
    state = optimizer.init(problem, seeds)
    for _ in range(steps):
        optimizer.step(problem, state)
    return state


class NoProx(Loss):
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().sum(-1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).sign()
