"""§3.3, Proposition 1: constraint and KKT residuals of Block-ADMM, drawn from the store."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reports.accuracy import Accuracy, caption, plot_curve
from experiments.reports.curves import Curve, curves
from experiments.reports.methods import PALETTE
from experiments.reports.text import in_figure
from experiments.store import Run

WIDTH = 7.4  # inches, of a caption's 120 characters


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
        figure = Figure(figsize=(max(4.6 * len(curves) + 0.6, WIDTH), 4.6), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for panel, curve in zip(panels, curves, strict=True):
            for t, name in enumerate(residual_names(curve), start=1):
                colour = PALETTE[t % len(PALETTE)]
                plot_curve(panel, curve, name, colour, f"‖Z_{t} − block_{t}(Z_{t - 1})‖ / ‖Z_{t}‖")
            plot_curve(panel, curve, "kkt", "#000000", "KKT: norm of the Lagrangian's gradient")
            plot_curve(panel, curve, "beta_1", "#999999", "penalty β")
            plot_curve(panel, curve, "h", "#000000", "‖h‖ of Eq. 6", line=":")
            if "bound" in curve.history:
                plot_curve(panel, curve, "bound", "#999999", "its bound η", line=":")
            _finish_axes(panel, textwrap.fill(curve.setting, 40))
        panels[0].set_ylabel("relative residuals, norms and β")
        legend = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(
            legend.values(), legend.keys(), fontsize=8, loc="outside upper center", ncols=min(4, 2 * len(curves))
        )
        figure.supxlabel(caption(self, curves), fontsize=8)
        return figure

    def rounds(self, curves: list[Curve]) -> Figure:
        """Draw the primal rounds of each iteration where their number grows, and the KKT residual of all settings."""
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for colour, curve in zip(PALETTE, curves, strict=False):
            plot_curve(below, curve, "kkt", colour, curve.setting)
            if "primal_rounds" in curve.history:
                grown = curve.by_iteration("primal_rounds")["mean"]
                above.step(grown.index, grown.to_numpy(), where="pre", color=colour)
        above.set(ylabel="primal rounds", title="Growing primal rounds")
        above.grid(alpha=0.3)
        _finish_axes(below, "")
        below.set_ylabel("KKT residual")
        below.legend(fontsize=7.5)
        figure.supxlabel(caption(self, curves), fontsize=8)
        return figure


def residual_names(curve: Curve) -> list[str]:
    """Return the names of the blocks' residuals, in the order of the blocks."""
    return [name for name in curve.history.columns if name.startswith("residual_")]


def _finish_axes(axes: Axes, title: str) -> None:
    axes.set(yscale="log", xlabel="iteration", title=in_figure(title))
    axes.grid(alpha=0.3)
    axes.label_outer()
