"""Errors whose message is meant for the user, and how others become such errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import CheckpointError
from admm.data import DatasetError
from admm.files import WriteError
from experiments.faces.backbones import BackboneError
from experiments.messages import with_key_path
from experiments.store import RESUME

NO_CONFIG = OmegaConf.create()


class BadInput(Exception):
    """Raised for what cannot be run. The message names the key or file, what was found and what would be right."""


# The messages of these errors are all that a user needs; with any other error, the traceback is shown too.
FOR_USERS = (BadInput, BackboneError, CheckpointError, DatasetError, WriteError)


def in_words(error: BaseException) -> str:
    """Return an error's message; it follows the error's type unless the error is one of `FOR_USERS`."""
    if isinstance(error, WriteError):
        return f"{error}.\n{RESUME}"
    return str(error) if isinstance(error, FOR_USERS) else f"{type(error).__name__}: {error}".rstrip(": ")


@contextmanager
def user_errors(config: DictConfig = NO_CONFIG, group: str = "") -> Iterator[None]:
    """Turn errors into BadInput: ValueError and ImportError, and any error of an object that the configuration names.

    The message names the key of `config`; the key is looked for in `group` first.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(with_key_path(str(error), config, group) or repr(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, ImportError, *FOR_USERS)) and str(cause):
            target = re.search(r"^full_key: (.*)$", str(error), re.MULTILINE)
            raise BadInput(with_key_path(str(cause), config, target[1] if target else group)) from error
        place = str(error).splitlines()[0]  # "Error in call to target 'torch.nn.Linear':"
        raise BadInput(f"{place} {in_words(cause)}; hydra.verbose=true shows where") from error
