"""Test accuracy, or what else runs are judged by, against iteration."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments.reports.base import Comparison, ExperimentReport, score_by_seed
from experiments.reports.curves import Curve, curves, ordered_settings, place
from experiments.reports.drawing import caption_below, colours_of, legend_above
from experiments.reports.metrics import ACCURACY, in_percent, metric_of
from experiments.reports.paired import Scored, insert_differences
from experiments.reports.text import in_figure
from experiments.store import Run

WIDTH = 7.5  # inches of a figure, at least
PANEL = 5.0, 3.4  # inches of each of several panels
TITLE = 55  # characters of a line of a panel's title, at most


@dataclass(frozen=True)
class Accuracy(ExperimentReport):
    """Test accuracy, or what else `experiments.reports.metrics` finds, against iteration. The score is the last one; in
    a search it is on held-out data."""

    def score(self, run: Run) -> dict[int, float]:
        """Return each seed's last score, at least 0; none for runs that are judged by their loss.

        Raises ValueError for a seed that has not diverged and lacks it."""
        record, history = run.record, in_percent(run.history)
        metric = metric_of(history.columns)
        if not metric.unit:
            return {}
        final = history[history["iteration"] == record.iterations].set_index("replica")[metric.column].dropna()
        if len(final) + len(record.diverged) < len(record.seeds):
            raise ValueError(f"history.csv has the last iteration of {len(final)} of {len(record.seeds)} seeds only")
        return score_by_seed(record, final.clip(lower=0.0))

    def headline(self, run: Run) -> tuple[float, str]:
        (curve,) = curves([run])
        words = "" if curve.metric == ACCURACY else f" {curve.metric.words}"
        return curve.row()["mean"], f"{curve.metric.unit}{words}".strip()

    def title(self, runs: Sequence[Run]) -> str:
        by_row = curves(runs)
        if all(curve.metric == ACCURACY for curve in by_row):
            return super().title(runs)
        return f"{self.experiment}: {', '.join(sorted({curve.score_label for curve in by_row}))}"

    def compare(self, runs: list[Run]) -> list[Comparison]:
        return [_comparison(curve) for curve in curves(runs)]

    def table(self, runs: list[Run]) -> pd.DataFrame:
        by_row = curves(runs)
        table = pd.DataFrame([self.row(curve) for curve in by_row], index=[curve.run for curve in by_row])
        insert_differences(table, [Scored(curve.record, curve.scores) for curve in by_row], self.baseline)
        return table

    def row(self, curve: Curve) -> dict[str, Any]:
        """Return a curve's row of the table, with the deviation in a column `std`."""
        return curve.row()

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        return {self.experiment: self.figure(curves(runs))}

    def figure(self, curves: list[Curve]) -> Figure:
        """Draw mean test accuracy against iteration, ±1 standard deviation shaded, the paper's final numbers dotted.

        One panel for each setting and score, with common axes where the score is the same. Remarks on all curves are
        in the caption, those on all curves of a panel in its title.
        """
        order, groups = ordered_settings(self), dict[tuple[str, str], list[Curve]]()
        for curve in sorted(curves, key=lambda curve: (place(curve.record.setting, order), curve.metric.name)):
            groups.setdefault((curve.record.setting, curve.metric.name), []).append(curve)
        figure = Figure(figsize=(max(PANEL[0] * len(groups), WIDTH), PANEL[1]), layout="constrained")
        xlim = int(is_log := lengths_differ(curves)), max(curve.record.iterations for curve in curves)
        of_one_metric = len({metric for _, metric in groups}) == 1
        panels = figure.subplots(1, len(groups), sharex=True, sharey=of_one_metric, squeeze=False)[0]
        said, named = shared_remarks(curves), methods_with_remarks(groups.values())
        for axes, ((setting, metric), group) in zip(panels, groups.items(), strict=True):
            compared = [curve for curve in curves if curve.metric.name == metric]
            of_panel = [text for text in in_all([curve.remarks for curve in group]) if text not in said]
            _plot_panel(axes, group, is_log, [*said, *of_panel], named)
            axes.set(xlabel="iteration", ylabel=score_label(compared), ylim=score_range(compared), xlim=xlim)
            title = textwrap.fill(", ".join([self.panels.get(setting, setting), *of_panel]), TITLE)
            axes.set_title(in_figure(title), fontsize=11)
            if of_one_metric:
                axes.label_outer()
        remark = "; dotted: the paper's final accuracy" if any(c.reference is not None for c in curves) else ""
        disagree = any(curve.seeds_disagree for curve in curves)
        remark += "; thin: the seeds of a method in which they disagree" if disagree else ""
        legend_above(figure)
        caption_below(figure, caption(self, curves, remark))
        return figure


def _comparison(curve: Curve) -> Comparison:
    row, record = curve.row(), curve.record
    return Comparison(
        curve.run,
        record.method,
        row["setting"],
        ours=row["mean"],
        paper=row["paper"],
        std=row["std"],
        seeds=row["seeds"],
        iterations=row["iterations"],
        measure=None if curve.metric == ACCURACY else curve.score_label,
    )


