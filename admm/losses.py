"""Losses J(Y, Z_T): value, gradient and proximal operator, one row per sample.

Shapes: outputs `z` are [..., C], with the classes along the last axis, where PyTorch's losses have them along axis 1.
Targets `y` are [..., C] too, but for class indices [...] of `CrossEntropy` and what a plain function takes. Values are
per sample; whether an algorithm sums or averages over samples is part of the algorithm's definition. An average divides
by the number of samples, whatever the weights of classes and samples are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from admm.checks import at_least_one, check_positive, in_range, shown
from admm.newton import newton
from admm.numbers import Options, is_number, is_whole, plain


class Loss(ABC):
    """A differentiable function J(z, y) of the outputs and targets of each sample.

    Targets are a tensor; a loss of one's own may take a tuple, list or dictionary of tensors.
    """

    threshold: ClassVar[float | None] = None  # outputs above it mean yes, for targets that are 0 or 1

    @abstractmethod
    def value(self, z: Tensor, y: Any) -> Tensor:
        """Return J of each sample, [...]; for outputs with further axes J of each position, which add up to it."""

    @abstractmethod
    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """Return ∇_z J of each sample, [..., C]."""

    def targets(self, y: Any, outputs: Sequence[int], like: Tensor) -> Any:
        """Return the targets [N, ...] that `value` takes, from a caller's.

        This default takes y as it is, numbers of floating point in the dtype of `like`.

        Args:
            y: what the caller has, [N, ...], a tensor or a nested structure of tensors.
            outputs: the shape of the network's outputs per sample.
            like: a tensor whose dtype and device the targets get.

        Raises:
            ValueError: for targets that the loss is not defined for.
        """
        return tree_map(lambda leaf: leaf.to(like.dtype) if leaf.is_floating_point() else leaf, y)


class ProximalLoss(Loss):
    """A loss with a proximal operator, which algorithms with exact updates of the outputs need."""

    @abstractmethod
    def prox(self, v: Tensor, y: Any, penalty: float | Tensor) -> Tensor:
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
    numbers = _as_numbers(y, outputs, like)
    return one_hot(as_labels(y, outputs), outputs[-1], like) if numbers is None else numbers


def as_labels(y: Tensor, outputs: Sequence[int], ignore_index: int | None = None) -> Tensor:
    """Return class indices [N, *outputs[:-1]] as int64.

    Args:
        y: class indices [N, *outputs[:-1]], with or without a last axis of size 1, of a whole-number type.
        outputs: the shape of the network's outputs per sample.
        ignore_index: a number that need not be a class.

    Raises:
        ValueError: for another type or shape, and for a class that has no output.
    """
    shape = [len(y), *outputs[:-1]]
    is_whole_type = not (y.is_floating_point() or y.is_complex())
    if not is_whole_type or not outputs or list(y.shape) not in (shape, [*shape, 1]):
        fits_axis_1 = is_whole_type and have_classes_along_axis_1(y, outputs)
        raise ValueError(
            f"y: targets of {y.dtype} {list(y.shape)} do not fit the network's outputs {[len(y), *outputs]}: "
            + (CLASSES_LAST if fits_axis_1 else f"give these, or class indices {shape} of a whole-number type")
        )
    y = y.reshape(shape).long()
    counted = y if ignore_index is None else y[y != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < outputs[-1]:
        raise ValueError(
            f"y: class indices go from {int(counted.min())} to {int(counted.max())}, the network has outputs for 0 to "
            f"{outputs[-1] - 1}; CrossEntropy's ignore_index is for labels that count nothing"
        )
    return y


# In messages, for targets that fit the outputs as PyTorch's losses take them.
CLASSES_LAST = (
    "the classes are the last axis of the outputs here, and axis 1 for PyTorch's losses; end the network with a module "
    "that does outputs.movedim(1, -1)"
)


def have_classes_along_axis_1(y: Any, outputs: Sequence[int]) -> bool:
    """Whether class indices fit outputs [N, C, ...] with positions, as PyTorch's losses take them: [N, ...]."""
    return isinstance(y, Tensor) and len(outputs) > 1 and y.shape[1:] == torch.Size(outputs[1:])


def _are_ones(sums: Tensor) -> bool:
    """Whether these are the sums of distributions."""
    return torch.allclose(sums, torch.ones_like(sums), rtol=0.0, atol=1e-2)


