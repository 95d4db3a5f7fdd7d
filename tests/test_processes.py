"""The suite on several processes: a run that loses one goes on alone, and what a launch cannot share out."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from omegaconf import OmegaConf

from admm.parallel import ALONE, Parallel, ProcessError
from experiments import checks, processes
from experiments.checks import started
from experiments.reports.base import report_of
from experiments.store import Slot, Store
from experiments.tasks import scaling
from experiments.tasks.scaling import _joined
from tests.launches import RUN, multirun, places, single
from tests.stores import run_json

DIGITS = ["experiment=digits_shallow", "optimizer=block_admm", "optimizer.sweep=batch", "seeds=[0]"]
LONG = [*DIGITS, "dtype=float64", "iterations=60", "evaluate_every=20", "checkpoint_seconds=0", "progress=false"]


def torchrun(*command: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=2` of a script with arguments; stderr goes with stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=RUN.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def launched(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=2 run.py` with these arguments."""
    return torchrun(str(RUN), *places(folder), *arguments)


def of_rank(launch: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launch.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def histories(folder: Path) -> list[pd.DataFrame]:
    return [run.history.drop(columns="seconds") for run in Store(folder / "outputs").runs("digits_shallow")]


def test_a_run_that_loses_a_process_ends_and_goes_on_alone(tmp_path: Path) -> None:
    launch = launched(tmp_path, *LONG, "parallel=blocks")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/runs/.partial/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    of_rank(launch, 1).kill()
    killed = time.monotonic()
    printed, _ = launch.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert launch.returncode == 1
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9 .*SIGKILL", printed), printed
    assert histories(tmp_path) == []

    single(*LONG, *places(tmp_path))
    single(*LONG, *places(tmp_path / "alone"))
    (resumed,), (whole,) = histories(tmp_path), histories(tmp_path / "alone")
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-6)  # as printed in the store


@pytest.mark.long
def test_a_launch_on_two_processes_makes_its_runs(tmp_path: Path) -> None:
    rows = ["experiment=digits_shallow", "optimizer=standard_admm,bcd,sgd", "iterations=2", "dtype=float64"]
    launch = launched(tmp_path, *rows, "parallel=samples")
    printed, _ = launch.communicate(timeout=200)
    assert launch.returncode == 1  # for sgd, whose seeds have mini-batches of their own
    assert "seeds: [0, 1, 2, 3, 4], but with parallel='samples'" in printed and "start a run per seed" in printed
    runs = {run.record.method: run for run in Store(tmp_path / "outputs").runs("digits_shallow")}
    assert runs.keys() == {"standard_admm", "bcd"}
    assert all(run.info["processes"] == 2 and run.info["parallel"] == "samples" for run in runs.values())
    rows[1] = "optimizer=bcd"
    again, _ = launched(tmp_path, *rows, "parallel=samples").communicate()
    assert "is there already" in again


def test_the_example_of_the_page_runs_on_two_processes(tmp_path: Path) -> None:
    script = re.search(r'title="on_two.py"\n(.*?)```', (RUN.parent / "docs/parallel.md").read_text(), re.DOTALL)
    assert script is not None
    (tmp_path / "on_two.py").write_text(script[1])
    launch = torchrun(str(tmp_path / "on_two.py"))
    printed, _ = launch.communicate()
    assert launch.returncode == 0, printed
    assert float(printed.split()[-1]) < 2.4  # the first process alone has printed the loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel=rows"], "parallel: 'rows' is not one of samples, blocks, or null"),
        (["parallel=samples"], "parallel: 'samples' is for processes that torchrun starts"),
        (["parallel=samples", "hydra/launcher=joblib"], "launcher with workers of its own do not go together"),
    ],
)
def test_what_cannot_be_shared_out_is_told(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=message):
        multirun(*DIGITS, *arguments, *places(tmp_path))


def test_an_experiment_of_another_task_runs_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="parallel: samples, but experiment=memory runs in one process; take null"):
        multirun("experiment=memory", "optimizer=block_admm", "parallel=samples", *places(tmp_path))


def test_torchrun_starts_no_processes_for_a_run_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "started", lambda: 2)
    with pytest.raises(SystemExit, match="null, but torchrun has started 2 processes; take samples or blocks"):
        multirun(*DIGITS, *places(tmp_path))
    with pytest.raises(SystemExit, match="null, but torchrun has started 2 processes; start experiment=memory without"):
        multirun("experiment=memory", "optimizer=block_admm", *places(tmp_path))


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # of another program
    assert started() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert started() == 4


def test_what_fails_in_one_process_fails_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ALONE.together(lambda: 3) == 3
    monkeypatch.setattr(Parallel, "all", lambda self, text: [text, "no data set"])
    with pytest.raises(ProcessError, match="process 1: no data set"):
        Parallel(size=2).together(lambda: 3)


@pytest.mark.parametrize("error", [None, ValueError("beta: 0.0 is not positive"), RuntimeError("no memory")])
def test_a_process_that_the_others_do_not_meet_ends(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(*_: object, **__: object) -> None:
        raise RuntimeError("rank 1 has not come")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(processes.dist, "monitored_barrier", wait)
    monkeypatch.setattr(processes, "_groups", lambda: (None, None))
    monkeypatch.setattr(processes.os, "_exit", end)
    with pytest.raises(SystemExit, match="1"), processes.alike(Parallel(size=2)):
        if error is not None:
            raise error
    printed = capsys.readouterr().err
    assert "RuntimeError" in printed and str(error or "rank 1") in printed


def measured(processes: int, seconds: float, variables: int) -> dict[str, Any]:
    of_all = [[variables, 2 * variables, 10, rank] for rank in range(processes)]
    return _joined(processes, [seconds, 9 * seconds, seconds], of_all)


def test_contestants_take_turns_and_the_fastest_iteration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, called = iter([4.0, 2.0, 3.0, 2.5]), list[tuple[int, int]]()

    def on_processes(_: Any, processes: int, threads: int) -> dict[str, float]:
        called.append((processes, threads))
        return {"seconds": next(seconds)}

    monkeypatch.setattr(scaling, "on_processes", on_processes)
    assert scaling.race(OmegaConf.create({"turns": 2}), [(1, 1), (2, 1)]) == [{"seconds": 3.0}, {"seconds": 2.0}]
    assert called == [(1, 1), (2, 1), (1, 1), (2, 1)]


def test_speed_and_memory_are_drawn_against_processes(tmp_path: Path) -> None:
    rows = [measured(1, 4.0, 2**21), measured(2, 2.5, 2**20)]
    assert rows[1] == {"processes": 2, "seconds": 2.5, "variables": 2**20, "peak": 2**21, "added": 20, "sent": 1}
    told = run_json("bcd", "samples_wide", "2001", experiment="parallel", seeds=[0], iterations=2)
    run = Slot(tmp_path, "parallel", "bcd-samples_wide", "0" * 12).complete({"optimizer": {}}, rows, told)
    report = report_of("parallel")
    table = report.table([run])
    assert list(table["times faster"]) == [1.0, 1.6]
    assert list(table["variables (MiB)"]) == [2.0, 1.0]
    assert report.headline(run) == (1.6, "×")
    (figure,) = report.figures([run]).values()
    speed, memory = figure.axes
    assert list(speed.lines[0].get_ydata()) == [1.0, 1.6] and list(memory.lines[0].get_ydata()) == [1.0, 0.5]
    assert "by samples, wide" in speed.lines[0].get_label()
