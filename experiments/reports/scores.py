"""What a search maximises, of runs that make one row of a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from experiments.reports.base import report_on
from experiments.store import Run


def scores(runs: Sequence[Run]) -> dict[int, float]:
    """By seed the score of runs that differ in their seeds alone, percent; the last run's where several have it."""
    return {seed: score for run in runs for seed, score in report_on(run).score(run).items()}


def mean_score(runs: Sequence[Run], seeds: Collection[int]) -> float | None:
    """The mean over those seeds that `scores` has; None without runs."""
    return fmean(score for seed, score in scores(runs).items() if seed in seeds) if runs else None


def is_of_a_search(run: Run) -> bool:
    """Whether the run has a score, of held-out data."""
    return bool(run.record.dataset.holdout and report_on(run).score(run))
