"""Checks of a configuration before it is run; each error names the key, what was found and what would be right."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, get_args, get_type_hints

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from admm.numbers import is_number, is_whole
from admm.parallel import KINDS as PARALLEL
from experiments.errors import BadInput
from experiments.identity import OWN_PACKAGES
from experiments.launch import Launch
from experiments.overrides import key_of
from experiments.reports.base import make_report
from experiments.rows import TableRows

PRECISIONS = ("fp32", "tf32", "bf16")
OWN = tuple(f"{package}." for package in OWN_PACKAGES)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TASK = "experiments.tasks.classification.run"
OTHER_CODE = ("keep", "rerun", "refuse")
Kind = tuple[str, Callable[[Any], bool]]  # what is right, in words, and whether a value is


def whole_number(least: int, most: float = math.inf) -> Kind:
    bound = "up" if most == math.inf else f"to {most}"
    return f"a whole number from {least} {bound}", lambda value: is_whole(value, least) and value <= most


def among(valid: Collection[str]) -> Kind:
    return f"one of {', '.join(valid)}", valid.__contains__


def or_null(kind: Kind) -> Kind:
    words, is_right = kind
    return f"{words}, or null", lambda value: value is None or is_right(value)


NUMBER: Kind = "a number", is_number
FROM_0: Kind = "a number from 0 up", lambda value: value == math.inf or (is_number(value) and value >= 0)
YES_OR_NO: Kind = "true or false", lambda value: type(value) is bool
FOLDER: Kind = "a folder", lambda value: type(value) is str and value != ""
LARGEST_SEED = 2**64 - 1  # that PyTorch takes
KINDS: dict[str, Kind] = {  # of values that no other check names by these keys
    "iterations": whole_number(1),
    "evaluate_every": whole_number(1),
    "threads": or_null(whole_number(1, 1024)),  # far more end the process without a word
    "checkpoint_seconds": FROM_0,
    "parallel": or_null(among(PARALLEL)),
    "compile": ("true, false or auto", lambda value: type(value) is bool or value == "auto"),
    **dict.fromkeys(("channels_last", "recompute", "progress", "force"), YES_OR_NO),
    **dict.fromkeys(("results", "outputs", "dataset.root"), FOLDER),
    "other_code": among(OTHER_CODE),
    "precision": among(PRECISIONS),
    "dtype": among(DTYPES),
    "dataset.first": or_null(whole_number(1)),
    "dataset.holdout": whole_number(0),
    "dataset.download": YES_OR_NO,
    **dict.fromkeys(("dataset.holdout_seed", "dataset.split_seed"), whole_number(0, 2**32 - 1)),  # that NumPy takes
    **dict.fromkeys(("init.mean", "init.a", "init.b"), NUMBER),
    "init.std": FROM_0,
    "init.bias": or_null(NUMBER),
    "split.n_blocks": whole_number(1),
    "split.per_layer": YES_OR_NO,
    "fewest": whole_number(1),
    "verification.number": whole_number(1),
    "verification.seed": whole_number(0, 2**32 - 1),
    "model.embedding": whole_number(1),
    "probe.balanced": YES_OR_NO,
}


def check(config: DictConfig) -> None:
    """Raises ValueError that names the key of a value that no run can have."""
    check_values(config, KINDS)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_words(plain)
    check_replicas(plain["optimizer"])
    seeds, (_, is_seed) = config.seeds, whole_number(0, LARGEST_SEED)
    if not isinstance(seeds, ListConfig) or not seeds or not all(map(is_seed, seeds)):
        raise ValueError(f"seeds: {seeds!r} is not a list of whole numbers from 0 to {LARGEST_SEED}, such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: {seeds!r} holds a seed twice")
    if config.precision == "bf16" and config.dtype != "float32":
        raise ValueError(f"precision: bf16 needs dtype=float32, not {config.dtype}")
    if missing := {"name", "holdout"} - set(config.dataset):
        raise ValueError(f"dataset: its file in conf/dataset has no {' and no '.join(sorted(missing))}; see mnist.yaml")


def check_values(config: DictConfig, keys: Collection[str]) -> None:
    """Raises ValueError that names the first of these keys whose value is not of its kind."""
    for key, (right, is_right) in KINDS.items():
        if key not in keys:
            continue
        place, _, name = key.rpartition(".")
        group: Any = OmegaConf.select(config, place) if place else config
        if not isinstance(group, DictConfig) or name not in group:
            continue
        is_own = group.get("_target_", "admm.").startswith(OWN)  # another class may mean something else by the name
        if is_own and not is_right(value := OmegaConf.select(group, name)):
            raise ValueError(f"{key}: {value!r} is not {right}")


def check_replicas(optimizer: dict[str, Any]) -> None:
    """Raises ValueError for a hyperparameter with one value per replica: a table would take them for seeds of one
    row."""
    for name in hyperparameters(optimizer):
        if is_per_replica(value := optimizer[name]):
            raise ValueError(
                f"optimizer.{name}: {value!r} has one value per seed, which a table would show as one row. "
                f"-m optimizer.{name}=…,… hydra/launcher=stacked trains several values at once, a row each; "
                "{blocks: […]} is one value per block"
            )


def hyperparameters(optimizer: dict[str, Any]) -> list[str]:
    """Return the keys of an optimizer's configuration whose value may be one number per replica (`admm.schedules`)."""
    try:
        hints = get_type_hints(get_class(optimizer["_target_"]))
    except Exception:  # what is wrong is told where it is called
        return []
    return [name for name in optimizer if Sequence[float] in get_args(hints.get(name))]


