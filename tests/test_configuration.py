"""What a launch makes of its configuration: paths, names of settings, numbers, spaces; and of code that has changed."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from launches import multirun, places
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from stores import add_run, run_json

from admm.optimizers import AdaptivePenalty
from experiments import jobs, overrides, provenance
from experiments.checks import LARGEST_SEED, check, check_row
from experiments.errors import BadInput
from experiments.integrity import problems_of
from experiments.jobs import is_reusable
from experiments.launch import Launch
from experiments.launching.rows import choices
from experiments.launching.study import search_hash, without_end
from experiments.paths import expand
from experiments.progress import show_what_can_be_shown
from experiments.provenance import own_code, sources, sources_changed_since
from experiments.reports.accuracy import Accuracy
from experiments.reports.results_page import best_of_search
from experiments.reports.searches import rankings, read_ranking, write_ranking
from experiments.reports.text import markdown
from experiments.rows import CONF, Row, TableRows
from experiments.store import Run, Slot, Store
from experiments.training import write_start_record

ROOT = Path(__file__).parents[1]
MINE = "# @package _global_\ndefaults: [override /dataset: digits]\niterations: 1\nthreads: 1\n"
SMALL = ["experiment=digits_shallow", "optimizer=sgd", "dataset.first=100", "model.hidden=[8]", "progress=false"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose("config", ["experiment=digits_shallow", *overrides])


def launch(*overrides: str) -> str:
    """In this process, without figures; what is printed."""
    return launch_with_report(*overrides, "~hydra.callbacks.report")


def launch_with_report(*overrides: str) -> str:
    with redirect_stdout(StringIO()) as printed:
        multirun(*overrides)
    return printed.getvalue()


def stored(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(folder.glob("runs/*/*/run.json"))]


# --- Paths


def test_a_tilde_is_the_home_folder_in_yaml_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "my home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(f"{MINE}seeds: [0]\noutputs: ~/o\n")
    launch(f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", "optimizer=sgd", "results=~/r")
    assert [run.info["experiment"] for run in stored(home / "o")] == ["mine"]
    assert list(home.glob("o/logs/*/*/0/runs.txt")) and list(here.iterdir()) == []


def test_a_tilde_is_expanded_where_a_value_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("OF_A_TEST", "~/data")
    config = OmegaConf.create(
        {"a": "~/x/${b}", "b": "~", "c": ["~/y"], "d": "sqlite:///~/z.db", "e": "${oc.env:OF_A_TEST}", "f": "x~/y"}
    )
    OmegaConf.set_readonly(config, True)
    expand(config)
    found = ["/home/me/x//home/me", "/home/me", ["/home/me/y"], "sqlite:////home/me/z.db", "/home/me/data", "x~/y"]
    assert list(OmegaConf.to_container(config, resolve=True).values()) == found  # type: ignore[union-attr]
    overrides = ["hydra/sweeper=study", "outputs=~/o", "logger=wandb", "dataset.root=~/d"]
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    assert [config.dataset.root, config.logger.dir] == ["/home/me/d", "/home/me/o"]
    for derived in (config.hydra.run.dir, config.hydra.sweep.dir, config.hydra.sweeper.storage):
        assert derived.removeprefix("sqlite:///").startswith("/home/me/o/")


# --- What overrides imply


@pytest.mark.parametrize(
    ("overrides", "cut"),
    [
        (["split.after=[fc1]"], {"after": ["fc1"]}),
        (["split=after", "split.after=[fc1]"], {"after": ["fc1"]}),
        (["split.after=[fc1]", "++split.activation=end"], {"after": ["fc1"], "activation": "end"}),
        (["split.n_blocks=3"], {"n_blocks": 3, "activation": "start"}),
        ([], {"per_layer": True, "activation": "start"}),
        (["experiment=cifar10_resnet18", "split=per_layer"], {"per_layer": True, "activation": "start"}),
    ],
)
def test_a_chosen_cut_drops_what_a_row_or_an_experiment_has_set_for_another(
    overrides: list[str], cut: dict[str, Any]
) -> None:
    """Such as the row's `activation`, which split=after refuses."""
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose("config", ["row=digits_shallow/block_admm-tuned", *overrides])
    assert {key: value for key, value in config.split.items() if key != "_target_"} == cut


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optimizer.theta_update={_target_: my.Rule}", {"_target_": "my.Rule"}),
        ("++optimizer.theta_update={_target_: my.Rule, rate: 2}", {"_target_": "my.Rule", "rate": 2}),
        ("optimizer.z_update={_target_: my.Update, a: {b: 1}}", {"_target_": "my.Update", "a": {"b": 1}}),
        ("optimizer.theta_step={_target_: my.Schedule}", {"_target_": "my.Schedule"}),
        ("optimizer.penalty={_target_: my.Penalty}", {"_target_": "my.Penalty"}),
        ("loss={_target_: my.Loss}", {"_target_": "my.Loss"}),
        ("model={_target_: my.Net, width: 3}", {"_target_": "my.Net", "width": 3}),
        ("loss={_target_: admm.losses.SquaredError}", {"_target_": "admm.losses.SquaredError", "scale": 0.3}),
    ],
)
def test_a_node_of_another_class_takes_the_place_of_the_row_s(override: str, found: dict[str, Any]) -> None:
    """And has none of its keys; one of the same class is merged."""
    config = composed("row=digits_shallow/block_admm-tuned", override)
    assert OmegaConf.select(config, overrides.key_of(override)) == found


