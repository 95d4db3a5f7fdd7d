"""Lines that follow Hydra's own error message: which keys or rows there are, what to do where files cannot be written,
and which jobs of a sweep had failed before an error ended it."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict

from admm.files import ADVICE, WriteError, explain_write_errors
from experiments.implied import with_implied
from experiments.launch import conf_folders
from experiments.launching import failures
from experiments.overrides import key_of
from experiments.rows import CONF, TableRows

OWN = {  # by group, how a user's own is given
    "dataset": "your own: dataset=npz dataset.path={} (x_train, y_train, …), or dataset=image_folder dataset.path={}",
    "model": "your own: model._target_={}, a function that returns an nn.Module",
}


def hints(arguments: Sequence[str], error: BaseException | None) -> list[str]:
    """Return lines for the user after Hydra has ended with an error.

    They say which jobs of an unfinished sweep have failed, and what to do about an error in writing. Otherwise they say
    how own data and networks are given, if such a file is missing, or which rows the experiment has, if the chosen row
    is; or they name the overrides whose keys are missing.

    Args:
        arguments: The command line, without the program's name.
        error: What Hydra has caught, or None.
    """
    failed = [line for config in failures.unfinished_sweep for line in failures.causes_of_failures(config)]
    if isinstance(error, OSError) and (isinstance(error, WriteError) or error.errno in ADVICE):
        return [*failed, _write_hint(error)]
    if failed:
        return failed
    group, _, name = _missing_file(error).partition("/")
    if group in OWN:
        return [f"no {group} {name!r} in conf/{group}; {OWN[group].replace('{}', name)}"]
    row = name if group == "row" else ""
    try:
        options = get_args_parser().parse_args(list(arguments))
        overrides = with_implied(options.overrides)
        keys = {o: key_of(o) for o in overrides if "=" in o and not o.startswith("+")}
        keys = {o: key for o, key in keys.items() if not key.startswith("hydra.") and not (row and key == "row")}
        groups = [o for o, key in keys.items() if (CONF / key).is_dir() and "," not in o]
        config, hydra = _composed([*groups, *_search_path(options)])
    except HydraException:
        return []
    if row:
        return [_row_hint(row, config, hydra)]
    return [line for o, key in keys.items() if o not in groups if (line := _key_hint(config, key))]


def _missing_file(error: BaseException | None) -> str:
    """The file in conf that Hydra has not found; empty for another error."""
    return str(error.missing_cfg_file) if isinstance(error, MissingConfigException) else ""


def _search_path(options: Namespace) -> list[str]:
    """The override that names the folders of configuration besides conf: `hydra.searchpath` or `--config-dir`."""
    if options.config_dir:
        return [f"hydra.searchpath=['file://{Path(options.config_dir).absolute()}']"]
    return [o for o in options.overrides if o.startswith("hydra.searchpath=")]


def _composed(overrides: list[str]) -> tuple[DictConfig, DictConfig]:
    """A configuration, and its node `hydra`. Raises HydraException."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    with open_dict(config):
        return config, config.pop("hydra")


def _row_hint(row: str, config: DictConfig, hydra: DictConfig) -> str:
    experiment = hydra.runtime.choices.experiment
    table = TableRows.of(experiment, config.rows, conf_folders(hydra))
    names = ", ".join(row.name for row in (*table.listed, *table.others))
    return f"no row {row!r}: experiment={experiment} has {names or 'no rows'}"


def _write_hint(error: OSError) -> str:
    try:
        with explain_write_errors(Path(error.filename or "."), "the launch's own folder or a file in it"):
            raise error
    except WriteError as told:
        return f"error: {told}."


def _key_hint(config: DictConfig, key: str) -> str | None:
    *parents, name = key.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    if not isinstance(node, DictConfig) or name in node or (CONF / key).is_dir():
        return None
    where = f"{'.'.join(parents)} has" if parents else "the keys are"
    close = difflib.get_close_matches(name, map(str, node), n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"no key {key!r}: {where} {', '.join(sorted(map(str, node)))}{meant}"
