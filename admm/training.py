"""The training loop: times the steps, evaluates, finds diverged replicas, saves and resumes."""

from __future__ import annotations

import hashlib
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.files import sweep, whole
from admm.losses import SquaredError
from admm.numbers import is_number, is_whole
from admm.optimizers.coupling import warn_of_label_leak
from admm.optimizers.protocol import Optimizer, Problem, restore, save, size
from admm.schedules import warn_beyond_horizon

Row = dict[str, float]  # one evaluation of one replica
# Samples evaluated at a time, so few that a processor's caches hold what is made of them: images, whose replicas take
# turns; vectors, at most, and of all replicas.
IMAGES, VECTORS, OF_ALL = 128, 2000, 8000


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another run."""


@dataclass
class History:
    """What a run has measured so far.

    rows: for each evaluation and replica `iteration`, `replica`, `seed`, `seconds` (of training alone, for the
    whole stack), what `measure` returns (see `evaluate`), and the optimizer's diagnostics. diverged: by replica, the
    iteration after which it was found not to be finite; it has no rows from there on, but for that before the first
    iteration.
    """

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    diverged: dict[int, int] = field(default_factory=dict)


def evaluate(problem: Problem, theta: Parameters, test: Any) -> dict[str, Tensor]:
    """Scores of a plain forward pass, [S] each: of the training samples (`train_…`) and, unless `test` is None, of
    inputs [M, ...] and targets or class indices (`test_…`). They are `loss`, the mean of J with its scale over the
    samples, and where the targets are

    - one class per sample, or per position of it: `accuracy`, percent whose largest output is the class;
    - several labels per sample, 0 or 1 (`BinaryCrossEntropy`, `Hinge`): `label_accuracy`, percent of the labels that
      are told right, and `exact_match`, percent of the samples of which all are; of one label, `accuracy`;
    - numbers (`SquaredError`): `mse`, the mean square error of an output, and `r2`, 1 − mse / the targets' variance;
    - those of another loss: nothing more.

    Raises ValueError for a test set that does not fit.
    """
    found = {f"train_{name}": value for name, value in _scores(problem, theta, problem.x, problem.y).items()}
    if test is not None:
        if not isinstance(test, tuple | list) or len(test) != 2:
            raise ValueError(f"test: a {type(test).__name__} is no pair of inputs and targets")
        try:
            x, y = problem.samples(*test)
        except ValueError as error:
            raise ValueError(f"test: {error}") from None
        found |= {f"test_{name}": value for name, value in _scores(problem, theta, x, y).items()}
    return found


def _scores(problem: Problem, theta: Parameters, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The scores of these samples, [S] each, by `evaluate`'s names without the prefix."""
    totals: dict[str, Tensor] = {}
    for part, targets in _parts(x, y, len(theta.flat)):
        z = problem.blocks.forward(theta, part.expand(len(theta.flat), *part.shape))
        for name, values in _of_samples(problem, z, targets.expand(len(z), *targets.shape)).items():
            totals[name] = totals.get(name, 0.0) + values.sum(1)
    means = {name: total / len(x) for name, total in totals.items()}
    if "mse" in means:
        variance = y.flatten(1).var(0, correction=0).mean()
        means["r2"] = torch.where(variance > 0, 1.0 - means["mse"] / variance, torch.nan)
    return means


