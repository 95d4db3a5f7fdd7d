"""No contestant, but a mini-batch's time by part, under PyTorch's profiler, which is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile

from scripts.benchmarks.contestants.ours import build, ready

PARTS = {  # of operations, by what their names have in them
    "fused_kernels": ("cpp_fused",),  # of compiled mini-batches
    "products": ("::mm", "::bmm", "addmm", "baddbmm", "cpu_mm", "cpu_bmm"),
    "updates": ("_fused_adam", "_fused_sgd"),
    "gathering": ("::index", "::gather", "::randperm", "::sort"),
    "other_operations": ("aten::", "inductor", "prims"),
}
REST = "python"


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    return lambda: None, {"parts": profiled(spec)[1]}


def profiled(spec: dict[str, Any]) -> tuple[profile, dict[str, float]]:
    """Profile a part of an epoch, after an epoch without. Returns the profiler, and seconds of a mini-batch by part."""
    ready(spec)
    optimizer, problem, state = build(spec)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):  # name the fused kernels
        for _ in range(spec["warm_up"]):
            optimizer.step(problem, state)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        optimizer.step(problem, state)
        whole = time.perf_counter() - start
    batches = -(-spec["samples"] // spec["batch_size"]) // spec["parts"]
    seconds = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.key_averages():
        seconds[part_of(event.key)] += 1e-6 * event.self_cpu_time_total / batches
    in_operations = sum(seconds[part] for part in PARTS)
    return profiler, seconds | {REST: whole / batches - in_operations}


def part_of(operation: str) -> str:
    return next((part for part, marks in PARTS.items() if any(mark in operation for mark in marks)), REST)
