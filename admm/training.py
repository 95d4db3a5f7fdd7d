"""The training loop: times the steps, evaluates, finds diverged replicas, saves, stops and resumes."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from admm.angles import check_angle_samples, cosines
from admm.blocks import Blocks, Parameters
from admm.callbacks import Callback, StopTraining
from admm.checkpoints import (
    CheckpointError,
    History,
    Row,
    callback_states,
    load_checkpoint,
    note_start,
    save,
    start_of,
    write_checkpoint,
)
from admm.checks import at_least_one, check_modes, has_type, shown
from admm.files import remove_leftovers
from admm.fingerprints import digest, fingerprint
from admm.losses import CrossEntropy, Huber, SquaredError, unweighted
from admm.minibatches import expand
from admm.numbers import is_number
from admm.optimizers.coupling import warn_of_label_leak
from admm.optimizers.protocol import Optimizer, Problem, State, StateT, check_parallel, check_state
from admm.optimizers.running import warn_of_no_effect
from admm.parallel import ALONE, Parallel
from admm.samples import Samples, Tensors
from admm.schedules import warn_beyond_horizon
from admm.user_warnings import warn

# Samples evaluated at a time, so few that a CPU's caches hold their activations: images, whose replicas take turns;
# vectors of one replica at most; and vectors of all replicas.
_EVAL_BATCH_IMAGES, _EVAL_BATCH_VECTORS, _EVAL_ROWS_ALL_REPLICAS = 128, 2000, 8000
GOES_ON = "; the same call goes on"  # the end of the message of an interrupted run with a checkpoint


# The factor by which train_loss must grow for a warning. In the committed runs, 273 curves, it grows by 1.25 at most.
_GROWTH = 1000.0


class DivergenceWarning(UserWarning):
    """A replica has diverged: its parameters or its loss are no longer finite, as `History.diverged` says. Or its loss
    has grown a thousandfold, and it goes on."""


def evaluate(problem: Problem, theta: Parameters, test: Any) -> dict[str, Tensor]:
    """Return the scores of a forward pass in evaluation mode, for the training samples and other sets.

    Args:
        problem: the training samples, the blocks and the loss.
        theta: parameters of S replicas.
        test: a test set, which is inputs [M, ...] and targets or class indices, or a data set or loader (see `Problem`
            for their forms); several sets by name, such as `{"valid": (x, y), "test": (x2, y2)}`; or None.

    Returns:
        Scores [S] of the training samples (`train_…`), the test set (`test_…`) or each set of a name (`valid_…`):
        `loss`, the mean over the samples of J with its scale and weights, and where the targets are

        - one class per sample, or per position of it: `accuracy`, the percentage whose largest output is the class, of
          those whose label is not ignored;
        - several labels per sample, 0 or 1 (`BinaryCrossEntropy`, `Hinge`): `label_accuracy`, the percentage of the
          labels that are predicted right, and `exact_match`, the percentage of the samples of which all are; for one
          label, `accuracy`;
        - numbers (`SquaredError`, `Huber`): `mse`, the mean square error of an output, and `r2`, 1 − mse / targets'
          variance.

        For targets of other losses there is no further score. With weights of samples (`SampleWeighted`), all scores
        are weighted means, divided by Σ w, as with scikit-learn's `sample_weight`; what is minimised is Σ w J over the
        number of samples. Weights of classes and labels enter the loss alone.

    Raises:
        ValueError: for a set that does not fit, and for a name of one that is no text or "train".
    """
    sets = {"train": problem.data} | dict(_other_sets(problem, test))
    scores = {name: _scores(problem, theta, samples) for name, samples in sets.items()}
    return {f"{name}_{score}": value for name, values in scores.items() for score, value in values.items()}


def _other_sets(problem: Problem, test: Any) -> Iterator[tuple[str, Samples]]:
    """Yield the name and the samples, in the form of the training samples, of each set in the `test` of `evaluate`."""
    is_named = isinstance(test, Mapping)
    for name, given in (test if is_named else {} if test is None else {"test": test}).items():
        place = f"test[{name!r}]" if is_named else "test"
        if not isinstance(name, str) or name == "train":
            raise ValueError(f"{place}: the name of a set must be text, and 'train' is that of the training samples")
        if isinstance(given, Tensor | dict) or (isinstance(given, tuple | list) and len(given) != 2):
            raise ValueError(f"{place}: a {type(given).__name__} is no pair of inputs and targets, nor a data set")
        try:
            yield name, problem.samples(*given) if isinstance(given, tuple | list) else problem.samples(given)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _scores(problem: Problem, theta: Parameters, samples: Samples) -> dict[str, Tensor]:
    """Return the scores [S] of samples, by `evaluate`'s names without the prefix."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    spread, chunks = _Spread(problem, samples), _chunks(samples, theta.replicas)
    parallel = problem.parallel if len(chunks) >= problem.parallel.size else ALONE
    for x, y in samples.read(chunks[parallel.share(len(chunks))]):
        z = problem.blocks.forward(theta, expand(x, theta.replicas))
        for name, (values, counted) in _sample_scores(problem, z, y).items():
            totals[name] = totals.get(name, 0.0) + values.sum(1)
            counts[name] = counts.get(name, 0.0) + counted.sum(dtype=torch.float64)
        if "mse" in totals:
            spread.add(y)
    parallel.add_up(*totals.values(), *counts.values(), *spread.sums)
    means = {name: total / float(counts[name]) for name, total in totals.items()}
    if "mse" in means:
        variance = spread.variance()
        means["r2"] = torch.where(variance > 0, 1.0 - means["mse"] / variance, torch.nan)
    return means


