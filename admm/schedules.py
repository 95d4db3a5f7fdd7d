"""Hyperparameters: a number, one number per replica, or either with a cosine schedule over the run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admm.numbers import is_number, plain

Number = float | Sequence[float]  # a scalar, or one value per replica, [S]; NumPy's and tensors, too
Value = Number | Mapping[str, Any]  # or {start: Number, end: Number}
BlockValue = Value  # or {blocks: [Value, …]}, one per block


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` along half a cosine while the progress of the run goes from 0 to 1."""

    start: float | Tensor
    end: float | Tensor

    @property
    def largest(self) -> float:
        """Of all replicas, over the whole run."""
        return max(float(torch.as_tensor(value).max()) for value in (self.start, self.end))

    def __call__(self, progress: float) -> float | Tensor:
        """The value at `progress`: a float, or a tensor [S]."""
        weight = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.end + (self.start - self.end) * weight


def schedule(name: str, value: Value, replicas: int) -> Schedule:
    """The schedule that `value` stands for. Raises ValueError that names the hyperparameter `name`."""
    if not isinstance(value, Mapping):
        number = per_replica(name, value, replicas)
        return Schedule(number, number)
    if set(value) != {"start", "end"}:
        raise ValueError(f"optimizer.{name}: a schedule is {{start: …, end: …}}, got {dict(value)}")
    return Schedule(*(per_replica(f"{name}.{k}", value[k], replicas) for k in ("start", "end")))


def refresh_schedule(value: Value, replicas: int) -> Schedule:
    """Of the part of the way to the forward pass that coupling variables are moved. Raises ValueError for more than 1,
    and as `schedule` does."""
    refresh = schedule("refresh", value, replicas)
    if refresh.largest > 1.0:
        raise ValueError(f"optimizer.refresh: {value} is more than the whole way to the forward pass, 1")
    return refresh


def block_values(name: str, value: Any, blocks: int) -> list[Any]:
    """T values: `value` for every block, or its own for each from `{blocks: [one per block]}`."""
    value = plain(value)
    if not isinstance(value, Mapping) or "blocks" not in value:
        return [value] * blocks
    if set(value) != {"blocks"} or not isinstance(value["blocks"], Sequence) or len(value["blocks"]) != blocks:
        raise ValueError(f"optimizer.{name}: {dict(value)} is not {{blocks: [{blocks} values, one per block]}}")
    return list(value["blocks"])


def block_schedules(name: str, value: BlockValue, blocks: int, replicas: int) -> list[Schedule]:
    """One a block, T of them. Raises ValueError as `block_values` and `schedule` do."""
    return [schedule(name, of_block, replicas) for of_block in block_values(name, value, blocks)]


def per_replica(name: str, value: Number, replicas: int) -> float | Tensor:
    """A float, or a tensor [S] from a sequence of S numbers. Raises ValueError for another length."""
    value = plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != replicas:
            raise ValueError(f"optimizer.{name}: {len(value)} values for {replicas} replicas (seeds)")
        return torch.tensor([_number(name, v) for v in value], dtype=torch.float64)
    return _number(name, value)


def replica_values(name: str, value: Number, replicas: int) -> Tensor:
    """[S] in float64, from a number or S of them. Raises ValueError as `per_replica` does."""
    return torch.as_tensor(per_replica(name, value, replicas), dtype=torch.float64).expand(replicas).clone()


def positive(name: str, value: Number, replicas: int) -> Tensor:
    """As `replica_values`. Raises ValueError that names the hyperparameter also where one is 0."""
    numbers = replica_values(name, value, replicas)
    if not bool((numbers > 0).all()):
        raise ValueError(f"optimizer.{name}: {value} is not positive")
    return numbers


def _number(name: str, value: object) -> float:
    if is_number(value) and value >= 0:
        return float(value)
    raise ValueError(f"optimizer.{name}: {value!r} is not a number from 0 up or [one per replica]")


def broadcast(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A value [S] shaped to multiply `like` [S, ...]; a float stays as it is."""
    if isinstance(value, float):
        return value
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


def warn_beyond_horizon(optimizer: object, iterations: int) -> None:
    """Warns if training goes on for more iterations than the optimizer's own, at which its schedules end."""
    options = getattr(optimizer, "__dict__", {})
    horizon = options.get("iterations", iterations)
    scheduled = [name for name, value in options.items() if _is_scheduled(value)]
    if iterations > horizon and scheduled:
        warnings.warn(
            f"optimizer.iterations: {horizon}, but training goes on to iteration {iterations}; from {horizon} on "
            f"{', '.join(scheduled)} stay at the end of their schedules. Give both the same number",
            stacklevel=3,
        )


def _is_scheduled(value: Any) -> bool:
    return isinstance(value, Mapping) and ("end" in value or any(map(_is_scheduled, value.get("blocks", ()))))
