"""What the figures look like: nothing is cut off or covered, and a colour means one thing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from stores import run_json

from experiments.reports.base import report_of, report_on
from experiments.reports.drawing import colours_of, sequence
from experiments.reports.methods import methods
from experiments.reports.searches import best_of_each, plot_ranking
from experiments.reports.writing import FONT_TAG, with_fixed_tags, write_report
from experiments.store import Run, Slot, Store

RESULTS = Path(__file__).parents[1] / "results"
EIGHT = [name for name in list(methods())[:9] if name != "adam"]


def finish(root: Path, experiment: str, row: str, rows: list[dict[str, Any]], **said: Any) -> Run:
    method, _, setting = row.partition("-")
    told = run_json(method, setting, "2001", experiment=experiment, **said)
    slot = Slot(root, experiment, row, f"{len(list(root.glob('runs/*/*'))):012x}")
    return slot.complete({"optimizer": {}}, rows, told)


def history(end: float, iterations: int) -> list[dict[str, Any]]:
    """Rows of two seeds whose accuracy is 10 before the first iteration, and then rises from half its end."""
    return [
        {
            "iteration": i,
            "replica": r,
            "seed": r,
            "seconds": 1e-3 * i,
            "test_accuracy": r + end * (0.5 + 0.5 * i / iterations) if i else 10.0,
            "kkt": 0.2 / (i + 1),
            "beta_1": 1.0,
            "h": 0.1,
            "primal_rounds": 1 + i // 10,
        }
        | {f"residual_{t}": 0.1 / t for t in range(1, 4)}
        | {f"cosine_{t}": 0.1 * t for t in range(1, 11)}
        for i in range(iterations + 1)
        for r in (0, 1)
    ]


def made_up(root: Path, experiment: str) -> list[Run]:
    """Runs with the longest texts that their figures are likely to have."""
    if experiment == "memory":
        sizes = [{"quantity": name, "bytes": 1e8} for name in ("theta", "moments", "z", "u", "z_moments", "peak")]
        return [finish(root, experiment, f"{name}_admm-faithful", sizes) for name in ("block", "online_block")]
    if experiment == "parallel":
        counts = [
            {"processes": n, "seconds": 2 / n, "variables": 9 / n, "peak": 1, "added": 1, "sent": 1} for n in (1, 2, 4)
        ]
        rows = [
            "block_admm-blocks_wide",
            *(f"{name}-samples_wide" for name in ("standard_admm", "bcd", "dladmm", "taylor")),
        ]
        return [finish(root, experiment, row, counts) for row in rows]
    settings = [*report_of(experiment).panels, "tuned", "faithful"][
        : 1 + (experiment not in ("angle", "mnist_walltime"))
    ]
    return [
        finish(root, experiment, f"{method}-{setting}", history(90.0 - n, 5 * (n + 1)), iterations=5 * (n + 1), **said)
        for setting in settings
        for n, method in enumerate(["block_admm"] if experiment == "convergence" else EIGHT)
        for said in ({}, {"overrides": ["optimizer.theta_update.step_size=0.003", "loss=cross_entropy"]})[
            : 1 + (n == 0)
        ]
    ]


@pytest.mark.parametrize("experiment", ["mnist_deep10", "mnist_walltime", "convergence", "angle", "memory", "parallel"])
def test_figures_show_all_that_they_say(tmp_path: Path, experiment: str) -> None:
    for figure in report_of(experiment).figures(made_up(tmp_path, experiment)).values():
        check(figure)


def test_a_pdf_has_the_same_bytes_in_each_process(tmp_path: Path) -> None:
    """Matplotlib tags the fonts by Python's hashes of texts, which are others in each process."""
    figure = Figure()
    figure.text(0.5, 0.5, "90 %")
    figure.text(0.5, 0.6, "θ", weight="bold")  # another font
    report: Any = SimpleNamespace(
        experiment="drawn",
        table=lambda runs: pd.DataFrame(),
        further_tables=lambda runs: {},
        figures=lambda runs: {"drawn": figure},
    )
    write_report(report, [], tmp_path, tmp_path)
    pdf = (tmp_path / "drawn.pdf").read_bytes()
    assert sorted(set(FONT_TAG.findall(pdf))) == [b"/AAAAAA+", b"/AAAAAB+"]
    assert with_fixed_tags(pdf.replace(b"/AAAAAB+", b"/QKXYZW+")) == pdf


def test_the_figure_of_a_search_shows_all_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: (drawn.append(self), path.touch()))
    lines = ["setting,optimizer.step_size,optimizer.beta,held-out,seeds,iterations,samples held out"]
    lines += [f"{s},{{start:{v},end:0.0}},{v},{90 + v},1,2,10" for s in ("normal", "kaiming") for v in (0.01, 0.1)]
    (tmp_path / "mnist_deep10_sgd.csv").write_text("\n".join(lines))
    plot_ranking(tmp_path / "mnist_deep10_sgd.csv")
    check(drawn[0])


