"""Figures and tables, pure functions of the results store."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pandas.api.types import is_numeric_dtype
from rich.console import Console
from rich.table import Table

from experiments.store import Run, finished_runs

# Okabe & Ito's colours, told apart with any common colour blindness.
COLOURS = {
    "block_admm": "#0072B2",
    "online_block_admm": "#E69F00",
    "standard_admm": "#009E73",
    "taylor": "#D55E00",
    "dladmm": "#56B4E9",
    "bcd": "#882255",
    "gotmare": "#999933",
    "sgd": "#000000",
    "adam": "#CC79A7",
}
LINES = {"tuned": "-", "faithful": "--"}
REDUCING = ("iterations=", "seeds=", "model.")  # overrides that make less of an experiment


@cache
def paper() -> dict[str, Any]:
    """The paper's numbers, `experiments/paper.yaml`."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Curve:
    """A run as a row of a table and a curve of a figure."""

    info: dict[str, Any]
    history: pd.DataFrame
    point: str = ""  # of a grid that was run as one stack

    @property
    def method(self) -> str:
        return str(paper()["labels"].get(self.info["method"], self.info["method"]))

    @property
    def setting(self) -> str:
        """faithful, tuned, default or reduced (less than the experiment), and what is to be known of the run."""
        given = [override for override in self.info["overrides"] if not override.startswith("grid=")]
        less = any(override.startswith(REDUCING) for override in given)
        name = f"{'reduced ' if less else ''}{self.info['setting']}"
        note = [f"{name}: {self.info['note']}" if self.info["note"] else name]
        parts = [*note, *given, *([self.point] if self.point else [])]
        seeds = self.history["replica"].nunique()
        diverged = seeds - len(self._final())
        return ", ".join([*parts, f"{diverged} of {seeds} seeds diverged"] if diverged else parts)

    @property
    def reference(self) -> float | None:
        """The paper's number for this method in this experiment, percent."""
        if not self.is_of_the_paper:
            return None
        numbers = paper()["experiments"].get(self.info["experiment"], {}).get("accuracy", {})
        return numbers.get(self.info["method"])  # type: ignore[no-any-return]

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the command line has left the data, the network and the loss as the experiment has them."""
        kept = ("grid=", "iterations=", "seeds=", "evaluate_every=", "dtype=", "optimizer.")
        return all(override.startswith(kept) for override in self.info["overrides"])

    def by_iteration(self, column: str) -> pd.DataFrame:
        """Mean and sample standard deviation over the replicas, by iteration."""
        return self.history.groupby("iteration")[column].agg(["mean", "std"]).fillna(0.0)

    def _final(self) -> pd.Series[float]:
        final: pd.Series[float] = self.history.loc[
            self.history["iteration"] == self.info["iterations"], "test_accuracy"
        ]
        return final

    def row(self) -> dict[str, Any]:
        """Test accuracy of the replicas that reached the last iteration, in percent."""
        last = self._final()
        return {
            "method": self.method,
            "setting": self.setting,
            "paper": self.reference,
            "mean": round(last.mean(), 2),
            "std": round(last.std(), 2),
            "seeds": len(last),
            "iterations": self.info["iterations"],
            "machine": self.info["machine"],
        }


def curves(runs: list[Run]) -> list[Curve]:
    """The newest run of each method, setting and overrides, in the order of the paper's legend."""
    newest = {(run.info["method"], run.info["setting"], *run.info["overrides"]): run for run in runs}
    order = {method: rank for rank, method in enumerate(paper()["labels"])}
    rank = {key: (order.get(key[0], len(order)), key[0], key[1] != "tuned") for key in newest}
    ranked = [newest[key] for key in sorted(newest, key=rank.__getitem__)]
    return [curve for run in ranked for curve in _points(run)]


def _points(run: Run) -> list[Curve]:
    """One curve for a run, or one for each point of its grid."""
    info, history = run.info, run.history
    if not info["points"]:
        return [Curve(info, history)]
    point = history["replica"].map(dict(enumerate(info["points"])))
    return [Curve(info, history[point == value], value) for value in dict.fromkeys(info["points"])]


def table(shown: list[Curve]) -> pd.DataFrame:
    """Paper and measured side by side; accuracies in percent, `std` over seeds."""
    return pd.DataFrame([curve.row() for curve in shown])