# --- Rows


# a row of each of two methods, and one that is not listed
ROWS = ("digits/sgd-fast", "digits/sgd-slow", "digits/adam-slow", "digits/adam-odd", "other/bcd-slow")
TABLE = TableRows("digits", [Row(name) for name in (*ROWS[:3], ROWS[4])], [Row(ROWS[3])])


def rows_in(folder: Path) -> Path:
    """A folder of configuration with files of `ROWS`."""
    for name in ROWS:
        (folder / "row" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"row/{name}.yaml").write_text("")
    return folder


@pytest.mark.parametrize(
    ("rows", "listed"),
    [
        (None, ["digits/adam-odd", "digits/adam-slow", "digits/sgd-fast", "digits/sgd-slow"]),
        (["digits/sgd-*", "other/*", "*/*-slow"], [*ROWS[:2], "other/bcd-slow", "digits/adam-slow"]),
        (["digits/{sgd,adam}-{slow,*}"], ["digits/sgd-slow", "digits/sgd-fast", "digits/adam-slow", "digits/adam-odd"]),
        ([], []),
    ],
)  # fmt: skip
def test_an_experiment_lists_its_rows_in_an_order(tmp_path: Path, rows: list[str] | None, listed: list[str]) -> None:
    found = TableRows.of("digits", rows, [tmp_path / "empty", rows_in(tmp_path)])
    assert [row.name for row in found.listed] == listed
    assert {row.name for row in found.others} == {name for name in ROWS[:4] if name not in listed}


def test_a_row_that_has_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rows: no file conf/row/digits/adam-fast.yaml; there are digits/adam-odd, "):
        TableRows.of("digits", ["digits/{sgd,adam}-fast"], [rows_in(tmp_path)])


@pytest.mark.parametrize(
    ("optimizers", "settings", "overrides"),
    [
        ([None], [None], ["row=digits/sgd-fast,digits/sgd-slow,digits/adam-slow,other/bcd-slow"]),
        (["sgd"], [None], ["row=digits/sgd-fast,digits/sgd-slow"]),
        (["adam", "sgd"], ["slow"], ["row=digits/adam-slow,digits/sgd-slow"]),
        ([None], ["fast"], ["row=digits/sgd-fast"]),
        ([None], ["slow", "odd"], ["row=digits/sgd-slow,digits/adam-slow,other/bcd-slow,digits/adam-odd"]),
        (["adam"], ["odd"], ["row=digits/adam-odd"]),
        (["mine"], [None], ["optimizer=mine"]),
        (["sgd", "mine"], ["default"], ["optimizer=sgd,mine"]),
        ([None], ["default"], ["optimizer=sgd,adam,bcd"]),
    ],
)
def test_optimizer_and_setting_choose_rows(
    optimizers: list[str | None], settings: list[str | None], overrides: list[str]
) -> None:
    assert choices(TABLE, optimizers, settings) == overrides


