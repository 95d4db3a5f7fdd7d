"""Differences to a baseline over the seeds that two rows share, beside their means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from scipy.stats import ttest_rel
from stores import add_run, run_json

from experiments.checks import check_row
from experiments.launch import Launch
from experiments.reports import base
from experiments.reports.base import report_of
from experiments.reports.paired import difference
from experiments.reports.text import markdown
from experiments.rows import CONF, Row
from experiments.store import Store
from scripts import figures, html_page, results_page

COLUMN = "minus SGD [95 %]"
OURS, BASELINE = {0: 98.4, 1: 98.5, 2: 98.3}, {0: 98.3, 1: 98.2, 2: 98.25}


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    test = ttest_rel(list(OURS.values()), list(BASELINE.values())).confidence_interval()
    assert difference(OURS, BASELINE) == f"0.15 [{test.low:.2f}, {test.high:.2f}]" == "0.15 [-0.18, 0.48]"
    assert difference({1: 1.0, 0: 2.0}, {0: 1.0, 1: 0.0}) == "1.00 [1.00, 1.00]"  # paired by seed, not by order
    assert difference(OURS, OURS) == "0.00 [0.00, 0.00]"
    assert difference({0: 1.0, 1: 1.002}, {0: 1.002, 1: 1.0})[:6] == "0.00 ["  # no -0.00


@pytest.mark.parametrize(
    ("seeds", "of_baseline", "cell"),
    [
        ([0], [0], "– (one seed)"),
        ([0, 1], [1, 2], "– (one seed)"),
        ([3, 4], [0, 1, 2], "– (other seeds)"),
        ([], [0, 1, 2], "– (diverged)"),
        ([0, 1], [], "– (diverged)"),
        ([0, 1, 3], [0, 1, 2], "0.20 [-1.07, 1.47], 2 seeds"),
        ([0, 1], [0, 1, 2], "0.20 [-1.07, 1.47], 2 seeds"),
    ],
)
def test_seeds_that_only_one_has_are_left_out(seeds: list[int], of_baseline: list[int], cell: str) -> None:
    of_all = OURS | {3: 0.0, 4: 0.0}
    assert difference({s: of_all[s] for s in seeds}, {s: BASELINE[s] for s in of_baseline}) == cell


def cells(root: Path, *runs: tuple[str, list[float], dict[str, Any]]) -> list[str] | None:
    """The column of a table of runs (name, accuracies, and what else run.json says), in the order of the table."""
    for number, (name, accuracies, more) in enumerate(runs):
        add_run(root, name, accuracies, run_json(*name.split("-"), f"200{number}", **more))
    table = report_of("mnist_shallow").table(Store(root).runs("mnist_shallow"))
    return list(table[COLUMN]) if COLUMN in table else None


def changed(*overrides: str) -> dict[str, Any]:
    return {"overrides": list(overrides)}


def test_a_row_is_compared_with_the_baseline_of_its_own_setting(tmp_path: Path) -> None:
    sgd = [("sgd-tuned", [98.0, 98.2], {}), ("sgd-faithful", [95.0, 95.0], {})]
    others = [("adam-tuned", [98.1, 98.3], {}), ("adam-faithful", [97.0, 97.0], {}), ("adam-mine", [1.0, 2.0], {})]
    variants = [("adam-tuned_more", [98.2, 98.4], {}), ("adam-mine_more", [1.0, 2.0], {})]
    assert cells(tmp_path, *sgd, *others, *variants) == [
        *["baseline", "baseline"],
        *["0.10 [0.10, 0.10]", "2.00 [2.00, 2.00]", "– (no row sgd-mine)"],
        *["– (no row sgd-mine_more)", "0.20 [0.20, 0.20]"],
    ]


def test_a_diverged_seed_is_no_pair(tmp_path: Path) -> None:
    diverged = ("adam-tuned", [98.1, 98.3, 0.0], {"seeds": [0, 1, 2], "diverged": {"2": 0}})
    assert cells(tmp_path, ("sgd-tuned", [98.0, 98.2, 98.1], {"seeds": [0, 1, 2]}), diverged) == [
        "baseline",
        "0.10 [0.10, 0.10], 2 seeds",
    ]


def test_other_values_of_the_optimizer_are_compared_and_other_networks_and_data_are_not(tmp_path: Path) -> None:
    sgd, narrow = ("sgd-tuned", [98.0, 98.2], {}), changed("model.hidden=[3]")
    larger = ("adam-tuned", [98.1, 98.3], changed("optimizer.step_size=1", "iterations=9"))
    assert cells(tmp_path / "1", sgd, larger) == ["baseline", "0.10 [0.10, 0.10]"]
    assert cells(tmp_path / "2", sgd, ("adam-tuned", [1.0, 2.0], narrow)) is None
    assert cells(tmp_path / "3", sgd, ("adam-tuned", [1.0, 2.0], {"dataset": {"sha256": "other"}})) is None
    both = [("sgd-tuned", [98.0 + step, 98.2], changed(f"optimizer.batch_size={step}")) for step in (1, 2)]
    adam = ("adam-tuned", [98.1, 98.3], {}), ("adam-tuned", [100.1, 98.3], changed("optimizer.batch_size=2"))
    expected = ["baseline", "baseline", "– (2 rows sgd-tuned)", "0.10 [0.10, 0.10]"]
    assert cells(tmp_path / "4", *both, *adam) == expected


def test_a_table_without_a_comparison_has_no_such_column(tmp_path: Path) -> None:
    assert cells(tmp_path, ("adam-tuned", [98.0, 98.2], {}), ("block_admm-tuned", [98.0, 98.2], {})) is None


# --- The experiment's choice


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Declares a baseline of mnist_shallow."""

    def choose(baseline: str) -> None:
        folder = tmp_path / "conf/experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf/row").unlink(missing_ok=True)
        (tmp_path / "conf/row").symlink_to(CONF / "row")
        content = OmegaConf.load(CONF / "experiment/mnist_shallow.yaml")
        content.report.baseline = baseline
        OmegaConf.save(content, folder / "mnist_shallow.yaml")
        monkeypatch.setattr(base, "CONF", tmp_path / "conf")
        base._read.cache_clear()

    yield choose
    base._read.cache_clear()