def score_label(curves: Sequence[Curve]) -> str:
    """Return what curves of one metric are judged by: held-out accuracy if all are of held-out data."""
    held_out = all(curve.record.dataset.holdout for curve in curves)
    return curves[0].metric.label("held-out" if held_out else "test")


def shared_remarks(curves: Sequence[Curve]) -> list[str]:
    """Return the remarks that all curves have, if there are several curves."""
    return shared([curve.remarks for curve in curves])


def shared(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the texts that all rows have, if there are several rows."""
    return in_all(rows) if len(rows) > 1 else []


def in_all(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the texts that all rows have."""
    return [text for text in rows[0] if all(text in row for row in rows)]


def methods_with_remarks(panels: Iterable[Sequence[Curve]]) -> set[str]:
    """Return the methods of which some curve has a remark that not all curves of its panel have: only with their
    settings are their curves told apart in a legend of all panels."""
    told = [(curve, in_all([other.remarks for other in panel])) for panel in panels for curve in panel]
    return {curve.record.method for curve, of_all in told if len(curve.remarks) > len(of_all)}


def lengths_differ(curves: Sequence[Curve]) -> bool:
    """Return whether the numbers of iterations are so different that their axis should be logarithmic."""
    iterations = [curve.record.iterations for curve in curves]
    return max(iterations) > 4 * min(iterations)


def plot_curve(
    axes: Axes,
    curve: Curve,
    column: str,
    colour: str,
    label: str,
    x: str = "iteration",
    highest: float = np.inf,
    line: str = "-",
) -> None:
    """Plot the mean of a column of the history over the seeds, by iteration, with ±1 standard deviation shaded.

    x: the column, or `iteration`, whose mean is the abscissa. highest: what the shading does not exceed.
    """
    statistics = curve.by_iteration(column)
    mean, std = (statistics[name].to_numpy() for name in ("mean", "std"))
    at = statistics.index.to_numpy() if x == "iteration" else curve.by_iteration(x)["mean"].to_numpy()
    axes.plot(at, mean, color=colour, label=in_figure(label), linewidth=1.6, linestyle=line)
    axes.fill_between(at, mean - std, np.minimum(mean + std, highest), color=colour, alpha=0.18, linewidth=0)


def _plot_panel(
    axes: Axes, curves: Sequence[Curve], is_log: bool, shared: Sequence[str], named: Collection[str]
) -> None:
    metric, colours = curves[0].metric, colours_of([curve.record.method for curve in curves])
    highest = 100.0 if metric.unit else np.inf
    for whole, colour in zip(curves, colours, strict=True):
        curve = whole.after_training() if is_log else whole  # no 0 on a logarithmic axis
        label = whole.legend_beside(shared, several=curve.record.method in named)
        plot_curve(axes, curve, metric.column, colour, label, highest=highest)
        if curve.seeds_disagree:
            for _, seed in curve.history.groupby("replica"):
                axes.plot(seed["iteration"], seed[metric.column], color=colour, linewidth=0.5)
        if curve.reference is not None:
            axes.axhline(curve.reference, color=colour, linestyle=":", linewidth=1.0)
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)


def score_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Return the range to show of curves of one metric: from below the worst final score, and what a curve has after a
    tenth of its iterations, or 0 if a final score is at most 50; to above the best. None shows all."""
    metric = curves[0].metric
    if not metric.unit or metric.column not in curves[0].history:
        return None
    means = [curve.by_iteration(metric.column)["mean"] for curve in curves]
    finals = [float(mean.iloc[-1]) for mean in means]
    finals += [curve.reference for curve in curves if curve.reference is not None]
    missing = 100.0 - min(finals)
    early = [score for mean in means for score in mean.loc[mean.index[-1] / 10 :].head(1)]
    lowest = max(0.0, min(99.0 - 1.4 * missing, *early)) if missing < 50.0 else min(0.0, 1.1 * min(finals))
    return lowest, min(100.3, max(finals) + 0.25 * missing)


def caption(report: ExperimentReport, curves: Sequence[Curve], remark: str = "") -> str:
    """Return a figure's caption: what it shows, over how many seeds, on which machine. remark: follows the seeds."""
    of_the_paper = all(curve.is_of_the_paper for curve in curves)
    source = f"Reproduction of {report.paper.source}: " if of_the_paper and report.paper.source else ""
    seeds = sorted({curve.row()["seeds"] for curve in curves})
    several = f"Mean over {' or '.join(map(str, seeds))} seeds, shaded ±1 standard deviation"
    mean, machines = "One seed" if seeds == [1] else several, sorted({curve.record.machine for curve in curves})
    shows = report.caption if of_the_paper else report.experiment
    shows = in_figure(", ".join([shows, *shared_remarks(curves)]))
    return f"{source}{shows}. {mean}{remark}. {', '.join(machines)}."
