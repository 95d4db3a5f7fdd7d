"""Speed and memory against the number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from admm.files import MIB
from experiments.reports.base import Comparison, ExperimentReport
from experiments.reports.drawing import caption_below, legend_above
from experiments.reports.methods import method_of
from experiments.reports.text import in_figure
from experiments.store import Run


@dataclass(frozen=True)
class Scaling(ExperimentReport):
    """The table has a row per run and number of processes: seconds of an iteration, how many times faster than one
    process, MiB of variables and the peak per process, MiB that all processes exchange. There is no score, and
    the paper has no numbers."""

    unit: ClassVar[str] = "×"
    measure: ClassVar[str] = "speed with the most processes over one process"
    has_curves: ClassVar[bool] = False

    def score(self, run: Run) -> dict[int, float]:
        return {}

    def headline(self, run: Run) -> tuple[float, str]:
        return float(speed(run).iloc[-1]), self.unit

    def numbers(self, run: Run) -> dict[str, float]:
        return {f"speed on {n} processes": value for n, value in speed(run).items()}

    def compare(self, runs: list[Run]) -> list[Comparison]:
        return [
            Comparison(run.name, run.record.method, run.record.setting, self.headline(run)[0], None) for run in runs
        ]

    def table(self, runs: list[Run]) -> pd.DataFrame:
        rows = [(run.name, row) for run in sorted(runs, key=_order) for row in _rows(run)]
        return pd.DataFrame([row for _, row in rows], index=[name for name, _ in rows])

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        """Draw the speed and the memory of a process against the number of processes, relative to one process."""
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for run in sorted(runs, key=_order):
            method, memory = method_of(run.record.method), measured(run)["variables"]
            label, style = f"{method.label}, {setting_of(run)}", "-" if "samples" in run.record.setting else "--"
            marker = "s" if "wide" in run.record.setting else "o"
            for axes, values in zip(panels, (speed(run), memory / memory.iloc[0]), strict=True):
                axes.plot(values.index, values, style, marker=marker, color=method.colour, label=label)
        counts = sorted({int(n) for run in runs for n in speed(run).index})
        panels[0].plot(counts, counts, ":", color="grey", label="ideal")
        panels[1].plot(counts, [1 / n for n in counts], ":", color="grey")
        panels[0].set(title="speed", ylabel="times faster than one process", ylim=0)
        panels[1].set(title="variables of a process", ylabel="relative to one process", ylim=0)
        for axes in panels:
            axes.set(xlabel="processes, one thread each", xticks=counts)
            axes.grid(alpha=0.3)
        legend_above(figure)
        machines = ", ".join(sorted({run.record.machine for run in runs}))
        caption_below(figure, in_figure(f"{self.caption}. {machines}."))
        return {self.experiment: figure}


def measured(run: Run) -> pd.DataFrame:
    """Return what was measured, by number of processes."""
    return run.history.set_index("processes")


def speed(run: Run) -> pd.Series[float]:
    """Return how many times faster than on one process an iteration is, by number of processes."""
    seconds = measured(run)["seconds"]
    times: pd.Series[float] = seconds.iloc[0] / seconds
    return times


def setting_of(run: Run) -> str:
    """Return a row's setting in words."""
    kind, _, network = run.record.setting.partition("_")
    return f"by {kind}{', ' + network if network else ''}"


def _order(run: Run) -> tuple[str, str]:
    return run.record.method, run.record.setting


def _rows(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "method": method_of(run.record.method).label,
            "setting": ", ".join([setting_of(run), *run.record.overrides]),
            "processes": int(row["processes"]),
            "s per iteration": row["seconds"],
            "times faster": times,
            "variables (MiB)": row["variables"] / MIB,
            "peak of a process (MiB)": row["peak"] / MIB,
            "exchanged (MiB)": (row["added"] + row["sent"]) / MIB,
            "machine": run.record.machine,
        }
        for row, times in zip(run.history.to_dict("records"), speed(run), strict=True)
    ]
