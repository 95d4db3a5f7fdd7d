"""Online Stochastic Block-ADMM (paper, Algorithm 2): coupling variables live for one mini-batch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, check_batch_size, has_type, in_range, one_of
from admm.minibatches import gather_shared
from admm.numbers import Options
from admm.optimizers.coupling import BlockOutputs, Force, ZUpdate, label_leak, penalties, probe, warn_of_lost_signal
from admm.optimizers.protocol import Optimizer, Problem, spectral_norms, whole_seeds
from admm.optimizers.rules import Adam, UpdateRule
from admm.schedules import BlockValue, Schedule, Value, block_schedules, broadcast, schedule


@dataclass
class OnlineBlockADMMState:
    """theta: parameters [S, P]. moments: the Θ rule's, [S, P] each. u: one scalar dual a block, [T, S].
    power_vectors: of the spectral norms, see `ZUpdate`."""

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[Tensor]
    u: Tensor
    power_vectors: list[Tensor]


@dataclass(frozen=True)
class OnlineBlockADMM(Options, Optimizer[OnlineBlockADMMState]):
    """Algorithm 2. For each mini-batch: Z by a forward pass, `z_update` in reverse order, one step of Θ, and the
    dual. An iteration is an epoch, or a part of one.

    The coupling term of block t and one sample is `β/2 (‖z_t − block_t(z_{t−1})‖₂ + u_t)²`, and

    - `dual="paper"`: u_t grows by the mean over the mini-batch of `‖z_t − block_t(z_{t−1})‖₂` (printed for one
      sample at a time; a sum over the mini-batch would make it grow `batch_size` times faster);
    - `dual="reset"`: the same, from zero at the beginning of each epoch;
    - `dual="decay"`: the same, with u_t multiplied by `dual_decay` before;
    - `dual="none"`: u_t = 0, a quadratic penalty.

    The derivative of the norm at 0 is taken as 0. With a dual the term is not quadratic, and the Z update must be
    adam or gradient, with `last="step"`.

    After a cut weights and running statistics are those for coupling variables that have moved, while evaluation feeds
    these blocks a forward pass: for a large ζ the difference, of the weights above all, costs accuracy. The default
    ζ = 0.01 lets little of the label in, and β = 5 passes βζ = 0.05 of the signal on from block to block. Of the values
    tried, on held-out data, these are the ones with which 2 to 6 blocks come within a few percent of Adam, with batch
    normalisation or ten times the loss too. Ten blocks learn more slowly, and from PyTorch's initialisation not within
    20 epochs; βζ = 0.2 is better for them, but makes batch normalisation unsteady. Block t's gradient carries
    (βζ)^(T−t+1), hence the small ε of Adam for Θ. The paper has beta=1, z_update=ZUpdate("adam") and dual="paper"
    (§4.1).
    """

    iterations: int  # the schedules' horizon
    theta_step: Value  # η
    z_step: BlockValue = 0.01  # ζ
    beta: BlockValue = 5.0  # no schedule
    batch_size: int = 64
    epoch_parts: int | None = None  # an iteration is an epoch, or one of so many parts of it
    z_update: ZUpdate = field(default_factory=lambda: ZUpdate("gradient"))
    update: UpdateRule = field(default_factory=lambda: Adam(epsilon=1e-16))
    dual: Literal["paper", "reset", "decay", "none"] = "none"
    dual_decay: float = 0.9
    curvature_every: int = 1  # mini-batches between two evaluations of the curvature

    def init(self, problem: Problem, seeds: Sequence[int]) -> OnlineBlockADMMState:
        """Θ by the problem's initialisation, u = 0."""
        seeds = whole_seeds(seeds)
        self._check(problem)
        theta = problem.initial(seeds)
        self.z_update.check(problem, theta)
        _, z_steps = self._schedules(len(problem.blocks), len(seeds))
        beta = penalties(self.beta, len(problem.blocks), len(seeds), like=problem.x)
        if self.z_update.name == "gradient":
            warn_of_lost_signal(z_steps[:-1], beta[:-1].unbind(), problem.x.dtype)
        return OnlineBlockADMMState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=self.update.init(theta.flat),
            u=problem.x.new_zeros(len(problem.blocks), len(seeds)),
            power_vectors=self.z_update.power_vectors(problem.blocks, theta),
        )

    def step(self, problem: Problem, state: OnlineBlockADMMState) -> OnlineBlockADMMState:
        blocks, replicas = problem.blocks, len(state.seeds)
        theta_step, z_steps = self._schedules(len(blocks), replicas)
        beta = penalties(self.beta, len(blocks), replicas, problem.x)
        gradient = blocks.parameters(torch.empty_like(state.theta.flat))
        inverse_curvature: list[Tensor] = []
        if self.dual == "reset" and state.iteration % (self.epoch_parts or 1) == 0:
            state.u.zero_()
        batches = problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts)
        for number, (part, x, y) in enumerate(batches):
            progress = (state.iteration + part) / self.iterations
            if number % self.curvature_every == 0:
                inverse_curvature = self.z_update.inverse_curvature(blocks, state.theta, beta, state.power_vectors)
            chain = BlockOutputs(blocks, state.theta, x)
            steps = [at(progress) for at in z_steps]
            force = self._update_z(problem, state, chain, y, beta, steps, inverse_curvature)
            for t in range(len(blocks), 0, -1):  # block T's activations are still there
                chain.vjp(t, force(t).mul_(-1.0 / x.shape[1]), grad_params=gradient)
            self.update.apply(state.theta.flat, gradient.flat, state.moments, theta_step(progress))
            if self.dual != "none":
                self._update_dual(state, chain)
            del chain, force  # and the activations with them
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: OnlineBlockADMMState) -> dict[str, Tensor]:
        """The scalar duals `dual_t` and the spectral norms `sigma_t`; of more than one block `loss_forward` and
        `loss_moved`, see `label_leak`, of `batch_size` training samples with the last iteration's ζ."""
        duals = {f"dual_{t}": u.clone() for t, u in enumerate(state.u, start=1)} if self.dual != "none" else {}
        return duals | self._label_leak(problem, state) | spectral_norms(problem, state.theta)

    def _label_leak(self, problem: Problem, state: OnlineBlockADMMState) -> dict[str, Tensor]:
        if len(problem.blocks) == 1:
            return {}
        batch = probe(len(problem.x), self.batch_size, len(state.seeds), problem.x.device)
        x, y = gather_shared(problem.x, batch), gather_shared(problem.y, batch)
        chain = BlockOutputs(problem.blocks, state.theta, x)
        forward, (_, z_steps) = chain.z[-1], self._schedules(len(problem.blocks), len(state.seeds))
        steps = [at(max(state.iteration - 1, 0) / self.iterations) for at in z_steps]
        beta = penalties(self.beta, len(problem.blocks), len(state.seeds), problem.x)
        vectors = [v.clone() for v in state.power_vectors]
        curvature = self.z_update.inverse_curvature(problem.blocks, state.theta, beta, vectors)
        self._update_z(problem, state, chain, y, beta, steps, curvature)
        return label_leak(problem.loss, y, forward, chain.output(len(problem.blocks)))

    def _update_z(
        self,
        problem: Problem,
        state: OnlineBlockADMMState,
        chain: BlockOutputs,
        y: Tensor,
        beta: Tensor,
        steps: Sequence[float | Tensor],
        inverse_curvature: list[Tensor],
    ) -> Force:
        """Moves the Z of a mini-batch by steps ζ_1..ζ_T under penalties `beta` [T, S]. Returns the coupling terms'
        derivatives, see `_force`."""
        force, moments = partial(self._force, state, chain, beta), self.z_update.moments(chain.z)
        self.z_update.apply(chain, force, problem.loss, y, 0.0, beta, steps, inverse_curvature, moments, 0)
        return force

    def _schedules(self, blocks: int, replicas: int) -> tuple[Schedule, list[Schedule]]:
        """Of Θ's step, and of ζ_1..ζ_T."""
        return schedule("theta_step", self.theta_step, replicas), block_schedules(
            "z_step", self.z_step, blocks, replicas
        )

    def _check(self, problem: Problem) -> None:
        has_type("update", self.update, UpdateRule, "admm.optimizers.Adam()")
        has_type("z_update", self.z_update, ZUpdate, 'admm.optimizers.ZUpdate("gradient")')
        one_of("dual", self.dual, ("paper", "reset", "decay", "none"))
        check_batch_size(self.batch_size, len(problem.x), self.epoch_parts)
        at_least_one("iterations", self.iterations)
        at_least_one("curvature_every", self.curvature_every)
        in_range("dual_decay", self.dual_decay)
        if self.dual != "none" and (self.z_update.last == "prox" or self.z_update.name in ("lipschitz", "majorised")):
            raise ValueError(
                f"dual: {self.dual!r} is not quadratic in Z: it needs a z_update with last='step' and name 'adam' or "
                "'gradient'"
            )

    def _force(self, state: OnlineBlockADMMState, chain: BlockOutputs, beta: Tensor, t: int) -> Tensor:
        """Derivative of β/2 (‖r‖₂ + u_t)² by r = z_t − block_t(z_{t−1}): β (1 + u_t/‖r‖) r, and 0 at r = 0."""
        residual = chain.residual(t)
        if self.dual != "none":
            norm = _norm(residual)
            weight = torch.where(norm > 0, 1.0 + state.u[t - 1].unsqueeze(1) / norm, 0.0)
            residual.mul_(weight.view(*weight.shape, *[1] * (residual.ndim - 2)))
        return residual.mul_(broadcast(beta[t - 1], residual))

    def _update_dual(self, state: OnlineBlockADMMState, chain: BlockOutputs) -> None:
        """u_t ← u_t + ‖z_t − block_t(z_{t−1})‖₂ with the new Θ (Algorithm 2)."""
        chain.forget_all()
        for t in range(1, len(chain.blocks) + 1):
            if self.dual == "decay":
                state.u[t - 1] *= self.dual_decay
            state.u[t - 1] += _norm(chain.residual(t, pulled=False)).mean(1)


def _norm(residual: Tensor) -> Tensor:
    """‖·‖₂ of each sample, [S, n, ...] to [S, n]."""
    norm: Tensor = torch.linalg.vector_norm(residual.flatten(2), dim=2)
    return norm
