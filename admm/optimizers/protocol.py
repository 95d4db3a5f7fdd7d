"""What an optimizer is given, what it promises, and how its state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from admm.augmentation import Augmentation
from admm.blocks import Blocks, Parameters
from admm.losses import Loss
from admm.minibatches import generator, minibatches, rows
from admm.numbers import is_number, is_whole


@dataclass(frozen=True)
class Problem:
    """Training data, a network cut into blocks, and a loss.

    x: inputs [N, ...], y: one-hot targets [N, C], both on one device. `initialise` fills a network's parameters
    in place from PyTorch's global random state. `augmentation` changes the inputs of mini-batches, for optimizers whose
    variables are none of the samples' own.
    """

    x: Tensor
    y: Tensor
    blocks: Blocks
    loss: Loss
    initialise: Callable[[nn.Module], None]
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless there is a target for each input."""
        if len(self.x) != len(self.y):
            raise ValueError(f"problem: {len(self.x)} inputs x, but {len(self.y)} targets y")

    def initial(self, seeds: Sequence[int]) -> Parameters:
        """Freshly initialised parameters, one replica a seed.

        Raises ValueError for other seeds than whole numbers from 0 up, and for a network that cannot be evaluated on x
        or whose outputs are not of the size of targets [N, C].
        """
        if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ValueError(f"seeds: {seeds!r} is not a sequence of whole numbers from 0 up, such as [0, 1, 2]")
        theta = self.blocks.initial(seeds, self.initialise, like=self.x)
        if not self.blocks.execution.compile:  # which would compile for the shape of one sample
            self._check_fit(theta)
        return theta

    def _check_fit(self, theta: Parameters) -> None:
        sample = self.x[:1].expand(len(theta.flat), 1, *self.x.shape[1:])
        try:
            found = self.blocks.forward(theta, sample).shape[2:]
        except RuntimeError as error:
            raise ValueError(f"network: cannot be evaluated on samples {list(self.x.shape[1:])}: {error}") from None
        if self.y.ndim > 1 and found != self.y.shape[1:]:
            raise ValueError(
                f"network: its outputs have the shape {list(found)} a sample, the targets y {list(self.y.shape[1:])}"
            )

    def minibatches(
        self, batch_size: int, seeds: Sequence[int], iteration: int, parts: int | None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """The mini-batches of an iteration, an epoch or one of its `parts`: the part of it that is over, inputs
        [S, B, ...], augmented, and targets [S, B, C]. Raises ValueError as `admm.minibatches.minibatches` does."""
        distinct = list(dict.fromkeys(seeds))  # replicas of one seed share their mini-batches, gathered once
        place = torch.tensor([distinct.index(seed) for seed in seeds], device=self.x.device)
        batches = minibatches(len(self.x), batch_size, distinct, iteration, self.x.device, parts)
        if self.augmentation is not None:
            draws = [generator(seed, "augmentation", iteration // (parts or 1)) for seed in distinct]
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

    All variables have a replica axis S, one replica a seed, in front unless a state says otherwise. `step` works in
    place and returns the state; it never prints, logs, evaluates or reads a clock, and depends on nothing but the
    problem and the state.
    """

    def init(self, problem: Problem, seeds: Sequence[int]) -> State:
        """The state before the first iteration. Raises ValueError for what the algorithm cannot do."""

    def step(self, problem: Problem, state: State) -> State:
        """One iteration over all N samples (an epoch or a part of one, for mini-batch methods)."""

    def parameters(self, state: State) -> Parameters:
        """The blocks' parameters."""

    def diagnostics(self, problem: Problem, state: State) -> dict[str, Tensor]:
        """Named quantities [S] for the history, such as constraint residuals."""


def save(state: Any) -> dict[str, Any]:
    """The state, a dataclass, as plain nested dictionaries of tensors and numbers, for `torch.save`."""
    return {field.name: _plain(getattr(state, field.name)) for field in fields(state)}


def size(saved: Any) -> int:
    """Bytes of all tensors in what `save` has made."""
    if isinstance(saved, Tensor):
        return saved.nbytes
    items = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list) else ()
    return sum(map(size, items))


def restore(state: Any, saved: dict[str, Any]) -> None:
    """Overwrite a freshly initialised state, in place, by what `save` made. Raises ValueError on a mismatch."""
    for field in fields(state):
        if field.name not in saved:
            raise ValueError(f"checkpoint: no {field.name!r}; it was made by another optimizer or version")
        value = getattr(state, field.name)
        if isinstance(value, int):
            setattr(state, field.name, saved[field.name])
        else:
            _overwrite(value, saved[field.name], field.name)


def _plain(value: Any) -> Any:
    if isinstance(value, Parameters):
        return [value.flat, value.buffers] if value.buffers.numel() else value.flat
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _overwrite(value: Any, saved: Any, name: str) -> None:
    if isinstance(value, Parameters):
        value = _plain(value)
    if isinstance(value, Tensor):
        found = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        if found != list(value.shape):
            raise ValueError(f"checkpoint: {name} has shape {found}, expected {list(value.shape)}")
        if saved.dtype != value.dtype:
            raise ValueError(f"checkpoint: {name} is of {saved.dtype}, expected {value.dtype}")
        value.copy_(saved)
    elif isinstance(value, list):
        if not isinstance(saved, list) or len(value) != len(saved):
            entries = len(saved) if isinstance(saved, list) else "no"
            raise ValueError(f"checkpoint: {name} has {entries} entries, expected {len(value)}")
        for item, other in zip(value, saved, strict=True):
            _overwrite(item, other, name)
    elif _plain(value) != saved:
        raise ValueError(f"checkpoint: {name} is {saved}, expected {_plain(value)}")


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
            "squared_error, cross_entropy, hinge"
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
    largest = weight.abs().amax((1, 2))
    scale = torch.where(largest.isfinite() & (largest > 0), largest, torch.inf)  # then the quotient is 0
    short = (weight if weight.shape[1] <= weight.shape[2] else weight.mT).nan_to_num() / scale.view(-1, 1, 1)
    squares: Tensor = torch.linalg.eigvalsh(torch.bmm(short, short.mT))
    return squares[:, -1].clamp(min=0.0).sqrt() * largest
