"""An optimizer of whatever checkout `admm` is imported from: a chunk is a part of an epoch.

The settings have today's names. Where a class of an older checkout does not know one, it gets the name from then.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch

import admm
from admm.blocks import Execution, split  # type: ignore[attr-defined]
from admm.losses import one_hot
from admm.optimizers import Problem


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    ready(spec)
    optimizer, problem, state = build(spec)
    return lambda: optimizer.step(problem, state), {"checkout": admm.__path__[0]}


def ready(spec: dict[str, Any]) -> None:
    """Set the process up as the experiments do, before anything that is parallel."""
    torch.set_num_threads(spec["threads"])
    torch.set_flush_denormal(spec["flush"])


def build(spec: dict[str, Any]) -> tuple[Any, Problem, Any]:
    """Return the optimizer, the problem, with generated data, and the state before the first chunk."""
    former, features, classes = spec["former"], spec["features"], spec["classes"]
    random = torch.Generator().manual_seed(0)
    x = spec["largest"] * torch.rand(spec["samples"], features, generator=random)
    x *= torch.rand(x.shape, generator=random) < 10 ** torch.linspace(-5, 0, features)  # as in digits, most are rare
    y = one_hot(torch.randint(classes, (len(x),), generator=random), classes, x)
    x, y = x.to(spec["device"]), y.to(spec["device"])
    network = make(spec["model"], former, input_shape=features, classes=classes)
    blocks = split(network, **spec["split"], execution=Execution(compile=spec["compile"]))
    problem = Problem(x, y, blocks, make(spec["loss"], former), make(spec["init"], former))
    optimizer = make(spec["optimizer"], former)
    return optimizer, problem, optimizer.init(problem, spec["seeds"])


def make(node: dict[str, Any], former: dict[str, list[str]], **more: Any) -> Any:
    """Return what `_target_` makes of a node's keys, each by the first of its names that it takes."""
    module, name = node["_target_"].rsplit(".", 1)
    target = getattr(import_module(module), name)
    taken = signature(target).parameters
    arguments = {}
    for key, value in node.items():
        if key != "_target_":
            names = [key, *former.get(f"{name}.{key}", [])]
            is_object = isinstance(value, dict) and "_target_" in value
            arguments[next((n for n in names if n in taken), key)] = make(value, former) if is_object else value
    return target(**arguments, **more)
