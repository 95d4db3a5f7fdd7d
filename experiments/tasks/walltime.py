"""Figure 5: test accuracy against training seconds. One seed at a time, the optimizers take turns in one process."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hydra import compose
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from admm.checkpoints import Row
from admm.files import atomic_write
from admm.optimizers import Optimizer, Problem
from admm.training import accuracy, timed_step
from experiments.errors import user_errors
from experiments.jobs import Job, find_job, record_in_launch, supersede
from experiments.launch import Launch
from experiments.overrides import key_of
from experiments.progress import RunProgress
from experiments.rows import TableRows
from experiments.store import RACE, Run, seal, unseal
from experiments.training import build_problem, write_start_record

log = logging.getLogger(__name__)
SAME = ("identity", "commit", "sources", "machine", "versions")  # of all seeds of a race


@dataclass
class Contestant:
    """An optimizer in training."""

    job: Job
    problem: Problem
    optimizer: Optimizer[Any]
    state: Any
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def step(self) -> None:
        """Train for one iteration, whose time is taken, and evaluate."""
        self.seconds += timed_step(self.problem, self.optimizer, self.state)
        self.evaluate()

    def evaluate(self) -> None:
        """Add a row of the history, unless the replica has diverged."""
        theta, data = self.state.theta, self.job.dataset
        row = {"iteration": self.state.iteration, "seed": self.state.seeds[0], "seconds": self.seconds}
        if torch.isfinite(theta.flat()).all():
            right = accuracy(self.problem.blocks, theta, data.x_test, data.y_test)
            self.rows.append(row | {"test_accuracy": right.item()})

    @property
    def is_done(self) -> bool:
        """Whether it is at its last iteration, or has diverged and so has no row of its newest iteration."""
        newest = self.state.iteration
        return bool(newest >= self.job.info["iterations"] or self.rows[-1]["iteration"] < newest)


def run(config: DictConfig, launch: Launch) -> None:
    """Time `config.optimizers` against each other, unless that has been done.

    When all have ended, each optimizer's run is put into the store. An interrupted race goes on with its last seed.
    """
    with user_errors(config):
        check_race(config, launch)
        jobs = {method: job_of(method, config, launch) for method in config.optimizers}
    slots = sorted((job.slot for job in jobs.values()), key=lambda slot: slot.identity)
    with ExitStack() as locks:
        for slot in slots:  # in one order, so that two races do not wait for each other
            locks.enter_context(slot.lock())
        runs = [run for job in jobs.values() if (run := job.slot.finished())]
        if any(job.rerun for job in jobs.values()) or len(runs) < len(jobs):
            runs = race(config, jobs)
        else:
            machine = runs[0].record.machine
            log.info("%s is there already, timed on %s; force=true times again", slots[0].experiment, machine)
        record_in_launch(runs, launch, config)
        for job in jobs.values():
            supersede(job, config)


def check_race(config: DictConfig, launch: Launch) -> None:
    """Raises ValueError for `optimizer=…` or `row=…`, of which a race has several, and for impossible `optimizers`."""
    if any(key_of(override) in ("optimizer", "row") for override in launch.overrides):
        raise ValueError("optimizer: a race has several; optimizers=[sgd,gotmare] chooses them")
    if not isinstance(config.optimizers, ListConfig) or not config.optimizers:
        raise ValueError(f"optimizers: {config.optimizers!r} is not a list of optimizers, such as [sgd,gotmare]")


def job_of(method: str, config: DictConfig, launch: Launch) -> Job:
    """Return the job of an optimizer in the race: its first row that fits, with the command line's overrides."""
    table = TableRows.of(launch.experiment, config.rows, launch.conf)
    row = next(iter(table.chosen(method, config.setting)), None)
    others = [override for override in launch.overrides if key_of(override) != "setting"]
    chosen = compose_row(others, f"row={row.name}" if row else f"optimizer={method}", method)
    return find_job(chosen, replace(launch, method=method, row=row))


