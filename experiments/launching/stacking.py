"""Cells of a sweep that differ only in the optimizer's numbers and in their seeds, trained as one stacked run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import psutil
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import History, Row, save, size
from admm.optimizers.protocol import Optimizer, Problem
from experiments.checks import TASK, hyperparameters
from experiments.device import find_device
from experiments.errors import FOR_USERS, in_words
from experiments.jobs import Job, find_job, load_dataset
from experiments.launch import Launch
from experiments.loggers import Guarded, Logger
from experiments.store import Slot
from experiments.training import Observer, build_problem, end_record, logger_of, prepared, train_or_resume

log = logging.getLogger(__name__)
SOME = 1000  # samples for which a cell's variables are allocated, to extrapolate their bytes to all samples
REPLICAS, SAMPLES = 45, 45 * 128  # of a stack, and of all its mini-batches: more are not worthwhile (`make bench`)


@dataclass(frozen=True)
class Cell:
    """A job of a sweep that can be part of a stack."""

    job: Job
    template: str  # what all cells of a stack have in common
    size: float  # of a replica's variables, bytes
    samples: int  # of a step

    @property
    def replicas(self) -> int:
        """How many replicas the cell has: one per seed."""
        return len(self.job.info["seeds"])


def train_stacks(configs: Sequence[DictConfig], replicas: int | None, memory: float | None) -> list[list[Cell]]:
    """Train the cells that can be stacked and have not been run; put each cell's result into the store as its own run.

    Other cells, and those that another process is making, are left alone. Stacks are cut in the same way at each launch
    of a sweep, so that an interrupted one goes on from its checkpoint. Returns the stacks that are not finished.
    Ends the program for an impossible limit.

    Args:
        configs: The configurations of the sweep's jobs, with their `hydra`.
        replicas: Most replicas in a stack; None: as many as are worthwhile.
        memory: GiB for a stack's variables; None: a quarter of the device's.
    """
    check_limits(replicas, memory)
    shared = cache(load_dataset)  # cells with the same data hold them once
    groups: dict[str, dict[str, Cell]] = {}
    for config in configs:
        cell = as_cell(config, shared)
        if cell is not None:
            groups.setdefault(cell.template, {})[cell.job.info["identity"]] = cell
    stacks = [part for group in groups.values() for part in cut(list(group.values()), replicas, memory)]
    alone = len(configs) - sum(map(len, stacks))
    if alone:
        why = what_may_differ(configs[0].optimizer) if groups else "their tasks, networks or options have no stacks"
        log.info("%d of %d jobs are no part of a stack: they run one by one; %s", alone, len(configs), why)
    return [stack for stack in stacks if not train_stack(stack)]


def what_may_differ(optimizer: DictConfig) -> str:
    """Return in words in which values of an optimizer the jobs of a stack may differ."""
    names = hyperparameters(OmegaConf.to_container(optimizer))  # type: ignore[arg-type]
    keys = [f"optimizer.{name}" for name in names]
    why = "what its class annotates as … | Sequence[float]"
    return f"a stack's jobs differ in {' and '.join(['seeds', *keys])} alone, {why}"


def check_limits(replicas: Any, memory: Any) -> None:
    """End the program for an impossible limit, with a message that names the key."""
    if replicas is not None and not (type(replicas) is int and replicas > 0):
        raise SystemExit(f"error: hydra.launcher.replicas: {replicas!r} is not a whole number from 1 up")
    if memory is not None and not (type(memory) in (int, float) and memory > 0):
        raise SystemExit(f"error: hydra.launcher.memory: {memory!r} is not a number of GiB above 0")


def as_cell(config: DictConfig, load: Callable[..., Any]) -> Cell | None:
    """Return a job as a cell, or None if it should not be stacked.

    It should not if it does not train a classifier, is forced, is shared out to several processes, or fails already
    here (its own run will say why); nor if the network's replicas are evaluated one after the other, as a stack then
    takes more memory and no less time.
    """
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if task.task != TASK or task.force or task.parallel is not None:
        return None
    try:
        job = find_job(task, Launch.of(config.hydra), load)
        config = OmegaConf.create(job.config)
        problem, optimizer = build_problem(config, job.dataset), instantiate(config.optimizer, _convert_="all")
        variables = bytes_of_variables(problem, optimizer, config.seeds)
    except Exception:
        return None
    if any(block.is_autograd for block in problem.blocks):
        return None
    samples = getattr(optimizer, "batch_size", problem.n_samples)  # of a step, all where there are no mini-batches
    return Cell(job, template(job), variables / len(config.seeds), samples)


def bytes_of_variables(problem: Problem, optimizer: Optimizer[Any], seeds: Sequence[int]) -> float:
    """Return the bytes of all seeds' variables, extrapolated linearly from `SOME` samples and from twice as many.

    Raises ValueError for a problem that the optimizer cannot train.
    """

    def of(samples: int) -> int:
        part = replace(problem, x=problem.x[:samples], y=problem.y[:samples])
        return size(save(optimizer.init(part, seeds)))

    samples = problem.n_samples
    if samples > 2 * SOME:
        with suppress(ValueError):  # the mini-batches may be larger
            return (some := of(SOME)) + (of(2 * SOME) - some) / SOME * (samples - SOME)
    return of(samples)


def template(job: Job) -> str:
    """Return what all cells of a stack share: the configuration, with blanks for what may differ, and the data."""
    config: dict[str, Any] = json.loads(json.dumps(job.config))
    seeds = len(config.pop("seeds"))
    del config["note"]
    for name in hyperparameters(config["optimizer"]):
        config["optimizer"][name] = with_blanks(config["optimizer"][name])
    own = [job.info[key] for key in ("experiment", "method", "dataset")]
    return json.dumps([config, seeds, *own, str(job.slot.root)], sort_keys=True)


def with_blanks(value: Any) -> Any:
    """Return a value with a blank for each number, also in schedules and {blocks: […]}."""
    match value:
        case {"blocks": list(parts)}:
            return {"blocks": [with_blanks(part) for part in parts]}
        case dict():
            return {key: with_blanks(part) for key, part in value.items()}
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else value


def join_values(values: Sequence[Any], seeds: int) -> Any:
    """Return a hyperparameter of a stack: the cells' common value, or one number per replica. seeds: per cell."""
    match values[0]:
        case {"blocks": _}:
            return {"blocks": [join_values(parts, seeds) for parts in zip(*(v["blocks"] for v in values), strict=True)]}
        case dict() as first:
            return {key: join_values([value[key] for value in values], seeds) for key in first}
        case first if all(value == first for value in values):
            return first
    return [number for number in values for _ in range(seeds)]