def _as_numbers(y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor | None:
    """Return targets [N, *outputs] that are numbers, see `as_targets`; None for another shape. Raises ValueError."""
    if not isinstance(y, Tensor):
        raise ValueError(f"y: a {type(y).__name__}, where the loss takes one tensor of targets")
    _check_features(outputs, len(y))
    shape = (len(y), *outputs)
    if y.shape != shape and not (y.shape == shape[:1] and math.prod(outputs) == 1):
        return None
    y = y.reshape(shape).to(like)
    if not bool(y.isfinite().all()):
        raise ValueError("y: targets must be finite numbers, found NaN or infinity")
    return y


def _check_features(outputs: Sequence[int], samples: int) -> None:
    """Raise ValueError for outputs that are a number per sample, without an axis."""
    if not outputs:
        raise ValueError(
            f"network: its outputs are [{samples}], where the loss needs an axis of features, [{samples}, 1]; leave "
            "out the squeeze or flatten that takes it away"
        )


def _weights(name: str, value: Any) -> tuple[float, ...] | None:
    """Return weights as a tuple.

    Raises ValueError unless they are None or numbers from 0 up, and for a `weight` that is 0 for all outputs.
    """
    if value is None:
        return None
    try:
        weights = tuple(plain(value))
    except TypeError:
        weights = ()
    if not weights or not all(is_number(w) and w >= 0 for w in weights):
        raise ValueError(f"{name}: {shown(value)} is not None or numbers from 0 up, one per output")
    if name == "weight" and not any(weights):
        raise ValueError(f"weight: {shown(value)} are all 0, and so would the loss be")
    return weights


def _check_length(name: str, weights: Sequence[float] | None, outputs: Sequence[int]) -> None:
    """Raise ValueError unless there are as many weights as outputs."""
    if weights is not None and len(weights) != outputs[-1]:
        raise ValueError(f"{name}: {len(weights)} numbers, expected one for each of the {outputs[-1]} outputs")


@dataclass(frozen=True)
class SquaredError(Options, ProximalLoss):
    """J = scale/2 ‖z − y‖².

    PyTorch's `MSELoss`, a mean over a sample's C outputs (784 of an image of 28×28) too, is `scale = 2/C`. Raises
    ValueError unless scale > 0.

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
class Huber(Options, ProximalLoss):
    """J = scale · Σ_c h(z_c − y_c), where h(r) is r²/2 up to |r| = delta, and beyond it delta (|r| − delta/2).

    Outliers pull with a force of at most scale · delta. PyTorch's `HuberLoss`, a mean over a sample's C outputs too, is
    `scale = 1/C`. Raises ValueError unless delta and scale are positive.

    References:
        Huber (1964), "Robust estimation of a location parameter", https://doi.org/10.1214/aoms/1177703732

    >>> loss, z, y = Huber(), torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]])
    >>> loss.value(z, y), loss.gradient(z, y), loss.prox(z, y, penalty=1.0)
    (tensor([2.6250]), tensor([[0.5000, 1.0000]]), tensor([[0.2500, 2.0000]]))
    """

    delta: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("delta", self.delta)
        check_positive("scale", self.scale)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return any numbers, or class indices as one-hot targets, see `as_targets`."""
        return as_targets(y, outputs, like)

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        error = (z - y).abs()
        inner = error.clamp(max=self.delta)
        return (inner * (error - 0.5 * inner)).sum(-1).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).clamp_(-self.delta, self.delta).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        # That of the squared error for a target which is at most so far away that the gradient at z is scale · delta.
        ratio = torch.as_tensor(self.scale / (self.scale + penalty), dtype=v.dtype, device=v.device)
        reach = self.delta * (1.0 + self.scale / penalty)
        return torch.lerp(v, torch.clamp(y, v - reach, v + reach), ratio)


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