@pytest.mark.parametrize(
    ("optimizers", "settings", "message"),
    [
        ([None], ["typo"], "setting: 'typo' is no row in experiment=digits; there are sgd-fast, "),
        (["mine"], ["slow"], "setting: 'slow' is no row of optimizer=mine in experiment=digits; there are sgd-fast, "),
        (
            ["sgd", "adam"],
            ["fast"],
            "setting: 'fast' is no row of optimizer=adam .*; there are adam-slow, adam-odd, ",
        ),
        (
            ["sgd", "mine"],
            [None],
            "optimizer=mine has no row in experiment=digits, the others have. setting=default takes the default "
            "values of all; or a file conf/row/digits/mine-<setting>.yaml gives it a row",
        ),
        (
            ["sgd"],
            ["fast", "default"],
            "setting: default and rows do not go together in one launch; there are sgd",
        ),
    ],
)
def test_a_row_that_an_experiment_does_not_have_is_refused(
    optimizers: list[str | None], settings: list[str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        choices(TABLE, optimizers, settings)


def test_an_experiment_without_rows_has_its_optimizer_s_default_values() -> None:
    assert choices(TableRows("mine", [], []), [None], [None]) == []


DESCENT = """from dataclasses import dataclass
from admm.optimizers import Backprop
@dataclass(frozen=True)
class Descent(Backprop):
    pass
"""
OPTIMIZER = """_target_: mylab.descent.Descent
iterations: ${iterations}
batch_size: 64
step_size: 0.1
theta_update: {_target_: admm.optimizers.SGD}
"""


def test_files_of_one_s_own_add_an_optimizer_a_row_and_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "mylab/__init__.py": "",
        "mylab/descent.py": DESCENT,
        "conf/optimizer/mine.yaml": OPTIMIZER,
        "conf/row/digits_shallow/sgd-slow.yaml": (
            "# @package _global_\ndefaults: [override /optimizer: sgd, override /init: normal]\n"
            "note: slow\noptimizer: {step_size: 1.0e-4}\ninit: {std: 0.1}\n"
        ),
        "conf/experiment/small.yaml": f"{MINE}committed_seeds: [7]\nrows: [digits_shallow/sgd-slow]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    few = [*places(tmp_path), "dataset.first=100", "progress=false", f"hydra.searchpath=[file://{tmp_path}/conf]"]
    launch(*few, "experiment=digits_shallow", "optimizer=mine", "seeds=[0]", "iterations=1")
    launch(*few, "experiment=digits_shallow", "setting=slow", "seeds=[0]", "iterations=1")
    launch(*few, "experiment=small")
    runs = {f"{run.info['experiment']} {run.folder.name[:8]}": run for run in stored(tmp_path / "outputs")}
    assert sorted(runs) == ["digits_shallow mine-def", "digits_shallow sgd-slow", "small sgd-slow"]
    assert runs["small sgd-slow"].info["seeds"] == [7] and runs["small sgd-slow"].info["of_seeds"] == 1
    for name in ("small sgd-slow", "digits_shallow sgd-slow"):
        config: Any = OmegaConf.load(runs[name].folder / "config.yaml")
        assert (config.init.name, config.init.std, config.optimizer.step_size) == ("normal", 0.1, 1.0e-4)
        assert runs[name].info["setting"] == "slow" and runs[name].info["note"] == "slow"
    assert runs["digits_shallow sgd-slow"].info["overrides"] == ["dataset.first=100", "iterations=1"]


def test_a_group_of_the_command_line_is_below_a_row(tmp_path: Path) -> None:
    """And the row's values, if they are none of the group's, are refused."""
    few = ["experiment=mnist_shallow", "row=mnist_shallow/bcd-tuned", "dataset=digits", "seeds=[0]", *places(tmp_path)]
    few += ["dataset.first=100", "iterations=1", "progress=false"]
    launch(*few, "loss=cross_entropy", "optimizer.alpha=1")
    (run,) = stored(tmp_path / "outputs")
    assert run.info["overrides"][-2:] == ["loss=cross_entropy", "optimizer.alpha=1"]
    with pytest.raises(SystemExit, match=r"error: init.name: 'uniform': .* keyword argument 'std'.*; it takes a, b"):
        launch(*few, "init=uniform")


@pytest.mark.parametrize("empty", ["optimizer=glob(zzz*)", "row=glob(zzz*)"])
def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path, empty: str) -> None:
    with pytest.raises(SystemExit, match=r"error: \w+=glob\(zzz\*\): matches nothing"):
        launch("experiment=digits_shallow", empty, *places(tmp_path))


def test_rows_that_one_name_would_stand_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: digits_shallow/sgd-tuned has the optimizer and the setting of"):
        TableRows.of("digits_shallow", ["digits_shallow/sgd-tuned", "mnist_shallow/sgd-tuned"])


def test_what_a_row_declares_is_changed_outside_of_results(tmp_path: Path) -> None:
    few = ["experiment=digits_shallow", "optimizer=sgd", "iterations=1", "dataset.first=100", *places(tmp_path)]
    assert all(map(overrides.changes_row, ("committed_seeds=[7]", "rows=[a]", "note=mine", "report.caption=mine")))
    launch(*few, "committed_seeds=[7]", "note=mine", "progress=false")
    (run,) = stored(tmp_path / "outputs")
    assert {"committed_seeds=[7]", "note=mine"} < set(run.record.overrides)


def test_a_launch_of_several_experiments_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: experiment: rows can be launched for one experiment at a time"):
        launch("experiment=digits_shallow,mnist_shallow", *places(tmp_path))


@pytest.mark.parametrize(
    ("changes", "setting", "message"),
    [
        ({"experiment": "mine/c"}, None, "experiment: mine/c is not the name of a file directly in conf/experiment"),
        ({"method": "mine/c"}, None, "optimizer: mine/c is not the name of a file directly in conf/optimizer"),
        ({"method": "a-b"}, None, "optimizer: a-b has a -, which divides the method from the setting; take a _"),
        ({"method": "adam"}, None, "row: conf/row/digits_shallow/sgd-tuned.yaml is of optimizer=sgd, not of"),
        ({"row": Row("digits_shallow/tuned")}, None, "row: conf/row/digits_shallow/tuned.yaml is of optimizer=…, not"),
        ({"row": Row("mnist_shallow/sgd-tuned")}, None, "row: mnist_shallow/sgd-tuned is no row of experiment=digits"),
        ({"overrides": ("task=mine.run",)}, None, "task: is the experiment's own; take an experiment"),
        ({}, "faithful", "setting: faithful chooses no row with hydra.mode=RUN, nor beside row=…, of tuned; "),
        ({"row": None}, "tuned", "setting: tuned chooses no row with hydra.mode=RUN, nor beside row=…, of default; "),
    ],
)  # fmt: skip
def test_names_that_would_be_taken_for_others_are_refused(
    changes: dict[str, Any], setting: str | None, message: str
) -> None:
    row, conf = Row("digits_shallow/sgd-tuned"), (ROOT / "experiments/conf",)
    launched = Launch("digits_shallow", "sgd", row, (), Path(), conf, True, False, None)
    check_row(OmegaConf.create({"setting": "tuned"}), launched)
    check_row(OmegaConf.create({"setting": None}), launched)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_row(OmegaConf.create({"setting": setting}), replace(launched, **changes))


def test_what_an_override_means() -> None:
    given = ["row=a/b-c", "+optimizer.eta=1", "~logger", "model=resnet18", "model.width=2", "dataset.first=5"]
    given += ["datasets=1", "loggers=1", "seeds=[0]", "backbone.weights=x", "backbone@backbone=x"]

    def those(question: Callable[[str], bool]) -> list[int]:
        return [number for number, override in enumerate(given) if question(override)]

    assert those(overrides.chooses_row) == [0]
    assert those(overrides.is_outside_identity) == [2, 9]
    assert those(overrides.changes_row) == [1, 3, 4, 5, 6, 7, 8, 10]
    assert those(overrides.reduces) == [4, 5, 8]
    assert those(overrides.is_comparable_with_paper) == [1, 8]
    assert those(overrides.is_searched) == [0, 1, 2, 3, 4, 6, 7, 9, 10]


def test_a_run_does_not_supersede_one_whose_name_and_setting_are_divided_otherwise(tmp_path: Path) -> None:
    for method, setting in (("sgd", "a-b"), ("sgd-a", "b")):
        run = add_run(tmp_path, "sgd-a-b", [90.0], run_json(method, setting, f"2001 {method}", seeds=[0]))
        Slot(tmp_path, "mnist_shallow", "sgd-a-b", run.folder.name.removeprefix("sgd-a-b-")).supersede(tmp_path / "s")
    assert {run.info["method"] for run in Store(tmp_path).runs("mnist_shallow")} == {"sgd", "sgd-a"}


# --- Values


@pytest.fixture(scope="module")
def of_the_suite() -> DictConfig:
    return composed()


INITIALISER, PENALTY = {"_target_": "admm.models.initialiser"}, {"_target_": "admm.optimizers.AdaptivePenalty"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("iterations", "many", "iterations: 'many' is not a whole number from 1 up"),
        ("threads", 0, "threads: 0 is not a whole number from 1 to 1024, or null"),
        ("seeds", [1, 1], "seeds: [1, 1] holds a seed twice"),
        ("dtype", "int8", "dtype: 'int8' is not one of float32, float64"),
        ("precision", "fp16", "precision: 'fp16' is not one of fp32, tf32, bf16"),
        ("dataset", {"name": "mnist"}, "dataset: its file in conf/dataset has no holdout; see mnist.yaml"),
        ("iterations", True, "iterations: True is not a whole number from 1 up"),
        ("checkpoint_seconds", "never", "checkpoint_seconds: 'never' is not a number from 0 up"),
        ("checkpoint_seconds", math.nan, "checkpoint_seconds: nan is not a number from 0 up"),
        ("seeds", [2**64], f"seeds: [{2**64}] is not a list of whole numbers from 0 to {LARGEST_SEED}, such as"),
        ("seeds", [True], "seeds: [True] is not a list of whole numbers"),
        ("seeds", [-1], "seeds: [-1] is not a list of whole numbers"),
        ("threads", 5000, "threads: 5000 is not a whole number from 1 to 1024, or null"),
        ("force", "maybe", "force: 'maybe' is not true or false"),
        ("results", None, "results: None is not a folder"),
        ("other_code", "ask", "other_code: 'ask' is not one of keep, rerun, refuse"),
        ("dataset.first", "some", "dataset.first: 'some' is not a whole number from 1 up, or null"),
        ("dataset.holdout", 0.1, "dataset.holdout: 0.1 is not a whole number from 0 up"),
        ("dataset.holdout_seed", 2**32, f"dataset.holdout_seed: {2**32} is not a whole number from 0 to {2**32 - 1}"),
        ("init", INITIALISER | {"std": -1}, "init.std: -1 is not a number from 0 up"),
        ("init", INITIALISER | {"bias": "some"}, "init.bias: 'some' is not a number, or null"),
        ("split.per_layer", "maybe", "split.per_layer: 'maybe' is not true or false"),
        ("fewest", 0, "fewest: 0 is not a whole number from 1 up"),
        ("optimizer.penalty", PENALTY | {"largest": ".inf"}, "optimizer.penalty.largest: '.inf' is a word here"),
        (
            "optimizer.beta",
            "-.inf",
            "optimizer.beta: '-.inf' is a word here; infinity is inf on the command line, .inf",
        ),
        ("optimizer.z_step", {"blocks": [1, ".inf"]}, "optimizer.z_step.blocks.1: '.inf' is a word here"),
    ],
)
def test_a_value_that_is_none_is_named_with_its_key(
    of_the_suite: DictConfig, key: str, value: Any, message: str
) -> None:
    config = of_the_suite.copy()
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    with pytest.raises(ValueError) as error:
        check(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", [1, 1, 10]),
        ("theta_step", {"start": [0.1, 0.01], "end": 0.0}),
        ("z_step", {"blocks": [1.0, [0.1, 0.2], 1.0]}),
    ],
)
def test_values_per_seed_are_refused(of_the_suite: DictConfig, key: str, value: Any) -> None:
    """They would be pooled in one row of a table."""
    config = of_the_suite.copy()
    OmegaConf.update(config, f"optimizer.{key}", value, merge=False, force_add=True)
    with pytest.raises(ValueError, match=rf"^optimizer\.{key}.*: .* has one value per seed, which "):
        check(config)


