"""Stochastic Block-ADMM (paper, Algorithm 1), which stores the coupling variables and duals of all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, has_type, in_range, one_of
from admm.minibatches import minibatches, slices
from admm.numbers import Options, is_number
from admm.optimizers.checks import check_last_part, check_minibatch_options, same_samples
from admm.optimizers.coupling import (
    AugmentedLagrangian,
    Hyperparameters,
    Schedules,
    StepSize,
    ZState,
    ZUpdate,
    gather,
    is_held,
    label_leak,
    mixing_schedule,
    penalties,
    scatter,
    update_theta,
)
from admm.optimizers.fully_connected import sample_initial_values
from admm.optimizers.pipeline import Part, Pipeline, pass_down
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.optimizers.rules import Adam, Moments, UpdateRule
from admm.optimizers.running import Runner
from admm.placement import PLACES, Place, allocate
from admm.schedules import BlockValue, Schedule, Value, block_schedules, broadcast, schedule
from admm.visits import Visit

_Z, _THETA, _DUALS = range(3)  # what a batch sweep visits the samples for, in the counter of the visit
BatchT = TypeVar("BatchT", Tensor, slice)  # indices [S, B] of a mini-batch, or consecutive samples


@dataclass(repr=False)
class BlockADMMState(ShortRepr):
    """Block-ADMM's variables for T blocks, N samples, S replicas.

    Attributes:
        seeds, iteration, theta, made_with: see `admm.optimizers.protocol.State`.
        moments: lists of those of `theta_update`, in the shapes of the parameters (Adam's count of steps is [S]).
        z, u: coupling variables Z_t and scaled duals U_t, T tensors [S, N, d_t] each.
        z_state: see `ZState`; its moments are [S, N, d_t].
        beta: penalties [T, S].
    """

    of_samples = ("z", "u", "z_state.moments")

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: Moments
    z: list[Tensor]
    u: list[Tensor]
    z_state: ZState
    beta: Tensor
    made_with: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class AdaptivePenalty(Options):
    """Eq. 6, ρ = 1/β: β grows by 1/c whenever the constraint residual ‖h‖ exceeds η_k = `bound` · `shrink`^k.

    ‖h‖ = (Σ_t ‖Z_t − block_t(Z_{t−1})‖² / N)^½, so that `bound` does not depend on N.

    Args:
        c: a number between 0 and 1.
        bound: η_0 ≥ 0.
        shrink: the factor ≥ 0 by which η_k shrinks per iteration.
        largest: a number > 0; β does not grow beyond it.

    Raises:
        ValueError: with the name of an argument that is out of range.
    """

    c: float = 0.9
    bound: float = 1.0
    shrink: float = 0.95
    largest: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.c) or not 0.0 < self.c < 1.0:
            raise ValueError(f"c: {self.c} is not between 0 and 1 (Eq. 6)")
        in_range("bound", self.bound)
        in_range("shrink", self.shrink)
        if self.largest != math.inf and (not is_number(self.largest) or self.largest <= 0.0):
            raise ValueError(f"largest: {self.largest} is not positive")

    def eta(self, iteration: int) -> float:
        """Return η_k for the k-th iteration, counted from 1."""
        return self.bound * self.shrink**iteration

    def factor(self, beta: Tensor, residual: Tensor, iteration: int) -> Tensor:
        """Return the factors [T, S] of β [T, S] for a norm of the residual [S] after `iteration` iterations."""
        grows = (residual > self.eta(iteration)) & (beta / self.c <= self.largest)
        return torch.where(grows, torch.full_like(beta, 1.0 / self.c), 1.0)


def update_minibatch(
    lagrangian: AugmentedLagrangian,
    z_update: ZUpdate,
    z_state: ZState,
    update: Callable[[AugmentedLagrangian, Hyperparameters], None],
    rounds: Sequence[Hyperparameters],
) -> None:
    """Do lines 5 to 12 of Algorithm 1 on the samples of a mini-batch alone.

    Each round is a primal update, with Θ by `update`.
    """
    lagrangian.mix_with_forward(rounds[0].mixing)
    for h in rounds:
        z_update.step(lagrangian, z_state, h.z_steps)  # lines 5 to 8: Z_T … Z_1
        update(lagrangian, h)  # line 10: Θ
    lagrangian.update_duals(rounds[0].dual_step)  # line 12: U


def _set_penalties(state: BlockADMMState, beta: Tensor, factor: Tensor) -> None:
    """Give β [T, S] its new values. U is divided by their factor, so that λ = β U stays the same (Eq. 5b, 6)."""
    state.beta.copy_(beta)
    for u, f in zip(state.u, factor, strict=True):
        u.div_(broadcast(f, u))


@dataclass(frozen=True)
class BlockADMM(Options, Optimizer[BlockADMMState]):
    """Stochastic Block-ADMM, the paper's Algorithm 1, with options for what it leaves open and for departures from it.

    It minimises Eq. 2, J(Y, Z_T) + Σ_t β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖², over Z and Θ. J is the sum over samples;
    the gradient by Θ is a mini-batch's mean of Σ_t β_t/2 ‖·‖². Batch normalisation takes the statistics of the samples
    that are evaluated together: of a mini-batch, and in the batch sweeps of Z and U of `slice_size` samples.

    The defaults start Z from a forward pass at each visit, without duals, which makes the steps of Θ those of
    `OnlineBlockADMM`, whose defaults they share. (With duals, mixing below 1, several rounds or sweep="batch", z_step
    is 0.1 and beta 0.5 by default, as there with duals.) With Z that lag behind a forward pass, or duals that add the
    lag up, no value tried trained networks of 3 to 10 blocks alike. They depart from the paper, which has
    sweep="batch", dual_step=1 and forward_mixing=0 (Algorithm 1), and beta=1, primal_rounds=3, z_update=ZUpdate("adam")
    and uniform duals of a range that it does not give (§4.1).

    Args:
        iterations: iterations until the schedules end, at least 1.
        theta_step: η ≥ 0, the step size of Θ; may have a schedule, and one value per replica.
        z_step: ζ_t ≥ 0, the step size of Z_t; as theta_step, and one per block. None is for the values that
            `OnlineBlockADMM` tells.
        beta: β_t > 0, the penalties; one value per replica, and per block. None as for z_step.
        sweep: "batch" is Algorithm 1: `primal_rounds` times all of Z and then Θ by mini-batches, and at the end all of
            U. "minibatch" visits mini-batches in Gauss-Seidel order, each with its Z, Θ and U before the next one's.
        batch_size: samples per mini-batch, from 1 to N.
        epoch_parts: with sweep="minibatch", an iteration is an epoch (None), or one of so many parts of it.
        primal_rounds: primal updates, Z and then Θ, per iteration or visit, at least 1.
        primal_growth: ≥ 0, the number of rounds that each iteration adds: 0.1 adds one every tenth iteration (after
            Proposition 1). None is for a constant number.
        theta_passes: > 0, with sweep="batch" the passes of Θ over the samples per round; a number below 1 visits a part
            of the mini-batches.
        z_update: the update of Z by its gradient.
        theta_update: the optimizer of Θ.
        dual_step: α ≥ 0, the part of the residual that U grows by, 1 in Algorithm 1; as theta_step.
        dual_init: ≥ 0; U starts uniform on (0, dual_init).
        forward_mixing: from 0 to 1, the part of the way to a forward pass that each visit first moves Z; as theta_step.
        curvature_every: visits of a mini-batch between two evaluations of the Z update's curvature, at least 1.
        penalty: Eq. 6, or None for a constant β.
        slice_size: samples that a batch sweep holds in the CPU's cache at a time, at least 1.
        sample_storage: the place of Z, U and the moments of Z, see `admm.placement.allocate`: "device", "host", "disk".

    Raises:
        ValueError: from `init`, with the name of an argument that is out of range or does not fit the problem.

    References:
        Khorram, Fu, Danesh, Qi & Li (2021), "Stochastic Block-ADMM for Training Deep Networks",
        https://arxiv.org/abs/2105.00339
    """

    parallel = ("samples", "blocks")

    iterations: int
    theta_step: Value
    z_step: BlockValue | None = None
    beta: BlockValue | None = None
    sweep: Literal["batch", "minibatch"] = "minibatch"
    batch_size: int = 64
    epoch_parts: int | None = None
    primal_rounds: int = 1
    primal_growth: float | None = None
    theta_passes: float = 1.0
    z_update: ZUpdate = field(default_factory=lambda: ZUpdate("clipped"))
    theta_update: UpdateRule = field(default_factory=lambda: Adam(epsilon=1e-10))
    dual_step: Value = 0.0
    dual_init: float = 0.0
    forward_mixing: Value = 1.0
    curvature_every: int = 1
    penalty: AdaptivePenalty | None = None
    slice_size: int = 2000
    sample_storage: Place = "device"

    @property
    def keeps(self) -> dict[str, str]:
        return {"theta_update": self.theta_update.keeps, "z_update": self.z_update.keeps(moments=True)}

    def init(self, problem: Problem, seeds: Sequence[int]) -> BlockADMMState:
        """Return Z by a forward pass, U uniform, and Θ by the problem's initialisation (Algorithm 1, §4.1)."""
        seeds = whole_seeds(seeds)
        self._check(problem, seeds)
        problem.refuse_augmentation("Block-ADMM")
        theta = problem.initial(seeds)
        beta = self._penalties(len(problem.blocks), len(seeds), problem.like)
        z_steps, is_exact = self._schedules(*beta.shape).z_steps, self.sweep == "minibatch"
        self.z_update.check(problem, theta, z_steps, beta, self.theta_update, is_exact)
        z, u, *moments = self._forward_pass(problem, theta, seeds)
        if self.dual_init:
            spread = torch.full((len(seeds),), self.dual_init, dtype=torch.float64)
            sample_initial_values("dual", u, seeds, spread, "uniform", problem)
        return BlockADMMState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=self.theta_update.init(problem.held_stacks(theta)),
            z=z,
            u=u,
            z_state=self.z_update.init(problem.blocks, theta, zip(*moments, strict=True)),
            beta=beta,
            made_with=self.keeps,
        )

    def _forward_pass(self, problem: Problem, theta: Parameters, seeds: Sequence[int]) -> list[list[Tensor]]:
        """Return Z by a forward pass, U = 0 and the moments of Z, which are 0; T tensors [S, N, d_t] each.

        Those of blocks that other processes hold are [S, 0, d_t], but for Z below the first block here.
        """
        n_blocks, numbers, variables = len(problem.blocks), problem.held_blocks, list[Tensor]()
        parts = list(slices(problem.n_held, self.slice_size))
        for part, visit in zip(parts, problem.visits(seeds, parts, [(0,)] * len(parts)), strict=True):
            outputs = list(problem.blocks.outputs(theta, visit.x, visit))
            if not variables:
                copies = 1 + self.z_update.moments_of_each
                shapes = [
                    (len(seeds), problem.n_held if t in of else 0, *output.shape[2:])
                    for of in (range(numbers[0] - 1, numbers[-1] + 1), *[numbers] * copies)
                    for t, output in enumerate(outputs, start=1)
                ]
                variables = allocate(self.sample_storage, shapes, (1 + copies) * outputs)
            for z, output in zip(variables, outputs, strict=False):  # the first T variables are Z
                if is_held(z):
                    z[:, part] = output
        return [variables[start : start + n_blocks] for start in range(0, len(variables), n_blocks)]

    def step(self, problem: Problem, state: BlockADMMState) -> BlockADMMState:
        """Do one iteration of Algorithm 1, and update β by Eq. 6."""
        same_samples(problem, state.z[problem.held_blocks[-1] - 1])
        if self.penalty is None:
            beta = self._penalties(len(problem.blocks), len(state.seeds), state.beta)
            if not torch.equal(beta, state.beta):  # the state was trained with other penalties
                _set_penalties(state, beta, beta / state.beta)
        sweep = self._batch_sweep if self.sweep == "batch" else self._minibatch_sweep
        residual = sweep(problem, state, self._schedules(*state.beta.shape), self.rounds(state.iteration))
        state.iteration += 1
        if self.penalty is not None:
            factor = self.penalty.factor(state.beta, residual, state.iteration)
            _set_penalties(state, state.beta * factor, factor)
        return state

    def _batch_sweep(self, problem: Problem, state: BlockADMMState, schedules: Schedules, rounds: int) -> Tensor:
        """Update all of Z, then Θ by mini-batches, and at the end all of U (Algorithm 1); return ‖h‖ [S]."""
        parts = list(slices(problem.n_held, self.slice_size))
        for r in range(rounds):
            h = schedules.at((state.iteration + r / rounds) / self.iterations)
            self.z_update.update_curvature(problem.blocks, state.theta, state.beta, state.z_state)
            for n in range(self.z_update.steps):
                mixing = h.mixing if r == 0 and n == 0 else 0.0
                self._update_z(problem, state, parts, h, mixing, r)  # lines 5 to 8: Z_T … Z_1
            batches = self._theta_batches(problem, state, r)
            for batch, visit in self._visits(problem, state, batches, _THETA, r):
                lagrangian = self._lagrangian(problem, state, batch, visit)
                update_theta(lagrangian, self.theta_update, state.moments, h.theta_steps)  # line 10: Θ
            problem.give_theta(state.theta)
        visits = self._visits(problem, state, parts, _DUALS, 0)
        squares = [self._update_duals(problem, state, part, visit, h) for part, visit in visits]  # line 12: U
        return self._norm(problem, squares, problem.n_samples)

    def _minibatch_sweep(self, problem: Problem, state: BlockADMMState, schedules: Schedules, rounds: int) -> Tensor:
        """Update Z, Θ and U of each mini-batch before those of the next one (Gauss-Seidel order); return ‖h‖ [S]."""
        k, device = state.iteration, problem.device
        batches = minibatches(problem.n_samples, self.batch_size, state.seeds, k, device, self.epoch_parts)
        visits = problem.visits(state.seeds, batches, [(k, number) for number in range(len(batches))])
        square = torch.zeros_like(state.beta[0])
        run = Runner(problem, self, (state, square), schedules, len(batches), rounds)
        count = torch.tensor(state.z_state.count, dtype=torch.float64) if run.is_compiled else state.z_state.count
        for number, (batch, visit, row) in enumerate(zip(batches, visits, run.rows([state.moments]), strict=True)):
            if number % self.curvature_every == 0:
                self.z_update.update_curvature(problem.blocks, state.theta, state.beta, state.z_state)
            run(visit, row, batch=problem.owned(batch), count=count)
        if (k + 1) % (self.epoch_parts or 1) == 0:
            state.z_state.count += rounds * self.z_update.steps
        return self._norm(problem, [square], sum(batch.shape[1] for batch in batches))

    def visit(
        self,
        problem: Problem,
        state: BlockADMMState,
        square: Tensor,
        visit: Visit,
        rounds: list[Hyperparameters],
        batch: Tensor,
        count: int | Tensor,
    ) -> None:
        """Update Z, Θ and U of a mini-batch in place, and add its `_squared_residual` to `square`.

        `batch` are the samples' places [S, B] among those that are held here, and `count` is that of `state.z_state`.
        """
        lagrangian, z_state = self._gather(problem, state, batch, replace(state.z_state, count=count), visit)

        def update(lagrangian: AugmentedLagrangian, h: Hyperparameters) -> None:
            update_theta(lagrangian, self.theta_update, state.moments, h.theta_steps)

        update_minibatch(lagrangian, self.z_update, z_state, update, rounds)
        square += self._squared_residual(lagrangian)
        variables = [*state.z, *state.u, *state.z_state.tensors()]
        scatter(batch, variables, [*lagrangian.z, *lagrangian.u, *z_state.tensors()])

    @staticmethod
    def _visits(
        problem: Problem, state: BlockADMMState, batches: Sequence[BatchT], purpose: int, r: int
    ) -> Iterator[tuple[BatchT, Visit]]:
        """Yield what is held here of each batch of a batch sweep in round r, and a visit of it. Slices count by where
        they start."""
        places = [batch.start if isinstance(batch, slice) else number for number, batch in enumerate(batches)]
        counters = [(state.iteration, purpose, r, place) for place in places]
        held = (batch if isinstance(batch, slice) else problem.owned(batch) for batch in batches)
        return zip(held, problem.visits(state.seeds, batches, counters), strict=True)

    def _update_z(
        self,
        problem: Problem,
        state: BlockADMMState,
        parts: Sequence[slice],
        h: Hyperparameters,
        mixing: StepSize,
        r: int,
    ) -> None:
        """Move Z of all samples once in round r, slice by slice, after the mixing with a forward pass."""
        taken = (
            Part(part, *self._gather(problem, state, part, state.z_state, visit))
            for part, visit in self._visits(problem, state, parts, _Z, r)
        )

        def put(part: Part) -> None:
            updated = [*part.lagrangian.z, *part.z_state.tensors()]
            scatter(part.samples, [*state.z, *state.z_state.tensors()], updated)

        Pipeline(problem, self.z_update, state.z, h, mixing, taken, put).run(parts)
        state.z_state.count += 1

    def _update_duals(
        self, problem: Problem, state: BlockADMMState, part: slice, visit: Visit, h: Hyperparameters
    ) -> Tensor:
        """Update U of consecutive samples; return their `_squared_residual`."""
        lagrangian = self._lagrangian(problem, state, part, visit)
        lagrangian.update_duals(h.dual_step)
        scatter(part, state.u, lagrangian.u)
        return self._squared_residual(lagrangian)

    def _theta_batches(self, problem: Problem, state: BlockADMMState, r: int) -> list[Tensor]:
        """Return the mini-batches [S, B] of round r: `theta_passes` passes over the samples, each in another order."""
        passes = math.ceil(self.theta_passes)
        first = (sum(map(self.rounds, range(state.iteration))) + r) * passes
        batches = [
            batch
            for epoch in range(first, first + passes)
            for batch in minibatches(problem.n_samples, self.batch_size, state.seeds, epoch, problem.device)
        ]
        return batches[: math.ceil(self.theta_passes / passes * len(batches))]

    @staticmethod
    def _gather(
        problem: Problem, state: BlockADMMState, batch: Tensor | slice, z_state: ZState, visit: Visit
    ) -> tuple[AugmentedLagrangian, ZState]:
        """Return the Lagrangian of a visit of the samples `batch`, see `gather`; `z_state` gets their moments."""
        z, u, *moments = gather(problem, batch, [state.z, state.u, *z_state.moments])
        return AugmentedLagrangian(problem, state.theta, state.beta, visit, z, u), replace(z_state, moments=moments)

    def _lagrangian(
        self, problem: Problem, state: BlockADMMState, batch: Tensor | slice, visit: Visit
    ) -> AugmentedLagrangian:
        """Return the Lagrangian of the samples `batch` alone, without their moments."""
        return self._gather(problem, state, batch, ZState(), visit)[0]

    def _squared_residual(self, lagrangian: AugmentedLagrangian) -> Tensor:
        """Return Σ_t ‖Z_t − block_t(Z_{t−1})‖² [S] for the adaptive penalty; 0 without one."""
        return torch.zeros_like(lagrangian.beta[0]) if self.penalty is None else lagrangian.squared_residual()

    @staticmethod
    def _norm(problem: Problem, squares: list[Tensor], samples: int) -> Tensor:
        """Return ‖h‖ [S] of `AdaptivePenalty` from the squared residuals [S] of parts of the samples."""
        total = torch.stack(squares).sum(0)
        problem.parallel.add_up(total)
        return (total / samples).sqrt()

    def rounds(self, iteration: int) -> int:
        """Return the number of primal rounds of an iteration, which is counted from 0."""
        return self.primal_rounds + int((self.primal_growth or 0.0) * iteration)

    def diagnostics(self, problem: Problem, state: BlockADMMState) -> dict[str, Tensor]:
        """Return quantities [S] of the state after an iteration.

        Returns:
            For each block t `residual_t` = ‖Z_t − block_t(Z_{t−1})‖/‖Z_t‖, `dual_rms_t` = rms(U_t), `beta_t` and
            `sigma_t` (see `spectral_norms`). Besides these:

            - `h`: the ‖h‖ of `AdaptivePenalty` at the end of the iteration. (With sweep="minibatch" Eq. 6 takes the
              residuals of the visits instead.)
            - `bound`: its η_k, with a `penalty`.
            - `kkt`: the norm of the gradient of J + Σ_t ⟨β_t U_t, Z_t − block_t(Z_{t−1})⟩, the Lagrangian. The gradient
              by Z counts as the root of its mean square over samples, and that by Θ as its mean over samples.
            - `primal_rounds`: the rounds of the iteration, with a `primal_growth`.
            - `loss_forward`, `loss_moved`: see `label_leak`, for more than one block; of `batch_size` samples that are
              visited once more with the last iteration's ζ.
        """
        same_samples(problem, state.z[problem.held_blocks[-1] - 1])
        values = self._residuals(problem, state)
        if self.penalty is not None:
            values["bound"] = torch.full_like(state.beta[0], self.penalty.eta(state.iteration))
        if self.primal_growth is not None:
            values["primal_rounds"] = torch.full_like(state.beta[0], self.rounds(max(state.iteration - 1, 0)))
        leak = label_leak(problem, state.theta, self.batch_size, partial(self._after_z_update, problem, state))
        return values | leak | spectral_norms(problem, state.theta)

    def _residuals(self, problem: Problem, state: BlockADMMState) -> dict[str, Tensor]:
        """Return `kkt` and `h`, and by block `residual_t`, `dual_rms_t` and `beta_t`."""
        theta, samples = state.theta, problem.n_samples
        # A gradient by Θ moves what the forwards in training change.
        state = replace(state, theta=problem.blocks.copied(theta))
        theta_gradient, z_square = [*map(torch.zeros_like, problem.held_stacks(theta))], torch.zeros_like(state.beta[0])
        square, norm, dual_norm = (torch.zeros_like(state.beta) for _ in range(3))
        for part, visit in self._visits(problem, state, list(slices(problem.n_held, self.slice_size)), _DUALS, 0):
            lagrangian = self._lagrangian(problem, state, part, visit)
            z, u, gradient = lagrangian.z, lagrangian.u, lagrangian.gradient()
            multiplier = [broadcast(b, v) * v for b, v in zip(state.beta, u, strict=True)]
            pass_down(lagrangian, multiplier)
            for t in lagrangian.held:
                residual = lagrangian.residual(t, for_vjp=True)
                for total, v in ((square, residual), (norm, z[t - 1]), (dual_norm, u[t - 1])):
                    total[t - 1] += _squared_norm(v)
                lagrangian.vjp(t, multiplier[t - 1], grad_params=gradient)
                z_square += _squared_norm(_gradient_by_z(lagrangian, multiplier, t))
            for total, part_of_it in zip(theta_gradient, problem.blocks.total(gradient), strict=True):
                total += part_of_it
        problem.parallel.add_up(*theta_gradient, over="samples")
        theta_square = torch.stack([_squared_norm(g / samples) for g in theta_gradient]).sum(0)
        problem.parallel.add_up(theta_square, over="blocks")
        problem.parallel.add_up(square, norm, dual_norm, z_square)
        values = {
            "kkt": (z_square / samples + theta_square).sqrt(),
            "h": (square.sum(0) / samples).sqrt(),
        }
        for t, dual in enumerate(state.u, start=1):
            values[f"residual_{t}"] = torch.where(norm[t - 1] > 0, square[t - 1] / norm[t - 1], 0.0).sqrt()
            values[f"dual_rms_{t}"] = (dual_norm[t - 1] / max(samples * math.prod(dual.shape[2:]), 1)).sqrt()
            values[f"beta_{t}"] = state.beta[t - 1].clone()
        return values

    def _after_z_update(self, problem: Problem, state: BlockADMMState, batch: Tensor) -> AugmentedLagrangian:
        """Return the Lagrangian of copies of the samples [S, B] after an update of Z with the last iteration's ζ."""
        h = self._schedules(*state.beta.shape).at(max(state.iteration - 1, 0) / self.iterations)
        visit = problem.visit(state.seeds, batch, (state.iteration, 0))
        kinds = gather(problem, problem.owned(batch), [state.z, state.u, *zip(*state.z_state.moments, strict=True)])
        z, u, *moments = (problem.of_all_blocks(of_kind, batch.shape[1]) for of_kind in kinds)
        blocks = range(1, len(z) + 1)
        lagrangian = AugmentedLagrangian(problem, state.theta, state.beta, visit, z, u, blocks)
        by_block = [list(of_block) for of_block in zip(*moments, strict=True)]
        z_state = replace(state.z_state, moments=by_block).with_own_curvature()
        self.z_update.update_curvature(problem.blocks, state.theta, state.beta, z_state)
        lagrangian.mix_with_forward(h.mixing)
        self.z_update.step(lagrangian, z_state, h.z_steps)
        return lagrangian

    def _penalties(self, n_blocks: int, n_replicas: int, like: Tensor) -> Tensor:
        _, beta = self._coupling_values(n_blocks, n_replicas)
        return penalties(beta, n_blocks, n_replicas, like)

    def _coupling_values(self, n_blocks: int, n_replicas: int) -> tuple[BlockValue, BlockValue]:
        is_anew = self._are_anew(n_replicas)
        return self.z_update.coupling_values(self.z_step, self.beta, n_blocks, n_replicas, is_anew)

    def _are_anew(self, n_replicas: int) -> Tensor:
        """Return whether each visit of a replica is one round from a forward pass, without duals, [S]."""
        is_one_round = self.sweep == "minibatch" and self.primal_rounds == 1 and not self.primal_growth
        mixing, dual_step = mixing_schedule(self.forward_mixing, n_replicas), self._dual_step(n_replicas)
        are_anew = mixing.is_always(1.0) & dual_step.is_always(0.0)
        return (are_anew & (is_one_round and not self.dual_init)).expand(n_replicas)

    def _dual_step(self, n_replicas: int) -> Schedule:
        return schedule("dual_step", self.dual_step, n_replicas)

    def _schedules(self, n_blocks: int, n_replicas: int) -> Schedules:
        z_step, _ = self._coupling_values(n_blocks, n_replicas)
        return Schedules(
            theta_steps=[schedule("theta_step", self.theta_step, n_replicas)],
            z_steps=block_schedules("z_step", z_step, n_blocks, n_replicas),
            dual_step=self._dual_step(n_replicas),
            mixing=mixing_schedule(self.forward_mixing, n_replicas),
        )

    def _check(self, problem: Problem, seeds: Sequence[int]) -> None:
        check_minibatch_options(problem, seeds, self.iterations, self.theta_update, self.batch_size, self.epoch_parts)
        has_type("z_update", self.z_update, ZUpdate, 'admm.optimizers.ZUpdate("clipped")')
        one_of("sweep", self.sweep, ("batch", "minibatch"))
        one_of("sample_storage", self.sample_storage, PLACES)
        for name in ("primal_rounds", "curvature_every", "slice_size"):
            at_least_one(name, getattr(self, name))
        check_last_part(problem, "slice_size", self.slice_size)
        in_range("dual_init", self.dual_init)
        in_range("primal_growth", self.primal_growth or 0.0)
        if not is_number(self.theta_passes) or self.theta_passes <= 0.0:
            raise ValueError(f"theta_passes: {self.theta_passes} is not positive; theta_step=0 freezes Θ")
        if self.sweep == "minibatch" and self.theta_passes != 1.0:
            raise ValueError(f"theta_passes: {self.theta_passes}, but sweep='minibatch' has one step of Θ per visit")
        if self.sweep == "minibatch" and problem.parallel.shares("blocks"):
            raise ValueError(
                "sweep: 'minibatch' moves on as soon as one mini-batch is done; parallel='blocks' needs 'batch'"
            )
        if problem.parallel.shares("blocks") and not self.theta_update.is_separable:
            raise ValueError(
                f"theta_update: {type(self.theta_update).__name__} moves a block by the gradients of others too; "
                "parallel='blocks' needs another rule, such as Adam()"
            )
        if self.sweep == "batch" and self.epoch_parts is not None:
            raise ValueError(f"epoch_parts: {self.epoch_parts}, but sweep='batch' moves all samples at a time")
        if self.primal_growth is not None and self.epoch_parts is not None:
            raise ValueError(f"primal_growth: {self.primal_growth} goes by epochs; epoch_parts must be None")


def _gradient_by_z(lagrangian: AugmentedLagrangian, multiplier: Sequence[Tensor], t: int) -> Tensor:
    """Return the gradient by Z_t of J + Σ_t ⟨λ_t, Z_t − block_t(Z_{t−1})⟩, with `multiplier` λ_1..λ_T."""
    if t == len(multiplier):
        return multiplier[-1] + lagrangian.loss.gradient(lagrangian.z[-1], lagrangian.visit.y)
    from_above = lagrangian.vjp(t + 1, multiplier[t]) if t + 1 in lagrangian.held else lagrangian.from_above
    assert from_above is not None
    return multiplier[t - 1] - from_above


def _squared_norm(values: Tensor) -> Tensor:
    """Return ‖·‖² of each replica, [S]."""
    return values.square()[:, None].flatten(1).sum(1)