class _Distribution(NamedTuple):
    """A vector t [..., C] of numbers from 0 up: `rest`, with `share` added at `label`.

    Attributes:
        mass: Σ_c t_c, [..., 1].
        rest: [..., C], or None for zeros.
        label, share: [..., 1], or None for no label.
    """

    mass: Tensor
    rest: Tensor | None
    label: Tensor | None = None
    share: Tensor | None = None

    def dot(self, z: Tensor) -> Tensor:
        """Return ⟨t, z⟩ [...]."""
        product = z.new_zeros(()) if self.rest is None else (z * self.rest).sum(-1)
        if self.label is not None and self.share is not None:
            product = product + (z.gather(-1, self.label) * self.share).squeeze(-1)
        return product

    def difference(self, p: Tensor) -> Tensor:
        """Return mass · p − t, [..., C]."""
        difference = p * self.mass
        if self.rest is not None:
            difference = difference.sub_(self.rest)
        if self.label is not None and self.share is not None:
            difference = difference.scatter_add_(-1, self.label, -self.share)
        return difference


_Proximal = tuple[Tensor, _Distribution, float | Tensor, Tensor]  # v, t, penalty, and the largest gradient at the end


@dataclass(frozen=True)
class CrossEntropy(_NewtonLoss):
    """J = scale · −Σ_c t_c log softmax(z)_c, which is PyTorch's `cross_entropy(..., reduction="none")` times the scale.

    Targets are class indices [...] of a whole-number type, or distributions over the classes [..., C]; with positions,
    such as the tokens of a text, J is of each position. The classes are the last axis of the outputs. (PyTorch's loss
    takes [N, C, ...]: a network for it ends here with a module that does `outputs.movedim(1, -1)`.) t is the one-hot
    vector of the class, or the distribution, smoothed to (1 − label_smoothing) t_c + label_smoothing/C and then
    weighted to weight_c t_c. For an ignored label t = 0.

    J is of a sample (and position). The algorithms sum it, or divide the sum by the number of samples; where PyTorch's
    `reduction="mean"` divides by the sum of the weights of those that are not ignored, they do not.

    Args:
        scale: the factor.
        max_steps: the most steps of Newton's method in the proximal operator.
        tolerance: the largest entry of its objective's gradient at the end, relative to
            scale Σ_c t_c + penalty (1 + max |v|).
        weight: one number from 0 up per class; None stands for ones.
        ignore_index: a class index that counts nothing, such as PyTorch's -100; None stands for no such index.
        label_smoothing: from 0 up and below 1.

    Raises:
        ValueError: for what is out of range.

    >>> loss, z, y = CrossEntropy(), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([0.6931]), tensor([[-0.5000,  0.5000]]))
    >>> loss.prox(z, y, penalty=1.0)
    tensor([[ 0.3374, -0.3374]])
    >>> CrossEntropy(weight=[3.0, 1.0], ignore_index=-100).value(z.expand(3, 2), torch.tensor([0, 1, -100]))
    tensor([2.0794, 0.6931, 0.0000])
    """

    weight: Sequence[float] | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight", _weights("weight", self.weight))
        in_range("label_smoothing", self.label_smoothing, below=1.0)
        if self.ignore_index is not None and not is_whole(self.ignore_index, least=-(2**63)):
            raise ValueError(f"ignore_index: {shown(self.ignore_index)} is not None or a whole number, such as -100")

    @property
    def largest_mass(self) -> float:
        """The largest Σ_c t_c that a target can have."""
        if self.weight is None:
            return 1.0
        mean = sum(self.weight) / len(self.weight)
        return (1.0 - self.label_smoothing) * max(self.weight) + self.label_smoothing * mean

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return distributions over at least two classes, or class indices as int64, see `as_labels`."""
        if not outputs or outputs[-1] < 2:
            way = "for one output that means yes or no take BinaryCrossEntropy"
            raise ValueError(
                f"loss: CrossEntropy needs outputs for two classes or more, the network's are {list(outputs)} per "
                f"sample; {CLASSES_LAST if have_classes_along_axis_1(y, outputs) else way}"
            )
        targets = _as_numbers(y, outputs, like)
        if targets is None:
            targets = as_labels(y, outputs, self.ignore_index)
        _check_length("weight", self.weight, outputs)
        if not targets.is_floating_point():
            return targets
        sums = targets.sum(-1)
        if bool((targets < 0).any()) or not _are_ones(sums):
            if len(outputs) > 1 and _are_ones(targets.sum(1)):
                raise ValueError(f"y: distributions {list(y.shape)}, which sum to 1 along axis 1: {CLASSES_LAST}")
            raise ValueError(
                f"y: CrossEntropy takes distributions over the classes, which are not negative and sum to 1; the rows "
                f"sum to {float(sums.min()):.4g} to {float(sums.max()):.4g}, the smallest entry is "
                f"{float(targets.min()):.4g}; for several labels per sample take BinaryCrossEntropy"
            )
        if self.ignore_index is not None and self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index: {self.ignore_index} needs class indices as y, found distributions {list(y.shape)}"
            )
        return targets

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        t = self._distribution(z, y)
        return (torch.logsumexp(z, -1) * t.mass.squeeze(-1) - t.dot(z)).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return self._distribution(z, y).difference(torch.softmax(z, -1)).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Return the minimiser by Newton's method, whose Hessian is a rank-one change of a diagonal matrix.

        With s = scale Σ_c t_c the Hessian is `s (diag p − p pᵀ) + penalty I`. With the step size log(1 + δ)/δ,
        δ = max d − min d, each step d descends, as the objective is generalised self-concordant (Sun & Tran-Dinh 2019,
        "Generalized self-concordant functions", Thm. 2 for ν = 2).
        """
        t = self._distribution(v, y)
        tolerance = self.tolerance * (self.scale * t.mass + penalty * (1.0 + v.abs().amax(-1, keepdim=True)))
        return newton(self._evaluate, self._moved, v, (v, t, penalty, tolerance), self.max_steps)

    def _evaluate(self, z: Tensor, given: _Proximal) -> tuple[Tensor, Tensor, Tensor]:
        """Return which rows are active, their objective's gradient, and softmax(z).

        Each row stops by itself, so that a sample's result does not depend on its neighbours.
        """
        v, t, penalty, tolerance = given
        p = torch.softmax(z, -1)
        gradient = self.scale * t.difference(p) + penalty * (z - v)
        return gradient.abs().amax(-1, keepdim=True) > tolerance, gradient, p  # NaN is not active

    def _moved(self, z: Tensor, active: Tensor, gradient: Tensor, p: Tensor, given: _Proximal) -> Tensor:
        """Return z after a step of the active rows."""
        _, t, penalty, _ = given
        scale = self.scale * t.mass
        diagonal = scale * p + penalty
        scaled_p, scaled_gradient = p / diagonal, gradient / diagonal
        # Sherman-Morrison: (D − s p pᵀ)⁻¹ g, with 1 − s pᵀD⁻¹p = Σ penalty p / D > 0.
        curvature = (penalty * scaled_p).sum(-1, keepdim=True)
        inner = (p * scaled_gradient).sum(-1, keepdim=True)
        direction = scaled_gradient + scaled_p * (scale * inner / curvature)
        delta = (direction.amax(-1, keepdim=True) - direction.amin(-1, keepdim=True)).clamp_(min=1e-12)
        return z - torch.where(active, direction * (torch.log1p(delta) / delta), 0.0)

    def distribution(self, z: Tensor, y: Tensor) -> Tensor:
        """Return t [..., C] for targets of outputs z [..., C], of which the shape and the dtype count."""
        t = self._distribution(z, y)
        return t.rest if t.rest is not None and t.label is None else -t.difference(torch.zeros_like(z))

    def _distribution(self, z: Tensor, y: Tensor) -> _Distribution:
        weight = None if self.weight is None else z.new_tensor(self.weight)
        evenly = self.label_smoothing / z.shape[-1]
        if y.is_floating_point():
            if y.shape[-1] != z.shape[-1]:
                raise ValueError(f"y: distributions over {y.shape[-1]} classes, the network has {z.shape[-1]} outputs")
            t = y * (1.0 - self.label_smoothing) + evenly if self.label_smoothing else y
            t = t if weight is None else t * weight
            return _Distribution(t.sum(-1, keepdim=True), t)
        label = y.expand(z.shape[:-1]).unsqueeze(-1)
        kept = z.new_ones(label.shape)
        if self.ignore_index is not None:
            kept = (label != self.ignore_index).to(z)
            label = torch.where(kept == 0, 0, label)
        share = kept * (1.0 - self.label_smoothing)
        if weight is not None:
            share = share * weight[label]
        if not self.label_smoothing:
            return _Distribution(share, None, label, share)
        rest = kept * evenly * (z.new_ones(z.shape[-1]) if weight is None else weight)
        return _Distribution(share + rest.sum(-1, keepdim=True), rest, label, share)


