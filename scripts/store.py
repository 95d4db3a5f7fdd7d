"""The runs of a results store: python -m scripts.store {list,check,compare,remove,migrate}

  list                        finished runs, and interrupted ones
  check                       whether every run is whole and what was written; exit code 1 and a line for each problem
  compare <run> <run>         what two runs' configurations differ in, where they come from, and their numbers
  remove <run> ...            finished runs, or with --interrupted what interrupted ones have left
  migrate                     finished runs of schema 1 get the identities of today; their numbers stay as they are

A run is named by the beginning of its identity, the hash at the end of its folder's name, or by its folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import Timeout

from admm.checkpoints import CheckpointError, read_checkpoint
from admm.files import MIB
from experiments.identity import SCHEMA, identity, with_todays_names, without_nulls
from experiments.migration import migrate
from experiments.paths import in_full
from experiments.reports.report import curves, show
from experiments.store import SUMS, Run, Slot, delete, experiments_in, lock_of, slot_of, sums, unsealed

PARTS = ("config.yaml", "history.csv", "run.json")  # of every run
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, yaml.YAMLError, zipfile.BadZipFile, zlib.error)


def main() -> None:
    options = parser().parse_args()
    if not (options.store / "runs").is_dir():
        sys.exit(f"error: {options.store} has no runs/; --store <folder> names another store, such as outputs")
    try:
        sys.exit(options.command(options))
    except OSError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", type=in_full, default=Path("results"), help="its folder (default: results)")
    of_one = argparse.ArgumentParser(add_help=False)
    of_one.add_argument("--experiment", help="its runs alone")
    made = argparse.ArgumentParser(
        prog="python -m scripts.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(required=True, metavar="{list,check,compare,remove,migrate}")

    def add(command: Callable[[argparse.Namespace], int], *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        name, text = command.__name__.removesuffix("_"), command.__doc__
        added = commands.add_parser(name, parents=[common, *parents], help=text, description=text)
        added.set_defaults(command=command)
        return added

    add(list_, of_one)
    add(check, of_one)
    compared = add(compare)
    compared.add_argument("runs", nargs=2, metavar="run", help="beginning of an identity, or a folder")
    add(migrate_)
    removed = add(remove, of_one)
    removed.add_argument("runs", nargs="*", metavar="run", help="beginning of an identity, or a folder")
    removed.add_argument("--interrupted", action="store_true", help="what interrupted runs have left, instead")
    removed.add_argument("--yes", action="store_true", help="do not ask")
    return made


def text(path: Path) -> str:
    """Raises ValueError where the last line is cut off."""
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


# --- What there is


def finished(store: Path, experiment: str | None) -> list[Path]:
    """Folders of the finished runs, damaged ones too."""
    folders = sorted(path for path in (store / "runs").glob("[!.]*/*") if path.is_dir())
    return [path for path in folders if experiment in (None, path.parent.name)]


def interrupted(store: Path, experiment: str | None) -> list[Path]:
    """Folders of what runs that have not ended have left."""
    folders = sorted(path for path in (store / "runs/.partial").glob("*") if path.is_dir())
    return [path for path in folders if experiment in (None, started(path).get("experiment"))]


def started(partial: Path) -> dict[str, Any]:
    """What an interrupted run has noted in the beginning; nothing if the note is damaged."""
    try:
        return json.loads((partial / "started.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}


def named(name: str, folders: list[Path]) -> Path:
    """The one of these folders. Ends the program where there is none, or more than one."""
    if Path(name).is_dir():
        found = [path for path in folders if path.samefile(name)]
    else:
        found = [path for path in folders if path.name.rpartition("-")[2].startswith(name)]
    if len(found) != 1:
        which = "".join(f"\n  {path}" for path in found)
        what = f"{len(found)} runs of this store" if found else "no run of this store"
        sys.exit(f"error: {name!r} is {what}{which}\nname one: the beginning of its identity, as `list` has it")
    return found[0]


def displaced(partial: Path) -> Slot | None:
    """The place of a finished run that is among what an interrupted one has left, as a kill while the one was to take
    the other's place leaves it; None if there is no such run, or if it is in its place."""
    try:
        info = json.loads((partial / "former/run.json").read_text(encoding="utf-8"))
        slot = Slot(partial.parents[2], info["experiment"], f"{info['method']}-{info['setting']}", partial.name)
    except (OSError, ValueError, KeyError):
        return None
    return None if slot.folder.exists() else slot


