"""Update rules for parameters, given their gradient: Adam and SGD on a stack of replicas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from admm.checks import in_range
from admm.numbers import Options
from admm.schedules import broadcast


class UpdateRule(ABC):
    """A first-order method: how parameters follow their gradient. It is immutable; its moments are the caller's."""

    @abstractmethod
    def init(self, theta: Tensor) -> list[Tensor]:
        """Return the moments before the first update of parameters [S, P]; their first axis is S."""

    @abstractmethod
    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        """Update the parameters [S, P] and the moments once, in place.

        Args:
            theta: the parameters.
            gradient: [S, P]; it is left as it is.
            moments: what `init` has returned.
            step: the step size, a float or one value per replica, [S].
        """


@dataclass(frozen=True)
class Adam(Options, UpdateRule):
    """Adam (Kingma & Ba 2015, Algorithm 1) by PyTorch's fused kernel; weight decay is decoupled, as in AdamW.

    Args:
        beta1: the decay rate of the mean of the gradients, in [0, 1).
        beta2: the decay rate of the mean of their squares, in [0, 1).
        epsilon: what is added to the root of the latter.
        weight_decay: λ; θ ← θ − step λ θ before each update.

    Raises:
        ValueError: for a number out of range.

    References:
        Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, https://arxiv.org/abs/1412.6980

    >>> rule, theta = Adam(), torch.zeros(1, 2)
    >>> moments = rule.init(theta)
    >>> rule.apply(theta, torch.tensor([[5.0, -0.1]]), moments, step=0.1)
    >>> theta
    tensor([[-0.1000,  0.1000]])
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf), ("weight_decay", math.inf)):
            in_range(name, getattr(self, name), below)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(len(theta), device=theta.device)]

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        stacks = [tensor.unbind() for tensor in (theta, gradient, *moments)]
        sizes = [step] * len(theta) if isinstance(step, float) else step.tolist()
        for size in dict.fromkeys(sizes):  # the fused kernel has one step size per call
            self._fused([[row for row, eta in zip(stack, sizes, strict=True) if eta == size] for stack in stacks], size)

    def _fused(self, stacks: list[list[Tensor]], step: float) -> None:
        """Update some replicas of theta, the gradient, both moments and the count of steps."""
        theta, gradient, mean, square, count = stacks
        adam(
            theta,
            gradient,
            mean,
            square,
            [],
            count,
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=step,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )


@dataclass(frozen=True)
class SGD(Options, UpdateRule):
    """θ ← θ − step · (gradient + weight_decay θ), with heavy-ball momentum, as PyTorch's.

    Args:
        momentum: the part of the former update's direction that is added, in [0, 1).
        weight_decay: λ ≥ 0, of the penalty λ/2 ‖θ‖².

    Raises:
        ValueError: for a number out of range.

    >>> rule, theta = SGD(weight_decay=0.5), torch.tensor([[1.0], [1.0]])
    >>> rule.apply(theta, torch.tensor([[2.0], [2.0]]), rule.init(theta), step=torch.tensor([0.1, 0.2]))
    >>> theta
    tensor([[0.7500],
            [0.5000]])
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("momentum", self.momentum, 1.0)
        in_range("weight_decay", self.weight_decay)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [torch.zeros_like(theta)] if self.momentum else []

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        step = broadcast(step, theta)
        if moments:
            gradient = moments[0].mul_(self.momentum).add_(gradient).add_(theta, alpha=self.weight_decay)
        elif self.weight_decay:
            theta.mul_(1.0 - step * self.weight_decay)
        if isinstance(step, float):
            theta.sub_(gradient, alpha=step)
        else:
            theta.addcmul_(gradient, -step)
