"""The results store: one folder a run, named by what determines its numbers, complete or absent.

    <root>/runs/<experiment>/<method>-<setting>-<identity>/
        config.yaml   all that determines the numbers
        history.csv   one row an evaluation and replica, see `admm.training.History`; or what its task measures
        probes.csv, arrays.npz   of DeepFacto: what probes found, and what heat maps show
        run.json      what was run, from where, and how it ended
        SHA256SUMS    of the others, for `sha256sum -c`; the oldest runs have none

A run under way keeps its checkpoint in `<root>/runs/.partial/<identity>/` and holds the lock beside that folder.
`python -m scripts.store` lists, checks, compares and removes runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from hydra.utils import get_object

from admm.files import WriteError, sync, writing

log = logging.getLogger(__name__)
RESUME = "The same command goes on from what was saved; outputs=… and results=… choose other folders."
SUMS = "SHA256SUMS"
LEFT = "left_to_another_process"  # a note in Hydra's folder of a job
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
    "other_code",
    "results",
    "outputs",
    "logger",
    "note",
    "rows",
    "committed_seeds",
    "report",
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


def without_nulls(node: Any) -> Any:
    """A configuration without the keys that are null, but for those of an object that without them would be another."""
    if isinstance(node, dict):
        defaults = defaults_of(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
        kept = {key for key, value in node.items() if value is not None or defaults.get(key) is not None}
        return {key: without_nulls(value) for key, value in node.items() if key in kept}
    return node


@cache
def defaults_of(target: str) -> dict[str, Any]:
    """By name the defaults of what `_target_` calls; nothing where it cannot be found, which its use says."""
    with suppress(Exception):
        return {name: parameter.default for name, parameter in signature(get_object(target)).parameters.items()}
    return {}


def identity(config: dict[str, Any], sha256: str) -> str:
    """Twelve hexadecimal digits of the hash of the determining configuration and of the data's content.

    Keys that are null, where that is the default, do not count, so that a new option that is null where it is not used
    leaves finished runs valid.
    """
    content = json.dumps([without_nulls(determining(config)), sha256], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def sealed(value: Any) -> str:
    """A line of JSON after its checksum."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def unsealed(line: str) -> Any:
    """What `sealed` made a line of. Raises ValueError for one that was cut off or changed."""
    checksum, _, text = line.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError("the checksum is another")
    return json.loads(text)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def name(self) -> str:
        """Its place in the store, <experiment>/<method>-<setting>-<identity>."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    @property
    def seeds(self) -> set[int]:
        return set(self.info["seeds"])

    @property
    def row(self) -> str:
        """See `row_identity`."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        return row_identity(config, self.info["dataset"]["sha256"])

    @property
    def history(self) -> pd.DataFrame:
        return self.table("history")

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv")

    @property
    def scores(self) -> dict[int, float]:
        """By seed what a search maximises, percent: the probes' mean balanced accuracy of DeepFacto, else the last
        accuracy on the test set or what is held out; 0 of a seed that has diverged."""
        info = self.info
        if (self.folder / "probes.csv").exists():
            by_replica = self.table("probes").groupby("replica")["balanced_accuracy"].mean()
        else:
            history = self.history
            by_replica = history[history["iteration"] == info["iterations"]].set_index("replica")["test_accuracy"]
        found = by_replica.to_dict() | {int(replica): 0.0 for replica in info.get("diverged", {})}
        return {info["seeds"][replica]: float(score) for replica, score in found.items()}

    @property
    def arrays(self) -> dict[str, Any]:
        with np.load(self.folder / "arrays.npz") as content:
            return dict(content)


def scores(runs: Sequence[Run]) -> dict[int, float]:
    """By seed, `Run.scores` of runs that differ in their seeds alone; of a seed that several have, the last one's."""
    return {seed: score for run in runs for seed, score in run.scores.items()}


def mean_score(runs: Sequence[Run], seeds: Sequence[int]) -> float | None:
    """Of those seeds that `scores` has; None without runs."""
    return fmean(score for seed, score in scores(runs).items() if seed in seeds) if runs else None


def row_identity(config: dict[str, Any], sha256: str) -> str:
    """As `identity`, but the same for runs that differ in their seeds alone and so make one row of a table; not where a
    hyperparameter is given replica by replica."""
    seeds = config["seeds"] if one_a_replica(config.get("optimizer", {})) else None
    return identity(config | {"seeds": seeds}, sha256)


