"""Numbers that a caller gives for options: Python's, NumPy's, and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """`value` with Python's numbers and lists for those of NumPy and for tensors, within lists and mappings too."""
    match value:
        case np.generic() | np.ndarray() | Tensor():
            return value.tolist()
        case list() | tuple():
            return type(value)(map(plain, value))
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is one finite number; true and false are none."""
    value = plain(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether `value` is a whole number from `least` up; true, false and 2.0 are none."""
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Options:
    """Base of the frozen dataclasses of hyperparameters: what they are given as NumPy's numbers or arrays, or as
    tensors, they keep as Python's numbers and lists."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, plain(value))
