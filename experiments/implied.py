"""Overrides of the command line that follow from others, so that nobody has to say them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.rows import CONF

REFUSED = re.compile(r"(?:Could not (?:override|delete from config\.) '|Error merging override )(?!hydra\.)([\w.]+)")
OWN_DATA = ("npz", "image_folder")  # options of the group dataset


def with_implied(overrides: Sequence[str]) -> list[str]:
    """Return a command line's overrides with those that they imply, unless it says otherwise.

    - `split.after=…` implies `split=after`, as `split.n_blocks` and `split.per_layer` do their groups.
    - `model._target_=…` implies `model=own` and `init=as_constructed`. `model.key=…` of such a network adds the key.
    - `dataset.channels=…` adds the key, which not every data set shows.
    - Own data or an own network imply `experiment=own`.

    A second time nothing is added.
    """
    values = dict(override.partition("=")[::2] for override in overrides)
    given = {key.lstrip("+~") for key in values}
    splits = [name for name in sorted(path.stem for path in CONF.glob("split/*.yaml")) if f"split.{name}" in given]
    implied = {"split": splits[0]} if splits else {}
    is_own = values.get("model") == "own" or ("model._target_" in given and "model" not in given)
    if is_own:
        implied |= {"model": "own", "init": "as_constructed"}
    if is_own or values.get("dataset") in OWN_DATA:
        implied |= {"experiment": "own"}
    added = [f"{key}={value}" for key, value in implied.items() if key not in given]
    is_open = [o.startswith("dataset.channels=") or (is_own and o.startswith("model.")) for o in overrides]
    return [*added, *(f"++{o}" if opened else o for o, opened in zip(overrides, is_open, strict=True))]


def left_to_rows(overrides: Sequence[str], error: str) -> list[str]:
    """Return those of a launch's overrides whose key an error of Hydra's says is not there: if some row has it, as
    `optimizer.step_size`, it is there after the rows have been chosen."""
    refused = REFUSED.match(error)
    return [o for o in overrides if refused and o.lstrip("~").partition("=")[0] == refused[1]]


def drop_other_cuts(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove from `split` what an experiment or a row has set there for another way to cut than `split=…` of the
    overrides, such as the `activation` that does not go with `split=after`. What the overrides give stays."""
    values = dict(override.partition("=")[::2] for override in overrides)
    options = {path.stem: set(OmegaConf.load(path)) for path in CONF.glob("split/*.yaml")} if "split" in values else {}
    if (chosen := values.get("split")) not in options:
        return
    given = {key.lstrip("+").removeprefix("split.") for key in values}
    with open_dict(config.split):
        for key in set().union(*options.values()) - options[chosen] - given:
            config.split.pop(key, None)


def as_given(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those that the others imply, as a user has written them."""
    plain = [o.removeprefix("++") for o in overrides]
    return [o for o in plain if o not in with_implied([other for other in plain if other != o])]
