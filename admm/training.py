"""The training loop: times the steps, evaluates, finds diverged replicas, saves and resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.checkpoints import History, Row, fingerprint, load_checkpoint, save, write_checkpoint
from admm.checks import at_least_one
from admm.files import remove_leftovers
from admm.losses import SquaredError
from admm.minibatches import expand
from admm.numbers import is_number
from admm.optimizers.coupling import warn_of_label_leak
from admm.optimizers.protocol import Optimizer, Problem, State, StateT, check_state
from admm.samples import Samples, Tensors
from admm.schedules import warn_beyond_horizon

# Samples evaluated at a time, so few that a CPU's caches hold their activations: images, whose replicas take turns;
# vectors of one replica at most; and vectors of all replicas.
_EVAL_BATCH_IMAGES, _EVAL_BATCH_VECTORS, _EVAL_ROWS_ALL_REPLICAS = 128, 2000, 8000


def evaluate(problem: Problem, theta: Parameters, test: Any) -> dict[str, Tensor]:
    """Return the scores of a forward pass in evaluation mode, for the training samples and a test set.

    Args:
        problem: the training samples, the blocks and the loss.
        theta: parameters of S replicas.
        test: inputs [M, ...] and targets or class indices; a data set or loader; or None. See `Problem` for their
            forms.

    Returns:
        Scores [S] of the training samples (`train_…`) and the test set (`test_…`): `loss`, the mean of J with its scale
        over the samples, and where the targets are

        - one class per sample, or per position of it: `accuracy`, the percentage whose largest output is the class;
        - several labels per sample, 0 or 1 (`BinaryCrossEntropy`, `Hinge`): `label_accuracy`, the percentage of the
          labels that are predicted right, and `exact_match`, the percentage of the samples of which all are; for one
          label, `accuracy`;
        - numbers (`SquaredError`): `mse`, the mean square error of an output, and `r2`, 1 − mse / targets' variance.

        For targets of other losses there is no further score.

    Raises:
        ValueError: for a test set that does not fit.
    """
    values = {f"train_{name}": value for name, value in _scores(problem, theta, problem.data).items()}
    if test is not None:
        if isinstance(test, Tensor | dict) or (isinstance(test, tuple | list) and len(test) != 2):
            raise ValueError(f"test: a {type(test).__name__} is no pair of inputs and targets, nor a data set")
        try:
            samples = problem.samples(*test) if isinstance(test, tuple | list) else problem.samples(test)
        except ValueError as error:
            raise ValueError(f"test: {error}") from None
        values |= {f"test_{name}": value for name, value in _scores(problem, theta, samples).items()}
    return values


def _scores(problem: Problem, theta: Parameters, samples: Samples) -> dict[str, Tensor]:
    """Return the scores [S] of samples, by `evaluate`'s names without the prefix."""
    totals: dict[str, Tensor] = {}
    spread = _Spread(samples)
    for x, y in _chunks(samples, len(theta.flat)):
        z = problem.blocks.forward(theta, expand(x, len(theta.flat)))
        for name, values in _sample_scores(problem, z, expand(y, len(z))).items():
            totals[name] = totals.get(name, 0.0) + values.sum(1)
        if "mse" in totals:
            spread.add(y)
    means = {name: total / samples.n for name, total in totals.items()}
    if "mse" in means:
        variance = spread.variance()
        means["r2"] = torch.where(variance > 0, 1.0 - means["mse"] / variance, torch.nan)
    return means


