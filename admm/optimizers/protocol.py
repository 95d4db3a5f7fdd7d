"""The interface of optimizers: the problem, the state, and what an optimizer promises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from admm.augmentation import Augmentation
from admm.blocks import Blocks, Parameters
from admm.comparison import outputs_of, suited
from admm.crossings import Crossing
from admm.losses import CrossEntropy, FunctionLoss, Loss, is_one_hot, unweighted
from admm.minibatches import gather_shared, minibatches, stateless_rng
from admm.numbers import plain
from admm.visits import Visit


@dataclass(frozen=True)
class Problem:
    """Training data, a network cut into blocks, and a loss.

    Args:
        x: inputs [N, ...] of floating point, a tensor or what `torch.as_tensor` takes.
        y: targets [N, ...] on the same device, as `loss.targets` takes them: for classes, class indices [N], which
            become one-hot, or distributions [N, C].
        blocks: the network, cut by `admm.blocks.split`.
        loss: a `Loss`, or a plain function as `FunctionLoss` takes it.
        initialise: a function that fills a network's parameters in place from PyTorch's global random state, such as
            `admm.models.initialiser("pytorch")`.
        augmentation: random changes of the inputs of mini-batches, for optimizers without variables of each sample.

    Raises:
        ValueError: for inputs or targets that the network or the loss cannot take, a loss that has no value per sample
            or no gradient in the shape of the outputs, and as `admm.comparison.outputs_of` does.

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> blocks = split(mlp(input_shape=2, hidden=[3], classes=2), per_layer=True)
    >>> problem = Problem([[0.0, 1.0], [1.0, 0.0]], [1, 0], blocks, SquaredError(), initialiser("pytorch"))
    >>> problem.y
    tensor([[0., 1.],
            [1., 0.]])
    """

    x: Tensor
    y: Tensor
    blocks: Blocks
    loss: Loss
    initialise: Callable[[nn.Module], None]
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", as_loss(self.loss))
        object.__setattr__(self, "x", self._inputs(self.x))
        object.__setattr__(self, "blocks", suited(self.blocks, self.x))
        object.__setattr__(self, "y", self.targets(self.x, self.y))
        self._check_loss()

    def samples(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Return other inputs [M, ...] and targets, such as a test set, in the form of the training samples.

        Raises ValueError for samples of another shape or on another device, and for targets of another kind.
        """
        x = self._inputs(x).to(self.x.dtype)
        if x.shape[1:] != self.x.shape[1:] or x.device != self.x.device:
            raise ValueError(
                f"x: samples {list(x.shape[1:])} on {x.device}, where training has {list(self.x.shape[1:])} on "
                f"{self.x.device}"
            )
        targets = self.targets(x, y)
        are_classes = self._are_classes(targets)
        if self.has_classes and not are_classes:
            raise ValueError("y: these targets are not one class per sample, as those of training are")
        if are_classes and not self.has_classes:
            given, taken = (unweighted(self.loss, values)[1] for values in (y, targets))
            if taken.shape != as_tensor("y", given).shape:
                raise ValueError("y: these targets are class indices, and those of training are not classes")
        return x, targets

    def targets(self, x: Tensor, y: Any) -> Any:
        """Return the targets of inputs x [M, ...] in the form that the loss takes. Raises ValueError."""
        y = as_tensor("y", y, x.device)
        if not y.ndim or len(x) != len(y):
            raise ValueError(f"problem: {len(x)} inputs x, but {len(y) if y.ndim else 'no'} targets y")
        if y.device != x.device:
            raise ValueError(f"y: is on {y.device}, x on {x.device}; both must be on one device")
        outputs = outputs_of(self.blocks, x)
        self._check_outputs()
        return self.loss.targets(y, outputs.shape[1:], like=outputs)

    @cached_property
    def has_classes(self) -> bool:
        """Whether the targets are one class per sample, or per position of it, so that accuracy is defined."""
        return self._are_classes(self.y)

    @cached_property
    def threshold(self) -> float | None:
        """The threshold of the loss, above which an output means yes, if all targets are 0 or 1; else None."""
        loss, y, _ = unweighted(self.loss, self.y)
        return loss.threshold if isinstance(y, Tensor) and bool(((y == 0) | (y == 1)).all()) else None

    def _are_classes(self, targets: Any) -> bool:
        """Whether targets in the form that the loss takes are one class per sample, or per position of it."""
        loss, y, _ = unweighted(self.loss, targets)
        if isinstance(loss, CrossEntropy):
            return True
        return isinstance(y, Tensor) and y.shape[1:] == outputs_of(self.blocks, self.x).shape[1:] and is_one_hot(y)

    def _inputs(self, inputs: Any) -> Tensor:
        x = as_tensor("x", inputs).detach()
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

    def _check_outputs(self) -> None:
        """Let a plain function get the network's outputs, if they are several, as the network returns them.

        Raises ValueError for other losses.
        """
        crossing, loss = self.blocks.crossings[-1], self.loss
        if len(crossing.shapes) == 1:
            return
        if not isinstance(loss, FunctionLoss):
            raise ValueError(
                f"loss: {type(loss).__name__} takes one output, the network returns {len(crossing.shapes)}; take a "
                "plain function of what it returns and the targets"
            )
        if not isinstance(loss.function, partial):
            object.__setattr__(self, "loss", replace(loss, function=partial(_of_several, loss.function, crossing)))

    def _check_loss(self) -> None:
        """Raise ValueError for a loss that has no value per sample, or no gradient in the shape of the outputs."""
        y = tree_map(lambda leaf: leaf[:2].expand(2, *leaf[:2].shape), self.y)
        outputs = outputs_of(self.blocks, self.x)
        z = outputs.new_zeros(2, len(self.x[:2]), *outputs.shape[1:])
        shapes = f"outputs {list(z.shape)} and targets {tree_map(lambda leaf: list(leaf.shape), y)}"
        try:
            value, gradient = self.loss.value(z, y), self.loss.gradient(z, y)
        except Exception as error:  # whatever the caller's function raises
            raise ValueError(f"loss: cannot be evaluated on {shapes}: {type(error).__name__}: {error}") from error
        if value.shape[:2] != z.shape[:2]:
            raise ValueError(
                f"loss: the value for {shapes} is {list(value.shape)}; expected J of each sample, "
                f"{list(z.shape[:2])}, or of each of its parts"
            )
        if gradient.shape != z.shape:
            raise ValueError(f"loss: the gradient for {shapes} is {list(gradient.shape)}, expected the outputs'")

    def initial(self, seeds: Sequence[int]) -> Parameters:
        """Return initial parameters, one replica per seed. Raises ValueError as `whole_seeds` does."""
        return self.blocks.initial(whole_seeds(seeds), self.initialise, like=self.like)

    @property
    def n_samples(self) -> int:
        """The number N of training samples."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where the samples and all variables are."""
        return self.x.device

    @property
    def like(self) -> Tensor:
        """An empty tensor with the type and the device of the parameters."""
        return torch.empty(0, dtype=self.blocks.dtype, device=self.device)

    def visit(self, seeds: Sequence[int], batch: Tensor | slice, counter: tuple[int, ...] = ()) -> Visit:
        """Return a visit of some samples, in training mode.

        Args:
            seeds: S whole numbers.
            batch: indices [S, B], or a slice of samples, the same for all replicas, for which x and y are views.
            counter: tells the visits of a run apart, see `Visit`.
        """
        if isinstance(batch, Tensor):
            x, y = (gather_shared(data, batch) for data in (self.x, self.y))
        else:
            x, y = (data[batch].expand(len(seeds), *data[batch].shape) for data in (self.x, self.y))
        return Visit(seeds, counter, True, x, y)

    def minibatches(
        self, batch_size: int, seeds: Sequence[int], iteration: int, parts: int | None
    ) -> Iterator[tuple[float, Visit]]:
        """Yield the mini-batches of an iteration, which is an epoch or one of its `parts`.

        Each is the fraction of the iteration before it, and a visit of the inputs [S, B, ...], augmented, and the
        targets [S, B, ...]. Raises ValueError as `admm.minibatches.minibatches` does.
        """
        distinct = list(dict.fromkeys(seeds))  # replicas of one seed share their mini-batches, gathered once
        place = torch.tensor([distinct.index(seed) for seed in seeds], device=self.x.device)
        batches = minibatches(len(self.x), batch_size, distinct, iteration, self.x.device, parts)
        if self.augmentation is not None:
            generators = [stateless_rng(seed, "augmentation", iteration // (parts or 1)) for seed in distinct]
            draws = torch.stack([self.augmentation.draw(len(self.x), rng) for rng in generators]).to(self.x.device)
        for number, batch in enumerate(batches):
            x = gather_shared(self.x, batch)
            if self.augmentation is not None:
                changes = draws.take_along_dim(batch.unsqueeze(2), 1)
                x = self.augmentation.apply(x.flatten(0, 1), changes.flatten(0, 1)).unflatten(0, batch.shape)
            y = gather_shared(self.y, batch)
            if len(distinct) < len(seeds):
                x, y = x.index_select(0, place), y.index_select(0, place)
            yield number / len(batches), Visit(seeds, (iteration, number), True, x, y)

    def refuse_augmentation(self, optimizer: str) -> None:
        """Raise ValueError if there is an augmentation: `optimizer` keeps variables of each sample."""
        if self.augmentation is not None:
            raise ValueError(
                f"augmentation: {optimizer} keeps variables of each sample as it is; take augmentation=None, or one of "
                "OnlineBlockADMM, Gotmare and Backprop"
            )


class State(Protocol):
    """The variables of an optimizer for S replicas: a dataclass with these fields, and whatever else it needs.

    Further fields are tensors, `Parameters`, numbers, text, None, and lists, tuples, dictionaries and dataclasses of
    these, which `admm.checkpoints.save` can store. Tensors have the replica axis S in front unless the state's
    docstring says otherwise.

    Attributes:
        seeds: one whole number per replica, from which all its random numbers follow.
        iteration: the number of finished iterations; `Optimizer.step` counts it.
        theta: the blocks' parameters [S, P], which `Optimizer.step` changes in place; `Blocks.export` makes a copy.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters


StateT = TypeVar("StateT", bound=State)


class Optimizer(ABC, Generic[StateT]):
    """An algorithm: an immutable object with hyperparameters, over an explicit state of tensors.

    Replica s of a state depends on seeds[s] alone, so that a stack of replicas equals runs of one seed each. An
    optimizer never prints, logs, evaluates or reads a clock.
    """

    @abstractmethod
    def init(self, problem: Problem, seeds: Sequence[int]) -> StateT:
        """Return the state before the first iteration.

        Raises ValueError that names the hyperparameter, for one that is out of range, or what else of the problem the
        algorithm cannot take.
        """

    @abstractmethod
    def step(self, problem: Problem, state: StateT) -> StateT:
        """Do one iteration over all N samples (an epoch or a part of one, for mini-batch methods).

        The state is changed in place and returned, its `iteration` counted. The result depends on nothing but the
        problem and the state. Raises ValueError for a problem with other samples than the state was made for, if it
        keeps variables of them.
        """

    def diagnostics(self, problem: Problem, state: StateT) -> dict[str, Tensor]:
        """Return named quantities [S] for the history, such as constraint residuals; the state stays as it is."""
        return {}


def _of_several(function: Callable[[Any, Any], Tensor], crossing: Crossing, z: Tensor, y: Any) -> Tensor:
    """Return the value of a function of a network's outputs, which `crossing` has joined to z [n, d]."""
    return function(crossing.outputs(z)[0], y)


def check_state(optimizer: object, state: Any) -> None:
    """Raise TypeError that names the first field of `State` which an optimizer's state lacks."""
    for name, kind in (("seeds", tuple), ("iteration", int), ("theta", Parameters)):
        if not isinstance(getattr(state, name, None), kind):
            raise TypeError(
                f"state: a {type(state).__name__}, the state of {type(optimizer).__name__}, has no field {name!r} that "
                f"is a {kind.__name__}; a state has seeds, iteration and theta, see admm.optimizers.protocol.State"
            )


def as_loss(loss: Any) -> Loss:
    """Return a loss as it is, or a plain function as a `FunctionLoss`. Raises ValueError for anything else."""
    if isinstance(loss, Loss):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return FunctionLoss(loss)
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    raise ValueError(f"loss: {name} is neither an object of a subclass of admm.losses.Loss nor a function")


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Return a tensor as it is, or one made of an array or a list of numbers, on the device.

    Raises ValueError that names the argument `name` for anything else.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, device=device)
    except Exception as error:  # of whatever type it is
        raise ValueError(
            f"{name}: a {type(value).__name__} is no tensor, nor an array or a list of numbers ({error}); join several "
            "inputs, or a data loader's batches, to one tensor"
        ) from None


def whole_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds as a tuple of Python's integers.

    Raises ValueError unless they are a sequence of one or more whole numbers from 0 up to 2⁶⁴ − 1.
    """
    values = plain(seeds)
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not is_sequence or not all(isinstance(s, int) and 0 <= s < 2**64 for s in values):
        raise ValueError(f"seeds: {seeds!r} is not a sequence of whole numbers from 0 up to 2⁶⁴ − 1, such as [0, 1, 2]")
    return tuple(map(int, values))


def spectral_norms(problem: Problem, theta: Parameters) -> dict[str, Tensor]:
    """Return `sigma_t` [S], the largest singular value of block t's weight, for each block of one linear layer."""
    weights = [block.linear_weight(views) for block, views in zip(problem.blocks, theta.blocks, strict=True)]
    return {
        f"sigma_{t}": largest_singular_value(weight) for t, weight in enumerate(weights, start=1) if weight is not None
    }


def largest_singular_value(weight: Tensor) -> Tensor:
    """Return the largest singular value [S] of a weight [S, d', d]; it is not finite where the weight is not.

    It is the root of the largest eigenvalue of the smaller of WWᵀ and WᵀW, which is faster than an SVD. W is divided by
    its largest entry before, so that the products cannot overflow.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()  # PyTorch has no eigenvalues of half precision
    largest = weight.abs().amax((1, 2))
    scale = torch.where(largest.isfinite() & (largest > 0), largest, torch.inf)  # then the quotient is 0
    short = (weight if weight.shape[1] <= weight.shape[2] else weight.mT).nan_to_num() / scale.view(-1, 1, 1)
    squares: Tensor = torch.linalg.eigvalsh(torch.bmm(short, short.mT))
    return squares[:, -1].clamp(min=0.0).sqrt() * largest
