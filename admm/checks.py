"""Validation of arguments: each check raises ValueError that names the argument, its value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from admm.numbers import is_number, is_whole


def one_of(name: str, value: object, valid: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the valid choices."""
    if value not in valid:
        raise ValueError(f"{name}: {shown(value)} is not one of {', '.join(valid)}")


def is_bool(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {shown(value)} is neither True nor False")


def at_least_one(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number from 1 up."""
    if not is_whole(value, 1):
        raise ValueError(f"{name}: {shown(value)} is not a whole number from 1 up")


def in_range(name: str, value: object, below: float = math.inf) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if not is_number(value) or not 0.0 <= value < below:
        bound = "" if below == math.inf else f" and below {below}"
        raise ValueError(f"{name}: {shown(value)} is not a number from 0 up{bound}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number above 0."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name}: {shown(value)} is not a positive number")


def has_type(name: str, value: object, kind: type, such_as: str) -> None:
    """Raise ValueError unless `value` is an instance of `kind`; `such_as` is how to make one."""
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name}: {value.__name__} is a class; give an object of it, such as {such_as}")
    if not isinstance(value, kind):
        raise ValueError(f"{name}: {shown(value)} is no {kind.__name__}, such as {such_as}")


def shown(value: object) -> str:
    """Return a value as text for a message: of a class its name, of a value with a long text what it is.

    >>> shown((torch.zeros(200, 64), torch.zeros(200)))
    'a tuple of a tensor [200, 64] and a tensor [200]'
    """
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__name__}"
    text = repr(value)
    if "\n" not in text and len(text) < 100:
        return text
    if isinstance(value, Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} {list(value.shape)}"
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"a {type(value).__name__} of {' and '.join(map(shown, value))}"
    return f"{text[:96]}…" if isinstance(value, str) else f"an object of {shown(type(value))}"


def check_batch_size(batch_size: int, samples: int, parts: int | None) -> None:
    """Raise ValueError unless 1 <= batch_size <= samples, and each of an epoch's `parts` has a mini-batch."""
    at_least_one("batch_size", batch_size)
    if batch_size > samples:
        raise ValueError(f"batch_size: {shown(batch_size)} is not between 1 and the {samples} training samples")
    batches = math.ceil(samples / batch_size)
    if parts is not None and (not is_whole(parts, 1) or parts > batches):
        raise ValueError(f"epoch_parts: {shown(parts)} is neither None nor from 1 to an epoch's {batches} batches")


def check_modes(name: str, device: str) -> None:
    """Raise RuntimeError in PyTorch's modes that change the tensors or the types of all operations; a `device` is a
    type such as "cuda"."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: called within torch.inference_mode(), whose tensors cannot be trained; call it outside"
        )
    if torch.is_autocast_enabled(device):
        raise RuntimeError(
            f"{name}: called within torch.autocast; call it outside, for blocks of "
            "split(..., execution=Execution(precision='bf16'))"
        )
