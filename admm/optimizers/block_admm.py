"""Stochastic Block-ADMM (paper, Algorithm 1): coupling variables and duals of all samples are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, check_batch_size, has_type, in_range, one_of
from admm.minibatches import (
    flat_indices,
    gather_per_replica,
    gather_shared,
    minibatches,
    scatter_per_replica,
    slices,
    stateless_rng,
)
from admm.numbers import Options, is_number
from admm.optimizers.checks import same_samples
from admm.optimizers.coupling import (
    BlockOutputs,
    ZUpdate,
    label_leak,
    penalties,
    probe,
    refresh_schedule,
    warn_of_lost_signal,
)
from admm.optimizers.protocol import Optimizer, Problem, spectral_norms, whole_seeds
from admm.optimizers.rules import Adam, UpdateRule
from admm.placement import PLACES, Place, allocate
from admm.schedules import BlockValue, Schedule, Value, block_schedules, broadcast, schedule


@dataclass
class BlockADMMState:
    """Block-ADMM's variables for T blocks, N samples, S replicas.

    theta: parameters [S, P]. moments: the Θ rule's, [S, P] each. z, u: coupling variables Z_t and scaled duals
    U_t, T tensors [S, N, d_t] each. z_moments: Adam's for Z_t, T pairs of [S, N, d_t], or none. beta: penalties
    [T, S]. power_vectors: of the spectral norms, see `ZUpdate`.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[Tensor]
    z: list[Tensor]
    u: list[Tensor]
    z_moments: list[list[Tensor]]
    beta: Tensor
    power_vectors: list[Tensor]


@dataclass(frozen=True)
class AdaptivePenalty(Options):
    """Eq. 6, ρ = 1/β: β grows by 1/c whenever the constraint residual exceeds η_k = `bound` · `shrink`^k.

    The residual is ‖h‖ = (Σ_t ‖Z_t − block_t(Z_{t−1})‖² / N)^½, so that `bound` does not depend on N.
    """

    c: float = 0.9
    bound: float = 1.0
    shrink: float = 0.95
    largest: float = math.inf  # β stays at or below this

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.c) or not 0.0 < self.c < 1.0:
            raise ValueError(f"c: {self.c} is not between 0 and 1 (Eq. 6)")
        in_range("bound", self.bound)
        in_range("shrink", self.shrink)
        if self.largest != math.inf and (not is_number(self.largest) or self.largest <= 0.0):
            raise ValueError(f"largest: {self.largest} is not positive")

    def eta(self, iteration: int) -> float:
        """η_k, where iteration k is the k-th to be finished."""
        return self.bound * self.shrink**iteration

    def factor(self, beta: Tensor, residual: Tensor, iteration: int) -> Tensor:
        """What β [T, S] is multiplied with, [T, S], given the residual's norm [S]."""
        grows = (residual > self.eta(iteration)) & (beta / self.c <= self.largest)
        return torch.where(grows, torch.full_like(beta, 1.0 / self.c), 1.0)


