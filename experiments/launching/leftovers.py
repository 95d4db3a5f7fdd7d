"""Runs that a launch has left to other processes: at its end it waits for them, or makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.launch import Launch
from experiments.launching.failures import failures_end_the_program, note_failure, run_task
from experiments.store import LEFT


class Leftovers(Callback):
    """At the end of a sweep, before its report: finishes the runs that were left to other processes."""

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        for job in sorted(note.parent for note in Path(config.hydra.sweep.dir).rglob(LEFT)):
            try:
                come_back_to(job)
            except Exception as error:
                note_failure(job, error, config.hydra.verbose)


def come_back_to(job: Path) -> None:
    """Wait for the run of a job, or make it if its process has died. job: the job's folder in the launch."""
    config = OmegaConf.load(job / ".hydra/config.yaml")
    assert isinstance(config, DictConfig)
    run_task(config, Launch.saved(job / ".hydra"))