def test_the_figure_of_a_search_for_iterations_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: (drawn.append(self), path.touch()))
    columns = "setting,evaluate_every,held-out,seeds,iterations,samples held out"
    table = f"{columns}\nfaithful,20,83,5,200,9\nfaithful,20,82,5,100,9\n"
    (tmp_path / "mnist_shallow_dladmm.csv").write_text(table)
    plot_ranking(tmp_path / "mnist_shallow_dladmm.csv")
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["iterations"]
    (best,) = best_of_each(tmp_path, "mnist_shallow").to_dict("records")
    assert best["with"] == "iterations=200"


@pytest.mark.long
@pytest.mark.parametrize("experiment", Store(RESULTS).experiments())
def test_the_committed_figures_show_all_that_they_say(experiment: str) -> None:
    runs = Store(RESULTS).runs(experiment)
    for figure in report_on(runs[-1]).figures(runs).values():
        check(figure)


def check(figure: Figure) -> None:
    """No text is cut off or lies on another one, and the legend, less than a third of the figure, covers no panel."""
    drawn, real = list[Text](), Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), real(self, renderer)))
        figure.draw_without_rendering()
    texts = [(text, text.get_window_extent()) for text in drawn if text.get_visible() and text.get_text()]
    width, height = figure.bbox.size
    for text, box in texts:
        is_inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert is_inside, f"cut off: {text.get_text()}"
    level = [(text, box.padded(-1)) for text, box in texts if text.get_rotation() % 90 == 0]
    for (one, its_box), (other, box) in combinations(level, 2):
        assert not its_box.overlaps(box), f"{one.get_text()} lies on {other.get_text()}"
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.width * box.height < width * height / 3
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
    assert not any(axes.get_legend() for axes in figure.axes)


def test_no_two_methods_have_one_colour() -> None:
    colours = [method.colour for method in methods().values()]
    assert len(set(colours)) == len(colours)
    known = colours_of(["sgd", "mine", "sgd", "yours", "block_admm"])
    assert known[0] == "#000000" and known[4] == "#0072b2" and len(set(known)) == 5
    sgd, lighter = known[0], known[2]
    assert sgd < lighter and lighter[1:3] == lighter[3:5] == lighter[5:7]  # a grey
    assert set(known[1:4:2]).isdisjoint(str(colour).lower() for colour in ("#000000", "#0072b2"))
    assert colours_of(["sgd"]) == ["#000000"]
    assert colours_of(["sgd"] * 3) == sequence(3)  # a grid of one method


def test_panels_of_one_score_have_common_axes_that_begin_where_the_curves_are(tmp_path: Path) -> None:
    rows = [("sgd-tuned", 90.0, 200), ("sgd-faithful", 92.0, 20), ("adam-faithful", 20.0, 20)]
    runs = [finish(tmp_path, "mnist_shallow", row, history(*told), iterations=told[1]) for row, *told in rows]
    (trained,), (failed,) = (report_of("mnist_shallow").figures(some).values() for some in (runs[:2], runs))
    for figure, lowest in ((trained, pytest.approx(49.5 + 0.5)), (failed, 0.0)):
        faithful, tuned = figure.axes
        assert faithful.get_ylim() == tuned.get_ylim() and faithful.get_xlim() == tuned.get_xlim() == (1, 200)
        assert tuned.get_ylim()[0] == lowest


def test_a_legend_names_what_its_curves_differ_in(tmp_path: Path) -> None:
    """A method's two settings in one panel, or in two of which one lacks seeds; what one of a panel's curves lacks, and
    not what all of them lack, which is in the panel's title."""
    rows = [("mnist_walltime", "sgd-tuned", 2), ("mnist_walltime", "sgd-faithful", 2)]
    rows += [("mnist_shallow", "sgd-tuned", 2), ("mnist_shallow", "sgd-faithful", 5)]
    rows += [("mnist_shallow", "adam-faithful", 2)]
    runs = [finish(tmp_path, name, row, history(90.0, 1), of_seeds=seeds) for name, row, seeds in rows]
    for experiment, compared, texts, title in (
        ("mnist_walltime", runs[:2], ["SGD, tuned", "SGD, faithful"], ""),
        ("mnist_shallow", runs[2:4], ["SGD"], "faithful, 2 of 5 seeds"),
        ("mnist_shallow", runs[2:], ["SGD, tuned", "SGD, faithful: 2 of 5 seeds", "Adam"], "faithful"),
    ):
        (figure,) = report_of(experiment).figures(compared).values()
        assert [text.get_text() for text in figure.legends[0].get_texts()] == texts
        assert title in [axes.get_title() for axes in figure.axes]


def test_a_legend_counts_a_seed_that_diverges_before_a_logarithmic_axis_begins(tmp_path: Path) -> None:
    rows = [row for row in history(90.0, 1) if row["iteration"] + row["seed"] < 2]
    runs = [finish(tmp_path, "mnist_shallow", "sgd-faithful", rows, iterations=1, diverged={"1": 1})]
    runs += [finish(tmp_path, "mnist_shallow", "adam-faithful", history(90.0, 20), iterations=20)]
    (figure,) = report_of("mnist_shallow").figures(runs).values()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["SGD, faithful: 1 of 2 seeds diverged", "Adam"]
