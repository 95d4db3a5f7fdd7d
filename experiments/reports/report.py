"""Figures and tables, pure functions of the results store."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from omegaconf import DictConfig
from pandas.api.types import is_numeric_dtype
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from admm.files import whole
from experiments.launching.failures import failures_end_the_program
from experiments.overrides import keeps_the_paper_s_experiment, reduces
from experiments.store import Run, failed_writes_in_words, finished_runs, launched_runs

log = logging.getLogger(__name__)
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
Content = tuple[pd.DataFrame, dict[str, Figure]]  # a table, its index the names of its rows' runs; figures by name


@cache
def paper() -> dict[str, Any]:
    """The paper's numbers, `experiments/paper.yaml`."""
    return yaml.safe_load((Path(__file__).parents[1] / "paper.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Curve:
    """A run, or several that differ in their seeds alone, as a row of a table and a curve of a figure."""

    runs: tuple[str, ...]  # their names in the store, the newest first
    info: dict[str, Any]
    history: pd.DataFrame

    @property
    def run(self) -> str:
        """The newest, which the row leads to."""
        return self.runs[0]

    @property
    def method(self) -> str:
        return str(paper()["labels"].get(self.info["method"], self.info["method"]))

    @property
    def setting(self) -> str:
        """The setting's name, whether it is reduced (less than the paper's), and what is to be known of the run."""
        given = self.info["overrides"]
        experiment = paper()["experiments"].get(self.info["experiment"], {})
        less = any(map(reduces, given)) or experiment.get("reduced", False)
        name = f"{'reduced ' if less else ''}{self.info['setting']}"
        note = [f"{name}: {self.info['note']}" if self.info["note"] else name]
        parts = [*note, *given]
        seeds = self.history["replica"].nunique()
        of_seeds = self.info.get("of_seeds", 0)
        parts += [f"{seeds} of {of_seeds} seeds"] if seeds < of_seeds else []
        diverged = seeds - len(self._final())
        return ", ".join([*parts, f"{diverged} of {seeds} seeds diverged"] if diverged else parts)

    @property
    def legend(self) -> str:
        row = self.row()
        known = {"paper": self.reference, "its authors": self.authors}
        others = ", ".join(f"{who} {value}" for who, value in known.items() if value is not None)
        others = f" ({others})" if others else ""
        spread = f" ± {row['std']:.2f}" if row["seeds"] > 1 else ""
        remark = self.setting.removeprefix(self.info["setting"]).lstrip(":, ")
        return textwrap.fill(
            f"{self.method}{f', {remark}' if remark else ''}: {row['mean']:.2f}{spread} %{others}", 100
        )

    @property
    def reference(self) -> float | None:
        """The paper's number for this method in this experiment, percent; None in a setting that it does not have."""
        beyond = self.info["setting"] in self._known("beyond")
        return None if beyond else self._known("accuracy").get(self.info["method"])

    @property
    def authors(self) -> str | None:
        """What a rival's own authors publish for this experiment, percent."""
        return self._known("authors").get(self.info["method"])  # type: ignore[no-any-return]

    def _known(self, key: str) -> Any:
        """What `paper.yaml` has on this experiment under `key`; {} if nothing, or if the run is not of it."""
        known = paper()["experiments"].get(self.info["experiment"], {}) if self.is_of_the_paper else {}
        return known.get(key, {})

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the command line has left the data, the network and the loss as the experiment has them."""
        return all(map(keeps_the_paper_s_experiment, self.info["overrides"]))

    def by_iteration(self, column: str) -> pd.DataFrame:
        """Mean and sample standard deviation over the replicas, by iteration."""
        return self.history.groupby("iteration")[column].agg(["mean", "std"]).fillna({"std": 0.0})

    def after_training(self) -> Curve:
        """Without the evaluation before the first iteration."""
        return replace(self, history=self.history[self.history["iteration"] > 0])

    def _final(self) -> pd.Series[float]:
        final: pd.Series[float] = self.history.loc[
            self.history["iteration"] == self.info["iterations"], "test_accuracy"
        ]
        return final

    @property
    def seeds_disagree(self) -> bool:
        """Whether some seeds learn and others do not, so that their mean and deviation describe none."""
        return bool(self._final().std() > 10.0)

    def row(self) -> dict[str, Any]:
        """Test accuracy of the replicas that reached the last iteration, in percent."""
        last = self._final()
        return {
            "method": self.method,
            "setting": self.setting,
            "paper": self.reference,
            **({"authors": self.authors} if self.authors else {}),
            "mean": round(last.mean(), 2),
            "std": round(last.std(), 2),
            "seeds": len(last),
            "iterations": self.info["iterations"],
            "machine": self.info["machine"],
        }


def curves(runs: list[Run]) -> list[Curve]:
    """The newest run of each method, setting and overrides, with those that join it, in the order of the paper's legend
    and of the panels. runs: from the oldest to the newest."""
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.info["method"], run.info["setting"], *run.info["overrides"]), []).append(run)
    methods = list(paper()["labels"])

    def rank(curve: Curve) -> tuple[Any, ...]:
        settings = _settings(curve.info["experiment"])
        return place(curve.info["method"], methods), place(curve.info["setting"], settings), curve.info["overrides"]

    return sorted(map(_joined, rows.values()), key=rank)


def _joined(runs: list[Run]) -> Curve:
    """The last of these runs, with the seeds of those before it that differ from it in their seeds alone."""
    *former, newest = runs
    curve = Curve((newest.name,), newest.info, newest.history)
    for run in reversed(former):
        history, known = run.history, curve.history
        more = history[~history["seed"].isin(known["seed"])] if "seed" in history else history[:0]
        if len(more) and run.row == newest.row:
            more = more.assign(replica=more["replica"] + known["replica"].max() + 1)
            machines = dict.fromkeys((curve.info["machine"], run.info["machine"]))
            info = curve.info | {"machine": ", ".join(machines)}
            curve = Curve((*curve.runs, run.name), info, pd.concat([known, more]))
    return curve


def panels(experiment: str) -> dict[str, str]:
    """Titles of the settings that `paper.yaml` orders."""
    return paper()["experiments"].get(experiment, {}).get("panels", {})  # type: ignore[no-any-return]


def _settings(experiment: str) -> list[str]:
    """In their order, those of its settings that have one."""
    return list(panels(experiment)) or ["tuned"]


def place(name: str, order: list[str]) -> tuple[int, str]:
    """To sort names by an order, those that it does not have last and by themselves."""
    return (order.index(name), "") if name in order else (len(order), name)


def table(shown: list[Curve], row: Callable[[Curve], dict[str, Any]] = Curve.row) -> pd.DataFrame:
    """A row for each curve: paper and measured side by side, accuracies in percent, `std` over seeds; or what `row`
    makes of it."""
    return pd.DataFrame([row(curve) for curve in shown], index=[curve.run for curve in shown])


def accuracy(experiment: str, runs: list[Run]) -> Content:
    """The table and the figure of test accuracy against iteration."""
    shown = curves(runs)
    return table(shown), {experiment: figure(experiment, shown)}


def figure(experiment: str, shown: list[Curve]) -> Figure:
    """Mean test accuracy against iteration, ±1 standard deviation shaded, the paper's final numbers dotted.

    One panel for each setting, with the legend below it.
    """
    titles, names = panels(experiment), {curve.info["setting"] for curve in shown}
    settings = sorted(names, key=lambda name: place(name, _settings(experiment)))
    groups = [[curve for curve in shown if curve.info["setting"] == setting] for setting in settings]
    size = 6.0 * len(settings) + 1.5, 4.6 + 0.2 * max(map(legend_lines, groups))
    drawn = Figure(figsize=size, layout="constrained")
    for axes, setting, group in zip(drawn.subplots(1, len(groups), squeeze=False)[0], settings, groups, strict=True):
        _draw(axes, group)
        axes.set(title=in_figure(titles.get(setting, setting)), xlabel="iteration", ylabel=measure(shown))
        axes.set_ylim(accuracy_range(group))
    remark = "; dotted: the paper's final accuracy" if any(c.reference is not None for c in shown) else ""
    remark += "; thin: the seeds of a method in which they disagree" if any(c.seeds_disagree for c in shown) else ""
    drawn.supxlabel(caption(experiment, shown, remark), fontsize=8)
    return drawn


def measure(shown: list[Curve]) -> str:
    """What the column `test_accuracy` holds, in words."""
    held_out = all(curve.info["dataset"]["holdout"] for curve in shown)
    return f"{'held-out' if held_out else 'test'} accuracy (%)"


def colours(shown: list[Curve]) -> list[str]:
    """The methods' own; in turn where a method has several curves."""
    one_each = len({curve.info["method"] for curve in shown}) == len(shown)
    return [COLOURS.get(c.info["method"], f"C{n}") if one_each else f"C{n}" for n, c in enumerate(shown)]


def lengths_differ(shown: list[Curve]) -> bool:
    """Whether the numbers of iterations are so different that their axis should be logarithmic."""
    iterations = [curve.info["iterations"] for curve in shown]
    return bool(max(iterations) > 4 * min(iterations))


def draw_curve(
    axes: Axes,
    curve: Curve,
    column: str,
    colour: str,
    label: str,
    x: str = "iteration",
    highest: float = np.inf,
    line: str = "-",
) -> None:
    """Mean of a column of the history over the seeds, by iteration, with ±1 standard deviation shaded.

    x: the column, or `iteration`, whose mean is the abscissa. highest: what the shading does not exceed.
    """
    statistics = curve.by_iteration(column)
    mean, std = (statistics[name].to_numpy() for name in ("mean", "std"))
    at = statistics.index.to_numpy() if x == "iteration" else curve.by_iteration(x)["mean"].to_numpy()
    axes.plot(at, mean, color=colour, label=in_figure(label), linewidth=1.6, linestyle=line)
    axes.fill_between(at, mean - std, np.minimum(mean + std, highest), color=colour, alpha=0.18, linewidth=0)


def legend_lines(shown: list[Curve]) -> int:
    return sum(1 + curve.legend.count("\n") for curve in shown)


def _draw(axes: Axes, shown: list[Curve]) -> None:
    for curve, colour in zip(shown, colours(shown), strict=True):
        draw_curve(axes, curve, "test_accuracy", colour, curve.legend, highest=100.0)
        if curve.seeds_disagree:
            for _, seed in curve.history.groupby("replica"):
                axes.plot(seed["iteration"], seed["test_accuracy"], color=colour, linewidth=0.5)
        if curve.reference is not None:
            axes.axhline(curve.reference, color=colour, linestyle=":", linewidth=1.0)
    if lengths_differ(shown):
        axes.set(xscale="log", xlim=(1, max(curve.info["iterations"] for curve in shown)))
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def accuracy_range(shown: list[Curve]) -> tuple[float, float]:
    """The accuracies to show: from below the worst final one, or 0 if one has not learnt, to above the best."""
    finals = [float(curve.by_iteration("test_accuracy")["mean"].iloc[-1]) for curve in shown]
    finals += [curve.reference for curve in shown if curve.reference is not None]
    missing = 100.0 - min(finals)
    return 99.0 - 1.4 * missing if missing < 50.0 else 0.0, min(100.3, max(finals) + 0.25 * missing)


def caption(experiment: str, shown: list[Curve], remark: str = "") -> str:
    """What a figure shows, of how many seeds, on which machine."""
    known = paper()["experiments"].get(experiment, {}) if all(c.is_of_the_paper for c in shown) else {}
    seeds = sorted({curve.row()["seeds"] for curve in shown})
    source = f"Reproduction of {known['source']}: " if known.get("source") else ""
    mean = (
        f"Mean over {' or '.join(map(str, seeds))} seeds, shaded ±1 standard deviation" if seeds != [1] else "One seed"
    )
    text = (
        f"{source}{known.get('caption', experiment)}. {mean}{remark}. "
        f"{', '.join(sorted({c.info['machine'] for c in shown}))}."
    )
    return textwrap.fill(text, 120)


def content(experiment: str, runs: list[Run]) -> Content:
    """What is made of an experiment's runs, by the function that `paper.yaml` has as its `report`."""
    make = get_method(paper()["experiments"].get(experiment, {}).get("report", "experiments.reports.report.accuracy"))
    return make(experiment, runs)  # type: ignore[no-any-return]


def further_tables(experiment: str, runs: list[Run]) -> dict[str, pd.DataFrame]:
    """By name, what the functions make of the runs that `paper.yaml` has as the experiment's `tables`."""
    known = paper()["experiments"].get(experiment, {}).get("tables", {})
    return {f"{experiment}_{name}": get_method(make)(experiment, runs) for name, make in known.items()}


def report(experiment: str, runs: list[Run], figures: Path, tables: Path) -> pd.DataFrame:
    """Write the experiment's `<tables>/<experiment>.csv`, its further tables, and its figures, `<figures>/<name>.png`
    and `.pdf`, all of them or none.

    Returns the table. Raises WriteError.
    """
    result, drawn = content(experiment, runs)
    with ExitStack() as files:

        def new(path: Path) -> Path:
            return files.enter_context(whole(path, "the report"))

        for name, table in ({experiment: result} | further_tables(experiment, runs)).items():
            table.to_csv(new(tables / f"{name}.csv"), index=False)
        for name, picture in drawn.items():
            picture.savefig(new(figures / f"{name}.png"), dpi=150)
            # without its date, the same bytes each time
            picture.savefig(new(figures / f"{name}.pdf"), metadata={"CreationDate": None})
    return result


def cells(result: pd.DataFrame) -> list[list[str]]:
    """A table's values as text, row by row: two decimals, a dash for what is missing."""

    def text(value: object) -> str:
        return "–" if pd.isna(value) else f"{value:.2f}" if isinstance(value, float) else str(value)  # type: ignore[call-overload]

    return [[text(value) for value in row] for row in result.itertuples(index=False)]


def markdown(result: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(map(in_markdown, result.columns)), ["---"] * len(result.columns)]
    lines += [list(map(in_markdown, row)) for row in cells(result)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_markdown(text: str) -> str:
    """A text as a cell of a table, on one line and without a bar that would end it."""
    return " ".join(text.split()).replace("|", r"\|")


def in_figure(text: str) -> str:
    """A text of Matplotlib's, whose dollars are not formulas."""
    return text.replace("$", r"\$")


def title(experiment: str, runs: list[Run]) -> str:
    """Of the table of an experiment's runs."""
    quantity = paper()["experiments"].get(experiment, {}).get("quantity", "test accuracy in percent")
    held_out = all(run.info["dataset"]["holdout"] for run in runs)
    return f"{experiment}: {quantity.replace('test accuracy', 'held-out accuracy') if held_out else quantity}"


def show(result: pd.DataFrame, title: str) -> None:
    """Print a table to the terminal."""
    printed = Table(title=escape(title))
    for column in result.columns:
        printed.add_column(
            escape(column), justify="right" if is_numeric_dtype(result[column]) else "left", overflow="fold"
        )
    for row in cells(result):
        printed.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 140).print(printed)


class Report(Callback):
    """At the end of a launch: the experiment's figure and table.

    They show the results store, in `<results>/figures` and `<results>/tables`; but where a run of the launch has
    values of its own from the command line, the launch's runs alone, in the launch's folder.
    """

    @failures_end_the_program()
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.run.dir))

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.sweep.dir))

    def _report(self, config: DictConfig, launch: Path) -> None:
        by_experiment: dict[str, list[Run]] = {}
        for run in launched_runs(launch):
            by_experiment.setdefault(run.info["experiment"], []).append(run)
        for experiment, runs in by_experiment.items():
            self._report_of(config, launch, experiment, runs)

    def _report_of(self, config: DictConfig, launch: Path, experiment: str, runs: list[Run]) -> None:
        figures = tables = launch
        if not any(run.info["overrides"] for run in runs):
            root = Path(config.results)
            runs, figures, tables = finished_runs(root, experiment), root / "figures", root / "tables"
        with failed_writes_in_words("The runs are in the store; the same command draws them."):
            show(report(experiment, runs, figures, tables), title(experiment, runs))
        Console().print(f"figures: {figures}, table: {tables / experiment}.csv", soft_wrap=True, markup=False)
