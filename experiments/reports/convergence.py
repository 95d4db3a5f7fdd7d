"""§3.3, Proposition 1: constraint and KKT residuals of Block-ADMM, drawn from the store."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reports.report import COLOURS, Content, Curve, caption, curves, draw_curve, in_figure, table
from experiments.store import Run

PALETTE = list(COLOURS.values())
WIDTH = 7.4  # inches, of a caption's 120 characters


def report(experiment: str, runs: list[Run]) -> Content:
    """Residuals at the end; residuals by block against iteration for each setting, and the growing primal rounds."""
    shown = curves(runs)
    drawn = [curve.after_training() for curve in shown]  # before it Z is the forward pass, with no residual
    figures = {experiment: residuals(experiment, drawn)}
    if any("primal_rounds" in curve.history for curve in drawn):
        figures[f"{experiment}_rounds"] = rounds(experiment, drawn)
    return table(shown, row), figures


def row(curve: Curve) -> dict[str, Any]:
    """Means over the seeds at the last iteration, and of the test accuracy."""
    last = curve.history[curve.history["iteration"] == curve.info["iterations"]].mean(numeric_only=True)
    ended = {name: f"{last[name]:.2e}" for name in ("kkt", *residual_names(curve))}
    given = curve.row()
    return (
        {"setting": given["setting"]} | ended | {k: given[k] for k in ("mean", "std", "seeds", "iterations", "machine")}
    )


def residual_names(curve: Curve) -> list[str]:
    """By block, as `residual_1` comes first in a history."""
    return [name for name in curve.history.columns if name.startswith("residual_")]


def residuals(experiment: str, shown: list[Curve]) -> Figure:
    """A panel for each setting: relative constraint residual of each block, KKT residual, ‖h‖ and β."""
    drawn = Figure(figsize=(max(4.6 * len(shown) + 0.6, WIDTH), 4.6), layout="constrained")
    panels = drawn.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, curve in zip(panels, shown, strict=True):
        for t, name in enumerate(residual_names(curve), start=1):
            colour = PALETTE[t % len(PALETTE)]
            draw_curve(panel, curve, name, colour, f"‖Z_{t} − block_{t}(Z_{t - 1})‖ / ‖Z_{t}‖")
        draw_curve(panel, curve, "kkt", "#000000", "KKT: norm of the Lagrangian's gradient")
        draw_curve(panel, curve, "beta_1", "#999999", "penalty β")
        draw_curve(panel, curve, "h", "#000000", "‖h‖ of Eq. 6", line=":")
        if "bound" in curve.history:
            draw_curve(panel, curve, "bound", "#999999", "its bound η", line=":")
        _finish(panel, textwrap.fill(curve.setting, 40))
    panels[0].set_ylabel("relative residuals, norms and β")
    legend = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawn.legend(legend.values(), legend.keys(), fontsize=8, loc="outside upper center", ncols=min(4, 2 * len(shown)))
    drawn.supxlabel(caption(experiment, shown), fontsize=8)
    return drawn


def rounds(experiment: str, shown: list[Curve]) -> Figure:
    """Primal rounds of each iteration where their number grows, and the KKT residual of all settings."""
    drawn = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True)
    for colour, curve in zip(PALETTE, shown, strict=False):
        draw_curve(below, curve, "kkt", colour, curve.setting)
        if "primal_rounds" in curve.history:
            grown = curve.by_iteration("primal_rounds")["mean"]
            above.step(grown.index, grown.to_numpy(), where="pre", color=colour)
    above.set(ylabel="primal rounds", title="Growing primal rounds")
    above.grid(alpha=0.3)
    _finish(below, "")
    below.set_ylabel("KKT residual")
    below.legend(fontsize=7.5)
    drawn.supxlabel(caption(experiment, shown), fontsize=8)
    return drawn


def _finish(axes: Axes, title: str) -> None:
    axes.set(yscale="log", xlabel="iteration", title=in_figure(title))
    axes.grid(alpha=0.3)
    axes.label_outer()
