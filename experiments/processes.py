"""One run on several processes, which torchrun has started: process 0 is the suite, the others train with it."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from admm.parallel import ALONE, Parallel
from experiments.checks import DTYPES, started
from experiments.device import denormals_flushed, ready_device
from experiments.errors import FOR_USERS, BadInput
from experiments.jobs import Job, load_once, options_of
from experiments.training import Prepared, prepared, trained

SHARED = (ValueError, *FOR_USERS)  # errors that come in all processes at once
_DELAY = timedelta(minutes=1)  # the longest that one waits for the others where a run ends


@dataclass(frozen=True)
class Order:
    """What the other processes need to know of a run: its configuration, and where its checkpoint is."""

    config: dict[str, Any]
    checkpoint: Path


def is_follower() -> bool:
    """Whether this is another process of torchrun's than process 0."""
    return started() > 1 and int(os.environ["RANK"]) > 0


@contextmanager
def leading() -> Iterator[None]:
    """Do the work of process 0; at its end the others are told to end, too."""
    if started() == 1:
        yield
        return
    _groups()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of a process that has died
            _told(None)


@cache
def _groups() -> tuple[Any, Any]:
    """Return the processes as a group for orders, which may be days apart, since process 0 waits where another launch
    makes its run; and as one that meets where a run ends."""
    Parallel.join("samples")
    orders, ends = (dist.new_group(timeout=longest, backend="gloo") for longest in (timedelta(weeks=4), _DELAY))
    return orders, ends


def _told(order: Order | None) -> Order | None:
    """Return, in all processes, what process 0 calls this with."""
    orders = [order]
    dist.broadcast_object_list(orders, 0, group=_groups()[0])
    return orders[0]


def call(config: DictConfig, job: Job) -> Parallel:
    """Call the other processes to a run, for which they do as `follow` does. Raises BadInput for a wrong `parallel`."""
    if config.parallel is None:
        return ALONE
    try:
        parallel = Parallel.join(config.parallel)
    except ValueError as error:
        raise BadInput(str(error)) from error
    _told(Order(job.config, job.slot.checkpoint.absolute()))
    return parallel


@denormals_flushed()
def follow() -> None:
    """Take part in one run of process 0 after the other, until there are no more. What fails in all of them is told by
    process 0."""
    logging.basicConfig(level=os.environ.get("LOGLEVEL", "ERROR"), format="[%(name)s][%(levelname)s] %(message)s")
    warnings.simplefilter("default" if "LOGLEVEL" in os.environ else "ignore")
    while (order := _told(None)) is not None:
        config = OmegaConf.create(order.config)
        parallel = Parallel.join(config.parallel)
        with suppress(*SHARED), alike(parallel):
            start = parallel.together(partial(_prepared, config, parallel))
            parallel.together(lambda: None)  # process 0 begins to log
            trained(config, *start, order.checkpoint)


@contextmanager
def alike(parallel: Parallel) -> Iterator[None]:
    """Let the processes meet where a run ends, by an error of `SHARED` or without. One that fails in another way, or
    that the others do not meet, ends with its errors printed, and torchrun then ends the others."""
    try:
        try:
            yield
        except SHARED:
            _meet(parallel)
            raise
        _meet(parallel)
    except SHARED:
        raise
    except Exception:
        if parallel.size == 1:
            raise
        traceback.print_exc()
        os._exit(1)


def _meet(parallel: Parallel) -> None:
    """Wait for the other processes. Raises RuntimeError, which names one of them, if they do not come."""
    if parallel.size > 1:
        dist.monitored_barrier(_groups()[1])


def _prepared(config: DictConfig, parallel: Parallel) -> tuple[Prepared, Any]:
    """Return what a run begins with in another process than 0, and its test set."""
    device = ready_device(config, workers=None)
    dataset = load_once(**options_of(config.dataset), device=device, dtype=DTYPES[config.dtype])
    return prepared(config, dataset, config.seeds, parallel), (dataset.x_test, dataset.y_test)
