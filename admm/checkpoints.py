"""The history of a run, and its state as a checkpoint from which it goes on."""

from __future__ import annotations

import copy
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from admm.blocks import Parameters
from admm.checks import shown
from admm.files import atomic_write
from admm.fingerprints import START, digest
from admm.optimizers.protocol import Problem, State, check_rules

Row = dict[str, float]  # one evaluation of one replica


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another run."""


_STARTS: dict[Path, tuple[str, dict[str, str]]] = {}  # by checkpoint, a hash of parameters and the start of their run


@dataclass
class History:
    """The measurements of a run so far.

    Attributes:
        rows: one per evaluation and replica, with `iteration`, `replica`, `seed`, `seconds` (of training alone, for the
            whole stack), what `measure` returns (see `admm.training.train`), and the optimizer's diagnostics.
        seconds: the time of all steps.
        compile_seconds: the time beside it that compiling has taken, see `admm.layers.Execution`.
        diverged: the iteration, by replica, after which its numbers are not all finite. Such a replica has no rows from
            there on, except for that before the first iteration. A replica whose loss is finite and has grown a
            thousandfold, of which `train` warns too, goes on, and is not here.
    """

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    diverged: dict[int, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"History of {len(self.rows)} rows, {self.seconds:.3g} seconds"]
        if self.rows:
            lines[0] += f", iterations {self.rows[0]['iteration']} to {self.rows[-1]['iteration']}"
            lines.append(f"  in each row: {', '.join(self.rows[-1])}")
        if self.diverged:
            lines.append(f"  diverged, as iterations by replica: {self.diverged}")
        return "\n".join(lines)


# PyTorch's pytrees would flatten a state, but know neither its dataclasses nor field names for the errors, and cannot
# overwrite tensors in place; so `save` and `restore` walk through states themselves.
def save(state: Any) -> dict[str, Any]:
    """Return a state, a dataclass, as plain nested dictionaries of tensors and numbers, for `torch.save`.

    Parameters become one new tensor [S, P]. All other tensors are those of the state: `Optimizer.step` changes them in
    place, and with them what was saved. `copy.deepcopy(save(state))` is a copy that stays.

    Raises:
        TypeError: for a value that `restore` could not bring back.

    >>> @dataclass
    ... class Momentum:
    ...     iteration: int
    ...     velocity: Tensor
    >>> state = Momentum(iteration=3, velocity=torch.ones(2))
    >>> save(state)
    {'iteration': 3, 'velocity': tensor([1., 1.])}
    >>> fresh = Momentum(iteration=0, velocity=torch.zeros(2))
    >>> restore(fresh, save(state))
    >>> fresh
    Momentum(iteration=3, velocity=tensor([1., 1.]))
    >>> size(save(state))
    8
    """
    return {f.name: _storable(getattr(state, f.name), f.name) for f in fields(state)}


def size(saved: Any) -> int:
    """Return the bytes of all tensors in what `save` has returned."""
    if isinstance(saved, Tensor):
        return saved.nbytes
    items = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list) else ()
    return sum(map(size, items))


def restore(state: Any, saved: dict[str, Any]) -> None:
    """Overwrite a freshly initialised state, in place, by what `save` has returned.

    The state's tensors stay where they are, as whatever else refers to them sees; what was saved is copied, and stays
    as it is when training goes on.

    Args:
        state: such as `Optimizer.init` returns.
        saved: what `save` has returned, or `torch.load` of a file of it.

    Raises:
        TypeError: for what is no state, or nothing that `save` returns, such as a path.
        ValueError: that names the field, for another shape, dtype, number of entries, keys or seeds; and for a state
            of another update rule.
    """
    if not is_dataclass(state) or isinstance(state, type):
        raise TypeError(f"state: {shown(state)} is no state, as optimizer.init returns it")
    if not isinstance(saved, dict):
        raise TypeError(
            f"saved: {shown(saved)} is not what admm.save returns; give save(…) of a state, or torch.load(…) of a file "
            "of that"
        )
    needed = getattr(state, "made_with", {})
    made_with = needed | saved.get("made_with", {})  # which former versions have not saved
    check_rules("saved", made_with, needed)
    saved = saved | {"made_with": made_with}
    for name in [f.name for f in fields(state)]:
        if name not in saved and {"state", "history"} <= saved.keys():
            raise ValueError("saved: is a checkpoint of train(…, checkpoint=…); give the path of its file to train")
        if name not in saved:
            raise ValueError(f"saved: has no {name!r}; it was made by another optimizer or version")
        value = getattr(state, name)
        if name == "seeds" and list(value) != list(saved["seeds"]):
            raise ValueError(f"saved: seeds is {saved['seeds']}, expected {list(value)}")
        setattr(state, name, _restored(value, saved[name], name))


def _storable(value: Any, name: str) -> Any:
    """Return the value of a field as tensors, numbers, text, lists and dictionaries."""
    match value:
        case Parameters():
            return [value.flat(), value.buffers] if value.buffers.numel() else value.flat()
        case Tensor():
            return value.detach()
        case np.generic():
            return value.item()
        case bool() | None:
            return value
        case int() | float() | str():  # also of subclasses, which PyTorch would not load
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
    """Return `value` with what was saved of it: tensors are overwritten in place; an empty value is replaced."""
    if isinstance(value, Parameters):
        flat, buffers = value.flat(), value.buffers
        _restored([flat, buffers] if buffers.numel() else flat, saved, name)
        value.fill(flat)
        return value
    if isinstance(value, list) and value and isinstance(saved, Tensor) and all(isinstance(v, Tensor) for v in value):
        saved = _unflattened(saved, value)  # a former version kept moments as [S, P]
    if isinstance(value, Tensor):
        shape = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        if shape != list(value.shape):
            raise ValueError(f"saved: {name} has shape {shape}, expected {list(value.shape)}")
        if saved.dtype != value.dtype:
            raise ValueError(f"saved: {name} is of {saved.dtype}, expected {value.dtype}")
        value.data.copy_(saved)
        return value
    if value is None or value == [] or value == {}:
        return copy.deepcopy(saved)
    if isinstance(value, list | tuple):
        if not isinstance(saved, list | tuple) or len(value) != len(saved):
            entries = len(saved) if isinstance(saved, list | tuple) else "no"
            raise ValueError(f"saved: {name} has {entries} entries, expected {len(value)}")
        items = [_restored(*pair, name) for pair in zip(value, saved, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        if not isinstance(saved, dict) or value.keys() != saved.keys():
            raise ValueError(f"saved: {name} has the keys {list(saved)}, expected {list(value)}")
        return {key: _restored(item, saved[key], name) for key, item in value.items()}
    if is_dataclass(value) and isinstance(saved, dict):
        restore(value, saved)
        return value
    if is_dataclass(value) or isinstance(saved, Tensor | list | dict):
        raise ValueError(f"saved: {name} is a {type(saved).__name__}, expected a {type(value).__name__}")
    return saved


def _unflattened(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a tensor [S, P] in the shapes of others [S, *shape], or itself where it has another P."""
    sizes, columns = [v[0].numel() for v in like], flat.reshape(len(flat), -1)
    if columns.shape[1] != sum(sizes):
        return [flat]
    return [part.view(-1, *v.shape[1:]) for part, v in zip(columns.split(sizes, 1), like, strict=True)]


