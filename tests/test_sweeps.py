"""Sweeps: cells stacked in one process, shared by launches, in parallel processes, searched by Optuna, cut short."""

from __future__ import annotations

import errno
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from itertools import permutations
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from joblib import cpu_count
from launches import Launch, multirun, places, single
from omegaconf import DictConfig, OmegaConf
from stores import add_run, run_json
from test_protocol import CASES, problem_of

from admm.checkpoints import History, save, size
from admm.data import load
from admm.files import WriteError, atomic_write, explain_write_errors
from admm.optimizers import Problem
from experiments import device, training
from experiments.errors import BadInput, user_errors
from experiments.hints import hints
from experiments.launching import failures, stacking
from experiments.launching.rows import Rows
from experiments.launching.stacking import (
    Cell,
    Share,
    check_limits,
    cut,
    hyperparameters,
    join_values,
    with_blanks,
    worthwhile_on_cpu,
)
from experiments.launching.study import study_locks, take_up, wait_for
from experiments.loggers import Guarded, Logger, WandbLogger
from experiments.reports.scores import mean_score, scores
from experiments.reports.searches import rankings, write_ranking
from experiments.store import LEFT, Run, Slot, Store, launched_runs, slot_of
from experiments.tasks import classification
from experiments.training import Prepared
from scripts.benchmarks import kill_a_sweep

ROOT = Path(__file__).parents[1]
GRID = ["experiment=digits_shallow", "seeds=[0,1]", "iterations=3", "threads=1"]
NO_REPORT = "~hydra.callbacks.report"  # where it is not looked at: to draw takes as long as to train
STACKABLE = ["optimizer=online_block_admm", "optimizer.theta_step=1e-3,1e-2", "optimizer.beta=0.5,1"]
STACKABLE += ["dataset.first=500"]


def sweep(folder: Path, *arguments: str) -> list[str]:
    return ["-m", *GRID, *places(folder), *arguments]


def launch(folder: Path, *arguments: str) -> str:
    """In this process; what is printed."""
    with redirect_stdout(StringIO()) as printed:
        multirun(*GRID, *places(folder), *arguments)
    return printed.getvalue()


