"""A run's identity: the hash of everything that determines its numbers, whatever its parts are called today.

It covers the choices (experiment, method, setting), the values of the configuration, the content of the data, and a
user's own code (`own_code`, the hashes of its files).
Class paths, the spelling of keys, and where and how a run is executed do not enter it.

To rename a key or a class, add one line to `FORMER_NAMES`: finished runs keep their identity, and their stored
configurations are read under the new name. To rename it once more, change the left side of its line, and append the
name that it had to the right side. A choice names a run's folder, and is not renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from inspect import signature
from typing import Any

from hydra.utils import get_object

SCHEMA = 2  # of identities; runs of schema 1 are brought up to date by `python -m scripts.store migrate`
OWN_PACKAGES = ("admm", "experiments")  # packages whose classes are known by their names alone
CHOICES = ("experiment", "method", "setting")

# Name today: the names that it had, the first of which is the one in identities. A name is the path of a class, a key
# of one class ("BlockADMM.forward_mixing"), or a key of a group that names no class ("dataset.holdout").
FORMER_NAMES: dict[str, tuple[str, ...]] = {
    "admm.optimizers.DeepFacto": ("admm.deepfacto.training.DeepFacto",),
    "admm.losses.TripletLoss": ("admm.deepfacto.triplet.TripletLoss",),
    "experiments.faces.probes.Probe": ("admm.deepfacto.probes.Probe",),
    "experiments.tasks.deepfacto.PCA": ("experiments.deepfacto.PCA",),
    "experiments.tasks.deepfacto.PostHocNMF": ("experiments.deepfacto.PostHocNMF",),
    "experiments.tasks.deepfacto.Raw": ("experiments.deepfacto.Raw",),
    "Backprop.theta_update": ("update",),
    "BlockADMM.theta_update": ("update",),
    "BlockADMM.forward_mixing": ("refresh",),
    "BlockADMM.sample_storage": ("variables",),
    "DeepFacto.theta_update": ("update",),
    "DeepFacto.forward_mixing": ("refresh",),
    "DeepFacto.group_size": ("together",),
    "Gotmare.theta_update": ("update",),
    "OnlineBlockADMM.theta_update": ("update",),
    "ZUpdate.output_update": ("last",),
}
# Keys that say what a run is called, where and how it is executed, and how it is reported, not what its numbers are.
NOT_IN_IDENTITY = (
    "task",
    "dataset.root",
    "dataset.path",  # the content counts
    "backbone.weights",  # their content counts
    "dataset.download",
    "device",
    "parallel",
    "threads",
    "compile",
    "channels_last",
    "recompute",
    "progress",
    "checkpoint_seconds",
    "force",
    "other_code",
    "results",
    "outputs",
    "logger",
    "note",
    "setting",  # is among the choices
    "rows",
    "committed_seeds",
    "method",
    "report",
)


def choices_of(run: Any) -> dict[str, str]:
    """Return the `CHOICES` of a job's `Launch` or of a finished run's `RunRecord`, by name."""
    return {key: getattr(run, key) for key in CHOICES}


def identity(config: Mapping[str, Any], choices: Mapping[str, str], data_sha256: str) -> str:
    """Return the first twelve hexadecimal digits of the SHA-256 of what determines a run's numbers.

    Keys that are null where null is the default do not count, so that a new option that is null where it is not used
    leaves finished runs valid. Numbers count by their value: 1 and 1.0 are one.

    Args:
        config: The run's configuration, resolved, with or without its `NOT_IN_IDENTITY`.
        choices: Names of the experiment, the method and the setting, by `CHOICES`.
        data_sha256: SHA-256 of the data's content.
    """
    values = _canonical(with_former_names(without_nulls(identity_config(config))))
    content = json.dumps([SCHEMA, dict(choices), values, data_sha256], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def row_identity(config: Mapping[str, Any], choices: Mapping[str, str], data_sha256: str) -> str:
    """Return the identity without the seeds, which is the same for all runs that make one row of a table."""
    return identity({**config, "seeds": None}, choices, data_sha256)


def identity_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the configuration without its `NOT_IN_IDENTITY`."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for path in NOT_IN_IDENTITY:
        _pop(copy, path)
    return copy


def without_nulls(node: Any) -> Any:
    """Return a configuration without the keys that are null. A null stays where the class that the configuration names
    has another default for the key."""
    if isinstance(node, dict):
        defaults = _defaults_of(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
        kept = {key for key, value in node.items() if value is not None or defaults.get(key) is not None}
        return {key: without_nulls(value) for key, value in node.items() if key in kept}
    return node


def with_former_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the names that identities use."""
    result: dict[str, Any] = _translated(dict(config), to_former=True)
    return result


def with_todays_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration, however old, with the names of today."""
    result: dict[str, Any] = _translated(dict(config), to_former=False)
    return result


def todays_key(path: str) -> str:
    """Return the path of a key, such as "optimizer.update.weight_decay", with the names of today. It does not say which
    class has the key, and need not: no name that a key had is another's today."""
    names = {name: line.rpartition(".")[2] for line, names in FORMER_NAMES.items() for name in names}
    return ".".join(names.get(part, part) for part in path.split("."))


def _translated(node: Any, to_former: bool, group: str = "") -> Any:
    """A part of a configuration with other names. group: its path, with the names of today."""
    match node:
        case dict():
            today = _todays_class(node["_target_"]) if "_target_" in node else ""
            names = _key_names(today.rpartition(".")[2] or group, to_former)
            target = {"_target_": FORMER_NAMES.get(today, (today,))[0] if to_former else today} if today else {}
            return {
                names.get(key, key): _translated(value, to_former, f"{group}.{names.get(key, key)}".lstrip("."))
                for key, value in node.items()
            } | target
        case list():
            return [_translated(item, to_former, group) for item in node]
    return node


def _key_names(owner: str, to_former: bool) -> dict[str, str]:
    """The other names of the keys of a class or of a group without one."""
    lines = {line.rpartition(".")[2]: names for line, names in FORMER_NAMES.items() if line.rpartition(".")[0] == owner}
    if to_former:
        return {today: names[0] for today, names in lines.items()}
    return {name: today for today, names in lines.items() for name in names}


def _todays_class(path: str) -> str:
    """The path of a class today, given one that it has or had."""
    return next((today for today, names in FORMER_NAMES.items() if path in names), path)


def _canonical(node: Any) -> Any:
    """A configuration in which classes of `OWN_PACKAGES` have no package, and whole numbers are integers."""
    match node:
        case dict():
            return {key: _class_name(v) if key == "_target_" else _canonical(v) for key, v in node.items()}
        case list():
            return [_canonical(item) for item in node]
        case float() if node.is_integer():
            return int(node)
    return node


def _class_name(path: str) -> str:
    return path.rpartition(".")[2] if path.partition(".")[0] in OWN_PACKAGES else path


@cache
def _defaults_of(target: str) -> dict[str, Any]:
    """The defaults, by name, of what `_target_` calls. Empty if that cannot be found: its use will report the error."""
    with suppress(Exception):
        return {name: parameter.default for name, parameter in signature(get_object(target)).parameters.items()}
    return {}


def _pop(config: dict[str, Any], path: str) -> None:
    """Remove a key, given with its path, where it is."""
    *groups, name = path.split(".")
    node: Any = config
    for group in groups:
        node = node.get(group) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(name, None)