def write_checkpoint(
    path: Path, made_by: dict[str, str], problem: Problem, state: Any, history: History, callbacks: Sequence[Any] = ()
) -> None:
    """Write a state, its history and the states of callbacks to a file, whole or not at all.

    Where the run is shared out, process 0 writes what all of them hold, as one process would.

    Raises WriteError if the file cannot be written, and TypeError for a callback's state that could not be brought
    back; in other processes ProcessError. `made_by` is the run's `fingerprint`; see `callback_states`.
    """
    saved = _whole(problem, state)

    def write() -> None:
        states = callback_states(callbacks)
        content = {"made_by": made_by, "state": saved, "history": vars(history), "callbacks": states}
        with atomic_write(path, "the checkpoint", size(saved) + size(states)) as part, part.open("wb") as file:
            torch.save(content, file)

    problem.parallel.together(write if problem.parallel.is_first else lambda: None)


def _whole(problem: Problem, state: Any) -> dict[str, Any]:
    """Return what `save` would of the state of one process; of use in process 0, where the variables of all meet."""
    saved, parallel = save(state), problem.parallel
    if parallel.shares("samples"):
        counts = [len(range(problem.n_samples)[parallel.share(problem.n_samples, r)]) for r in range(parallel.size)]
        for name in getattr(state, "of_samples", ()):
            *parents, last = name.split(".")
            fields_of = reduce(lambda tree, parent: tree[parent], parents, saved)
            fields_of[last] = tree_map(lambda v: parallel.joined(v, counts), fields_of[last])
    if parallel.shares("blocks"):
        leaves, form = tree_flatten(saved)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shapes = parallel.all([leaves[place].shape for place in places])
        for place, of_processes in zip(places, zip(*shapes, strict=True), strict=True):
            owner = next((rank for rank, shape in enumerate(of_processes) if shape.numel()), 0)
            leaves[place] = parallel.brought(leaves[place], of_processes[owner], owner)
        saved = tree_unflatten(leaves, form)
    return saved