def launch_processes(folder: Path, *arguments: str) -> str:
    """By a launcher that has processes of its own, which only the end of an interpreter ends. Some of the sweep's cells
    fail; what is printed of them."""
    command = [sys.executable, str(ROOT / "run.py"), *sweep(folder, *arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Warning: Callback" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def stored(folder: Path) -> dict[str, Run]:
    return {path.parent.name: Run(path.parent) for path in sorted(folder.glob("outputs/runs/*/*/run.json"))}


def same(left: dict[str, Run], right: dict[str, Run], **how: Any) -> None:
    assert left.keys() == right.keys()
    for name, run in left.items():
        one, other = (r.history.drop(columns="seconds") for r in (run, right[name]))
        pd.testing.assert_frame_equal(one, other, **how)


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Eight cells, one by one."""
    folder = tmp_path_factory.mktemp("basic")
    launch(folder, *STACKABLE, "optimizer.batch_size=64,128", NO_REPORT)
    return stored(folder)


@pytest.fixture
def four(basic: dict[str, Run]) -> dict[str, Run]:
    """Those of `STACKABLE` with mini-batches of 64."""
    return {name: run for name, run in basic.items() if "optimizer.batch_size=64" in run.info["overrides"]}


# --- Stacks


def test_stacked_cells_have_the_numbers_of_their_own_runs(tmp_path: Path, basic: dict[str, Run]) -> None:
    output = launch(tmp_path, *STACKABLE, "optimizer.batch_size=64,128", "hydra/launcher=stacked", NO_REPORT)
    assert output.count("4 cells, 8 replicas, as one stack") == 2
    assert output.count("is there already") == 8
    found = stored(tmp_path)
    same(found, basic, rtol=1e-5, atol=1e-4)
    assert {run.info["stack"] for run in found.values()} == {8}
    for name, run in found.items():
        for key in ("seeds", "overrides", "identity", "setting", "diverged", "iterations"):
            assert run.info[key] == basic[name].info[key]
        assert (run.folder / "config.yaml").read_text() == (basic[name].folder / "config.yaml").read_text()
    assert list(tmp_path.glob("outputs/runs/.partial/*/")) == []


def test_what_cannot_be_stacked_is_run_alone(tmp_path: Path) -> None:
    """Another optimizer, a rule's own number, and a cell alone; and networks that autograd evaluates by replica."""
    output = launch(
        tmp_path,
        "optimizer=sgd,adam",
        "optimizer.theta_update.weight_decay=0,1e-3",
        "hydra/launcher=stacked",
        "iterations=1",
        "seeds=[0]",
        NO_REPORT,
    )
    assert "as one stack" not in output and len(stored(tmp_path)) == 4
    assert "4 of 4 jobs are no part of a stack: they run one by one; a stack's jobs differ in seeds and " in output
    assert "optimizer.step_size alone, what its class annotates as … | Sequence[float]" in output
    network = ["model=resnet18", "model.width=2", "optimizer=sgd", "optimizer.step_size=0.1,0.2", "iterations=1"]
    network += ["seeds=[0]", NO_REPORT]
    assert "as one stack" not in launch(tmp_path / "conv", *network, "dataset.first=100", "hydra/launcher=stacked")


def test_a_cell_with_a_wrong_number_is_left_to_its_own_run(tmp_path: Path) -> None:
    arguments = ["optimizer=sgd", "optimizer.step_size=-0.1,0.1,0.2", "hydra/launcher=stacked", "iterations=1"]
    with pytest.raises(
        SystemExit, match=r"^error: optimizer.step_size: -0\.1 .*\n.*/0: optimizer.step_size=-0.1\n1 job"
    ):
        launch(tmp_path, *arguments)
    assert len(pd.read_csv(next(tmp_path.glob("outputs/logs/*/*/*.csv")))) == 2
    assert [run.info["stack"] for run in stored(tmp_path).values()] == [4, 4]


def test_cells_share_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the data vary faster than the number."""
    loaded = []
    monkeypatch.setattr(stacking, "load_dataset", lambda **options: loaded.append(options) or load(**options))
    arguments = ["optimizer.step_size=0.1,0.2", "dataset.holdout=300", "dataset.holdout_seed=0,1", "iterations=1"]
    arguments += [NO_REPORT]
    output = launch(tmp_path, "optimizer=sgd", *arguments, "hydra/launcher=stacked")
    assert len(loaded) == 2 and output.count("2 cells, 4 replicas, as one stack") == 2


def test_a_limit_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: hydra\.launcher\.replicas: 'abc' is not a whole number from 1 up"):
        launch(tmp_path, "optimizer=sgd", "hydra/launcher=stacked", "hydra.launcher.replicas=abc")
    for replicas in (0, -3, 1.5):
        with pytest.raises(SystemExit, match=f"^error: hydra.launcher.replicas: {replicas} is not"):
            check_limits(replicas, None)
    for memory in (-1, 0, "much"):
        with pytest.raises(
            SystemExit, match=f"^error: hydra.launcher.memory: {memory!r} is not a number of GiB above 0"
        ):
            check_limits(None, memory)


def test_threads_of_one_job_are_not_the_next_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "THREADS", 2)
    former = torch.get_num_threads()
    for threads, recorded in (("1", "1 thread"), ("null", "2 threads")):
        launch(tmp_path / threads, "optimizer=sgd", f"threads={threads}", "iterations=1", "seeds=[0]", NO_REPORT)
        (run,) = stored(tmp_path / threads).values()
        assert run.info["machine"].endswith(f", {recorded}")
    torch.set_num_threads(former)


def test_a_diverged_seed_is_its_cells_alone(tmp_path: Path) -> None:
    output = launch(tmp_path, "optimizer=sgd", "optimizer.step_size=0.1,1e30", "hydra/launcher=stacked", NO_REPORT)
    assert re.search(r"sgd-tuned-stack: seed 1 of \w{12} \(.*optimizer.step_size=1e\+30.*\) diverged", output)
    trained, diverged = sorted(stored(tmp_path).values(), key=lambda run: len(run.info["diverged"]))
    assert trained.info["diverged"] == {} and set(diverged.info["diverged"]) == {"0", "1"}
    assert scores([diverged]) == {0: 0.0, 1: 0.0} and min(scores([trained]).values()) > 0.0


def test_a_killed_stack_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    arguments = [*STACKABLE[:2], "hydra/launcher=stacked", "iterations=6", "checkpoint_seconds=0", NO_REPORT]
    Launch(*sweep(tmp_path / "killed", *arguments)).kill_when_there(
        tmp_path / "killed", "outputs/runs/.partial/*/checkpoint.pt"
    )
    assert stored(tmp_path / "killed") == {}
    assert "resuming from" in launch(tmp_path / "killed", *arguments)
    launch(tmp_path / "whole", *arguments)
    same(stored(tmp_path / "killed"), stored(tmp_path / "whole"), check_exact=True)


@pytest.mark.long
def test_a_stack_that_was_killed_among_its_results_is_not_trained_again(tmp_path: Path) -> None:
    arguments = [*STACKABLE, "hydra/launcher=stacked", "iterations=6", "checkpoint_seconds=0"]
    Launch(*sweep(tmp_path, *arguments)).kill_when_there(tmp_path, "outputs/runs/digits_shallow/*/run.json")
    before = {name: run.folder.stat().st_mtime_ns for name, run in stored(tmp_path).items()}
    output = launch(tmp_path, *arguments)
    after = {name: run.folder.stat().st_mtime_ns for name, run in stored(tmp_path).items()}
    assert len(after) == 4 and before.items() <= after.items()
    if len(before) == 4:
        pytest.skip("the kill came too late for what follows")
    assert "iteration 6/6" in output and "iteration 5/6" not in output.split("resuming from")[1]


HOLD = """
import pathlib, sys, time, filelock
locks = [filelock.FileLock(file) for file in sys.argv[3:]]
for lock in locks: lock.acquire()
print("held", flush=True)
while len(list(pathlib.Path(sys.argv[1]).rglob(sys.argv[2]))) < 4: time.sleep(0.05)
"""


@pytest.mark.long
@pytest.mark.parametrize("of", ["the stack and its cells", "the cells"])
def test_a_stack_is_gone_on_with_after_the_death_of_a_process_at_it(tmp_path: Path, of: str) -> None:
    """A process holds locks, and ends when the launch has left it all of the cells."""
    arguments = [*STACKABLE, "hydra/launcher=stacked", "iterations=6", "checkpoint_seconds=0"]
    Launch(*sweep(tmp_path, *arguments)).kill_when_there(tmp_path, "outputs/runs/.partial/*/checkpoint.pt")
    (checkpoint,) = tmp_path.glob("outputs/runs/.partial/*/checkpoint.pt")
    names = json.loads((checkpoint.parent / "started.json").read_text())["cells"]
    names += [checkpoint.parent.name] if of.startswith("the stack") else []
    files = [str(checkpoint.parents[1] / f"{name}.lock") for name in names]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), LEFT, *files], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        output = launch(tmp_path, *arguments)
    assert output.count("left to it") == 4 and f"resuming from {checkpoint}" in output
    assert "iteration 0/6" not in output and {run.info["stack"] for run in stored(tmp_path).values()} == {8}
    assert list(tmp_path.glob("outputs/runs/.partial/*/")) == []


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_variables_are_known_from_those_of_some_samples(
    case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, optimizer = problem_of(CASES[case], request), CASES[case].optimizer
    samples: list[int] = []

    def init(part: Problem, seeds: Any) -> Any:
        samples.append(len(part.x))
        return optimizer.init(part, seeds)

    monkeypatch.setattr(stacking, "SOME", getattr(optimizer, "batch_size", 3))
    found = stacking.bytes_of_variables(problem, SimpleNamespace(init=init), (0, 1))
    assert samples == [stacking.SOME, 2 * stacking.SOME]
    assert found == size(save(optimizer.init(problem, (0, 1))))
    monkeypatch.setattr(stacking, "SOME", 1)  # mini-batches are larger
    assert stacking.bytes_of_variables(problem, optimizer, (0, 1)) == found


def cells(counts: list[int]) -> list[Cell]:
    def cell(number: int, seeds: int) -> Cell:
        job: Any = SimpleNamespace(info={"seeds": list(range(seeds)), "identity": number})
        return Cell(job, "", 1.0, 64)

    return [cell(number, seeds) for number, seeds in enumerate(counts)]


@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 40))
def test_a_cut_keeps_the_order_and_the_limit(number: int, seeds: int, most: int) -> None:
    whole = cells([seeds] * number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking, "largest_stack", lambda *_: most)
        parts = list(cut(whole, None, None))
    taken = [cell.job.info["identity"] for part in parts for cell in part]
    assert taken == sorted(set(taken))
    assert all(len(part) > 1 and len(part) * seeds <= most for part in parts)
    if number > 1 and number * seeds <= most:
        assert parts == [whole]
    elif most >= 3 * seeds and number > 1:
        assert len(taken) == number  # none alone
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_limit_is_of_replicas_and_of_memory(tmp_path: Path) -> None:
    """A grid of three cells with two seeds each."""
    assert [worthwhile_on_cpu(samples) for samples in (64, 128, 512, 60000)] == [45, 45, 11, 0]
    three = ["optimizer=sgd", "optimizer.step_size=0.1,0.2,0.3", "iterations=1", "hydra/launcher=stacked", NO_REPORT]
    assert "2 cells, 4 replicas, as one stack" in launch(tmp_path / "some", *three, "hydra.launcher.replicas=5")
    assert "as one stack" not in launch(tmp_path / "small", *three, "hydra.launcher.memory=1e-5")
    assert "as one stack" not in launch(tmp_path / "large", *three, "optimizer.batch_size=1000", "seeds=[0,1,2]")


def test_hyperparameters_that_may_be_one_a_replica() -> None:
    optimizer = {
        "_target_": "admm.optimizers.OnlineBlockADMM",
        "theta_step": 1,
        "batch_size": 2,
        "beta": 3,
        "theta_update": {},
    }
    assert hyperparameters(optimizer) == ["theta_step", "beta"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0.1, 0.1, 0.1),
        (0.1, 0.2, [0.1, 0.1, 0.2, 0.2]),
        ({"start": 1, "end": 0}, {"start": 2, "end": 0}, {"start": [1, 1, 2, 2], "end": 0}),
        ({"blocks": [1, 2]}, {"blocks": [1, 3]}, {"blocks": [1, [2, 2, 3, 3]]}),
        ({"blocks": [1, {"start": 2, "end": 0}]}, {"blocks": [4, {"start": 3, "end": 0}]},
         {"blocks": [[1, 1, 4, 4], {"start": [2, 2, 3, 3], "end": 0}]}),
    ],
)  # fmt: skip
def test_values_of_two_cells_are_joined(first: Any, second: Any, expected: Any) -> None:
    """Of two seeds each."""
    assert join_values([first, second], 2) == expected


def test_blanks_stand_for_numbers_alone() -> None:
    assert with_blanks({"start": 1, "end": 0.5}) == {"start": "a number", "end": "a number"}
    assert with_blanks({"blocks": [1, {"start": 2.0}]}) == {"blocks": ["a number", {"start": "a number"}]}
    assert with_blanks(True) is True and with_blanks(None) is None and with_blanks("adam") == "adam"


def test_a_cells_share_of_a_history() -> None:
    rows = [
        {"iteration": 1, "replica": r, "seed": r % 2, "seconds": 5.0, "train_loss": float(r)} for r in (0, 1, 2, 3, 5)
    ]
    second = Share(cells([2, 2])[1], 1, 4)
    own = second.of(History(rows, 10.0, 8.0, {3: 1, 4: 1}))
    assert [(row["replica"], row["seed"], row["train_loss"]) for row in own.rows] == [(0, 0, 2.0), (1, 1, 3.0)]
    assert own.rows[0]["seconds"] == 1.25 and own.seconds == 2.5 and own.compile_seconds == 2.0
    assert own.diverged == {1: 1}


# --- Two launches, parallel processes


@pytest.mark.long
def test_two_launches_share_a_sweep(tmp_path: Path, four: dict[str, Run]) -> None:
    arguments = [*STACKABLE, "optimizer.batch_size=64"]
    both = [Launch(*sweep(tmp_path, *arguments)) for _ in range(2)]
    done = [one.wait() for one in both]
    assert [one.returncode for one in done] == [0, 0], done
    assert sum(one.stdout.count("iteration 3/3") for one in done) == 4  # none is made twice
    same(stored(tmp_path), four, check_exact=True)
    tables = [pd.read_csv(path) for path in tmp_path.glob("outputs/logs/*/*/*.csv")]
    assert [len(table) for table in tables] == [4, 4]  # each launch has a folder of its own


def test_what_a_dying_process_leaves_is_made_at_the_end(tmp_path: Path, four: dict[str, Run]) -> None:
    """It holds a run's lock while the sweep gets there, and dies before it ends."""
    identity = next(iter(four)).rsplit("-", 1)[1]
    slot = Slot(tmp_path / "outputs", "digits_shallow", "", identity)
    slot.partial.mkdir(parents=True)
    file = str(slot.partial.with_suffix(".lock"))
    hold = f"import time, filelock; lock = filelock.FileLock({file!r}); lock.acquire(); time.sleep(300)"
    holder = subprocess.Popen([sys.executable, "-c", hold])
    launched = Launch(*sweep(tmp_path, *STACKABLE, "optimizer.batch_size=64"))
    deadline, logs = time.monotonic() + 120, tmp_path / "outputs/logs"
    while (len(stored(tmp_path)) < 3 or not list(logs.rglob(LEFT))) and time.monotonic() < deadline:
        time.sleep(0.05)
    (_,) = logs.rglob(LEFT)
    assert identity not in {name.rsplit("-", 1)[1] for name in stored(tmp_path)}
    holder.kill()
    assert launched.wait().returncode == 0
    same(stored(tmp_path), four, check_exact=True)


def test_a_sweep_that_lacks_a_cell_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is left to another process, which dies; one of them fails when it is made at the end."""
    made = classification.execute

    @contextmanager
    def lock(slot: Slot, wait: bool = True) -> Iterator[bool]:
        yield wait

    def execute(config: DictConfig, job: Any) -> Run:
        if config.optimizer.step_size == 0.1:
            raise RuntimeError("out of memory")
        return made(config, job)

    monkeypatch.setattr(Slot, "lock", lock)
    monkeypatch.setattr(classification, "execute", execute)
    with pytest.raises(
        SystemExit, match=r"^error: RuntimeError: out of memory\n\s+\S+/0: optimizer.step_size=0.1\n1 job "
    ):
        launch(tmp_path, "optimizer=sgd", "optimizer.step_size=0.1,0.2", "iterations=1")
    assert len(stored(tmp_path)) == 1 and list(tmp_path.glob("outputs/logs/*/*/digits_shallow.png"))


@pytest.mark.long
def test_parallel_processes_divide_the_processor(tmp_path: Path, four: dict[str, Run]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = [
        *STACKABLE[:2],
        STACKABLE[3],
        "optimizer.beta=0.5,-1",
        "optimizer.batch_size=64",
        "hydra/launcher=joblib",
    ]
    arguments += ["hydra.launcher.n_jobs=2"]
    assert "\n2 jobs failed" in launch_processes(tmp_path, *arguments, "threads=null")
    half = {name: run for name, run in four.items() if "optimizer.beta=0.5" in run.info["overrides"]}
    same(stored(tmp_path), half, rtol=1e-5, atol=1e-4)
    share = max(1, cpu_count() // 2)
    machines = {run.info["machine"] for run in stored(tmp_path).values()}
    assert [machine.rsplit(", ")[-1] for machine in machines] == [f"{share} thread{'s' if share > 1 else ''}"]


@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_cells_are_jobs_of_a_cluster(tmp_path: Path, launcher: str) -> None:
    """Those of Slurm by the launcher's own executor without a cluster."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    printed = launch_processes(
        tmp_path, "optimizer=sgd", "optimizer.step_size=-1,0.1,0.2", f"hydra/launcher={launcher}"
    )
    assert re.search(r"error: optimizer.step_size: -1 is not .*\n.*/0: optimizer.step_size=-1\n1 job failed", printed)
    launch(tmp_path / "basic", "optimizer=sgd", "optimizer.step_size=0.1,0.2")
    same(stored(tmp_path), stored(tmp_path / "basic"), rtol=1e-5, atol=1e-4)
    assert len(list(tmp_path.glob("outputs/logs/*/*/digits_shallow.csv"))) == 1


def test_slurm_s_jobs_are_queued_again() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        launcher = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.max_num_timeout > 0
    assert 0 < launcher.signal_delay_s < 60 * launcher.timeout_min and launcher.gpus_per_node is None


# --- Cells that fail

NEAR = ["optimizer=sgd", "iterations=1", "seeds=[0]"]


def failing_at(monkeypatch: pytest.MonkeyPatch, errors: dict[int, BaseException]) -> None:
    """By the size of mini-batches, as a model that does not hold what it promises, or that ends the program."""
    real = classification.prepared

    def prepared(config: DictConfig, *given: Any) -> Prepared:
        if config.optimizer.batch_size in errors:
            raise errors[config.optimizer.batch_size]
        return real(config, *given)

    monkeypatch.setattr(classification, "prepared", prepared)


def test_cells_that_fail_are_listed_and_the_others_stored_ranked_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command makes those alone that are missing."""
    failing_at(monkeypatch, {64: AssertionError("of the model"), 16: SystemExit("of a library")})
    sizes = ["optimizer.batch_size=5000,64,32,16,128", "dataset.holdout=300"]
    with pytest.raises(SystemExit) as end:
        launch(tmp_path, *NEAR, *sizes)
    (picture,) = tmp_path.glob("outputs/logs/*/*/digits_shallow.png")
    folder = picture.parent
    assert end.value.code == "\n".join(
        (
            "error: optimizer.batch_size: 5000 is not between 1 and the 1137 training samples",
            f"    {folder}/0: optimizer.batch_size=5000",
            "error: AssertionError: of the model",
            f"    {folder}/1: optimizer.batch_size=64",
            "error: JobError: it ended the program by SystemExit('of a library')",
            f"    {folder}/3: optimizer.batch_size=16",
            "3 jobs failed, whose logs are in these folders. "
            "When the cause is mended, the same command makes what is missing.",
        )
    )
    assert len(pd.read_csv(picture.with_suffix(".csv"))) == 2
    ranking = pd.read_csv(folder / "searches/digits_shallow_sgd.csv")
    assert sorted(ranking["optimizer.batch_size"]) == [32, 128]
    logs = [(folder / str(job) / "run.log").read_text() for job in (0, 1)]
    assert ["Traceback" in log for log in logs] == [False, True]
    monkeypatch.undo()
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit, match="\n1 job failed"):
        multirun(*GRID, *places(tmp_path), *NEAR, *sizes)
    assert printed.getvalue().count("is there already") == 2 and len(stored(tmp_path)) == 4


def test_a_stack_that_fails_leaves_its_cells_to_their_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is too large does; of the cells, one fails alone, too."""
    real = training.train

    def train(problem: Problem, optimizer: Any, state: Any, *rest: Any, **options: Any) -> History:
        if len(state.seeds) > 1 or optimizer.step_size == 0.1:
            raise torch.OutOfMemoryError("of the device")
        return real(problem, optimizer, state, *rest, **options)

    monkeypatch.setattr(training, "train", train)
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit, match=r"error: .*OutOfMemoryError: of the"):
        multirun(*GRID, *places(tmp_path), *NEAR, "optimizer.step_size=0.1,0.2,0.3", "hydra/launcher=stacked")
    assert "sgd-tuned-stack failed, its cells are run one by one: " in printed.getvalue()
    assert sorted(run.info["overrides"][-1] for run in stored(tmp_path).values()) == [
        f"optimizer.step_size=0.{n}" for n in (2, 3)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["optimizer.batch_size=5000"],
            "error: optimizer.batch_size: 5000 is not between 1 and the 1437 training samples",
        ),
        (["optimizer.batch_size=64"], "error: AssertionError: of the model"),
    ],
    ids=["bad input", "an exception"],
)
def test_a_job_of_its_own_ends_the_program(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    failing_at(monkeypatch, {64: AssertionError("of the model")})
    with pytest.raises(SystemExit) as end:
        single(*GRID, *places(tmp_path), *NEAR, *arguments)
    assert end.value.code == message
    assert ("Traceback" in capsys.readouterr().err) == ("AssertionError" in message)


def broken(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError("no"),
         "Error in call to target 'test_sweeps.broken': AssertionError: no; hydra.verbose=true shows where"),
        (FileNotFoundError(2, "No such file or directory", "weights.pt"),
         "Error in call to target 'test_sweeps.broken': FileNotFoundError: [Errno 2] No such file or directory: "
         "'weights.pt'; hydra.verbose=true shows where"),
        (ValueError("width: 0 is not a width"), "width: 0 is not a width"),
        (AssertionError(),
         "Error in call to target 'test_sweeps.broken': AssertionError; hydra.verbose=true shows where"),
    ],
)  # fmt: skip
def test_an_error_of_an_own_model_is_told_with_its_type(error: Exception, message: str) -> None:
    with pytest.raises(BadInput) as told, user_errors():
        instantiate({"_target_": "test_sweeps.broken", "error": error})
    assert str(told.value) == message


