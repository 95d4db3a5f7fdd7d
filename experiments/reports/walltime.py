"""Figure 5: test accuracy against training seconds, drawn from the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.reports.accuracy import PANEL, WIDTH, Accuracy, caption, plot_curve, score_range, shared_remarks
from experiments.reports.curves import Curve, curves
from experiments.reports.drawing import caption_below, colours_of, legend_above
from experiments.store import Run

TARGETS = (90, 93, 95, 97)  # test accuracy, percent


@dataclass(frozen=True)
class Walltime(Accuracy):
    """The table has seconds to reach each target; the figure shows accuracy against seconds."""

    def row(self, curve: Curve) -> dict[str, Any]:
        """Return a method's row of the table: mean training seconds per seed until an iteration ends at each target or
        above."""
        row = super().row(curve)
        to_targets = {f"{target} %": seconds_to(curve.history, target) for target in TARGETS}
        ends = curve.history.groupby("replica")["seconds"].max()
        named = {name: row[name] for name in ("method", "setting")}
        of_accuracy = {name: row[name] for name in ("mean", "std", "seeds", "iterations", "machine")}
        return named | to_targets | {"total s": ends.mean()} | of_accuracy

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        by_method = curves(runs)
        said, several = shared_remarks(by_method), len({curve.record.setting for curve in by_method}) > 1
        figure = Figure(figsize=(WIDTH, PANEL[1]), layout="constrained")
        axes = figure.subplots()
        for curve, colour in zip(by_method, colours_of([curve.record.method for curve in by_method]), strict=True):
            label, trained = curve.legend_beside(said, several), curve.after_training()  # no 0 on a logarithmic axis
            plot_curve(axes, trained, "test_accuracy", colour, label, "seconds", highest=100.0)
        limits = score_range(by_method)
        axes.set(xlabel="training time of one seed (s)", ylabel="test accuracy (%)", xscale="log", ylim=limits)
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        legend_above(figure)
        remark = ". Set-up, data and evaluation excluded; the optimizers take turns in one process"
        caption_below(figure, caption(self, by_method, remark))
        return {self.experiment: figure}


def seconds_to(history: pd.DataFrame, target: float) -> float:
    """Return the mean seconds to a target over the seeds; NaN unless all seeds reach it."""
    first = history[history["test_accuracy"] >= target].groupby("replica")["seconds"].min()
    return float(first.mean()) if len(first) == history["replica"].nunique() else float("nan")
