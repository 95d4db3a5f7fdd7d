"""What a user is told of what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException

from admm.data import DatasetError
from admm.files import WriteError
from admm.training import CheckpointError
from experiments.faces.backbones import BackboneError
from experiments.store import RESUME


class BadInput(Exception):
    """What was asked for cannot be done. The message names the key or file, what was found and what would be right."""


TOLD = (BadInput, BackboneError, CheckpointError, DatasetError, WriteError)  # their messages are all that is to be said


def in_words(error: BaseException) -> str:
    """An error's message: alone where it says all, else after the error's type."""
    if isinstance(error, WriteError):
        return f"{error}.\n{RESUME}"
    return str(error) if isinstance(error, TOLD) else f"{type(error).__name__}: {error}".rstrip(": ")


@contextmanager
def user_errors() -> Iterator[None]:
    """Raises BadInput for an error that bad input raises, and for any of a class or function of the configuration."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(str(error) or repr(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, ImportError, *TOLD)) and str(cause):
            raise BadInput(str(cause)) from error
        place = str(error).splitlines()[0]  # "Error in call to target 'torch.nn.Linear':"
        raise BadInput(f"{place} {in_words(cause)}; hydra.verbose=true shows where") from error


@contextmanager
def one_sample_in_words() -> Iterator[None]:
    """Raises BadInput that names the keys where PyTorch cannot normalise a batch of one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BadInput(f"optimizer.batch_size, or slice_size, leaves one sample alone. {error}") from error
