"""Seconds and memory of an iteration on one process and on several, each of which has one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import save, size
from admm.parallel import Parallel
from experiments.checks import DTYPES
from experiments.errors import BadInput
from experiments.jobs import Job, load_once, options_of, run_once
from experiments.launch import Launch
from experiments.store import Run
from experiments.tasks.memory import reset_high_water_mark, resident
from experiments.training import prepared, write_start_record


def run(config: DictConfig, launch: Launch) -> None:
    """Measure a row, unless that has been done."""
    run_once(config, launch, measure)


def measure(config: DictConfig, job: Job) -> Run:
    """Put a row per number of processes into the store."""
    write_start_record(job.slot, job.info)
    return job.slot.complete(job.config, race(config, [(count, 1) for count in config.processes]), job.info)


def race(config: DictConfig, contestants: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Return what the fastest iteration costs on each number of processes and threads, which other work on the machine
    has disturbed least. They take turns, `config.turns` times."""
    turns = [[on_processes(config, *contestant) for contestant in contestants] for _ in range(config.turns)]
    return [min(of_one, key=lambda measured: measured["seconds"]) for of_one in zip(*turns, strict=True)]


def on_processes(config: DictConfig, processes: int, threads: int) -> dict[str, float]:
    """Return what the fastest iteration costs on so many new processes, each with so many threads: `seconds`; of the
    process that has most, `variables` and `peak` in bytes; of all processes, `added` and `sent` bytes (see
    `admm.parallel.Traffic`).

    `config.shared` says what is shared out, and `config.steps` how many iterations are timed after a first one. Raises
    BadInput with what a process has printed if it fails.
    """
    with TemporaryDirectory() as folder:
        asked, found = Path(folder, "asked.yaml"), Path(folder, "found.json")
        OmegaConf.save(config, asked, resolve=True)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", __name__, str(asked), str(found)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise BadInput(f"processes: {processes} of them failed:\n{done.stderr}")
        return json.loads(found.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def main(asked: str, found: str) -> None:
    """Measure as one of the processes; process 0 writes the result."""
    config: Any = OmegaConf.load(asked)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parallel, one = Parallel.join(config.shared), [config.seeds[0]]
    dataset = load_once(**options_of(config.dataset), device=torch.device("cpu"), dtype=DTYPES[config.dtype])
    before = resident("VmRSS")
    problem, optimizer, state = prepared(config, dataset, one, parallel)
    reset_high_water_mark()
    seconds, traffic = list[float](), parallel.traffic
    for _ in range(1 + config.steps):
        added, sent = traffic.added, traffic.sent
        parallel.any(False)  # all begin together
        start = time.perf_counter()
        optimizer.step(problem, state)
        told = [traffic.added - added, traffic.sent - sent]
        parallel.any(False)
        seconds.append(time.perf_counter() - start)
    of_all = parallel.all([size(save(state)), resident("VmHWM") - before, *told])
    if parallel.is_first:
        numbers = _joined(processes=parallel.size, seconds=seconds[1:], of_all=of_all)
        Path(found).write_text(json.dumps(numbers), encoding="utf-8")


def _joined(processes: int, seconds: Sequence[float], of_all: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the numbers of `on_processes` from the seconds, and the bytes of each process."""
    variables, peaks, added, sent = zip(*of_all, strict=True)
    largest = {"variables": max(variables), "peak": max(peaks)}
    return {
        "processes": processes,
        "seconds": min(seconds),
        **largest,
        "added": sum(added),
        "sent": sum(sent),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
