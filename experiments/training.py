"""From a configuration to a trained network: the problem, the optimizer, and the loop with its logger and progress."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from admm.callbacks import Callback
from admm.checkpoints import History, Row
from admm.data import Dataset
from admm.files import atomic_write
from admm.layers import Execution
from admm.losses import one_hot
from admm.optimizers import Optimizer, Problem, State
from admm.training import train
from experiments.errors import one_sample_in_words, user_errors
from experiments.jobs import Job, first_few
from experiments.loggers import Guarded, Logger, NoLogger
from experiments.progress import RunProgress
from experiments.provenance import changed_sources
from experiments.store import PROBES, Slot

log = logging.getLogger(__name__)
NO_LOGGER = NoLogger()


def train_or_resume(
    config: DictConfig, job: Job, problem: Problem, test: Any, observer: Observer, **options: Any
) -> tuple[Any, History]:
    """Train, from the last checkpoint if there is one. Returns the optimizer's last state and the history.

    test, options: as `admm.training.train` takes them. Raises BadInput, and what `train` does.
    """
    with user_errors(config, "optimizer"), one_sample_in_words():
        optimizer = instantiate(config.optimizer, _convert_="all")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: {job.info['method']} trains nothing; it is for experiment=lfw_proxy")
        state = optimizer.init(problem, job.info["seeds"])
    with one_sample_in_words(), observer.watch(config, job) as callback:
        history = train(
            problem,
            optimizer,
            state,
            config.iterations,
            test,
            config.evaluate_every,
            job.slot.checkpoint,
            config.checkpoint_seconds,
            [callback],
            **options,
        )
    return state, history


@dataclass(frozen=True)
class Observer:
    """Sees a run's rows as they come: sends them to the logger, shows progress, warns of replicas that diverge.

    logger: is opened, and left open. quantity: what the progress shows, in percent. names: of the replicas;
    None names them by their seeds.
    """

    logger: Logger = NO_LOGGER
    quantity: str = "test_accuracy"
    names: Sequence[str] | None = None

    @contextmanager
    def watch(self, config: DictConfig, job: Job) -> Iterator[Callback]:
        """Open the logger and the progress for a run. Yields a callback for `admm.training.train`."""
        self.logger.open(job.info, job.config)
        write_start_record(job.slot, job.info)
        names = self.names or [f"seed {seed}" for seed in job.info["seeds"]]
        reported: set[int] = set()
        bar = RunProgress(job.slot.name, config.iterations, config.progress, self.quantity.replace("_", " "))

        def observe(problem: Problem, state: State, history: History, rows: list[Row]) -> None:
            self.logger.log(rows)
            for replica in history.diverged.keys() - reported:
                iteration = history.diverged[replica]
                log.warning("%s: %s diverged (not finite after iteration %d)", job.slot.name, names[replica], iteration)
                reported.add(replica)
            if rows:
                last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
                mean = sum(row[self.quantity] for row in last) / len(last)
                progress.update(int(last[0]["iteration"]), mean, history.seconds)

        with bar as progress:
            yield observe


def write_start_record(slot: Slot, info: dict[str, Any]) -> None:
    """Note how a run starts. Logs a warning if it is resumed by other code, libraries or machine. Raises WriteError."""
    record = slot.start_note
    if slot.checkpoint.exists():
        log.info("resuming from %s", slot.checkpoint)
    if slot.checkpoint.exists() or slot.journal(PROBES).exists():
        started = json.loads(record.read_text(encoding="utf-8"))
        for key in ("commit", "versions", "machine"):
            if started[key] != info[key]:
                log.warning("%s: begun with %s %s, resumed with %s", slot.name, key, started[key], info[key])
        if "sources" in started and (files := changed_sources(started["sources"], info["sources"])):
            log.warning("%s: begun with other code, resumed with another %s", slot.name, first_few(files))
    with atomic_write(record, "the record of the run's start") as part:
        part.write_text(json.dumps(info), encoding="utf-8")


def end_record(history: History) -> dict[str, Any]:
    """Return what `run.json` says of the end of a run."""
    return {"seconds": round(history.seconds, 3), "diverged": history.diverged}


def logger_of(config: DictConfig) -> Guarded:
    """Return the configuration's logger. If it cannot be made, such as for want of a connection, log a warning and
    return one that does nothing. Raises BadInput for a wrong key or a missing package."""
    with user_errors(config):
        try:
            logger = instantiate(config.logger)
        except InstantiationException as error:
            if error.__cause__ is None or isinstance(error.__cause__, ImportError | TypeError | ValueError):
                raise
            log.warning("%s failed, the run goes on without it: %r", config.logger._target_, error.__cause__)
            return Guarded(NO_LOGGER)
        if not isinstance(logger, Logger):
            raise ValueError(f"logger: {config.logger._target_} is no subclass of experiments.loggers.Logger")
        return Guarded(logger)


def build_problem(config: DictConfig, dataset: Dataset) -> Problem:
    """Return the problem of a configuration: its network in blocks, loss, initialisation and data."""
    network = instantiate(config.model, input_shape=dataset.input_shape, classes=dataset.classes, _convert_="all")
    return Problem(
        x=dataset.x_train,
        y=one_hot(dataset.y_train, dataset.classes, dataset.x_train),
        blocks=instantiate(config.split, _partial_=True, _convert_="all")(network, execution=execution(config)),
        loss=instantiate(config.loss),
        initialise=instantiate(config.init),
        augmentation=instantiate(config.get("augmentation")),
    )


def execution(config: DictConfig) -> Execution:
    """Return how blocks are evaluated, and set PyTorch's precision of products on a GPU."""
    precision = config.get("precision")  # a stored configuration has neither the default nor the neutral keys
    how = {key: config[key] for key in ("compile", "channels_last", "recompute") if key in config}
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Execution("bf16" if precision == "bf16" else "fp32", **how)
