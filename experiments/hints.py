"""What Hydra leaves out: which keys there are, what to do where its files cannot be written, and which jobs of a sweep
had failed before an error ended it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from admm.files import ADVICE, WriteError, explain_write_errors
from experiments.launching import failures
from experiments.overrides import key_of
from experiments.rows import CONF, row_files


def hints(arguments: Sequence[str], error: BaseException | None) -> list[str]:
    """Lines for the user: which jobs have failed, of a sweep that has not ended; what to do about an error in writing;
    which rows there are, if one is not; else each override `a.b=c` whose key `a.b` does not exist."""
    failed = [line for config in failures.begun for line in failures.listed(config)]
    if isinstance(error, OSError) and (isinstance(error, WriteError) or error.errno in ADVICE):
        return [*failed, _write_hint(error)]
    if failed:
        return failed
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("row/"):
        return [_row_hint(str(error.missing_cfg_file).removeprefix("row/"))]
    GlobalHydra.instance().clear()
    try:
        keys = {a: key_of(a) for a in arguments if "=" in a and not a.startswith(("-", "hydra."))}
        groups = [a for a, key in keys.items() if (CONF / key).is_dir() and "," not in a]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", groups)
    except HydraException:
        return []
    return [line for a, key in keys.items() if a not in groups if (line := _hint(config, key))]


def _row_hint(name: str) -> str:
    rows = row_files(CONF)
    there = [row for row in rows if row.partition("/")[0] == name.partition("/")[0]] or rows
    return f"no row {name!r}: there are {', '.join(sorted(there))}"


def _write_hint(error: OSError) -> str:
    try:
        with explain_write_errors(Path(error.filename or "."), "the launch's own folder or a file in it"):
            raise error
    except WriteError as told:
        return f"error: {told}."


def _hint(config: DictConfig, key: str) -> str | None:
    *parents, name = key.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    if not isinstance(node, DictConfig) or name in node or (CONF / key).is_dir():
        return None
    where = f"{'.'.join(parents)} has" if parents else "the keys are"
    close = difflib.get_close_matches(name, map(str, node), n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"no key {key!r}: {where} {', '.join(sorted(map(str, node)))}{meant}"
