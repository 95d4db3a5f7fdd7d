"""Losses J(Y, Z_T): value, gradient and proximal operator, one row per sample.

Shapes: outputs `z` and one-hot targets `y` are [..., C]. Values are per sample; whether an algorithm sums or averages
over samples is part of the algorithm's definition.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from admm.checks import at_least_one, check_positive
from admm.numbers import Options


class Loss(ABC):
    """A differentiable function J(z, y) of the outputs and targets of each sample."""

    threshold: ClassVar[float | None] = None  # outputs above it mean yes, for targets that are 0 or 1

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """Return J of each sample, [...]; for outputs with further axes J of each position, which add up to it."""

    @abstractmethod
    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ∇_z J of each sample, [..., C]."""

    def targets(self, y: Any, outputs: Sequence[int], like: Tensor) -> Any:
        """Return the targets [N, ...] that `value` takes, from a caller's.

        This default takes y as it is, numbers of floating point in the dtype of `like`.

        Args:
            y: what the caller has, [N, ...].
            outputs: the shape of the network's outputs per sample.
            like: a tensor whose dtype and device the targets get.

        Raises:
            ValueError: for targets that the loss is not defined for.
        """
        return tree_map(lambda leaf: leaf.to(like.dtype) if leaf.is_floating_point() else leaf, y)


class ProximalLoss(Loss):
    """A loss with a proximal operator, which algorithms with exact updates of the outputs need."""

    @abstractmethod
    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Return argmin_z J(z, y) + penalty/2 ‖z − v‖², [..., C]; `penalty` > 0 broadcasts to v."""


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return targets [N, C], in the dtype and on the device of `like`, for class indices [N].

    >>> one_hot(torch.tensor([2, 0]), classes=3, like=torch.zeros(1))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    return torch.nn.functional.one_hot(labels.long(), classes).to(like)


def is_one_hot(y: Any) -> bool:
    """Whether targets [..., C] are classes: one of C ≥ 2 entries is 1 and the others are 0."""
    return (
        isinstance(y, Tensor)
        and y.ndim > 1
        and y.shape[-1] > 1
        and bool((((y == 0) | (y == 1)).all(-1) & (y.sum(-1) == 1)).all())
    )


def as_targets(y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
    """Return targets [N, *outputs] in the dtype of `like`.

    Args:
        y: these targets themselves; [N] for one output per sample; or class indices [N] or [N, 1] (with further axes of
            the outputs [N, *outputs[:-1]]), which become one-hot over the last axis.
        outputs: the shape of the network's outputs per sample.
        like: a tensor whose dtype and device the targets get.

    Raises:
        ValueError: for another shape, a class that has no output, or values that are not finite.
    """
    samples, *positions = len(y), *outputs[:-1]
    shape = (samples, *outputs)
    if y.shape == shape or (y.shape == (samples,) and math.prod(outputs) == 1):
        y = y.reshape(shape).to(like)
        if not bool(y.isfinite().all()):
            raise ValueError("y: targets must be finite numbers, found NaN or infinity")
        return y
    is_whole = not (y.is_floating_point() or y.is_complex())
    if not is_whole or not outputs or y.shape not in ((samples, *positions), (samples, *positions, 1)):
        raise ValueError(
            f"y: targets of {y.dtype} {list(y.shape)} do not fit the network's outputs {list(shape)}: give these, or "
            f"class indices {[samples, *positions]} of a whole-number type"
        )
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < outputs[-1]:
        raise ValueError(
            f"y: class indices go from {int(y.min())} to {int(y.max())}, the network has outputs for 0 to "
            f"{outputs[-1] - 1}"
        )
    return one_hot(y.reshape(samples, *positions), outputs[-1], like)


@dataclass(frozen=True)
class SquaredError(Options, ProximalLoss):
    """J = scale/2 ‖z − y‖².

    PyTorch's `MSELoss`, a mean over the C outputs too, is `scale = 2/C`. Raises ValueError unless scale > 0.

    >>> loss, z, y = SquaredError(), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([2.5000]), tensor([[1., 2.]]))
    >>> loss.prox(z, y, penalty=1.0)
    tensor([[0.5000, 1.0000]])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return any numbers, or class indices as one-hot targets, see `as_targets`."""
        return as_targets(y, outputs, like)

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(-1).mul_(0.5 * self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        # Stationarity: scale (z − y) + penalty (z − v) = 0.
        return torch.lerp(v, y, torch.as_tensor(self.scale / (self.scale + penalty), dtype=v.dtype, device=v.device))


@dataclass(frozen=True)
class _NewtonLoss(Options, ProximalLoss):
    """The options of a loss whose proximal operator is Newton's method."""

    scale: float = 1.0
    max_steps: int = 2000
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("max_steps", self.max_steps)
        check_positive("scale", self.scale)
        check_positive("tolerance", self.tolerance)


