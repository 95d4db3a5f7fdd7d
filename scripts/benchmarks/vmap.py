"""Replicas by `torch.func.vmap` against ours: python -m scripts.benchmarks.vmap

A block's forward pass and both vector-Jacobian products, of its parameters and of its input, for S replicas in training
mode: by the stacked layers (linear, ReLU) or the loop over replicas with autograd (all others) of `admm.layers`, and by
`vmap` over `functional_call`. The gradients are compared first. Prints the seconds of `vmap` over ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vjp, vmap

from admm.blocks import flattened, split
from admm.models import initialiser, mlp, resnet18
from admm.visits import Visit
from scripts.benchmarks.bench import ratio, turns

REPLICAS = (1, 5, 45)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float, int]] = {  # network, mini-batch, …
    "digits_mlp": (lambda: mlp((1, 8, 8), (128, 128), 10), (64, 1, 8, 8), 1e-5, 900),
    "resnet18_width8": (lambda: resnet18((3, 32, 32), 10, width=8), (16, 3, 32, 32), 1e-2, 20),
}
Gradients = tuple[Tensor, Tensor]  # of all parameters [S, P] and of the input [S, n, ...]


def ours(network: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], Gradients]:
    blocks = split(network, n_blocks=1)
    theta = blocks.initial(range(len(x)), initialiser("pytorch"), like=x)
    gradient = blocks.gradient()

    def step() -> Gradients:
        _, saved = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
        grad_input = blocks[0].vjp(theta.blocks[0], saved, grad_output, gradient[0])
        assert grad_input is not None
        return flattened(blocks.total(gradient)), grad_input

    return step


def by_vmap(network: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], Gradients]:
    blocks = split(network, n_blocks=1)
    theta = blocks.initial(range(len(x)), initialiser("pytorch"), like=x)
    replicas = [dict(blocks.export(theta, s).named_parameters()) for s in range(len(x))]
    parameters = {name: torch.stack([r[name].detach() for r in replicas]) for name in replicas[0]}
    bare = replace_all_batch_norm_modules_(copy.deepcopy(network).train())  # running statistics move in place

    def one(parameters: dict[str, Tensor], x: Tensor, grad_output: Tensor) -> Gradients:
        pull = vjp(lambda p, v: functional_call(bare, p, (v,)), parameters, x)[1]
        grad_parameters, grad_input = pull(grad_output)
        return torch.cat([g.flatten() for g in grad_parameters.values()]), grad_input

    return lambda: vmap(one)(parameters, x, grad_output)


def repeat(task: Callable[[], Gradients], calls: int) -> None:
    for _ in range(calls):
        task()


def main() -> None:
    for name, (make, shape, tolerance, calls) in CASES.items():
        for replicas in REPLICAS:
            torch.manual_seed(0)
            network, x, grad_output = make(), torch.rand(replicas, *shape), torch.rand(replicas, shape[0], 10)
            tasks = ours(network, x, grad_output), by_vmap(network, x, grad_output)
            for mine, theirs in zip(*(task() for task in tasks), strict=True):
                assert (mine - theirs).norm() <= tolerance * mine.norm(), name
            times = turns(*(partial(repeat, task, calls // replicas + 1) for task in tasks))
            print(f"{name:16s} {replicas:3d} replicas: vmap takes {ratio(times, 1, 0):5.2f} times ours")


if __name__ == "__main__":
    main()