def is_held(partial: Path) -> bool:
    """Whether a living process is at work on the run that keeps its checkpoint there."""
    lock = lock_of(partial)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


# --- list


def list_(options: argparse.Namespace) -> int:
    """Finished runs, and interrupted ones."""
    runs = [line(folder) for folder in finished(options.store, options.experiment)]
    left = [line_of_interrupted(partial) for partial in interrupted(options.store, options.experiment)]
    for title, lines in (("finished", runs), ("interrupted", left)):
        if lines:
            show(pd.DataFrame(lines), f"{options.store}: {len(lines)} {title}")
    if not runs + left:
        print(f"no runs in {options.store}")
    return 0


def line(folder: Path) -> dict[str, str]:
    """A finished run."""
    run, slot = Run(folder), slot_of(folder)
    try:
        info = run.info
        told = {
            "method": info["method"],
            "setting": info["setting"],
            "identity": info["identity"],
            "finished": info["finished"][:16].replace("T", " "),
            "seeds": str(len(info["seeds"]) - len(info.get("diverged", ()))),
            "final": final(run),
            "seconds": f"{info['seconds']:.0f}" if "seconds" in info else "–",
            "overrides": " ".join(info["overrides"]),
        }
    except UNREADABLE:
        told = {"method": slot.name, "identity": slot.identity, "final": "damaged, see check"}
    return {"experiment": slot.experiment} | told


def final(run: Run) -> str:
    """The number of a run in its experiment's table."""
    history = run.history
    if "test_accuracy" in history:
        return f"{curves([run])[0].row()['mean']:.2f} %"
    if "bytes" in history:
        return f"{history.loc[history['quantity'] != 'peak', 'bytes'].sum() / MIB:.1f} MiB"
    return f"{run.table('probes')['balanced_accuracy'].mean():.2f} % balanced"


def line_of_interrupted(partial: Path) -> dict[str, str]:
    """What a run that has not ended has left."""
    info = started(partial)
    return {
        **{key: info.get(key, "–") for key in ("experiment", "method", "setting")},
        "identity": partial.name,
        "reached": reached(partial, info),
        "last written": f"{timedelta(seconds=int(time.time() - written(partial)))} ago",
        "process": "at work" if is_held(partial) else "none",
        "overrides": " ".join(info.get("overrides", ())),
    }


def reached(partial: Path, info: dict[str, Any]) -> str:
    """How far it goes on from."""
    try:
        if (partial / "race.json").exists():
            histories = unsealed((partial / "race.json").read_text(encoding="utf-8"))["histories"]
            return f"seed {len(next(iter(histories.values())))} of {len(info['seeds'])}"
        if not (partial / "checkpoint.pt").exists():
            return "the start"
        iteration = read_checkpoint(partial / "checkpoint.pt")["state"]["iteration"]
        return f"iteration {iteration} of {info['iterations']}"
    except (CheckpointError, ValueError, KeyError):
        return "damaged"


def written(partial: Path) -> float:
    """When something was saved there."""
    return max(path.stat().st_mtime for path in (partial, *partial.glob("[!.]*.*")))


# --- check


