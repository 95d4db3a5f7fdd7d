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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import meant
from experiments.identity import without_nulls
from experiments.integrity import UNREADABLE, problems_of
from experiments.migration import migrate
from experiments.paths import in_full
from experiments.reports.base import report_on
from experiments.reports.interrupted import interrupted_row
from experiments.reports.text import print_table
from experiments.store import SUMS, Run, Slot, Store, slot_of


def main() -> None:
    options = parser().parse_args()
    if not (options.store / "runs").is_dir():
        sys.exit(f"error: {options.store} has no runs/; {another(options.store)}")
    if name := getattr(options, "experiment", None):
        check_experiment(Store(options.store), name)
    try:
        sys.exit(options.command(options))
    except OSError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", type=in_full, default=Path("results"), help="its folder (default: results)")
    of_one = argparse.ArgumentParser(add_help=False)
    of_one.add_argument("--experiment", help="its runs alone")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{list,check,compare,remove,migrate}")

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
    return parser


def check_experiment(store: Store, name: str) -> None:
    """End the program if a store has no runs of an experiment, finished or interrupted."""
    there = sorted({*store.experiments(), *(slot.experiment for slot in store.interrupted() if slot.experiment)})
    if name not in there:
        sys.exit(f"error: no runs of {name} in {store.root}; it has {', '.join(there) or 'none'}{meant(name, there)}")


def find_folder(name: str, folders: list[Path], store: Path) -> Path:
    """Return the folder of a run, given by its path or the beginning of its identity. Ends the program unless exactly
    one of these folders, of a store, matches."""
    if Path(name).is_dir():
        matches = [path for path in folders if path.samefile(name)]
    else:
        matches = [path for path in folders if path.name.rpartition("-")[2].startswith(name)]
    if len(matches) != 1:
        which = "".join(f"\n  {path}" for path in matches)
        what = f"{len(matches)} runs of {store}{which}" if matches else f"no run of {store}; {another(store)}"
        sys.exit(f"error: {name!r} is {what}\nname one: the beginning of its identity, as `list` has it")
    return matches[0]


def another(store: Path) -> str:
    """Return in words how another store is named."""
    return f"--store <folder> names another store, such as {'results' if store.name == 'outputs' else 'outputs'}"


# --- list


def list_(options: argparse.Namespace) -> int:
    """Finished runs, and interrupted ones."""
    store = Store(options.store)
    runs = [finished_row(folder) for folder in store.folders(options.experiment)]
    left = [interrupted_row(slot) for slot in store.interrupted(options.experiment)]
    for title, rows in (("finished", runs), ("interrupted", left)):
        if rows:
            print_table(pd.DataFrame(rows), f"{options.store}: {len(rows)} {title}")
    if not runs + left:
        print(f"no runs in {options.store}")
    return 0


def finished_row(folder: Path) -> dict[str, str]:
    """Return what the list says of a finished run."""
    run, slot = Run(folder), slot_of(folder)
    try:
        record = run.record
        value, unit = report_on(run).headline(run)
        row = {
            "method": record.method,
            "setting": record.setting,
            "identity": record.identity,
            "finished": record.finished[:16].replace("T", " "),
            "seeds": str(len(record.seeds) - len(record.diverged)),
            "final": f"{value:.2f} {unit}{', held-out' if record.dataset.holdout else ''}",
            "seconds": "–" if record.seconds is None else f"{record.seconds:.0f}",
            "overrides": " ".join(record.overrides),
        }
    except UNREADABLE:
        row = {"method": slot.name, "identity": slot.identity, "final": "damaged, see check"}
    return {"experiment": slot.experiment} | row


# --- check


def check(options: argparse.Namespace) -> int:
    """Whether every run is whole and what was written; exit code 1 and a line for each problem."""
    store = Store(options.store)
    folders = store.folders(options.experiment)
    problems = list(problems_of(store, options.experiment))
    print(*problems, f"{len(folders)} runs, {len(problems)} problems", sep="\n")
    without = sum(not (folder / SUMS).exists() for folder in folders)
    if without:
        print(f"{without} have no {SUMS}: of these, what the files say was checked, but not that it was written so")
    return int(bool(problems))


