"""Losses J(Y, Z_T): value, gradient and proximal operator, one row per sample.

Shapes: outputs `z` and one-hot targets `y` are [..., C]. All of it is per sample; whether an algorithm sums or
averages over samples is the algorithm's own definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from admm.numbers import Options, is_number


class Loss(Protocol):
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """J of each sample, [...]; of outputs with further axes, J of each position, whose sum is the sample's."""

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """∇_z J of each sample, [..., C]."""

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """argmin_z J(z, y) + penalty/2 ‖z − v‖², [..., C]; `penalty` > 0 broadcasts to v. A loss that is no sum over
        samples has none, and is for optimizers that need none."""

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """The targets [N, ...] that `value` takes, in the dtype of `like`, from a caller's y; `outputs` is the shape of
        the network's outputs per sample. Raises ValueError for targets that the loss is not defined for. A loss
        without this method takes y as it is given."""


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Targets [N, C] in the dtype and on the device of `like`, of class indices [N]."""
    return torch.nn.functional.one_hot(labels.long(), classes).to(like)


def is_one_hot(y: Tensor) -> bool:
    """Whether targets [..., C] are classes: of at least two entries one is 1 and the others are 0."""
    return y.ndim > 1 and y.shape[-1] > 1 and bool((((y == 0) | (y == 1)).all(-1) & (y.sum(-1) == 1)).all())


def as_targets(y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
    """Targets [N, *outputs] in the dtype of `like`: these themselves, [N] for one output per sample, or class indices
    [N] or [N, 1] (with further axes of the outputs: [N, *outputs[:-1]]), which become one-hot over the last axis.

    Raises ValueError for another shape, a class that has no output, or values that are not finite.
    """
    samples, *positions = len(y), *outputs[:-1]
    shape = (samples, *outputs)
    if y.shape == shape or (y.shape == (samples,) and math.prod(outputs) == 1):
        y = y.reshape(shape).to(like)
        if not bool(y.isfinite().all()):
            raise ValueError("y: targets must be finite numbers, found NaN or infinity")
        return y
    whole = not (y.is_floating_point() or y.is_complex())
    if not whole or not outputs or y.shape not in ((samples, *positions), (samples, *positions, 1)):
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

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Any numbers, or class indices, see `as_targets`."""
        return as_targets(y, outputs, like)

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

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Distributions over at least two classes, or class indices, see `as_targets`."""
        if not outputs or outputs[-1] < 2:
            raise ValueError(
                f"loss: CrossEntropy needs outputs for two classes or more, the network's are {list(outputs)} per "
                "sample; for one output that says yes or no take BinaryCrossEntropy"
            )
        found = as_targets(y, outputs, like)
        sums = found.sum(-1)
        if bool((found < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), rtol=0.0, atol=1e-2):
            raise ValueError(
                f"y: CrossEntropy takes distributions over the classes, which are not negative and sum to 1; the rows "
                f"sum to {float(sums.min()):.4g} to {float(sums.max()):.4g}, the smallest entry is "
                f"{float(found.min()):.4g}; for several labels per sample take BinaryCrossEntropy"
            )
        return found

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
class BinaryCrossEntropy(Options):
    """J = scale · Σ_c log(1 + exp(z_c)) − y_c z_c, each output a logit of its own: for several labels per sample, or
    one output that says yes or no. `y` is between 0 and 1. PyTorch's `BCEWithLogitsLoss`, a mean over the C outputs
    too, is `scale = 1/C`."""

    threshold: ClassVar[float] = 0.0  # outputs above it say yes
    scale: float = 1.0
    max_steps: int = 2000  # of Newton's method in the proximal operator
    tolerance: float = 1e-6  # of its gradient, relative to scale + penalty (1 + |v|)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("scale", "max_steps", "tolerance"):
            check_positive(key, getattr(self, key))

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Numbers from 0 to 1, or class indices, see `as_targets`."""
        found = as_targets(y, outputs, like)
        if bool(((found < 0) | (found > 1)).any()):
            raise ValueError(
                f"y: BinaryCrossEntropy takes numbers from 0 to 1, found {float(found.min()):.4g} to "
                f"{float(found.max()):.4g}"
            )
        return found

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(z) - y * z).sum(-1).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(z) - y).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Newton's method for each output, with the step of `CrossEntropy.prox`, which makes each step descend."""
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
class Hinge(Options):
    """J = scale · Σ_c max(1 − z_c, 0) where y_c = 1 and max(z_c, 0) where y_c = 0; `y` has no other values.

    The binary hinge of Taylor et al. 2016 ("Training neural networks without gradients", §6), one versus all. At a kink
    the gradient is 0.
    """

    threshold: ClassVar[float] = 0.5  # outputs above it say yes
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Zeros and ones, or class indices, see `as_targets`."""
        found = as_targets(y, outputs, like)
        if not bool(((found == 0) | (found == 1)).all()):
            raise ValueError(
                f"y: Hinge takes the values 0 and 1, found {float(found.min()):.4g} to {float(found.max()):.4g}"
            )
        return found

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
class FunctionLoss:
    """A loss from a plain function of outputs and targets of n samples, [n, ...] each, which returns J of each sample,
    [n], or parts of it, [n, ...], whose sum it is: such as
    `partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none")`.

    The gradient is autograd's, and there is no proximal operator. Here z and y are [S, n, ...]. Raises ValueError for a
    function that returns another shape.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        found, samples = self.function(z.flatten(0, 1), y.flatten(0, 1)), z.shape[0] * z.shape[1]
        if not isinstance(found, Tensor) or found.shape[:1] != (samples,) or found.numel() > z.numel():
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self.function!r} returns {shape} for {samples} samples; J of each sample is wanted, [n] or "
                '[n, ...], as with reduction="none"'
            )
        values: Tensor = found.unflatten(0, z.shape[:2])
        return values

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            gradient: Tensor = torch.autograd.grad(self.value(leaf, y).sum(), leaf)[0]
        return gradient


