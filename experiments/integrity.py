"""The check of a results store: whether its runs are complete, and as they were written."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.identity import SCHEMA, identity, with_todays_names
from experiments.store import SUMS, Run, Store, slot_of, sums

PARTS = ("config.yaml", "history.csv", "run.json")  # of every run
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, yaml.YAMLError, zipfile.BadZipFile, zlib.error)


def problems_of(store: Store, experiment: str | None = None) -> Iterator[str]:
    """Yield what is wrong with a store's runs, of one experiment or of all, one line per problem."""
    for folder in store.folders(experiment):
        yield from (f"{folder}: {problem}" for problem in problems(folder))
    for interrupted in store.interrupted(experiment):
        if (slot := interrupted.displaced()) and not interrupted.is_held():
            yield f"{slot.folder}: is in {slot.former} since a kill; remove --interrupted puts it back"


def problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a finished run, one line per problem."""
    damaged = list(unreadable(folder))
    yield from damaged
    if not damaged:
        try:
            run = Run(folder)
            config = yaml.safe_load(text(folder / "config.yaml"))
            yield from misnamed(run, config)
            yield from incomplete(run, config)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            yield f"config.yaml, run.json or history.csv: is not of a run ({type(error).__name__}: {error})"


def unreadable(folder: Path) -> Iterator[str]:
    """Yield the files that are missing, changed or cut off."""
    try:
        written = recorded_sums(folder)
    except ValueError:
        yield f"{SUMS}: does not parse"
        return
    present = sums(folder)
    for name in sorted({*PARTS, *written, *present}):
        if name not in present:
            yield f"{name}: is missing"
        elif written and name not in written:
            yield f"{name}: is not in {SUMS}"
        elif written and present[name] != written[name]:
            yield f"{name}: was changed, its SHA-256 is not that in {SUMS}"
        elif Path(name).suffix not in READERS:
            yield f"{name}: is not of a run"
        else:
            try:
                READERS[Path(name).suffix](folder / name)
            except UNREADABLE as error:
                yield f"{name}: does not parse ({' '.join(str(error).split())})"


def recorded_sums(folder: Path) -> dict[str, str]:
    """Return the sums that were written with the run; none for the oldest runs. Raises ValueError."""
    path = folder / SUMS
    pairs = (line.split("  ") for line in path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {name: sha for sha, name in pairs}


def misnamed(run: Run, config: dict[str, Any]) -> Iterator[str]:
    """Yield where configuration, data, `run.json` and the folder's name do not belong together."""
    record, slot = run.record, slot_of(run.folder)
    if record.schema != SCHEMA:
        yield f"run.json: of schema {record.schema}, not {SCHEMA}: python -m scripts.store migrate"
        return
    setting = slot.name.removeprefix(f"{record.method}-")
    choices = {"experiment": slot.experiment, "method": record.method, "setting": setting}
    hashed = identity(with_todays_names(config), choices, record.dataset.sha256)
    if hashed != slot.identity:
        yield f"config.yaml: with the data's SHA-256 in run.json, it hashes to {hashed}, not to {slot.identity}"
    expected = choices | {
        "identity": slot.identity,
        "seeds": tuple(config["seeds"]),
        "iterations": config["iterations"],
    }
    for key, value in expected.items():
        if (recorded := getattr(record, key)) != value:
            yield f"run.json: {key} is {recorded}, not {value}"


def incomplete(run: Run, config: dict[str, Any]) -> Iterator[str]:
    """Yield which evaluations a trained run lacks, or has too many of; none is due once a seed has diverged."""
    record = run.record
    if record.seconds is None:
        return  # nothing was trained
    every = 1 if "optimizers" in config else config["evaluate_every"]  # a race evaluates each iteration
    evaluations = sorted({*range(0, record.iterations, every), record.iterations})
    evaluated = run.history.groupby(["replica", "seed"])["iteration"].apply(list).to_dict()
    for replica, seed in enumerate(record.seeds):
        end = record.diverged.get(replica, inf)
        due, there = [i for i in evaluations if i < max(end, 1)], evaluated.pop((replica, seed), [])
        if there != due:
            yield f"history.csv: seed {seed} (replica {replica}) has {len(there)} of {len(due)} evaluations, or others"
    yield from (f"history.csv: {key} is no replica and seed of the run" for key in evaluated)


def text(path: Path) -> str:
    """Return a file's text. Raises ValueError if the last line is cut off."""
    content = path.read_text(encoding="utf-8")
    if not content.endswith("\n"):
        raise ValueError("cut off")
    return content


# by suffix, what reads all of a file and raises one of UNREADABLE if it is damaged
READERS: dict[str, Callable[[Path], Any]] = {
    ".csv": lambda path: pd.read_csv(StringIO(text(path))),
    ".json": lambda path: json.loads(text(path)),
    ".npz": lambda path: Run(path.parent).arrays,
    ".yaml": lambda path: yaml.safe_load(text(path)),
}