def check(options: argparse.Namespace) -> int:
    """Whether every run is whole and what was written; exit code 1 and a line for each problem."""
    folders = finished(options.store, options.experiment)
    if options.experiment and not folders:
        print(f"no runs of {options.experiment} in {options.store}; it has {', '.join(experiments_in(options.store))}")
        return 1
    found = [f"{folder}: {problem}" for folder in folders for problem in problems(folder)]
    for partial in interrupted(options.store, options.experiment):
        if (slot := displaced(partial)) and not is_held(partial):
            found.append(f"{slot.folder}: is in {slot.former} since a kill; remove --interrupted puts it back")
    print(*found, f"{len(folders)} runs, {len(found)} problems", sep="\n")
    without = sum(not (folder / SUMS).exists() for folder in folders)
    if without:
        print(f"{without} have no {SUMS}: of these, what the files say was checked, but not that it was written so")
    return int(bool(found))


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with a finished run, a line each."""
    damaged = list(unreadable(folder))
    yield from damaged
    if not damaged:
        try:
            run = Run(folder)
            config = yaml.safe_load(text(folder / "config.yaml"))
            yield from misnamed(run, config)
            yield from incomplete(run, config)
        except (KeyError, TypeError, AttributeError) as error:
            yield f"config.yaml, run.json or history.csv: is not of a run ({type(error).__name__}: {error})"


def unreadable(folder: Path) -> Iterator[str]:
    """Files that are missing, changed or cut off."""
    try:
        known = recorded(folder)
    except ValueError:
        yield f"{SUMS}: does not parse"
        return
    there = sums(folder)
    for name in sorted({*PARTS, *known, *there}):
        if name not in there:
            yield f"{name}: is missing"
        elif known and name not in known:
            yield f"{name}: is not in {SUMS}"
        elif known and there[name] != known[name]:
            yield f"{name}: was changed, its SHA-256 is not that in {SUMS}"
        elif Path(name).suffix not in READERS:
            yield f"{name}: is not of a run"
        else:
            try:
                READERS[Path(name).suffix](folder / name)
            except UNREADABLE as error:
                yield f"{name}: does not parse ({' '.join(str(error).split())})"


def recorded(folder: Path) -> dict[str, str]:
    """The sums that were written with the run; none for the oldest runs. Raises ValueError."""
    path = folder / SUMS
    pairs = (line.split("  ") for line in path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {name: sha for sha, name in pairs}


def misnamed(run: Run, config: dict[str, Any]) -> Iterator[str]:
    """Where configuration, data, `run.json` and the folder's name do not belong together."""
    info, slot = run.info, slot_of(run.folder)
    if info.get("schema", 1) != SCHEMA:
        yield f"run.json: of schema {info.get('schema', 1)}, not {SCHEMA}: python -m scripts.store migrate"
        return
    setting = slot.name.removeprefix(f"{info['method']}-")
    choices = {"experiment": slot.experiment, "method": info["method"], "setting": setting}
    hashed = identity(with_todays_names(config), choices, info["dataset"]["sha256"])
    if hashed != slot.identity:
        yield f"config.yaml: with the data's SHA-256 in run.json, it hashes to {hashed}, not to {slot.identity}"
    expected = choices | {"identity": slot.identity} | {key: config[key] for key in ("seeds", "iterations")}
    for key, value in expected.items():
        if info[key] != value:
            yield f"run.json: {key} is {info[key]}, not {value}"


def incomplete(run: Run, config: dict[str, Any]) -> Iterator[str]:
    """Evaluations that a trained run lacks, or has too many of; none is due once a seed has diverged."""
    info = run.info
    if "diverged" not in info:
        return  # nothing was trained
    every = 1 if "optimizers" in config else config["evaluate_every"]  # a race evaluates each iteration
    evaluations = sorted({*range(0, info["iterations"], every), info["iterations"]})
    found = run.history.groupby(["replica", "seed"])["iteration"].apply(list).to_dict()
    for replica, seed in enumerate(info["seeds"]):
        end = info["diverged"].get(str(replica), inf)
        due, there = [i for i in evaluations if i < max(end, 1)], found.pop((replica, seed), [])
        if there != due:
            yield f"history.csv: seed {seed} (replica {replica}) has {len(there)} of {len(due)} evaluations, or others"
    yield from (f"history.csv: {key} is no replica and seed of the run" for key in found)


