"""Which rows of an experiment a launch makes: those that `optimizer=…` and `setting=…` choose, one job per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from experiments.checks import check_values
from experiments.errors import found_here, meant, user_errors
from experiments.launch import conf_folders
from experiments.launching.failures import failures_end_the_program
from experiments.overrides import ROW_FILTERS, key_of, parse
from experiments.rows import DEFAULT, TableRows


class Rows(Callback):
    """Before a launch: replaces `optimizer=…` and `setting=…`, of the command line and of search=…, by `row=…`.

    A `row=…` of the user's stays as it is, and a race (`optimizers`) composes its rows itself.
    """

    @failures_end_the_program()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        params, overrides = config.hydra.sweeper.params or {}, config.hydra.overrides
        searched = [f"{key}={value}" for key, value in params.items()]
        loader = GlobalHydra.instance().config_loader()
        by_key = {override.key_or_group: override for override in parse([*searched, *overrides.task], loader)}
        with user_errors():
            check_matches(by_key)  # and what would fail in every row
            check_values(config, [key for key, given in by_key.items() if not given.is_sweep_override()])
        if "row" in by_key or "optimizers" in config:
            return
        methods, settings = (values(by_key.get(key)) for key in ROW_FILTERS)
        with user_errors():
            check_names(methods, conf_folders(config.hydra))
            chosen = choices(rows_of_launch(config, by_key, settings), methods, settings)
        with read_write(config), open_dict(config):
            overrides.task = [*chosen, *(o for o in overrides.task if key_of(o) not in ROW_FILTERS)]
            for key in params.keys() & ROW_FILTERS:
                del params[key]


def check_matches(by_key: dict[str, Override]) -> None:
    """Raises ValueError for a `glob(…)` of rows, optimizers or settings that matches nothing."""
    for key in ("row", *ROW_FILTERS):
        if not values(by_key.get(key)):
            raise ValueError(f"{by_key[key].input_line}: matches nothing")


def check_names(methods: list[str | None], conf: Sequence[Path]) -> None:
    """Raises ValueError for an optimizer that has no file in these folders of configuration. (Of a single one, Hydra
    tells.)"""
    there = sorted(path.stem for folder in conf for path in folder.glob("optimizer/*.yaml"))
    for name in methods:
        if name and "/" not in name and name not in there:
            near = found_here("optimizer", name) or meant(name, there)
            raise ValueError(f"optimizer: no {name!r}{near}; there are {', '.join(there)}")


def values(override: Override | None) -> list[str | None]:
    """Return the values of an override, several in a sweep; [None], for any value, if there is no override."""
    if override is None or override.value() is None:
        return [None]
    return list(override.sweep_string_iterator() if override.is_sweep_override() else [str(override.value())])


def rows_of_launch(config: DictConfig, by_key: dict[str, Override], settings: list[str | None]) -> TableRows:
    """Return the experiment's rows, and no rows for several experiments. Raises ValueError for several experiments with
    a setting other than `default`."""
    if len(values(by_key.get("experiment"))) == 1:
        return TableRows.of(config.hydra.runtime.choices["experiment"], config.rows, conf_folders(config.hydra))
    if settings != [DEFAULT]:
        raise ValueError("experiment: rows can be launched for one experiment at a time; several need setting=default")
    return TableRows("", [], [])


def choices(table: TableRows, methods: list[str | None], settings: list[str | None]) -> list[str]:
    """Return the override for methods and settings, None for any: `row=…`, or `optimizer=…` for default values.

    Raises ValueError for what one sweep cannot make.
    """
    found = [(method, table.chosen(method, setting)) for method in methods for setting in settings]
    rows = dict.fromkeys(row.name for _, own in found for row in own)
    without = dict.fromkeys(method for method, own in found if not own)
    if rows and without and DEFAULT in settings:
        raise ValueError(f"setting: {DEFAULT} and rows do not go together in one launch; {table.in_words()}")
    if rows and without:
        alone = ",".join(map(str, without))
        raise ValueError(
            f"optimizer={alone} has no row in experiment={table.experiment}, the others have. setting={DEFAULT} takes "
            "the default values of all; or a file "
            f"conf/row/{table.experiment}/{next(iter(without))}-<setting>.yaml gives it a row"
        )
    if rows:
        return [f"row={','.join(rows)}"]
    every = without if None not in without else dict.fromkeys(row.method for row in table.listed)
    return [f"optimizer={','.join(map(str, every))}"] if every else []