def _sample_scores(problem: Problem, z: Tensor, y: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the scores [S, n] of each sample, times what it counts, and what it counts [n], such as its weight.

    Outputs z are [S, n, ...], targets y [n, ...].
    """
    values = problem.loss.value(z, expand(y, len(z)))
    once, scores = z.new_ones(z.shape[1]), {}
    loss, y, weights = unweighted(problem.loss, y)
    if problem.has_classes:
        labels = y if y.ndim < z.ndim - 1 else y.argmax(-1)
        kept = torch.ones_like(labels, dtype=z.dtype)
        if isinstance(loss, CrossEntropy) and loss.ignore_index is not None:
            kept = (labels != loss.ignore_index).to(z)
        scores["accuracy"] = 100.0 * _mean((z.argmax(-1) == labels) * kept), _mean(kept[None])[0]
    elif problem.threshold is not None:
        right = ((z > problem.threshold) == (y > 0.5)).to(z)
        if math.prod(right.shape[2:]) == 1:
            scores["accuracy"] = 100.0 * _mean(right), once
        else:
            scores["label_accuracy"] = 100.0 * _mean(right), once
            scores["exact_match"] = 100.0 * right.flatten(2).amin(2), once
    elif isinstance(loss, SquaredError | Huber):
        scores["mse"] = _mean((z - y).square()), once
    if weights is not None:
        scores = {name: (score * weights, counted * weights) for name, (score, counted) in scores.items()}
    return {"loss": (values.reshape(*z.shape[:2], -1).sum(2), once if weights is None else weights)} | scores


def _variance(y: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over the outputs of the variance of targets [N, d]."""
    if weights is None:
        return y.var(0, correction=0).mean()
    mean = torch.einsum("n,nd->d", weights, y) / weights.sum()
    return torch.einsum("n,nd->d", weights, (y - mean).square()).mean() / weights.sum()


class _Spread:
    """The variance of targets: of tensors by PyTorch, of a stream from sums of what comes by, in float64."""

    def __init__(self, problem: Problem, samples: Samples) -> None:
        self.loss, self.samples = problem.loss, samples
        self.sums: list[Tensor] = []  # Σ w, Σ w (y − near) and Σ w (y − near)², of a stream

    def add(self, targets: Any) -> None:
        """Add targets of n samples."""
        if isinstance(self.samples, Tensors):
            return
        y, weights = self._flat(targets)
        near = self._flat(self.samples.examples[1])[0].mean(0)  # without it a large mean would cancel out
        w = torch.ones_like(y[:, :1]) if weights is None else weights[:, None]
        sums = [(w * (y - near) ** power).sum(0) for power in range(3)]
        self.sums = [total + new for total, new in zip(self.sums, sums, strict=True)] if self.sums else sums

    def variance(self) -> Tensor:
        """Return the mean of the variances of the targets' entries."""
        if isinstance(self.samples, Tensors):
            _, y, weights = unweighted(self.loss, self.samples.y)
            return _variance(y.flatten(1), weights)
        total, first, second = self.sums
        variance: Tensor = (second / total - (first / total).square()).mean()
        return variance

    def _flat(self, targets: Any) -> tuple[Tensor, Tensor | None]:
        _, y, weights = unweighted(self.loss, targets)
        return y.flatten(1).double(), None if weights is None else weights.double()


def _mean(values: Tensor) -> Tensor:
    """Return the mean over all axes but the first two."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def accuracy(blocks: Blocks, theta: Parameters, x: Any, labels: Tensor) -> Tensor:
    """Return the percentage [S] of samples x [M, ...] whose largest output, in evaluation mode, is their label [M].

    It is NaN for no samples.
    """
    samples = Tensors(x, labels)
    right = torch.zeros(theta.replicas, device=samples.device)
    for part, label in samples.read(_chunks(samples, theta.replicas)):
        right += (blocks.forward(theta, expand(part, theta.replicas)).argmax(2) == label).sum(1)
    return 100.0 * right / samples.n


def _chunks(samples: Samples, replicas: int) -> list[slice]:
    """Return slices of the samples that are evaluated at a time, of nearly the same size: a single one that is left
    over could not be normalised."""
    most, x = _EVAL_BATCH_IMAGES, samples.examples[0]
    if isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point():
        most = min(_EVAL_BATCH_VECTORS, max(1, _EVAL_ROWS_ALL_REPLICAS // replicas))
    chunks = max(1, math.ceil(samples.n / most))
    size, larger = divmod(samples.n, chunks)
    ends = accumulate((size + (number < larger) for number in range(chunks)), initial=0)
    return [slice(*bounds) for bounds in pairwise(ends)]


def train(
    problem: Problem,
    optimizer: Optimizer[StateT],
    state: StateT,
    iterations: int | None = None,
    test: Any = None,
    evaluate_every: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    callbacks: Sequence[Callback] = (),
    measure: Callable[[Problem, Parameters, Any], dict[str, Tensor]] = evaluate,
    keep_last: bool = False,
    angle_samples: int | None = None,
) -> History:
    """Train until the optimizer has done `iterations` steps.

    Evaluation takes place before the first iteration, every `evaluate_every` iterations and after the last one; only
    `optimizer.step` is timed.

    With a checkpoint, Ctrl-C takes effect after the iteration under way, when the checkpoint has been written; a second
    one at once. The message of the KeyboardInterrupt says where training has stopped.

    A replica whose parameters or `train_loss` are not finite at an evaluation has diverged, of which a
    `DivergenceWarning` tells. The others go on. A replica whose `train_loss` is more than a thousand times the first
    one of the history goes on, too, with a `DivergenceWarning`. A warning tells of a state that has no iterations left,
    such as one that has been trained before.

    Args:
        problem: what is trained on.
        optimizer: the algorithm.
        state: the state that `optimizer.init` has returned; it is trained in place.
        iterations: the number of iterations, those before a resume included; None means the optimizer's `iterations`,
            at which its schedules end.
        test: a test set, inputs [M, ...] and class indices [M] or targets, or a data set or loader; several sets by
            name, such as `{"valid": (x, y), "test": (x2, y2)}`, for quantities `valid_…` and `test_…`; None; or what
            another `measure` takes.
        evaluate_every: iterations between two evaluations.
        checkpoint: a file for the state and the history. A run that finds such a file goes on from it as if it had not
            been interrupted.
        checkpoint_seconds: the least time between two checkpoints.
        callbacks: functions of the problem, the state, the history and the rows of an evaluation, called after each one
            in turn; at a resume, at once with all rows so far. They leave the state as it is. One that raises
            `admm.callbacks.StopTraining` ends training when the others have been called and the checkpoint, if any, is
            written. What a callback's `state_dict()` returns is kept in checkpoints, and given to its
            `load_state_dict` at a resume, before the call; of several of a class, to that with the same entry `of`.
        measure: a function that returns a dictionary of `train_loss` and other quantities [S] of the parameters, in
            place of `evaluate`.
        keep_last: whether a checkpoint is written at the end, too.
        angle_samples: the number of training samples on whose mean loss the update of the last iteration before each
            evaluation is compared with back-propagation's gradient, as `cosine_t` of each block (see
            `admm.angles.cosines`); None compares nothing. Training itself is the same.

    Returns:
        The rows of all evaluations, the seconds, and which replicas have diverged.

    Raises:
        CheckpointError: if the checkpoint is damaged, after more iterations, or of another run (see
            `admm.fingerprints.fingerprint`).
        ValueError: for an argument of another type, a state of another problem, a network without trained parameters,
            samples or targets that do not fit, no number of iterations, and for a step that does not count its
            iteration.
        RuntimeError: within `torch.inference_mode` or `torch.autocast`.
        TypeError: for a state that lacks a field or cannot be saved, and for a step that returns no state.
        WriteError: if the checkpoint cannot be written.
        ProcessError: where a callback, or the writing of the checkpoint, has failed in another process of a shared run.

    Back-propagation fits two stacked replicas, from seeds 0 and 1, to a line:

    >>> from admm.blocks import split
    >>> from admm.models import initialiser
    >>> from admm.optimizers import SGD, Backprop
    >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    >>> blocks = split(torch.nn.Sequential(torch.nn.Linear(1, 1)), n_blocks=1)
    >>> problem = Problem(x, 2 * x + 1, blocks, SquaredError(), initialiser("normal", std=0.1))
    >>> optimizer = Backprop(iterations=30, theta_update=SGD(), step_size=0.5, batch_size=4)
    >>> state = optimizer.init(problem, seeds=[0, 1])
    >>> history = train(problem, optimizer, state, evaluate_every=30)
    >>> [f"{row['train_loss']:.3f}" for row in history.rows if row["iteration"] == 30]
    ['0.000', '0.000']
    >>> problem.blocks.export(state.theta, replica=1)(x[:2]).detach().flatten()
    tensor([-1.0000, -0.4286], dtype=torch.float64)
    """
    has_type("problem", problem, Problem, "admm.Problem(x, y, blocks, loss, initialise)")
    has_type("optimizer", optimizer, Optimizer, "admm.OnlineBlockADMM(iterations=30, theta_step=1e-3)")
    check_modes("train", problem.device.type)
    iterations = _horizon(optimizer) if iterations is None else iterations
    _check(iterations, evaluate_every, checkpoint_seconds)
    _check_functions(callbacks, measure)
    check_state(problem, optimizer, state)
    check_parallel(optimizer, problem)
    check_angle_samples(angle_samples, problem.n_samples)
    history, path = History(), None if checkpoint is None else Path(checkpoint).expanduser()
    parallel, reported, grown = problem.parallel, set[int](), set[int]()
    compiling, runs = problem.compile_seconds, problem.compiled.runs

    def evaluation(before: Parameters | None) -> list[Row]:
        if parallel.size > 1:
            name = f"Θ after iteration {state.iteration}, although it should be the same to the last bit"
            parallel.check_same({name: digest(state.theta.flat())})
        values = measure(problem, state.theta, test)
        _check_measured(values, state.theta.replicas)
        values = values | optimizer.diagnostics(problem, state)
        if before is not None and angle_samples is not None:
            values |= cosines(problem, state.seeds, before, state.theta, angle_samples)
        rows = _record(state, values, history)
        warn_of_label_leak(optimizer, history.rows)
        return rows

    def former() -> Parameters | None:
        """Return a copy of Θ, for the angles of the next update."""
        return None if angle_samples is None else problem.blocks.copied(state.theta)

    def is_evaluated(iteration: int) -> bool:
        return iteration == iterations or iteration % evaluate_every == 0

    def stops(rows: list[Row]) -> bool:
        """Call the callbacks, and return whether one of them ends training."""
        stopped = False
        if parallel.is_first:
            _warn_of_divergence(state, history, reported)
            _warn_of_growth(rows, history, grown)
        for callback in callbacks:
            try:
                callback(problem, state, history, rows)
            except StopTraining:
                stopped = True
            except KeyboardInterrupt:
                interrupt.has_come = True
        return stopped

    warn_beyond_horizon(optimizer, iterations)
    if path is not None:
        save(state), callback_states(callbacks)  # raise at once where these could not be saved
    if path is not None or parallel.size > 1:
        made_by = fingerprint(
            problem,
            optimizer,
            state,
            test=test,
            measure=measure,
            evaluate_every=evaluate_every,
            angle_samples=angle_samples,
        )
        parallel.check_same({"iterations": str(iterations), "PyTorch": torch.__version__} | made_by)
    if path is not None and parallel.is_first:
        remove_leftovers(path)
    with _HeldInterrupt(path is not None, 1.0 if parallel.size > 1 else 0.0) as interrupt, ExitStack() as at_end:
        if path is not None and _exists(path, parallel):
            made_by |= start_of(path, state)
            load_checkpoint(path, made_by, problem, state, history, iterations, callbacks)
            written, rows = state.iteration, history.rows
        else:
            if state.iteration >= iterations:
                warn(
                    f"state: is after iteration {state.iteration} of {iterations}, so nothing is trained; "
                    "optimizer.init(problem, seeds) makes a new one, and a larger iterations=… goes on with this one"
                )
            written, rows = -1, evaluation(former())
        if path is not None:
            at_end.callback(note_start, path, state, made_by)
        stopped = parallel.together(partial(stops, rows))
        last_write = time.monotonic()
        stopped, interrupted = parallel.any(stopped, interrupt.has_come)
        first = state.iteration + 1
        while not (stopped or interrupted) and state.iteration < iterations and not _all_diverged(history, state):
            before = former() if is_evaluated(state.iteration + 1) else None
            history.seconds += timed_step(problem, optimizer, state)
            history.compile_seconds += problem.compile_seconds - compiling
            compiling = problem.compile_seconds
            if state.iteration == first and parallel.is_first:
                warn_of_no_effect(problem, optimizer, runs)
            if is_evaluated(state.iteration):
                stopped = parallel.together(partial(stops, evaluation(before)))
            is_due = parallel.is_first and time.monotonic() - last_write >= checkpoint_seconds
            stopped, interrupted, is_due = parallel.any(stopped, interrupt.has_come, is_due)
            if path is not None and is_due:
                write_checkpoint(path, made_by, problem, state, history, callbacks)
                written, last_write = state.iteration, time.monotonic()
        if path is not None and written < state.iteration and (stopped or interrupted or keep_last):
            write_checkpoint(path, made_by, problem, state, history, callbacks)
        if interrupted:
            kept = "" if path is None else f"; the checkpoint {path} is written{GOES_ON}"
            raise KeyboardInterrupt(f"stopped after iteration {state.iteration} of {iterations}{kept}")
    return history


def _warn_of_divergence(state: State, history: History, reported: set[int]) -> None:
    """Warn of each replica that has diverged and is not among those reported, which it then is."""
    for replica in history.diverged.keys() - reported:
        warn(
            f"seed {int(state.seeds[replica])} has diverged: its parameters or train_loss are not finite after "
            f"iteration {history.diverged[replica]}, and it has no more rows in the history; try smaller step sizes",
            DivergenceWarning,
        )
    reported.update(history.diverged)


def _warn_of_growth(rows: Sequence[Row], history: History, reported: set[int]) -> None:
    """Warn of each replica whose loss has grown by `_GROWTH` in these rows and is not among those reported."""
    earliest = takewhile(lambda row: row["iteration"] == history.rows[0]["iteration"], history.rows)
    first = {row["replica"]: row["train_loss"] for row in earliest}
    for row in rows:
        replica, start = int(row["replica"]), first.get(row["replica"], math.inf)
        if replica not in reported and row["train_loss"] > _GROWTH * start > 0:
            reported.add(replica)
            warn(
                f"seed {row['seed']}: train_loss is {row['train_loss']:.3g} after iteration {row['iteration']}, "
                f"and was {start:.3g}; try smaller step sizes",
                DivergenceWarning,
            )


def _exists(path: Path, parallel: Parallel) -> bool:
    """Whether there is a checkpoint. Raises CheckpointError where some processes see it and others do not."""
    seen: list[bool] = parallel.all(path.exists())
    if any(seen) and not all(seen):
        raise CheckpointError(
            f"{path}: process {seen.index(False)} does not see the checkpoint that process {seen.index(True)} sees; "
            "give a path in a folder that all machines share"
        )
    return all(seen)


class _HeldInterrupt:
    """A context that holds Ctrl-C back until its end, so that it comes upon whole states; a second one comes at once.

    In a thread other than the main one, and where Ctrl-C does not raise KeyboardInterrupt, nothing changes.

    Args:
        holds: whether it is held back at all.
        grace: seconds in which a second one is taken for the first: torchrun hands on what the terminal has sent, too.

    Attributes:
        has_come: whether there was a Ctrl-C, so that the context is to be left soon.
    """

    def __init__(self, holds: bool, grace: float) -> None:
        self.has_come, self._holds = False, holds and threading.current_thread() is threading.main_thread()
        self._came, self._grace = -math.inf, grace

    def __enter__(self) -> Self:
        self._holds = self._holds and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._holds:
            signal.signal(signal.SIGINT, self._come)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.has_come and kind is None:
            raise KeyboardInterrupt

    def _come(self, *_: object) -> None:
        if self.has_come and time.monotonic() - self._came >= self._grace:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if self.has_come:
            return
        self.has_come, self._came = True, time.monotonic()
        warn(
            "interrupted: this iteration will be finished and the checkpoint written, then training ends. Interrupt "
            "again to end at once"
        )


def _horizon(optimizer: object) -> int:
    """Return an optimizer's own number of iterations. Raises ValueError if it has none."""
    if isinstance(found := getattr(optimizer, "iterations", None), int):
        return found
    raise ValueError(
        f"iterations: None, but {type(optimizer).__name__} has no number of its own; give one here, as in "
        "train(…, iterations=50)"
    )