def one_a_replica(value: Any) -> bool:
    """Whether a hyperparameter, or one of several, is a list of numbers, which are the replicas'."""
    match value:
        case {"blocks": list(parts)}:
            return any(map(one_a_replica, parts))
        case dict():
            return any(map(one_a_replica, value.values()))
    return isinstance(value, list)


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

    @property
    def former(self) -> Path:
        """Where a finished run is while another one takes its place."""
        return self.partial / "former"

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Held by the one process that makes the run; others wait for it, or get False."""
        lock = lock_of(self.partial)
        with writing(self.partial.parent, "the run's lock"), suppress(Timeout):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def finished(self) -> Run | None:
        """The finished run, for the holder of the lock."""
        if self.former.exists() and not self.folder.exists():  # killed between the two renames of `complete`
            os.replace(self.former, self.folder)
        return Run(self.folder) if self.folder.exists() else None

    def complete(
        self,
        config: dict[str, Any],
        rows: list[dict[str, float]],
        info: dict[str, Any],
        tables: dict[str, pd.DataFrame] | None = None,
        arrays: dict[str, Any] | None = None,
    ) -> Run:
        """Put the finished run in its place: written elsewhere and renamed. A former one is there until then.

        rows: of history.csv. tables: of other CSV files, by name. arrays: of arrays.npz. Raises WriteError.
        """
        info = {"finished": datetime.now(UTC).isoformat(timespec="microseconds")} | info
        with writing(self.folder, "the finished run"):
            self.partial.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.partial) as folder:
                made = Path(folder, self.folder.name)
                made.mkdir()
                text = {"config.yaml": yaml.safe_dump(determining(config), sort_keys=False)}
                text["run.json"] = json.dumps(info, indent=2) + "\n"
                for name, written in text.items():
                    (made / name).write_text(written, encoding="utf-8")
                for name, content in ({"history": pd.DataFrame(rows)} | (tables or {})).items():
                    content.to_csv(made / f"{name}.csv", index=False, float_format="%.7g")
                if arrays:
                    np.savez_compressed(made / "arrays.npz", **arrays)
                hashes = "".join(f"{sha}  {name}\n" for name, sha in sums(made).items())
                (made / SUMS).write_text(hashes, encoding="utf-8")
                self._put(made)
        self.discard()
        return Run(self.folder)

    def _put(self, made: Path) -> None:
        for path in (*made.iterdir(), made):
            sync(path)  # a rename can outlive, in a power cut, what it has named
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.finished():
            if self.former.exists():
                delete(self.former, self.partial)
            os.replace(self.folder, self.former)
        try:
            os.replace(made, self.folder)
        except OSError:
            self.finished()  # puts the former one back
            raise
        sync(self.folder.parent)

    def supersede(self, place: Path) -> None:
        """Move the runs of the same experiment and name that other settings have made, or that have no seed but this
        run's, to `place`. Raises WriteError."""
        own = Run(self.folder)
        for other in runs_named(self.folder.parent, self.name):
            folder = other.folder
            if any(other.info[key] != own.info[key] for key in ("method", "setting")):
                continue  # as sgd with the setting a-b, and sgd-a with b
            if folder != self.folder and (other.seeds <= own.seeds or other.row != own.row):
                with writing(place / folder.name, "the run of former settings"):
                    place.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryDirectory(dir=place, prefix=".") as half:  # it may be on another disk
                        copied = shutil.copytree(folder, Path(half, folder.name))
                        shutil.rmtree(place / folder.name, ignore_errors=True)
                        os.replace(copied, place / folder.name)
                    slot_of(folder).remove()

    def remove(self) -> None:
        """Take the finished run out of the store. Raises OSError."""
        for folder in (self.former, self.folder):
            if folder.exists():
                delete(folder, self.partial)

    def discard(self) -> None:
        """Forget what an interrupted run has left."""
        with suppress(OSError):
            delete(self.partial, self.partial)


def slot_of(folder: Path) -> Slot:
    """The place in its store that a finished run's folder is."""
    name, _, identity = folder.name.rpartition("-")
    return Slot(folder.parents[2], folder.parent.name, name, identity)


def lock_of(partial: Path) -> FileLock:
    """Of the run that keeps its checkpoint in this folder. It ends with the process that holds it."""
    return FileLock(partial.with_suffix(".lock"))


def delete(folder: Path, partial: Path) -> None:
    """Delete a folder of the run that keeps its checkpoint in `partial`. Renamed first, so that it is there whole or
    not at all. Raises OSError."""
    removed = partial.with_suffix(".removed")
    removed.parent.mkdir(parents=True, exist_ok=True)
    if folder != removed:
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
    shutil.rmtree(removed)


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of a run's files by name, but for the file with these sums."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def finished_runs(root: Path, experiment: str) -> list[Run]:
    """The finished runs of an experiment, from the oldest to the newest."""
    return oldest_first((root / "runs" / experiment).glob("*/run.json"))


def runs_named(folder: Path, name: str) -> list[Run]:
    """The finished runs of an experiment's folder that have this name, from the oldest to the newest."""
    found = folder.glob(f"{name}-*/run.json")
    return oldest_first(path for path in found if path.parent.name.removeprefix(f"{name}-").isalnum())


def runs_of_row(slot: Slot, config: dict[str, Any], sha256: str) -> list[Run]:
    """The finished runs of a slot's name that make one row with its own, from a configuration and data, and have some
    of its seeds, from the oldest to the newest."""
    same, row = runs_named(slot.folder.parent, slot.name), row_identity(config, sha256)
    return [run for run in same if not run.seeds.isdisjoint(config["seeds"]) and run.row == row]


def oldest_first(notes: Iterable[Path]) -> list[Run]:
    """The runs of these run.json, but those that another process moves away meanwhile."""
    ages = dict[Run, tuple[str, str]]()
    for run in (Run(note.parent) for note in notes):
        with suppress(FileNotFoundError):
            ages[run] = age(run)
    return sorted(ages, key=ages.__getitem__)


def age(run: Run) -> tuple[str, str]:
    """To sort runs from the oldest to the newest."""
    return run.info["finished"], run.folder.name


def launched_runs(launch: Path) -> list[Run]:
    """The runs that the jobs of a launch have left notes of in Hydra's folder, but those removed since."""
    notes = sorted(launch.rglob("runs.txt"))
    runs = [Run(Path(folder)) for note in notes for folder in note.read_text(encoding="utf-8").splitlines()]
    return [run for run in runs if run.folder.exists()]


@contextmanager
def failed_writes_in_words(then: str = "") -> Iterator[None]:
    """Ends the program with the message of a WriteError, unless `hydra.verbose` asks for more.

    then: what comes after it.
    """
    try:
        yield
    except WriteError as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        raise SystemExit(f"error: {error}.\n{then}".rstrip()) from None


def experiments_in(root: Path) -> list[str]:
    """Names of the experiments that have finished runs."""
    return sorted({path.parent.parent.name for path in (root / "runs").glob("*/*/run.json")})
