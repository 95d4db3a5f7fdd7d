"""Scores: what a search maximises, of runs that make one row of a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from experiments.reports.base import report_on
from experiments.store import Run


def scores(runs: Sequence[Run]) -> dict[int, float]:
    """Return the scores by seed, percent, of runs that differ in their seeds alone; a seed's last run counts."""
    return {seed: score for run in runs for seed, score in report_on(run).score(run).items()}


def mean_score(runs: Sequence[Run], seeds: Collection[int]) -> float | None:
    """Return the mean score of the seeds that have one; None if there is none."""
    found = [score for seed, score in scores(runs).items() if seed in seeds]
    return fmean(found) if found else None


def is_of_a_search(run: Run) -> bool:
    """Return whether the run has a score on held-out data."""
    return bool(run.record.dataset.holdout and report_on(run).score(run))
