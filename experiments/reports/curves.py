"""Runs as the rows of a table and the curves of a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from experiments.overrides import is_comparable_with_paper, reduces
from experiments.records import RunRecord
from experiments.reports.base import ExperimentReport, report_on
from experiments.reports.methods import method_of, methods
from experiments.reports.metrics import ACCURACY, Metric, in_percent, metric_of
from experiments.reports.paper import PaperEntry
from experiments.store import Run


@dataclass(frozen=True)
class Curve:
    """One run, or several runs that differ in their seeds alone. runs: their names in the store, the newest first.
    report: of their experiment."""

    runs: tuple[str, ...]
    record: RunRecord
    history: pd.DataFrame
    report: ExperimentReport

    @property
    def run(self) -> str:
        """The name of the newest run."""
        return self.runs[0]

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return method_of(self.record.method).label

    @property
    def metric(self) -> Metric:
        """What the run is judged by."""
        return metric_of(self.history.columns)

    @property
    def setting(self) -> str:
        """The setting's name, whether it is reduced (less than the paper's), note, overrides, and missing seeds."""
        record = self.record
        is_reduced = self.report.reduced or (self.report.paper.source and any(map(reduces, record.overrides)))
        name = f"{'reduced ' if is_reduced else ''}{record.setting}"
        return ", ".join([f"{name}: {record.note}" if record.note else name, *self.remarks])

    def legend_beside(self, said: Collection[str], several: bool = False) -> str:
        """Return the method's name. The setting follows if there are several, or if the curve has remarks that are not
        said elsewhere."""
        remarks = ", ".join(remark for remark in self.remarks if remark not in said)
        named = f"{self.label}, {self.record.setting}"
        return textwrap.fill(f"{named}: {remarks}" if remarks else named if several else self.label, 60)

    @property
    def remarks(self) -> list[str]:
        """The overrides, and in words the seeds that are missing or have diverged."""
        seeds = self.history["replica"].nunique()
        missing = [f"{seeds} of {self.record.of_seeds} seeds"] if seeds < self.record.of_seeds else []
        remarks = [*self.record.overrides, *missing]
        diverged = seeds - len(self._final())
        return [*remarks, f"{diverged} of {seeds} seeds diverged"] if diverged else remarks

    @property
    def reference(self) -> float | None:
        """The paper's number for this method in this experiment, percent; None in a setting that it does not have."""
        is_beyond = self.record.setting in self._paper.beyond
        return None if is_beyond else self._paper.accuracy.get(self.record.method)

    @property
    def authors(self) -> str | None:
        """What a baseline's own authors publish for this experiment, percent."""
        return self._paper.authors.get(self.record.method)

    @property
    def _paper(self) -> PaperEntry:
        """The paper's numbers for the experiment; an empty entry if the command line has changed the experiment."""
        return self.report.paper if self.is_of_the_paper else PaperEntry()

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the command line has left the data, the network and the loss as the experiment has them."""
        return all(map(is_comparable_with_paper, self.record.overrides))

    def by_iteration(self, column: str) -> pd.DataFrame:
        """Return mean and sample standard deviation of a column over the replicas, by iteration."""
        return self.history.groupby("iteration")[column].agg(["mean", "std"]).fillna({"std": 0.0})

    def after_training(self) -> Curve:
        """Return the curve without the evaluation before the first iteration."""
        return replace(self, history=self.history[self.history["iteration"] > 0])

    @property
    def scores(self) -> dict[int, float]:
        """The last scores by seed, percent; a diverged seed has none."""
        ended = self.history[self.history["iteration"] == self.record.iterations].set_index("seed")
        return ended[self.metric.column].dropna().to_dict()  # type: ignore[return-value]

    def _final(self) -> pd.Series[float]:
        return self._last(self.metric.column)

    def _last(self, column: str) -> pd.Series[float]:
        is_last = self.history["iteration"] == self.record.iterations
        last: pd.Series[float] = self.history.loc[is_last, column]
        return last

    @property
    def score_label(self) -> str:
        """What the run is judged by, of which data, in words."""
        return self.metric.label("held-out" if self.record.dataset.holdout else "test")

    @property
    def seeds_disagree(self) -> bool:
        """Whether some seeds learn and others do not, so that their mean and deviation describe none."""
        return bool(self._final().std() > 10.0)

    def row(self) -> dict[str, Any]:
        """Return the row of a table: the scores of the replicas that reached the last iteration, in percent. They are
        test accuracies unless the row has a column `score`, which says what they are."""
        final, metric = self._final(), self.metric
        return {
            "method": self.label,
            "setting": self.setting,
            "paper": self.reference,
            **({"authors": self.authors} if self.authors else {}),
            "mean": round(final.mean(), 2),
            "std": round(final.std(), 2),
            **({"score": self.score_label} if metric != ACCURACY else {}),
            **{name: round(self._last(column).mean(), 4) for name, column in metric.beside if column in self.history},
            "seeds": len(final),
            "iterations": self.record.iterations,
            "machine": self.record.machine,
        }


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Return a curve for each method, setting and overrides, in the order of the methods and of the panels.

    It is of the newest run, with older runs that differ from it in their seeds alone. runs: of one experiment, from the
    oldest to the newest."""
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        record = run.record
        rows.setdefault((record.method, record.setting, *record.overrides), []).append(run)

    def rank(curve: Curve) -> tuple[Any, ...]:
        record = curve.record
        of_method = place(record.method, list(methods()))
        return of_method, place(record.setting, ordered_settings(curve.report)), record.overrides

    return sorted(map(_joined, rows.values()), key=rank)


def _joined(runs: list[Run]) -> Curve:
    """The curve of the last of these runs, with the seeds of earlier runs that differ from it in their seeds alone."""
    *former, newest = runs
    curve = Curve((newest.name,), newest.record, in_percent(newest.history), report_on(newest))
    for run in reversed(former):
        history, present = in_percent(run.history), curve.history
        more = history[~history["seed"].isin(present["seed"])] if "seed" in history else history[:0]
        if len(more) and run.row == newest.row:
            more = more.assign(replica=more["replica"] + present["replica"].max() + 1)
            machines = dict.fromkeys((curve.record.machine, run.record.machine))
            record = replace(curve.record, machine=", ".join(machines))
            runs_of_row = *curve.runs, run.name
            curve = replace(curve, runs=runs_of_row, record=record, history=pd.concat([present, more]))
    return curve


def ordered_settings(report: ExperimentReport) -> list[str]:
    """Return the settings that a report orders: those with a panel, or else tuned."""
    return list(report.panels) or ["tuned"]


def place(name: str, order: list[str]) -> tuple[int, str]:
    """Return a key that sorts names by an order; names that it does not have come last, in alphabetical order."""
    return (order.index(name), "") if name in order else (len(order), name)
