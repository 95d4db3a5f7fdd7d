"""What an optimizer is given, what it promises, and how its state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from admm.augmentation import Augmentation
from admm.blocks import Blocks, Parameters
from admm.comparison import outputs_of
from admm.losses import CrossEntropy, FunctionLoss, Loss, is_one_hot
from admm.minibatches import minibatches, rows, stateless_rng
from admm.numbers import is_number, is_whole, plain


@dataclass(frozen=True)
class Problem:
    """Training data, a network cut into blocks, and a loss.

    x: inputs [N, ...], of floating point. y: targets [N, ...], as `loss.targets` takes them: for classes, class indices
    [N], which become one-hot, or distributions [N, C]. Both are tensors on one device, or what `torch.as_tensor` takes.
    loss: a `Loss`, or a plain function as `FunctionLoss` takes it. `initialise` fills a network's parameters in place
    from PyTorch's global random state. `augmentation` changes the inputs of mini-batches, for optimizers whose
    variables are none of the samples' own.
    """

    x: Tensor
    y: Tensor
    blocks: Blocks
    loss: Loss
    initialise: Callable[[nn.Module], None]
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for inputs or targets that the network or the loss cannot take, and as
        `admm.comparison.outputs_of` does."""
        if not hasattr(self.loss, "value") and callable(self.loss):
            object.__setattr__(self, "loss", FunctionLoss(self.loss))
        object.__setattr__(self, "x", self._inputs(self.x))
        object.__setattr__(self, "y", self.targets(self.x, self.y))
        self._check_loss()

    def samples(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Other inputs [M, ...] and targets, such as a test set, in the form of these. Raises ValueError as for
        these."""
        x = self._inputs(x).to(self.x.dtype)
        if x.shape[1:] != self.x.shape[1:] or x.device != self.x.device:
            raise ValueError(
                f"x: samples {list(x.shape[1:])} on {x.device}, where training has {list(self.x.shape[1:])} on "
                f"{self.x.device}"
            )
        targets = self.targets(x, y)
        if self.has_classes and not isinstance(self.loss, CrossEntropy) and not is_one_hot(targets):
            raise ValueError("y: these targets are not one class per sample, as those of training are")
        if not self.has_classes and is_one_hot(targets) and targets.shape != as_tensor("y", y).shape:
            raise ValueError("y: these targets are class indices, and those of training are not classes")
        return x, targets

    def targets(self, x: Tensor, given: Any) -> Tensor:
        """Targets of inputs x [M, ...], as `loss.targets` makes them of what a caller has. Raises ValueError."""
        y = as_tensor("y", given, x.device)
        if not y.ndim or len(x) != len(y):
            raise ValueError(f"problem: {len(x)} inputs x, but {len(y) if y.ndim else 'no'} targets y")
        if y.device != x.device:
            raise ValueError(f"y: is on {y.device}, x on {x.device}; both must be on one device")
        outputs = outputs_of(self.blocks, x)
        if callable(make := getattr(self.loss, "targets", None)):
            return make(y, outputs, like=x)  # type: ignore[no-any-return]
        return y.to(x.dtype) if y.is_floating_point() else y

    @cached_property
    def has_classes(self) -> bool:
        """Whether the targets say one class per sample, or per position of it, so that accuracy means something."""
        return isinstance(self.loss, CrossEntropy) or is_one_hot(self.y)

    @cached_property
    def threshold(self) -> float | None:
        """Of targets that each say yes or no: the loss's threshold, outputs above which say yes."""
        threshold: float | None = getattr(self.loss, "threshold", None)
        return None if threshold is None or not bool(((self.y == 0) | (self.y == 1)).all()) else threshold

    def _inputs(self, given: Any) -> Tensor:
        x = as_tensor("x", given).detach()
        if not x.is_floating_point():
            raise ValueError(
                f"x: inputs of {x.dtype} are not supported; give numbers of floating point, such as x.float(); a "
                "module that needs whole numbers, such as an embedding, can be wrapped in one that calls x.long()"
            )
        if x.ndim < 1 or not len(x):
            raise ValueError(f"x: inputs {list(x.shape)} have no samples [N, ...]")
        if not math.isfinite(x.sum(dtype=torch.float64)):
            raise ValueError("x: inputs must be finite numbers, found NaN or infinity")
        if self.blocks.execution.precision == "bf16" and x.dtype != torch.float32:
            raise ValueError(f"precision: bf16 is for inputs x of float32, not {x.dtype}")
        return x

    def _check_loss(self) -> None:
        """Raises ValueError for a loss that has no value per sample, or no gradient in the shape of the outputs."""
        if not hasattr(self.loss, "gradient"):
            raise ValueError(f"loss: a {type(self.loss).__name__} has no `value` and `gradient`, and is no function")
        y = self.y[:2].expand(2, *self.y[:2].shape)
        z = self.x.new_zeros(*y.shape[:2], *outputs_of(self.blocks, self.x))
        shapes = f"outputs {list(z.shape)} and targets {list(y.shape)}"
        try:
            value, gradient = self.loss.value(z, y), self.loss.gradient(z, y)
        except Exception as error:  # whatever a function of one's own raises
            raise ValueError(f"loss: cannot be evaluated on {shapes}: {type(error).__name__}: {error}") from error
        if value.shape[:2] != z.shape[:2]:
            raise ValueError(
                f"loss: the value for {shapes} is {list(value.shape)}; J of each sample is wanted, "
                f"{list(z.shape[:2])}, or of each of its parts"
            )
        if gradient.shape != z.shape:
            raise ValueError(f"loss: the gradient for {shapes} is {list(gradient.shape)}; the outputs' is wanted")

    def initial(self, seeds: Sequence[int]) -> Parameters:
        """Freshly initialised parameters, one replica per seed. Raises ValueError as `whole_seeds` does."""
        return self.blocks.initial(whole_seeds(seeds), self.initialise, like=self.x)

    def minibatches(
        self, batch_size: int, seeds: Sequence[int], iteration: int, parts: int | None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """The mini-batches of an iteration, an epoch or one of its `parts`: the part of it that is over, inputs
        [S, B, ...], augmented, and targets [S, B, C]. Raises ValueError as `admm.minibatches.minibatches` does."""
        distinct = list(dict.fromkeys(seeds))  # replicas of one seed share their mini-batches, gathered once
        place = torch.tensor([distinct.index(seed) for seed in seeds], device=self.x.device)
        batches = minibatches(len(self.x), batch_size, distinct, iteration, self.x.device, parts)
        if self.augmentation is not None:
            draws = [stateless_rng(seed, "augmentation", iteration // (parts or 1)) for seed in distinct]
            drawn = torch.stack([self.augmentation.draw(len(self.x), random) for random in draws]).to(self.x.device)
        for number, batch in enumerate(batches):
            x = rows(self.x, batch)
            if self.augmentation is not None:
                changes = drawn.take_along_dim(batch.unsqueeze(2), 1)
                x = self.augmentation.apply(x.flatten(0, 1), changes.flatten(0, 1)).unflatten(0, batch.shape)
            y = rows(self.y, batch)
            if len(distinct) < len(seeds):
                x, y = x.index_select(0, place), y.index_select(0, place)
            yield number / len(batches), x, y

    def refuse_augmentation(self, optimizer: str) -> None:
        """Raises ValueError if there is one: `optimizer` keeps variables of each sample."""
        if self.augmentation is not None:
            raise ValueError(
                f"augmentation: {optimizer} keeps variables of each sample as it is; take augmentation=none, or "
                "online_block_admm, gotmare, sgd or adam"
            )


State = TypeVar("State")


class Optimizer(Protocol[State]):
    """An algorithm: an immutable object with hyperparameters, over an explicit state of tensors.

    All variables have a replica axis S, one replica per seed, in front unless a state says otherwise. `step` works in
    place and returns the state; it never prints, logs, evaluates or reads a clock, and depends on nothing but the
    problem and the state.
    """

    def init(self, problem: Problem, seeds: Sequence[int]) -> State:
        """The state before the first iteration. Raises ValueError for what the algorithm cannot do."""

    def step(self, problem: Problem, state: State) -> State:
        """One iteration over all N samples (an epoch or a part of one, for mini-batch methods)."""

    def parameters(self, state: State) -> Parameters:
        """The blocks' parameters: the state's own tensors, which `step` changes. `Blocks.export` makes a copy."""

    def diagnostics(self, problem: Problem, state: State) -> dict[str, Tensor]:
        """Named quantities [S] for the history, such as constraint residuals."""


def as_tensor(name: str, given: Any, device: torch.device | None = None) -> Tensor:
    """A tensor as it is, or of an array or a list of numbers, on the device. Raises ValueError for anything else."""
    if isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given, device=device)
    except Exception as error:  # of whatever type it is
        raise ValueError(
            f"{name}: a {type(given).__name__} is no tensor, nor an array or a list of numbers ({error}); of several "
            "inputs, or of a data loader's batches, make one tensor"
        ) from None


def whole_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds as integers of Python's. Raises ValueError for other ones than whole numbers from 0 up to 2⁶⁴ − 1."""
    given = plain(seeds)
    is_sequence = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not is_sequence or not all(isinstance(s, int) and 0 <= s < 2**64 for s in given):
        raise ValueError(f"seeds: {seeds!r} is not a sequence of whole numbers from 0 up to 2⁶⁴ − 1, such as [0, 1, 2]")
    return tuple(map(int, given))


def save(state: Any) -> dict[str, Any]:
    """The state, a dataclass, as plain nested dictionaries of tensors and numbers, for `torch.save`. The tensors are
    the state's own, which `step` changes in place; `copy.deepcopy(save(state))` keeps what they hold now, for
    `restore`.

    Raises TypeError for what `restore` could not bring back.
    """
    return {field.name: _storable(getattr(state, field.name), field.name) for field in fields(state)}


def size(saved: Any) -> int:
    """Bytes of all tensors in what `save` has made."""
    if isinstance(saved, Tensor):
        return saved.nbytes
    items = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list) else ()
    return sum(map(size, items))


def restore(state: Any, saved: dict[str, Any]) -> None:
    """Overwrite a freshly initialised state, in place, by what `save` made. Raises ValueError on a mismatch, and for
    other seeds."""
    for field in fields(state):
        if field.name not in saved:
            raise ValueError(f"checkpoint: no {field.name!r}; it was made by another optimizer or version")
        value = getattr(state, field.name)
        if field.name == "seeds" and list(value) != list(saved["seeds"]):
            raise ValueError(f"checkpoint: seeds is {saved['seeds']}, expected {list(value)}")
        setattr(state, field.name, _restored(value, saved[field.name], field.name))


def _storable(value: Any, name: str) -> Any:
    match value:
        case Parameters():
            return [value.flat, value.buffers] if value.buffers.numel() else value.flat
        case Tensor():
            return value.detach()
        case np.generic():
            return value.item()
        case bool() | None:
            return value
        case int() | float() | str():  # also of classes derived from these, which PyTorch would not load
            return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))
        case list() | tuple():
            return [_storable(item, name) for item in value]
        case dict():
            return {key: _storable(item, name) for key, item in value.items()}
    if is_dataclass(value):
        return save(value)
    raise TypeError(
        f"state: {name} holds a {type(value).__name__}, which cannot be saved; a state holds tensors, numbers and "
        "text, and lists, tuples, dictionaries and dataclasses of them"
    )