# --- Loggers


class Recorder(Logger):
    """A tracker, which may be down."""

    all: ClassVar[list[Recorder]] = []
    down: ClassVar[tuple[str, ...]] = ()  # where the first one fails

    def __init__(self, folder: str) -> None:
        self.folder, self.got = Path(folder), list[Any]()
        self.all.append(self)

    def _get(self, name: str, what: Any) -> None:
        self.got.append(what)
        if self is self.all[0] and name in self.down:
            raise ConnectionError(f"{name}: the tracker is down")

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        self._get("open", info["seeds"])

    def log(self, rows: list[dict[str, float]]) -> None:
        self._get("log", [row["iteration"] for row in rows])

    def close(self, exit_code: int) -> None:
        self._get("close", (exit_code, len(stored(self.folder))))


@pytest.mark.parametrize(
    ("down", "got"),
    [
        (("open",), [[0], (0, 1)]),
        (("log", "close"), [[0], [0], (0, 1)]),
        (("close",), [[0], [0], [1], (0, 1)]),
    ],
)
def test_a_logger_that_fails_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down: tuple[str, ...], got: list[Any]
) -> None:
    """It gets nothing more, but is closed, after the result is in its place."""
    monkeypatch.setattr(Recorder, "all", [])
    monkeypatch.setattr(Recorder, "down", down)
    printed = launch(tmp_path, *NEAR, "logger._target_=test_sweeps.Recorder", f"+logger.folder={tmp_path}")
    for name in down:
        words = f"Recorder.{name} failed, the run goes on without it: ConnectionError: {name}: the tracker is down"
        assert printed.count(words) == 1
    (recorder,) = Recorder.all
    assert recorder.got == got and len(stored(tmp_path)) == 1