@dataclass(frozen=True)
class BlockADMM(Options, Optimizer[BlockADMMState]):
    """Stochastic Block-ADMM, the paper's Algorithm 1, and what it leaves open as options.

    `sweep="batch"` is Algorithm 1: `primal_rounds` times the Z of all samples (`z_update`, in reverse order)
    and then Θ by mini-batches (`theta_passes` over the samples), and at the end the duals of all samples.
    `sweep="minibatch"` visits mini-batches in Gauss-Seidel order, each with its Z, Θ and U before the next one.

    Batch normalisation takes the statistics of the samples that are evaluated together: of a mini-batch, and in Z's and
    U's batch sweeps of `slice_size` samples.

    The defaults start Z from a forward pass at each visit, without duals, which makes the steps of Θ those of
    `OnlineBlockADMM`, whose defaults they share: with Z that lag behind a forward pass, or duals that add the lag up,
    no value tried trained networks of 3 to 10 blocks alike. §4.1 has beta=1, sweep="batch", primal_rounds=3,
    z_update=ZUpdate("adam"), dual_step=1, dual_init=1e-4 and refresh=0.

    J enters as the sum over samples; the gradient by Θ is a mini-batch's mean of Σ_t β_t/2 ‖·‖². The step sizes,
    `dual_step` and `refresh` may have schedules, and one value per replica; `z_step` and `beta` one per block.
    """

    iterations: int  # the schedules' horizon
    theta_step: Value  # η
    z_step: BlockValue = 0.01  # ζ
    beta: BlockValue = 5.0  # no schedule
    sweep: Literal["batch", "minibatch"] = "minibatch"
    batch_size: int = 64
    epoch_parts: int | None = None  # sweep=minibatch: an iteration is an epoch, or one of so many parts of it
    primal_rounds: int = 1
    primal_growth: float | None = None  # rounds more with each iteration: 0.1 for one every tenth (after Proposition 1)
    theta_passes: float = 1.0  # an iteration and primal round; below 1 for a part of the mini-batches
    z_update: ZUpdate = field(default_factory=lambda: ZUpdate("gradient"))
    update: UpdateRule = field(default_factory=lambda: Adam(epsilon=1e-16))
    dual_step: Value = 0.0
    dual_init: float = 0.0  # U ~ uniform(0, dual_init)
    refresh: Value = 1.0  # each visit first moves Z_t this part of the way to the forward pass
    curvature_every: int = 1  # visits of a mini-batch between two evaluations of the curvature
    penalty: AdaptivePenalty | None = None
    slice_size: int = 2000  # samples that a batch sweep holds in the processor's cache at a time
    variables: Place = "device"  # where Z, U and the moments of Z are: device, host or disk

    def init(self, problem: Problem, seeds: Sequence[int]) -> BlockADMMState:
        """Z by a forward pass, U uniform, Θ by the problem's initialisation (Algorithm 1, §4.1)."""
        seeds = whole_seeds(seeds)
        self._check(problem)
        problem.refuse_augmentation("Block-ADMM")
        theta = problem.initial(seeds)
        self.z_update.check(problem, theta)
        _, z_steps = self._schedules(len(problem.blocks), len(seeds))
        beta = penalties(self.beta, len(problem.blocks), len(seeds), like=problem.x)
        if self.z_update.name == "gradient":
            warn_of_lost_signal(z_steps[:-1], beta[:-1].unbind(), problem.x.dtype)
        z: list[Tensor] = []
        for part in slices(len(problem.x), self.slice_size):
            x = problem.x[part].expand(len(seeds), *problem.x[part].shape)
            outputs = list(problem.blocks.outputs(theta, x, training=True))
            if not z:
                shapes = [(len(seeds), len(problem.x), *o.shape[2:]) for o in outputs]
                of_each = 2 + self.z_update.moments_of_each
                wholes = allocate(self.variables, of_each * shapes, like=problem.x)
                z, u, *moments = (wholes[k * len(shapes) : (k + 1) * len(shapes)] for k in range(of_each))
            for whole, values in zip(z, outputs, strict=True):
                whole[:, part] = values
        self._draw_duals(u, seeds)
        return BlockADMMState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=self.update.init(theta.flat),
            z=z,
            u=u,
            z_moments=[list(of_block) for of_block in zip(*moments, strict=True)] or [[] for _ in z],
            beta=beta,
            power_vectors=self.z_update.power_vectors(problem.blocks, theta),
        )

    def step(self, problem: Problem, state: BlockADMMState) -> BlockADMMState:
        same_samples(problem, state.z[0])
        sweep = _Sweep(self, problem, state)
        residual = sweep.minibatches() if self.sweep == "minibatch" else sweep.batch()
        state.iteration += 1
        if self.penalty is not None:
            # λ = β U is kept while β changes (Eq. 5b, 6).
            factor = self.penalty.factor(state.beta, residual, state.iteration)
            state.beta *= factor
            for u, f in zip(state.u, factor, strict=True):
                u.div_(broadcast(f, u))
        return state

    def rounds(self, iteration: int) -> int:
        """Primal rounds of an iteration, counted from 0."""
        return self.primal_rounds + int((self.primal_growth or 0.0) * iteration)

    def diagnostics(self, problem: Problem, state: BlockADMMState) -> dict[str, Tensor]:
        """By block, `residual_t` = ‖Z_t − block_t(Z_{t−1})‖/‖Z_t‖, `dual_rms_t` = rms(U_t), `beta_t`, `sigma_t`; `h`,
        the ‖h‖ of `AdaptivePenalty` at the end of the iteration (with sweep=minibatch that one has the residuals of the
        visits), and `bound`, its η_k; and `kkt`, the norm of the gradient of the Lagrangian
        J + Σ_t ⟨β_t U_t, Z_t − block_t(Z_{t−1})⟩, in which gradients by Z count as the root of the mean square over
        samples, and by Θ as the mean over samples. Of more than one block also `loss_forward` and `loss_moved`, see
        `label_leak`, of `batch_size` samples that are visited once more with the last iteration's ζ."""
        blocks, theta, samples = len(state.z), state.theta, len(problem.x)
        statistics = theta.buffers.clone()
        gradient = problem.blocks.parameters(torch.empty_like(theta.flat))
        theta_gradient, z_square = torch.zeros_like(theta.flat), torch.zeros_like(state.beta[0])
        square, norm, dual_norm = (torch.zeros_like(state.beta) for _ in range(3))
        for part in slices(len(problem.x), self.slice_size):
            x = problem.x[part].expand(len(state.seeds), *problem.x[part].shape)
            z, u = ([v[:, part].to(x.device, non_blocking=True) for v in variables] for variables in (state.z, state.u))
            chain = BlockOutputs(problem.blocks, theta, x, z)
            multiplier = [broadcast(b, v) * v for b, v in zip(state.beta, u, strict=True)]
            for t in range(1, blocks + 1):
                for total, v in ((square, chain.residual(t, pulled=True)), (norm, z[t - 1]), (dual_norm, u[t - 1])):
                    total[t - 1] += v.square().flatten(1).sum(1)
                chain.vjp(t, multiplier[t - 1], grad_params=gradient)
                by_z = multiplier[t - 1].clone()
                if t < blocks:
                    pulled = chain.vjp(t + 1, multiplier[t])
                    by_z -= pulled if pulled is not None else 0.0
                else:
                    y = problem.y[part]
                    by_z += problem.loss.gradient(chain.z[-1], y.expand(len(state.seeds), *y.shape))
                z_square += by_z.square().flatten(1).sum(1)
            theta_gradient += gradient.flat
        theta.buffers.copy_(statistics)
        values = {
            "kkt": (z_square / samples + (theta_gradient / samples).square().sum(1)).sqrt(),
            "h": (square.sum(0) / samples).sqrt(),
        }
        for t, of_block in enumerate(state.u, start=1):
            values[f"residual_{t}"] = (square[t - 1] / norm[t - 1]).sqrt()
            values[f"dual_rms_{t}"] = (dual_norm[t - 1] / of_block[0].numel()).sqrt()
            values[f"beta_{t}"] = state.beta[t - 1].clone()
        if self.penalty is not None:
            values["bound"] = torch.full_like(state.beta[0], self.penalty.eta(state.iteration))
        if self.primal_growth is not None:
            values["primal_rounds"] = torch.full_like(state.beta[0], self.rounds(max(state.iteration - 1, 0)))
        return values | self._label_leak(problem, state) | spectral_norms(problem, theta)

    def _label_leak(self, problem: Problem, state: BlockADMMState) -> dict[str, Tensor]:
        if len(state.z) == 1:
            return {}
        sweep = _Sweep(self, problem, replace(state, power_vectors=[v.clone() for v in state.power_vectors]))
        sweep._begin(-1.0 if state.iteration else 0.0)
        return sweep.label_leak(probe(len(problem.x), self.batch_size, len(state.seeds), problem.x.device))

    def _schedules(self, blocks: int, replicas: int) -> tuple[dict[str, Schedule], list[Schedule]]:
        """Of Θ's step, the dual step and the refresh, by name; and of ζ_1..ζ_T."""
        named = {n: schedule(n, getattr(self, n), replicas) for n in ("theta_step", "dual_step")}
        named["refresh"] = refresh_schedule(self.refresh, replicas)
        return named, block_schedules("z_step", self.z_step, blocks, replicas)

    def _check(self, problem: Problem) -> None:
        has_type("update", self.update, UpdateRule, "admm.optimizers.Adam()")
        has_type("z_update", self.z_update, ZUpdate, 'admm.optimizers.ZUpdate("gradient")')
        one_of("sweep", self.sweep, ("batch", "minibatch"))
        one_of("variables", self.variables, PLACES)
        check_batch_size(self.batch_size, len(problem.x), self.epoch_parts)
        for name in ("iterations", "primal_rounds", "curvature_every", "slice_size"):
            at_least_one(name, getattr(self, name))
        in_range("dual_init", self.dual_init)
        in_range("primal_growth", self.primal_growth or 0.0)
        if not is_number(self.theta_passes) or self.theta_passes <= 0.0:
            raise ValueError(f"theta_passes: {self.theta_passes} is not positive; theta_step=0 freezes Θ")
        if self.sweep == "minibatch" and self.theta_passes != 1.0:
            raise ValueError(f"theta_passes: {self.theta_passes}, but sweep=minibatch has one step of Θ per visit")
        if self.sweep == "batch" and self.epoch_parts is not None:
            raise ValueError(f"epoch_parts: {self.epoch_parts}, but sweep=batch moves all samples at a time")
        if self.primal_growth is not None and self.epoch_parts is not None:
            raise ValueError(f"primal_growth: {self.primal_growth} goes by epochs; epoch_parts must be null")

    def _draw_duals(self, u: Sequence[Tensor], seeds: Sequence[int]) -> None:
        if not self.dual_init:
            return
        for t, of_block in enumerate(u, start=1):
            for replica, seed in zip(of_block, seeds, strict=True):
                draw = torch.empty(replica.shape, dtype=replica.dtype)
                replica.copy_(draw.uniform_(0.0, self.dual_init, generator=stateless_rng(seed, "dual", t)))