def test_values_that_are_right_are_taken() -> None:
    penalty = "optimizer.penalty={_target_:admm.optimizers.AdaptivePenalty,c:0.9,bound:1.0,shrink:0.95,largest:inf}"
    check(composed(penalty, f"seeds=[{LARGEST_SEED}]", "checkpoint_seconds=inf", "~init", "+init={_target_:f,std:a}"))
    printed = (
        (ROOT / "experiments/conf/optimizer/block_admm.yaml")
        .read_text(encoding="utf-8")
        .split("# Eq. 6: ")[1]
        .split("}")[0]
    )
    config = composed(f"optimizer.penalty={printed}}}")  # as its comment has it
    check(config)
    assert instantiate(config.optimizer.penalty) == AdaptivePenalty()


# --- Searches


@pytest.mark.parametrize(
    "override", ["k=range(1,3)", "k=range(3)", "k=range(6,1,-2)", "k=range(0,1,0.3)", "k=range(1,2)", "k=null,0.1,0.4"]
)
def test_a_study_searches_the_cells_of_a_grid(override: str) -> None:
    optuna = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl")
    parser = OverridesParser.create()
    grid = parser.parse_override(override).sweep_string_iterator()
    space = optuna.create_optuna_distribution_from_override(parser.parse_override(without_end(override)))
    if hasattr(space, "choices"):
        assert space.choices == ("null", 0.1, 0.4)  # Optuna's TPE drops trials of a None
    else:
        steps = round((space.high - space.low) / (step := getattr(space, "q", None) or space.step))
        searched = [space.low + number * step for number in range(steps + 1)]
        assert searched == pytest.approx(sorted(map(float, grid)))


