"""Paired comparisons: by how much a row of a table differs from its baseline, over the seeds that both have.

Runs of one seed draw weights and mini-batches from the same streams of random numbers, so that their difference can
vary less than each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import sem, t

from experiments.overrides import is_comparable_with_paper
from experiments.records import RunRecord
from experiments.reports.methods import method_of

CONFIDENCE = 0.95
BASELINE = "baseline"


@dataclass(frozen=True)
class Scored:
    """A row of a table by its record. scores: by seed, in percent; a diverged seed has none."""

    record: RunRecord
    scores: Mapping[int, float]

    @property
    def task(self) -> tuple[Any, ...]:
        """The data, and the overrides that change network, loss or data; rows that differ in these are not compared."""
        others = [override for override in self.record.overrides if not is_comparable_with_paper(override)]
        return self.record.dataset, sorted(others)

    @property
    def name(self) -> str:
        """Its method and setting."""
        return f"{self.record.method}-{self.record.setting}"

    def baseline_names(self, baseline: str) -> list[str]:
        """Return the `name` of the row that this one is compared with, and, as a setting rank32_printed is a variant of
        rank32, of the one that it is compared with if there is no such row. baseline: see `ExperimentReport`."""
        if "-" in baseline:
            return [baseline]
        setting = self.record.setting
        return [f"{baseline}-{s}" for s in dict.fromkeys((setting, setting.partition("_")[0]))]


def insert_differences(table: pd.DataFrame, rows: Sequence[Scored], baseline: str) -> None:
    """Insert each row's `difference` to its baseline after the column `std`, unless no row has another one as its
    baseline.

    rows: of the table, in its order. baseline: see `ExperimentReport`.
    """
    others = [_baselines(row, rows, baseline) for row in rows]
    if any(found and row not in found for row, found in zip(rows, others, strict=True)):
        method, _, setting = baseline.partition("-")
        words = ["minus", method_of(method).label, setting, f"[{100 * CONFIDENCE:g} %]"]
        cells = [_cell(row, found, baseline) for row, found in zip(rows, others, strict=True)]
        table.insert(list(table.columns).index("std") + 1, " ".join(filter(None, words)), cells)


def _baselines(row: Scored, rows: Sequence[Scored], baseline: str) -> list[Scored]:
    """The rows that a row could be compared with."""
    of_task = [other for other in rows if other.task == row.task]
    found = ([other for other in of_task if other.name == name] for name in row.baseline_names(baseline))
    return next(filter(None, found), [])


def _cell(row: Scored, found: Sequence[Scored], baseline: str) -> str:
    if row in found:
        return BASELINE
    found = [other for other in found if other.record.overrides == row.record.overrides] or found
    if len(found) != 1:
        return f"– ({len(found)} rows {found[0].name})" if found else f"– (no row {row.baseline_names(baseline)[0]})"
    return difference(row.scores, found[0].scores)


def difference(scores: Mapping[int, float], of_baseline: Mapping[int, float]) -> str:
    """Return the mean over the common seeds of the scores' difference, and its confidence interval by Student's t; or
    a dash, and why there is none. The number of seeds follows where it is not that of both rows."""
    seeds = sorted(scores.keys() & of_baseline.keys())
    if len(seeds) < 2:
        why = "one seed" if seeds else "other seeds" if scores and of_baseline else "diverged"
        return f"– ({why})"
    by_seed = [scores[seed] - of_baseline[seed] for seed in seeds]
    mean, half = np.mean(by_seed), t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * sem(by_seed)
    number = f", {len(seeds)} seeds" if len(seeds) < max(len(scores), len(of_baseline)) else ""
    return f"{mean:z.2f} [{mean - half:z.2f}, {mean + half:z.2f}]{number}"