def unreachable(**_: Any) -> None:
    raise ConnectionError("no route")


def test_a_logger_that_cannot_be_made_costs_no_result(tmp_path: Path) -> None:
    printed = launch(tmp_path, *NEAR, "logger._target_=test_sweeps.unreachable")
    assert "test_sweeps.unreachable failed, the run goes on without it: ConnectionError('no route')" in printed
    assert len(stored(tmp_path)) == 1


def test_a_cell_s_logger_that_fails_is_its_own_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "all", [])
    monkeypatch.setattr(Recorder, "down", ("log",))
    tracked = ["logger._target_=test_sweeps.Recorder", f"+logger.folder={tmp_path}", "hydra/launcher=stacked"]
    assert "2 cells, 2 replicas, as one stack" in launch(tmp_path, *NEAR, "optimizer.step_size=0.1,0.2", *tracked)
    first, second = Recorder.all
    assert first.got == [[0], [0], (0, 2)] and second.got == [[0], [0], [1], (0, 2)]


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RuntimeError, 1), (KeyboardInterrupt, 130)])
def test_a_logger_is_told_how_its_run_ended(tmp_path: Path, error: type[BaseException] | None, code: int) -> None:
    recorder = Recorder(str(tmp_path))
    with suppress(BaseException), Guarded(recorder) as logger:
        logger.open({"seeds": [0]}, {})
        if error:
            raise error
    assert recorder.got == [[0], (code, 0)]


