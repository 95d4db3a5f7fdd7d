"""Hyperparameters that are a number, one number per replica, or a schedule of either over the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from admm.checks import shown
from admm.numbers import is_number, plain
from admm.user_warnings import warn

Number = float | Sequence[float]  # a scalar, or one value per replica [S]; arrays and tensors are sequences, too
# A number, {"start": Number, "end": Number}, or a function of the progress from 0 to 1.
Value = Number | Mapping[str, Any] | Callable[[float], Number]
BlockValue = Value  # or {"blocks": [Value, …]}, one per block


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` along half a cosine while the progress of the run goes from 0 to 1.

    Args:
        start: the first value, a number or a tensor [S].
        end: the last value, also for a progress above 1.

    >>> at = Schedule(start=1.0, end=0.0)
    >>> at(0.0), round(at(0.25), 3), round(at(0.5), 3), at(1.0)
    (1.0, 0.854, 0.5, 0.0)
    """

    start: float | Tensor
    end: float | Tensor

    @property
    def largest(self) -> float:
        """The largest value of all replicas over the whole run."""
        return max(float(torch.as_tensor(value).max()) for value in (self.start, self.end))

    def is_always(self, value: float) -> Tensor:
        """Return whether this is one value over the whole run, [] or [S]; of a function it is not known to be."""
        return (torch.as_tensor(self.start) == value) & (torch.as_tensor(self.end) == value) & (type(self) is Schedule)

    def __call__(self, progress: float) -> float | Tensor:
        """Return the value at `progress`, a float or a tensor [S]."""
        weight = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.end + (self.start - self.end) * weight

    def table(self, progress: Sequence[float], replicas: int) -> float | Tensor:
        """Return the values for each progress and replica, [K, S] in float64, or the float that all are."""
        values = [self(p) for p in progress]
        if isinstance(values[0], float) and type(self) is Schedule and self.start == self.end:
            return values[0]
        if isinstance(values[0], float):
            return torch.tensor(values, dtype=torch.float64).unsqueeze(1).expand(-1, replicas)
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).expand(replicas) for value in values])


@dataclass(frozen=True)
class OwnSchedule(Schedule):
    """A value that a function gives.

    Args:
        start, end: its values at the progress 0 and 1.
        at: the value, a number or a tensor [S], at a progress in [0, 1].
    """

    at: Callable[[float], float | Tensor]

    @property
    def largest(self) -> float:
        """The largest value of all replicas at a progress of 0, 0.01, …, 1."""
        return max(float(torch.as_tensor(self.at(percent / 100)).max()) for percent in range(101))

    def __call__(self, progress: float) -> float | Tensor:
        return self.at(min(progress, 1.0))


