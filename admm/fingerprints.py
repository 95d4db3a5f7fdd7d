"""What a run is, as text: two runs of the same text give the same numbers."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from admm.blocks import Blocks
from admm.optimizers.protocol import Optimizer, Problem, State
from admm.samples import as_samples
from admm.user_warnings import warn

START = ("initialisation", "outputs")  # what a fingerprint says of the parameters that a run begins with
_FIRST = 64  # rows of an array on the disk, which is not read as a whole
_LINES = 100  # as many parts of an object are told apart; of more, a hash
_UNKNOWN = ", which cannot be compared"
_WRAPPED = ("__func__", "__wrapped__", "fget", "fset", "func")  # the functions of methods, properties and caches
_OF_MODULES = frozenset(vars(nn.Module()))
_Parts = Iterable[tuple[str, Any]]  # by name


def fingerprint(problem: Problem, optimizer: Optimizer[Any], state: State, **others: Any) -> dict[str, str]:
    """Return what determines the numbers of a run besides its seeds, as text by name.

    That is the optimizer and its hyperparameters, the network, the cuts, the loss, the augmentation, the data (of a
    stream the number of samples and the first ones), and `others`; to three digits, the mean and the mean size of the
    initial parameters, and the mean size of the outputs of the first network for two samples, which tells of what its
    modules compute. After these comes what is inside of objects and functions, see `_inside`. A warning names what of
    it cannot be told.
    """
    kind, name = type(optimizer), type(optimizer).__name__
    values = {f"optimizer.{key}": v for key, v in vars(optimizer).items() if not _is_left_out(kind, key)}
    values |= {"network": problem.blocks.network, "blocks": problem.blocks.names}
    values |= {"loss": problem.loss, "augmentation": problem.augmentation, "samples": problem.n_samples}
    samples = dict(zip(("x", "y"), problem.data.examples, strict=True))
    flat = state.theta.flat().double()
    start = ", ".join(f"{value:.3g}" for value in (*flat.mean(1).tolist(), *flat.abs().mean(1).tolist()))
    few = tree_map(lambda leaf: leaf[None, :2].expand(len(flat), *leaf[:2].shape), problem.data.examples[0])
    outputs = problem.blocks.forward(state.theta, few)[0].abs().double().mean().item()
    texts = {name: _text(value) for name, value in (values | samples | others).items()} | {"seeds": _text(state.seeds)}
    made_by = {"optimizer": name} | texts | dict(zip(START, (start, f"{outputs:.3g}"), strict=True))
    parts: dict[str, _Parts] = {k: [("", v)] for k, v in ({"optimizer": kind} | values | others).items()}
    inside = {name: _inside(name, of) for name, of in (parts | {"network": _modules(problem.blocks.network)}).items()}
    return made_by | {f"inside {name}": text for name, text in inside.items() if text != f" = {made_by[name]}"}


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _hash(numbers.data)


def _text(value: Any) -> str:
    """Return a value as text without addresses in memory: of a tensor its type, its shape and a hash of its numbers, of
    a function a hash of its code and what it refers to; of this library's functions the name stands for the code."""
    match value:
        case Tensor():
            return f"{value.dtype} {list(value.shape)} {digest(value)}"
        case int() | float() if not isinstance(value, bool):
            return str(float(value))
        case list() | tuple():
            return f"({', '.join(map(_text, value))})"
        case Mapping():
            return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
        case Blocks():  # whose own text changes as it is used
            return "<admm.blocks.Blocks object>"
        case partial():
            return f"partial({_text((value.func, value.args, value.keywords))})"
        case FunctionType():
            cells, named = [cell.cell_contents for cell in value.__closure__ or ()], value.__kwdefaults__
            referred = (cells, value.__defaults__, *([named] if named else []))
            if value.__module__.startswith("admm."):
                return f"{value.__qualname__} {_text(referred)}"
            codes = list(_codes(value.__code__))
            code = b"".join(part.co_code + repr(part.co_names).encode() for part in codes)
            constants = [c for part in codes for c in part.co_consts if not isinstance(c, CodeType)]
            return f"{value.__qualname__} {_hash(code)} {_text((constants, referred))}"
    if is_dataclass(value) and not isinstance(value, type):
        items = (f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({', '.join(items)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _inside(name: str, parts: _Parts) -> str:
    """Return what `_text` leaves out of the parts of an argument, a line for each number, text, array and code in them.

    An object is its class and its attributes, as pickle takes them, without fields that are not compared and what it
    has cached. A function or class that is neither this library's nor an installed one's is its code, and what that
    refers to. Warns of what is none of these.
    """
    known: dict[int, tuple[Any, list[str]]] = {}
    lines = [f"{place}{line}" for place, part in parts for line in _lines(part, known)]
    unknown = [
        f"{name}{line.removesuffix(_UNKNOWN).replace(' = ', ', a ')}" for line in lines if line.endswith(_UNKNOWN)
    ]
    if unknown:
        warn(
            f"checkpoint: when the run goes on, nothing tells whether {'; '.join(unknown)}, is still the same; if a "
            "change of it makes another run, give another path"
        )
    return "\n".join(lines)


def _lines(value: Any, known: dict[int, tuple[Any, list[str]]]) -> list[str]:
    """Return what a value is and what it is made of; `known` has that of other values, by their address."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return [f" = {_text(value)}"]
    if id(value) not in known:
        known[id(value)] = value, [" = …"]  # within itself
        kind = type(value)
        unknown = [f" = {kind.__qualname__}{_UNKNOWN}"]
        try:
            text, parts = _taken_apart(value)
            lines = [f" = {text}", *(f"{name}{line}" for name, part in parts for line in _lines(part, known))]
        except Exception:  # whatever an object raises that cannot be pickled, such as an open file
            lines = unknown
        if _is_installed(kind) and any(line.endswith(_UNKNOWN) for line in lines):
            lines = unknown  # such as a library's logger, whatever else it holds
        if len(lines) > _LINES:
            lines = [f"{lines[0]} of {len(lines)} parts {_hash(chr(10).join(lines).encode())}"]
        known[id(value)] = value, lines
    return known[id(value)][1]


def _taken_apart(value: Any) -> tuple[str, _Parts]:
    """Return what a value is, as text, and its parts. Raises what pickle does."""
    kind = type(value)
    match value:
        case torch.device():  # a run goes on elsewhere
            return "device", ()
        case nn.Parameter():
            return "parameter", ()
        case Tensor() | np.generic():
            return _text(value), ()
        case np.ndarray() if not value.dtype.hasobject:
            numbers = np.ascontiguousarray(value[:_FIRST] if isinstance(value, np.memmap) else value)
            return f"{value.dtype} {list(value.shape)} {_hash(numbers.reshape(-1).view(np.uint8).data)}", ()
        case ModuleType():
            return value.__name__, ()
        case FunctionType():
            return value.__qualname__, _of_function(getattr(value, "_torchdynamo_orig_callable", value))
        case type():
            return value.__qualname__, [part for cls in filter(_is_own, value.__mro__) for part in _of_class(cls)]
        case DataLoader() | Dataset() if _has_own(type(getattr(value, "dataset", value))):
            samples = as_samples(value, None)  # as of training a stream's: it may change in use
            return kind.__qualname__, [*_own_class(kind), (".n", samples.n), (".first", samples.examples)]
        case DataLoader():
            return kind.__qualname__, [(".dataset", value.dataset), (".collate_fn", value.collate_fn)]
        case nn.Module():
            tensors = [*value.named_parameters(), *value.named_buffers()]
            return kind.__qualname__, [*_modules(value), *((f".{name}", tensor.detach()) for name, tensor in tensors)]
        case ref():
            return "reference", [("()", value())]
    if kind in (list, tuple):
        return kind.__name__, [(f"[{place}]", item) for place, item in enumerate(value)]
    if kind in (set, frozenset):
        return kind.__name__, [("[]", item) for item in sorted(value, key=_text)]
    if kind is dict:
        return kind.__name__, [(f"[{_text(key)}]", item) for key, item in value.items()]
    if _is_of_admm(kind) and not is_dataclass(value):  # such as blocks, which change in use
        return kind.__qualname__, ()
    return kind.__qualname__, [*_own_class(kind), *_of_object(value)]


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function refers to, and if it is no library's its code with the globals that this names."""
    yield ".__defaults__", (function.__defaults__, function.__kwdefaults__)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((f".{name}", cell.cell_contents) for name, cell in cells)
    if not _is_own(function):
        return
    codes = list(_codes(function.__code__))
    constants = [c for code in codes for c in code.co_consts if not isinstance(c, CodeType)]
    yield ".__code__", _hash(b"".join(code.co_code + repr(code.co_names).encode() for code in codes))
    yield ".constants", constants
    yield from ((f".{name}", part) for name, part in vars(function).items())
    steps = [step for code in codes for step in dis.get_instructions(code)]
    named = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = {name for code in codes for name in code.co_names}
    for name in sorted(named & function.__globals__.keys()):
        yield f".{name}", (value := function.__globals__[name])
        if isinstance(value, ModuleType) and _is_own(value):
            yield from ((f".{name}.{of}", vars(value)[of]) for of in sorted(attributes & vars(value).keys()))


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the functions and values of a class, without those of its bases."""
    for name, member in vars(cls).items():
        if isinstance(member, FunctionType):
            yield f".{name}", member
        elif functions := _wrapped(member):
            yield from ((f".{name}{place}", function) for place, function in functions)
        elif not name.startswith(("__", "_abc_")):
            yield f".{name}", member


def _wrapped(value: Any) -> list[tuple[str, Any]]:
    """Return the functions of a method, property or cache."""
    return [(f".{name}", getattr(value, name)) for name in _WRAPPED if hasattr(value, name)]


def _own_class(kind: type) -> _Parts:
    return [(".__class__", kind)] if _has_own(kind) else ()


def _of_object(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what pickle takes of an object."""
    kind = type(value)
    reduced = copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(4)
    if isinstance(reduced, str):
        yield from ((".name", reduced), *_wrapped(value))
        return
    _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    yield from ((f"({place})", item) for place, item in enumerate(arguments) if item is not kind)
    match state:
        case (None | dict(), dict()):  # with slots
            state = (state[0] or {}) | state[1]
    attributes = state if isinstance(state, dict) else {"state": state}
    yield from ((f".{name}", part) for name, part in attributes.items() if not _is_left_out(kind, name))
    yield from ((f"[{place}]", item) for place, item in enumerate(items or ()))
    yield from ((f"[{_text(key)}]", item) for key, item in pairs or ())


def _modules(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes and hooks of each module of a network, without its parameters and buffers."""
    for path, module in network.named_modules():
        place, is_own = f".{path}" if path else "", _has_own(type(module))
        yield from ((f"{place}{name}", part) for name, part in _own_class(type(module)))
        for name, part in vars(module).items():
            if name in _OF_MODULES and name.endswith("_hooks") and part:
                yield f"{place}.{name}", list(part.values())
            elif name not in _OF_MODULES and (is_own or name[0] != "_") and not _is_left_out(type(module), name):
                yield f"{place}.{name}", part


def _is_left_out(kind: type, name: str) -> bool:
    """Whether an attribute is what a property has cached, or a field that is not compared."""
    is_uncompared = is_dataclass(kind) and any(f.name == name and not f.compare for f in fields(kind))
    return is_uncompared or isinstance(getattr(kind, name, None), cached_property)


def _is_of_admm(value: Any) -> bool:
    return f"{value.__module__}.".startswith("admm.")


def _is_own(value: Any) -> bool:
    """Whether a function, a class or a module is neither this library's nor an installed one's."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    package = (name or "builtins").partition(".")[0]
    if package == "admm" or package in sys.stdlib_module_names:
        return False
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    return not any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)


def _has_own(kind: type) -> bool:
    """Whether a class, or one that it is derived from, is no library's."""
    return any(map(_is_own, kind.__mro__))


def _is_installed(kind: type) -> bool:
    """Whether a class is of a library, and no container or function of Python's own."""
    return kind.__module__ not in ("builtins", "functools") and not _is_own(kind) and not _is_of_admm(kind)


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
