"""BlockProp (Gotmare, Thomas, Brea & Jaggi 2018, "Decoupling backpropagation using constrained optimization methods"):
blocks that are held together by a quadratic penalty on gluing variables, without dual variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, check_batch_size, has_type
from admm.losses import Loss
from admm.minibatches import gather_shared
from admm.numbers import Options
from admm.optimizers.coupling import BlockOutputs, label_leak, probe, warn_of_lost_signal
from admm.optimizers.fully_connected import Start, check_initial_names, set_initial_values
from admm.optimizers.protocol import Optimizer, Problem, spectral_norms, whole_seeds
from admm.optimizers.rules import SGD, Adam, UpdateRule
from admm.schedules import BlockValue, Number, Schedule, Value, block_values, broadcast, positive, schedule


@dataclass
class GotmareState:
    """theta: parameters [S, P]. moments: the Θ rule's, [S, P] each (Adam's count of steps is [S])."""

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[Tensor]


@dataclass(frozen=True)
class Gotmare(Options, Optimizer[GotmareState]):
    """BlockProp on mini-batches: with gluing variables z_1..z_{T−1}, z_0 = x, and J summed over the mini-batch,

        J(block_T(z_{T−1}), y) + Σ_{t<T} ρ/2 ‖z_t − block_t(z_{t−1})‖²

    z starts with a forward pass and takes `z_rounds` rounds of steps `z_update`, each from z_{T−1} to z_1, of size
    `z_step` ζ (with a schedule, or one a gluing variable); then each block takes one step `update` of size `theta_step`
    on its own term's mean over the mini-batch. An iteration is an epoch, or a part of one. For any
    network, cut into any blocks, and any loss with a gradient; one block is back-propagation.

    After a cut weights and running statistics are those for gluing variables that have moved, while evaluation feeds
    these blocks a forward pass: for a large ζ the difference, of the weights above all, costs accuracy. The defaults
    are chosen as those of `OnlineBlockADMM`, with ρ for β.
    """

    iterations: int  # the schedules' horizon
    theta_step: Value  # η
    z_step: BlockValue = 0.01  # ζ
    rho: Number = 5.0
    batch_size: int = 64
    epoch_parts: int | None = None  # an iteration is an epoch, or one of so many parts of it
    z_rounds: int = 1
    z_update: UpdateRule = field(default_factory=SGD)
    update: UpdateRule = field(default_factory=Adam)

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> GotmareState:
        """Θ by the problem's initialisation, or from the starting variable `theta`, one tensor [S, P].

        Raises ValueError that names a hyperparameter, or for a starting variable of another name or shape.
        """
        seeds = whole_seeds(seeds)
        check_initial_names(start, ("theta",))
        check_batch_size(self.batch_size, len(problem.x), self.epoch_parts)
        at_least_one("iterations", self.iterations)
        at_least_one("z_rounds", self.z_rounds)
        has_type("update", self.update, UpdateRule, "admm.optimizers.Adam()")
        has_type("z_update", self.z_update, UpdateRule, "admm.optimizers.SGD()")
        _, z_steps = self._schedules(len(problem.blocks), len(seeds))
        rho = self._penalty(problem.x, len(seeds))
        if isinstance(self.z_update, SGD):
            warn_of_lost_signal(z_steps, [rho] * len(z_steps), problem.x.dtype)
        theta = problem.initial(seeds)
        set_initial_values("theta", [theta.flat], start)
        return GotmareState(seeds, 0, theta, self.update.init(theta.flat))

    def step(self, problem: Problem, state: GotmareState) -> GotmareState:
        blocks, replicas = problem.blocks, len(state.seeds)
        theta_step, z_steps = self._schedules(len(blocks), replicas)
        gradient = blocks.parameters(torch.empty_like(state.theta.flat))
        rho = self._penalty(problem.x, replicas)
        for part, x, y in problem.minibatches(self.batch_size, state.seeds, state.iteration, self.epoch_parts):
            progress = (state.iteration + part) / self.iterations
            terms = _Terms(problem.loss, BlockOutputs(blocks, state.theta, x), y, rho)  # z by a forward pass
            self._update_z(terms, [at(progress) for at in z_steps])
            for t in range(len(blocks), 0, -1):  # block T's activations are still there
                terms.chain.vjp(t, terms.by_output(t).div_(x.shape[1]), grad_params=gradient)
            self.update.apply(state.theta.flat, gradient.flat, state.moments, theta_step(progress))
            del terms  # and the activations with them
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: GotmareState) -> dict[str, Tensor]:
        """The spectral norms `sigma_t`; of more than one block `loss_forward` and `loss_moved`, see `label_leak`, of
        `batch_size` training samples with the last iteration's ζ."""
        return self._label_leak(problem, state) | spectral_norms(problem, state.theta)

    def _label_leak(self, problem: Problem, state: GotmareState) -> dict[str, Tensor]:
        last, replicas = len(problem.blocks), len(state.seeds)
        if last == 1:
            return {}
        batch = probe(len(problem.x), self.batch_size, replicas, problem.x.device)
        x, y = gather_shared(problem.x, batch), gather_shared(problem.y, batch)
        chain = BlockOutputs(problem.blocks, state.theta, x)
        forward, (_, z_steps) = chain.output(last), self._schedules(last, replicas)
        terms = _Terms(problem.loss, chain, y, self._penalty(problem.x, replicas))
        self._update_z(terms, [at(max(state.iteration - 1, 0) / self.iterations) for at in z_steps])
        return label_leak(problem.loss, y, forward, chain.output(last))

    def _update_z(self, terms: _Terms, steps: Sequence[float | Tensor]) -> None:
        """Rounds from z_{T−1} to z_1, each with the newest neighbours; moments are a mini-batch's own."""
        chain, gluing = terms.chain, range(len(steps), 0, -1)
        moments = [self.z_update.init(z.flatten(1)) for z in chain.z[:-1]]
        for _ in range(self.z_rounds):
            for t in gluing:
                pulled = chain.vjp(t + 1, terms.by_output(t + 1))
                assert pulled is not None
                chain.forget(t + 1)
                gradient = pulled.sub_(terms.by_output(t))
                z = chain.z[t - 1].clone(memory_format=torch.contiguous_format)
                self.z_update.apply(z.flatten(1), gradient.flatten(1), moments[t - 1], steps[t - 1])
                chain.move(t, z)

    def _schedules(self, blocks: int, replicas: int) -> tuple[Schedule, list[Schedule]]:
        """Of Θ's step, and of ζ_1..ζ_{T−1}."""
        z_steps = [schedule("z_step", value, replicas) for value in block_values("z_step", self.z_step, blocks - 1)]
        return schedule("theta_step", self.theta_step, replicas), z_steps

    def _penalty(self, like: Tensor, replicas: int) -> Tensor:
        """ρ, [S]."""
        return positive("rho", self.rho, replicas).to(like)


@dataclass
class _Terms:
    """The terms of a mini-batch: ρ/2 ‖z_t − block_t(z_{t−1})‖² of block t < T, and J of the last block."""

    loss: Loss
    chain: BlockOutputs
    y: Tensor
    rho: Tensor

    def by_output(self, t: int) -> Tensor:
        """Derivative of block t's own term by block_t(z_{t−1}), in a new tensor; by z_t it is the negative."""
        if t == len(self.chain.blocks):
            return self.loss.gradient(self.chain.output(t), self.y)
        residual = self.chain.residual(t)
        return residual.mul_(-broadcast(self.rho, residual))
