"""The global random numbers of PyTorch (on the processor), NumPy and Python: set for a time, and set back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Set the global random numbers back at the end to what they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def other_random_states() -> tuple[Any, ...]:
    """Return the states of NumPy's and Python's global generators, to be compared."""
    return pickle.dumps(np.random.get_state()), random.getstate()


def seed_all(number: int) -> None:
    """Let all of them follow from a whole number."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextmanager
def all_seeded(number: int) -> Iterator[None]:
    """Let all of them follow from a whole number until the end, and set them back then."""
    with random_numbers_kept():
        seed_all(number)
        yield
