"""Losses J(Y, Z_T): value, gradient and proximal operator, one row a sample.

Shapes: outputs `z` and one-hot targets `y` are [..., C]. All of it is per sample; whether an algorithm sums or
averages over samples is the algorithm's own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from admm.numbers import Options, is_number


class Loss(Protocol):
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """J of each sample, [...]."""

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """∇_z J of each sample, [..., C]."""

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """argmin_z J(z, y) + penalty/2 ‖z − v‖², [..., C]; `penalty` > 0 broadcasts to v. A loss that is no sum over
        samples has none, and is for optimizers that need none."""


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Targets [N, C] in the dtype and on the device of `like`, of class indices [N]."""
    return torch.nn.functional.one_hot(labels, classes).to(like)


def check_positive(key: str, value: object) -> None:
    """Raises ValueError that names the key of a loss."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"loss.{key}: {value!r} is not a positive number")


@dataclass(frozen=True)
class SquaredError(Options):
    """J = scale/2 ‖z − y‖². PyTorch's `MSELoss`, a mean over the C outputs too, is `scale = 2/C`."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(-1).mul_(0.5 * self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        # Stationarity: scale (z − y) + penalty (z − v) = 0.
        return torch.lerp(v, y, torch.as_tensor(self.scale / (self.scale + penalty), dtype=v.dtype, device=v.device))


@dataclass(frozen=True)
class CrossEntropy(Options):
    """J = scale · −Σ_c y_c log softmax(z)_c, with `y` one-hot or any distribution over the classes."""

    scale: float = 1.0
    max_steps: int = 2000  # of Newton's method in the proximal operator
    tolerance: float = 1e-6  # largest entry of its gradient, relative to scale + penalty (1 + max |v|)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("scale", "max_steps", "tolerance"):
            check_positive(key, getattr(self, key))

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.logsumexp(z, -1) - (z * y).sum(-1)).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.softmax(z, -1) - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Newton's method; its Hessian `scale (diag p − p pᵀ) + penalty I` is a rank-one change of a diagonal.

        The step log(1 + δ)/δ with δ = max d − min d makes each step descend: the objective is generalised
        self-concordant (Sun & Tran-Dinh 2019, "Generalized self-concordant functions", Thm. 2 for ν = 2).
        """
        # Each row stops by itself, so that a sample's result does not depend on its neighbours.
        z, tolerance = v.clone(), self.tolerance * (self.scale + penalty * (1.0 + v.abs().amax(-1, keepdim=True)))
        for _ in range(self.max_steps):
            p = torch.softmax(z, -1)
            gradient = self.scale * (p - y) + penalty * (z - v)
            active = gradient.abs().amax(-1, keepdim=True) > tolerance  # never for NaN
            if not active.any():
                break
            diagonal = self.scale * p + penalty
            scaled_p, scaled_gradient = p / diagonal, gradient / diagonal
            # Sherman-Morrison: (D − scale p pᵀ)⁻¹ g, with 1 − scale pᵀD⁻¹p = Σ penalty p / D > 0.
            curvature = (penalty * scaled_p).sum(-1, keepdim=True)
            inner = (p * scaled_gradient).sum(-1, keepdim=True)
            direction = scaled_gradient + scaled_p * (self.scale * inner / curvature)
            delta = (direction.amax(-1, keepdim=True) - direction.amin(-1, keepdim=True)).clamp_(min=1e-12)
            z -= torch.where(active, direction * (torch.log1p(delta) / delta), 0.0)
        return z


@dataclass(frozen=True)
class Hinge(Options):
    """J = scale · Σ_c max(1 − z_c, 0) where y_c = 1 and max(z_c, 0) where y_c = 0; `y` has no other values.

    The binary hinge of Taylor et al. 2016 ("Training neural networks without gradients", §6), one versus all. At a kink
    the gradient is 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 1, 1.0 - z, z).clamp_(min=0.0).sum(-1).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 1, -(z < 1.0).to(z), (z > 0.0).to(z)).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        # A step of scale/penalty down the slope, which ends at the kink.
        step = self.scale / penalty
        up = torch.maximum(v, (v + step).clamp_(max=1.0))
        down = torch.minimum(v, (v - step).clamp_(min=0.0))
        return torch.where(y == 1, up, down)