def test_weights_and_biases_has_one_run_a_seed_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that keeps an offline run's rows in a folder as the package does."""

    def init(id: str, dir: str, **_: Any) -> Any:
        folder = Path(dir, "wandb", f"offline-run-20010101_00000{len(made)}-{id}")
        folder.mkdir(parents=True)
        made.append(id)
        return SimpleNamespace(
            log=lambda row, step: folder.joinpath("rows").open("a").write(f"{step} "),
            finish=lambda code: folder.joinpath("code").write_text(str(code)),
        )

    made = list[str]()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    described = {"seeds": [3, 4], "identity": "abc", "experiment": "e", "method": "m", "setting": "s"}
    killed, resumed = (WandbLogger("p", "offline", str(tmp_path)) for _ in range(2))
    rows = [{"iteration": i, "replica": r} for i in range(3) for r in range(2)]
    killed.open(described, {})
    killed.log(rows[:2])
    resumed.open(described, {})
    resumed.log(rows)
    resumed.close(0)
    assert made == ["abc-3", "abc-4", "abc-3", "abc-4"]
    folders = sorted(tmp_path.glob("wandb/*"))
    assert [folder.name[-5:] for folder in folders] == ["abc-3", "abc-4"]
    assert all((folder / "rows").read_text() == "0 1 2 " for folder in folders)
    assert all((folder / "code").read_text() == "0" for folder in folders)


def test_a_logger_without_its_package_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match=r"^error: logger=wandb needs Weights & Biases: pip install wandb\n"):
        launch(tmp_path, *NEAR, "logger=wandb")
    assert stored(tmp_path) == {}


# --- Searches


SEARCH = [
    "optimizer=sgd",
    "hydra/sweeper=study",
    "dataset.holdout=300",
    "optimizer.step_size=tag(log,interval(1e-3,1))",
]


