"""Online Stochastic Block-ADMM (paper, Algorithm 2), whose coupling variables last for one mini-batch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, has_type, in_range, one_of
from admm.numbers import Options
from admm.optimizers.checks import check_minibatch_options
from admm.optimizers.coupling import (
    AugmentedLagrangian,
    Hyperparameters,
    Schedules,
    StepSize,
    ZState,
    ZUpdate,
    label_leak,
    penalties,
    update_theta,
)
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.optimizers.rules import Adam, Moments, UpdateRule
from admm.optimizers.running import Runner
from admm.schedules import BlockValue, Value, block_schedules, schedule
from admm.visits import Visit


@dataclass(repr=False)
class OnlineBlockADMMState(ShortRepr):
    """Online Block-ADMM's variables for T blocks, S replicas.

    Attributes:
        seeds, iteration, theta, made_with: see `admm.optimizers.protocol.State`.
        moments: lists of those of `theta_update`, in the shapes of the parameters (Adam's count of steps is [S]).
        u: one scalar dual per block, [T, S].
        z_state: see `ZState`; it has no moments, which last for one mini-batch only.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: Moments
    u: Tensor
    z_state: ZState
    made_with: dict[str, str] = field(default_factory=dict, kw_only=True)


class ScalarDuals(AugmentedLagrangian):
    """J(y, z_T) + Σ_t β_t/2 (‖z_t − block_t(z_{t−1})‖₂ + u_t)², summed over the samples of a mini-batch (Algorithm 2).

    The duals `u` are T tensors [S], which all samples share. The gradient of the norm at 0 is taken as 0.
    """

    def coupling_value(self, t: int) -> Tensor:
        """Return coupling term t [S]."""
        return self.beta[t - 1] / 2 * (self._norm(t) + self.u[t - 1].unsqueeze(1)).square().sum(1)

    def coupling_gradient(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return the gradient β_t (1 + u_t/‖r‖) r of coupling term t by z_t, with r = z_t − block_t(z_{t−1}).

        It is 0 at r = 0.
        """
        residual = self.residual(t, for_vjp)
        norm = _norms(residual)
        weight = torch.where(norm > 0, 1.0 + self.u[t - 1].unsqueeze(1) / norm, 0.0)
        residual.mul_(weight.view(*weight.shape, *[1] * (residual.ndim - 2)))
        return residual.mul_(self.weights[t - 1])

    def update_duals(self, step: StepSize) -> None:
        """Update u_t ← u_t + α mean ‖z_t − block_t(z_{t−1})‖₂ in place, with α = `step` (Algorithm 2, line 12)."""
        for t, u in enumerate(self.u, start=1):
            growth = self._norm(t).sum(1).mul_(step).div_(self.visit.n)
            self.problem.parallel.add_up(growth)
            u.add_(growth)

    def _norm(self, t: int) -> Tensor:
        """Return ‖z_t − block_t(z_{t−1})‖₂ of each sample, [S, n]."""
        return _norms(self.residual(t, for_vjp=False))


def _norms(values: Tensor) -> Tensor:
    """Return ‖·‖₂ [S, n] of each sample of values [S, n, …]."""
    norms: Tensor = torch.linalg.vector_norm(values.unsqueeze(2).flatten(2), dim=2)
    return norms


@dataclass(frozen=True)
class OnlineBlockADMM(Options, Optimizer[OnlineBlockADMMState]):
    """Online Stochastic Block-ADMM, the paper's Algorithm 2: coupling variables last for one mini-batch only.

    It minimises J(y, z_T) + Σ_t β_t/2 (‖z_t − block_t(z_{t−1})‖₂ + u_t)², summed over samples, with a scalar dual u_t
    per block. (Eq. 3 prints the coupling term as β_t/2 (‖·‖² + u_t), in which u_t has no gradient; this is that of
    Algorithm 2.) For each mini-batch: z by a forward pass, `z_update` in reverse order, one step of Θ on the mean over
    the mini-batch, and the duals.

    After a cut weights and running statistics are those for coupling variables that have moved, while evaluation feeds
    these blocks a forward pass: for a large ζ the difference, of the weights above all, costs accuracy.

    The defaults are β_t = 10 · 50^(T−t) and ζ_t = 1/β_t. As β_{t+1} ζ_t is 0.02, a step of z_t takes about a fiftieth
    of block t + 1's residual, and less where the block is so steep that the step is clipped. As β_t ζ_t is 1, the
    gradients by Θ have the scale of those by back-propagation: its step sizes fit, also for SGD, and the parts of the
    gradient of a weight that several blocks share. They tend to those gradients if the fiftieth goes to 0. Where only
    one of z_step and beta is given, the other is such that β_{t+1} ζ_t = 0.02, with ζ_T = 0.1. With duals, or for a
    z_update that is not "clipped", 0.1 and 0.5 stand for them in all blocks; the gradient of block t has the factor
    0.05^(T−t+1) then, hence the small ε of Adam. With the defaults networks of 3 to 16 blocks come near Adam by
    back-propagation, with batch normalisation, residuals, attention or ten times the loss too (docs/gallery.md). They
    depart from the paper, which has dual="paper" (Algorithm 2), beta=1, z_update=ZUpdate("adam") and duals that start
    at random (§4.1); here they start at 0.

    Args:
        iterations: iterations until the schedules end, at least 1.
        theta_step: η ≥ 0, the step size of Θ; may have a schedule, and one value per replica.
        z_step: ζ_t ≥ 0, the step size of z_t; as theta_step, and one per block. None is for the values above.
        beta: β_t > 0, the penalties; one value per replica, and per block. None is for the values above.
        batch_size: samples per mini-batch, from 1 to N.
        epoch_parts: an iteration is an epoch (None), or one of so many parts of it.
        z_update: the update of z by its gradient; with a dual, whose term is not quadratic in z, it must be "adam",
            "gradient" or "clipped", with output_update="step".
        theta_update: the optimizer of Θ.
        dual: "paper": u_t grows by the mean over the mini-batch of ‖z_t − block_t(z_{t−1})‖₂ (printed for one sample at
            a time; a sum would make it grow `batch_size` times faster). "reset": the same, from 0 at the beginning of
            each epoch. "decay": the same, with u_t multiplied by `dual_decay` before. "none": u_t = 0, a quadratic
            penalty.
        dual_decay: ≥ 0, for dual="decay".
        curvature_every: mini-batches between two evaluations of the Z update's curvature, at least 1.

    Raises:
        ValueError: from `init`, with the name of an argument that is out of range or does not fit the problem.

    References:
        Khorram, Fu, Danesh, Qi & Li (2021), "Stochastic Block-ADMM for Training Deep Networks",
        https://arxiv.org/abs/2105.00339
    """

    parallel = ("samples",)

    iterations: int
    theta_step: Value
    z_step: BlockValue | None = None
    beta: BlockValue | None = None
    batch_size: int = 64
    epoch_parts: int | None = None
    z_update: ZUpdate = field(default_factory=lambda: ZUpdate("clipped"))
    theta_update: UpdateRule = field(default_factory=lambda: Adam(epsilon=1e-10))
    dual: Literal["paper", "reset", "decay", "none"] = "none"
    dual_decay: float = 0.9
    curvature_every: int = 1

    @property
    def keeps(self) -> dict[str, str]:
        return {"theta_update": self.theta_update.keeps, "z_update": self.z_update.keeps(moments=False)}

    def init(self, problem: Problem, seeds: Sequence[int]) -> OnlineBlockADMMState:
        """Return Θ by the problem's initialisation, and u = 0."""
        seeds = whole_seeds(seeds)
        self._check(problem, seeds)
        theta = problem.initial(seeds)
        beta = self._penalties(problem, len(seeds))
        self.z_update.check(problem, theta, self._schedules(*beta.shape).z_steps, beta, self.theta_update)
        return OnlineBlockADMMState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=self.theta_update.init([*theta.stacks.values()]),
            u=torch.zeros_like(beta),
            z_state=self.z_update.init(problem.blocks, theta),
            made_with=self.keeps,
        )

    def step(self, problem: Problem, state: OnlineBlockADMMState) -> OnlineBlockADMMState:
        """Do one iteration of Algorithm 2, an epoch or a part of one."""
        schedules, replicas = self._schedules(*state.u.shape), len(state.seeds)
        beta = self._penalties(problem, replicas)
        if self.dual == "reset" and state.iteration % (self.epoch_parts or 1) == 0:
            state.u.zero_()
        count, visits = problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts)
        run = Runner(problem, self, (state, beta), schedules, count)
        for number, (visit, row) in enumerate(zip(visits, run.rows([state.moments]), strict=True)):  # line 4
            run(visit, row, is_curved=number % self.curvature_every == 0)
        state.iteration += 1
        return state

    def visit(
        self,
        problem: Problem,
        state: OnlineBlockADMMState,
        beta: Tensor,
        visit: Visit,
        rounds: list[Hyperparameters],
        is_curved: bool,
    ) -> None:
        """Do lines 5 to 12 of Algorithm 2 on a mini-batch, in place; `is_curved` evaluates the curvature anew."""
        (h,) = rounds
        if is_curved:
            self.z_update.update_curvature(problem.blocks, state.theta, beta, state.z_state)
        lagrangian, z_state = self._start(problem, state, beta, visit)  # line 5: z by a forward pass
        self.z_update.step(lagrangian, z_state, h.z_steps)  # lines 6 to 9: z_T … z_1
        update_theta(lagrangian, self.theta_update, state.moments, h.theta_steps)  # line 11: Θ
        if self.dual == "decay":
            state.u *= self.dual_decay
        lagrangian.update_duals(step=1.0)  # line 12: u

    def _start(
        self, problem: Problem, state: OnlineBlockADMMState, beta: Tensor, visit: Visit
    ) -> tuple[AugmentedLagrangian, ZState]:
        """Return the Lagrangian of a mini-batch with z by a forward pass, and the Z update's state."""
        if self.dual == "none":
            lagrangian = AugmentedLagrangian(problem, state.theta, beta, visit)
        else:
            lagrangian = ScalarDuals(problem, state.theta, beta, visit, u=state.u.unbind())
        return lagrangian, replace(state.z_state, moments=self.z_update.moments(lagrangian.z))

    def diagnostics(self, problem: Problem, state: OnlineBlockADMMState) -> dict[str, Tensor]:
        """Return the spectral norms `sigma_t`, with a dual `dual_t` = u_t, and for more than one block `loss_forward`
        and `loss_moved` (see `label_leak`) of `batch_size` training samples with the last iteration's ζ."""
        duals = {f"dual_{t}": u.clone() for t, u in enumerate(state.u, start=1)} if self.dual != "none" else {}
        leak = label_leak(problem, state.theta, self.batch_size, partial(self._after_z_update, problem, state))
        return duals | leak | spectral_norms(problem, state.theta)

    def _after_z_update(self, problem: Problem, state: OnlineBlockADMMState, batch: Tensor) -> AugmentedLagrangian:
        """Return the Lagrangian of the samples [S, B] after an update of z with the last iteration's ζ."""
        h = self._schedules(*state.u.shape).at(max(state.iteration - 1, 0) / self.iterations)
        beta = self._penalties(problem, len(state.seeds))
        lagrangian, z_state = self._start(problem, state, beta, problem.visit(state.seeds, batch))
        z_state = z_state.with_own_curvature()
        self.z_update.update_curvature(problem.blocks, state.theta, beta, z_state)
        self.z_update.step(lagrangian, z_state, h.z_steps)
        return lagrangian

    def _penalties(self, problem: Problem, n_replicas: int) -> Tensor:
        _, beta = self._coupling_values(len(problem.blocks), n_replicas)
        return penalties(beta, len(problem.blocks), n_replicas, problem.like)

    def _coupling_values(self, n_blocks: int, n_replicas: int) -> tuple[BlockValue, BlockValue]:
        is_anew = self.dual == "none"
        return self.z_update.coupling_values(self.z_step, self.beta, n_blocks, n_replicas, is_anew)

    def _schedules(self, n_blocks: int, n_replicas: int) -> Schedules:
        z_step, _ = self._coupling_values(n_blocks, n_replicas)
        return Schedules(
            theta_steps=[schedule("theta_step", self.theta_step, n_replicas)],
            z_steps=block_schedules("z_step", z_step, n_blocks, n_replicas),
        )

    def _check(self, problem: Problem, seeds: Sequence[int]) -> None:
        check_minibatch_options(problem, seeds, self.iterations, self.theta_update, self.batch_size, self.epoch_parts)
        has_type("z_update", self.z_update, ZUpdate, 'admm.optimizers.ZUpdate("clipped")')
        one_of("dual", self.dual, ("paper", "reset", "decay", "none"))
        at_least_one("curvature_every", self.curvature_every)
        in_range("dual_decay", self.dual_decay)
        z_update = self.z_update
        if self.dual != "none" and (z_update.output_update == "prox" or z_update.name in ("lipschitz", "majorised")):
            raise ValueError(
                f"dual: {self.dual!r} is not quadratic in Z: it needs a z_update with output_update='step' and name "
                "'adam', 'gradient' or 'clipped'"
            )