def is_per_replica(value: Any) -> bool:
    """Return whether a hyperparameter, or a part of it, is a list of numbers, one per replica."""
    match value:
        case {"blocks": list(parts)}:
            return any(map(is_per_replica, parts))
        case dict():
            return any(map(is_per_replica, value.values()))
    return isinstance(value, list)


def check_row(config: DictConfig, launch: Launch) -> None:
    """Raises ValueError for a name that would be read as another one, for a row of another optimizer or experiment, and
    for another task or report than the experiment's."""
    if any(key_of(override) == "task" for override in launch.overrides):
        raise ValueError("task: is the experiment's own; take an experiment with another task, such as memory")
    if changed := [key for key in map(key_of, launch.overrides) if key.partition(".")[0] == "report"]:
        raise ValueError(f"{changed[0]}: is read from {launch.experiment_file}; change it there")
    for key, name in (("experiment", launch.experiment), ("optimizer", launch.method)):
        if "/" in name:
            raise ValueError(f"{key}: {name} is not the name of a file directly in conf/{key}")
    if "-" in launch.method:
        raise ValueError(f"optimizer: {launch.method} has a -, which divides the method from the setting; take a _")
    if launch.row and launch.row.method != launch.method:
        file = f"conf/row/{launch.row.name}.yaml"
        raise ValueError(f"row: {file} is of optimizer={launch.row.method or '…'}, not of optimizer={launch.method}")
    table = TableRows.of(launch.experiment, config.get("rows"), launch.conf)
    if launch.row and launch.row not in (*table.listed, *table.others):
        raise ValueError(f"row: {launch.row.name} is no row of experiment={launch.experiment}; {table.in_words()}")
    report = report_node(config)
    make_report(launch.experiment, report)
    table.check_baseline(report)
    if config.setting not in (None, launch.setting):
        raise ValueError(
            f"setting: {config.setting} chooses no row with hydra.mode=RUN, nor beside row=…, of {launch.setting}; "
            "give row=<experiment>/<optimizer>-<setting> alone"
        )


def report_node(config: DictConfig) -> Any:
    """Return the key `report` of a configuration, an empty mapping if it has none."""
    node = config.get("report", {})
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def started() -> int:
    """Return the number of processes that torchrun has started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def check_parallel(config: DictConfig, launch: Launch) -> None:
    """Raises ValueError for a run on several processes that starts processes itself, or whose task has none, and for
    one on one process where torchrun has started several, which would wait for it."""
    if config.parallel is None and started() > 1:
        instead = (
            "take samples or blocks" if config.task == TASK else f"start experiment={launch.experiment} without it"
        )
        raise ValueError(f"parallel: null, but torchrun has started {started()} processes; {instead}")
    if config.parallel is not None and config.task != TASK:
        raise ValueError(
            f"parallel: {config.parallel}, but experiment={launch.experiment} runs in one process; take null"
        )
    if config.parallel is not None and launch.workers is not None:
        raise ValueError(f"parallel: {config.parallel} and a launcher with workers of its own do not go together")


def check_search(is_search: bool, holdout: Any) -> None:
    """Raises BadInput for an Optuna search that would choose by the test set."""
    if is_search and not holdout:
        raise BadInput(
            "dataset.holdout: with 0 a search would choose by the test set; take a sixth of the training samples or "
            "so, as 10000 of MNIST's 60000, or 240 of the digits' 1437"
        )


def check_words(node: Any, key: str = "") -> None:
    """Raises ValueError for an infinity or a NaN that is spelt so that it has become a string."""
    parts: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in parts:
        check_words(value, f"{key}.{name}".lstrip("."))
    if isinstance(node, str) and re.fullmatch(r"[-+]?\.?(inf|nan)", node, re.IGNORECASE) and key != "note":
        raise ValueError(f"{key}: {node!r} is a word here; infinity is inf on the command line, .inf in YAML")
