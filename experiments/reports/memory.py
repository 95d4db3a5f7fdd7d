"""The paper's memory claim (§4.1), drawn from the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from admm.files import MIB
from experiments.reports.base import Comparison, ExperimentReport
from experiments.reports.drawing import caption_below, legend_above, sequence
from experiments.reports.methods import method_of
from experiments.reports.text import in_figure
from experiments.store import Run

VARIABLES = {"theta": "Θ", "moments": "moments of Θ", "z": "Z", "u": "U", "z_moments": "moments of Z"}
BATCH = "block_admm"  # the form that the others are compared with


@dataclass(frozen=True)
class Memory(ExperimentReport):
    """The table has MiB by variable, and how many times less than the batch form each takes; the figure has bars. There
    is no score."""

    unit: ClassVar[str] = "times less"
    measure: ClassVar[str] = "times less than batch"
    has_curves: ClassVar[bool] = False

    def score(self, run: Run) -> dict[int, float]:
        return {}

    def headline(self, run: Run) -> tuple[float, str]:
        return total(run), "MiB"

    def numbers(self, run: Run) -> dict[str, float]:
        return {f"{name} (MiB)": size for name, size in sizes(run).items()}

    def compare(self, runs: list[Run]) -> list[Comparison]:
        batch = {run.record.setting: total(run) for run in runs if run.record.method == BATCH}
        return [
            Comparison(
                run.name,
                run.record.method,
                ", ".join([run.record.setting, *run.record.overrides]),
                ours=batch.get(run.record.setting, nan) / total(run),
                paper=self.stated.get(run.record.method, 1.0),
                seeds=1,
            )
            for run in sorted(runs, key=lambda run: (run.record.setting, run.record.method))
        ]

    @property
    def stated(self) -> Mapping[str, float]:
        return self.paper.ratio

    def table(self, runs: list[Run]) -> pd.DataFrame:
        by_name, comparisons = {run.name: run for run in runs}, self.compare(runs)
        rows = [_row(by_name[comparison.run], comparison) for comparison in comparisons]
        return pd.DataFrame(rows, index=[comparison.run for comparison in comparisons])

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        """Draw a stacked bar for each run, with its total and the process's peak in numbers."""
        table = self.table(runs)
        figure = Figure(figsize=(8.0, 0.8 + 0.55 * len(table)), layout="constrained")
        axes = figure.subplots()
        names = zip(table["method"], table["setting"], strict=True)
        labels = [in_figure(f"{method}\n{setting}") for method, setting in names]
        left = 0.0 * table["total"]
        for colour, name in zip(sequence(len(VARIABLES)), VARIABLES.values(), strict=True):
            axes.barh(labels, table[name], left=left, color=colour, label=name)
            left = left + table[name]
        for height, row in enumerate(table.to_dict("records")):
            less = f", {row['batch/this']:.0f} times less" if row["batch/this"] > 1 else ""
            text = f" {row['total']:.1f} MiB{less}; process {row['peak of the process']:.1f} MiB"
            axes.text(row["total"], height, text, va="center", fontsize=8)
        axes.set(xlabel="training variables of one seed (MiB)", xlim=(0, 1.6 * table["total"].max()))
        axes.invert_yaxis()
        legend_above(figure)
        remark = "process: the most that an iteration takes beyond the data"
        if online := self.stated.get("online_block_admm"):
            remark += f"; the paper: {online:g} times less online"
        caption_below(figure, f"{self.caption}; {remark}.")
        return {self.experiment: figure}


def sizes(run: Run) -> dict[str, float]:
    """Return the MiB per seed by variable, and the peak of the process."""
    measured = run.history.set_index("quantity")["bytes"] / MIB
    return {name: float(measured.get(name, 0.0)) for name in (*VARIABLES, "peak")}


def total(run: Run) -> float:
    """Return the MiB per seed of all training variables."""
    measured = sizes(run)
    return sum(measured[name] for name in VARIABLES)


def _row(run: Run, comparison: Comparison) -> dict[str, Any]:
    """The row of a run, MiB per seed."""
    measured = sizes(run)
    return {
        "method": method_of(run.record.method).label,
        "setting": comparison.setting,
        **{label: measured[name] for name, label in VARIABLES.items()},
        "total": total(run),
        "peak of the process": measured["peak"],
        "batch/this": comparison.ours,
        "paper": comparison.paper,
        "machine": run.record.machine,
    }
