"""The results store: one folder per run, named by what determines its numbers, complete or absent.

    <root>/runs/<experiment>/<method>-<setting>-<identity>/
        config.yaml   all that determines the numbers
        history.csv   one row per evaluation and replica, see `admm.training.History`; or what its task measures
        probes.csv, arrays.npz   DeepFacto's only: what probes measured, and what heat maps show
        run.json      what was run, from where, and how it ended, see `experiments.records.RunRecord`
        SHA256SUMS    hashes of the other files, for `sha256sum -c`
    <root>/runs/<experiment>/report.yaml
        of an experiment of the user's: its key `report`, see `experiments.reports.base.note_report`

A run under way keeps its checkpoint in `<root>/runs/.partial/<identity>/` and holds the lock beside that folder.
`python -m scripts.store` lists, checks, compares, removes and migrates runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock, Timeout

from admm.checkpoints import CheckpointError, read_checkpoint
from admm.files import WriteError, explain_write_errors, fsync_path
from experiments.identity import SCHEMA, choices_of, identity_config, row_identity, with_todays_names
from experiments.records import RunRecord

log = logging.getLogger(__name__)
RESUME = "The same command goes on from what was saved; outputs=… and results=… choose other folders."
SUMS = "SHA256SUMS"
RACE, PROBES = "race.json", "probes.jsonl"  # journals of tasks
LEFT = "left_to_another_process"  # a note in Hydra's folder of a job


def seal(value: Any) -> str:
    """Return a line of JSON after its checksum."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def unseal(line: str) -> Any:
    """Return the value of a line by `seal`. Raises ValueError for a line that was cut off or changed."""
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
        """The content of run.json as it was written, with all of its keys; `record` has what the suite reads."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    @property
    def record(self) -> RunRecord:
        """The content of run.json, typed. Raises ValueError that names the file where it is damaged."""
        try:
            return RunRecord.read(self.info)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.folder / 'run.json'}: is damaged ({cause}); see scripts.store check") from error

    @property
    def seeds(self) -> set[int]:
        """The seeds of its replicas."""
        return set(self.record.seeds)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that determined its numbers, with the names of today."""
        return with_todays_names(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))

    @property
    def row(self) -> str:
        """Its `row_identity`: runs of the same row differ in their seeds alone."""
        record = self.record
        return row_identity(self.config, choices_of(record), record.dataset.sha256)

    @property
    def history(self) -> pd.DataFrame:
        """The content of history.csv."""
        return self.table("history")

    def table(self, name: str) -> pd.DataFrame:
        """Return the content of <name>.csv."""
        return pd.read_csv(self.folder / f"{name}.csv")

    @property
    def has_arrays(self) -> bool:
        """Whether it has arrays for heat maps."""
        return (self.folder / "arrays.npz").exists()

    @property
    def arrays(self) -> dict[str, Any]:
        """The content of arrays.npz."""
        with np.load(self.folder / "arrays.npz") as content:
            return dict(content)


