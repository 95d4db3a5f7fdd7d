"""Files of configuration in a folder of one's own: where their runs go, and what their experiments report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from launches import multirun, places
from stores import add_run, run_json

from experiments.errors import BadInput
from experiments.launch import Launch
from experiments.reports.base import make_report, note_report, report_of, report_on
from experiments.rows import CONF, Row
from experiments.store import Run, Store
from scripts.figures import redraw

MINE = """# @package _global_
defaults: [override /dataset: digits]
iterations: 1
threads: 1
committed_seeds: [0, 1]
report: {caption: My comparison, baseline: sgd-slow, panels: {tuned: "${caption_of_a_panel}"}}
caption_of_a_panel: My panel
rows: [digits_shallow/adam-tuned, mine/sgd-slow]
"""
SLOW = "# @package _global_\ndefaults: [override /optimizer: sgd]\noptimizer: {step_size: 0.01}\n"


@pytest.mark.parametrize(
    "file",
    [
        "experiment/digits_shallow",
        "optimizer/sgd",
        "row/digits_shallow/sgd-tuned",
        "model/mlp",
        "config",
    ],
)
@pytest.mark.parametrize("is_first", [True, False])  # as with --config-dir, or as with hydra.searchpath
def test_a_job_is_committed_if_all_of_its_files_are(tmp_path: Path, file: str, is_first: bool) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    conf = (tmp_path, CONF) if is_first else (CONF, tmp_path)
    choices = {"model": "mlp", "dataset@data": "digits"}
    row = Row("digits_shallow/sgd-tuned")
    launch = Launch("digits_shallow", "sgd", row, (), tmp_path, conf, True, False, None, choices)
    assert launch.is_committed
    (tmp_path / f"{file}.yaml").touch()
    assert launch.is_committed is not is_first


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A launch of an experiment of one's own, whose file is gone when figures and tables are drawn again."""
    folder = tmp_path_factory.mktemp("launched")
    for name, text in {"experiment/mine": MINE, "row/mine/sgd-slow": SLOW}.items():
        path = folder / f"conf/{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    multirun(f"hydra.searchpath=[file://{folder}/conf]", "experiment=mine", "progress=false", *places(folder))
    shutil.rmtree(folder / "conf")
    yield folder


def test_the_report_of_an_experiment_of_one_s_own_is_kept_beside_its_runs(launched: Path) -> None:
    store = Store(launched / "outputs")
    runs = store.runs("mine")
    report = report_on(runs[-1])
    assert (report.caption, report.baseline, report.panels) == ("My comparison", "sgd-slow", {"tuned": "My panel"})
    (file,) = launched.glob("outputs/logs/*/*/mine.csv")
    table = pd.read_csv(file)
    assert table["minus SGD slow [95 %]"][0] == "baseline"
    figure = report.figures(runs)["mine"]
    assert figure.get_supxlabel().startswith("My comparison. ") and figure.axes[0].get_title() == "My panel"
    redraw(launched / "outputs")
    assert (launched / "outputs/tables/mine.csv").read_text() == file.read_text()


def test_runs_of_one_s_own_files_are_not_among_the_committed_ones(launched: Path) -> None:
    assert not (launched / "results").exists()
    runs = Store(launched / "outputs").runs("mine")
    assert [(run.record.method, run.record.setting) for run in runs] == [("adam", "tuned"), ("sgd", "slow")]
    assert all(not run.record.overrides for run in runs)


# --- The note of a report


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return add_run(tmp_path, "sgd-tuned", [98.0, 98.2], run_json("sgd", "tuned", "2001"))


def test_a_note_goes_before_the_committed_report_until_it_is_removed(run: Run) -> None:
    note_report(run, {"caption": "Größe", "baseline": "adam"})
    assert (report_on(run).caption, report_on(run).baseline) == ("Größe", "adam")
    for _ in range(2):
        note_report(run, None)
        assert report_on(run) == report_of("mnist_shallow")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"captoin": "x"}, "report: no key 'captoin'; the keys are caption, quantity, panels, "),
        ({"experiment": "x"}, "report: no key 'experiment'; the keys are "),
        ({"_target_": "os.system"}, "report._target_: os.system is no subclass of experiments.reports.base.Exper"),
        ({"_target_": "builtins.dict"}, "report._target_: builtins.dict is no subclass of "),
        ({"_target_": "experiments.reports.acuracy.Accuracy"}, "report._target_: Error loading 'experiments.rep"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(run: Run, node: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_report("mine", node)
    note_report(run, node)
    with pytest.raises(BadInput, match=f"mnist_shallow/report.yaml: {message}"):
        report_on(run)


def test_a_note_calls_nothing_but_its_report(run: Run, tmp_path: Path) -> None:
    call = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(tmp_path / "x")]}]}
    note_report(run, {"panels": {"tuned": call}})
    assert report_on(run).panels == {"tuned": call} and not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["a: [", "- a", "5", ""])
def test_a_damaged_note_is_named(run: Run, text: str) -> None:
    (run.folder.parent / "report.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"/report.yaml: (.|\n)*; a launch of mnist_shallow writes it again"):
        report_on(run)
