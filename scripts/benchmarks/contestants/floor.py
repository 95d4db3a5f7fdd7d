"""What an epoch of an optimizer cannot go below: its matrix products and updates of the parameters, and nothing else.

The calls of two or three mini-batches are recorded with their tensors, and a chunk repeats as many of them as a part of
an epoch has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from scripts.benchmarks.contestants.ours import build

UPDATES = {"_fused_adam_", "_fused_adamw_", "_fused_sgd_"}  # for gradient, value and moments of all parameters


class Recorder(TorchDispatchMode):
    """Keeps the calls of products and fused updates, and counts the FLOPs of the products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=output)
        if count is not None or function.overloadpacket.__name__ in UPDATES:
            self.calls.append(partial(function, *args, **kwargs))
        return output


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    batches = -(-spec["samples"] // spec["batch_size"])
    pairs = batches // 2  # since some of the work is done at every second mini-batch
    optimizer, problem, state = build(
        spec | {"optimizer": spec["optimizer"] | {"epoch_parts": pairs}, "compile": False}
    )
    optimizer.step(problem, state)  # which begins with what later steps need not do
    with Recorder() as recorder:
        optimizer.step(problem, state)
    recorded = 2 * batches // pairs - batches // pairs
    needed, calls = round(len(recorder.calls) / recorded * batches / spec["parts"]), cycle(recorder.calls)

    def chunk() -> None:
        for call in islice(calls, needed):
            call()

    return chunk, {"flops": recorder.flops / recorded, "batches": batches / spec["parts"]}