def test_a_study_s_ranges_end_as_a_grid_s(tmp_path: Path) -> None:
    """Of the command line and of search=…."""
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    few = [*SMALL, "iterations=1", "seeds=[0]", "dataset.holdout=20", *places(tmp_path), "hydra.sweeper.n_trials=1"]
    few += ["hydra/sweeper=study", "+hydra.sweeper.params={optimizer.epoch_parts: 'range(1,4)'}"]
    launch(*few, "optimizer.batch_size=range(5,6)")
    (file,) = tmp_path.glob("outputs/searches/*.db")
    ((trial,),) = [optuna.load_study(study_name=file.stem, storage=f"sqlite:///{file}").trials]
    assert {name: (space.low, space.high) for name, space in trial.distributions.items()} == {
        "optimizer.batch_size": (5, 5),
        "optimizer.epoch_parts": (1, 3),
    }
    with pytest.raises(BadInput, match=r"^k=range\(5,5\): a range without a value"):
        without_end("k=range(5,5)")


def test_null_is_a_value_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its table, its picture and as the best one."""
    held_out = {"dataset": {"holdout": 5, "sha256": "abc"}, "seeds": [0]}
    runs = [
        add_run(
            tmp_path, f"sgd-{value}", [score], run_json("sgd", "tuned", "2001", overrides=[f"a.b={value}"], **held_out)
        )
        for value, score in (("0.4", 50.0), ("null", 90.0), ("0.1", 70.0))
    ]
    drawn: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k))[1])
    write_ranking("mnist_shallow_sgd", rankings(runs)["mnist_shallow_sgd"], tmp_path)
    path = tmp_path / "searches/mnist_shallow_sgd.csv"
    assert list(read_ranking(path)["a.b"]) == ["null", "0.1", "0.4"]
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["null", "0.1", "0.4"]
    assert axes.collections[0].get_offsets().tolist() == [[0, 90], [1, 70], [2, 50]]
    assert [line["best"] for line in best_of_search(path)] == ["a.b=null"]


# --- Texts


def test_text_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale's encoding is."""
    folders = ("admm", "experiments", "scripts", "hydra_plugins")
    without = []
    for path in [ROOT / "run.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and is_text_without_encoding(call):
                without.append(f"{path}:{call.lineno}: {ast.unparse(call)}")
    assert without == []


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text, of a file or of a process, in the locale's encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    mode = given.get("mode", " ".join(ast.unparse(part) for part in call.args if isinstance(part, ast.Constant)))
    is_text = "b" not in mode and not ast.unparse(call.func).endswith(("os.open", "Image.open", "logger.open"))
    is_file = name in ("read_text", "write_text") or (name == "open" and is_text)
    return "encoding" not in given and (is_file or given.get("text") == "True")


def test_pages_are_utf_8_in_any_locale_and_what_a_terminal_lacks_ends_nothing(tmp_path: Path) -> None:
    note = "784–128–10, β = 1"
    run = add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001", note=note, commit="c"))
    code = """import sys
from pathlib import Path
from experiments.reports.text import print_table
from experiments.store import Run
from scripts.results_page import write_results_page
write_results_page(Path(sys.argv[1]))
print_table(__import__("pandas").DataFrame([{"note": Run(Path(sys.argv[2])).info["note"]}]), "a note")
"""
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", code, str(tmp_path), str(run.folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | narrow, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert note in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert b"784?128?10, ? = 1" in done.stdout


def test_a_character_that_the_output_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(printed, encoding="ascii"))
    show_what_can_be_shown()
    print("β = 1", flush=True)
    assert printed.getvalue() == b"? = 1\n"


