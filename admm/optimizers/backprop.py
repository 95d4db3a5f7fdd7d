"""Back-propagation through the whole network: the baselines SGD and Adam (paper, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.minibatches import check_batch_size
from admm.numbers import Options
from admm.optimizers.protocol import Problem, at_least_one, has_method, spectral_norms, whole_seeds
from admm.optimizers.rules import UpdateRule
from admm.schedules import Value, schedule


@dataclass
class BackpropState:
    """theta: parameters [S, P]. moments: the rule's, each [S, P] (Adam's count of steps is [S])."""

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[Tensor]


@dataclass(frozen=True)
class Backprop(Options):
    """Mini-batch training on the mean loss of a mini-batch, by an update rule; an iteration is an epoch."""

    iterations: int  # the schedules' horizon
    update: UpdateRule
    step_size: Value
    batch_size: int = 64
    epoch_parts: int | None = None  # an iteration is an epoch, or one of so many parts of it

    def init(self, problem: Problem, seeds: Sequence[int]) -> BackpropState:
        seeds = whole_seeds(seeds)
        has_method("update", self.update, "apply", "admm.optimizers.Adam()")
        at_least_one("iterations", self.iterations)
        check_batch_size(self.batch_size, len(problem.x), self.epoch_parts)
        theta = problem.initial(seeds)
        schedule("step_size", self.step_size, len(seeds))
        return BackpropState(seeds, 0, theta, self.update.init(theta.flat))

    def step(self, problem: Problem, state: BackpropState) -> BackpropState:
        blocks, theta = problem.blocks, state.theta
        step_size = schedule("step_size", self.step_size, len(state.seeds))
        gradient = blocks.parameters(torch.empty_like(theta.flat))
        for part, z, y in problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts):
            evaluations: list[tuple[Tensor, Any]] = []
            for block, views in zip(blocks, theta.blocks, strict=True):
                evaluations.append(block.linearize(views, z, training=True))
                z = evaluations[-1][0]
            grad_output = problem.loss.gradient(z, y).div_(y.shape[1])
            for t in reversed(range(len(blocks))):
                _, record = evaluations.pop()
                pulled = blocks[t].vjp(theta.blocks[t], record, grad_output, gradient.blocks[t], t > 0)
                del record  # and the activations with it
                if pulled is not None:
                    grad_output = pulled
            progress = (state.iteration + part) / self.iterations
            self.update.apply(theta.flat, gradient.flat, state.moments, step_size(progress))
        state.iteration += 1
        return state

    def parameters(self, state: BackpropState) -> Parameters:
        return state.theta

    def diagnostics(self, problem: Problem, state: BackpropState) -> dict[str, Tensor]:
        return spectral_norms(problem, state.theta)
