"""The angle between each method's updates and back-propagation's gradient (`admm.angles`), drawn from the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reports.accuracy import Accuracy, caption, plot_curve, shared_remarks
from experiments.reports.curves import Curve, curves, ordered_settings
from experiments.reports.drawing import caption_below, colours_of, legend_above
from experiments.reports.text import in_figure
from experiments.store import Run

ACROSS = 5  # panels beside one another, at most


@dataclass(frozen=True)
class Angle(Accuracy):
    """The table has mean cosines; a figure for each setting shows them against iteration, in a panel for each block."""

    def row(self, curve: Curve) -> dict[str, Any]:
        """Return a curve's row of the table: mean cosines over seeds and rows after the first, and accuracy."""
        names, of_accuracy = cosine_names(curve), super().row(curve)
        means = curve.after_training().history[names].mean()
        cosines = {"block 1": means.iloc[0], "all blocks": means.mean(), "last block": means.iloc[-1]}
        ends = ("mean", "std", "seeds", "iterations", "machine")
        return (
            {name: of_accuracy[name] for name in ("method", "setting")}
            | {f"cosine, {where}": round(mean, 3) for where, mean in cosines.items()}
            | {name: of_accuracy[name] for name in ends}
        )

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        groups = dict[str, list[Curve]]()
        for curve in curves(runs):
            groups.setdefault(curve.record.setting, []).append(curve.after_training())  # no update before
        settings = [*ordered_settings(self), *groups]
        return {
            f"{self.experiment}_{setting}": self.cosines(setting, groups[setting])
            for setting in dict.fromkeys(settings)
            if setting in groups
        }

    def cosines(self, setting: str, curves: list[Curve]) -> Figure:
        """Draw, in a panel for each block, the cosine of each method's update."""
        names = max(map(cosine_names, curves), key=len)
        across = min(len(names), ACROSS)
        down = -(-len(names) // across)
        figure = Figure(figsize=(max(2.1 * across, 9.0), 2.0 * down + 0.4), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
        colours = colours_of([curve.record.method for curve in curves])
        for t, (axes, name) in enumerate(zip(panels, names, strict=False), start=1):
            axes.axhline(0.0, color="#000000", linewidth=0.6)
            for curve, colour in zip(curves, colours, strict=True):
                if name in curve.history:
                    plot_curve(axes, curve, name, colour, curve.legend_beside(shared_remarks(curves)), highest=1.0)
            axes.set(xlabel="iteration", ylabel="cosine")
            axes.set_title(f"block {t}", fontsize=11)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.grid(alpha=0.3)
            axes.label_outer()
        for axes in list(panels)[len(names) :]:
            axes.set_visible(False)
        legend_above(figure, in_figure(self.panels.get(setting, setting)))
        caption_below(figure, caption(self, curves))
        return figure


def cosine_names(curve: Curve) -> list[str]:
    """Return the names of the blocks' cosines, in the order of the blocks."""
    return [name for name in curve.history.columns if name.startswith("cosine_")]
