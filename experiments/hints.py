"""Lines that follow Hydra's own error message: which keys or rows there are, what to do where files cannot be written,
and which jobs of a sweep had failed before an error ended it; and lines that refuse keys which Hydra would add."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from admm.files import ADVICE, WriteError, explain_write_errors
from experiments import install
from experiments.errors import NO_CONFIG, found_here, meant
from experiments.implied import with_implied
from experiments.launch import conf_folders
from experiments.launching import failures
from experiments.launching.rows import values
from experiments.overrides import key_of, parse
from experiments.rows import CONF, TableRows

LIST_FOR_KEYS = re.compile(r"Cannot merge DictConfig with ListConfig\s+full_key: (\S+)")
STEPS = ("step_size", "theta_step")
# What other libraries, or other optimizers of ours, call a key.
ELSEWHERE = {**dict.fromkeys(("lr", "learning_rate", "step_sizes", *STEPS), STEPS), "epochs": ("iterations",)}
LOSSES = {  # by what other libraries call a loss, in lower case without _ and "loss"
    **dict.fromkeys(("mse", "l2", "meansquarederror"), "squared_error"),
    **dict.fromkeys(("ce", "crossentropy", "nll", "softmax"), "cross_entropy"),
    **dict.fromkeys(("bce", "bcewithlogits"), "binary_cross_entropy"),
    **dict.fromkeys(("l1", "mae", "smoothl1"), "huber"),
}
EXTRAS = {  # by option of hydra/launcher and hydra/sweeper, the extra that has its plugin
    **dict.fromkeys(("slurm", "submitit_slurm", "submitit_local", "ray"), "cluster"),
    **dict.fromkeys(("joblib", "optuna", "study"), "sweeps"),
}
CHOOSING = ("row", "optimizer")  # groups of which a sweep makes one job or several
EACH_ITS_OWN = "Give each optimizer its own values in a launch of its own, or in its row (docs/extending.md#a-row)"
OWN = {  # by group, how a user's own is given
    "dataset": "your own: dataset=npz dataset.path={} (x_train, y_train, …), or dataset=image_folder dataset.path={}",
    "model": "your own: model._target_={}, a function that returns an nn.Module",
}


def hints(arguments: Sequence[str], error: BaseException | None) -> list[str]:
    """Return lines for the user after Hydra has ended with an error.

    They say which jobs of an unfinished sweep have failed, and what to do about an error in writing. Otherwise they say
    how own data and networks are given, if such a file is missing, which extra has a plugin that is, or which rows the
    experiment has, if the chosen row is; or they name the overrides whose keys are missing.

    Args:
        arguments: The command line, without the program's name.
        error: What Hydra has caught, or None.
    """
    failed = [line for config in failures.unfinished_sweep for line in failures.causes_of_failures(config)]
    if isinstance(error, OSError) and (isinstance(error, WriteError) or error.errno in ADVICE):
        return [*failed, _write_hint(error)]
    if failed:
        return [*failed, str(error)] if isinstance(error, HydraException) else failed
    group, name = _missing_file(error)
    if group.startswith("hydra/"):
        there = ", ".join(_options(error))
        return [_plugin_hint(group, name) or f"no {group} {name!r}: there are {there}{meant(name, _options(error))}"]
    if group and group != "row":
        return [_choice_hint(group, name, error)]
    if merged := LIST_FOR_KEYS.search(str(error and error.__cause__)):
        return [f"{merged[1]} has keys here, as the schedule {{start: 0.1, end: 0.0}} has; give such keys, or a number"]
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
    jobs = _jobs_of_sweep([o for o in groups if key_of(o) not in CHOOSING], _search_path(options)) or {"": config}
    lines = [line for o, key in keys.items() if o not in groups if (line := _key_hint_of(jobs, key))]
    return lines or _refused_key(error)


def unknown_additions(arguments: Sequence[str]) -> list[str]:
    """Return lines about top-level keys that overrides add, such as +baseline=sgd, and no file of configuration has:
    nothing reads them, and with one a run would be another run. There are none for what Hydra refuses itself.

    Args:
        arguments: The command line, without the program's name.
    """
    try:
        options = get_args_parser().parse_args(list(arguments))
        added = list(dict.fromkeys(_top_level(o) for o in parse(options.overrides) if o.is_add() or o.is_force_add()))
        given = [o for o in with_implied(options.overrides) if "=" in o and not o.startswith("+")]
        groups = [o.partition(",")[0] for o in given if (CONF / key_of(o)).is_dir()]
        config, hydra = _composed([*groups, *_search_path(options)])
    except HydraException:
        return []
    folders = conf_folders(hydra)
    of_rows = {key for folder in folders for path in folder.glob("row/*/*.yaml") for key in OmegaConf.load(path)}
    unknown = [key for key in added if key not in of_rows and not any((folder / key).is_dir() for folder in folders)]
    lines = [line for key in unknown if (line := _key_hint(config, key))]
    return [*lines, "+ adds no such key; the file of an experiment or a row may have one of its own"] if lines else []


def unknown_choices(arguments: Sequence[str]) -> list[str]:
    """Return lines about a choice that no file has, such as dataset=npy, where no experiment is given.

    Args:
        arguments: The command line, without the program's name.
    """
    try:
        options = get_args_parser().parse_known_args(list(arguments))[0]
        groups = [o for o in with_implied(options.overrides) if "=" in o and (CONF / key_of(o)).is_dir()]
        _composed([*groups, *_search_path(options)])
    except MissingConfigException as error:
        return hints(arguments, error)
    except HydraException:
        return []
    return []


def _top_level(override: Override) -> str:
    """The key at the top of the configuration that an override is about."""
    place = override.package if override.package and not override.package.startswith("_") else override.key_or_group
    return re.split("[./]", place)[0]


def _missing_file(error: BaseException | None) -> tuple[str, str]:
    """The group and the name of the file that Hydra has not found; both are empty for another error."""
    file = str(error.missing_cfg_file) if isinstance(error, MissingConfigException) else ""
    inner = "hydra/" if file.startswith("hydra/") else ""  # Hydra's groups are folders in one
    group, _, name = file.removeprefix(inner).partition("/")
    return inner + group, name


def _options(error: BaseException | None) -> Sequence[str]:
    """The files that there are in place of one that Hydra has not found."""
    return (isinstance(error, MissingConfigException) and error.options) or ()


def _choice_hint(group: str, name: str, error: BaseException | None) -> str:
    """The line on an option that a group does not have, at whose end is what may have been meant."""
    place = re.match(r"In '(?!config')\S+': ", str(error))  # a file that names the option
    there = f"{place[0] if place else ''}no {group} {name!r} in experiments/conf/{group}: there are "
    own = f"; {OWN[group].replace('{}', name)}" if group in OWN else ""
    usual = LOSSES.get(re.sub("_|loss", "", name.lower())) if group == "loss" else None
    near = f"; did you mean {usual}?" if usual else found_here(group, name) or meant(name, _options(error))
    return f"{there}{', '.join(_options(error))}{own}{near}"


def _plugin_hint(group: str, name: str) -> str:
    """The line on an option of a plugin that is not installed; empty for another name."""
    if not (extra := EXTRAS.get(name)):
        return ""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        options = GlobalHydra.instance().config_loader().get_group_options(group)
    there = ", ".join(option for option in options if EXTRAS.get(option) != extra)
    return f"{group}: {name} needs the extra {extra!r}: {install(extra)}; without it there are {there}"


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
    return f"no row {row!r}: experiment={experiment} has {names or 'no rows'}{found_here('row', row)}"


def _write_hint(error: OSError) -> str:
    try:
        with explain_write_errors(Path(error.filename or "."), "the launch's own folder or a file in it"):
            raise error
    except WriteError as told:
        return f"error: {told}."


def _refused_key(error: BaseException | None) -> list[str]:
    """The line on a key that Hydra has refused where a row, or the override itself, has its group."""
    cause = error and error.__cause__
    key, node = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    return [_no_key(key, node)] if key and isinstance(node, DictConfig) else []


def _jobs_of_sweep(groups: list[str], search_path: list[str]) -> dict[str, DictConfig]:
    """The configuration of each row, or of each optimizer, of an unfinished sweep, by name, before keys are changed."""
    task = [o for config in failures.unfinished_sweep for o in parse(config.hydra.overrides.task)]
    names = [(o.key_or_group, str(name)) for o in task if o.key_or_group in CHOOSING for name in values(o)]
    return {name.rpartition("/")[2]: _composed([f"{key}={name}", *groups, *search_path])[0] for key, name in names}


def _key_hint_of(jobs: Mapping[str, DictConfig], key: str) -> str | None:
    """The line on a key that some of a launch's jobs do not have; it names these, if others have the key."""
    lacking = {name: line for name, config in jobs.items() if (line := _key_hint(config, key))}
    having = [name for name in jobs if name not in lacking]
    line = next(iter(lacking.values()), None)
    if not (line and having):
        return line
    return f"{', '.join(lacking)}: {line}; it is there in {', '.join(having)}. {EACH_ITS_OWN}"