def compose_row(overrides: list[str], choice: str, method: str) -> DictConfig:
    """Return the configuration of an optimizer in the race. Raises ValueError for a key that the optimizer lacks."""
    try:
        return compose("config", [*overrides, choice])
    except ConfigCompositionException as error:
        if not (key := re.search(r"'(optimizer\.\S+)'", str(error))):
            raise
        raise ValueError(
            f"{key[1]}: optimizer={method}, which is in the race, has no such key; "
            "optimizers=[…] chooses those that have it"
        ) from error


def race(config: DictConfig, jobs: dict[str, Job]) -> list[Run]:
    """Race all seeds, one after the other, and put the runs into the store. Returns them.

    After each seed, a journal beside the store keeps what was measured. A race that was begun with other settings, code
    or machine starts again.
    """
    first = next(iter(jobs.values()))
    kept = first.slot.journal(RACE)
    conditions = {method: {key: job.info[key] for key in SAME} for method, job in jobs.items()}
    histories: dict[str, list[list[Row]]] = {method: [] for method in jobs}
    if kept.exists():
        try:
            begun = unseal(kept.read_text(encoding="utf-8"))
            if begun["conditions"] != conditions:
                raise ValueError("it was begun with other settings, code or machine")
            histories = begun["histories"]
        except ValueError as error:
            log.warning("the race in %s starts again: %s", kept.parent, error)
    write_start_record(first.slot, first.info)
    for replica in range(len(histories[first.info["method"]]), len(config.seeds)):
        for method, rows in race_one(config, jobs, config.seeds[replica]).items():
            histories[method].append([{"replica": replica} | row for row in rows])
        with atomic_write(kept, "the seeds raced so far") as part:
            part.write_text(seal({"conditions": conditions, "histories": histories}), encoding="utf-8")
    # the first, which keeps the race, is completed last
    return [complete(job, histories[method]) for method, job in reversed(jobs.items())]


def complete(job: Job, histories: list[list[Row]]) -> Run:
    """Put an optimizer's part of the race into the store, and return the run."""
    ends, last = [history[-1] for history in histories], job.info["iterations"]
    ended = {
        "seconds": round(sum(end["seconds"] for end in ends), 3),
        "diverged": {r: end["iteration"] + 1 for r, end in enumerate(ends) if end["iteration"] < last},
    }
    return job.slot.complete(job.config, [row for history in histories for row in history], job.info | ended)


def race_one(config: DictConfig, jobs: dict[str, Job], seed: int) -> dict[str, list[Row]]:
    """Race one seed: the contestant that has trained for the shortest time makes the next iteration. Returns each
    method's rows."""
    contestants = {method: contestant(job, seed) for method, job in jobs.items()}
    total = sum(job.info["iterations"] for job in jobs.values())
    with RunProgress(f"seed {seed}", total, config.progress) as progress:
        while running := [c for c in contestants.values() if not c.is_done]:
            min(running, key=lambda c: c.seconds).step()
            done = sum(c.state.iteration for c in contestants.values())
            if done % len(contestants) == 0:
                mean = sum(c.rows[-1]["test_accuracy"] for c in contestants.values()) / len(contestants)
                progress.update(done, f"test accuracy {mean:.2f} %", sum(c.seconds for c in contestants.values()))
    return {method: c.rows for method, c in contestants.items()}


def contestant(job: Job, seed: int) -> Contestant:
    """Return a contestant that is ready to start. An iteration of a twin has warmed up the process."""
    config = OmegaConf.create(job.config)
    with user_errors(config, "optimizer"):
        if job.dataset.task != "classification":
            raise ValueError(f"dataset.task: a race measures accuracy, which {job.dataset.task} does not have")
        problem = build_problem(config, job.dataset)
        optimizer = instantiate(config.optimizer, _convert_="all")
        optimizer.step(problem, optimizer.init(problem, (seed,)))
        state = optimizer.init(problem, (seed,))
    new = Contestant(job, problem, optimizer, state)
    new.evaluate()
    return new