def figure(experiment: str, shown: list[Curve]) -> Figure:
    """Mean test accuracy against iteration, ±1 standard deviation shaded, the paper's final numbers dotted."""
    drawn = Figure(figsize=(8.0, 5.2), layout="constrained")
    axes = drawn.add_subplot()
    references: dict[str, float] = {}
    for number, curve in enumerate(shown):
        colour = COLOURS.get(curve.info["method"], f"C{number}")
        statistics = curve.by_iteration("test_accuracy")
        row = curve.row()
        spread = f" ± {row['std']:.2f}" if row["seeds"] > 1 else ""
        label = f"{curve.method} ({curve.setting}): {row['mean']:.2f}{spread} %"
        x, mean, std = (
            statistics.index.to_numpy(),
            statistics["mean"].to_numpy(),
            statistics["std"].to_numpy(),
        )
        axes.plot(x, mean, LINES.get(curve.info["setting"], "-."), color=colour, label=label, linewidth=1.6)
        axes.fill_between(x, mean - std, np.minimum(mean + std, 100.0), color=colour, alpha=0.18, linewidth=0)
        if curve.reference is not None:
            references[curve.info["method"]] = curve.reference
    for method, value in references.items():
        colour = COLOURS.get(method, "0.5")
        axes.axhline(
            value,
            color=colour,
            linestyle=":",
            linewidth=1.0,
            label=f"paper, {paper()['labels'][method]}: {value:.2f} %",
        )
    held_out = all(curve.info["dataset"]["holdout"] for curve in shown)
    axes.set(xlabel="iteration", ylabel=f"{'held-out' if held_out else 'test'} accuracy (%)")
    _focus(axes, shown, references)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="lower right")
    drawn.supxlabel(_caption(experiment, shown), fontsize=8)
    return drawn


def _focus(axes: Any, shown: list[Curve], references: dict[str, float]) -> None:
    """Accuracies from the worst final one that learnt something, with room below for the legend, to 100 %."""
    finals = [curve.by_iteration("test_accuracy")["mean"].iloc[-1] for curve in shown] + list(references.values())
    learnt = [value for value in finals if value > 50.0] or [0.0]
    axes.set_ylim(max(0.0, 100.0 - 2.2 * (100.0 - min(learnt)) - 4.0), 100.3)
    axes.set_xlim(left=0)


def _caption(experiment: str, shown: list[Curve]) -> str:
    known = paper()["experiments"].get(experiment, {}) if all(c.is_of_the_paper for c in shown) else {}
    seeds = sorted({curve.row()["seeds"] for curve in shown})
    dotted = "; dotted: the paper's final accuracy" if known.get("accuracy") else ""
    source = f"Reproduction of {known['source']}: " if known.get("source") else ""
    text = (
        f"{source}{known.get('caption', experiment)}. Mean over {' or '.join(map(str, seeds))} seeds, "
        f"shaded ±1 standard deviation{dotted}. {', '.join(sorted({c.info['machine'] for c in shown}))}."
    )
    return textwrap.fill(text, 120)


def report(experiment: str, runs: list[Run], figures: Path, tables: Path) -> pd.DataFrame:
    """Write `<figures>/<experiment>.png` and `.pdf` and `<tables>/<experiment>.csv`; returns the table."""
    shown = curves(runs)
    result = table(shown)
    figures.mkdir(parents=True, exist_ok=True)
    tables.mkdir(parents=True, exist_ok=True)
    result.to_csv(tables / f"{experiment}.csv", index=False)
    drawn = figure(experiment, shown)
    drawn.savefig(figures / f"{experiment}.png", dpi=150)
    drawn.savefig(figures / f"{experiment}.pdf", metadata={"CreationDate": None})  # the same bytes each time
    return result


def cells(result: pd.DataFrame) -> list[list[str]]:
    """A table's values as text, row by row: two decimals, a dash for what is missing."""

    def text(value: object) -> str:
        return "–" if pd.isna(value) else f"{value:.2f}" if isinstance(value, float) else str(value)  # type: ignore[call-overload]

    return [[text(value) for value in row] for row in result.itertuples(index=False)]


def show(result: pd.DataFrame, title: str) -> None:
    """Print a table to the terminal."""
    printed = Table(title=title)
    for column in result.columns:
        printed.add_column(column, justify="right" if is_numeric_dtype(result[column]) else "left", overflow="fold")
    for row in cells(result):
        printed.add_row(*row)
    Console(width=None if Console().is_terminal else 140).print(printed)


class Report(Callback):
    """At the end of a launch: the experiment's figure and table.

    They show the results store, in `<results>/figures` and `<results>/tables`; but where a run of the launch has
    values of its own from the command line, the launch's runs alone, in the launch's folder.
    """

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.run.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.sweep.dir))

    def _report(self, config: DictConfig, launch: Path) -> None:
        runs = [Run(Path(note.read_text())) for note in sorted(launch.rglob("run.txt"))]
        if not runs:
            return
        experiment = runs[0].info["experiment"]
        figures = tables = launch
        if not any(run.info["overrides"] for run in runs):
            root = Path(config.results)
            runs, figures, tables = finished_runs(root, experiment), root / "figures", root / "tables"
        result = report(experiment, runs, figures, tables)
        show(result, f"{experiment}: test accuracy in percent")
        Console().print(f"figure: {figures / experiment}.png, table: {tables / experiment}.csv", soft_wrap=True)
