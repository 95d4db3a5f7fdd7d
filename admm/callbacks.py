"""Functions that see the evaluations of a run as they come, and may end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from admm.blocks import Parameters
from admm.checkpoints import History, Row
from admm.checks import at_least_one, one_of
from admm.optimizers.protocol import Problem, State

Callback = Callable[[Problem, Any, History, list[Row]], None]  # see `admm.training.train`

# How the names of the scores of `admm.training.evaluate` end, and which of their values are better.
_DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "mse": "min",
    "accuracy": "max",
    "exact_match": "max",
    "r2": "max",
}


class StopTraining(Exception):
    """Raised by a callback, it ends `admm.training.train`, which returns the history."""


@dataclass
class EarlyStopping:
    """A callback that ends training once a quantity has not improved for some evaluations, and keeps the best network.

    Each replica is judged alone: its best evaluation is the first of its highest (lowest) ones up to where its patience
    ends. Training ends with the patience of the last replica, those that have diverged aside. A resumed run keeps what
    was best before, and ends where the uninterrupted one does. Each run needs an object of its own.

    Args:
        quantity: a name in the rows of the history, such as "valid_loss".
        patience: the evaluations in a row without a better value, at least 1; None never ends training.
        mode: "min" if lower is better, "max" if higher is. None takes the better direction of a `loss`, `mse`,
            `accuracy`, `exact_match` or `r2`, as which the name must then end.

    Attributes:
        rows: the row of the best evaluation, by replica.

    Raises:
        ValueError: for a number or a mode that is none, no mode of a quantity of another name, and while training, for
            a quantity that is not measured.

    >>> import torch
    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.optimizers import SGD, Backprop
    >>> from admm.training import train
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> blocks = split(torch.nn.Sequential(torch.nn.Linear(1, 1)), n_blocks=1)
    >>> problem = Problem(x, 2 * x, blocks, SquaredError(), lambda module: None)
    >>> optimizer = Backprop(iterations=100, theta_update=SGD(), step_size=1.0, batch_size=8)
    >>> stopping = EarlyStopping("valid_loss", patience=3)
    >>> state = optimizer.init(problem, seeds=[0])
    >>> history = train(problem, optimizer, state, test={"valid": (x[:2], x[:2])}, callbacks=[stopping])
    >>> state.iteration == stopping.rows[0]["iteration"] + 3
    True
    >>> best = problem.blocks.export(stopping.best(problem))
    """

    quantity: str
    patience: int | None = 10
    mode: Literal["min", "max"] | None = None
    rows: dict[int, Row] = field(default_factory=dict, init=False)
    _since: int = field(default=0, init=False, repr=False)  # the first iteration that it has seen
    _kept: list[Tensor] = field(default_factory=list, init=False, repr=False)  # parameters and buffers, [S, P], [S, B]

    def __post_init__(self) -> None:
        self.mode = _direction(self.quantity) if self.mode is None else self.mode
        one_of("mode", self.mode, ("min", "max"))
        if self.patience is not None:
            at_least_one("patience", self.patience)

    def __call__(self, problem: Problem, state: State, history: History, rows: list[Row]) -> None:
        if not self._kept:
            self._since = state.iteration
        are_over = []
        for replica in range(len(state.seeds)):
            seen = [row for row in history.rows if row["replica"] == replica and row["iteration"] >= self._since]
            best, is_over = self._best(seen)
            if best is not None:
                self.rows[replica] = best
                if best["iteration"] == state.iteration:
                    self._keep(state.theta, replica)
            are_over.append(is_over or replica in history.diverged)
        if all(are_over):
            raise StopTraining(f"{self.quantity} has not improved for {self.patience} evaluations")

    def best(self, problem: Problem) -> Parameters:
        """Return the parameters of each replica at its best evaluation, to be exported or measured.

        Raises ValueError before the first evaluation.
        """
        if not self._kept:
            raise ValueError("best: there has been no evaluation yet")
        flat, buffers = (tensor.to(problem.device) for tensor in self._kept)
        return problem.blocks.parameters(flat, buffers)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the tensors are this object's own."""
        return {"of": [self.quantity, self.mode], "since": self._since, "kept": self._kept}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what `state_dict` has returned, unless it is of another quantity or mode."""
        if saved["of"] == [self.quantity, self.mode]:
            self._since, self._kept = saved["since"], [tensor.clone() for tensor in saved["kept"]]

    def _best(self, rows: Sequence[Row]) -> tuple[Row | None, bool]:
        """Return the best of a replica's rows up to where its patience ends, and whether it has ended."""
        best, highest, sign = 0, -math.inf, 1 if self.mode == "max" else -1
        for place, row in enumerate(rows):
            if self.quantity not in row:
                raise ValueError(f"quantity: {self.quantity!r} is not measured; there are {', '.join(row)}")
            if sign * row[self.quantity] > highest:
                best, highest = place, sign * row[self.quantity]
            elif self.patience is not None and place - best >= self.patience:
                return rows[best], True
        return (rows[best] if rows else None), False

    def _keep(self, theta: Parameters, replica: int) -> None:
        tensors = [theta.flat(), theta.buffers]
        if not self._kept:
            self._kept = [tensor.clone() for tensor in tensors]
        for kept, tensor in zip(self._kept, tensors, strict=True):
            kept[replica] = tensor[replica]


def _direction(quantity: str) -> Literal["min", "max"]:
    """Return the better direction of a score. Raises ValueError for a quantity of another name."""
    for ending, direction in _DIRECTIONS.items():
        if quantity.endswith(ending):
            return direction
    raise ValueError(
        f"mode: None, but {quantity!r} does not end in {', '.join(_DIRECTIONS)}, whose better direction is known; give "
        "'min' if lower is better, 'max' if higher is"
    )
