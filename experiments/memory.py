"""The paper's memory claim (§4.1): bytes of training variables of batch and online Block-ADMM, and a process's peak."""

from __future__ import annotations

import multiprocessing
import os
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from admm.files import MIB
from admm.optimizers import BlockADMM, OnlineBlockADMM, Problem
from admm.optimizers.coupling import BlockOutputs
from admm.optimizers.protocol import save, size
from experiments.checks import DTYPES
from experiments.classification import (
    Job,
    bad_input_in_words,
    build_problem,
    find_device,
    load_once,
    note_start,
    run_once,
)
from experiments.report import COLOURS, Content, in_figure, paper
from experiments.store import Run

WARM_SAMPLES = 2000  # of the iteration before the baseline of the peak: the libraries' own memory is nobody's
NAMES = {"theta": "Θ", "moments": "moments of Θ", "z": "Z", "u": "U", "z_moments": "moments of Z"}


def run(config: DictConfig) -> None:
    """Measure one optimizer, unless it has been done."""
    run_once(config, measure)


def measure(config: DictConfig, job: Job) -> Run:
    """Bytes by variable for one seed, and the peak of a training iteration in a process of its own."""
    with bad_input_in_words():
        sizes = variables(config, build_problem(config, job.dataset), config.seeds[0])
    note_start(job.slot, job.info)
    rows: list[dict[str, Any]] = [{"quantity": name, "bytes": size} for name, size in sizes.items()]
    rows.append({"quantity": "peak", "bytes": peak_in_fresh_process(config)})
    return job.slot.complete(job.config, rows, job.info)


def variables(config: DictConfig, problem: Problem, seed: int) -> dict[str, int]:
    """Bytes of a seed's training variables by name: those of `NAMES` in its state, for the online form of a mini-batch.

    Raises ValueError for another optimizer.
    """
    optimizer = instantiate(config.optimizer, _convert_="all")
    if not isinstance(optimizer, BlockADMM | OnlineBlockADMM):
        raise ValueError(
            f"optimizer: memory is measured of block_admm and online_block_admm, not {config.optimizer._target_}"
        )
    state = optimizer.init(problem, (seed,))
    sizes = {name: size(variable) for name, variable in save(state).items() if name in NAMES}
    if isinstance(optimizer, OnlineBlockADMM):
        chain = BlockOutputs(problem.blocks, state.theta, problem.x[None, : optimizer.batch_size])
        return sizes | {"z": size(chain.z), "z_moments": size(optimizer.z_update.moments(chain.z))}
    return sizes | {"z_moments": size(state.z_state.moments)}


def peak_in_fresh_process(config: DictConfig) -> float:
    """`peak` in a process whose allocator returns every tensor of 64 KiB or more to the system at once."""
    name, former = "MALLOC_MMAP_THRESHOLD_", os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ[name] = str(2**16)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak, OmegaConf.to_yaml(config, resolve=True)).result()
    finally:
        os.environ.pop(name) if former is None else os.environ.update({name: former})


def peak(config: str) -> float:
    """Most bytes in an iteration beyond the data, the initial state included, for this process only; NaN if the
    system does not tell. On a GPU of its memory, else resident.

    config: YAML.
    """
    options: Any = OmegaConf.create(config)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dataset = load_once(**options.dataset, device=device, dtype=DTYPES[options.dtype])
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
    """Bytes of this process: VmRSS now, or VmHWM, the most since the last reset (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def reset_high_water_mark() -> None:
    """From here on VmHWM is counted anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def report(experiment: str, runs: list[Run]) -> Content:
    """MiB by variable, how many times more the batch form takes than each, and the bars."""
    shown = sorted(runs, key=lambda run: (run.info["setting"], run.info["method"]))
    result = pd.DataFrame([row(run) for run in shown], index=[run.name for run in shown])
    batch = {run.info["setting"]: size for run, size in zip(shown, result["total"], strict=True) if _is_batch(run)}
    result["batch/this"] = [batch.get(run.info["setting"], float("nan")) for run in shown] / result["total"]
    result["paper"] = [paper()["experiments"][experiment]["ratio"].get(run.info["method"], 1.0) for run in shown]
    result["machine"] = [run.info["machine"] for run in shown]
    return result, {experiment: figure(experiment, result)}


def row(run: Run) -> dict[str, Any]:
    """A run's line of the table, MiB a seed."""
    sizes = run.history.set_index("quantity")["bytes"] / MIB
    named = {label: float(sizes.get(name, 0.0)) for name, label in NAMES.items()}
    info = run.info
    setting = ", ".join([info["setting"], *info["overrides"]])
    named |= {"total": sum(named.values()), "peak of the process": float(sizes["peak"])}
    return {"method": paper()["labels"].get(info["method"], info["method"]), "setting": setting} | named


def figure(experiment: str, result: pd.DataFrame) -> Figure:
    """A stacked bar for each run, its total and the process's peak in figures."""
    drawn = Figure(figsize=(8.0, 1.6 + 0.6 * len(result)), layout="constrained")
    axes = drawn.subplots()
    labels = [
        in_figure(f"{method}\n{setting}") for method, setting in zip(result["method"], result["setting"], strict=True)
    ]
    left = 0.0 * result["total"]
    for colour, name in zip(COLOURS.values(), NAMES.values(), strict=False):
        axes.barh(labels, result[name], left=left, color=colour, label=name)
        left = left + result[name]
    for height, line in enumerate(result.to_dict("records")):
        less = f", {line['batch/this']:.0f} times less" if line["batch/this"] > 1 else ""
        text = f" {line['total']:.1f} MiB{less}; process {line['peak of the process']:.1f} MiB"
        axes.text(line["total"], height, text, va="center", fontsize=8)
    axes.set(xlabel="training variables of one seed (MiB)", xlim=(0, 1.6 * result["total"].max()))
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")
    known = paper()["experiments"][experiment]
    less = f"{known['ratio']['online_block_admm']:g} times less online"
    remark = f"process: the most that an iteration takes beyond the data; the paper: {less}"
    drawn.supxlabel(textwrap.fill(f"{known['caption']}; {remark}.", 120), fontsize=8)
    return drawn


def _is_batch(run: Run) -> bool:
    return bool(run.info["method"] == "block_admm")
