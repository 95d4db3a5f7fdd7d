"""The results store: one folder a run, named by what determines its numbers, complete or absent.

    <root>/runs/<experiment>/<method>-<setting>-<identity>/
        config.yaml   all that determines the numbers
        history.csv   one row an evaluation and replica, see `admm.training.History`; or what its task measures
        probes.csv, arrays.npz   of DeepFacto: what probes found, and what heat maps show
        run.json      what was run, from where, and how it ended

A run under way keeps its checkpoint in `<root>/runs/.partial/<identity>/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock

# Keys of the configuration that say where and how a run is made, not what its numbers are; an experiment has one task.
NEUTRAL = (
    "task",
    "dataset.root",
    "backbone.weights",  # their content counts
    "dataset.download",
    "device",
    "threads",
    "compile",
    "channels_last",
    "recompute",
    "progress",
    "checkpoint_seconds",
    "force",
    "results",
    "outputs",
    "logger",
    "note",
)


def determining(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without its neutral keys."""
    kept = json.loads(json.dumps(config))
    for key in NEUTRAL:
        *groups, name = key.split(".")
        node = kept
        for group in groups:
            node = node.get(group, {})
        node.pop(name, None)
    for node, key, former in ((kept, "precision", "fp32"), (kept.get("optimizer", {}), "variables", "device")):
        if node.get(key) == former:  # as where there was no choice yet
            del node[key]
    return kept  # type: ignore[no-any-return]


def _without_nulls(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_nulls(value) for key, value in node.items() if value is not None}
    return node


def identity(config: dict[str, Any], sha256: str) -> str:
    """Twelve hexadecimal digits of the hash of the determining configuration and of the data's content.

    Keys that are null do not count, so that a new option that is null where it is not used leaves finished runs valid.
    """
    content = json.dumps([_without_nulls(determining(config)), sha256], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())  # type: ignore[no-any-return]

    @property
    def history(self) -> pd.DataFrame:
        return self.table("history")

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv")

    @property
    def arrays(self) -> dict[str, Any]:
        with np.load(self.folder / "arrays.npz") as content:
            return dict(content)


@dataclass(frozen=True)
class Slot:
    """The place of one run in a store."""

    root: Path
    experiment: str
    name: str  # method-setting
    identity: str

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.experiment / f"{self.name}-{self.identity}"

    @property
    def partial(self) -> Path:
        return self.root / "runs" / ".partial" / self.identity

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint.pt"

    def lock(self) -> FileLock:
        """Held by the one process that makes the run; others wait for it."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.partial.with_suffix(".lock"))

    def finished(self) -> Run | None:
        return Run(self.folder) if self.folder.exists() else None

    def complete(
        self,
        config: dict[str, Any],
        rows: list[dict[str, float]],
        info: dict[str, Any],
        tables: dict[str, list[dict[str, Any]]] | None = None,
        arrays: dict[str, Any] | None = None,
    ) -> Run:
        """Put the finished run in its place: written elsewhere and renamed. A former one is there until then.

        rows: of history.csv. tables: of other CSV files, by name. arrays: of arrays.npz.
        """
        info = {"finished": datetime.now(UTC).isoformat(timespec="seconds")} | info
        made = self.partial / "complete"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        (made / "config.yaml").write_text(yaml.safe_dump(determining(config), sort_keys=False))
        for name, content in ({"history": rows} | (tables or {})).items():
            pd.DataFrame(content).to_csv(made / f"{name}.csv", index=False, float_format="%.7g")
        if arrays:
            np.savez_compressed(made / "arrays.npz", **arrays)
        (made / "run.json").write_text(json.dumps(info, indent=2) + "\n")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        former = self.partial / "former"
        if self.folder.exists():
            os.replace(self.folder, former)
        try:
            os.replace(made, self.folder)
        except OSError:
            if former.exists():
                os.replace(former, self.folder)
            raise
        self.discard()
        return Run(self.folder)

    def supersede(self, place: Path) -> None:
        """Move the runs of the same experiment and name that other settings have made to `place`."""
        for folder in self.folder.parent.glob(f"{self.name}-*"):
            if folder != self.folder and folder.name.removeprefix(f"{self.name}-").isalnum():
                place.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(place / folder.name, ignore_errors=True)
                shutil.move(folder, place / folder.name)

    def discard(self) -> None:
        """Forget what an interrupted run has left."""
        shutil.rmtree(self.partial, ignore_errors=True)


def finished_runs(root: Path, experiment: str) -> list[Run]:
    """The finished runs of an experiment, from the oldest to the newest."""
    folders = (root / "runs" / experiment).glob("*/run.json")
    return sorted((Run(path.parent) for path in folders), key=lambda run: (run.info["finished"], run.folder.name))


def launched_runs(launch: Path) -> list[Run]:
    """The runs that the jobs of a launch have left notes of in Hydra's folder."""
    notes = sorted(launch.rglob("runs.txt"))
    return [Run(Path(folder)) for note in notes for folder in note.read_text().splitlines()]


def experiments_in(root: Path) -> list[str]:
    """Names of the experiments that have finished runs."""
    return sorted({path.parent.parent.name for path in (root / "runs").glob("*/*/run.json")})
