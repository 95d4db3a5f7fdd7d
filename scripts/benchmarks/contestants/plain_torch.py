"""The training loop as most would write it: `nn.Module`, `MSELoss` on one-hot targets, `torch.optim`.

A chunk is a part of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

RULES = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    samples, classes, hidden = spec["samples"], spec["classes"], spec["model"]["hidden"]
    x, labels = spec["largest"] * torch.rand(samples, spec["features"]), torch.randint(classes, (samples,))
    x *= torch.rand(x.shape) < 10 ** torch.linspace(-5, 0, spec["features"])
    y = one_hot(labels, classes).float()
    network = mlp([spec["features"], *hidden, classes])
    rule = RULES[spec["method"]](
        network.parameters(),
        lr=spec["optimizer"]["step_size"]["start"],
        weight_decay=spec["optimizer"]["theta_update"]["weight_decay"],
    )
    parts = part_of_epochs(samples, spec["batch_size"], spec["parts"])
    return lambda: train(network, rule, ((x[indices], y[indices]) for indices in next(parts))), {}


def mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def part_of_epochs(samples: int, batch_size: int, parts: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the mini-batches' indices of one part of an epoch after another."""
    while True:
        batches = torch.randperm(samples).split(batch_size)
        for part in range(parts):
            yield batches[part * len(batches) // parts : (part + 1) * len(batches) // parts]


def train(network: nn.Module, rule: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
    loss = nn.MSELoss()
    for x, y in batches:
        rule.zero_grad()
        loss(network(x), y).backward()
        rule.step()
