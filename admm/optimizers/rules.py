"""Update rules for parameters, given their gradient: Adam and SGD on a stack of replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from admm.numbers import Options
from admm.optimizers.protocol import in_range
from admm.schedules import broadcast


class UpdateRule(Protocol):
    def init(self, theta: Tensor) -> list[Tensor]:
        """Moments for parameters [S, P]."""

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        """One update in place; `step` is a float or one value per replica, [S]."""


@dataclass(frozen=True)
class Adam(Options):
    """Adam (Kingma & Ba 2014, Algorithm 1) by PyTorch's fused kernel; weight decay is decoupled (AdamW)."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf), ("weight_decay", math.inf)):
            in_range(f"update.{name}", getattr(self, name), below)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(len(theta), device=theta.device)]

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        stacks = [tensor.unbind() for tensor in (theta, gradient, *moments)]
        sizes = [step] * len(theta) if isinstance(step, float) else step.tolist()
        for size in dict.fromkeys(sizes):  # the fused kernel has one step size a call
            self._fused([[s for s, own in zip(stack, sizes, strict=True) if own == size] for stack in stacks], size)

    def _fused(self, stacks: list[list[Tensor]], step: float) -> None:
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
class SGD(Options):
    """θ ← θ − step · (gradient + weight_decay θ), with heavy-ball momentum, as PyTorch's."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("update.momentum", self.momentum, 1.0)
        in_range("update.weight_decay", self.weight_decay)

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
