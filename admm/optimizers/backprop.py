"""Back-propagation through the whole network: the baselines SGD and Adam (paper, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from admm.blocks import Parameters
from admm.numbers import Options
from admm.optimizers.checks import check_minibatch_options
from admm.optimizers.coupling import Hyperparameters, Schedules
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.optimizers.rules import Moments, UpdateRule
from admm.optimizers.running import Runner
from admm.schedules import Value, schedule
from admm.visits import Visit


@dataclass(repr=False)
class BackpropState(ShortRepr):
    """Back-propagation's variables for S replicas.

    Attributes:
        seeds, iteration, theta, made_with: see `admm.optimizers.protocol.State`.
        moments: lists of those of `theta_update`, in the shapes of the parameters (Adam's count of steps is [S]).
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: Moments
    made_with: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Backprop(Options, Optimizer[BackpropState]):
    """Back-propagation: mini-batch steps of an update rule on the mean loss of a mini-batch.

    Args:
        iterations: the number of iterations, at which the schedules end.
        theta_update: the update rule, such as `Adam()` or `SGD(momentum=0.9)`.
        step_size: a number, one per replica, or a schedule of either, see `admm.schedules.schedule`.
        batch_size: the number of samples in a mini-batch.
        epoch_parts: an iteration is an epoch (None), or one of so many parts of it.

    Raises:
        ValueError: by `init`, for a value that is out of range, or an update rule that is none.

    >>> import torch
    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser
    >>> from admm.optimizers import SGD
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> blocks = split(torch.nn.Sequential(torch.nn.Linear(1, 1)), n_blocks=1)
    >>> problem = Problem(x, 3 * x, blocks, SquaredError(), initialiser("uniform", a=0.0, b=0.0))
    >>> optimizer = Backprop(iterations=1, theta_update=SGD(), step_size=[0.1, 0.2], batch_size=2)
    >>> state = optimizer.step(problem, optimizer.init(problem, seeds=[0, 0]))
    >>> state.theta.flat()  # the weight and the bias of two replicas
    tensor([[0.7500, 0.4500],
            [1.5000, 0.9000]])
    """

    parallel = ("samples",)

    iterations: int
    theta_update: UpdateRule
    step_size: Value
    batch_size: int = 64
    epoch_parts: int | None = None

    @property
    def keeps(self) -> dict[str, str]:
        return {"theta_update": self.theta_update.keeps}

    def init(self, problem: Problem, seeds: Sequence[int]) -> BackpropState:
        seeds = whole_seeds(seeds)
        check_minibatch_options(problem, seeds, self.iterations, self.theta_update, self.batch_size, self.epoch_parts)
        theta = problem.initial(seeds)
        schedule("step_size", self.step_size, len(seeds))
        return BackpropState(seeds, 0, theta, self.theta_update.init([*theta.stacks.values()]), made_with=self.keeps)

    def step(self, problem: Problem, state: BackpropState) -> BackpropState:
        count, visits = problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts)
        schedules = Schedules([schedule("step_size", self.step_size, len(state.seeds))], [])
        run = Runner(problem, self, (state,), schedules, count)
        for visit, row in zip(visits, run.rows([state.moments]), strict=True):
            run(visit, row)
        state.iteration += 1
        return state

    def visit(self, problem: Problem, state: BackpropState, visit: Visit, rounds: list[Hyperparameters]) -> None:
        """Move Θ once, in place, on the mean loss of a mini-batch."""
        (step,) = rounds[0].theta_steps
        gradient = mean_loss_gradient(problem, state.theta, visit)
        self.theta_update.update([*state.theta.stacks.values()], gradient, state.moments, step)

    def diagnostics(self, problem: Problem, state: BackpropState) -> dict[str, Tensor]:
        """Return the spectral norms `sigma_t` of blocks of one linear layer."""
        return spectral_norms(problem, state.theta)


def mean_loss_gradient(problem: Problem, theta: Parameters, visit: Visit) -> list[Tensor]:
    """Return the gradient of the mean loss of a visit's samples by parameter, in the order of `Parameters.stacks`.

    In training mode, running statistics in `theta` take the values that the evaluation gives them.
    """
    blocks, gradient = problem.blocks, problem.blocks.gradient()
    evaluations: list[tuple[Tensor, Any]] = []
    z = visit.x
    for block, views in zip(blocks, theta.blocks, strict=True):
        evaluations.append(block.linearize(views, z, visit))
        z = evaluations[-1][0]
    grad_output = problem.loss.gradient(z, visit.y).div_(visit.n)
    for t in reversed(range(len(blocks))):
        _, record = evaluations.pop()
        grad_input = blocks[t].vjp(theta.blocks[t], record, grad_output, gradient[t], t > 0, False)
        del record  # and the activations with it
        if grad_input is not None:
            grad_output = grad_input
    return problem.total_gradient(gradient)
