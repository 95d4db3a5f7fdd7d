"""Small problems in float64, shared by the tests."""

import gc
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what the tests start, too: they are on all cores already

import pytest
import torch
from torch import Tensor, nn

from admm.augmentation import CropAndFlip
from admm.blocks import split
from admm.layers import Execution
from admm.losses import CrossEntropy, Loss, SquaredError, one_hot
from admm.models import initialiser, mlp, resnet18
from admm.optimizers import Problem

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays, and need not be looked at with each collection of garbage."""
    gc.freeze()


def _labelled(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Gaussian inputs and three classes that a network can learn."""
    x = torch.randn(samples, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, one_hot(x.flatten(1)[:, :3].argmax(1), 3, x)


def _residual(width: int) -> nn.Sequential:
    """A ResNet-18 without the layers whose like is left: three stages, each of one block."""
    whole = dict(resnet18((1, 8, 8), 3, width).named_children())
    stages = {f"conv{number}_x": nn.Sequential(whole[f"conv{number}_x"][0]) for number in (2, 3, 4)}
    ends = {"pool": whole["pool"], "flatten": whole["flatten"], "fc": nn.Linear(4 * width, 3)}
    return nn.Sequential(OrderedDict({"conv1": whole["conv1"]} | stages | ends))


def _convolutional() -> nn.Sequential:
    first = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh())
    second = nn.Sequential(nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(first, second)


@pytest.fixture(autouse=True)
def denormals_are_kept() -> Iterator[None]:
    """A test leaves the processor as it found it; Hypothesis, for one, refuses to draw floats from one that flushes."""
    yield
    assert sys.float_info.min / 2 > 0, "set_flush_denormal(True) has outlived the test"


@pytest.fixture(scope="session")
def mlp_problem() -> Callable[..., Problem]:
    """A 6-5-4-3 network with 24 samples; the keywords are those of `split`, and the loss."""

    def make(loss: Loss | None = None, **cut: Any) -> Problem:
        x, y = _labelled(24, 6)
        blocks = split(mlp(6, [5, 4], 3), **(cut or {"per_layer": True}))
        return Problem(x, y, blocks, loss or SquaredError(), initialiser("pytorch"))

    return make


@pytest.fixture(scope="session")
def resnet_problem() -> Callable[..., Problem]:
    """A small ResNet with `width` to 4 `width` channels, cut after conv3_x or as the keywords say, and 12 samples
    [1, 8, 8]."""

    def make(loss: Loss | None = None, execution: Execution | None = None, width: int = 2, **cut: Any) -> Problem:
        x, y = _labelled(12, 1, 8, 8)
        blocks = split(_residual(width), **(cut or {"after": "conv3_x"}), execution=execution)
        return Problem(x, y, blocks, loss or CrossEntropy(), initialiser("kaiming_normal"))

    return make


@pytest.fixture(scope="session")
def augmented_problem(resnet_problem: Callable[..., Problem]) -> Callable[..., Problem]:
    """The same with random crops and flips."""
    return lambda loss=None: replace(resnet_problem(loss), augmentation=CropAndFlip(1))


@pytest.fixture(scope="session")
def conv_problem() -> Callable[..., Problem]:
    """Two blocks with images [2, 2, 2] between them, and 10 samples."""

    def make(loss: Loss | None = None) -> Problem:
        x, y = _labelled(10, 1, 4, 4)
        blocks = split(_convolutional(), after=["0"])
        return Problem(x, y, blocks, loss or SquaredError(), initialiser("pytorch"))

    return make