@dataclass
class _Visit:
    """The variables of the samples that are being updated."""

    chain: BlockOutputs
    y: Tensor
    u: list[Tensor]
    z_moments: list[list[Tensor]]


class _Sweep:
    """One iteration of `BlockADMM` on a state."""

    def __init__(self, options: BlockADMM, problem: Problem, state: BlockADMMState) -> None:
        self.options, self.problem, self.state = options, problem, state
        self.theta, self.blocks = state.theta, len(state.z)
        self.gradient = problem.blocks.parameters(torch.empty_like(state.theta.flat))
        self.schedules, self.z_schedules = options._schedules(self.blocks, len(state.seeds))
        self.rounds = options.rounds(state.iteration)
        epochs = state.iteration // (options.epoch_parts or 1)
        self.rounds_before = sum(map(options.rounds, range(epochs)))  # that each sample has seen
        self.inverse_curvature: list[Tensor] = []

    def batch(self) -> Tensor:
        """Algorithm 1 as printed. Returns ‖h‖ [S] as `AdaptivePenalty` defines it."""
        options, samples, seeds = self.options, len(self.problem.x), self.state.seeds
        parts = list(slices(samples, options.slice_size))
        passes = math.ceil(options.theta_passes)
        for primal in range(self.rounds):
            self._begin(primal / self.rounds)
            self._evaluate_curvature()
            for part in parts:
                self._update_z_of(part, primal)
            first = (self.rounds_before + primal) * passes
            batches = [
                batch
                for epoch in range(first, first + passes)
                for batch in minibatches(samples, options.batch_size, seeds, epoch, self.problem.x.device)
            ]
            for batch in batches[: math.ceil(options.theta_passes / passes * len(batches))]:
                self._update_theta(self._gather(batch, moments=False))
        return self._norm([self._update_dual_of(part) for part in parts], samples)

    def _update_z_of(self, part: slice, primal: int) -> None:
        visit = self._view(part)
        if primal == 0:
            self._refresh(visit)
        self._update_z(visit, primal)
        self._put_back(part, self._pairs(visit))

    def _update_dual_of(self, part: slice) -> Tensor:
        visit = self._view(part, moments=False)
        square = self._update_dual(visit)
        self._put_back(part, zip(self.state.u, visit.u, strict=True))
        return square

    def minibatches(self) -> Tensor:
        """Gauss-Seidel order: Z, Θ and U of a mini-batch before the next one. Returns ‖h‖ [S]."""
        options, samples, seeds = self.options, len(self.problem.x), self.state.seeds
        device, parts = self.problem.x.device, options.epoch_parts
        batches = minibatches(samples, options.batch_size, seeds, self.state.iteration, device, parts)
        squares = []
        for number, batch in enumerate(batches):
            self._begin(number / len(batches))
            if number % options.curvature_every == 0:
                self._evaluate_curvature()
            squares.append(self._update_minibatch(batch))
        return self._norm(squares, sum(batch.shape[1] for batch in batches))

    def label_leak(self, batch: Tensor) -> dict[str, Tensor]:
        """What a visit of the samples [S, B] would do, on copies."""
        self._evaluate_curvature()
        visit = self._gather(batch)
        forward = BlockOutputs(self.problem.blocks, self.theta, visit.chain.x).z[-1]
        self._refresh(visit)
        self._update_z(visit, 0)
        return label_leak(self.problem.loss, visit.y, forward, visit.chain.output(self.blocks))

    def _update_minibatch(self, batch: Tensor) -> Tensor:
        visit = self._gather(batch)
        self._refresh(visit)
        for primal in range(self.rounds):
            self._update_z(visit, primal)
            self._update_theta(visit)
        square = self._update_dual(visit)
        self._scatter(batch, visit)
        return square

    def _begin(self, part: float) -> None:
        progress = (self.state.iteration + part) / self.options.iterations
        values = {name: at(progress) for name, at in self.schedules.items()}
        self.z_steps = [at(progress) for at in self.z_schedules]
        self.theta_step = values["theta_step"]
        self.dual_step, self.pull = (values[name] for name in ("dual_step", "refresh"))

    def _evaluate_curvature(self) -> None:
        self.inverse_curvature = self.options.z_update.inverse_curvature(
            self.problem.blocks, self.theta, self.state.beta, self.state.power_vectors
        )

    def _view(self, part: slice, moments: bool = True) -> _Visit:
        """Consecutive samples, with or without the moments of Z; all replicas see the same inputs."""
        state, x = self.state, self.problem.x[part]
        seen = [state.z, state.u, *(state.z_moments if moments else [])]
        z, u, *z_moments = ([v[:, part].to(x.device, non_blocking=True) for v in variables] for variables in seen)
        chain = BlockOutputs(self.problem.blocks, self.theta, x.expand(len(state.seeds), *x.shape), z)
        y = self.problem.y[part]
        return _Visit(chain, y.expand(len(state.seeds), *y.shape), u, z_moments)

    @staticmethod
    def _put_back(part: slice, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Variables of a view, those excepted that have been changed where they are."""
        for whole, values in pairs:
            if whole[:, part].data_ptr() != values.data_ptr():
                whole[:, part] = values

    def _gather(self, batch: Tensor, moments: bool = True) -> _Visit:
        """Copies of the samples [S, B] of a mini-batch, with or without the moments of Z."""
        state, own = self.state, flat_indices(batch, len(self.problem.x))
        gathered = [state.z, state.u, *(state.z_moments if moments else [])]
        z, u, *z_moments = ([gather_per_replica(v, own) for v in variables] for variables in gathered)
        chain = BlockOutputs(self.problem.blocks, self.theta, gather_shared(self.problem.x, batch), z)
        return _Visit(chain, gather_shared(self.problem.y, batch), u, z_moments)

    def _scatter(self, batch: Tensor, visit: _Visit) -> None:
        own = flat_indices(batch, len(self.problem.x))
        for whole, values in [*self._pairs(visit), *zip(self.state.u, visit.u, strict=True)]:
            scatter_per_replica(whole, own, values)

    def _pairs(self, visit: _Visit) -> Iterator[tuple[Tensor, Tensor]]:
        """Z of all samples and of the visited ones, and its moments."""
        yield from zip(self.state.z, visit.chain.z, strict=True)
        for whole, visited in zip(self.state.z_moments, visit.z_moments, strict=True):
            yield from zip(whole, visited, strict=True)

    def _refresh(self, visit: _Visit) -> None:
        """Z_t moves the part `refresh` of the way to the forward pass."""
        if isinstance(self.pull, float) and self.pull == 0.0:
            return
        chain = visit.chain
        ahead = chain.output(1)
        for t in range(1, self.blocks + 1):
            if t > 1:
                ahead = self.problem.blocks[t - 1].forward(self.theta.blocks[t - 1], ahead, training=True)
            pull = torch.as_tensor(broadcast(self.pull, ahead), dtype=ahead.dtype, device=ahead.device)
            chain.move(t, torch.lerp(chain.z[t - 1], ahead, pull))

    def _force(self, visit: _Visit, t: int, pulled: bool | None = None) -> Tensor:
        """Derivative β_t (Z_t − block_t(Z_{t−1}) + U_t) of coupling term t by Z_t (Eq. 2)."""
        force = visit.chain.residual(t, pulled).add_(visit.u[t - 1])
        return force.mul_(broadcast(self.state.beta[t - 1], force))

    def _update_z(self, visit: _Visit, primal: int) -> None:
        self.options.z_update.apply(
            visit.chain,
            lambda t: self._force(visit, t),
            self.problem.loss,
            visit.y,
            visit.u[-1],
            self.state.beta,
            self.z_steps,
            self.inverse_curvature,
            visit.z_moments,
            (self.rounds_before + primal) * self.options.z_update.steps,
        )

    def _update_theta(self, visit: _Visit) -> None:
        """One step of Θ on the mean over the mini-batch of Σ_t β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖²."""
        chain = visit.chain
        for t in range(1, self.blocks + 1):
            grad_output = self._force(visit, t, pulled=True).mul_(-1.0 / visit.y.shape[1])
            chain.vjp(t, grad_output, grad_params=self.gradient)
        self.options.update.apply(self.theta.flat, self.gradient.flat, self.state.moments, self.theta_step)
        chain.forget_all()

    def _update_dual(self, visit: _Visit) -> Tensor:
        """U_t ← U_t + α (Z_t − block_t(Z_{t−1})) (Alg. 1, line 12). Returns, for the adaptive penalty
        (0 without one), Σ_t ‖Z_t − block_t(Z_{t−1})‖² [S]."""
        square = torch.zeros_like(self.state.beta[0])
        for t in range(1, self.blocks + 1):
            residual = visit.chain.residual(t, pulled=False)
            if self.options.penalty is not None:
                square += residual.square().flatten(1).sum(1)
            visit.u[t - 1].add_(residual.mul_(broadcast(self.dual_step, residual)))
        return square

    @staticmethod
    def _norm(squares: list[Tensor], samples: int) -> Tensor:
        return (torch.stack(squares).sum(0) / samples).sqrt()