def test_a_text_stays_in_its_cell_and_is_no_formula(tmp_path: Path) -> None:
    assert markdown(pd.DataFrame({"a|b": ["x | y\nz", "c"]})) == "| a\\|b |\n| --- |\n| x \\| y z |\n| c |"
    run = add_run(
        tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001", overrides=["a.b='$x_{$ of 5$'"])
    )
    picture = Accuracy("mnist_shallow", "").figures([run])["mnist_shallow"]
    picture.savefig(tmp_path / "a.png")
    assert r"\$x_{\$ of 5\$" in picture.axes[0].get_title()


# --- Code


def test_the_sources_of_a_run_are_those_of_what_its_configuration_names() -> None:
    def of(*overrides: str) -> dict[str, str]:
        plain: Any = OmegaConf.to_container(composed(*overrides), resolve=True)
        return sources(plain)

    found = of("optimizer=sgd", "logger=wandb")
    assert next(iter(found)) == "admm/optimizers/backprop.py"
    assert {
        "admm/models.py",
        "admm/blocks.py",
        "admm/training.py",
        "experiments/training.py",
        "experiments/tasks/classification.py",
    } <= set(found)
    others = {"admm/optimizers/block_admm.py", "admm/optimizers/taylor.py", "admm/optimizers/__init__.py"}
    others |= {"experiments/reports/accuracy.py", "experiments/store.py", "experiments/loggers.py"}
    assert not others & set(found)
    assert "admm/nmf.py" in of("experiment=lfw_proxy", "row=lfwa_deepfacto/nmf-rank4")
    assert "experiments/training.py" in of("experiment=memory")
    assert all(len(sha) == 12 for sha in found.values())