@dataclass(frozen=True)
class CrossEntropy(_NewtonLoss):
    """J = scale · −Σ_c y_c log softmax(z)_c, with `y` one-hot or any distribution over the classes.

    Args:
        scale: the factor.
        max_steps: the most steps of Newton's method in the proximal operator.
        tolerance: the largest entry of its objective's gradient at the end, relative to scale + penalty (1 + max |v|).

    Raises:
        ValueError: unless all are positive, and `max_steps` a whole number.

    >>> loss, z, y = CrossEntropy(), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([0.6931]), tensor([[-0.5000,  0.5000]]))
    >>> loss.prox(z, y, penalty=1.0)
    tensor([[ 0.3374, -0.3374]])
    """

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return distributions over at least two classes, or class indices as one-hot targets, see `as_targets`."""
        if not outputs or outputs[-1] < 2:
            raise ValueError(
                f"loss: CrossEntropy needs outputs for two classes or more, the network's are {list(outputs)} per "
                "sample; for one output that means yes or no take BinaryCrossEntropy"
            )
        targets = as_targets(y, outputs, like)
        sums = targets.sum(-1)
        if bool((targets < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), rtol=0.0, atol=1e-2):
            raise ValueError(
                f"y: CrossEntropy takes distributions over the classes, which are not negative and sum to 1; the rows "
                f"sum to {float(sums.min()):.4g} to {float(sums.max()):.4g}, the smallest entry is "
                f"{float(targets.min()):.4g}; for several labels per sample take BinaryCrossEntropy"
            )
        return targets

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.logsumexp(z, -1) - (z * y).sum(-1)).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.softmax(z, -1) - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Return the minimiser by Newton's method, whose Hessian is a rank-one change of a diagonal matrix.

        The Hessian is `scale (diag p − p pᵀ) + penalty I`. With the step size log(1 + δ)/δ, δ = max d − min d, each
        step d descends, as the objective is generalised self-concordant (Sun & Tran-Dinh 2019, "Generalized
        self-concordant functions", Thm. 2 for ν = 2).
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
class BinaryCrossEntropy(_NewtonLoss):
    """J = scale · Σ_c log(1 + exp(z_c)) − y_c z_c, where each output is a logit and `y` is between 0 and 1.

    It is for several labels per sample, or one output that means yes or no. PyTorch's `BCEWithLogitsLoss`, a mean over
    the C outputs too, is `scale = 1/C`.

    Args:
        scale: the factor.
        max_steps: the most steps of Newton's method in the proximal operator.
        tolerance: the largest gradient of its objective at the end, relative to scale + penalty (1 + |v|).

    Raises:
        ValueError: unless all are positive, and `max_steps` a whole number.

    >>> loss, z, y = BinaryCrossEntropy(), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> loss.value(z, y), loss.gradient(z, y), loss.prox(z, y, penalty=1.0)
    (tensor([0.6931]), tensor([[-0.5000]]), tensor([[0.4011]]))
    """

    threshold: ClassVar[float | None] = 0.0

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return numbers from 0 to 1, or class indices as one-hot targets, see `as_targets`."""
        targets = as_targets(y, outputs, like)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise ValueError(
                f"y: BinaryCrossEntropy takes numbers from 0 to 1, found {float(targets.min()):.4g} to "
                f"{float(targets.max()):.4g}"
            )
        return targets

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(z) - y * z).sum(-1).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(z) - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Return the minimiser by Newton's method for each output, with the step size of `CrossEntropy.prox`."""
        z, tolerance = v.clone(), self.tolerance * (self.scale + penalty * (1.0 + v.abs()))
        for _ in range(self.max_steps):
            p = torch.sigmoid(z)
            gradient = self.scale * (p - y) + penalty * (z - v)
            active = gradient.abs() > tolerance  # never for NaN
            if not active.any():
                break
            direction = gradient / (self.scale * p * (1.0 - p) + penalty)
            delta = direction.abs().clamp_(min=1e-12)
            z -= torch.where(active, direction * (torch.log1p(delta) / delta), 0.0)
        return z