def _all_diverged(history: History, state: State) -> bool:
    return len(history.diverged) == len(state.seeds)


def _check(iterations: int, evaluate_every: int, checkpoint_seconds: float) -> None:
    """Raise ValueError for an argument of `train` that is out of range."""
    if not is_number(iterations):
        raise ValueError(
            f"iterations: {shown(iterations)} is no number; a test set has a name, as in train(…, test=(x, y))"
        )
    at_least_one("iterations", iterations)
    at_least_one("evaluate_every", evaluate_every)
    if not is_number(checkpoint_seconds) and checkpoint_seconds != math.inf:
        raise ValueError(f"checkpoint_seconds: {shown(checkpoint_seconds)} is not a number")


def _check_functions(callbacks: Any, measure: Any) -> None:
    """Raise ValueError unless `callbacks` are several functions, or other objects that can be called, and `measure` is
    one."""
    if not isinstance(callbacks, list | tuple):
        raise ValueError(f"callbacks: {shown(callbacks)} is no list of functions; take callbacks=[…]")
    for function in callbacks:
        if isinstance(function, type) or not callable(function):
            raise ValueError(f"callbacks: {shown(function)} is no function, and no object such as EarlyStopping(…)")
    if not callable(measure):
        raise ValueError(f"measure: {shown(measure)} is no function")