# --- migrate


def migrate_(options: argparse.Namespace) -> int:
    """Finished runs of schema 1 get the identities of today; their numbers stay as they are."""
    try:
        for line in migrate(options.store):
            print(line)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return 0


# --- compare


def compare(options: argparse.Namespace) -> int:
    """What two runs' configurations differ in, where they come from, and their numbers."""
    folders = finished(options.store, None)
    first, second = (Run(Path(n) if (Path(n) / "run.json").exists() else named(n, folders)) for n in options.runs)
    configurations = side_by_side(settings(first), settings(second))
    show(configurations[configurations["1"] != configurations["2"]], "configuration, where it differs")
    runs = side_by_side(origin(first), origin(second))
    show(runs[~runs["key"].str.startswith("sources.") | (runs["1"] != runs["2"])], "run")
    show(side_by_side(numbers(first), numbers(second)), "end, mean over the replicas that have not diverged")
    return 0


def side_by_side(first: dict[str, Any], second: dict[str, Any]) -> pd.DataFrame:
    """Two dictionaries' values as text, by key."""
    lines = [(key, str(first.get(key, "–")), str(second.get(key, "–"))) for key in {**first, **second}]
    return pd.DataFrame(lines, columns=["key", "1", "2"])


def settings(run: Run) -> dict[str, Any]:
    """All that determines the numbers, by dotted key."""
    return flat(without_nulls(with_todays_names(yaml.safe_load(text(run.folder / "config.yaml")))))


def flat(node: dict[str, Any], group: str = "") -> dict[str, Any]:
    """A nested dictionary's values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{group}{key}.") if isinstance(value, dict) else {f"{group}{key}": value}
    return found


def origin(run: Run) -> dict[str, Any]:
    """What `run.json` says."""
    return {"folder": run.folder, **flat(run.info)}


def numbers(run: Run) -> dict[str, str]:
    """Means of what was measured at the end over the replicas that have not diverged, and of what was probed."""
    history = run.history
    if "bytes" in history:
        return {name: f"{size / MIB:.3f} MiB" for name, size in zip(history["quantity"], history["bytes"], strict=True)}
    kept = history[~history["replica"].astype(str).isin(run.info.get("diverged", {}))]
    found = kept.groupby("replica").tail(1).mean(numeric_only=True)
    if (run.folder / "probes.csv").exists():
        found = pd.concat([found, run.table("probes").mean(numeric_only=True)])
    return {str(name): f"{value:.5g}" for name, value in found.drop(["replica", "seed"]).items()}


# --- remove


def remove(options: argparse.Namespace) -> int:
    """Remove finished runs, or with --interrupted what interrupted ones have left."""
    folders = (interrupted if options.interrupted else finished)(options.store, options.experiment)
    if not (options.runs or options.experiment or options.interrupted):
        sys.exit("error: which? runs, --experiment or --interrupted")
    chosen = dict.fromkeys(named(name, folders) for name in options.runs) if options.runs else folders
    for folder in chosen:
        print(folder)
    if not (chosen and (options.yes or confirmed(f"remove these {len(chosen)}?"))):
        print("nothing was removed")
        return 1
    return max([remove_one(folder, options.interrupted) for folder in chosen])


def confirmed(question: str) -> bool:
    """Whether the answer is yes; without a terminal it is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def remove_one(folder: Path, is_interrupted: bool) -> int:
    """Remove it unless a living process is at work on the run; a finished run in it is put back. Returns the exit
    code."""
    partial = folder if is_interrupted else slot_of(folder).partial
    try:
        with lock_of(partial).acquire(timeout=0):
            if is_interrupted and (slot := displaced(folder)) and (run := slot.finished()):
                print(f"put back: {run.folder}")
            delete(folder, partial) if is_interrupted else slot_of(folder).remove()
    except Timeout:
        print(f"{folder}: not removed, a process is at work on it")
        return 1
    print(f"removed: {folder}")
    return 0


if __name__ == "__main__":
    main()