@dataclass(frozen=True)
class TripletLoss:
    """J of an anchor a = the mean over its positives p of scale · max(0, d(a, p) − d(a, n) + margin), with squared
    distances of embeddings of length 1 and n the nearest negative beyond p, or the farthest one where none is (Schroff
    et al. 2015, Eq. 3 and §3.2; Hoffer & Ailon 2015). It is 0 where a has no positive or no negative.

    Shapes: embeddings z [..., B, d]; identities y [..., B]; the mini-batch is what triplets are made of. There is no
    proximal operator: the loss is not a sum over samples.
    """

    scale: float = 1.0
    margin: float = 0.2

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_positive("margin", self.margin)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Identities [N], whole numbers. Raises ValueError for others."""
        if y.ndim != 1 or y.is_floating_point() or y.is_complex():
            raise ValueError(f"y: TripletLoss takes identities [N], whole numbers, not {y.dtype} {list(y.shape)}")
        return y

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """J of each anchor, [..., B]."""
        unit = torch.nn.functional.normalize(z, dim=-1)
        distance = 2.0 - 2.0 * (unit @ unit.mT)
        same = y.unsqueeze(-1) == y.unsqueeze(-2)
        positive = same & ~torch.eye(y.shape[-1], dtype=torch.bool, device=y.device)
        negative = self._negative(distance.detach(), same)
        excess = (distance - distance.gather(-1, negative) + self.margin).clamp(min=0.0)
        used = positive & ~same.all(-1, keepdim=True)
        return self.scale * (excess * used).sum(-1) / used.sum(-1).clamp(min=1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Of the sum over anchors, [..., B, d]; the choice of negatives counts as fixed."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, y).sum(), leaf)[0]

    @staticmethod
    def _negative(distance: Tensor, same: Tensor) -> Tensor:
        """For each anchor a and positive p the index of their negative, [..., B, B]."""
        # In the order of distance from a, with those of a's own identity last, p is followed by the nearest beyond it.
        ordered, order = distance.masked_fill(same, torch.inf).sort(-1)
        others = (~same).sum(-1, keepdim=True)
        beyond = torch.searchsorted(ordered, distance.contiguous(), right=True)
        return order.gather(-1, torch.minimum(beyond, others - 1).clamp(min=0))