@dataclass(frozen=True)
class BinaryCrossEntropy(_NewtonLoss):
    """J = scale · −Σ_c weight_c (pos_weight_c y_c log σ(z_c) + (1 − y_c) log(1 − σ(z_c))), with y between 0 and 1.

    Each output is a logit, σ the logistic function. The loss is for several labels per sample, or one output that means
    yes or no. PyTorch's `BCEWithLogitsLoss`, a mean over a sample's C outputs too, is `scale = 1/C`.

    Args:
        scale: the factor.
        max_steps: the most steps of Newton's method in the proximal operator.
        tolerance: the largest gradient of its objective at the end, relative to scale + penalty (1 + |v|), with the
            scale times the weights of the output.
        weight: one number from 0 up per output; None stands for ones.
        pos_weight: one number from 0 up per output, by which a yes counts more than a no; None stands for ones.

    Raises:
        ValueError: for what is out of range.

    >>> loss, z, y = BinaryCrossEntropy(), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> loss.value(z, y), loss.gradient(z, y), loss.prox(z, y, penalty=1.0)
    (tensor([0.6931]), tensor([[-0.5000]]), tensor([[0.4011]]))
    >>> BinaryCrossEntropy(pos_weight=[3.0]).value(z, y)
    tensor([2.0794])
    """

    threshold: ClassVar[float | None] = 0.0
    weight: Sequence[float] | None = None
    pos_weight: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "pos_weight"):
            object.__setattr__(self, name, _weights(name, getattr(self, name)))

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Return numbers from 0 to 1, or class indices as one-hot targets, see `as_targets`."""
        targets = as_targets(y, outputs, like)
        _check_length("weight", self.weight, outputs)
        _check_length("pos_weight", self.pos_weight, outputs)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise ValueError(
                f"y: BinaryCrossEntropy takes numbers from 0 to 1, found {float(targets.min()):.4g} to "
                f"{float(targets.max()):.4g}"
            )
        return targets

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        mass, yes = self._weighted(y)
        return (torch.nn.functional.softplus(z) * mass - yes * z).sum(-1).mul_(self.scale)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        mass, yes = self._weighted(y)
        return (torch.sigmoid(z) * mass - yes).mul_(self.scale)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        """Return the minimiser by Newton's method for each output, with the step size of `CrossEntropy.prox`."""
        mass, yes = self._weighted(y)
        tolerance = self.tolerance * (self.scale * mass + penalty * (1.0 + v.abs()))
        return newton(self._evaluate, self._moved, v, (v, mass, yes, penalty, tolerance), self.max_steps)

    def _evaluate(self, z: Tensor, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which outputs are active, their objective's derivative, and σ(z)."""
        v, mass, yes, penalty, tolerance = given
        p = torch.sigmoid(z)
        gradient = self.scale * (p * mass - yes) + penalty * (z - v)
        return gradient.abs() > tolerance, gradient, p  # NaN is not active

    def _moved(self, z: Tensor, active: Tensor, gradient: Tensor, p: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Return z after a step of the active outputs."""
        _, mass, _, penalty, _ = given
        direction = gradient / (self.scale * mass * p * (1.0 - p) + penalty)
        delta = direction.abs().clamp_(min=1e-12)
        return z - torch.where(active, direction * (torch.log1p(delta) / delta), 0.0)

    def _weighted(self, y: Tensor) -> tuple[float | Tensor, Tensor]:
        """Return m and t with J = scale Σ_c m_c log(1 + exp(z_c)) − t_c z_c."""
        mass: float | Tensor = 1.0
        yes = y
        if self.pos_weight is not None:
            yes = y * y.new_tensor(self.pos_weight)
            mass = 1.0 - y + yes
        if self.weight is not None:
            weight = y.new_tensor(self.weight)
            mass, yes = mass * weight, yes * weight
        return mass, yes


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


_OF_TORCH = {  # by name, the loss of this package that does more with the same outputs and targets
    ("CrossEntropyLoss", "cross_entropy"): "CrossEntropy(), which also measures accuracy",
    ("BCEWithLogitsLoss", "binary_cross_entropy_with_logits"): "BinaryCrossEntropy(), which also measures accuracy",
    ("MSELoss", "mse_loss"): "SquaredError(), which also measures mse and r2",
}


def _instead_of(function: object) -> str:
    """Return in words the loss of this package to take in place of one of PyTorch's; empty for another function."""
    name = getattr(function, "__name__", type(function).__name__)
    return next((f", or admm.{loss}" for names, loss in _OF_TORCH.items() if name in names), "")


def outputs_and_targets(z: Tensor, y: Any) -> str:
    """Return in words the shapes of outputs and targets [n, ...], and how targets of as many numbers get the former."""
    of_z, of_y = (str(tree_map(lambda v: ["n", *v.shape[1:]], tree)).replace("'n'", "n") for tree in (z, y))
    fits = isinstance(y, Tensor) and y.shape != z.shape and y.numel() == z.numel()
    way = "y[:, None]" if z.shape[1:] == (1,) else f"y.reshape({', '.join(map(str, (-1, *z.shape[1:])))})"
    return f"outputs {of_z} and targets {of_y}{f': give {way}' if fits else ''}"


@dataclass(frozen=True)
class FunctionLoss(Loss):
    """A loss from a plain function, with the gradient of autograd and without a proximal operator.

    Args:
        function: maps outputs and targets of n samples, [n, ...] each, to J of each sample, [n], or of parts of it,
            [n, ...], whose sum is J: such as
            `partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none")`. Targets are of any type
            and shape; they may be a tuple, list or dictionary of tensors, which the function gets as such.

    J of a sample must depend on no other sample. `value` raises ValueError for a function that returns another shape.
    Outputs and targets are [S, n, ...] here.

    >>> loss = FunctionLoss(lambda z, y: (z - y).abs().sum(1))
    >>> z, y = torch.tensor([[[1.0, -2.0]]]), torch.zeros(1, 1, 2)
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([[3.]]), tensor([[[ 1., -1.]]]))
    """

    function: Callable[[Tensor, Any], Tensor]

    def value(self, z: Tensor, y: Any) -> Tensor:
        targets = tree_map(lambda leaf: leaf.flatten(0, 1), y)
        values, samples = self.function(z.flatten(0, 1), targets), z.shape[0] * z.shape[1]
        if not isinstance(values, Tensor) or values.shape[:1] != (samples,) or values.numel() > z.numel():
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            way = 'as with reduction="none"'
            if isinstance(values, Tensor) and values.shape[:1] == (samples,):  # too many for each sample
                way = f"here of {outputs_and_targets(z[0], tree_map(lambda leaf: leaf[0], y))}"
            raise ValueError(
                f"{self.function!r} returns {shape} for {samples} samples; expected J of each sample, [n] or "
                f"[n, ...], {way}{_instead_of(self.function)}"
            )
        return values.unflatten(0, z.shape[:2])  # type: ignore[no-any-return]

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        return _autograd_gradient(self, z, y)


@dataclass(frozen=True)
class ProximalFunctionLoss(FunctionLoss, ProximalLoss):
    """A loss from a plain function, with the gradient of autograd and Newton's method as the proximal operator.

    Args:
        function: as for `FunctionLoss`; J must be twice differentiable.
        max_steps: the most steps of Newton's method in the proximal operator.
        tolerance: the largest entry of its objective's gradient at the end, relative to penalty (1 + max |v|): so for a
            convex J the result is exact to the tolerance, relative to 1 + max |v|.

    Raises:
        ValueError: unless max_steps is a whole number from 1 up, and the tolerance positive.

    >>> loss = ProximalFunctionLoss(lambda z, y: (z - y).square())
    >>> loss.prox(torch.ones(1, 1, 2), torch.zeros(1, 1, 2), penalty=2.0)
    tensor([[[0.5000, 0.5000]]])
    """

    max_steps: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        at_least_one("max_steps", self.max_steps)
        check_positive("tolerance", self.tolerance)

    def prox(self, v: Tensor, y: Any, penalty: float | Tensor) -> Tensor:
        """Return a minimiser of J(z, y) + penalty/2 ‖z − v‖², by Newton's method from z = v, for v [S, n, ...].

        The Hessian's eigenvalues are replaced by their magnitudes, so that the step points downhill (Nocedal & Wright
        2006, "Numerical Optimization", §3.4). The step is halved until the objective falls (Armijo's rule) or, near the
        end, where rounding hides that, until the gradient is half as long. A sample stops by itself, when its gradient
        is small or no step helps. The Hessians of all samples are held at once, D² numbers each for D outputs.

        For a J that is not convex, the result is a stationary point at which the objective is not above J(v), in
        general a local minimum; it need not be the global one. Where J has a kink, the method may stop early.
        """
        objective = _ProximalObjective(self, v, y, penalty)
        z = objective.v.clone()
        tolerance = self.tolerance * objective.penalty * (1.0 + z.abs().amax(1, keepdim=True))
        active = torch.ones_like(z[:, :1], dtype=torch.bool)
        value, gradient = objective.evaluate(z)
        rounding = torch.finfo(v.dtype).eps * value.abs()
        for _ in range(self.max_steps):
            active = active & (gradient.abs() > tolerance).any(1, keepdim=True)  # never for NaN
            if not active.any():
                break
            direction = objective.newton_direction(z, gradient, active)
            step = objective.step_size(z, value, gradient, direction, active, rounding)
            active = step > 0
            z = z - torch.where(active, step * direction, 0.0)
            value, gradient = objective.evaluate(z)
        return z.view_as(v)


class _ProximalObjective:
    """J(z, y) + penalty/2 ‖z − v‖² of m samples of D outputs, a function of z [m, D], for `ProximalFunctionLoss`."""

    def __init__(self, loss: FunctionLoss, v: Tensor, y: Any, penalty: float | Tensor) -> None:
        self.loss, self.y, self.shape = loss, y, v.shape
        penalty = torch.as_tensor(penalty, dtype=v.dtype, device=v.device).expand_as(v)
        self.v, self.penalty = (tensor.detach().flatten(0, 1).flatten(1) for tensor in (v, penalty))

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values [m, 1] and the gradients [m, D]."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            values = self._loss(leaf)
            gradient = torch.autograd.grad(values.sum(), leaf)[0]
        move = self.penalty * (z - self.v)
        return values.detach() + 0.5 * (move * (z - self.v)).sum(1, keepdim=True), gradient + move

    def newton_direction(self, z: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """Return |H|⁻¹ times the gradient [m, D] of the active samples [m, 1], with the Hessian H."""
        of_distance = torch.diag_embed(self.penalty)
        hessian = self._hessian_of_loss(z) + of_distance
        usable = active.unsqueeze(2) & hessian.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(usable, hessian, of_distance))
        values = values.abs().clamp(min=1e-3 * self.penalty.amin(1, keepdim=True))
        direction: Tensor = vectors @ ((vectors.mT @ gradient.unsqueeze(2)) / values.unsqueeze(2))
        return direction.squeeze(2)

    def step_size(
        self, z: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, active: Tensor, rounding: Tensor
    ) -> Tensor:
        """Return the first of 1, 1/2, 1/4, … whose step helps, [m, 1]; 0 if there is none."""
        slope, square = (gradient * direction).sum(1, keepdim=True), gradient.square().sum(1, keepdim=True)
        step, searching = torch.where(active, 1.0, torch.zeros_like(value)), active
        while searching.any():
            new_value, new_gradient = self.evaluate(z - torch.where(active, step * direction, 0.0))
            falls = new_value < value - 1e-4 * step * slope
            settles = new_gradient.square().sum(1, keepdim=True) <= 0.25 * square
            searching = searching & ~(falls | settles & (new_value <= value + 100.0 * rounding))
            step = torch.where(searching, 0.5 * step, step)
            hopeless = searching & ~((step * slope > rounding) & (step > 1e-15))  # also for NaN
            step, searching = torch.where(hopeless, 0.0, step), searching & ~hopeless
        return step

    def _loss(self, z: Tensor) -> Tensor:
        """Return J [m, 1]."""
        return self.loss.value(z.view(self.shape), self.y).reshape(len(z), -1).sum(1, keepdim=True)

    def _hessian_of_loss(self, z: Tensor) -> Tensor:
        """Return the Hessians [m, D, D] of J, row by row for all samples, as J of a sample depends on no other."""
        # torch.func would need a function without decisions by value, which not all of torch.nn.functional are.
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            gradient = torch.autograd.grad(self._loss(leaf).sum(), leaf, create_graph=True)[0]
            if not gradient.requires_grad:  # J is linear
                return z.new_zeros(*z.shape, z.shape[1])
            rows = [
                torch.autograd.grad(entry.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
                for entry in gradient.unbind(1)
            ]
        return torch.stack(rows, 1)


@dataclass(frozen=True)
class SampleWeighted(Loss):
    """J of a sample times the sample's weight, for another loss; a `ProximalLoss` if that is one.

    Targets are pairs (y, w): those of the loss, and numbers from 0 up with the axes of the samples, [N], or [S, n] for
    outputs [S, n, ...]. The algorithms sum w J, or divide the sum by the number of samples, not by that of the weights.

    Args:
        loss: any loss that is a sum over samples, which `TripletLoss` is not.

    Raises:
        ValueError: for another loss; for weights of another shape than the samples'.

    >>> loss, z = SampleWeighted(SquaredError()), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    >>> y = torch.zeros(2, 2), torch.tensor([1.0, 0.0])
    >>> loss.value(z, y), loss.gradient(z, y)
    (tensor([2.5000, 0.0000]), tensor([[1., 2.],
            [0., 0.]]))
    >>> loss.prox(z, y, penalty=1.0)
    tensor([[0.5000, 1.0000],
            [1.0000, 2.0000]])
    """

    loss: Loss

    def __new__(cls, loss: Loss | None = None) -> SampleWeighted:  # `copy` gives no loss, but the class that it has
        return object.__new__(_ProximalSampleWeighted if isinstance(loss, ProximalLoss) else cls)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss) or isinstance(self.loss, TripletLoss):
            raise ValueError(f"loss: {shown(self.loss)} is no admm.losses.Loss that is a sum over samples")
        if isinstance(self, ProximalLoss) and not isinstance(self.loss, ProximalLoss):
            raise ValueError(f"loss: {type(self.loss).__name__} has no prox; make a new SampleWeighted of it")

    def targets(self, y: Any, outputs: Sequence[int], like: Tensor) -> tuple[Any, Tensor]:
        """Return the loss's targets and the weights [N], of a tuple of both; samples of targets alone count once.

        Raises ValueError for weights that are negative or not finite, or not one per sample.
        """
        y, weights = y if isinstance(y, tuple) else (y, None)
        y = self.loss.targets(y, outputs, like)
        samples = len(tree_leaves(y)[0])
        weights = like.new_ones(samples) if weights is None else torch.as_tensor(weights).to(like)
        if weights.shape != (samples,) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"y: weights {list(weights.shape)} of {samples} samples, {float(weights.min()):.4g} to "
                f"{float(weights.max()):.4g}; expected one number from 0 up per sample"
            )
        return y, weights

    def value(self, z: Tensor, y: tuple[Any, Tensor]) -> Tensor:
        value = self.loss.value(z, y[0])
        return value * _with_axes_of(value, y[1])

    def gradient(self, z: Tensor, y: tuple[Any, Tensor]) -> Tensor:
        return self.loss.gradient(z, y[0]) * _with_axes_of(z, y[1])


class _ProximalSampleWeighted(SampleWeighted, ProximalLoss):
    """`SampleWeighted` of a `ProximalLoss`."""

    def prox(self, v: Tensor, y: tuple[Any, Tensor], penalty: float | Tensor) -> Tensor:
        # w J(z) + penalty/2 ‖z − v‖² has the minimiser of J(z) + penalty/(2w) ‖z − v‖².
        assert isinstance(self.loss, ProximalLoss)
        weights = _with_axes_of(v, y[1])
        penalty = (penalty / weights).clamp(max=1e20)  # where z is v, to rounding
        return torch.where(weights > 0, self.loss.prox(v, y[0], penalty), v)


def unweighted(loss: Loss, y: Any) -> tuple[Loss, Any, Tensor | None]:
    """Return a loss and targets without what `SampleWeighted` adds, and the weights, None for none."""
    if not isinstance(loss, SampleWeighted):
        return loss, y, None
    y, weights = y if isinstance(y, tuple) else (y, None)
    return loss.loss, y, weights


def _with_axes_of(values: Tensor, weights: Tensor) -> Tensor:
    """Return weights of samples [...] with further axes of size 1, as many as values [..., d, ...] have."""
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"y: weights {list(weights.shape)} do not have the axes of the samples, which come first in "
            f"{list(values.shape)}"
        )
    return weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))


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
        _check_features(outputs, len(y))
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
