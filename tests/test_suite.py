"""The suite as a user meets it: the command line, the store, figures and tables, on the embedded digits."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from launches import Launch, places, single
from stores import add_run, run_json

from admm.blocks import split
from admm.losses import SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import Problem
from admm.training import train
from experiments.reports.base import report_of
from experiments.reports.curves import curves
from experiments.reports.results_page import below_paper, papers_numbers
from experiments.reports.writing import write_report
from experiments.store import Run, Slot, Store

ROOT = Path(__file__).parents[1]
SMALL = ["experiment=digits_shallow", "iterations=3", "seeds=[0,1]"]


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return Launch(*SMALL, *places(folder), *arguments, folder=folder).wait()


def stored(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(folder.glob("*/runs/*/*/run.json"))]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """All optimizers of the experiment, two seeds, three iterations; in a process started anew, as a user's."""
    folder = tmp_path_factory.mktemp("launch")
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, *places(folder)]
    environment = os.environ | {"COLUMNS": "200"}
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_experiment_runs_all_of_its_optimizers(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = launched
    assert done.returncode == 0, done.stderr
    runs = stored(folder)
    of_faces = {"deepfacto", "nmf", "pca", "raw"}
    every = {path.stem for path in (ROOT / "experiments/conf/optimizer").glob("*.yaml")}
    assert {run.info["method"] for run in runs} == every - of_faces
    for run in runs:
        assert list(run.history["iteration"].unique()) == [0, 1, 2, 3]
        assert list(run.history["seed"].unique()) == [0, 1]
        assert run.info["dataset"]["sha256"] == "99acfbe547094100091160d63f2209391c42e7c4663c8a783fa596248d5382d6"
        assert run.info["machine"] and run.info["versions"]["torch"] and run.info["finished"]
        assert "root" not in yaml.safe_load((run.folder / "config.yaml").read_text())["dataset"]
    admm = next(run for run in runs if run.info["method"] == "block_admm").history
    assert {"kkt", "residual_1", "dual_rms_3", "sigma_2"} <= set(admm.columns)
    assert list((folder / "outputs/runs/.partial").glob("*/*")) == []


def test_overridden_runs_are_kept_out_of_the_results(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    assert not (folder / "results").exists()
    assert all("iterations=3" in run.info["overrides"] for run in stored(folder))


def test_a_launch_draws_its_figure_and_prints_its_table(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = launched
    (picture,) = (folder / "outputs/logs").rglob("digits_shallow.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.with_suffix(".pdf").exists()
    table = pd.read_csv(picture.with_suffix(".csv"))
    columns = ["method", "setting", "paper", "mean", "std", "minus SGD [95 %]", "seeds", "iterations", "machine"]
    assert list(table.columns) == columns
    for run in stored(folder):  # a cell from the raw history, without the report's code
        lines = [line.split(",") for line in (run.folder / "history.csv").read_text().splitlines()]
        column = lines[0].index("test_accuracy")
        last = [float(line[column]) for line in lines[1:] if line[0] == "3"]
        label = curves([run])[0].label
        assert table.loc[table["method"] == label, "mean"].item() == pytest.approx(sum(last) / 2, abs=0.006)
        assert f"{table.loc[table['method'] == label, 'mean'].item():.2f}" in done.stdout


def test_what_is_finished_is_not_run_again(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    before = {run.folder: run.folder.stat().st_mtime_ns for run in stored(folder)}
    again = launch(folder, "threads=2", "checkpoint_seconds=7")  # neutral keys do not change the identity
    assert again.returncode == 0 and again.stdout.count("is there already") == 9
    assert {run.folder: run.folder.stat().st_mtime_ns for run in stored(folder)} == before
    forced = launch(folder, "optimizer=sgd", "force=true")
    assert forced.returncode == 0
    changed = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert [path.name.split("-")[0] for path in changed] == ["sgd"]


def test_seeds_that_are_run_one_after_the_other_make_one_row(tmp_path: Path) -> None:
    def table(folder: Path, seeds: str) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        done = launch(folder, "optimizer=gotmare", f"seeds={seeds}")
        assert done.returncode == 0, done.stderr
        (row,) = pd.read_csv(max(folder.rglob("logs/**/digits_shallow.csv"))).to_dict("records")
        return row

    assert table(tmp_path / "parts", "[1]")["setting"].endswith("iterations=3, 1 of 5 seeds")
    table(tmp_path / "parts", "[0]")
    assert (tmp_path / "parts/outputs").exists() and not (tmp_path / "parts/results").exists()
    joined, stacked = table(tmp_path / "parts", "[0,1,2]"), table(tmp_path / "stack", "[0,1,2]")
    assert sorted(run.info["seeds"] for run in stored(tmp_path / "parts")) == [[0], [1], [2]]
    assert joined["seeds"] == 3 and joined == pytest.approx(stacked, nan_ok=True, abs=0.3)
    before = {run.folder.stat().st_mtime_ns for run in stored(tmp_path / "parts")}
    assert table(tmp_path / "parts", "[2,1]")["seeds"] == 2
    assert {run.folder.stat().st_mtime_ns for run in stored(tmp_path / "parts")} == before


def test_a_row_has_the_newest_run_of_each_seed_and_of_no_other_configuration(tmp_path: Path) -> None:
    def part(finished: str, seeds: list[int], accuracies: list[float], config: dict[str, Any], machine: str) -> Run:
        rows: list[dict[str, float]] = [
            {"iteration": 1, "replica": replica, "seed": seed, "test_accuracy": accuracy}
            for replica, (seed, accuracy) in enumerate(zip(seeds, accuracies, strict=True))
        ]
        more = {"seeds": seeds, "of_seeds": 4, "machine": machine, "dataset": {"holdout": 0, "sha256": "data"}}
        slot = Slot(tmp_path, "mnist_shallow", "sgd-tuned", finished)
        return slot.complete(config | {"seeds": seeds}, rows, run_json("sgd", "tuned", finished, **more))

    config, lists = {"optimizer": {"eta": 1.0}}, {"optimizer": {"eta": {"start": [1.0, 2.0]}}}
    runs = [
        part("2001", [0, 1], [10.0, 20.0], config, "a"),
        part("2002", [2], [99.0], {"optimizer": {"eta": 2.0}}, "b"),
    ]
    runs += [part("2003", [1, 3], [30.0, 40.0], config, "c")]
    (curve,) = curves(runs)
    assert curve.history["test_accuracy"].tolist() == [30.0, 40.0, 10.0]
    assert curve.history["replica"].tolist() == [0, 1, 2]
    assert curve.row() | {"std": 0} == curve.row() | {"mean": 26.67, "std": 0, "seeds": 3, "machine": "c, a"}
    assert curve.setting == "tuned, 3 of 4 seeds" and curve.run == runs[-1].name
    (alone,) = curves([part("2004", [4, 5], [1.0, 2.0], lists, "a"), part("2005", [6, 7], [3.0, 4.0], lists, "a")])
    assert alone.history["seed"].tolist() == [6, 7]  # eta is given replica by replica
    Slot(tmp_path, "mnist_shallow", "sgd-tuned", "2003").supersede(tmp_path / "superseded")
    assert Store(tmp_path).runs("mnist_shallow") == [runs[0], runs[-1]]


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    arguments = ["optimizer=block_admm", "iterations=6", "checkpoint_seconds=0"]
    (tmp_path / "whole").mkdir()
    assert launch(tmp_path / "whole", *arguments).returncode == 0
    (tmp_path / "killed").mkdir()
    begun = Launch(*SMALL, *places(tmp_path / "killed"), *arguments, folder=tmp_path / "killed")
    begun.kill_when_there(tmp_path / "killed", "outputs/runs/.partial/*/checkpoint.pt")
    assert stored(tmp_path / "killed") == []
    resumed = launch(tmp_path / "killed", *arguments)
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout
    whole, killed = (stored(tmp_path / name)[0].history.drop(columns="seconds") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, killed, check_exact=True)


def test_runs_of_a_former_schema_are_named_once_and_left_where_they_are(tmp_path: Path) -> None:
    methods = "optimizer=sgd,adam"
    assert launch(tmp_path, methods, "iterations=1").returncode == 0
    for run in stored(tmp_path):
        (run.folder / "run.json").write_text(json.dumps({k: v for k, v in run.info.items() if k != "schema"}))
        run.folder.rename(run.folder.with_name(f"{run.folder.name[:-12]}{'0' * 12}"))
    before = {run.folder for run in stored(tmp_path)}
    done = launch(tmp_path, methods, "iterations=1")
    assert done.returncode == 0 and len(before) == 2 and len({run.folder for run in stored(tmp_path)} - before) == 2
    warnings = re.findall(r"(\d+) runs of a former version are not seen; (.*) brings", done.stdout)
    assert warnings == [("2", f"python -m scripts.store migrate --store {tmp_path}/outputs")]
    assert "former version" not in launch(tmp_path, methods, "iterations=1", "outputs=other").stdout


def test_multirun_sweeps_a_grid(tmp_path: Path) -> None:
    grid = ["optimizer=adam", "optimizer.step_size=1e-3,1e-2", "iterations=1"]
    done = Launch("-m", *SMALL, *places(tmp_path), *grid, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    configs = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in stored(tmp_path)]
    assert sorted(config["optimizer"]["step_size"] for config in configs) == [0.001, 0.01]


def test_wandb_gets_the_numbers_of_the_store_an_offline_run_a_seed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = launch(tmp_path, "optimizer=sgd", "logger=wandb", "iterations=2")
    assert done.returncode == 0, done.stderr
    logged = [row for file in tmp_path.rglob("offline-run-*/*.wandb") for row in wandb_rows(file)]
    (run,) = stored(tmp_path)
    assert len(logged) == len(run.history) == 6  # two seeds, two iterations and the start
    own = pd.DataFrame(logged)[run.history.columns].sort_values(["iteration", "replica"], ignore_index=True)
    pd.testing.assert_frame_equal(own, run.history, check_dtype=False, rtol=1e-6)


def wandb_rows(file: Path) -> Iterator[dict[str, float]]:
    """Of an offline run: records of protocol buffers in LevelDB's log format, blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        at += -at % 32768 if -at % 32768 < 7 else 0  # no header across blocks
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(content).history.item
            content = b""
            if items:
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("iterations=many", r"error: iterations: 'many' is not a whole number"),
        ("device=abacus", r"error: device: 'abacus' cannot be used here"),
        ("precision=tf32", r"error: precision: tf32 is for GPUs; this is cpu"),
        ("precision=bf16", r"error: precision: bf16 is for other layers than linear, ReLU and flatten"),
        ("compile=always", r"error: compile: 'always' is not true, false or auto"),
        ("optimizer.batch_size=0", r"error: optimizer.batch_size: 0 is not between 1 and the 1437"),
        ("angle_samples=1438", r"error: angle_samples: 1438 is not None or between 1 and the 1437 training samples"),
        ("optimizer.batch_size=many", r"error: optimizer.batch_size: 'many' is not between"),
        (
            "optimizer.theta_update.momentum=1",
            r"error: optimizer.theta_update.momentum: 1 is not a number from 0 up and below 1.0",
        ),
        ("optimizer.step_size=-1", r"error: optimizer.step_size: -1 is not a number from 0 up"),
        ("model.hidden=64", r"error: model.hidden: 64 is not a list of widths"),
        ("optimizer.step_size=fast", r"error: optimizer.step_size: 'fast' is not a number"),
        ("loss.scale=-1", r"error: loss.scale: -1 is not a positive number"),
        ("dataset=mnist", r"error: no mnist.npz, and (?s:.*)Ways to provide mnist(?s:.*)nowhere/mnist.npz"),
    ],
)
def test_bad_input_names_the_key_and_what_would_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^{message}"):
        single(*SMALL, *places(tmp_path), "optimizer=sgd", "dataset.root=nowhere", "dataset.download=false", argument)
    assert "Traceback" not in capsys.readouterr().err
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.step_siz=2", r"no key 'optimizer.step_siz': optimizer has .*did you mean step_size\?"),
        ("iteratons=3", r"no key 'iteratons': .*did you mean iterations\?"),
        ("logger=wandbb", r"Could not find 'logger/wandbb'"),
        ("dataset=mnst", r"Available options in 'dataset':\s+cifar10\s+digits"),
        ("experiment=digits", r"Available options in 'experiment':\s+angle\s"),
        ("optimizer=sdg", r"Available options in 'optimizer':\s+adam\s"),
        (
            "setting=tund",
            r"error: setting: 'tund' is no row of optimizer=sgd in experiment=digits_shallow; there are block",
        ),
        (
            "row=digits_shallow/sgd-tund",
            r"no row 'digits_shallow/sgd-tund': experiment=digits_shallow has digits\S+-tuned(, digits\S+)*\n",
        ),
        ("iterations=many", r"error: iterations: 'many' is not a whole number"),
    ],
)
def test_a_launch_that_cannot_be_names_the_key(tmp_path: Path, argument: str, message: str) -> None:
    done = launch(tmp_path, "optimizer=sgd", argument)
    assert done.returncode == 1
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr
    assert "could not be written" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert stored(tmp_path) == []


@pytest.mark.parametrize(("optimizer", "key"), [("sgd", "batch_size"), ("block_admm", "slice_size")])
def test_a_batch_too_small_for_batch_normalisation_names_the_key(tmp_path: Path, optimizer: str, key: str) -> None:
    arguments = [f"optimizer={optimizer}", f"optimizer.{key}=359"]
    with pytest.raises(
        SystemExit, match=rf"^error: optimizer.{key}: 359 leaves one of the 1437 samples alone, and .*BatchNorm"
    ):
        single(*SMALL, *places(tmp_path), "model=resnet18", "model.width=2", *arguments)


def test_the_configuration_of_a_job_is_shown_for_a_row_and_refused_for_a_setting() -> None:
    def shown(*arguments: str) -> subprocess.CompletedProcess[str]:
        return Launch("experiment=mnist_shallow", *arguments, "--cfg", "job").wait()

    assert "start: 0.6\n" in shown("row=mnist_shallow/sgd-tuned").stdout
    refused = shown("optimizer=sgd", "setting=tuned")
    assert refused.returncode == 1 and "error: --cfg shows a single job" in refused.stderr and not refused.stdout


def test_help_lists_groups_and_examples() -> None:
    done = Launch("--help").wait()
    assert re.search("experiment: .*digits_shallow, .*mnist_shallow", done.stdout) and "block-admm -m" in done.stdout


def test_an_unknown_method_and_a_single_seed_have_a_row_and_a_curve(tmp_path: Path) -> None:
    add_run(tmp_path, "mine-default", [90.0], run_json("mine", "default", "2001", seeds=[0]))
    runs = Store(tmp_path).runs("mnist_shallow")
    table = write_report(report_of("mnist_shallow"), runs, tmp_path / "f", tmp_path / "t")
    assert table[["method", "setting", "mean", "seeds"]].to_numpy().tolist() == [["mine", "default", 90.0, 1]]


@pytest.mark.parametrize("overrides", [["loss=cross_entropy"], ["dataset.holdout=10"], ["model.hidden=[3]"]])
def test_the_papers_number_stands_beside_its_own_experiment_only(tmp_path: Path, overrides: list[str]) -> None:
    run = add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001"))
    other = add_run(tmp_path, "adam-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001", overrides=overrides))
    assert [curve.reference for curve in (*curves([run]), *curves([other]))] == [95.29, None]


def test_less_than_the_experiment_is_called_reduced(tmp_path: Path) -> None:
    run = add_run(
        tmp_path, "sgd-tuned", [90.0], run_json("sgd", "tuned", "2001", overrides=["iterations=1"], note="why")
    )
    assert curves([run])[0].setting == "reduced tuned: why, iterations=1"


def test_an_experiment_that_is_less_than_the_paper_s_is_called_reduced(
    tmp_path: Path,
) -> None:
    runs = {
        name: [add_run(tmp_path, name, [80.0, 82.0], run_json("sgd", "tuned", "2001", experiment=name))]
        for name in ("cifar10_resnet18_narrow", "cifar10_resnet18")
    }
    (curve,) = curves(runs["cifar10_resnet18_narrow"])
    assert curve.setting == "reduced tuned"
    other = replace(curve, record=replace(curve.record, overrides=("precision=bf16",)))
    assert other.setting == "reduced tuned, precision=bf16"
    below = below_paper(papers_numbers(runs))
    assert below[["experiment", "method", "setting", "paper", "ours"]].to_numpy().tolist() == [
        [name, "SGD", setting, 92.7, 81.0]
        for name, setting in (("cifar10_resnet18", "tuned"), ("cifar10_resnet18_narrow", "reduced tuned"))
    ]


def test_the_optimizer_of_the_contributing_guide_trains() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "guide"}
    sys.modules["guide"] = types.ModuleType("guide")
    exec(code, names)
    x, labels = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    problem = Problem(
        x, one_hot(labels, 3, x), split(mlp(5, [8], 3), per_layer=True), SquaredError(), initialiser("pytorch")
    )
    optimizer = names["GradientDescent"](step_size=0.1)
    history = train(problem, optimizer, optimizer.init(problem, (0, 1)), 5, (x, labels))
    for before, after in zip(history.rows[:2], history.rows[-2:], strict=True):
        assert after["train_loss"] < before["train_loss"]


def test_the_library_example_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["trained"](names["x"]).shape == (500, 10)
    assert len(names["history"].rows) == 22


def test_a_table_sets_the_newest_runs_beside_the_paper(tmp_path: Path) -> None:
    add_run(tmp_path, "sgd-tuned", [10.0, 20.0], run_json("sgd", "tuned", "2001"))
    add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2002"))
    add_run(tmp_path, "block_admm-faithful", [80.0, 0.0], run_json("block_admm", "faithful", "2001"))
    assert Store(tmp_path).experiments() == ["mnist_shallow"]
    runs = Store(tmp_path).runs("mnist_shallow")
    table = write_report(report_of("mnist_shallow"), runs, tmp_path / "f", tmp_path / "t")
    assert table.iloc[0].to_dict() | {"std": None} == {
        "method": "Stochastic Block-ADMM",
        "setting": "faithful, 1 of 2 seeds diverged",
        "paper": 97.61,
        "mean": 80.0,
        "std": None,
        "seeds": 1,
        "iterations": 1,
        "machine": "a machine",
    }
    assert table.iloc[1][["paper", "mean", "std", "seeds"]].tolist() == [95.29, 91.0, 1.41, 2]
    assert len(table) == 2


def test_figures_are_functions_of_the_store(tmp_path: Path) -> None:
    add_run(tmp_path, "adam-tuned", [90.0, 92.0], run_json("adam", "tuned", "2001"))
    runs = Store(tmp_path).runs("mnist_shallow")
    write_report(report_of("mnist_shallow"), runs, tmp_path / "a", tmp_path / "a")
    write_report(report_of("mnist_shallow"), runs, tmp_path / "b", tmp_path / "b")
    for kind in ("png", "pdf", "csv"):
        first, second = ((tmp_path / side / f"mnist_shallow.{kind}").read_bytes() for side in "ab")
        assert first == second
