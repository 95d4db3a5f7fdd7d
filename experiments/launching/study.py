"""Optuna studies that can be stopped and resumed, and the rankings that searches end with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.types import RangeSweep
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from experiments.checks import check_search
from experiments.errors import BadInput
from experiments.identity import identity
from experiments.launching.failures import failures_end_the_program
from experiments.overrides import chooses_row, parse
from experiments.provenance import own_code, sources
from experiments.reports.scores import is_of_a_search
from experiments.reports.searches import rankings, write_ranking
from experiments.store import failed_writes_in_words, launched_runs

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)
SQLITE = "sqlite:///"
study_locks: list[FileLock] = []  # until the process ends; a callback cannot hold them, as it is sent to workers


class Study(Callback):
    """Before a launch of hydra/sweeper=study: resumes the study. At the end of any search: ranks its configurations.

    Former trials that have a value count towards `n_trials`. Trials that were cut short are made first, from their
    runs' checkpoints. Failed trials are not made again. The sampler's seed grows with the number of trials, so that it
    draws new ones.

    A study belongs to one command: its name ends with a hash of the configuration and the space, so that no other
    command resumes it. A second launch of the command waits until the first one has ended.

    The ranking is by the score on held-out data. It is in the launch's folder; that of a study covers all its launches.
    """

    launches: Sequence[str] = ()  # folders of a study's launches

    @failures_end_the_program()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweeper = config.hydra.sweeper
        check_search("optuna" in sweeper._target_, space(config).get("dataset.holdout", config.dataset.get("holdout")))
        if config.hydra.runtime.choices["hydra/sweeper"] != "study":
            return
        import optuna
        from optuna.trial import TrialState

        as_in_a_grid(config)
        with read_write(config):
            sweeper.study_name = f"{sweeper.study_name}_{search_hash(config)}"
        if not sweeper.storage.startswith(SQLITE):
            raise BadInput(f"hydra.sweeper.storage: {sweeper.storage} is not {SQLITE}<file>")
        file = Path(sweeper.storage.removeprefix(SQLITE))
        for folder in (file.parent, Path(config.hydra.sweep.dir)):
            folder.mkdir(parents=True, exist_ok=True)
        wait_for(FileLock(file.with_suffix(".lock")), sweeper.study_name)
        study = optuna.create_study(
            storage=sweeper.storage,
            study_name=sweeper.study_name,
            direction=str(sweeper.direction),
            load_if_exists=True,
        )
        take_up(study)
        self.launches = [*study.user_attrs.get("launches", ()), str(Path(config.hydra.sweep.dir).absolute())]
        study.set_user_attr("launches", self.launches)
        with read_write(config):
            sweeper.n_trials = max(0, sweeper.n_trials - len(study.get_trials(states=(TrialState.COMPLETE,))))
            if isinstance(sweeper.sampler.get("seed"), int):
                sweeper.sampler.seed += len(study.trials)

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        launch = Path(config.hydra.sweep.dir)
        launched = [run for folder in self.launches or [str(launch)] for run in launched_runs(Path(folder))]
        with failed_writes_in_words("The runs are in the store; the same command ranks them."):
            for name, ranked in rankings(filter(is_of_a_search, launched)).items():
                if len(ranked) > 1:
                    write_ranking(name, ranked, launch)


def search_hash(config: DictConfig) -> str:
    """Return eight hexadecimal digits of a hash of what is searched: the configuration without its neutral keys, the
    row, the user's own code, and the space, of search=… and of the command line."""
    task: Any = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    row = [override for override in config.hydra.overrides.task if chooses_row(override)]
    searched_by = row, space(config), str(config.hydra.sweeper.direction)
    values: Any = OmegaConf.to_container(task, resolve=True)
    content = [identity(values | {"own_code": own_code(sources(values)) or None}, {}, ""), *searched_by]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def space(config: DictConfig) -> dict[str, Any]:
    """Return what search=… and the command line vary: by key, the values as they are written there."""
    params: dict[str, Any] = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create())  # type: ignore[assignment]
    return params | {
        o.get_key_element(): o.get_value_string() for o in parse(config.hydra.overrides.task) if o.is_sweep_override()
    }


def as_in_a_grid(config: DictConfig) -> None:
    """Exclude the ends of the ranges of a study's space, as a grid does; Optuna's sweeper includes them.

    config: The launch's configuration, with its `hydra`; changed in place.
    """
    sweeper, overrides = config.hydra.sweeper, config.hydra.overrides
    with read_write(config):
        overrides.task = [without_end(override) for override in overrides.task]
        for key, space in (sweeper.params or {}).items():
            sweeper.params[key] = without_end(f"{key}={space}").removeprefix(f"{key}=")


def without_end(override: str) -> str:
    """Return an override whose value is a range(…) as a rising range that ends with its last value; any other as it is.

    Raises BadInput for a range without values.
    """
    space = parse([override])[0].value()
    if not isinstance(space, RangeSweep) or space.shuffle:  # of a shuffled one the sweeper takes the values
        return override
    first, step = Decimal(str(space.start)), Decimal(str(space.step))
    last = first + (len(list(space.range())) - 1) * step
    low, high = (first, last) if step > 0 else (last, first)
    if low > high:
        raise BadInput(f"{override}: a range without a value, as its end is not part of it")
    return f"{override.partition('=')[0]}=range({low},{high},{abs(step)})"


def wait_for(lock: FileLock, name: str) -> None:
    """Hold a study's lock until the process ends."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another launch is at it; this one waits for its end, and goes on with what is missing then", name)
        lock.acquire()
    study_locks.append(lock)


def take_up(study: OptunaStudy) -> None:
    """Enqueue the trials that a kill has cut short, once per set of parameters. Only the holder of the study's lock may
    call this.

    A trial is marked as failed after it is in the queue, so that a kill here neither doubles nor loses one."""
    from optuna.trial import TrialState

    def parameters(trial: FrozenTrial) -> dict[str, Any]:
        return {**trial.system_attrs.get("fixed_params", {}), **trial.params}

    known = [parameters(trial) for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.WAITING))]
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        cut_short = parameters(trial)
        # a trial that was killed between two suggestions has only some of the parameters
        if not any(cut_short.items() <= other.items() for other in known):
            study.enqueue_trial(cut_short)
            known.append(cut_short)
        study.tell(trial.number, state=TrialState.FAIL)
