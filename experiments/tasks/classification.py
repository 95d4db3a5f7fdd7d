"""The task of most experiments: train a classifier and put its run into the store."""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.jobs import Job, run_once
from experiments.launch import Launch
from experiments.processes import alike, call
from experiments.reports.scores import mean_score
from experiments.store import Run
from experiments.training import Observer, end_record, logger_of, prepared, train_or_resume


def run(config: DictConfig, launch: Launch) -> float | None:
    """Train and evaluate a classifier, unless that has been done. Returns the mean score of `seeds`, for a search."""
    return mean_score(run_once(config, launch, execute), config.seeds)


def execute(config: DictConfig, job: Job) -> Run:
    """Train, from the last checkpoint if there is one, and put the result into the store."""
    with logger_of(config) as logger:  # closed when the result is in its place
        parallel = call(config, job)
        with alike(parallel):
            start = parallel.together(lambda: prepared(config, job.dataset, job.info["seeds"], parallel))
            test = job.dataset.x_test, job.dataset.y_test
            history = train_or_resume(config, job, start, test, Observer(logger))
        return job.slot.complete(job.config, history.rows, job.info | end_record(history, parallel))
