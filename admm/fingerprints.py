"""What a run is, as text: two runs of the same text give the same numbers."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from reprlib import recursive_repr
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from admm.blocks import Blocks
from admm.optimizers.protocol import Optimizer, Problem, State

START = ("initialisation", "outputs")  # what a fingerprint says of the parameters that a run begins with
_FIRST = 64  # rows of an array on the disk, which is not read as a whole
_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")
_LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
_COMPARED = (int, float, str, list, tuple, dict, Tensor, np.ndarray, FunctionType)  # of globals


def fingerprint(problem: Problem, optimizer: Optimizer[Any], state: State, **others: Any) -> dict[str, str]:
    """Return what determines the numbers of a run besides its seeds, as text by name.

    That is the optimizer and its hyperparameters, the network, the cuts, the loss, the augmentation, the data (of a
    stream the number of samples and the first ones), and `others`; to three digits, the mean and the mean size of the
    initial parameters, and the mean size of the outputs of the first network for two samples, which tells of what its
    modules compute. Objects count by their attributes; the code of classes does not count.
    """
    names: list[str] = [f.name for f in fields(optimizer) if f.compare] if is_dataclass(optimizer) else []
    values = {f"optimizer.{name}": getattr(optimizer, name) for name in names}
    values |= {"network": problem.blocks.network, "blocks": problem.blocks.names}
    values |= {"loss": problem.loss, "augmentation": problem.augmentation, "samples": problem.n_samples}
    values |= dict(zip(("x", "y"), problem.data.examples, strict=True)) | others
    flat = state.theta.flat().double()
    start = ", ".join(f"{value:.3g}" for value in (*flat.mean(1).tolist(), *flat.abs().mean(1).tolist()))
    few = tree_map(lambda leaf: leaf[None, :2].expand(len(flat), *leaf[:2].shape), problem.data.examples[0])
    outputs = problem.blocks.forward(state.theta, few)[0].abs().double().mean().item()
    texts = {name: _text(value) for name, value in values.items()} | {"seeds": _text(state.seeds)}
    return {"optimizer": type(optimizer).__name__} | texts | dict(zip(START, (start, f"{outputs:.3g}"), strict=True))


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _hash(numbers.data)


@recursive_repr("…")
def _text(value: Any) -> str:
    """Return a value as text without addresses in memory: of a tensor or an array its type, its shape and a hash of its
    numbers, of a function a hash of its code and what it refers to, of an object of one's own its attributes; of this
    library's functions the name stands for the code."""
    match value:
        case Tensor():
            return f"{value.dtype} {list(value.shape)} {digest(value)}"
        case np.ndarray() if not value.dtype.hasobject:
            numbers = np.ascontiguousarray(value[:_FIRST] if isinstance(value, np.memmap) else value)
            return f"{value.dtype} {list(value.shape)} {_hash(numbers.reshape(-1).view(np.uint8).data)}"
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
        case MethodType():
            return f"{_text(value.__func__)} of {_text(value.__self__)}"
        case FunctionType():
            return _text_of_function(value)
        case type():
            return repr(value)
        case nn.Module():
            return "\n".join([repr(value), *_attributes_of_modules(value)])
    attributes = dict(_attributes(value))
    if is_dataclass(value):
        attributes = {f.name: getattr(value, f.name) for f in fields(value)} | attributes
        return f"{type(value).__name__}({', '.join(f'{name}={_text(item)}' for name, item in attributes.items())})"
    text = _ADDRESS.sub("", repr(value))
    return f"{text} {_text(attributes)}" if attributes and text != repr(value) else text


def _text_of_function(function: FunctionType) -> str:
    """Return a function's name, a hash of its code, and its constants and what it refers to."""
    cells, named = [cell.cell_contents for cell in function.__closure__ or ()], function.__kwdefaults__
    referred = (cells, function.__defaults__, *([named] if named else []))
    if function.__module__.startswith("admm."):
        return f"{function.__qualname__} {_text(referred)}"
    codes = list(_codes(function.__code__))
    code = b"".join(part.co_code + repr(part.co_names).encode() for part in codes)
    constants = [c for part in codes for c in part.co_consts if not isinstance(c, CodeType)]
    text = f"{function.__qualname__} {_hash(code)} {_text((constants, referred))}"
    if not any(folder in Path(function.__code__.co_filename).parents for folder in _LIBRARIES):
        found = {name: function.__globals__.get(name) for part in codes for name in part.co_names}
        if compared := {name: value for name, value in found.items() if isinstance(value, _COMPARED)}:
            text += f" {_text(compared)}"
    return text


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object of one's own class, without what is cached or, in a dataclass, not compared.

    A data set has none, as it may change in use."""
    kind = type(value)
    left_out = {f.name for f in fields(kind) if not f.compare} if is_dataclass(kind) else set()
    if not kind.__module__.startswith(("admm.", "torch.")) and not isinstance(value, Dataset | DataLoader):
        for name, item in getattr(value, "__dict__", {}).items():
            if name not in left_out and not isinstance(getattr(kind, name, None), cached_property):
                yield name, item


def _attributes_of_modules(network: nn.Module) -> Iterator[str]:
    """Yield a line for each attribute of a network's modules that PyTorch does not know, if no tensor is in it."""
    known = vars(nn.Module()).keys()
    for path, module in network.named_modules():
        for name, item in _attributes(module):
            if name not in known and not any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(item)):
                yield f"{path}.{name} = {_text(item)}"


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
