"""What an override of the command line, `key=value`, means for a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from experiments.identity import NOT_IN_IDENTITY

ROW_FILTERS = ("optimizer", "setting")  # choose among an experiment's rows
ROW_SELECTORS = ("experiment", *ROW_FILTERS, "row")
DECLARED = ("rows", "committed_seeds", "note", "report", "report.*", "method", "method.*")  # by an experiment or a row
OUTSIDE = ("dataset.path",)  # of the identity, as the content counts; but other data are another row
NOT_SEARCHED = ("dataset", "dataset.*", "seeds", "iterations", "search")
REDUCING = ("iterations", "seeds", "model.*", "dataset.first")
COMPARABLE_WITH_PAPER = ("iterations", "seeds", "evaluate_every", "dtype", "optimizer.*")


def parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Return overrides as Hydra reads them. loader: knows the options that `glob(…)` matches. Raises HydraException."""
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def not_key_value(arguments: Sequence[str]) -> str:
    """Return in words what would be right where a command line has words that are neither flags of Hydra's nor
    key=value, such as `optimizer adam` or `--optimizer=adam`; empty for any other."""
    options, others = get_args_parser().parse_known_args(list(arguments))
    wrong = {word for word in (*options.overrides, *others) if not re.match("(?s)~|[^-=][^=]*=.", word)}
    wrong |= {word for word in arguments if word.split("=")[0] == "--experiment"}  # a flag of Hydra's, cut short
    if all(word.endswith("=") for word in wrong):  # an empty value
        return ""
    found = " ".join(word for word in arguments if word in wrong or word == options.experimental_rerun)
    key, *values = [part for part in re.split("[ =]+", found.strip("- ")) if part] or [found]
    if values:
        return f"{found}: write {key}={values[0]}, without spaces{' or dashes' if found[0] == '-' else ''}"
    return f"{found}: is neither key=value nor a flag; a value with spaces needs quotes, as 'seeds=[0, 1]'"


@cache
def key_of(override: str) -> str:
    """Return `a.b` for `a.b=c`, `+a.b=c` and `~a.b`. Raises HydraException for a text that is no override."""
    return parse([override])[0].key_or_group


def names_another_class(override: Override, config: DictConfig) -> bool:
    """Return whether an override gives a node of a configuration as a whole, `key={_target_: …}`, with another
    `_target_` than it has there: the node's keys are not that class's, and merging would keep them."""
    value = None if override.is_delete() or override.is_hydra_override() else override.value()
    if not (isinstance(value, dict) and "_target_" in value):
        return False
    node = OmegaConf.select(config, override.key_or_group)
    there: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) else value
    return bool(value["_target_"] != there.get("_target_"))


def is_of(override: str, keys: Sequence[str]) -> bool:
    """Return whether the override's key is one of these keys, in which `*` stands for any text."""
    return any(fnmatchcase(key_of(override), key) for key in keys)


def chooses_row(override: str) -> bool:
    """Return whether an override chooses the experiment, or a row of it, instead of changing one."""
    return is_of(override, ROW_SELECTORS)


def is_outside_identity(override: str) -> bool:
    """Return whether an override says where and how a run is executed, which its identity leaves out."""
    return any(is_of(override, (key, f"{key}.*")) for key in NOT_IN_IDENTITY)


def changes_row(override: str) -> bool:
    """Return whether an override makes a run differ from the committed row, in its numbers or in what it declares."""
    return is_of(override, (*DECLARED, *OUTSIDE)) or not (chooses_row(override) or is_outside_identity(override))


def reduces(override: str) -> bool:
    """Return whether an override may reduce an experiment: its iterations, seeds, network or data set."""
    return is_of(override, REDUCING)


def is_comparable_with_paper(override: str) -> bool:
    """Return whether an override leaves the data, the network and the loss as the experiment has them."""
    return is_of(override, COMPARABLE_WITH_PAPER)


def is_searched(override: str) -> bool:
    """Return whether an override is a value that a search varies, and not a condition of the search."""
    return not is_of(override, NOT_SEARCHED)
