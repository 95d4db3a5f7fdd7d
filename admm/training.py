"""The training loop: times the steps, evaluates, finds diverged replicas, saves and resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.files import sweep, whole
from admm.optimizers.protocol import Optimizer, Problem, restore, save, size

Row = dict[str, float]  # one evaluation of one replica
# Samples evaluated at a time, so few that a processor's caches hold what is made of them: images, whose replicas take
# turns; vectors, at most, and of all replicas.
IMAGES, VECTORS, OF_ALL = 128, 2000, 8000


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or not of this optimizer, network or seeds."""


@dataclass
class History:
    """What a run has measured so far.

    rows: for each evaluation and replica `iteration`, `replica`, `seed`, `seconds` (of training alone, for the
    whole stack), `train_loss` (the problem's J with its scale, mean over the samples), `train_accuracy` and
    `test_accuracy` (percent), and the optimizer's diagnostics. diverged: by replica, the iteration after which it
    was found not to be finite; it has no rows from there on, but for that before the first iteration.
    """

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    diverged: dict[int, int] = field(default_factory=dict)


def evaluate(problem: Problem, theta: Parameters, test: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """`train_loss`, `train_accuracy` and `test_accuracy` of a plain forward pass, each [S]."""
    loss, right = problem.x.new_zeros(2, len(theta.flat))
    for x, y in _parts(problem.x, problem.y, len(theta.flat)):
        z = problem.blocks.forward(theta, x.expand(len(theta.flat), *x.shape))
        loss += problem.loss.value(z, y).sum(1)
        right += (z.argmax(2) == y.argmax(1)).sum(1)
    return {
        "train_loss": loss / len(problem.x),
        "train_accuracy": 100.0 * right / len(problem.x),
        "test_accuracy": accuracy(problem.blocks, theta, *test),
    }


def accuracy(blocks: Blocks, theta: Parameters, x: Tensor, labels: Tensor) -> Tensor:
    """Percent [S] of the samples x [M, ...] whose largest output is their label [M], by a plain forward pass."""
    right = torch.zeros(len(theta.flat), device=x.device)
    for part, label in _parts(x, labels, len(theta.flat)):
        right += (blocks.forward(theta, part.expand(len(theta.flat), *part.shape)).argmax(2) == label).sum(1)
    return 100.0 * right / len(x)


def _parts(x: Tensor, y: Tensor, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples x [N, ...] and what belongs to them y [N, ...], a few at a time."""
    samples = min(VECTORS, max(1, OF_ALL // replicas)) if x.ndim == 2 else IMAGES
    return zip(x.split(samples), y.split(samples), strict=True)


def train(
    problem: Problem,
    optimizer: Optimizer[Any],
    state: Any,
    iterations: int,
    test: Any,
    evaluate_every: int = 1,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    observe: Callable[[list[Row], History], None] = lambda rows, history: None,
    measure: Callable[[Problem, Parameters, Any], dict[str, Tensor]] = evaluate,
    keep_last: bool = False,
) -> History:
    """Train for `iterations` steps of the optimizer, from the state that its `init` has made, in place.

    test: inputs [M, ...] and class indices [M], or what another `measure` takes; that returns `train_loss` and other
    quantities, each [S]. Evaluation takes place before the first iteration, every `evaluate_every` and after the last;
    only `optimizer.step` is timed. With a `checkpoint` path, the state is saved there after iterations at least
    `checkpoint_seconds` apart, and with `keep_last` at the end; a run that finds such a file goes on from it as if it
    had not been interrupted. `observe` is called with the rows of each evaluation, and at a resume with all former
    ones. Raises CheckpointError if the file is damaged, or of another optimizer, network or seeds, and WriteError if it
    cannot be written.
    """
    if iterations < 1 or evaluate_every < 1:
        raise ValueError(f"iterations ({iterations}) and evaluate_every ({evaluate_every}) must be at least 1")
    history = History()

    def evaluated() -> list[Row]:
        values = measure(problem, optimizer.parameters(state), test) | optimizer.diagnostics(problem, state)
        return _record(optimizer.parameters(state), state, values, history)

    if checkpoint is not None:
        sweep(checkpoint)
    if checkpoint is not None and checkpoint.exists():
        _load(checkpoint, optimizer, state, history)
        observe(history.rows, history)
    else:
        observe(evaluated(), history)
    saved = time.monotonic()
    while state.iteration < iterations and len(history.diverged) < len(state.seeds):
        history.seconds += timed_step(problem, optimizer, state)
        at_end = state.iteration == iterations
        if at_end or state.iteration % evaluate_every == 0:
            observe(evaluated(), history)
        due = time.monotonic() - saved >= checkpoint_seconds or (keep_last and at_end)
        if checkpoint is not None and due:
            _save(checkpoint, optimizer, state, history)
            saved = time.monotonic()
    return history


def timed_step(problem: Problem, optimizer: Optimizer[Any], state: Any) -> float:
    """One iteration, in place; returns its seconds."""
    _synchronize(problem.x.device)
    start = time.perf_counter()
    optimizer.step(problem, state)
    _synchronize(problem.x.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(theta: Parameters, state: Any, values: dict[str, Tensor], history: History) -> list[Row]:
    finite = torch.isfinite(theta.flat).all(1) & torch.isfinite(values["train_loss"])
    table = {name: value.tolist() for name, value in values.items()}
    rows = []
    for replica, seed in enumerate(state.seeds):
        if replica in history.diverged:
            continue
        if not finite[replica]:
            history.diverged[replica] = state.iteration
            if state.iteration > 0:
                continue
        row = {"iteration": state.iteration, "replica": replica, "seed": seed, "seconds": history.seconds}
        rows.append(row | {name: column[replica] for name, column in table.items()})
    history.rows += rows
    return rows


def _save(path: Path, optimizer: Optimizer[Any], state: Any, history: History) -> None:
    saved = save(state)
    content = {"optimizer": type(optimizer).__name__, "state": saved, "history": vars(history)}
    with whole(path, "the checkpoint", size(saved)) as part, part.open("wb") as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """`optimizer`, its class's name, `state` and `history` of a checkpoint. Raises CheckpointError if it is damaged, or
    another file."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); delete the file to start anew") from None
    if not isinstance(content, dict) or not {"state", "history"} <= content.keys():
        raise CheckpointError(f"{path}: is no checkpoint of `admm.training.train`; give another path")
    return content


def _load(path: Path, optimizer: Optimizer[Any], state: Any, history: History) -> None:
    saved, own = read_checkpoint(path), type(optimizer).__name__
    try:
        if saved.get("optimizer", own) != own:  # those of former versions do not say it
            raise ValueError(f"checkpoint: of {saved['optimizer']}, expected {own}")
        restore(state, saved["state"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; delete the file to start anew") from None
    vars(history).update(saved["history"])