@dataclass(frozen=True)
class Hinge(Options, ProximalLoss):
    """J = scale · Σ_c max(1 − z_c, 0) where y_c = 1 and max(z_c, 0) where y_c = 0; `y` has no other values.

    This is the binary hinge of Taylor et al. 2016, §6, one versus all. At a kink the gradient is 0. Raises ValueError
    unless the scale is positive.

    References:
        Taylor et al., "Training neural networks without gradients: a scalable ADMM approach", ICML 2016,
        https://arxiv.org/abs/1605.02026

    >>> loss, z, y = Hinge(), torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    >>> loss.value(z, y), loss.gradient(z, y), loss.prox(z, y, penalty=4.0)
    (tensor([1.]), tensor([[-1.,  1.]]), tensor([[0.7500, 0.2500]]))
    """

    threshold: ClassVar[float | None] = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return zeros and ones, or class indices as one-hot targets, see `as_targets`."""
        targets = as_targets(y, outputs, like)
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise ValueError(
                f"y: Hinge takes the values 0 and 1, found {float(targets.min()):.4g} to {float(targets.max()):.4g}"
            )
        return targets

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


@dataclass(frozen=True)
class FunctionLoss(Loss):
    """A loss from a plain function, with the gradient of autograd and without a proximal operator.

    Args:
        function: maps outputs and targets of n samples, [n, ...] each, to J of each sample, [n], or of parts of it,
            [n, ...], whose sum is J: such as
            `partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none")`.

    `value` raises ValueError for a function that returns another shape. Outputs and targets are [S, n, ...] here.

    >>> loss = FunctionLoss(lambda z, y: (z - y).abs().sum(1))
    >>> z, y = torch.tensor([[[1.0, -2.0]]]), torch.zeros(1, 1, 2)
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([[3.]]), tensor([[[ 1., -1.]]]))
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        values, samples = (
            self.function(z.flatten(0, 1), tree_map(lambda leaf: leaf.flatten(0, 1), y)),
            z.shape[0] * z.shape[1],
        )
        if not isinstance(values, Tensor) or values.shape[:1] != (samples,) or values.numel() > z.numel():
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{self.function!r} returns {shape} for {samples} samples; expected J of each sample, [n] or "
                '[n, ...], as with reduction="none"'
            )
        return values.unflatten(0, z.shape[:2])  # type: ignore[no-any-return]

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return _autograd_gradient(self, z, y)


@dataclass(frozen=True)
class TripletLoss(Loss):
    """J of an anchor a is the mean over its positives p of scale · max(0, d(a, p) − d(a, n) + margin).

    d is the squared distance of embeddings, which are scaled to length 1; n is the nearest negative beyond p, or the
    farthest one if none is beyond. J is 0 for an anchor without a positive or without a negative.

    Embeddings are z [..., B, d], identities y [..., B]; the triplets are those within a mini-batch of B samples. There
    is no proximal operator, as the loss is not a sum over samples. Raises ValueError unless scale and margin are
    positive.

    References:
        Schroff, Kalenichenko & Philbin (2015), "FaceNet", Eq. 3 and §3.2, https://arxiv.org/abs/1503.03832
        Hoffer & Ailon (2015), "Deep metric learning using triplet network", https://arxiv.org/abs/1412.6622
    """

    scale: float = 1.0
    margin: float = 0.2

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_positive("margin", self.margin)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return identities [N], which are whole numbers. Raises ValueError for others."""
        if y.ndim != 1 or y.is_floating_point() or y.is_complex():
            raise ValueError(f"y: TripletLoss takes identities [N], whole numbers, not {y.dtype} {list(y.shape)}")
        return y

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """Return J of each anchor, [..., B]."""
        unit = torch.nn.functional.normalize(z, dim=-1)
        distance = 2.0 - 2.0 * (unit @ unit.mT)
        same = y.unsqueeze(-1) == y.unsqueeze(-2)
        positive = same & ~torch.eye(y.shape[-1], dtype=torch.bool, device=y.device)
        negative = self._negative(distance.detach(), same)
        excess = (distance - distance.gather(-1, negative) + self.margin).clamp(min=0.0)
        counted = positive & ~same.all(-1, keepdim=True)
        return self.scale * (excess * counted).sum(-1) / counted.sum(-1).clamp(min=1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of the sum over anchors, [..., B, d], for a fixed choice of negatives."""
        return _autograd_gradient(self, z, y)

    @staticmethod
    def _negative(distance: Tensor, same: Tensor) -> Tensor:
        """Return the index of the negative for each anchor a and positive p, [..., B, B]."""
        # Sorted by the distance from a, with those of a's identity last, the nearest negative beyond p follows p.
        ordered, order = distance.masked_fill(same, torch.inf).sort(-1)
        others = (~same).sum(-1, keepdim=True)
        beyond = torch.searchsorted(ordered, distance.contiguous(), right=True)
        return order.gather(-1, torch.minimum(beyond, others - 1).clamp(min=0))


def _autograd_gradient(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """Return the gradient by z of the sum of a loss's values."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        gradient: Tensor = torch.autograd.grad(loss.value(leaf, y).sum(), leaf)[0]
    return gradient