def _check_measured(values: Any, replicas: int) -> None:
    """Raise ValueError unless what `measure` has returned is a dictionary of tensors [S], with `train_loss`."""
    if not isinstance(values, dict) or "train_loss" not in values:
        raise ValueError(f"measure: it has returned {shown(values)}, which is no dictionary with 'train_loss'")
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (replicas,):
            found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(
                f"measure: its {name!r} is {found}; it must be a tensor [{replicas}], with a number per replica"
            )


def timed_step(problem: Problem, optimizer: Optimizer[StateT], state: StateT) -> float:
    """Do one iteration and return its seconds without those of compiling; `state` then is what the step has returned.

    Raises TypeError where that is no state, and ValueError where the iteration is not counted.
    """
    synchronize(problem.device)
    start, iteration, compiling = time.perf_counter(), state.iteration, problem.compile_seconds
    returned = optimizer.step(problem, state)
    synchronize(problem.device)
    seconds = time.perf_counter() - start - (problem.compile_seconds - compiling)
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


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(state: State, values: dict[str, Tensor], history: History) -> list[Row]:
    """Append the rows of an evaluation to the history, but for diverged replicas, and return them."""
    finite = torch.isfinite(state.theta.flat()).all(1) & torch.isfinite(values["train_loss"])
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
