"""The runs that a launch has left to other processes: at its end they are waited for, or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.launch import Launch
from experiments.launching.failures import failed, failures_end_the_program, run_task
from experiments.store import LEFT


class Leftovers(Callback):
    """Before the report of a sweep."""

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        for job in sorted(note.parent for note in Path(config.hydra.sweep.dir).rglob(LEFT)):
            try:
                come_back_to(job)
            except Exception as error:
                failed(job, error, config.hydra.verbose)


def come_back_to(job: Path) -> None:
    """Wait for the run of a job whose folder in the launch this is, or make it if its process has died."""
    config = OmegaConf.load(job / ".hydra/config.yaml")
    assert isinstance(config, DictConfig)
    run_task(config, Launch.saved(job / ".hydra"))
