"""Errors whose message is meant for the user, and how others become such errors."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from importlib import import_module
from inspect import getmembers, signature
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import CheckpointError
from admm.data import DatasetError
from admm.files import WriteError
from admm.parallel import ProcessError
from experiments.faces.backbones import BackboneError
from experiments.messages import in_suites_words, with_key_path
from experiments.store import RESUME

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # its errors are raised too, and told in words below
NO_CONFIG = OmegaConf.create()


class BadInput(Exception):
    """Raised for what cannot be run. The message names the key or file, what was found and what would be right."""


# The messages of these errors are all that a user needs; with any other error, the traceback is shown too.
FOR_USERS = (BadInput, BackboneError, CheckpointError, DatasetError, ProcessError, WriteError)


def in_words(error: BaseException) -> str:
    """Return an error's message; it follows the error's type unless the error is one of `FOR_USERS`."""
    if isinstance(error, WriteError):
        return f"{error}.\n{RESUME}"
    if isinstance(error, FOR_USERS):
        return in_suites_words(str(error))
    return f"{type(error).__name__}: {error}".rstrip(": ")


@contextmanager
def user_errors(config: DictConfig = NO_CONFIG, group: str = "") -> Iterator[None]:
    """Turn errors into BadInput: ValueError and ImportError, and any error of an object that the configuration names.

    The message names the key of `config`; the key is looked for in `group` first.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        if missing := missing_name(str(error)):
            groups = {str(key): node for key, node in config.items() if isinstance(node, DictConfig)}
            keys = [f"{key}._target_: " for key, node in groups.items() if repr(node.get("_target_")) in str(error)]
            raise BadInput("".join([*keys[:1], missing])) from error
        raise BadInput(with_key_path(str(error), config, group) or repr(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        target = re.search(r"^full_key: (.*)$", str(error), re.MULTILINE)
        key = target[1] if target else group
        if missing := missing_name(str(cause)):
            raise BadInput(f"{key}._target_: {missing}") from error
        if isinstance(cause, (ValueError, ImportError, *FOR_USERS)) and str(cause):
            raise BadInput(with_key_path(str(cause), config, key)) from error
        if wrong := not_callable(str(error), OmegaConf.select(config, f"{key}._target_")):
            raise BadInput(f"{key}._target_: {wrong}") from error
        place = str(error).splitlines()[0]  # "Error in call to target 'torch.nn.Linear':"
        if refused := refused_argument(place, cause):
            whole = f"; '{key}={{_target_: …}}' replaces all of its keys" if key and not refused.endswith("?") else ""
            raise BadInput(f"{key}.{refused}{whole}".lstrip(".")) from error
        raise BadInput(f"{place} {in_words(cause)}; hydra.verbose=true shows where") from error


def missing_name(message: str) -> str:
    """Return in words what is missing where Hydra has not found a target, and the nearest name that is there; empty for
    another message."""
    if not (named := re.match(r"Error loading '([^']+)'", message)):
        return ""
    if not re.fullmatch(r"\w[\w.]*", named[1]):
        dotted = re.sub(r"[:/\\]+", ".", re.sub(r"\.py(?=:|$)", "", named[1])).strip(".")
        return f"{named[1]} is written with dots alone: {dotted}"
    module, _, name = named[1].rpartition(".")
    if not module:
        return f"{name} has no module before it, as in my_networks.{name}"
    try:
        names = dir(import_module(module))
    except Exception as error:  # whatever a module can raise
        missing = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
        if not (missing and f"{module}.".startswith(f"{missing}.")):
            return f"{module} cannot be imported: {in_words(error)}"
        files = [path.stem for path in Path.cwd().glob("*.py")]
        return f"there is no module {missing!r}, here in {Path.cwd()} or installed{meant(missing, files)}"
    return "" if name in names else f"{module} has no {name!r}{meant(name, names)}"


def not_callable(message: str, target: object) -> str:
    """Return in words that a target is a module or a value, and functions and classes of a module; empty for another
    message than Hydra's of it."""
    if not (kind := re.match(r"Expected a callable target, got .* of type '(\w+)'\n", message)):
        return ""
    there = getmembers(get_object(target), callable) if isinstance(target, str) else []
    own = [f"{target}.{name}" for name, value in there if getattr(value, "__module__", "") == target]
    return (
        f"{target} is of type {kind[1]}; write a function or a class{', such as ' if own else ''}{', '.join(own[:5])}"
    )


def refused_argument(place: str, cause: BaseException) -> str:
    """Return in words that a target does not take an argument, and which it takes; empty for another cause."""
    target = re.search(r"target '([\w.]+)'", place)
    name = target[1].rpartition(".")[2] if target else ""
    words = r"(?:got an unexpected keyword argument '(\w+)'|takes no arguments)"
    refused = re.match(rf"{name}(?:\.__init__)?\(\) {words}", str(cause))
    if not (target and refused):
        return ""
    takes = list(signature(get_object(target[1])).parameters)
    argument = refused[1] or "_target_"
    return f"{argument}: {name}() takes {', '.join(takes) or 'no arguments'}{meant(argument, takes)}"


def meant(name: str, names: Iterable[str]) -> str:
    """Return a question whether those of these names were meant that contain the name, from three letters up, or else
    the nearest by spelling; empty if there is none."""
    names = list(names)
    close = [other for other in names if len(name) > 2 and name in other] or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def found_here(group: str, name: str) -> str:
    """Return in words how a file of configuration is found that is in a folder of the current one; empty for none."""
    found = next(Path().glob(f"*/{group}/{escape(name)}.yaml"), None)
    return f"; --config-dir {found.parts[0]} finds {found}" if found else ""
