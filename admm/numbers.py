"""Numbers that a caller gives: those of Python and NumPy, and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """Return `value` with Python's numbers and lists in place of NumPy's and of tensors, also in lists and mappings.

    >>> plain({"step": np.float64(0.5), "sizes": (np.array([1, 2]), 3)})
    {'step': 0.5, 'sizes': ([1, 2], 3)}
    """
    match value:
        case np.generic() | np.ndarray() | Tensor():
            return value.tolist()
        case list() | tuple():
            return type(value)(map(plain, value))
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is one finite number; True and False are not numbers here."""
    value = plain(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether `value` is a whole number from `least` up; True, False and 2.0 are not."""
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Options:
    """The base of frozen dataclasses of hyperparameters.

    A NumPy number or array, or a tensor, becomes a Python number or list when it is stored in a field.
    """

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, plain(value))