def test_a_row_may_be_the_baseline_of_all_settings(tmp_path: Path, chosen: Any) -> None:
    chosen("adam-tuned")
    for name in ("adam-tuned", "adam-faithful", "sgd-faithful"):
        accuracies = [98.0, 98.0] if name == "adam-tuned" else [97.0, 97.5]
        add_run(tmp_path, name, accuracies, run_json(*name.split("-"), "2001"))
    table = report_of("mnist_shallow").table(Store(tmp_path).runs("mnist_shallow"))
    assert list(table["minus Adam tuned [95 %]"]) == ["-0.75 [-3.93, 2.43]", "baseline", "-0.75 [-3.93, 2.43]"]
    assert "| 97.25 | 0.35 | -0.75 [-3.93, 2.43] | 2 |" in markdown(table)


@pytest.mark.parametrize("command", [figures, results_page, html_page])
def test_a_baseline_that_is_not_there_is_named_with_the_choices(
    tmp_path: Path, chosen: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen("sgd-tund")
    add_run(tmp_path, "adam-tuned", [98.0, 98.2], run_json("adam", "tuned", "2001"))
    monkeypatch.setattr("sys.argv", ["command", str(tmp_path)])
    message = r"^error: report.baseline: 'sgd-tund' is no method and no row of experiment=mnist_shallow; there are "
    with pytest.raises(SystemExit, match=message + r"block_admm, .*, adam, block_admm-tuned, .*, adam-faithful$"):
        command.main()


def test_a_launch_refuses_a_baseline_that_is_not_there_or_not_in_the_file() -> None:
    def launched(report: dict[str, str], *overrides: str) -> None:
        launch = Launch("mnist_shallow", "sgd", Row("mnist_shallow/sgd-tuned"), overrides, CONF, (CONF,), *[False] * 3)
        check_row(OmegaConf.create({"rows": None, "setting": None, "report": report}), launch)

    launched({"baseline": "sgd-tuned"})
    with pytest.raises(ValueError, match=r"report.baseline: 'best' is no method and no row"):
        launched({"baseline": "best"})
    with pytest.raises(ValueError, match=r"report.baseline: is read from /.*/conf/experiment/mnist_shallow.yaml"):
        launched({"baseline": "sgd"}, "report.baseline=sgd")