def _restored(value: Any, saved: Any, name: str) -> Any:
    """`value` with what was saved of it: tensors are overwritten in place; what was empty is what was saved."""
    if isinstance(value, Parameters):
        _restored(_storable(value, name), saved, name)
        return value
    if isinstance(value, Tensor):
        found = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        if found != list(value.shape):
            raise ValueError(f"checkpoint: {name} has shape {found}, expected {list(value.shape)}")
        if saved.dtype != value.dtype:
            raise ValueError(f"checkpoint: {name} is of {saved.dtype}, expected {value.dtype}")
        value.data.copy_(saved)
        return value
    if value is None or value == [] or value == {}:
        return saved
    if isinstance(value, list | tuple):
        if not isinstance(saved, list | tuple) or len(value) != len(saved):
            entries = len(saved) if isinstance(saved, list | tuple) else "no"
            raise ValueError(f"checkpoint: {name} has {entries} entries, expected {len(value)}")
        items = [_restored(*pair, name) for pair in zip(value, saved, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        if not isinstance(saved, dict) or value.keys() != saved.keys():
            raise ValueError(f"checkpoint: {name} has the keys {list(saved)}, expected {list(value)}")
        return {key: _restored(item, saved[key], name) for key, item in value.items()}
    if is_dataclass(value):
        restore(value, saved)
        return value
    if isinstance(saved, Tensor | list | dict):
        raise ValueError(f"checkpoint: {name} is a {type(saved).__name__}, expected a {type(value).__name__}")
    return saved


def one_of(key: str, value: object, valid: Sequence[str]) -> None:
    """Raises ValueError that names the key and the valid choices."""
    if value not in valid:
        raise ValueError(f"optimizer.{key}: {value!r} is not one of {', '.join(valid)}")


def at_least_one(key: str, value: int) -> None:
    """Raises ValueError that names the key."""
    if not is_whole(value, 1):
        raise ValueError(f"optimizer.{key}: {value!r} is not a whole number from 1 up")


def in_range(key: str, value: object, below: float = math.inf) -> None:
    """Raises ValueError that names the key, unless 0 <= value < below."""
    if not is_number(value) or not 0.0 <= value < below:
        bound = "" if below == math.inf else f" and below {below}"
        raise ValueError(f"optimizer.{key}: {value!r} is not a number from 0 up{bound}")


def has_method(key: str, value: object, method: str, such_as: str) -> None:
    """Raises ValueError that names the key, unless `value` is an object with this method."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise ValueError(f"optimizer.{key}: {value!r} is no object such as {such_as}")


def same_samples(problem: Problem, variables: Tensor) -> None:
    """Raises ValueError unless variables [S, N, ...] of a state are of as many samples as the problem has."""
    if variables.shape[1] != len(problem.x):
        raise ValueError(
            f"problem: {len(problem.x)} samples, but the state has variables of {variables.shape[1]}; a step takes the "
            "problem that the state was made for"
        )


def check_prox(loss: Loss, algorithm: str) -> None:
    """Raises ValueError for a loss without a proximal operator."""
    if not callable(getattr(loss, "prox", None)):
        raise ValueError(
            f"loss: {type(loss).__name__} has no prox; {algorithm} supports losses with one: "
            "squared_error, cross_entropy, binary_cross_entropy, hinge"
        )


def spectral_norms(problem: Problem, theta: Parameters) -> dict[str, Tensor]:
    """`sigma_t` [S]: the largest singular value of block t's weight, for blocks of one linear layer."""
    weights = [block.linear_weight(views) for block, views in zip(problem.blocks, theta.blocks, strict=True)]
    return {
        f"sigma_{t}": largest_singular_value(weight) for t, weight in enumerate(weights, start=1) if weight is not None
    }


def largest_singular_value(weight: Tensor) -> Tensor:
    """[S], by the eigenvalues of the smaller of WWᵀ and WᵀW, faster than an SVD; not finite where the weight is not.

    Of the weight over its largest entry, whose products cannot overflow.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()  # of halves there are no eigenvalues
    largest = weight.abs().amax((1, 2))
    scale = torch.where(largest.isfinite() & (largest > 0), largest, torch.inf)  # then the quotient is 0
    short = (weight if weight.shape[1] <= weight.shape[2] else weight.mT).nan_to_num() / scale.view(-1, 1, 1)
    squares: Tensor = torch.linalg.eigvalsh(torch.bmm(short, short.mT))
    return squares[:, -1].clamp(min=0.0).sqrt() * largest
