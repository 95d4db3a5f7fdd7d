"""Searches by Optuna that can be stopped and go on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

log = logging.getLogger(__name__)


class Study(Callback):
    """Before a launch of hydra/sweeper=study: what former ones have done counts towards `n_trials`, and the trials of
    those that have died are the first that are made, from their runs' checkpoints."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweeper = config.hydra.sweeper
        if "optuna" not in sweeper._target_ or not sweeper.storage:
            return
        import optuna
        from optuna.trial import TrialState

        file = Path(sweeper.storage.removeprefix("sqlite:///"))
        for folder in (file.parent, Path(config.hydra.sweep.dir)):
            folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=sweeper.storage, study_name=sweeper.study_name, direction="maximize", load_if_exists=True
        )
        self.lock = FileLock(file.with_suffix(".lock"))  # until the process ends
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another launch is at it, the two share its trials", sweeper.study_name)
        else:
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                study.enqueue_trial(trial.params)
                study.tell(trial.number, state=TrialState.FAIL)
        with read_write(config):
            sweeper.n_trials = max(0, sweeper.n_trials - len(study.get_trials(states=(TrialState.COMPLETE,))))