def _key_hint(config: DictConfig, key: str) -> str | None:
    parents, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parents) if parents else config
    if isinstance(node, ListConfig) or (CONF / key).is_dir() or (isinstance(node, DictConfig) and name in node):
        return None
    return _no_key(key, node) if isinstance(node, DictConfig) else _key_hint(config, parents) or _no_key(key, NO_CONFIG)


def _no_key(key: str, node: DictConfig) -> str:
    parents, _, name = key.rpartition(".")
    names = sorted(map(str, node))
    if not names:
        is_of_optimizer = parents.startswith("optimizer.")  # whose rows may have schedules
        such_as = "{_target_: …}" if name == "_target_" else "{start: 0.1, end: 0.0}"
        whole = f"; give all of it, as {such_as}, or row=… of one with keys" if is_of_optimizer else ""
        return f"no key {key!r}: {parents} is a value here, without keys{whole}"
    where = f"{parents} has" if parents else "the keys are"
    near = next((f"; did you mean {known}?" for known in ELSEWHERE.get(name, ()) if known in names), "")
    near = f"; give all of it, as {parents}={{_target_: …}}" if name == "_target_" else near
    near = near or meant(name, names) or (_other_optimizers(name) if parents == "optimizer" else "")
    if parents == "split" and name in (ways := sorted(path.stem for path in CONF.glob("split/*.yaml"))):
        near = f"; only one of {', '.join(ways)} may be given"
    return f"no key {key!r}: {where} {', '.join(names)}{near}"


def _other_optimizers(key: str) -> str:
    """Which optimizers have a key; "" if none has."""
    files: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "optimizer").glob("*.yaml"))}
    having = [name for name, file in files.items() if key in file["optimizer"]]
    return f"; it is of optimizer={','.join(having)}" if having else ""