NAMES = ("mylab/networks.py", "mylab/sizes.py")
NETWORK = """from torch import nn
from mylab.sizes import WIDTH
def network(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
"""


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write a network of one's own, and a text into a module that it imports; as a new process would see them."""
    package = tmp_path / "mylab"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def edit(sizes: str) -> None:
        for name, text in (("__init__", ""), ("networks", NETWORK), ("sizes", sizes)):
            (package / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
            del sys.modules[name]
        provenance.read.cache_clear()

    return edit


def test_own_code_counts_in_a_list_and_behind_an_object_of_another_library(edit: Callable[[str], None]) -> None:
    edit("from functools import partial\nWIDTH = 4\nnet = partial(dict, WIDTH=WIDTH)\n")
    chain = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "mylab.networks.network"}]}
    assert own_code(sources({"model": chain})).keys() == {"mylab/networks.py", "mylab/sizes.py"}
    assert "mylab/sizes.py" in own_code(sources({"model": {"_target_": "mylab.sizes.net"}}))


def test_a_run_is_known_by_its_user_s_own_code(tmp_path: Path, edit: Callable[[str], None]) -> None:
    model = ["~model", "+model={_target_:mylab.networks.network}", "dataset.first=100", "iterations=1", "seeds=[0]"]
    few = ["experiment=digits_shallow", "optimizer=sgd", *model, *places(tmp_path)]
    texts = ["WIDTH = 4\n", '"""Sizes."""\n\nWIDTH=4  # of the hidden layer\n', "WIDTH = 16\n", "WIDTH = 4\n"]
    for text, is_new, runs in zip(texts, (True, False, True, False), (1, 1, 2, 2), strict=True):
        edit(text)
        assert ("is there already" in launch(*few)) is not is_new
        found = stored(tmp_path / "outputs")
        assert len(found) == len({run.row for run in found}) == runs
    assert all(set(run.config["own_code"]) == set(NAMES) for run in found)
    assert list(problems_of(Store(tmp_path / "outputs"))) == []


