"""BlockProp (Gotmare et al. 2018): a quadratic penalty on gluing variables holds the blocks together, without duals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, has_type
from admm.numbers import Options
from admm.optimizers.checks import check_minibatch_options
from admm.optimizers.coupling import (
    AugmentedLagrangian,
    Hyperparameters,
    Schedules,
    StepSize,
    ZState,
    ZUpdate,
    coupling_values,
    label_leak,
    penalties,
    warn_of_lost_signal,
)
from admm.optimizers.fully_connected import Start, check_initial_names, set_initial_values
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.optimizers.rules import SGD, Adam, Moments, UpdateRule
from admm.optimizers.running import Runner
from admm.schedules import BlockValue, Value, block_schedules, block_values, schedule
from admm.visits import Visit

_CLIPPED = ZUpdate("clipped")


@dataclass(repr=False)
class GotmareState(ShortRepr):
    """BlockProp's variables for S replicas.

    Attributes:
        seeds, iteration, theta, made_with: see `admm.optimizers.protocol.State`.
        moments: lists of those of `theta_update`, in the shapes of the parameters (Adam's count of steps is [S]).
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: Moments
    made_with: dict[str, str] = field(default_factory=dict, kw_only=True)


class GluingTerms(AugmentedLagrangian):
    """Σ_{t<T} ρ/2 ‖z_t − block_t(z_{t−1})‖² + J(block_T(z_{T−1}), y), summed over the samples of a mini-batch.

    There is no z_T: J is block T's own term.
    """

    def value(self) -> Tensor:
        """Return the sum of all terms [S]."""
        value = self.loss.value(self.output(len(self.blocks)), self.visit.y).flatten(1).sum(1)
        for t in range(1, len(self.blocks)):
            value = value + self.coupling_value(t)
        return value

    def coupling_gradient(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return the negative gradient of block t's term by block_t(z_{t−1}); for t < T, it is the gradient by z_t."""
        if t == len(self.blocks):
            return self.loss.gradient(self.output(t, for_vjp), self.visit.y).neg()
        return super().coupling_gradient(t, for_vjp)

    def to_below(self, t: int, clip_for: StepSize | None = None) -> Tensor:
        """Return what `AugmentedLagrangian.to_below` does; J's own gradient is not clipped."""
        return super().to_below(t, None if t == len(self.blocks) else clip_for)


@dataclass(frozen=True)
class Gotmare(Options, Optimizer[GotmareState]):
    """BlockProp on mini-batches, in which a quadratic penalty on gluing variables holds the blocks together.

    It minimises, with gluing variables z_1..z_{T−1}, z_0 = x, and J summed over the mini-batch,

        J(block_T(z_{T−1}), y) + Σ_{t<T} ρ/2 ‖z_t − block_t(z_{t−1})‖²

    z starts with a forward pass and takes `z_rounds` rounds of steps, each from z_{T−1} to z_1; then each block takes
    one step on the mean of its term over the mini-batch. With one block this is back-propagation.

    After a cut weights and running statistics are those for gluing variables that have moved, while evaluation feeds
    these blocks a forward pass: for a large ζ the difference, of the weights above all, costs accuracy. The defaults
    are those of `OnlineBlockADMM` with ρ for β and ζ_{T−1} = 0.01, so that ρ_{T−1} = 100; where z_update is not
    "clipped", 0.01 and 5 stand for them. What is published has one ρ, and steps of z that are not clipped.

    Args:
        iterations: iterations until the schedules end, at least 1.
        theta_step: η ≥ 0, the step size of Θ; may have a schedule, and one value per replica.
        z_step: ζ_t ≥ 0, the step size of z_t; as theta_step, and one per gluing variable. None is for the values above.
        rho: ρ_t > 0, the penalties; one value per replica, and per gluing variable. None is for the values above.
        batch_size: samples per mini-batch, from 1 to N.
        epoch_parts: an iteration is an epoch (None), or one of so many parts of it.
        z_rounds: rounds from z_{T−1} to z_1 per mini-batch, at least 1.
        z_update: the optimizer of z, which starts again with each mini-batch. "clipped" stands for gradient steps that
            do not overshoot in the next block, see `ZUpdate`; `SGD()` for those as published.
        theta_update: the optimizer of Θ.

    Raises:
        ValueError: from `init`, with the name of an argument that is out of range or does not fit the problem.

    References:
        Gotmare, Thomas, Brea & Jaggi (2018), "Decoupling Backpropagation using Constrained Optimization Methods",
        https://infoscience.epfl.ch/entities/publication/b76600f5-d0cb-49d4-926f-c0df48f3471f
    """

    parallel = ("samples",)

    iterations: int
    theta_step: Value
    z_step: BlockValue | None = None
    rho: BlockValue | None = None
    batch_size: int = 64
    epoch_parts: int | None = None
    z_rounds: int = 1
    z_update: UpdateRule | Literal["clipped"] = "clipped"
    theta_update: UpdateRule = field(default_factory=Adam)

    @property
    def keeps(self) -> dict[str, str]:
        return {"theta_update": self.theta_update.keeps}

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> GotmareState:
        """Return Θ by the problem's initialisation, or `theta` of `start`, one tensor [S, P].

        Raises ValueError that names a hyperparameter, or for an initial value of another name or shape.
        """
        seeds = whole_seeds(seeds)
        check_initial_names(start, ("theta",))
        self._check(problem, seeds)
        theta = problem.initial(seeds)
        flat = theta.flat()
        set_initial_values("theta", [flat], start)
        theta.fill(flat)
        moments = self.theta_update.init([*theta.stacks.values()])
        return GotmareState(seeds, 0, theta, moments, made_with=self.keeps)

    def step(self, problem: Problem, state: GotmareState) -> GotmareState:
        """Do one iteration, an epoch or a part of one."""
        replicas = len(state.seeds)
        schedules, rho = self._schedules(problem, replicas), self._penalties(problem, replicas)
        count, visits = problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts)
        run = Runner(problem, self, (state, rho), schedules, count)
        for visit, row in zip(visits, run.rows([state.moments]), strict=True):
            run(visit, row)
        state.iteration += 1
        return state

    def visit(
        self, problem: Problem, state: GotmareState, rho: Tensor, visit: Visit, rounds: list[Hyperparameters]
    ) -> None:
        """Update z and Θ on a mini-batch, Θ in place."""
        (h,), gradient = rounds, problem.blocks.gradient()
        terms = GluingTerms(problem, state.theta, rho, visit)  # z by a forward pass
        self._update_z(terms, h)
        for t in range(1, len(problem.blocks) + 1):
            terms.vjp(t, terms.coupling_gradient(t).div_(-visit.n), grad_params=gradient)
        (step,) = h.theta_steps
        stacks = [*state.theta.stacks.values()]
        self.theta_update.update(stacks, problem.total_gradient(gradient), state.moments, step)

    def diagnostics(self, problem: Problem, state: GotmareState) -> dict[str, Tensor]:
        """Return the spectral norms `sigma_t`, and for more than one block `loss_forward` and `loss_moved` (see
        `label_leak`) of `batch_size` training samples with the last iteration's ζ."""
        leak = label_leak(problem, state.theta, self.batch_size, partial(self._after_z_update, problem, state))
        return leak | spectral_norms(problem, state.theta)

    def _after_z_update(self, problem: Problem, state: GotmareState, batch: Tensor) -> GluingTerms:
        """Return the terms of the samples [S, B] after an update of z with the last iteration's ζ."""
        h = self._schedules(problem, len(state.seeds)).at(max(state.iteration - 1, 0) / self.iterations)
        rho = self._penalties(problem, len(state.seeds))
        terms = GluingTerms(problem, state.theta, rho, problem.visit(state.seeds, batch))
        self._update_z(terms, h)
        return terms

    def _update_z(self, terms: GluingTerms, h: Hyperparameters) -> None:
        """Do the rounds from z_{T−1} to z_1, each step with the newest neighbours."""
        glued = range(1, len(terms.blocks))
        if isinstance(rule := self.z_update, str):
            for t in [*reversed(glued)] * self.z_rounds:
                _CLIPPED.update_z(terms, ZState(), t, h.z_steps[t - 1])
            return
        zeros = terms.z[0].new_zeros(self.z_rounds, len(terms.z[0]), dtype=torch.float64)
        moments = [rule.init([z]) for z in terms.z[:-1]]
        coefficients = [rule.coefficients(zeros + zeta, m) for zeta, m in zip(h.z_steps, moments, strict=True)]
        for n in range(self.z_rounds):
            for t in reversed(glued):
                gradient = terms.z_gradient(t)
                z = terms.z[t - 1].clone(memory_format=torch.contiguous_format)
                rule.apply_coefficients([z], [gradient], moments[t - 1], [c[n] for c in coefficients[t - 1]])
                terms.set_z(t, z)

    def _coupling_values(self, problem: Problem, n_replicas: int) -> tuple[BlockValue, BlockValue]:
        """Return ζ and ρ of the gluing variables, with values for None."""
        n_glued, is_clipped = len(problem.blocks) - 1, self.z_update == "clipped"
        return coupling_values(self.z_step, self.rho, n_glued, n_replicas, last=0.01, by_block=is_clipped, name="rho")

    def _schedules(self, problem: Problem, n_replicas: int) -> Schedules:
        z_step, _ = self._coupling_values(problem, n_replicas)
        return Schedules(
            theta_steps=[schedule("theta_step", self.theta_step, n_replicas)],
            z_steps=block_schedules("z_step", z_step, len(problem.blocks) - 1, n_replicas),
        )

    def _penalties(self, problem: Problem, n_replicas: int) -> Tensor:
        """Return ρ of each block, [T, S]; it is 1 for the last one, which has none."""
        n_blocks, (_, rho) = len(problem.blocks), self._coupling_values(problem, n_replicas)
        of_blocks = {"blocks": [*block_values("rho", rho, n_blocks - 1), 1.0]}
        return penalties(of_blocks, n_blocks, n_replicas, problem.like, name="rho")

    def _check(self, problem: Problem, seeds: Sequence[int]) -> None:
        n_replicas = len(seeds)
        check_minibatch_options(problem, seeds, self.iterations, self.theta_update, self.batch_size, self.epoch_parts)
        at_least_one("z_rounds", self.z_rounds)
        if self.z_update != "clipped":
            has_type("z_update", self.z_update, UpdateRule, 'admm.optimizers.SGD(); or give "clipped"')
        z_steps, rho = self._schedules(problem, n_replicas).z_steps, self._penalties(problem, n_replicas)
        is_clipped, dtype = self.z_update == "clipped", problem.like.dtype
        if z_steps and (is_clipped or isinstance(self.z_update, SGD)):
            warn_of_lost_signal(z_steps, rho[:-1].unbind(), dtype, self.theta_update, is_exact=is_clipped)
