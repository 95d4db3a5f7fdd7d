"""A product of two large matrices, which measures the peak of the machine: a chunk is one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LARGE = 2048  # rows and columns


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    left, right = torch.rand(2, LARGE, LARGE)
    out = torch.empty(LARGE, LARGE)
    return lambda: torch.mm(left, right, out=out), {"flops": 2 * LARGE**3}
