"""The device of a run, and its threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from joblib import cpu_count, effective_n_jobs
from omegaconf import DictConfig

log = logging.getLogger(__name__)
THREADS = torch.get_num_threads()  # for a job whose `threads` is null


def ready_device(config: DictConfig, workers: int | None) -> torch.device:
    """Return the job's device, and set the number of PyTorch's threads. workers: as in `experiments.launch.Launch`.

    Raises ValueError for a device that cannot be used, or that lacks the precision.
    """
    device = find_device(config.device)
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is for GPUs; this is {device}")
    if config.precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning("precision: this CPU emulates bf16, which takes several times as long as fp32")
    torch.set_num_threads(config.threads or threads_of_a_worker(workers) or THREADS)
    return device


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Compute with 0 in place of numbers that are too small for full precision, with which CPUs are slow: Adam's
    moments of a weight that gets no gradient decay to them. docs/performance.md has what is gained.

    PyTorch's threads take the setting from the one that starts them, and keep it: this comes before what is parallel.
    It does not belong around what draws: Matplotlib 3.11 then labels a logarithmic axis from 1 on in another way.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def threads_of_a_worker(workers: int | None) -> int | None:
    """Return one worker's share of the CPU's threads; None if the launcher has no workers."""
    return None if workers is None else max(1, cpu_count() // effective_n_jobs(workers))


def find_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA where it is available. Raises ValueError for an unusable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # whose message lists all that PyTorch can be built for
        raise ValueError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:1, …") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({error}); auto, cpu, cuda, cuda:1, …") from None
    return device