def _of_samples(problem: Problem, z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The scores of each sample of outputs z and targets y [S, n, ...], [S, n] each."""
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


def _mean(values: Tensor) -> Tensor:
    """Over all but the first two axes."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def accuracy(blocks: Blocks, theta: Parameters, x: Tensor, labels: Tensor) -> Tensor:
    """Percent [S] of the samples x [M, ...] whose largest output is their label [M], by a plain forward pass."""
    right = torch.zeros(len(theta.flat), device=x.device)
    for part, label in _parts(x, labels, len(theta.flat)):
        right += (blocks.forward(theta, part.expand(len(theta.flat), *part.shape)).argmax(2) == label).sum(1)
    return 100.0 * right / len(x)


def _parts(x: Tensor, y: Tensor, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples x [N, ...] and what belongs to them y [N, ...], a few at a time, nearly the same number each: a single
    one that is left over could not be normalised."""
    most = min(VECTORS, max(1, OF_ALL // replicas)) if x.ndim == 2 else IMAGES
    parts = math.ceil(len(x) / most)
    return zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)


def train(
    problem: Problem,
    optimizer: Optimizer[Any],
    state: Any,
    iterations: int,
    test: Any = None,
    evaluate_every: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    observe: Callable[[list[Row], History], None] = lambda rows, history: None,
    measure: Callable[[Problem, Parameters, Any], dict[str, Tensor]] = evaluate,
    keep_last: bool = False,
) -> History:
    """Train for `iterations` steps of the optimizer, from the state that its `init` has made, in place.

    test: inputs [M, ...] and class indices [M] or targets, None for none, or what another `measure` takes; that returns
    `train_loss` and other quantities, each [S]. Evaluation takes place before the first iteration, every
    `evaluate_every` and after the last; only `optimizer.step` is timed. With a `checkpoint` path, the state is saved
    there after iterations at least `checkpoint_seconds` apart, and with `keep_last` at the end; a run that finds such a
    file goes on from it as if it had not been interrupted. `observe` is called with the rows of each evaluation, and at
    a resume with all former ones.

    Raises CheckpointError if the file is damaged, after more iterations, or of another run (see `fingerprint`);
    ValueError for samples or targets that do not fit, and for a step that does not count its iteration;
    TypeError for one that returns no state, or a state that cannot be saved; and WriteError if the file cannot be
    written.
    """
    for name, value in (("iterations", iterations), ("evaluate_every", evaluate_every)):
        if not is_whole(value, 1):
            raise ValueError(f"{name}: {value!r} is not a whole number from 1 up")
    if not is_number(checkpoint_seconds) and checkpoint_seconds != math.inf:
        raise ValueError(f"checkpoint_seconds: {checkpoint_seconds!r} is not a number")
    history, path = History(), None if checkpoint is None else Path(checkpoint).expanduser()

    def evaluated() -> list[Row]:
        values = measure(problem, optimizer.parameters(state), test) | optimizer.diagnostics(problem, state)
        rows = _record(optimizer.parameters(state), state, values, history)
        warn_of_label_leak(optimizer, history.rows)
        return rows

    warn_beyond_horizon(optimizer, iterations)
    if path is not None:
        sweep(path)
        save(state)  # raises at once where it could not be
        made_by = fingerprint(problem, optimizer, state, test=test, measure=measure, evaluate_every=evaluate_every)
    if path is not None and path.exists():
        _load(path, made_by, state, history, iterations)
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
        if path is not None and due:
            _save(path, made_by, state, history)
            saved = time.monotonic()
    return history


def timed_step(problem: Problem, optimizer: Optimizer[Any], state: Any) -> float:
    """One iteration; returns its seconds. `state` is then what the step has returned. Raises TypeError where that is no
    state, and ValueError where the iteration is not counted."""
    _synchronize(problem.x.device)
    start, iteration = time.perf_counter(), state.iteration
    returned = optimizer.step(problem, state)
    _synchronize(problem.x.device)
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
        row = {"iteration": state.iteration, "replica": replica, "seed": int(seed), "seconds": history.seconds}
        rows.append(row | {name: column[replica] for name, column in table.items()})
    history.rows += rows
    return rows


def fingerprint(problem: Problem, optimizer: Optimizer[Any], state: Any, **others: Any) -> dict[str, str]:
    """What determines the numbers of a run besides its seeds, as text by name: the optimizer and its hyperparameters,
    the network, the cuts, the loss, the augmentation, the data, and `others`; of the initialisation the mean and the
    mean size of the parameters, to three digits. What a network's own modules compute is not seen."""
    names: list[str] = [field.name for field in fields(optimizer)] if is_dataclass(optimizer) else []
    known = {f"optimizer.{name}": getattr(optimizer, name) for name in names}
    known |= {"network": problem.blocks.network, "blocks": problem.blocks.names}
    known |= {name: getattr(problem, name) for name in ("loss", "augmentation", "x", "y")} | others
    flat = optimizer.parameters(state).flat.double()
    start = ", ".join(f"{value:.3g}" for value in (*flat.mean(1).tolist(), *flat.abs().mean(1).tolist()))
    told = {name: _told(value) for name, value in known.items()}
    return {"optimizer": type(optimizer).__name__} | told | {"seeds": _told(state.seeds), "initialisation": start}


def _told(value: Any) -> str:
    """A value as text without addresses in memory; of a tensor its type, its shape and a hash of its numbers, of a
    function a hash of its code and what it refers to."""
    match value:
        case Tensor():
            numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return f"{value.dtype} {list(value.shape)} {hashlib.sha256(numbers.data).hexdigest()[:12]}"
        case int() | float() if not isinstance(value, bool):
            return str(float(value))
        case list() | tuple():
            return f"({', '.join(map(_told, value))})"
        case dict():
            return f"{{{', '.join(f'{key}: {_told(item)}' for key, item in value.items())}}}"
        case partial():
            return f"partial({_told((value.func, value.args, value.keywords))})"
        case FunctionType():
            code = value.__code__.co_code + repr(value.__code__.co_names).encode()
            referred = [cell.cell_contents for cell in value.__closure__ or ()], value.__defaults__
            constants = [c for c in value.__code__.co_consts if not isinstance(c, CodeType)]
            return f"{value.__qualname__} {hashlib.sha256(code).hexdigest()[:12]} {_told((constants, referred))}"
    if is_dataclass(value) and not isinstance(value, type):
        told = (f"{f.name}={_told(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({', '.join(told)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _save(path: Path, made_by: dict[str, str], state: Any, history: History) -> None:
    saved = save(state)
    content = {"made_by": made_by, "state": saved, "history": vars(history)}
    with whole(path, "the checkpoint", size(saved)) as part, part.open("wb") as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """`made_by`, `state` and `history` of a checkpoint. Raises CheckpointError if it is damaged, or another file."""
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's format; of the checksums that it writes, it reads none
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # whatever a damaged file raises
        raise CheckpointError(f"{path}: is damaged ({error}); delete the file to start anew") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("state", "history")):
        raise CheckpointError(f"{path}: is no checkpoint of `admm.training.train`; give another path")
    return content


def _load(path: Path, made_by: dict[str, str], state: Any, history: History, iterations: int) -> None:
    saved = read_checkpoint(path)
    try:
        # Checkpoints of former versions say the optimizer's class alone, or nothing.
        former = saved.get("made_by") or {"optimizer": saved.get("optimizer", made_by["optimizer"])}
        for name, was in former.items():
            if (now := made_by.get(name, "nothing")) != was:
                raise ValueError(f"it is of another run: {_difference(name, was, now)}")
        if (done := saved["state"].get("iteration", 0)) > iterations:
            raise ValueError(f"it is after iteration {done}, of {iterations} that are asked for")
        restore(state, saved["state"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; delete the file to start anew, or give another path") from None
    vars(history).update(saved["history"])


def _difference(name: str, was: str, now: str) -> str:
    """In one line; of long texts, such as of networks, what is different."""
    if "\n" in was + now:
        pairs = zip(was.splitlines(), now.splitlines(), strict=False)
        was, now = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("shorter", "longer"))
    return f"{name} was {was}, is {now}"
