"""§3.3, Proposition 1: constraint and KKT residuals of Block-ADMM, drawn from the store."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.reports.accuracy import WIDTH, Accuracy, caption, plot_curve
from experiments.reports.curves import Curve, curves
from experiments.reports.drawing import caption_below, colours_of, legend_above, sequence
from experiments.reports.text import in_figure
from experiments.store import Run

LINES = ("-", "--", "-.")  # of the settings
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Convergence(Accuracy):
    """The table has the residuals at the end; the figures show residuals and primal rounds against iteration."""

    def row(self, curve: Curve) -> dict[str, Any]:
        """Return a setting's row of the table: means over the seeds at the last iteration."""
        last = curve.history[curve.history["iteration"] == curve.record.iterations].mean(numeric_only=True)
        residuals = {name: f"{last[name]:.2e}" for name in ("kkt", *residual_names(curve))}
        of_accuracy = super().row(curve)
        ends = {name: of_accuracy[name] for name in ("mean", "std", "seeds", "iterations", "machine")}
        return {"setting": of_accuracy["setting"]} | residuals | ends

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        # before training Z is the forward pass, and has no residual
        trained = [curve.after_training() for curve in curves(runs)]
        figures = {self.experiment: self.residuals(trained)}
        if any("primal_rounds" in curve.history for curve in trained):
            figures[f"{self.experiment}_rounds"] = self.rounds(trained)
        return figures

    def residuals(self, curves: list[Curve]) -> Figure:
        """Draw, in a panel for each setting, each block's relative constraint residual, the KKT residual, ‖h‖ and β."""
        figure = Figure(figsize=(max(3.4 * len(curves), WIDTH), 3.2), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for panel, curve in zip(panels, curves, strict=True):
            names = residual_names(curve)
            for t, (name, colour) in enumerate(zip(names, sequence(len(names)), strict=True), start=1):
                label = f"‖Z{t} − block{t}(Z{t - 1})‖ / ‖Z{t}‖".translate(SUBSCRIPTS)
                plot_curve(panel, curve, name, colour, label)
            plot_curve(panel, curve, "kkt", "#000000", "KKT: norm of the Lagrangian's gradient")
            plot_curve(panel, curve, "beta_1", "#999999", "penalty β")
            plot_curve(panel, curve, "h", "#000000", "‖h‖ of Eq. 6", line=":")
            if "bound" in curve.history:
                plot_curve(panel, curve, "bound", "#999999", "its bound η", line=":")
            _finish_axes(panel, self.named(curve))
        panels[0].set_ylabel("relative residuals, norms and β")
        legend_above(figure)
        caption_below(figure, caption(self, curves))
        return figure

    def rounds(self, curves: list[Curve]) -> Figure:
        """Draw the primal rounds of each iteration where their number grows, and the KKT residual of all settings."""
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        colours = colours_of([curve.record.method for curve in curves])
        for colour, line, curve in zip(colours, cycle(LINES), curves, strict=False):
            plot_curve(below, curve, "kkt", colour, self.named(curve), line=line)
            if "primal_rounds" in curve.history:
                grown = curve.by_iteration("primal_rounds")["mean"]
                above.step(grown.index, grown.to_numpy(), where="pre", color=colour, linestyle=line)
        above.set(ylabel="primal rounds")
        above.grid(alpha=0.3)
        _finish_axes(below, "")
        below.set_ylabel("KKT residual")
        below.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        below.yaxis.set_minor_formatter(NullFormatter())
        legend_above(figure)
        caption_below(figure, caption(self, curves))
        return figure

    def named(self, curve: Curve) -> str:
        """Return the title of a curve's setting, with its overrides."""
        setting = curve.record.setting
        return textwrap.fill(", ".join([self.panels.get(setting, setting), *curve.record.overrides]), 40)


def residual_names(curve: Curve) -> list[str]:
    """Return the names of the blocks' residuals, in the order of the blocks."""
    return [name for name in curve.history.columns if name.startswith("residual_")]


def _finish_axes(axes: Axes, title: str) -> None:
    axes.set(yscale="log", xlabel="iteration")
    axes.set_title(in_figure(title), fontsize=11)
    axes.grid(alpha=0.3)
    axes.label_outer()