def _sample_scores(problem: Problem, z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the scores [S, n] of each sample for outputs z and targets y [S, n, ...]."""
    loss = {"loss": problem.loss.value(z, y).reshape(*z.shape[:2], -1).sum(2)}
    if problem.has_classes:
        return loss | {"accuracy": 100.0 * _mean((z.argmax(-1) == y.argmax(-1)).to(z))}
    if problem.threshold is not None:
        right = ((z > problem.threshold) == (y > 0.5)).to(z)
        if math.prod(right.shape[2:]) == 1:
            return loss | {"accuracy": 100.0 * _mean(right)}
        every = right.flatten(2).amin(2)
        return loss | {"label_accuracy": 100.0 * _mean(right), "exact_match": 100.0 * every}
    return loss | {"mse": _mean((z - y).square())} if isinstance(problem.loss, SquaredError) else loss


class _Spread:
    """The variance of targets: of tensors by PyTorch, of a stream from sums of what comes by, in float64."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.sums = samples, list[Tensor]()

    def add(self, y: Tensor) -> None:
        """Add targets [n, ...]."""
        if not isinstance(self.samples, Tensors):
            near = self.samples.examples[1].flatten(1).double().mean(0)  # without it a large mean would cancel out
            deviation = y.flatten(1).double() - near
            self.sums.append(torch.stack([deviation.sum(0), deviation.square().sum(0)]))

    def variance(self) -> Tensor:
        """Return the mean of the variances of the targets' entries."""
        if isinstance(self.samples, Tensors):
            by_entry: Tensor = self.samples.y.flatten(1).var(0, correction=0)
        else:
            mean, square = torch.stack(self.sums).sum(0) / self.samples.n
            by_entry = square - mean.square()
        return by_entry.mean()


def _mean(values: Tensor) -> Tensor:
    """Return the mean over all axes but the first two."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def accuracy(blocks: Blocks, theta: Parameters, x: Any, labels: Tensor) -> Tensor:
    """Return the percentage [S] of samples x [M, ...] whose largest output, in evaluation mode, is their label [M].

    It is NaN for no samples.
    """
    samples = Tensors(x, labels)
    right = torch.zeros(len(theta.flat), device=samples.device)
    for part, label in _chunks(samples, len(theta.flat)):
        right += (blocks.forward(theta, expand(part, len(theta.flat))).argmax(2) == label).sum(1)
    return 100.0 * right / samples.n


def _chunks(samples: Samples, replicas: int) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets a few at a time, nearly the same number each: a single one that is left over could not
    be normalised."""
    most, x = _EVAL_BATCH_IMAGES, samples.examples[0]
    if isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point():
        most = min(_EVAL_BATCH_VECTORS, max(1, _EVAL_ROWS_ALL_REPLICAS // replicas))
    chunks = max(1, math.ceil(samples.n / most))
    size, larger = divmod(samples.n, chunks)
    ends = list(accumulate(size + (number < larger) for number in range(chunks)))
    return samples.read([slice(*bounds) for bounds in pairwise([0, *ends])])


def train(
    problem: Problem,
    optimizer: Optimizer[StateT],
    state: StateT,
    iterations: int,
    test: Any = None,
    evaluate_every: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    observe: Callable[[list[Row], History], None] = lambda rows, history: None,
    measure: Callable[[Problem, Parameters, Any], dict[str, Tensor]] = evaluate,
    keep_last: bool = False,
) -> History:
    """Train for `iterations` steps of the optimizer.

    Evaluation takes place before the first iteration, every `evaluate_every` iterations and after the last one; only
    `optimizer.step` is timed.

    Args:
        problem: what is trained on.
        optimizer: the algorithm.
        state: the state that `optimizer.init` has returned; it is trained in place.
        iterations: the number of iterations, those before a resume included.
        test: inputs [M, ...] and class indices [M] or targets; a data set or loader; None; or what another `measure`
            takes.
        evaluate_every: iterations between two evaluations.
        checkpoint: a file for the state and the history. A run that finds such a file goes on from it as if it had not
            been interrupted.
        checkpoint_seconds: the least time between two checkpoints.
        observe: a function that gets the rows of each evaluation and the history; at a resume, all rows so far.
        measure: a function that returns `train_loss` and other quantities [S] of the parameters.
        keep_last: whether a checkpoint is written at the end, too.

    Returns:
        The rows of all evaluations, the seconds, and which replicas have diverged.

    Raises:
        CheckpointError: if the checkpoint is damaged, after more iterations, or of another run (see
            `admm.checkpoints.fingerprint`).
        ValueError: for samples or targets that do not fit, and for a step that does not count its iteration.
        TypeError: for a state that lacks a field or cannot be saved, and for a step that returns no state.
        WriteError: if the checkpoint cannot be written.

    Back-propagation fits two stacked replicas, from seeds 0 and 1, to a line:

    >>> from admm.blocks import split
    >>> from admm.models import initialiser
    >>> from admm.optimizers import SGD, Backprop
    >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    >>> blocks = split(torch.nn.Sequential(torch.nn.Linear(1, 1)), n_blocks=1)
    >>> problem = Problem(x, 2 * x + 1, blocks, SquaredError(), initialiser("normal", std=0.1))
    >>> optimizer = Backprop(iterations=30, theta_update=SGD(), step_size=0.5, batch_size=4)
    >>> state = optimizer.init(problem, seeds=[0, 1])
    >>> history = train(problem, optimizer, state, iterations=30, evaluate_every=30)
    >>> [f"{row['train_loss']:.3f}" for row in history.rows if row["iteration"] == 30]
    ['0.000', '0.000']
    >>> problem.blocks.export(state.theta, replica=1)(x[:2]).detach().flatten()
    tensor([-1.0000, -0.4286], dtype=torch.float64)
    """
    _check(iterations, evaluate_every, checkpoint_seconds)
    check_state(optimizer, state)
    history, path = History(), None if checkpoint is None else Path(checkpoint).expanduser()

    def evaluation() -> list[Row]:
        values = measure(problem, state.theta, test) | optimizer.diagnostics(problem, state)
        rows = _record(state, values, history)
        warn_of_label_leak(optimizer, history.rows)
        return rows

    warn_beyond_horizon(optimizer, iterations)
    if path is not None:
        remove_leftovers(path)
        save(state)  # raises at once where it could not be saved
        made_by = fingerprint(problem, optimizer, state, test=test, measure=measure, evaluate_every=evaluate_every)
    if path is not None and path.exists():
        load_checkpoint(path, made_by, state, history, iterations)
        observe(history.rows, history)
    else:
        observe(evaluation(), history)
    last_write = time.monotonic()
    while state.iteration < iterations and len(history.diverged) < len(state.seeds):
        history.seconds += timed_step(problem, optimizer, state)
        at_end = state.iteration == iterations
        if at_end or state.iteration % evaluate_every == 0:
            observe(evaluation(), history)
        is_due = time.monotonic() - last_write >= checkpoint_seconds or (keep_last and at_end)
        if path is not None and is_due:
            write_checkpoint(path, made_by, state, history)
            last_write = time.monotonic()
    return history


def _check(iterations: int, evaluate_every: int, checkpoint_seconds: float) -> None:
    """Raise ValueError for an argument of `train` that is out of range."""
    at_least_one("iterations", iterations)
    at_least_one("evaluate_every", evaluate_every)
    if not is_number(checkpoint_seconds) and checkpoint_seconds != math.inf:
        raise ValueError(f"checkpoint_seconds: {checkpoint_seconds!r} is not a number")


def timed_step(problem: Problem, optimizer: Optimizer[StateT], state: StateT) -> float:
    """Do one iteration and return its seconds; `state` then is what the step has returned.

    Raises TypeError where that is no state, and ValueError where the iteration is not counted.
    """
    _synchronize(problem.device)
    start, iteration = time.perf_counter(), state.iteration
    returned = optimizer.step(problem, state)
    _synchronize(problem.device)
    seconds = time.perf_counter() - start
    if type(returned) is not type(state):
        raise TypeError(
            f"optimizer: the step of {type(optimizer).__name__} returns a {type(returned).__name__}, expected the "
            f"state, a {type(state).__name__}"
        )
    vars(state).update(vars(returned))
    if state.iteration != iteration + 1:
        raise ValueError(
            f"optimizer: after iteration {iteration} the step of {type(optimizer).__name__} leaves state.iteration at "
            f"{state.iteration}, expected {iteration + 1}"
        )
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(state: State, values: dict[str, Tensor], history: History) -> list[Row]:
    """Append the rows of an evaluation to the history, but for diverged replicas, and return them."""
    finite = torch.isfinite(state.theta.flat).all(1) & torch.isfinite(values["train_loss"])
    table = {name: value.tolist() for name, value in values.items()}
    rows = []
    for replica, seed in enumerate(state.seeds):
        if replica in history.diverged:
            continue
        if not finite[replica]:
            history.diverged[replica] = state.iteration
            if state.iteration > 0:
                continue
        row = {"iteration": state.iteration, "replica": replica, "seed": int(seed), "seconds": history.seconds}
        rows.append(row | {name: column[replica] for name, column in table.items()})
    history.rows += rows
    return rows
