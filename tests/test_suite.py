"""The suite as a user meets it: the command line, the store, figures and tables, on the embedded digits."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException
from launches import Launch, multirun, places, single
from omegaconf import OmegaConf
from stores import add_run, run_json

from experiments import jobs
from experiments.errors import BadInput
from experiments.hints import hints
from experiments.overrides import not_key_value
from experiments.reports.base import report_of
from experiments.reports.curves import curves
from experiments.reports.results_page import below_paper, papers_numbers
from experiments.reports.text import print_table
from experiments.reports.writing import write_report
from experiments.run import told_by_hints
from experiments.store import Run, Slot, Store

ROOT = Path(__file__).parents[1]
SMALL = ["experiment=digits_shallow", "iterations=3", "seeds=[0,1]"]


def launch(folder: Path, *arguments: str) -> str:
    """In this process; what is printed."""
    with redirect_stdout(StringIO()) as printed:
        multirun(*SMALL, *places(folder), *arguments)
    return printed.getvalue()


def launch_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
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
    folder, first = launched
    before = {run.folder: run.folder.stat().st_mtime_ns for run in stored(folder)}
    again = launch(folder, "threads=1", "checkpoint_seconds=7")  # neutral keys do not change the identity
    assert again.count("is there already") == first.stdout.count(" are not in the store, and are made now") == 9
    assert "not in the store" not in again
    assert {run.folder: run.folder.stat().st_mtime_ns for run in stored(folder)} == before
    launch(folder, "optimizer=sgd", "force=true")
    changed = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert [path.name.split("-")[0] for path in changed] == ["sgd"]


def test_seeds_that_are_run_one_after_the_other_make_one_row(tmp_path: Path) -> None:
    def table(folder: Path, seeds: str) -> dict[str, Any]:
        launch(folder, "optimizer=gotmare", f"seeds={seeds}")
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

    config = {"optimizer": {"eta": 1.0}}
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
    Slot(tmp_path, "mnist_shallow", "sgd-tuned", "2003").supersede(tmp_path / "superseded")
    assert Store(tmp_path).runs("mnist_shallow") == [runs[0], runs[-1]]


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    arguments = ["optimizer=block_admm", "iterations=6", "checkpoint_seconds=0"]
    launch(tmp_path / "whole", *arguments)
    (tmp_path / "killed").mkdir()
    begun = Launch(*SMALL, *places(tmp_path / "killed"), *arguments, folder=tmp_path / "killed")
    begun.kill_when_there(tmp_path / "killed", "outputs/runs/.partial/*/checkpoint.pt")
    assert stored(tmp_path / "killed") == []
    assert "resuming from" in launch(tmp_path / "killed", *arguments)
    whole, killed = (stored(tmp_path / name)[0].history.drop(columns="seconds") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, killed, check_exact=True)


def test_ctrl_c_ends_a_launch_with_one_line(tmp_path: Path) -> None:
    begun = Launch(*SMALL, *places(tmp_path), "optimizer=sgd", "iterations=5000", "checkpoint_seconds=0")
    begun.signal_when_there(signal.SIGINT, tmp_path, "outputs/runs/.partial/*/checkpoint.pt")
    done = begun.wait()
    (checkpoint,) = tmp_path.glob("outputs/runs/.partial/*/checkpoint.pt")
    told = rf"sgd-tuned: stopped after iteration \d+ of 5000; the checkpoint {checkpoint} is written; the same com.*\n"
    assert done.returncode == 130 and re.fullmatch(told, done.stderr), done.stderr
    assert "WARNING] - interrupted: this iteration will be finished and the checkpoint written, then" in done.stdout


def test_runs_of_a_former_schema_are_named_once_and_left_where_they_are(tmp_path: Path) -> None:
    methods = "optimizer=sgd,adam"
    launch(tmp_path, methods, "iterations=1")
    for run in stored(tmp_path):
        (run.folder / "run.json").write_text(json.dumps({k: v for k, v in run.info.items() if k != "schema"}))
        run.folder.rename(run.folder.with_name(f"{run.folder.name[:-12]}{'0' * 12}"))
    before = {run.folder for run in stored(tmp_path)}
    printed = launch_process(tmp_path, methods, "iterations=1").stdout  # a process names them once
    assert len(before) == 2 and len({run.folder for run in stored(tmp_path)} - before) == 2
    warnings = re.findall(r"(\d+) runs of a former version are not seen; (.*) brings", printed)
    assert warnings == [("2", f"python -m scripts.store migrate --store {tmp_path}/outputs")]
    assert "former version" not in launch_process(tmp_path, methods, "iterations=1", "outputs=other").stdout


def test_multirun_sweeps_a_grid(tmp_path: Path) -> None:
    launch(tmp_path, "optimizer=adam", "optimizer.step_size=1e-3,1e-2", "iterations=1")
    configs = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in stored(tmp_path)]
    assert sorted(config["optimizer"]["step_size"] for config in configs) == [0.001, 0.01]


def test_wandb_gets_the_numbers_of_the_store_an_offline_run_a_seed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = launch_process(tmp_path, "optimizer=sgd", "logger=wandb", "iterations=2")
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
        ("device=abacus", r"error: device: 'abacus' is not one of auto, cpu, cuda, cuda:1, …$"),
        ("precision=tf32", r"error: precision: tf32 is for GPUs; this is cpu"),
        (
            "precision=bf16",
            r"error: precision: bf16 is for other layers than .* flatten; this network has none: take fp32",
        ),
        ("compile=always", r"error: compile: 'always' is not true, false or auto"),
        ("optimizer.batch_size=0", r"error: optimizer.batch_size: 0 is not a whole number from 1 up"),
        (
            "angle_samples=1438",
            r"error: angle_samples: 1438 is neither None nor from 1 to the 1437 training samples",
        ),
        ("optimizer.batch_size=many", r"error: optimizer.batch_size: 'many' is not a whole number"),
        (
            "optimizer.theta_update.momentum=1",
            r"error: optimizer.theta_update.momentum: 1 is not a number from 0 up and below 1.0",
        ),
        ("optimizer.step_size=-1", r"error: optimizer.step_size: -1 is not a number from 0 up"),
        ("model.hidden=64", r"error: model.hidden: 64 is not a list of widths"),
        (
            "optimizer.step_size=fast",
            r"error: optimizer.step_size: 'fast' is not a number .*; give one, or a schedule {start: …, end: …}$",
        ),
        (
            "optimizer.step_size={start: 1e-3:1e-2, end: 0}",
            r"error: optimizer.step_size.start: '1e-3:1e-2' is not a number from 0 up; give one$",
        ),
        ("loss.scale=-1", r"error: loss.scale: -1 is not a positive number"),
        (
            "dataset=mnist",
            r"error: no mnist.npz, and (?s:.*)Ways to provide mnist(?s:.*)nowhere/mnist.npz"
            r"(?s:.*) and dataset\.download=true\.$",
        ),
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
        (
            "optimizer.step_siz=2",
            r"^no key 'optimizer.step_siz': optimizer has .*did you mean step_size\?\n$",
        ),
        ("optimizer.lr=2", r"no key 'optimizer.lr': optimizer has .*did you mean step_size\?"),
        ("optimizer.dual_step=2", r"optimizer has .*, theta_update; it is of optimizer=block_admm,deepfacto\n"),
        ("optimizer.theta_step=2", r"no key 'optimizer.theta_step': optimizer has .*did you mean step_size\?"),
        ("optimizer.step_size.strt=1", r"'optimizer.step_size.strt': .* has end, start; did you mean start\?\n"),
        (
            "optimizer.batch_size.start=1",
            r"'optimizer.batch_size.start': optimizer.batch_size is a value here, .*row=…",
        ),
        ("optimizer.batch_size._target_=a.B", r"optimizer.batch_size is a value here, .*, as {_target_: …}, or row=…"),
        (
            "optimizer.step_size._target_=a.B",
            r"has end, start; give all of it, as optimizer.step_size={_target_: …}",
        ),
        ("optimizer.step_size={begin: 1}", r"no key 'optimizer.step_size.begin': optimizer.step_size has end, start\n"),
        ("optimizer.update.a=1", r"no key 'optimizer.update': optimizer has .*; did you mean theta_update\?"),
        ("iterations.x=3", r"no key 'iterations.x': iterations is a value here, without keys\n"),
        ("iteratons=3", r"no key 'iteratons': .*did you mean iterations\?"),
        ("+baseline=sgd", r"^no key 'baseline': the keys are angle_samples,.*\n\+ adds no such key"),
        ("logger=wandbb", r"^no logger 'wandbb' in experiments/conf/logger: there are none, wandb; did you mean wandb"),
        ("dataset=mnst", r"^no dataset 'mnst' in \S+: there are cifar10, digits, .*; did you mean mnist\?\n$"),
        ("loss=mse", r"^no loss 'mse' in \S+: there are .*, squared_error, triplet; did you mean squared_error\?\n$"),
        ("split.after=[1]", r"^no key 'split.n_blocks': .*; only one of after, n_blocks, per_layer may be given\n$"),
        ("optimizer=adamm,sgd", r"^error: optimizer: no 'adamm'; did you mean adam\?; there are adam, bcd, "),
        (
            "optimizer.step_size=[0.1,0.01]",
            r"^optimizer.step_size has keys here, as the schedule .*; give such keys, or a number\n$",
        ),
        (
            "setting=tund",
            r"error: setting: 'tund' is no row of optimizer=sgd in experiment=digits_shallow; there are sgd-tuned, and",
        ),
        (
            "row=digits_shallow/sgd-tund",
            r"no row 'digits_shallow/sgd-tund': experiment=digits_shallow has digits\S+-tuned(, digits\S+)*\n",
        ),
        ("iterations=many", r"error: iterations: 'many' is not a whole number"),
    ],
)
def test_a_launch_that_cannot_be_names_the_key(tmp_path: Path, argument: str, message: str) -> None:
    split = ["split.n_blocks=2"] if argument.startswith("split.") else []
    done = launch_process(tmp_path, "optimizer=sgd", argument, *split)
    assert done.returncode == 1 and done.stderr.count("iterations: 'many'") < 2
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr
    assert "could not be written" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert stored(tmp_path) == []


@pytest.mark.parametrize("key", ["iterations", "split.n_blocks"])
def test_a_value_that_no_row_can_have_is_refused_before_the_first_row(tmp_path: Path, key: str) -> None:
    with pytest.raises(SystemExit, match=rf"^error: {key}: 'many' is not a whole number from 1 up$"):
        launch(tmp_path, f"{key}=many")
    assert not list(tmp_path.rglob("failed.txt"))


def test_hydra_tells_of_a_key_where_its_whole_traceback_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *SMALL, "optimizer.lr=1"])
    with pytest.raises(SystemExit, match=r"^no key 'optimizer.lr': .*; did you mean theta_step\?$"):
        told_by_hints(lambda: multirun(*sys.argv[1:]))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigCompositionException, match=r"^Could not override 'optimizer\.lr'"):
        told_by_hints(lambda: multirun(*sys.argv[1:]))


@pytest.mark.parametrize(
    ("group", "name", "expected"),
    [
        ("loss", "mse", "there are hinge, huber; did you mean squared_error?"),
        ("loss", "CrossEntropyLoss", "; did you mean cross_entropy?"),
        ("loss", "BCEWithLogitsLoss", "; did you mean binary_cross_entropy?"),
        ("loss", "smooth_l1_loss", "; did you mean huber?"),
        ("loss", "hinge_loss", "; did you mean hinge?"),
        ("logger", "tensorboard", "in experiments/conf/logger: there are hinge, huber"),
    ],
)
def test_a_choice_that_is_not_there_is_told_with_the_choices_and_the_name_that_it_has_here(
    group: str, name: str, expected: str
) -> None:
    missing = MissingConfigException("In 'experiment/mine': Could not find", f"{group}/{name}", ["hinge", "huber"])
    (line,) = hints([], missing)
    assert line.startswith(f"In 'experiment/mine': no {group} {name!r} in ") and line.endswith(expected)


def test_one_first_value_of_a_row_s_schedule_is_as_in_a_grid(tmp_path: Path) -> None:
    start = "optimizer.step_size.start=0.1"
    launch(tmp_path, "optimizer=sgd", start)
    (run,) = stored(tmp_path)
    assert run.record.setting == "tuned" and run.record.overrides == ("iterations=3", start)
    launch(tmp_path, "row=digits_shallow/sgd-tuned", f"{start},0.2")
    assert len(stored(tmp_path)) == 2


def test_a_key_of_the_chosen_optimizers_need_not_be_one_of_the_default_optimizer(tmp_path: Path) -> None:
    launch(tmp_path, "optimizer=adam,sgd", "optimizer.step_size={start: 0.1, end: 0}", "iterations=1")
    overrides = {run.record.method: run.record.overrides for run in stored(tmp_path)}
    assert overrides == dict.fromkeys(("adam", "sgd"), ("iterations=1", "optimizer.step_size={start:0.1,end:0}"))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "launcher/submitit_slurm",
            "submitit_slurm needs the extra 'cluster': .*; without it there are basic, .*stacked$",
        ),
        ("launcher/ray", "ray needs the extra 'cluster': pip install '\\S+\\[cluster]';"),
        ("sweeper/optuna", "optuna needs the extra 'sweeps': pip install .*; without it there are basic$"),
        ("launcher/stackd", "no hydra/launcher 'stackd': there are basic, stacked; did you mean stacked\\?$"),
    ],
)
def test_a_launcher_or_sweeper_that_is_not_there_is_told_with_its_extra_or_the_nearest(
    file: str, expected: str
) -> None:
    (line,) = hints([], MissingConfigException("", f"hydra/{file}", ["basic", "stacked"]))
    assert re.search(expected, line) and "slurm," not in line


@pytest.mark.parametrize(
    ("argument", "file"),
    [
        ("optimizer=mine", "conf/optimizer/mine.yaml"),
        ("optimizer=mine,sgd", "conf/optimizer/mine.yaml"),
        ("row=digits_shallow/sgd-mine", "conf/row/digits_shallow/sgd-mine.yaml"),
    ],
)
def test_a_file_of_one_s_own_that_is_not_searched_for_is_told(tmp_path: Path, argument: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    done = Launch("experiment=digits_shallow", argument, folder=tmp_path).wait()
    assert done.returncode == 1 and f"; --config-dir conf finds {file}" in done.stderr


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


def test_flags_between_the_overrides_are_refused_in_words(tmp_path: Path) -> None:
    done = Launch("optimizer=sgd", "--config-dir", "conf", "setting=default", folder=tmp_path).wait()
    assert done.returncode == 1
    assert done.stderr == "error: setting=default: flags, such as --config-dir, go before all key=value or after them\n"


@pytest.mark.parametrize("arguments", [[], ["optimizer=sgd"], ["-m", "dataset=mnist", "row=digits_shallow/sgd-tuned"]])
def test_a_command_without_an_experiment_lists_the_experiments_and_trains_nothing(
    tmp_path: Path, arguments: list[str]
) -> None:
    done = Launch(*arguments, folder=tmp_path).wait()
    assert done.returncode == 1 and "|mnist_shallow|" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=npy", "dataset.path=my.npz"], r"^no dataset 'npy' in .*; did you mean npz\?\n$"),
        (["optimizer", "adam"], "^error: optimizer adam: write optimizer=adam, without spaces\n$"),
    ],
)
def test_a_command_without_an_experiment_is_told_first_what_else_is_wrong(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, Launch(*arguments, folder=tmp_path).wait().stderr)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a=b optimizer = adam", "optimizer = adam: write optimizer=adam, without spaces"),
        ("optimizer= adam", "optimizer= adam: write optimizer=adam, without spaces"),
        ("-m optimizer =adam", "optimizer =adam: write optimizer=adam, without spaces"),
        ("experiment=own --lr 3 a=b", "--lr 3: write lr=3, without spaces or dashes"),
        ("a=b --optimizer=adam", "--optimizer=adam: write optimizer=adam, without spaces or dashes"),
        ("--experiment own", "--experiment own: write experiment=own, without spaces or dashes"),
        ("seeds=[0, 1]", "1]: is neither key=value nor a flag; a value with spaces needs quotes, as 'seeds=[0, 1]'"),
        ("a=b --config-dir conf -m", ""),
        ("--cfg job ~a note= +b=c=d", ""),
    ],
)
def test_words_that_are_not_key_value_are_told_as_such(words: str, expected: str) -> None:
    assert not_key_value(words.split(" ")) == expected


def test_the_digits_have_a_store_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    single("experiment=digits_shallow", "row=digits_shallow/sgd-tuned", "seeds=[0]", "progress=false")
    (run,) = Path("outputs/demo/runs/digits_shallow").glob("sgd-*")
    assert not Run(run).record.overrides and Path("outputs/demo/tables/digits_shallow.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


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


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
@pytest.mark.parametrize(("given", "count"), [({}, "30000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_waiting_threads_soon_sleep(given: dict[str, str], count: str) -> None:
    """GNU OpenMP, which PyTorch loads, prints what it has found in the environment."""
    asked = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    command = [sys.executable, "-c", "import experiments.run"]
    told = subprocess.run(command, env=asked | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{count}'" in told.stderr


def test_a_job_flushes_denormals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def find_job(*_: Any) -> None:
        found.append(smallest_after_a_product())
        raise BadInput("enough")

    monkeypatch.setattr(jobs, "find_job", find_job)
    with pytest.raises(BadInput, match="enough"):
        jobs.run_once(OmegaConf.create(), *2 * [None])  # type: ignore[arg-type]
    assert (found, smallest_after_a_product()) == ([0], 1)


def smallest_after_a_product() -> int:
    """Return the bits of the smallest positive number times 1."""
    return int(torch.ones(1, dtype=torch.int32).view(torch.float32).mul(1.0).view(torch.int32))


def test_a_terminal_s_table_has_no_empty_column_and_names_a_common_machine_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"method": "SGD", "paper": None, "mean": 1.0, "machine": "m"} for _ in range(2)]
    print_table(pd.DataFrame(rows), "own")
    printed = capsys.readouterr().out
    assert printed.count("own (m)") == 1 and "paper" not in printed and printed.count("1.00") == 2
    print_table(pd.DataFrame([*rows, rows[0] | {"machine": "n", "paper": 2.0}]), "own")
    printed = capsys.readouterr().out
    assert "machine" in printed and "paper" in printed


def test_a_terminal_s_table_says_overrides_of_all_rows_in_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    """Not those that a comma divides, nor notes."""
    settings = [f"{name}: a, b, seeds=[0], x={{c: 1, d: 2}}, y={name}" for name in ("tuned", "faithful")]
    print_table(pd.DataFrame({"setting": settings}), "own")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("own, seeds=[0] ") and printed.count("seeds") == 1
    assert "tuned: a, b, x={c: 1, d: 2}, y=tuned" in printed


def test_ctrl_c_while_pytorch_is_imported_ends_with_one_line() -> None:
    interrupted = """import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from experiments.command import main
main()"""
    told = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (130, "interrupted; the same command goes on\n")
