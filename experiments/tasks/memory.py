"""The paper's memory claim (§4.1): bytes of training variables of batch and online Block-ADMM, and a process's peak."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import save, size
from admm.optimizers import BlockADMM, OnlineBlockADMM, Problem
from admm.optimizers.coupling import BlockOutputs
from experiments.checks import DTYPES
from experiments.device import find_device
from experiments.errors import user_errors
from experiments.jobs import Job, load_once, options_of, run_once
from experiments.launch import Launch
from experiments.reports.memory import VARIABLES
from experiments.store import Run
from experiments.training import build_problem, write_start_record

Argument = TypeVar("Argument")
WARM_SAMPLES = 2000  # of the iteration before the baseline of the peak: the libraries' own memory is nobody's


def run(config: DictConfig, launch: Launch) -> None:
    """Measure the memory of one optimizer, unless that has been done."""
    run_once(config, launch, measure)


def measure(config: DictConfig, job: Job) -> Run:
    """Put the bytes of each variable for one seed, and the peak of a training iteration, into the store."""
    with user_errors(config, "optimizer"):
        sizes = variables(config, build_problem(config, job.dataset), config.seeds[0])
    write_start_record(job.slot, job.info)
    rows: list[dict[str, Any]] = [{"quantity": name, "bytes": size} for name, size in sizes.items()]
    rows.append({"quantity": "peak", "bytes": in_fresh_process(peak, OmegaConf.to_yaml(config, resolve=True))})
    return job.slot.complete(job.config, rows, job.info)


def variables(config: DictConfig, problem: Problem, seed: int) -> dict[str, int]:
    """Return the bytes of a seed's training variables, by their names in `VARIABLES`; online, those of a mini-batch.

    Raises ValueError for another optimizer.
    """
    optimizer = instantiate(config.optimizer, _convert_="all")
    if not isinstance(optimizer, BlockADMM | OnlineBlockADMM):
        raise ValueError(
            f"optimizer: memory is measured of block_admm and online_block_admm, not {config.optimizer._target_}"
        )
    state = optimizer.init(problem, (seed,))
    sizes = {name: size(variable) for name, variable in save(state).items() if name in VARIABLES}
    if isinstance(optimizer, OnlineBlockADMM):
        chain = BlockOutputs(problem.blocks, state.theta, problem.visit([0], slice(optimizer.batch_size)))
        return sizes | {"z": size(chain.z), "z_moments": size(optimizer.z_update.moments(chain.z))}
    return sizes | {"z_moments": size(state.z_state.moments)}


def in_fresh_process(function: Callable[[Argument], float], argument: Argument) -> float:
    """Return a function's value in a new process whose allocator returns every tensor of 64 KiB or more to the system
    at once."""
    name, former = "MALLOC_MMAP_THRESHOLD_", os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ[name] = str(2**16)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, argument).result()
    finally:
        os.environ.pop(name) if former is None else os.environ.update({name: former})


def peak(config: str) -> float:
    """Return the most bytes that an iteration takes in this process beyond the data, the initial state included.

    They are bytes of the GPU's memory, or else of resident memory; NaN if the system does not count them.

    config: YAML.
    """
    options: Any = OmegaConf.create(config)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dataset = load_once(**options_of(options.dataset), device=device, dtype=DTYPES[options.dtype])
    problem = build_problem(options, dataset)
    optimizer = instantiate(options.optimizer, _convert_="all")

    def iterate(problem: Problem) -> None:
        optimizer.step(problem, optimizer.init(problem, options.seeds[:1]))

    iterate(replace(problem, x=problem.x[:WARM_SAMPLES], y=problem.y[:WARM_SAMPLES]))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        iterate(problem)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    before = resident("VmRSS")
    reset_high_water_mark()
    iterate(problem)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Return the resident bytes of this process (Linux): VmRSS now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def reset_high_water_mark() -> None:
    """Make the system count VmHWM from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