def cut(cells: list[Cell], replicas: int | None, memory: float | None) -> Iterator[list[Cell]]:
    """Yield stacks of at least two cells, within the limits, and of nearly the same number of cells."""
    if len(cells) < 2:
        return
    most = largest_stack(cells[0], replicas, memory) // cells[0].replicas
    number = ceil(len(cells) / most) if most > 1 else len(cells)
    for k in range(number):
        part = cells[k * len(cells) // number : (k + 1) * len(cells) // number]
        if len(part) > 1:
            yield part


def largest_stack(cell: Cell, replicas: int | None, memory: float | None) -> int:
    """Return how many replicas a stack of such cells may have, by the limits of `train_stacks`."""
    device = find_device(cell.job.config["device"])
    on_gpu = device.type == "cuda"
    whole = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    fitting = int((whole / 4 if memory is None else memory * 2**30) / cell.size)
    if replicas is not None:
        return min(fitting, replicas)
    return fitting if on_gpu else min(fitting, worthwhile_on_cpu(cell.samples))


def worthwhile_on_cpu(samples: int) -> int:
    """Return how many replicas are worthwhile on a CPU, given the samples of a step: the larger the step, the fewer
    replicas keep the CPU busy, and the sooner they exceed its caches."""
    return min(REPLICAS, SAMPLES // samples)


def train_stack(cells: Sequence[Cell], wait: bool = False) -> bool:
    """Train the unfinished cells of a stack, from its checkpoint if there is one. Returns whether all are finished:
    without `wait`, other processes may still be making some of them.

    If the stack fails, its cells are left to their own runs.
    """
    first, slots = cells[0].job.slot, {cell.job.slot.identity: cell.job.slot for cell in cells}
    slot = replace(first, name=f"{first.name}-stack", identity=hashlib.sha256("".join(slots).encode()).hexdigest()[:12])
    try:
        return _train_stack(cells, slot, slots, wait)
    except Exception as error:
        where = None if isinstance(error, FOR_USERS) else error
        log.warning("%s failed, its cells are run one by one: %s", slot.name, in_words(error), exc_info=where)
        return True


def _train_stack(cells: Sequence[Cell], slot: Slot, slots: dict[str, Slot], wait: bool) -> bool:
    with ExitStack() as locks:
        if not locks.enter_context(slot.lock(wait)):
            return False
        # in one order in all processes, so that no two wait for each other
        free = {identity for identity in sorted(slots) if locks.enter_context(slots[identity].lock(wait))}
        todo = [cell for cell in cells if cell.job.slot.identity in free and not cell.job.slot.finished()]
        if slot.checkpoint.exists():
            begun = json.loads(slot.start_note.read_text(encoding="utf-8"))["cells"]
            stack = [cell for cell in cells if cell.job.slot.identity in begun]
        else:
            stack = todo = [cell for cell in todo if not cell.job.slot.checkpoint.exists()]
        if todo and len(stack) > 1:
            train_and_store(stack, todo, slot)
        done = all(cell_slot.folder.exists() for cell_slot in slots.values())
        if done:
            slot.discard()
    return done


def train_and_store(stack: Sequence[Cell], todo: Sequence[Cell], slot: Slot) -> None:
    """Train a stack, and put the results of the cells `todo` into the store."""
    shares = [Share(cell, number, len(stack)) for number, cell in enumerate(stack)]
    config, first = OmegaConf.create(stacked_config(stack)), stack[0].job
    info = first.info | {
        "identity": slot.identity,
        "seeds": list(config.seeds),
        "cells": [cell.job.slot.identity for cell in stack],
    }
    log.info("%s: %d cells, %d replicas, as one stack", slot.name, len(stack), len(config.seeds))
    job, data = Job(first.dataset, slot, info, first.config), first.dataset
    start = prepared(config, data, config.seeds)
    names = [
        f"seed {seed} of {cell.job.slot.identity} ({' '.join(cell.job.info['overrides'])})"
        for cell in stack
        for seed in cell.job.info["seeds"]
    ]
    test = data.x_test, data.y_test
    with Guarded(CellLoggers(shares, [logger_of(config) for _ in stack])) as logger:  # closed after all is in its place
        history = train_or_resume(config, job, start, test, Observer(logger, names=names), keep_last=True)
        for share in shares:
            if share.cell in todo:
                part, cell = share.of(history), share.cell.job
                cell.slot.complete(cell.config, part.rows, cell.info | end_record(part) | {"stack": len(config.seeds)})


def stacked_config(stack: Sequence[Cell]) -> dict[str, Any]:
    """Return the configuration of a run of all cells' replicas."""
    configs = [cell.job.config for cell in stack]
    optimizer = configs[0]["optimizer"]
    values = {
        name: join_values([config["optimizer"][name] for config in configs], stack[0].replicas)
        for name in hyperparameters(optimizer)
    }
    seeds = [seed for config in configs for seed in config["seeds"]]
    return configs[0] | {"optimizer": optimizer | values, "seeds": seeds}


@dataclass(frozen=True)
class Share:
    """A cell's part of a stack. number: the cell's position, from 0. cells: how many the stack has."""

    cell: Cell
    number: int
    cells: int

    @property
    def start(self) -> int:
        """Its first replica in the stack."""
        return self.number * self.cell.replicas

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the cell's rows as its own run would have them; its seconds are an equal part of the stack's."""
        replicas = range(self.start, self.start + self.cell.replicas)
        return [
            row | {"replica": row["replica"] - self.start, "seconds": row["seconds"] / self.cells}
            for row in rows
            if row["replica"] in replicas
        ]

    def of(self, history: History) -> History:
        """Return the cell's part of the stack's history."""
        diverged = {replica - self.start: at for replica, at in history.diverged.items()}
        of_cell = {replica: at for replica, at in diverged.items() if 0 <= replica < self.cell.replicas}
        return History(
            self.rows(history.rows), history.seconds / self.cells, history.compile_seconds / self.cells, of_cell
        )


@dataclass(frozen=True)
class CellLoggers(Logger):
    """Sends each cell's rows to the cell's own logger."""

    shares: Sequence[Share]
    loggers: Sequence[Logger]

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        for share, logger in zip(self.shares, self.loggers, strict=True):
            logger.open(share.cell.job.info, share.cell.job.config)

    def log(self, rows: list[Row]) -> None:
        for share, logger in zip(self.shares, self.loggers, strict=True):
            logger.log(share.rows(rows))

    def close(self, exit_code: int) -> None:
        for logger in self.loggers:
            logger.close(exit_code)
