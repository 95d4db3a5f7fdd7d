"""The results store: identity, its command line, and what a full disk, an unwritable folder or a kill leaves of it."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from launches import SERVER, Launch, hold, places
from omegaconf import DictConfig, OmegaConf
from stores import add_run, run_json

from admm.checkpoints import CheckpointError, read_checkpoint
from admm.data import load
from admm.files import WriteError, atomic_write
from experiments.identity import identity
from experiments.integrity import problems, unreadable
from experiments.jobs import Job
from experiments.provenance import commit
from experiments.reports.base import report_of, report_on
from experiments.reports.curves import curves
from experiments.reports.writing import write_report
from experiments.store import Run, Slot, Store, oldest_first, slot_of
from experiments.tasks import walltime
from experiments.tasks.classification import execute
from scripts import store

ROOT = Path(__file__).parents[1]
SMALL = ("experiment=digits_shallow", "optimizer=sgd", "iterations=2", "seeds=[0,1]", "checkpoint_seconds=0")
CHOICES = {"experiment": "digits_shallow", "method": "sgd", "setting": "tuned"}
SMALL += ("dataset.first=100", "model.hidden=[8]", "progress=false")


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose("config", [*SMALL, *overrides])


def job(root: Path, *overrides: str) -> Job:
    """A run that takes no time."""
    plain: Any = OmegaConf.to_container(composed(*overrides), resolve=True)
    data = load(**plain["dataset"])
    slot = Slot(root, "digits_shallow", "sgd-tuned", identity(plain, CHOICES, data.sha256))
    content = {"identity": slot.identity, "seeds": plain["seeds"], "iterations": plain["iterations"]}
    content |= {"dataset": {"holdout": 0, "sha256": data.sha256}, "experiment": "digits_shallow"}
    content |= {"commit": "c", "versions": {"torch": "t"}, "machine": "here"}
    return Job(data, slot, run_json("sgd", "tuned", "2001-01-01T00:00:00+00:00") | content, plain)


def trained_run(root: Path, *overrides: str) -> Run:
    """The finished run of a `job`."""
    the_job = job(root, *overrides)
    return execute(OmegaConf.create(the_job.config), the_job)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a `trained_run`, and one of another step size; to be copied."""
    root = tmp_path_factory.mktemp("two")
    trained_run(root, "optimizer.step_size=0.01")
    trained_run(root)
    return root