def test_a_study_is_known_by_its_user_s_own_code(edit: Callable[[str], None]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["~model", "+model={_target_:mylab.networks.network}", "hydra/sweeper=study"]
        config = compose("config", overrides, return_hydra_config=True)

    def of(text: str) -> str:
        edit(text)
        return search_hash(config)

    assert of("WIDTH = 4\n") == of("WIDTH=4") != of("WIDTH = 16\n")


def test_a_run_of_other_code_is_named_under_the_table_and_kept_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["experiment=digits_shallow", "optimizer=sgd", "dataset.first=100", "iterations=1", "seeds=[0]"]
    few += ["model.hidden=[8]", *places(tmp_path)]
    launch(*few)
    (found,) = stored(tmp_path / "outputs")
    former = found.info | {"sources": found.info["sources"] | {"admm/blocks.py": "0"}, "finished": "2001"}
    (found.folder / "run.json").write_text(json.dumps(former))
    printed = launch_with_report(*few)
    kept = "kept and used, though made by other code"
    assert f"{found.folder.name}: {kept}: admm/blocks.py; force=true makes it again" in printed
    note = f"{kept} (docs/troubleshooting.md): {found.folder.name}; changed since: admm/blocks.py; other_code=rerun tr"
    assert note in printed.split("digits_shallow: ")[-1] and found.info == former
    with pytest.raises(ValueError, match=r"^other_code=refuse: sgd-.*: made by other code: admm/blocks.py$"):
        is_reusable(found, found.info | {"sources": found.info["sources"] | {"admm/blocks.py": "1"}}, "refuse")
    monkeypatch.setattr(provenance, "commit", lambda: "another")
    printed = launch_with_report(*few, "other_code=rerun")
    then = former["commit"]
    assert f"made by other code, {then}, now another: admm/blocks.py; it is made again" in printed
    assert "changed since" not in printed and found.info["finished"] != "2001"
    assert is_reusable(found, found.info, "refuse")


def test_a_race_of_other_code_is_run_again(tmp_path: Path) -> None:
    """Which is of no seed alone, as memory and the faces."""
    few = ["experiment=mnist_walltime", "dataset=digits", "dataset.first=100", "model.hidden=[8]", "optimizers=[sgd]"]
    few += ["iterations=1", "seeds=[0]", "threads=1", "progress=false", "setting=default", *places(tmp_path)]
    launch(*few)
    (run,) = stored(tmp_path / "outputs")
    former = run.info | {"sources": run.info["sources"] | {"admm/blocks.py": "0"}, "finished": "2001"}
    (run.folder / "run.json").write_text(json.dumps(former))
    assert ": admm/blocks.py; it is made again" in launch(*few, "other_code=rerun")
    assert run.info["finished"] != "2001" and run.info["sources"]["admm/blocks.py"] != "0"


def test_of_a_run_before_sources_were_hashed_git_tells_what_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        return provenance.git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments)

    for name in ("b.py", "a.py", "of_no_run.py"):
        (tmp_path / name).write_text("first")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        git(*arguments)
    first, names = git("rev-parse", "HEAD").strip(), ["b.py", "a.py", "elsewhere.py"]
    assert sources_changed_since(first, names, tmp_path) == []
    for name in ("a.py", "b.py", "of_no_run.py"):
        (tmp_path / name).write_text("second")
    assert sources_changed_since(first, names, tmp_path) == ["b.py", "a.py"]
    assert sources_changed_since(first, ["elsewhere.py"], tmp_path) == []
    for unknown in (f"{first}+", None, "0" * 12):
        assert sources_changed_since(unknown, names, tmp_path) is None
    run = add_run(tmp_path, "sgd-tuned", [90.0], run_json("sgd", "tuned", "2001", seeds=[0], commit=first))
    origin = {"commit": "now", "sources": dict.fromkeys(names, "0")}
    monkeypatch.setattr(jobs, "sources_changed_since", lambda *asked: sources_changed_since(*asked, tmp_path))
    caplog.set_level("INFO")
    for other_code in ("keep", "rerun", "refuse"):
        assert is_reusable(run, origin, other_code)
    assert caplog.text.count(f": kept and used, though made by other code, {first}, now now: b.py, a.py; force=") == 3
    unknown_run = add_run(tmp_path, "adam-tuned", [90.0], run_json("adam", "tuned", "2001", seeds=[0], commit="c+"))
    assert (
        is_reusable(unknown_run, origin, "refuse") and "the sources of c+, which made it, were not kept" in caplog.text
    )


def test_a_resumed_run_whose_code_has_changed_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slot = Slot(tmp_path, "a", "b", "c")
    slot.partial.mkdir(parents=True)
    slot.checkpoint.write_bytes(b"")
    begun = {"commit": "c", "versions": {}, "machine": "m", "sources": {"admm/blocks.py": "1", "admm/losses.py": "1"}}
    (slot.partial / "started.json").write_text(json.dumps(begun))
    write_start_record(slot, begun | {"sources": {"admm/blocks.py": "2", "admm/losses.py": "1"}})
    assert "begun with other code, resumed with another admm/blocks.py" in caplog.text
    caplog.clear()
    write_start_record(slot, begun | {"sources": {"admm/blocks.py": "2", "admm/losses.py": "1"}})
    assert "other code" not in caplog.text
