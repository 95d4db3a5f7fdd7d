"""What runs are judged by: accuracy of classes, R² of numbers, or what else a run has measured on its test set."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Metric:
    """A score of the test set by its name in `admm.training.evaluate`.

    words: in titles and at axes. unit: % where 100 is perfect. factor: from the history's numbers to the unit.
    beside: other scores that tables have: their columns there, and those of the history.
    """

    name: str
    words: str
    unit: str = "%"
    factor: float = 1.0
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def column(self) -> str:
        """The column of a history."""
        return f"test_{self.name}"

    def label(self, part: str = "test") -> str:
        """Return the label of an axis. part: of the data, test or held-out."""
        return f"{part} {self.words}{f' ({self.unit})' if self.unit else ''}"


ACCURACY = Metric("accuracy", "accuracy")
METRICS = (
    ACCURACY,
    Metric("label_accuracy", "label accuracy", beside=(("exact match", "test_exact_match"),)),
    Metric("r2", "R²", factor=100.0, beside=(("mse", "test_mse"),)),
    Metric("loss", "loss", unit=""),
)


def metric_of(columns: Container[str]) -> Metric:
    """Return what a run with these columns is judged by: the first of `METRICS` that it has measured."""
    return next((metric for metric in METRICS if metric.column in columns), ACCURACY)


def in_percent(history: pd.DataFrame) -> pd.DataFrame:
    """Return a history in which R² is in percent, as accuracies are."""
    factors = {f"{part}_{metric.name}": metric.factor for metric in METRICS for part in ("train", "test")}
    scaled = {name: history[name] * factor for name, factor in factors.items() if factor != 1.0 and name in history}
    return history.assign(**scaled)