def numbers(run: Run) -> pd.DataFrame:
    return run.history.drop(columns="seconds")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m scripts.store` with these arguments: the exit code, and what it prints."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["store", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            store.main()
        printed = capsys.readouterr().out
        return (end.value.code, printed) if isinstance(end.value.code, int) else (1, f"{printed}{end.value.code}")

    return run


# --- Identity, places


def test_runs_of_former_settings_are_moved_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    former = add_run(tmp_path, "sgd-tuned", [10.0, 20.0], run_json("sgd", "tuned", "2001"))
    other = add_run(tmp_path, "sgd-faithful", [10.0, 20.0], run_json("sgd", "faithful", "2001"))
    newest = add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2002"))
    Slot(tmp_path, "mnist_shallow", "sgd-tuned", newest.folder.name.removeprefix("sgd-tuned-")).supersede(
        tmp_path / "s"
    )
    moved = tmp_path / "s" / former.folder.name
    assert not former.folder.exists() and (moved / "run.json").exists()
    told = f"{former.folder.name}: is replaced by {newest.folder.name}, and moved to {moved}"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert {run.folder for run in Store(tmp_path).runs("mnist_shallow")} == {other.folder, newest.folder}


def test_an_interrupted_completion_leaves_the_former_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001"))
    before = (run.folder / "run.json").read_text()

    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    for module, name, passes in ((pd.DataFrame, "to_csv", 0), (os, "replace", 0), (os, "replace", 1)):
        real, calls = getattr(module, name), iter(range(99))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *a, **k: fail() if next(calls) == passes else real(*a, **k))  # noqa: B023
            with pytest.raises(OSError, match="disk full"):
                add_run(tmp_path, "sgd-tuned", [1.0, 2.0], run_json("sgd", "tuned", "2001"))
        assert (run.folder / "run.json").read_text() == before
        assert run.history["test_accuracy"].max() == 92.0
        assert len(Store(tmp_path).runs("mnist_shallow")) == 1


# --- What is written when a disk is full


class FullDisk:
    """Counts what is written below a folder: bytes that reach the system, new files and folders, renames, syncs.

    first: the number, from 0, of the one that fails. stays: so do all writes after it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, first: float = float("inf"), stays: bool = False):
        self.folder, self.first, self.stays, self.count = folder, first, stays, 0
        real = {name: getattr(os, name) for name in ("mkdir", "replace", "fsync")}
        real_open = builtins.open
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.spend("write")
                return super().write(data)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *how: Any, **named: Any) -> Any:
            if not (isinstance(file, str | Path) and set(mode) & set("wax+") and self.is_below(file)):
                return real_open(file, mode, buffering, *how, **named)
            raw = File(file, mode.replace("b", "").replace("t", ""))
            disk.spend("write")  # when the former content is gone
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *how, **named)

        def counted(name: str) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **named: Any) -> Any:
                if name == "fsync" or self.is_below(path):
                    disk.spend(name)
                return real[name](path, *rest, **named)

            return call

        for module in (builtins, io):
            patch.setattr(module, "open", opened)
        for name in real:
            patch.setattr(os, name, counted(name))

    def is_below(self, path: Any) -> bool:
        return self.folder in Path(path).parents

    def spend(self, name: str) -> None:
        number, self.count = self.count, self.count + 1
        if number == self.first or (self.stays and number > self.first and name == "write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def each_write(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    act: Callable[[Path], Any],
    prepare: Callable[[Path], Any] = lambda place: None,
    every: int = 1,
) -> Iterator[Path]:
    """Folders, after `act` there on a disk that is full from its first, second, ... write on, to the last; or from
    every so manieth.

    If it fails, then with a message that names a place there.
    """
    prepare(folder / "enough")
    with monkeypatch.context() as patch:
        enough = FullDisk(patch, folder / "enough")
        act(folder / "enough")
    assert enough.count >= 10
    for first in sorted({*range(0, enough.count, every), enough.count - 1}):
        place = folder / str(first)
        prepare(place)
        with monkeypatch.context() as patch:
            FullDisk(patch, place, first, stays=first % 2 == 0)
            try:
                act(place)
            except WriteError as error:
                assert str(place) in str(error) and re.search("No space left .* MiB are free there", str(error))
        yield place


@pytest.mark.long
def test_a_full_disk_at_any_write_of_a_run_leaves_a_store_from_which_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reached = numbers(trained_run(tmp_path / "expected")), set()
    for root in each_write(monkeypatch, tmp_path, trained_run):
        slot = job(root).slot
        assert [list(problems(folder)) for folder in Store(root).folders()] == [[]] * bool(slot.finished())
        left = {path.name for path in slot.partial.rglob("*")}
        assert left <= {"started.json", "checkpoint.pt"}
        has_checkpoint = "checkpoint.pt" in left
        reached.add(read_checkpoint(slot.checkpoint)["state"]["iteration"] if has_checkpoint else bool(slot.finished()))
        run = trained_run(root)
        assert list(problems(run.folder)) == [] and not list((root / "runs/.partial").glob("*"))
        pd.testing.assert_frame_equal(numbers(run), expected, check_exact=True)
    assert reached == {False, 1, 2}


SOME_WRITES = pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])


@SOME_WRITES
def test_a_full_disk_at_any_write_of_a_run_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    before, replaced = content(trained_run(tmp_path / "former").folder), set()
    for root in each_write(monkeypatch, tmp_path, trained_run, partial(shutil.copytree, tmp_path / "former"), every):
        (run,) = Store(root).runs("digits_shallow")
        assert list(problems(run.folder)) == []
        replaced.add(content(run.folder) != before)
    assert replaced == {False, True}


@SOME_WRITES
def test_a_full_disk_at_any_write_of_a_report_leaves_its_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    newest = add_run(tmp_path / "store", "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001"))
    older = replace_history(newest, tmp_path / "older")

    def draw(place: Path, run: Run = newest) -> None:
        write_report(report_of("mnist_shallow"), [run], place / "figures", place / "tables")

    draw(tmp_path / "a", older)
    draw(tmp_path / "b", newest)
    former, new = content(tmp_path / "a"), content(tmp_path / "b")
    assert former.keys() == new.keys() and not former.items() & new.items()
    found = set()
    for place in each_write(monkeypatch, tmp_path, draw, partial(shutil.copytree, tmp_path / "a"), every):
        now = content(place)
        assert now.keys() == new.keys() and now.items() <= former.items() | new.items()
        found.add(now == new)
    assert found == {False, True}


def replace_history(run: Run, folder: Path) -> Run:
    """A copy in which all accuracies are halved."""
    copied = Run(shutil.copytree(run.folder, folder))
    halved = copied.history.assign(test_accuracy=run.history["test_accuracy"] / 2)
    halved.to_csv(folder / "history.csv", index=False)
    return copied


def test_a_full_disk_at_any_write_of_a_move_leaves_the_run_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_runs: Path
) -> None:
    def move(root: Path) -> None:
        job(root).slot.supersede(root / "outputs")

    other = job(two_runs, "optimizer.step_size=0.01").slot.folder.name
    for root in each_write(monkeypatch, tmp_path, move, partial(shutil.copytree, two_runs)):
        move(root)
        assert [folder.name for folder in (root / "outputs").iterdir()] == [other]
        assert list(problems(job(root).slot.folder)) == [] == list(unreadable(root / "outputs" / other))
        assert len(Store(root).folders()) == 1 and not list((root / "runs/.partial").glob("*.removed"))


def test_the_commit_of_a_run_says_whether_code_was_changed_not_results(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    assert commit(tmp_path) is None
    for name in ("admm/a.py", "results/figures/a.png", "tests/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        git(*arguments)
    clean = commit(tmp_path)
    assert clean and re.fullmatch("[0-9a-f]{12}", clean)
    for name in ("results/figures/a.png", "tests/a.py", "README.md"):  # an earlier launch has redrawn a figure
        (tmp_path / name).write_text("changed")
    assert commit(tmp_path) == clean
    (tmp_path / "admm/a.py").write_text("changed")
    assert commit(tmp_path) == f"{clean}+"
    (tmp_path / "packages/admm").mkdir(parents=True)  # of an environment in the clone
    (tmp_path / "packages/admm/a.py").touch()
    assert commit(tmp_path / "packages") is None


def test_a_file_that_fails_for_another_reason_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("former")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file", "it") as part:
        part.write_text("new")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"file": b"former"}


# --- Launches on a full disk, and where nothing can be written


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return Launch(*SMALL, f"outputs={folder}", *arguments, folder=folder.parent).wait()


@pytest.mark.long
def test_a_launch_that_may_not_write_so_much_says_so_and_goes_on_later(tmp_path: Path) -> None:
    """Files of at most 40 KiB, which the checkpoint is not."""
    wide = "model.hidden=[300]"
    line = ["sh", "-c", 'ulimit -f 80; exec "$0" "$@"', sys.executable, str(ROOT / "run.py"), *SMALL, wide]
    line += [f"outputs={tmp_path}/a"]
    limited = subprocess.run(line, env=os.environ | {"COLUMNS": "300"}, cwd=tmp_path, capture_output=True, text=True)
    assert limited.returncode == 1 and "Traceback" not in limited.stderr
    message = (
        r"error: .*/checkpoint.pt: the checkpoint could not be written: .*File too large.* \(it takes 0.2 MiB, .* free"
    )
    assert re.search(message, limited.stderr), limited.stderr
    assert "The same command goes on from what was saved" in limited.stderr
    assert not list((tmp_path / "a").rglob("checkpoint*"))
    for name in "ab":
        assert launch(tmp_path / name, wide).returncode == 0
    first, second = (Store(tmp_path / name).runs("digits_shallow")[0] for name in "ab")
    pd.testing.assert_frame_equal(numbers(first), numbers(second), check_exact=True)


@pytest.mark.long
def test_on_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    """In a mount of its own, which has room for one checkpoint."""
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run([*alone, f"mount -t tmpfs -o size=700k none {disk}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount of a small disk: {error}")
    run = f'"$0" {ROOT}/run.py "$@" outputs={tmp_path}/logs results={disk}'
    script = f"""
        mount -t tmpfs -o size=700k none {disk}; {run}; cp -r {disk}/runs/.partial {tmp_path}/left
        mount -o remount,ro {disk}; {run}
        mount -o remount,rw,size=9m {disk}; {run}; cp -r {disk}/runs {tmp_path}/kept
    """
    # not of the command line, whose values would send the run to outputs=
    row = ["experiment=digits_shallow", "optimizer=sgd", "setting=tuned", "checkpoint_seconds=0", "progress=false"]
    done = subprocess.run(
        [*alone, script, sys.executable, *row], env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True
    )
    full, read_only = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert re.search("/checkpoint.pt: .*No space left on device.* .it takes 0.5 MiB, 0.[0-4] MiB are free", full)
    (left,) = (tmp_path / "left").rglob("*.pt")
    assert read_checkpoint(left)["state"]["iteration"] == 1 and done.stdout.count("resuming from") == 1
    assert re.search("/runs/.partial: the run's lock could not be written: .*Read-only.* Make that folder", read_only)
    assert "Traceback" not in done.stderr
    (folder,) = (tmp_path / "kept").glob("[!.]*/*")
    assert list(problems(folder)) == []


def test_a_file_in_the_way_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/runs").write_text("")
    done = launch(tmp_path / "outputs")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: .*outputs/runs/.partial: the run's lock could not be .*Move away what is in", done.stderr)


def test_where_hydra_cannot_write_the_last_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    done = launch(tmp_path / "outputs")
    assert done.returncode == 1
    assert re.search(r"error: .*outputs/logs.* could not be .*Move away what is in", done.stderr.splitlines()[-1])


def test_a_report_that_cannot_be_written_loses_no_run(tmp_path: Path) -> None:
    row = ["experiment=digits_shallow", "optimizer=sgd", "progress=false", *places(tmp_path)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/figures").write_text("in the way")
    done = Launch(*row).wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search("error: .*results/figures/digits_shallow.*The runs are in the store", done.stderr, re.DOTALL)
    (folder,) = Store(tmp_path / "results").folders()
    assert list(problems(folder)) == [] and not list((tmp_path / "results/tables").iterdir())
    (tmp_path / "results/figures").unlink()
    assert Launch(*row).wait().returncode == 0
    assert (tmp_path / "results/figures/digits_shallow.png").exists()


# --- What a kill leaves


def killed_between_two_renames(root: Path) -> Run:
    """The finished run whose place another one was about to take."""
    run, real = trained_run(root), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == run.folder:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        trained_run(root)
    assert not run.folder.exists()
    return run


def test_a_run_that_was_killed_while_it_took_another_one_s_place_is_put_back(tmp_path: Path) -> None:
    run = killed_between_two_renames(tmp_path)
    former = content(slot_of(run.folder).former)
    assert slot_of(run.folder).finished() is not None and content(run.folder) == former


def test_a_run_whose_place_another_one_was_to_take_is_not_removed_with_it(tmp_path: Path, command: Command) -> None:
    run = killed_between_two_renames(tmp_path)
    code, printed = command("check", "--store", tmp_path)
    assert code == 1 and f"{run.folder}: is in {slot_of(run.folder).former} since a kill" in printed
    code, printed = command("remove", "--interrupted", "--yes", "--store", tmp_path)
    assert code == 0 and f"put back: {run.folder}" in printed
    assert list(problems(run.folder)) == [] and not slot_of(run.folder).partial.exists()
    assert command("check", "--store", tmp_path)[0] == 0


def test_a_removed_run_does_not_come_back_from_what_a_kill_has_left(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    slot = slot_of(run.folder)
    shutil.copytree(run.folder, slot.former)
    slot.remove()
    assert slot.finished() is None


def test_what_a_kill_has_left_of_a_checkpoint_is_swept_away(tmp_path: Path) -> None:
    found = job(tmp_path)
    left = found.slot.partial / ".checkpoint.pt-abc"
    left.mkdir(parents=True)
    (left / "checkpoint.pt").write_text("half")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Slot, "complete", interrupt)
        execute(OmegaConf.create(found.config), found)
    assert {path.name for path in found.slot.partial.iterdir()} == {"started.json", "checkpoint.pt"}


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        (b"", "no checkpoint, or a damaged one; .* delete the file if"),
        (b"not a checkpoint", "no checkpoint, or a damaged one; .* delete the file if"),
        (None, "damaged .*; delete the file to start again"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damaged: bytes | None, told: str) -> None:
    leave_interrupted(tmp_path)
    path = job(tmp_path).slot.checkpoint
    path.write_bytes(path.read_bytes()[:-500] if damaged is None else damaged)
    with pytest.raises(CheckpointError, match=rf"checkpoint.pt: is {told}"):
        trained_run(tmp_path)


def leave_interrupted(root: Path) -> Job:
    """A run with a checkpoint of its last iteration."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Slot, "complete", interrupt)
        trained_run(root)
    return job(root)


def test_a_lock_ends_with_its_process(tmp_path: Path, command: Command) -> None:
    trained_run(tmp_path)
    slot = leave_interrupted(tmp_path).slot
    held = SERVER.Event()
    process = SERVER.Process(target=hold, args=(slot, held), daemon=True)
    process.start()
    assert held.wait(120)
    for flags in ((), ("--interrupted",)):
        code, printed = command("remove", slot.identity, "--yes", "--store", tmp_path, *flags)
        assert code == 1 and "not removed, a process is at work on it" in printed
    assert slot.folder.exists() and slot.checkpoint.exists()
    assert "at work" in command("list", "--store", tmp_path)[1]
    process.kill()
    process.join()
    assert "at work" not in command("list", "--store", tmp_path)[1]
    with slot.lock():
        pass
    assert command("remove", slot.identity, "--yes", "--store", tmp_path)[0] == 0
    assert not slot.folder.exists() and slot.checkpoint.exists()
    assert command("remove", slot.identity, "--yes", "--interrupted", "--store", tmp_path)[0] == 0
    assert not slot.partial.exists()


# --- The command line


def test_the_committed_store_checks_clean(command: Command) -> None:
    runs = list(ROOT.glob("results/runs/*/*/run.json"))
    code, printed = command("check", "--store", ROOT / "results")
    assert code == 0 and printed.startswith(f"{len(runs)} runs, 0 problems\n") and runs


def test_an_experiment_that_has_no_runs_is_named(tmp_path: Path, command: Command) -> None:
    trained_run(tmp_path)
    told = f"error: no runs of digits_shallo in {tmp_path}; it has digits_shallow; did you mean digits_shallow?"
    for name in ("check", "list", "remove"):
        assert command(name, "--experiment", "digits_shallo", "--store", tmp_path) == (1, told)


def edited(name: str, former: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert former in text
        (folder / name).write_text(text.replace(former, new, 1))

    return edit


def without_line(number: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        lines = (folder / "history.csv").read_text().splitlines(keepends=True)
        (folder / "history.csv").write_text("".join(lines[:number] + lines[number + 1 :]))

    return cut


def shortened(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:-3])  # type: ignore[return-value]


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("damage", "name", "told"),
    [
        (lambda folder: (folder / "run.json").unlink(), "run.json", "is missing"),
        (lambda folder: (folder / "history.csv").unlink(), "history.csv", "is missing"),
        (shortened("history.csv"), "history.csv", r"does not parse \(cut off\)"),
        (shortened("run.json"), "run.json", r"does not parse \(cut off\)"),
        (edited("config.yaml", "seeds:", "seeds: ["), "config.yaml", "does not parse"),
        (edited("config.yaml", "momentum: 0", "momentum: 1"), "config.yaml", "with the data's SHA-256 .* hashes to"),
        (edited("run.json", '"sha256": "9', '"sha256": "8'), "config.yaml", "with the data's SHA-256 .* hashes to"),
        (edited("run.json", '"iterations": 2', '"iterations": 1'), "run.json", "iterations is 1, not 2"),
        (edited("run.json", '"setting": "tuned"', '"setting": "mine"'), "run.json", "setting is mine, not tuned"),
        (
            edited("run.json", '"dataset"', '"data"'),
            "config.yaml, run.json or history.csv",
            "is not of a run .*dataset",
        ),
        (without_line(1), "history.csv", r"seed 0 \(replica 0\) has 2 of 3 evaluations"),
        (without_line(6), "history.csv", r"seed 1 \(replica 1\) has 2 of 3 evaluations"),
        (edited("history.csv", "2,1,1,", "2,1,7,"), "history.csv", r"seed 1 \(replica 1\) has 2 of 3"),
        (lambda folder: (folder / "notes.txt").write_text("mine"), "notes.txt", "is not of a run"),
    ],
)
def test_damage_is_found(
    tmp_path: Path, command: Command, two_runs: Path, damage: Callable[[Path], None], name: str, told: str, hashed: bool
) -> None:
    shutil.copytree(two_runs, tmp_path, dirs_exist_ok=True)
    run, other = (job(tmp_path, *overrides).slot for overrides in ((), ("optimizer.step_size=0.01",)))
    for folder in () if hashed else (run.folder, other.folder):
        (folder / "SHA256SUMS").unlink()
    assert command("check", "--store", tmp_path)[0] == 0
    damage(run.folder)
    code, printed = command("check", "--store", tmp_path)
    first, *_ = printed.splitlines()
    assert code == 1
    if hashed and told != "is missing":
        assert re.fullmatch(rf"{run.folder}: \S+: (was changed, its SHA-256 is not that|is not) in SHA256SUMS", first)
    else:
        assert re.match(f"{run.folder}: {name}: {told}", first), first
    assert ("2 have no SHA256SUMS" in printed) != hashed
    assert "2 finished" in command("list", "--store", tmp_path)[1]


def test_a_changed_digit_is_found_where_there_are_hashes(tmp_path: Path, command: Command) -> None:
    run = trained_run(tmp_path)
    history = (run.folder / "history.csv").read_text()
    (run.folder / "history.csv").write_text(history.replace("7", "8", 1))
    code, printed = command("check", "--store", tmp_path)
    assert code == 1 and "history.csv: was changed" in printed and "1 runs, 1 problems" in printed


def test_the_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    run = trained_run(tmp_path)
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=run.folder, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count(": OK") == 3


def test_a_renamed_folder_and_garbled_hashes_are_found(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    moved = run.folder.with_name("sgd-tuned-000000000000")
    os.replace(run.folder, moved)
    assert [problem.split(":")[0] for problem in problems(moved)] == ["config.yaml", "run.json"]
    (moved / "SHA256SUMS").write_text("garbled\n")
    assert list(problems(moved)) == ["SHA256SUMS: does not parse"]


def test_what_begins_beyond_the_numbers_is_a_finished_run(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "init=normal", "init.std=1e30", "iterations=3")
    assert run.info["diverged"] == {"0": 0, "1": 0} and list(problems(run.folder)) == []
    assert list(run.history["iteration"]) == [0, 0] and report_on(run).score(run) == {0: 0.0, 1: 0.0}
    assert "2 of 2 seeds diverged" in curves([run])[0].setting


def test_a_run_that_another_process_moves_away_is_not_listed(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "iterations=1")
    found = oldest_first([tmp_path / "gone" / "run.json", run.folder / "run.json"])
    assert [Path(run.folder) for run in found] == [run.folder]


def test_a_diverged_seed_is_told_once_and_has_no_evaluations_to_come(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained_run(tmp_path, "~optimizer.step_size", "+optimizer.step_size=[0.1,1e30]", "iterations=3")
    assert caplog.text.count("seed 1 diverged (not finite after iteration 1)") == 1 and not recwarn.list
    assert run.info["diverged"] == {"1": 1} and list(problems(run.folder)) == []
    (run.folder / "SHA256SUMS").unlink()
    edited("run.json", '"1": 1', '"1": 2')(run.folder)
    assert list(problems(run.folder)) == ["history.csv: seed 1 (replica 1) has 1 of 2 evaluations, or others"]


def test_a_seed_that_diverges_in_a_race_has_no_evaluations_to_come(tmp_path: Path) -> None:
    found = job(tmp_path, "evaluate_every=2")
    config = found.config | {"optimizers": ["sgd"]}
    sha = identity(config, CHOICES, found.dataset.sha256)
    found = replace(found, config=config, slot=replace(found.slot, identity=sha), info=found.info | {"identity": sha})
    histories = [
        [{"replica": r, "iteration": i, "seed": r, "seconds": 1.0, "test_accuracy": 9.0} for i in range(last + 1)]
        for r, last in ((0, 2), (1, 0))
    ]
    run = walltime.complete(found, histories)
    assert run.info["diverged"] == {"1": 1} and list(problems(run.folder)) == []


def test_a_run_json_that_is_no_record_is_named(tmp_path: Path, command: Command) -> None:
    run = trained_run(tmp_path, "iterations=1")
    (run.folder / "run.json").write_text("[]\n", encoding="utf-8")
    (run.folder / "SHA256SUMS").unlink()
    code, printed = command("check", "--store", tmp_path)
    assert code == 1 and f"{run.folder}: config.yaml, run.json or history.csv: is not of a run (ValueError" in printed
    assert "damaged, see check" in command("list", "--store", tmp_path)[1]
    with pytest.raises(ValueError, match=r"run\.json: is damaged \(ValueError: a list is no record of a run\)"):
        Run(run.folder).record  # noqa: B018


def test_list_tells_finished_and_interrupted_runs(tmp_path: Path, command: Command) -> None:
    run = trained_run(tmp_path, "optimizer.step_size=0.01")
    left = leave_interrupted(tmp_path).slot
    code, printed = command("list", "--store", tmp_path)
    assert code == 0
    accuracy = run.history.loc[run.history["iteration"] == 2, "test_accuracy"].mean()
    finished, interrupted = printed.split("1 interrupted")
    assert slot_of(run.folder).identity in finished and f"{accuracy:.2f} %" in finished and "2001-01-01" in finished
    assert left.identity in interrupted and "iteration 2 of 2" in interrupted and "none" in interrupted
    (left.checkpoint).write_text("damaged")
    assert "damaged" in command("list", "--store", tmp_path)[1]
    code, printed = command("list", "--store", tmp_path, "--experiment", "another")
    assert code == 1 and printed == f"error: no runs of another in {tmp_path}; it has digits_shallow"
    assert command("list", "--store", tmp_path / "nowhere") == (
        1,
        f"error: {tmp_path}/nowhere has no runs/; --store <folder> names another store, such as outputs",
    )


def test_compare_shows_what_differs_and_the_numbers(tmp_path: Path, command: Command) -> None:
    first, second = trained_run(tmp_path), trained_run(tmp_path / "other", "optimizer.step_size=0.0123")
    for run, changed in ((first, "1"), (second, "2")):
        told = json.dumps(run.info | {"sources": {"admm/a.py": "0", "admm/b.py": changed}})
        (run.folder / "run.json").write_text(told)
    code, printed = command("compare", slot_of(first.folder).identity[:5], second.folder, "--store", tmp_path)
    assert code == 0 and "sources.admm/b.py" in printed and "sources.admm/a.py" not in printed
    configuration, rest = re.split(r"\n +run *\n", printed)
    assert "optimizer.step_size" in configuration and "0.0123" in configuration and "model" not in configuration
    assert "versions.torch" in rest
    for run in (first, second):
        last = run.history[run.history["iteration"] == 2]
        assert f"{last['test_accuracy'].mean():.5g}" in rest
    code, printed = command("compare", "f" * 12, second.folder, "--store", tmp_path)
    assert code == 1 and f"'ffffffffffff' is no run of {tmp_path}; --store <folder> names" in printed


def test_numbers_of_a_hold_out_are_called_held_out(tmp_path: Path, command: Command) -> None:
    run = trained_run(tmp_path)
    (run.folder / "run.json").write_text(json.dumps(run.info | {"dataset": {"holdout": 20}}))
    listed, compared = (command(*what, "--store", tmp_path)[1] for what in (["list"], ["compare", *2 * [run.folder]]))
    assert "held-out" in listed and "held_out_accuracy" in compared and "test_accuracy" not in compared


def test_remove_asks(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = trained_run(tmp_path), trained_run(tmp_path, "optimizer.step_size=0.01")
    name, places = slot_of(run.folder).identity, ["--store", tmp_path]
    for answer in ("", "n"):
        monkeypatch.setattr(builtins, "input", lambda question: answer)  # noqa: B023
        assert command("remove", name, *places)[0] == 1 and run.folder.exists()
    assert command("remove", *places)[0] == 1 and run.folder.exists()
    twin = shutil.copytree(run.folder, run.folder.with_name(f"twin-{name}"))
    assert f"{name!r} is 2 runs of {tmp_path}" in command("remove", name, "--yes", *places)[1]
    assert command("remove", twin, "--yes", *places)[0] == 0 and run.folder.exists() and not twin.exists()
    monkeypatch.setattr(builtins, "input", lambda question: "y")
    assert command("remove", name, *places)[0] == 0
    assert not run.folder.exists() and other.folder.exists()
    assert command("remove", "--experiment", "..", "--yes", *places)[0] == 1
    assert command("remove", tmp_path, "--yes", *places)[0] == 1 and other.folder.exists()
    assert command("remove", "--experiment", "digits_shallow", "--yes", *places)[0] == 0
    assert Store(tmp_path).folders() == [] and not list((tmp_path / "runs/.partial").glob("*.removed"))


def test_a_removal_that_fails_leaves_no_half_of_a_run(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run(tmp_path)
    before, name = content(run.folder), slot_of(run.folder).identity

    def fail(path: Path, *_: Any, **__: Any) -> None:
        if path.exists():
            raise OSError(errno.EIO, "broken")

    for broken, module in (("replace", os), ("rmtree", shutil)):
        with monkeypatch.context() as patch:
            patch.setattr(module, broken, fail)
            code, printed = command("remove", name, "--yes", "--store", tmp_path)
            assert code == 1 and "error: [Errno 5] broken" in printed
        assert not run.folder.exists() if broken == "rmtree" else content(run.folder) == before
    assert command("remove", "--interrupted", "--yes", "--store", tmp_path)[0] == 0
    assert not list((tmp_path / "runs/.partial").glob("*.removed"))