def schedule(name: str, value: Value, replicas: int) -> Schedule:
    """Return the schedule that the `value` of the hyperparameter `name` stands for.

    Args:
        name: the argument that an error names.
        value: a number; S numbers; {"start": …, "end": …} with either, for half a cosine; or a function that returns
            either for the progress of the run, a number from 0 to 1.
        replicas: S.

    Raises:
        ValueError: for another value, or a number below 0 or not finite. The values of a function are checked as they
            are used, those at 0 and 1 at once.

    >>> schedule("step", {"start": [0.1, 0.2], "end": 0.0}, replicas=2)(0.5)
    tensor([0.0500, 0.1000], dtype=torch.float64)

    A function that warms up for a tenth of the run and then follows a cosine, for `step_size=warm_up`:

    >>> def warm_up(progress):
    ...     return 0.1 * min(10 * progress, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))
    >>> [round(schedule("step", warm_up, replicas=1)(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if callable(value):
        at = partial(_value_at, name, value, replicas)
        return OwnSchedule(at(0.0), at(1.0), at)
    if not isinstance(value, Mapping):
        number = per_replica(name, value, replicas, or_else=", a schedule {'start': …, 'end': …}")
        return Schedule(number, number)
    if "blocks" in value:
        raise ValueError(f"{name}: takes no values per block, got {dict(value)}; z_step and beta do")
    if set(value) != {"start", "end"}:
        raise ValueError(f"{name}: a schedule is {{'start': …, 'end': …}}, got {dict(value)}")
    return Schedule(*(per_replica(f"{name}.{k}", value[k], replicas) for k in ("start", "end")))


def _value_at(name: str, function: Callable[[float], Number], replicas: int, progress: float) -> float | Tensor:
    return per_replica(f"{name}: at progress {progress:g}", function(progress), replicas)


def block_values(name: str, value: Any, blocks: int) -> list[Any]:
    """Return T values: `value` for every block, or one for each from `{"blocks": [one per block]}`.

    Raises ValueError for another number of values.

    >>> block_values("beta", {"blocks": [1.0, 5.0]}, blocks=2)
    [1.0, 5.0]
    """
    value = plain(value)
    if not isinstance(value, Mapping) or "blocks" not in value:
        return [value] * blocks
    of_blocks = value["blocks"]
    if set(value) != {"blocks"} or not isinstance(of_blocks, Sequence):
        raise ValueError(f"{name}: {dict(value)} is not {{'blocks': [{blocks} values, one per block]}}")
    if len(of_blocks) != blocks:
        raise ValueError(f"{name}: has {len(of_blocks)} values for blocks; {blocks} are needed")
    return list(of_blocks)


def block_schedules(name: str, value: BlockValue, blocks: int, replicas: int) -> list[Schedule]:
    """Return T schedules, one per block. Raises ValueError as `block_values` and `schedule` do."""
    return [schedule(name, block_value, replicas) for block_value in block_values(name, value, blocks)]


def per_replica(name: str, value: Number, replicas: int, or_else: str = "") -> float | Tensor:
    """Return a number as a float, or S numbers as a tensor [S] in float64.

    Raises ValueError for another length, or a number below 0; `or_else` is what the message offers, too.
    """
    value = plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != replicas:
            raise ValueError(f"{name}: {len(value)} values for {replicas} replicas (seeds)")
        return torch.tensor([_number(name, v, or_else) for v in value], dtype=torch.float64)
    return _number(name, value, or_else)


def replica_values(name: str, value: Number, replicas: int) -> Tensor:
    """Return a tensor [S] in float64 from a number or S numbers. Raises ValueError as `per_replica` does."""
    return torch.as_tensor(per_replica(name, value, replicas), dtype=torch.float64).expand(replicas).clone()


def positive(name: str, value: Number, replicas: int) -> Tensor:
    """Return the tensor [S] of `replica_values`. Raises ValueError also where a number is 0."""
    numbers = replica_values(name, value, replicas)
    if not bool((numbers > 0).all()):
        raise ValueError(f"{name}: {value} is not positive")
    return numbers


def _number(name: str, value: object, or_else: str) -> float:
    if is_number(value) and value >= 0:
        return float(value)
    raise ValueError(f"{name}: {shown(value)} is not a number from 0 up; give one{or_else}, or a list, one per replica")


def broadcast(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a value [S] in the shape [S, 1, …] that multiplies `like` [S, ...]; a float stays as it is."""
    if isinstance(value, float):
        return value
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


def warn_beyond_horizon(optimizer: object, iterations: int) -> None:
    """Warn if training goes on for more iterations than the optimizer's `iterations`, at which its schedules end."""
    options = getattr(optimizer, "__dict__", {})
    horizon = options.get("iterations", iterations)
    scheduled = [name for name, value in options.items() if _is_scheduled(value)]
    if iterations > horizon and scheduled:
        warn(
            f"iterations: {horizon}, but training goes on to iteration {iterations}; from {horizon} on the end of the "
            f"schedule holds for {', '.join(scheduled)}. Give both the same number"
        )


def _is_scheduled(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "end" in value or any(map(_is_scheduled, value.get("blocks", ())))
    return callable(value)
