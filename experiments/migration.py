"""Bring the finished runs of a store of schema 1 up to date: their identities covered class paths and keys' spelling.

A run's `config.yaml` gets today's names and the two keys that schema 1 left out; its `run.json` gets the schema, the
kind and the new identity; its folder gets the new name. Every other file stays as it is, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from experiments.identity import (
    SCHEMA,
    choices_of,
    identity,
    identity_config,
    with_former_names,
    with_todays_names,
    without_nulls,
)
from experiments.reports.base import report_of
from experiments.store import Run, delete, describe, slot_of

# What schema 1 took for granted where a configuration did not say it.
IMPLIED = {"precision": "fp32"}
IMPLIED_OF = {"admm.optimizers.BlockADMM": {"sample_storage": "device"}}


def migrate(root: Path) -> Iterator[str]:
    """Migrate the finished runs of a store, one after the other. Yields one line per run.

    A migration can be interrupted and started again. Unfinished runs are not migrated: their checkpoints belong to the
    code that wrote them.

    Raises:
        ValueError: A run does not have the identity that schema 1 gave it; it is left as it is, with those after it.
        OSError: A run could not be written.
    """
    for note in sorted((root / "runs").glob("[!.]*/*/run.json")):
        run = Run(note.parent)
        if run.record.schema < SCHEMA:
            yield f"{run.name} -> {_migrated(run).name}"


def former_identity(config: dict[str, Any], data_sha256: str) -> str:
    """Return the identity by schema 1 of a configuration as it was stored, with `setting`."""
    explicit = {key: value for key, value in config.items() if (key, value) != ("precision", "fp32")}
    if explicit["optimizer"].get("variables") == "device":
        explicit["optimizer"] = {key: value for key, value in config["optimizer"].items() if key != "variables"}
    content = json.dumps([_without_former_nulls(explicit), data_sha256], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _without_former_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without nulls that are defaults, which today's classes tell, under the former names."""
    defaults = with_former_names(without_nulls(with_todays_names(config)))

    def kept(node: Any, today: Any) -> Any:
        if isinstance(node, dict) and isinstance(today, dict):
            return {key: kept(value, today[key]) for key, value in node.items() if key in today}
        return node

    result: dict[str, Any] = kept(config, defaults)
    return result


def _migrated(run: Run) -> Run:
    """The run in its new place, where it appears whole; the former one is deleted after that."""
    record, slot = run.record, slot_of(run.folder)
    stored = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    data = record.dataset.sha256
    if (expected := former_identity(stored, data)) != slot.identity:
        raise ValueError(f"{run.folder}: config.yaml hashes to {expected}, not to {slot.identity}; see `check`")
    config = _explicit(identity_config(with_todays_names(stored)))
    new_identity = identity(config, choices_of(record), data)
    info = {"schema": SCHEMA} | run.info | {"identity": new_identity, "kind": report_of(record.experiment).kind}
    target = run.folder.with_name(f"{slot.name}-{new_identity}")
    if not target.exists():  # as it does after an interruption
        slot.partial.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=slot.partial.parent, prefix=".") as folder:
            copy = shutil.copytree(run.folder, Path(folder, target.name))
            describe(copy, config, info)
            os.replace(copy, target)
    delete(run.folder, slot.partial)
    return Run(target)


def _explicit(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that says what schema 1 implied."""
    optimizer = config["optimizer"]
    return IMPLIED | config | {"optimizer": IMPLIED_OF.get(optimizer["_target_"], {}) | optimizer}