@dataclass(frozen=True)
class Slot:
    """The place of one run in a store."""

    root: Path
    experiment: str
    name: str  # <method>-<setting>
    identity: str

    @property
    def folder(self) -> Path:
        """The folder of the finished run."""
        return self.root / "runs" / self.experiment / f"{self.name}-{self.identity}"

    @property
    def partial(self) -> Path:
        """The folder of what the unfinished run keeps."""
        return self.root / "runs" / ".partial" / self.identity

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint.pt"

    @property
    def start_note(self) -> Path:
        """What `run.json` will say of the run's start; written when it starts."""
        return self.partial / "started.json"

    def journal(self, name: str) -> Path:
        """Return the file in which a task keeps what it has measured so far. name: `RACE` or `PROBES`."""
        return self.partial / name

    @property
    def former(self) -> Path:
        """The folder of a finished run while another run takes its place."""
        return self.partial / "former"

    def started(self) -> RunRecord | None:
        """Return the record of an interrupted run, or None if its note is damaged."""
        try:
            return RunRecord.read({"finished": ""} | json.loads(self.start_note.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            return None

    def progress(self) -> str:
        """Return in words from where an interrupted run would resume."""
        if (start := self.started()) is None:
            return "damaged"
        try:
            if self.journal(RACE).exists():
                histories = unseal(self.journal(RACE).read_text(encoding="utf-8"))["histories"]
                return f"seed {len(next(iter(histories.values())))} of {len(start.seeds)}"
            if not self.checkpoint.exists():
                return "the start"
            return f"iteration {read_checkpoint(self.checkpoint)['state']['iteration']} of {start.iterations}"
        except (CheckpointError, ValueError, KeyError):
            return "damaged"

    def displaced(self) -> Slot | None:
        """Return the place of the finished run that this interrupted run was about to replace when it was killed; None
        if there is no such run, or if the run is in its place."""
        try:
            record = Run(self.former).record
        except (OSError, ValueError, KeyError):
            return None
        slot = Slot(self.root, record.experiment, f"{record.method}-{record.setting}", self.identity)
        return None if slot.folder.exists() else slot

    def last_written(self) -> float:
        """Return when an interrupted run last saved something, in seconds since the epoch."""
        return max(path.stat().st_mtime for path in (self.partial, *self.partial.glob("[!.]*.*")))

    def is_held(self) -> bool:
        """Return whether a living process is working on the run."""
        lock = lock_of(self.partial)
        if not Path(lock.lock_file).exists():
            return False
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold the run's lock. Yields whether it is held, which is certain with `wait`. Raises WriteError."""
        lock = lock_of(self.partial)
        with explain_write_errors(self.partial.parent, "the run's lock"), suppress(Timeout):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def finished(self) -> Run | None:
        """Return the finished run, or None. Only the holder of the lock may call this."""
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
        """Write the finished run elsewhere, then rename it into its place. A former run stays there until then.

        rows: of history.csv. tables: of other CSV files, by name. arrays: of arrays.npz. Raises WriteError.
        """
        info = {"finished": datetime.now(UTC).isoformat(timespec="microseconds")} | info
        with explain_write_errors(self.folder, "the finished run"):
            self.partial.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.partial) as folder:
                new = Path(folder, self.folder.name)
                new.mkdir()
                for name, content in ({"history": pd.DataFrame(rows)} | (tables or {})).items():
                    content.to_csv(new / f"{name}.csv", index=False, float_format="%.7g")
                if arrays:
                    np.savez_compressed(new / "arrays.npz", **arrays)
                describe(new, identity_config(config), info)
                self._put(new)
        self.discard()
        return Run(self.folder)

    def _put(self, new: Path) -> None:
        for path in (*new.iterdir(), new):
            fsync_path(path)  # a rename can outlive, in a power cut, what it has named
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.finished():
            if self.former.exists():
                delete(self.former, self.partial)
            os.replace(self.folder, self.former)
        try:
            os.replace(new, self.folder)
        except OSError:
            self.finished()  # puts the former one back
            raise
        fsync_path(self.folder.parent)

    def supersede(self, place: Path) -> None:
        """Move the runs that this run replaces to `place`: those of its experiment and name that have other values, or
        only seeds that this run has too. Logs a warning for each. Raises WriteError."""
        own = Run(self.folder)
        for other in runs_named(self.folder.parent, self.name):
            folder = other.folder
            if (other.record.method, other.record.setting) != (own.record.method, own.record.setting):
                continue  # as sgd with the setting a-b, and sgd-a with b
            if folder != self.folder and (other.seeds <= own.seeds or other.row != own.row):
                with explain_write_errors(place / folder.name, "the run of former settings"):
                    place.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryDirectory(dir=place, prefix=".") as half:  # it may be on another disk
                        copied = shutil.copytree(folder, Path(half, folder.name))
                        shutil.rmtree(place / folder.name, ignore_errors=True)
                        os.replace(copied, place / folder.name)
                    slot_of(folder).remove()
                log.warning(
                    "%s: is replaced by %s, and moved to %s", folder.name, self.folder.name, place / folder.name
                )

    def remove(self) -> None:
        """Delete the finished run. Raises OSError."""
        for folder in (self.former, self.folder):
            if folder.exists():
                delete(folder, self.partial)

    def remove_left(self) -> None:
        """Delete what an interrupted run has left. Raises OSError."""
        delete(self.partial, self.partial)

    def discard(self) -> None:
        """Delete what an interrupted run has left, if that is possible."""
        with suppress(OSError):
            self.remove_left()


def slot_of(folder: Path) -> Slot:
    """Return the place in its store of a finished run, given the run's folder."""
    name, _, identity = folder.name.rpartition("-")
    return Slot(folder.parents[2], folder.parent.name, name, identity)


def lock_of(partial: Path) -> FileLock:
    """Return the lock of the run that keeps its checkpoint in this folder. It ends with the process that holds it."""
    return FileLock(partial.with_suffix(".lock"))


def delete(folder: Path, partial: Path) -> None:
    """Delete a folder of the run that keeps its checkpoint in `partial`. The folder is renamed first, so that it is
    there whole or not at all. Raises OSError."""
    removed = partial.with_suffix(".removed")
    removed.parent.mkdir(parents=True, exist_ok=True)
    if folder != removed:
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
    shutil.rmtree(removed)


def describe(folder: Path, config: dict[str, Any], info: dict[str, Any]) -> None:
    """Write a run's `config.yaml` and `run.json` into its folder, and the sums of all files there. Raises OSError."""
    texts = {"config.yaml": yaml.safe_dump(config, sort_keys=False), "run.json": json.dumps(info, indent=2) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    lines = "".join(f"{sha}  {name}\n" for name, sha in sums(folder).items())
    (folder / SUMS).write_text(lines, encoding="utf-8")


def sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of a run's files by name, except that of `SHA256SUMS`."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@dataclass(frozen=True)
class Store:
    """A results store, the folder `root`."""

    root: Path

    def experiments(self) -> list[str]:
        """Return the names of the experiments that have finished runs."""
        return sorted({path.parent.parent.name for path in (self.root / "runs").glob("*/*/run.json")})

    def runs(self, experiment: str) -> list[Run]:
        """Return the finished runs of an experiment, from the oldest to the newest."""
        return oldest_first((self.root / "runs" / experiment).glob("*/run.json"))

    def folders(self, experiment: str | None = None) -> list[Path]:
        """Return the folders of the finished runs, damaged ones too, of one experiment or of all."""
        folders = sorted(path for path in (self.root / "runs").glob("[!.]*/*") if path.is_dir())
        return [path for path in folders if experiment in (None, path.parent.name)]

    def interrupted(self, experiment: str | None = None) -> list[Slot]:
        """Return the places of unfinished runs, of one experiment or of all. Where the note of the start is damaged,
        experiment and name are empty."""
        folders = sorted(path for path in (self.root / "runs/.partial").glob("*") if path.is_dir())
        slots = [self._interrupted(folder.name) for folder in folders]
        return [slot for slot in slots if experiment in (None, slot.experiment)]

    def _interrupted(self, identity: str) -> Slot:
        slot = Slot(self.root, "", "", identity)
        start = slot.started()
        return replace(slot, experiment=start.experiment, name=f"{start.method}-{start.setting}") if start else slot


def runs_named(folder: Path, name: str) -> list[Run]:
    """Return the finished runs of an experiment's folder that have this name, from the oldest to the newest, without
    those of a former schema."""
    found = folder.glob(f"{name}-*/run.json")
    runs = oldest_first(path for path in found if path.parent.name.removeprefix(f"{name}-").isalnum())
    return [run for run in runs if run.record.schema == SCHEMA]


@cache  # a launch says it once
def warn_of_former_runs(folder: Path) -> None:
    """Log a warning if an experiment's folder has finished runs of a former schema, which no job finds."""
    if number := sum(map(is_former, folder.glob("*/run.json"))):
        command = f"python -m scripts.store migrate --store {folder.parents[1]}"
        log.warning("%s: %d runs of a former version are not seen; %s brings them up to date", folder, number, command)


def is_former(note: Path) -> bool:
    """Return whether a run.json is of a former schema; False if it cannot be read."""
    with suppress(OSError, ValueError, KeyError):
        return Run(note.parent).record.schema < SCHEMA
    return False


def runs_of_row(slot: Slot, config: dict[str, Any], choices: Mapping[str, str], data_sha256: str) -> list[Run]:
    """Return the finished runs that make one row with a slot's run and have some of its seeds, from the oldest to the
    newest. config, choices, data_sha256: of the slot's run, as `identity` takes them."""
    same, row = runs_named(slot.folder.parent, slot.name), row_identity(config, choices, data_sha256)
    return [run for run in same if not run.seeds.isdisjoint(config["seeds"]) and run.row == row]


def oldest_first(notes: Iterable[Path]) -> list[Run]:
    """Return the runs of these run.json, from the oldest to the newest, without those that another process moves away
    meanwhile."""
    ages = dict[Run, tuple[str, str]]()
    for run in (Run(note.parent) for note in notes):
        with suppress(FileNotFoundError):
            ages[run] = age(run)
    return sorted(ages, key=ages.__getitem__)


def age(run: Run) -> tuple[str, str]:
    """Return a key that sorts runs from the oldest to the newest."""
    return run.record.finished, run.folder.name


def launched_runs(launch: Path) -> list[Run]:
    """Return the runs that a launch's jobs have noted in Hydra's folder, each once, without those removed since."""
    notes = sorted(launch.rglob("runs.txt"))
    folders = dict.fromkeys(line for note in notes for line in note.read_text(encoding="utf-8").splitlines())
    return [Run(Path(folder)) for folder in folders if Path(folder).exists()]


@contextmanager
def failed_writes_in_words(then: str = "") -> Iterator[None]:
    """End the program with the message of a WriteError; with `hydra.verbose` the error is raised again.

    then: a sentence after the message.
    """
    try:
        yield
    except WriteError as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        raise SystemExit(f"error: {error}.\n{then}".rstrip()) from None