def test_a_stopped_search_goes_on(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    launch(tmp_path, *SEARCH, "hydra.sweeper.n_trials=2", NO_REPORT)
    (study,) = studies(tmp_path)
    dead = study.ask({"optimizer.step_size": optuna.distributions.LogUniformDistribution(1e-3, 1)})
    launch(tmp_path, *SEARCH, "hydra.sweeper.n_trials=4", NO_REPORT)
    (study,) = studies(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[3].params == dead.params
    by_step = {f"optimizer.step_size={t.params['optimizer.step_size']}": t.value for t in study.trials if t.value}
    for run in stored(tmp_path).values():
        value = by_step[next(o for o in run.info["overrides"] if "step_size" in o)]
        assert mean_score([run], run.seeds) == pytest.approx(value)
    printed = launch(tmp_path, *SEARCH, "hydra.sweeper.n_trials=4", NO_REPORT)  # nothing to do
    assert len(stored(tmp_path)) == 4
    *_, last = sorted(
        tmp_path.glob("outputs/logs/*/*/searches/digits_shallow_sgd.csv"), key=lambda p: p.stat().st_mtime
    )
    assert list(pd.read_csv(last)["held-out"]) == pytest.approx(sorted(by_step.values(), reverse=True), abs=1e-4)
    assert last.with_suffix(".png").exists() and f"written: {last}" in printed


def studies(folder: Path) -> list[Any]:
    import optuna

    files = sorted(folder.glob("outputs/searches/*.db"))
    return [optuna.load_study(study_name=file.stem, storage=f"sqlite:///{file}") for file in files]


def test_a_search_goes_on_with_new_trials_after_some_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler with a seed makes none twice, and what has failed is not tried again."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    space = [*SEARCH, "hydra.sweeper.sampler.seed=1", "iterations=1", "seeds=[0]"]
    real, calls = classification.execute, []

    def execute(config: DictConfig, job: Any) -> Run:
        calls.append(config.optimizer.step_size)
        if len(calls) < 3:
            raise RuntimeError("out of memory")
        return real(config, job)

    monkeypatch.setattr(classification, "execute", execute)
    monkeypatch.setattr(failures, "unfinished_sweep", [])
    with pytest.raises((ValueError, KeyError)):  # of Optuna's sweeper, which looks for the best trial
        launch(tmp_path, *space, "hydra.sweeper.n_trials=1")
    first, _, last = hints([], None)
    assert first == "error: RuntimeError: out of memory" and last.startswith("1 job failed")
    with pytest.raises(SystemExit, match=r"^error: RuntimeError: out of memory\n.*\n1 job failed"):
        launch(tmp_path, *space, "hydra.sweeper.n_trials=2")
    launch(tmp_path, *space, "hydra.sweeper.n_trials=3")
    (study,) = studies(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert len({trial.params["optimizer.step_size"] for trial in study.trials}) == len(calls) == 5


@pytest.mark.parametrize(
    "others",
    [
        ["seeds=[1]"],
        pytest.param(
            ["dataset.holdout=200", "setting=default", "optimizer.step_size=interval(1e-3,1)"], marks=pytest.mark.long
        ),
    ],
    ids=["some", "more"],
)
def test_another_command_begins_another_study(tmp_path: Path, others: list[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    few = [*SEARCH, "hydra.sweeper.n_trials=1", "iterations=1", "seeds=[0]", NO_REPORT]
    launch(tmp_path, *few)
    launch(tmp_path, *few, "force=true", "evaluate_every=1", "progress=false")  # no other numbers
    assert [study.study_name[:19] for study in studies(tmp_path)] == ["digits_shallow_sgd_"]
    for other in others:
        launch(tmp_path, *few, other)
    launch(tmp_path, *few, "hydra.sweeper.direction=minimize")
    number = 2 + len(others)
    assert [len(study.trials) for study in studies(tmp_path)] == [1] * number
    assert sorted(study.direction.name for study in studies(tmp_path)) == ["MAXIMIZE"] * (number - 1) + ["MINIMIZE"]


def test_a_search_on_the_test_set_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    for sweeper in ("study", "optuna"):
        with pytest.raises(SystemExit, match=r"error: dataset.holdout: with 0 .* a sixth .*240 of the digits' 1437"):
            launch(tmp_path, *SEARCH, "dataset.holdout=0", f"hydra/sweeper={sweeper}")
    assert stored(tmp_path) == {}


def test_a_study_is_kept_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(SystemExit, match=r"error: hydra.sweeper.storage: redis://there is not sqlite:///<file>"):
        launch(tmp_path, *SEARCH, "hydra.sweeper.storage=redis://there")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(SystemExit, match="error: NotADirectoryError"):  # not a warning, and twenty trials
        launch(tmp_path, *SEARCH, f"hydra.sweeper.storage=sqlite:///{blocked}/a/study.db")
    assert stored(tmp_path) == {}


def test_a_second_launch_of_a_study_waits_for_the_first(tmp_path: Path) -> None:
    file = str(tmp_path / "study.lock")
    hold = f"import time, filelock; filelock.FileLock({file!r}).acquire(); print('held', flush=True); time.sleep(1)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold.replace("filelock.F", "lock = filelock.F")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    wait_for(FileLock(file), "a study")
    assert holder.wait(timeout=10) == 0 and study_locks[-1].is_locked
    study_locks.pop().release()


def test_trials_that_a_kill_has_cut_short_are_made_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a launch is killed while it takes the study up; one that has failed is not."""
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize")
    space = {"a": optuna.distributions.UniformDistribution(0, 1), "b": optuna.distributions.UniformDistribution(0, 1)}
    study.tell(study.ask(space), 1.0)
    dead = [study.ask(space) for _ in range(3)]
    part = study.ask({"a": space["a"]})  # killed before it had the other
    study.tell(study.ask(space), state=optuna.trial.TrialState.FAIL)
    real = study.enqueue_trial
    for kills in (0, 1, 2):  # after so many have been enqueued
        left = iter(range(kills))

        def enqueue(parameters: dict[str, float]) -> None:
            if next(left, None) is None:  # noqa: B023
                raise KeyboardInterrupt
            real(parameters)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(study, "enqueue_trial", enqueue)
            take_up(study)
    take_up(study)
    take_up(study)
    study.ask()  # the first one is killed again, before its suggestions
    take_up(study)
    made = [study.ask(space) for _ in range(4)]
    assert [trial.params for trial in (made[3], *made[:2])] == [trial.params for trial in dead]
    assert made[2].params["a"] == part.params["a"]
    for trial in made:
        study.tell(trial, 1.0)
    take_up(study)
    assert study.get_trials(states=(optuna.trial.TrialState.WAITING,)) == []


def test_a_committed_space_is_searched_by_optuna_too(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    space = ["optimizer=block_admm", "search=mnist_shallow_block_admm", "dataset.holdout=300", "iterations=1"]
    launch(
        tmp_path, *space, "hydra/sweeper=study", "hydra.sweeper.n_trials=2", "optimizer.theta_step={start:1e-3,end:0}"
    )
    assert 1 <= len(stored(tmp_path)) <= 2
    for run in stored(tmp_path).values():
        assert {"loss.scale", "optimizer.theta_update.weight_decay"} <= {o.split("=")[0] for o in run.info["overrides"]}


def test_a_grid_on_held_out_data_is_ranked_at_its_end(tmp_path: Path) -> None:
    """A ranking for each optimizer."""
    numbers = ["optimizer=sgd,adam", "optimizer.batch_size=64,128", "iterations=1", "seeds=[0]"]
    printed = launch(tmp_path, *numbers, "dataset.holdout=300")
    assert "digits_shallow: held-out accuracy in percent" in printed
    assert "iteration 1/1, held-out accuracy " in printed and "test accuracy" not in printed
    tables = {path.stem: pd.read_csv(path) for path in tmp_path.glob("outputs/logs/*/*/searches/*.csv")}
    assert tables.keys() == {"digits_shallow_sgd", "digits_shallow_adam"}
    columns = ["setting", "optimizer.batch_size", "held-out", "seeds", "iterations", "samples held out"]
    for table in tables.values():
        assert list(table.columns) == columns
        assert len(table) == 2 and table["held-out"].is_monotonic_decreasing
    launch(tmp_path / "test", *numbers, "optimizer=sgd")
    assert not list(tmp_path.glob("test/outputs/logs/*/*/searches"))


def test_seeds_run_at_different_times_are_one_configuration_of_a_ranking(tmp_path: Path) -> None:
    grid = ["optimizer=sgd", "dataset.holdout=300", "optimizer.step_size=0.1,0.3", "iterations=1", NO_REPORT]
    launch(tmp_path, *grid, "seeds=[0]")
    launch(tmp_path, *grid)
    runs = list(stored(tmp_path).values())
    assert sorted(sorted(run.seeds) for run in runs) == [[0], [0], [1], [1]]
    *_, last = sorted(tmp_path.glob("outputs/logs/*/*/searches/*.csv"))
    table = pd.read_csv(last).set_index("optimizer.step_size")
    assert list(table["seeds"]) == [2, 2]
    for value, held_out in table["held-out"].items():
        of_row = [run for run in runs if f"optimizer.step_size={value}" in run.info["overrides"]]
        assert held_out == pytest.approx(fmean(score for run in of_row for score in scores([run]).values()))
        assert mean_score(of_row, [0, 1]) == pytest.approx(held_out)
        assert mean_score(of_row, [1]) == next(scores([run])[1] for run in of_row if 1 in run.seeds)
    slot_of(runs[0].folder).remove()
    assert len(launched_runs(last.parents[1])) == 3  # of those that are still there


def test_a_sweep_over_experiments_has_a_table_of_each(tmp_path: Path) -> None:
    few = ["optimizer=sgd", "setting=default", "dataset=digits", "iterations=1", "seeds=[0]", "threads=1"]
    with redirect_stdout(StringIO()):
        multirun("experiment=digits_shallow,mnist_shallow", *few, *places(tmp_path))
    tables = {path.stem: pd.read_csv(path) for path in tmp_path.glob("outputs/logs/*/*/*.csv")}
    runs = [Run(path.parent) for path in tmp_path.glob("outputs/runs/*/*/run.json")]
    found = {run.info["experiment"]: scores([run])[0] for run in runs}
    assert len(found) == 2 and tables.keys() == found.keys()
    assert all(list(tables[name]["mean"]) == [pytest.approx(score, abs=0.01)] for name, score in found.items())


def test_a_hyperparameter_that_some_runs_have_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number, and a word."""
    overrides = (["a.b=1"], ["a.b=2", "c=0.5"], ["a.b=3", "d=word"])
    runs = [
        add_run(
            tmp_path,
            f"sgd-{n}",
            [50.0 + n],
            run_json("sgd", "tuned", "2001", dataset={"holdout": 5, "sha256": "abc"}, seeds=[0], overrides=o),
        )
        for n, o in enumerate(overrides)
    ]
    ((name, ranked),) = rankings([*runs, *runs]).items()
    write_ranking(name, ranked, tmp_path)
    assert name == "mnist_shallow_sgd" and (tmp_path / "searches/mnist_shallow_sgd.png").exists()
    table = pd.read_csv(tmp_path / "searches/mnist_shallow_sgd.csv")
    assert list(table.columns) == ["setting", "a.b", "c", "d", "held-out", "seeds", "iterations", "samples held out"]
    assert list(table["a.b"]) == [3, 2, 1] and "written" in capsys.readouterr().out


def test_a_ranking_has_the_values_of_the_configurations_in_a_fixed_order(tmp_path: Path) -> None:
    """Also those that a run has from its row and not from the command line."""

    def ran(number: int, score: float, optimizer: dict[str, Any], *overrides: str) -> Run:
        held_out = {"dataset": {"holdout": 5, "sha256": "abc"}, "seeds": [0]}
        run = add_run(
            tmp_path, f"sgd-{number}", [score], run_json("sgd", "tuned", "2001", overrides=overrides, **held_out)
        )
        (run.folder / "config.yaml").write_text(yaml.safe_dump({"seeds": [0], "optimizer": optimizer}, sort_keys=False))
        return run

    runs = [
        ran(
            1,
            60.0,
            {"beta": 3.0, "z_step": 1.0, "update": None, "steps": {"start": 0.1, "end": 0.0}},
            "optimizer.beta=3",
        ),
        ran(2, 70.0, {"beta": 10, "z_step": 1.0, "update": True}, "optimizer.beta=10.0"),
        ran(3, 70.0, {"beta": 3.0, "z_step": 0.5, "update": True}, "optimizer.beta=3", "optimizer.z_step=0.5"),
        ran(
            4,
            70.0,
            {"beta": 3.0, "z_step": 1.0, "steps": [1, 0.5]},
            "optimizer.steps=[1,0.50]",
            "+optimizer.update=true",
        ),
    ]
    expected = [
        ["3.0", "0.5", "", "true"],
        ["3.0", "1.0", "[1,0.5]", "true"],
        ["10", "1.0", "", "true"],
        ["3.0", "1.0", "{start:0.1,end:0.0}", "null"],
    ]
    keys = [f"optimizer.{key}" for key in ("beta", "z_step", "steps", "update")]
    for order in permutations(runs):
        (ranked,) = rankings(order).values()
        assert ranked[keys].fillna("").to_numpy().tolist() == expected
        assert list(ranked.index) == [runs[number].name for number in (2, 3, 1, 0)]


def test_a_group_of_a_search_is_ranked_by_its_option(tmp_path: Path) -> None:
    held_out = {"dataset": {"holdout": 5, "sha256": "abc"}, "seeds": [0]}
    for number, overrides in enumerate((["loss=hinge"], ["loss.scale=2"])):
        run = add_run(
            tmp_path, f"sgd-{number}", [50.0], run_json("sgd", "tuned", "2001", overrides=overrides, **held_out)
        )
        loss = {"_target_": "admm.losses.Hinge", "scale": 2 - number}
        (run.folder / "config.yaml").write_text(yaml.safe_dump({"seeds": [0], "loss": loss}))
    (ranked,) = rankings(Store(tmp_path).runs("mnist_shallow")).values()
    assert ranked[["loss", "loss.scale"]].fillna("").to_numpy().tolist() == [["", "1"], ["hinge", "2"]]


def chosen(config: DictConfig) -> DictConfig:
    """The configuration of a launch, whose rows have been chosen."""
    Rows().on_multirun_start(config)
    return config


def test_the_searches_of_the_page_on_sweeps_compose() -> None:
    """Each cell of the grid; Optuna's choices are among them."""
    lines = [line.strip() for line in (ROOT / "docs/sweeps.md").read_text().splitlines()]
    words = [
        shlex.split(line, comments=True)[2:]
        for line in lines
        if line.startswith("python run.py ") and " search=" in line
    ]
    spaces = {tuple(word for word in line if not word.startswith("hydra/")) for line in words}
    assert spaces
    for arguments in spaces:
        with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
            hydra = chosen(compose("config", list(arguments), return_hydra_config=True)).hydra
            overrides = [*(f"{k}={v}" for k, v in hydra.sweeper.params.items()), *hydra.overrides.task]
            ((*cells,),) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
            assert len(cells) == 18 and all(compose("config", cell).dataset.holdout == 10000 for cell in cells)


def test_the_stacked_sweep_of_the_page_on_sweeps_has_as_many_cells_as_it_says() -> None:
    text = (ROOT / "docs/sweeps.md").read_text()
    ((line, said),) = re.findall(r"(python run\.py -m [^#]* hydra/launcher=stacked) +# (\w+) cells", text)
    arguments = shlex.split(line.replace("\\\n", " "))[3:]
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        groups = [argument for argument in arguments if "," not in argument]
        space = compose("config", groups, return_hydra_config=True).hydra.sweeper.params
    overrides = {o.split("=")[0]: o for o in [*(f"{k}={v}" for k, v in space.items()), *arguments]}
    parsed = OverridesParser.create().parse_overrides(list(overrides.values()))
    ((*found,),) = BasicSweeper.split_arguments(parsed, None)
    assert said == "nine" and len(found) == 9


# --- Faults


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "weights.pt"),
        PermissionError(errno.EACCES, "Permission denied", __file__),  # a file that is there and not readable
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_is_not_of_writing_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    with pytest.raises(type(error)) as told, atomic_write(tmp_path / "table.csv", "the table"):
        raise error
    assert told.value is error
    monkeypatch.setattr(failures, "unfinished_sweep", [])
    if error.errno != errno.EACCES:  # Hydra reads no file but those of conf/
        assert hints([], error) == []


@pytest.mark.parametrize("name", ["", "a/table.csv", "a", None])
def test_an_error_of_writing_names_the_file(tmp_path: Path, name: str | None) -> None:
    """Of the file, its folder, one on the way to it, or of an open file; and where another error stands for it."""
    (tmp_path / "a").touch()
    path = tmp_path / "a/table.csv"
    error = OSError(errno.EACCES, "Permission denied", *([] if name is None else [str(tmp_path / name)]))
    for raised in (error, RuntimeError("the writer failed")):
        raised.__context__ = None if raised is error else error
        with (
            pytest.raises(
                WriteError, match=r"a/table.csv: the table could not be written: .*Make that folder writable"
            ),
            explain_write_errors(path, "the table"),
        ):
            raise raised


class Sweep(psutil.Process):
    """Whose time is up in the middle of a run after the next one: seconds say little where other tests run."""

    folder: Path

    def wait(self, timeout: float | None = None) -> int | None:
        def finished() -> int:
            return len(list(self.folder.glob("runs/digits_shallow/*/run.json")))

        before = finished()
        while timeout is not None and self.is_running():
            if finished() > before and list(self.folder.glob("runs/.partial/*/checkpoint.pt")):
                raise psutil.TimeoutExpired(timeout)
            time.sleep(0.002)
        return super().wait()


@pytest.mark.long
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of its cells, in processes that are forked where a user's are started."""
    half = [option for option in kill_a_sweep.SWEEP if "batch_size" not in option]
    begun = list[Launch]()

    def sweep(folder: Path, launcher: str) -> Sweep:
        begun.append(Launch("-m", *half, f"hydra/launcher={launcher}", f"outputs={folder}"))
        process = Sweep(begun[-1].process.pid)
        process.folder = folder
        return process

    monkeypatch.setattr(kill_a_sweep, "CELLS", 6)
    monkeypatch.setattr(kill_a_sweep, "sweep", sweep)
    monkeypatch.setattr(sys, "argv", ["kill_a_sweep", "--kills", "30"])
    with pytest.raises(SystemExit) as end:
        kill_a_sweep.main()
    printed = capsys.readouterr().out
    finished = re.findall(r"(\d) of 6 runs finished", printed)
    assert len(finished) == 30 and finished[:2] == ["1", "2"]  # five kills of a sweep, and then another one
    assert end.value.code == 0 and "the same, bit for bit" in printed, printed


def test_a_sweep_that_ended_before_its_kill_is_none_of_the_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = kill_a_sweep.psutil.Popen([sys.executable, "-c", ""])
    assert kill_a_sweep.kill(ended, 60.0, random.Random(0)) is None
    outcomes = [None, "the launcher", None, "a worker"]
    monkeypatch.setattr(kill_a_sweep, "kill", lambda *_: outcomes.pop(0))
    monkeypatch.setattr(kill_a_sweep, "sweep", lambda *_: SimpleNamespace(wait=lambda: 0))
    monkeypatch.setattr(kill_a_sweep, "histories", lambda _: dict.fromkeys(range(kill_a_sweep.CELLS)))
    monkeypatch.setattr(kill_a_sweep, "compare", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["kill_a_sweep", "--kills", "2"])
    with pytest.raises(SystemExit) as end:
        kill_a_sweep.main()
    assert end.value.code == 0 and outcomes == []


def test_a_logger_is_a_subclass() -> None:
    config = OmegaConf.create({"logger": {"_target_": "builtins.dict"}})
    with pytest.raises(BadInput, match=r"^logger: builtins\.dict is no subclass of experiments\.loggers\.Logger$"):
        training.logger_of(config)