# --- migrate


def migrate_(options: argparse.Namespace) -> int:
    """Finished runs of schema 1 get the identities of today; their numbers stay as they are."""
    migrated = 0
    try:
        for line in migrate(options.store):
            print(line)
            migrated += 1
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.store}: {migrated} runs migrated")
    return 0


# --- compare


def compare(options: argparse.Namespace) -> int:
    """What two runs' configurations differ in, where they come from, and their numbers."""
    folders = Store(options.store).folders()
    first, second = (
        Run(Path(name) if (Path(name) / "run.json").exists() else find_folder(name, folders, options.store))
        for name in options.runs
    )
    configurations = side_by_side(settings(first), settings(second))
    print_table(configurations[configurations["1"] != configurations["2"]], "configuration, where it differs")
    runs = side_by_side(origin(first), origin(second))
    print_table(runs[~runs["key"].str.startswith("sources.") | (runs["1"] != runs["2"])], "run")
    print_table(side_by_side(numbers(first), numbers(second)), "end, mean over the replicas that have not diverged")
    return 0


def side_by_side(first: dict[str, Any], second: dict[str, Any]) -> pd.DataFrame:
    """Return a table of two dictionaries' values as text, by key."""
    rows = [(key, str(first.get(key, "–")), str(second.get(key, "–"))) for key in {**first, **second}]
    return pd.DataFrame(rows, columns=["key", "1", "2"])


def settings(run: Run) -> dict[str, Any]:
    """Return all that determines a run's numbers, by dotted key."""
    return flat(without_nulls(run.config))


def flat(node: dict[str, Any]) -> dict[str, Any]:
    """Return a nested dictionary's values by dotted key."""
    (row,) = pd.json_normalize(node).to_dict("records")
    return {str(key): value for key, value in row.items()}


def numbers(run: Run) -> dict[str, str]:
    """Return what was measured at the end of a run, as text by name."""
    test = "held_out_" if run.record.dataset.holdout else "test_"
    return {name.replace("test_", test): f"{value:.5g}" for name, value in report_on(run).numbers(run).items()}


def origin(run: Run) -> dict[str, Any]:
    """Return what `run.json` says, by dotted key."""
    return {"folder": run.folder, **flat(run.info)}


# --- remove


def remove(options: argparse.Namespace) -> int:
    """Remove finished runs, or with --interrupted what interrupted ones have left."""
    store = Store(options.store)
    if options.interrupted:
        slots = {slot.partial: slot for slot in store.interrupted(options.experiment)}
    else:
        slots = {folder: slot_of(folder) for folder in store.folders(options.experiment)}
    if not (options.runs or options.experiment or options.interrupted):
        sys.exit("error: which? runs, --experiment or --interrupted")
    named = [find_folder(name, list(slots), options.store) for name in options.runs]
    chosen = list(dict.fromkeys(named if options.runs else slots))
    for folder in chosen:
        print(folder)
    if not (chosen and (options.yes or confirmed(f"remove these {len(chosen)}?"))):
        print("nothing was removed")
        return 1
    return max([remove_one(folder, slots[folder], options.interrupted) for folder in chosen])


def confirmed(question: str) -> bool:
    """Return whether the user's answer is yes; without a terminal it is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def remove_one(folder: Path, slot: Slot, is_interrupted: bool) -> int:
    """Remove a run unless a living process is working on it; a finished run that it was about to replace is put back.
    Returns the exit code."""
    with slot.lock(wait=False) as is_free:
        if not is_free:
            print(f"{folder}: not removed, a process is at work on it")
            return 1
        if is_interrupted and (displaced := slot.displaced()) and (run := displaced.finished()):
            print(f"put back: {run.folder}")
        slot.remove_left() if is_interrupted else slot.remove()
    print(f"removed: {folder}")
    return 0


if __name__ == "__main__":
    main()