def _held(problem: Problem, saved: Any, like: Any) -> Any:
    """Return what a process holds of a state that `_whole` has returned; `like` is what it has saved itself."""
    if problem.parallel.size == 1:
        return saved
    if isinstance(saved, dict) and isinstance(like, dict):
        return {key: _held(problem, value, like.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(like, list) and len(saved) == len(like):
        return [_held(problem, *pair) for pair in zip(saved, like, strict=True)]
    if not isinstance(saved, Tensor) or not isinstance(like, Tensor) or saved.shape == like.shape:
        return saved
    if not like.numel():  # of a block that another process holds
        return like
    return saved[:, problem.part] if saved.shape[1] == problem.n_samples else saved


def start_of(path: Path, state: State) -> dict[str, str]:
    """Return how a state began that has been trained in this process with this checkpoint, if nothing else has changed
    it since then; see `note_start`."""
    parameters, start = _STARTS.get(path.absolute(), ("", {}))
    return start if parameters == digest(state.theta.flat()) else {}


def note_start(path: Path, state: State, made_by: dict[str, str]) -> None:
    """Note what a run's fingerprint says of the parameters that it began with: the state has others now."""
    _STARTS[path.absolute()] = digest(state.theta.flat()), {name: made_by[name] for name in START}


def callback_states(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return the `state_dict` of each callback that has one, as `save` does, by its class and its place among them."""
    return {name: _storable(callback.state_dict(), name) for name, callback in _stateful(callbacks)}


def _stateful(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    with_state = (callback for callback in callbacks if hasattr(callback, "state_dict"))
    return ((f"{type(callback).__name__} {place}", callback) for place, callback in enumerate(with_state))


def _owned(callbacks: Sequence[Any], saved: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return callbacks with the states that a checkpoint has of them.

    A state belongs to the callbacks of its class and, where it has an entry `of`, to those with the same one; of these
    in their order. Raises ValueError for another number of them; none of them is right, and so is a new one.
    """
    now = list(zip(map(_kind, callback_states(callbacks).items()), dict(_stateful(callbacks)).values(), strict=True))
    owned = list[tuple[Any, Any]]()
    for kind in dict.fromkeys(map(_kind, saved.items())):
        owners = [callback for its, callback in now if its == kind]
        states = [item[1] for item in saved.items() if _kind(item) == kind]
        if owners and len(owners) != len(states):
            raise ValueError(
                f"callbacks: {len(owners)} of {kind}, where it has the states of {len(states)}; give as many, or none"
            )
        owned += zip(owners, states, strict=False)
    return owned


def _kind(saved: tuple[str, Any]) -> str:
    """Return whose state this is: the class, and of what it is."""
    (name, _), state = saved[0].split(" "), saved[1]
    return f"{name} of {state['of']}" if isinstance(state, Mapping) and "of" in state else name


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return `made_by`, `state` and `history` of a checkpoint.

    Raises CheckpointError for a damaged file, or one that is no checkpoint.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the path of a file")
    if not _is_archive(path):
        raise CheckpointError(
            f"{path}: is no checkpoint, or a damaged one; give another path, or delete the file if nobody needs it"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch writes checksums, and reads none
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # whatever a damaged file raises
        raise CheckpointError(
            f"{path}: is damaged ({error}); delete the file to start again, or give another path if it is no checkpoint"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("state", "history")):
        raise CheckpointError(f"{path}: is no checkpoint of `admm.training.train`; give another path")
    return content


def _is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does, as PyTorch's files are."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_checkpoint(
    path: Path,
    made_by: dict[str, str],
    problem: Problem,
    state: Any,
    history: History,
    iterations: int,
    callbacks: Sequence[Any] = (),
) -> None:
    """Overwrite a fresh state and history, in place, by those of a checkpoint, and bring callbacks' states back.

    Raises CheckpointError if the file is damaged, of another run than `made_by`, or after more than `iterations`.
    """
    content = read_checkpoint(path)
    try:
        # Checkpoints of former versions have the optimizer's class alone, or nothing.
        maker = content.get("made_by") or {"optimizer": content.get("optimizer", made_by["optimizer"])}
        for name, was in maker.items():
            if (now := made_by.get(name, "nothing")) != was:
                is_trained = name in START and state.iteration
                hint = " after training; give the state that optimizer.init returns" if is_trained else ""
                raise ValueError(f"it is of another run: {_difference(name, was, now)}{hint}")
        if (done := content["state"].get("iteration", 0)) > iterations:
            raise ValueError(f"it is after iteration {done}, of {iterations} that are asked for")
        owned = _owned(callbacks, content.get("callbacks", {}))
        restore(state, _held(problem, content["state"], save(state)))
    except ValueError as error:
        found = str(error).removeprefix("saved: ")
        raise CheckpointError(f"{path}: {found}; delete the file to start again, or give another path") from None
    vars(history).update(content["history"])
    for callback, saved in owned:
        callback.load_state_dict(saved)


def _difference(name: str, was: str, now: str) -> str:
    """Say in one line what a text was and is; of long texts, such as of networks, the first line that differs."""
    if "\n" in was + now:
        pairs = zip(was.splitlines(), now.splitlines(), strict=False)
        was, now = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("shorter", "longer"))
    return re.sub(r"\b(\d+)\.0\b", r"\1", f"{name} was {was}, is {now}")  # `_text` has whole numbers as 1.0
