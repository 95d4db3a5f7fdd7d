"""Block-ADMM for networks with non-negative factorisations between their blocks (paper, §3.4, Eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from admm.blocks import Blocks, LinearLayer, Parameters
from admm.deepfacto.nmf import NMF, feature_maps, matrix, nonnegative_least_squares, sweep, warm_start
from admm.minibatches import (
    check_batch_size,
    flat_indices,
    gather_per_replica,
    minibatches,
    rows,
    scatter_per_replica,
    slices,
)
from admm.numbers import Options
from admm.optimizers.coupling import BlockOutputs, penalties
from admm.optimizers.protocol import (
    Problem,
    at_least_one,
    has_method,
    in_range,
    largest_singular_value,
    same_samples,
    whole_seeds,
)
from admm.optimizers.rules import Adam, UpdateRule
from admm.schedules import BlockValue, Schedule, Value, block_schedules, broadcast, refresh_schedule, schedule


@dataclass
class DeepFactoState:
    """Variables for T blocks, N samples, R replicas; a factorisation counts as a block.

    theta: parameters [R, P], and among its buffers the bases M. moments: the Θ rule's, by block. z: the outputs of the
    blocks [R, N, ...], coupling variables Z_t or, of a factorisation, scores S ≥ 0. u: duals, U_t in the shape of Z_t
    and V in that of the factorisation's input; none where the dual step is 0.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[list[Tensor]]
    z: list[Tensor]
    u: list[Tensor]


@dataclass(frozen=True)
class DeepFacto(Options):
    """Minimises Eq. 9: Block-ADMM's augmented Lagrangian, with γ/2 ‖Z − M S + V‖² for each block of one `NMF` layer.

    `init` lets a forward pass make the variables, each factorisation by `warm_rounds` rounds, the paper's warm start
    (§4.2). An iteration is an epoch of mini-batches in Gauss-Seidel order, as in `BlockADMM`: of a mini-batch first,
    from the last block to the first, S by sweeps of non-negative least squares, Z_t exactly where a factorisation
    follows and else by a gradient step, as Z_T; then Θ, and the duals. After the epoch each M by sweeps over all
    samples. During the first `frozen` iterations neither M nor the blocks before the first factorisation move.

    A mini-batch has runs of `together` samples of equal y, so that a loss of pairs has some.
    """

    iterations: int  # the schedules' horizon
    theta_step: BlockValue  # η
    z_step: BlockValue = 0.1  # ζ
    beta: BlockValue = 1.0  # of a factorisation: its γ; no schedule
    batch_size: int = 128
    together: int = 4
    primal_rounds: int = 1
    score_sweeps: int = 2
    basis_sweeps: int = 2
    warm_rounds: int = 100
    frozen: int = 0
    update: UpdateRule = field(default_factory=Adam)
    dual_step: Value = 0.0
    refresh: Value = 1.0  # each visit first moves Z_t and S this part of the way to the forward pass
    slice_size: int = 2000  # samples that are evaluated at a time outside of mini-batches

    def init(self, problem: Problem, seeds: Sequence[int]) -> DeepFactoState:
        """Θ by the problem's initialisation, M by the warm start, Z and S by a forward pass, duals 0.

        Raises ValueError as `factorisations` does, and for options out of range.
        """
        seeds = whole_seeds(seeds)
        schedules = self._schedules(len(problem.blocks), len(seeds))
        self._check(problem)
        problem.refuse_augmentation("DeepFacto")
        theta = problem.initial(seeds)
        factors = factorisations(problem.blocks, theta)
        x, z = problem.x.expand(len(seeds), *problem.x.shape), list[Tensor]()
        for t, block in enumerate(problem.blocks, start=1):
            before = z[-1] if z else x
            if t in factors:
                z.append(_projected(before, factors[t], self.warm_rounds))
            else:
                views, parts = theta.blocks[t - 1], before.split(self.slice_size, 1)
                z.append(torch.cat([block.forward(views, part, training=True) for part in parts], 1))
        residuals = [before if t in factors else z[t - 1] for t, before in enumerate([x, *z[:-1]], start=1)]
        return DeepFactoState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=[self.update.init(flat) for flat in by_block(problem.blocks, theta)],
            z=z,
            u=[torch.zeros_like(v) for v in residuals] if schedules["dual_step"][0].largest > 0.0 else [],
        )

    def step(self, problem: Problem, state: DeepFactoState) -> DeepFactoState:
        same_samples(problem, state.z[0])
        epoch = _Epoch(self, problem, state)
        batches = minibatches(
            len(problem.x),
            self.batch_size,
            state.seeds,
            state.iteration,
            problem.x.device,
            groups=problem.y if self.together > 1 else None,
            together=self.together,
        )
        for number, batch in enumerate(batches):
            epoch.visit(batch, (state.iteration + number / len(batches)) / self.iterations)
        if not epoch.is_frozen:
            for t in epoch.factors:
                epoch.update_basis(t)
        state.iteration += 1
        return state

    def parameters(self, state: DeepFactoState) -> Parameters:
        return state.theta

    def diagnostics(self, problem: Problem, state: DeepFactoState) -> dict[str, Tensor]:
        """By block, `residual_t`: ‖Z_t − block_t(Z_{t−1})‖/‖Z_t‖, of a factorisation ‖Z − M S‖/‖Z‖; and `lagrangian`,
        Eq. 9 as a mean over samples, with the J of slices of `slice_size` samples."""
        epoch = _Epoch(self, problem, state)
        square, norm = problem.x.new_zeros(2, len(state.z), len(state.seeds))
        value = torch.zeros_like(square[0])
        for part in slices(len(problem.x), self.slice_size):
            x, y = (data[part].expand(len(state.seeds), *data[part].shape) for data in (problem.x, problem.y))
            z, u = ([v[:, part] for v in variables] for variables in (state.z, state.u))
            visit = _Visit(epoch, BlockOutputs(problem.blocks, state.theta, x, z), y, u)
            residuals = visit.residuals()
            value += visit.lagrangian(residuals)
            for t, residual in enumerate(residuals, start=1):
                of_norm = visit.before(t) if t in epoch.factors else z[t - 1]
                square[t - 1] += residual.square().flatten(1).sum(1)
                norm[t - 1] += of_norm.square().flatten(1).sum(1)
        relative = {f"residual_{t}": r for t, r in enumerate((square / norm).sqrt(), start=1)}
        return relative | {"lagrangian": value / len(problem.x)}

    def _check(self, problem: Problem) -> None:
        has_method("update", self.update, "apply", "admm.optimizers.Adam()")
        check_batch_size(self.batch_size, len(problem.x))
        for name in (
            "iterations",
            "together",
            "primal_rounds",
            "score_sweeps",
            "basis_sweeps",
            "warm_rounds",
            "slice_size",
        ):
            at_least_one(name, getattr(self, name))
        in_range("frozen", self.frozen, self.iterations)
        if self.together > 1 and problem.y.ndim > 1:
            raise ValueError(f"optimizer.together: {self.together} needs class indices as y, not {problem.y.ndim} axes")

    def _schedules(self, blocks: int, replicas: int) -> dict[str, list[Schedule]]:
        """By hyperparameter; those of Θ and Z by block."""
        return {
            "dual_step": [schedule("dual_step", self.dual_step, replicas)],
            "refresh": [refresh_schedule(self.refresh, replicas)],
            "theta_step": block_schedules("theta_step", self.theta_step, blocks, replicas),
            "z_step": block_schedules("z_step", self.z_step, blocks, replicas),
        }


def factorisations(blocks: Blocks, theta: Parameters) -> dict[int, Tensor]:
    """The basis M [R, C, r] of each block t that is one `NMF` layer, a view into `theta`.

    Raises ValueError where an `NMF` is not a block of its own, or is not followed by a block of one linear layer, after
    which nothing comes.
    """
    found: dict[int, Tensor] = {}
    modules = dict(blocks.network.named_modules())
    for t, (names, views) in enumerate(zip(blocks.names, theta.blocks, strict=True), start=1):
        if not any(isinstance(modules[name], NMF) for name in names):
            continue
        if len(names) > 1:
            raise ValueError(
                f"split: an NMF layer is a block of its own, but block {t} is {list(names)}; cut before and after it"
            )
        after = blocks[t] if t < len(blocks) else None
        if (
            after is None
            or after.linear_weight(theta.blocks[t]) is None
            or not isinstance(after.layers[-1], LinearLayer)
        ):
            raise ValueError(
                f"split: the NMF layer {names[0]!r} must be followed by a block that ends with its one linear layer"
            )
        (found[t],) = views[0].values()
    return found


def by_block(blocks: Blocks, theta: Parameters) -> list[Tensor]:
    """The parameters of each block, views [R, P_t]."""
    sizes = [
        sum(p.numel() for name in names for p in blocks.network.get_submodule(name).parameters())
        for names in blocks.names
    ]
    return list(theta.flat.split(sizes, 1))


def _projected(z: Tensor, basis: Tensor, rounds: int) -> Tensor:
    """S for feature maps z of all samples by the exact projection on M, in place from `rounds` rounds."""
    whole = matrix(z)
    scores = warm_start(whole, basis, rounds)
    scores = nonnegative_least_squares(basis.mT @ basis, basis.mT @ whole, scores)
    return feature_maps(scores, like=z).contiguous()


class _Epoch:
    """One iteration of `DeepFacto` on a state."""

    def __init__(self, options: DeepFacto, problem: Problem, state: DeepFactoState) -> None:
        self.options, self.problem, self.state = options, problem, state
        self.blocks, self.theta = problem.blocks, state.theta
        self.factors = factorisations(problem.blocks, state.theta)
        self.beta = penalties(options.beta, len(state.z), len(state.seeds), like=problem.x)
        self.gradient = problem.blocks.parameters(torch.zeros_like(state.theta.flat))
        self.slices = [by_block(problem.blocks, parameters) for parameters in (state.theta, self.gradient)]
        self.schedules = options._schedules(len(state.z), len(state.seeds))
        self.is_frozen = bool(self.factors) and state.iteration < options.frozen
        first = min(self.factors) if self.is_frozen else 1
        self.trained = [t for t in range(first, len(state.z) + 1) if t not in self.factors]

    def visit(self, batch: Tensor, progress: float) -> None:
        """All updates but that of M for the samples [R, B] of a mini-batch."""
        state, problem = self.state, self.problem
        own = flat_indices(batch, len(problem.x))
        z, u = ([gather_per_replica(v, own) for v in variables] for variables in (state.z, state.u))
        visit = _Visit(
            self, BlockOutputs(problem.blocks, state.theta, rows(problem.x, batch), z), rows(problem.y, batch), u
        )
        at = {name: [schedule(progress) for schedule in values] for name, values in self.schedules.items()}
        visit.refresh(at["refresh"][0])
        for _ in range(self.options.primal_rounds):
            for t in range(len(z), 0, -1):
                visit.update_z(t, at["z_step"][t - 1])
            visit.update_theta(at["theta_step"])
        visit.update_duals(at["dual_step"][0])
        for whole, values in zip([*state.z, *state.u], [*visit.chain.z, *u], strict=True):
            scatter_per_replica(whole, own, values)

    def update_basis(self, t: int) -> None:
        """M by sweeps of non-negative least squares on γ/2 ‖Z − M S + V‖² over all samples."""
        state, basis = self.state, self.factors[t]
        before = state.z[t - 2] if t > 1 else self.problem.x.expand(len(state.seeds), *self.problem.x.shape)
        gram = basis.new_zeros(len(basis), basis.shape[2], basis.shape[2])
        cross = basis.new_zeros(len(basis), basis.shape[2], basis.shape[1])
        for part in slices(len(self.problem.x), self.options.slice_size):
            scores = matrix(state.z[t - 1][:, part])
            target = before[:, part] + state.u[t - 1][:, part] if state.u else before[:, part]
            gram.baddbmm_(scores, scores.mT)
            cross.baddbmm_(scores, matrix(target).mT)
        transposed = basis.mT.contiguous()
        for _ in range(self.options.basis_sweeps):
            sweep(gram, cross, transposed)
        basis.copy_(transposed.mT)


class _Visit:
    """The variables of the samples that are being updated. S, Z_t before a factorisation, and M never raise Eq. 9; the
    gradient steps of other Z_t and of Θ lower it where they are small enough."""

    def __init__(self, epoch: _Epoch, chain: BlockOutputs, y: Tensor, u: list[Tensor]) -> None:
        """u: none, or one per block."""
        self.epoch, self.chain, self.y, self.u = epoch, chain, y, u

    def before(self, t: int) -> Tensor:
        """What block t is applied to: Z_{t−1}, S or the inputs."""
        return self.chain.z[t - 2] if t > 1 else self.chain.x

    def residual(self, t: int) -> Tensor:
        """Z_t − block_t(Z_{t−1}), or Z − M S."""
        if t not in self.epoch.factors:
            return self.chain.residual(t)
        return self.before(t) - self._product(t)

    def residuals(self) -> list[Tensor]:
        """Of all blocks."""
        return [self.residual(t) for t in range(1, len(self.chain.z) + 1)]

    def lagrangian(self, residuals: Sequence[Tensor]) -> Tensor:
        """Eq. 9 summed over the samples, [R], given `residuals`."""
        value = self.epoch.problem.loss.value(self.chain.z[-1], self.y).sum(1)
        for t, (beta, residual) in enumerate(zip(self.epoch.beta, residuals, strict=True), start=1):
            value = value + beta / 2 * (residual + self._dual(t)).square().flatten(1).sum(1)
        return value

    def refresh(self, part: float | Tensor) -> None:
        """Z_t moves this part of the way to block_t(Z_{t−1}), of what has been moved already, and S to its projection:
        left short of it, all S are off by the same shift, which Θ would be trained to undo, and which a loss of
        directions alone never corrects."""
        for t in range(1, len(self.chain.z) + 1):
            output = self._projected(t) if t in self.epoch.factors else self.chain.output(t)
            pull = torch.as_tensor(broadcast(part, output)).to(output)
            self.chain.move(t, torch.lerp(self.chain.z[t - 1], output, pull))

    def update_z(self, t: int, step: float | Tensor) -> None:
        """Z_t, or S: Z_T and Z_t before an ordinary block by a gradient step, as in Algorithm 1."""
        if t in self.epoch.factors:
            self._update_scores(t)
        elif t + 1 in self.epoch.factors:
            self._update_factorised(t)
        else:
            gradient = self._force(t)
            if t == len(self.chain.z):
                gradient += self.epoch.problem.loss.gradient(self.chain.z[-1], self.y)
            else:
                gradient -= self._pulled(t + 1)
            self.chain.move(t, self.chain.z[t - 1] - gradient.mul_(broadcast(step, gradient)))

    def update_theta(self, steps: Sequence[float | Tensor]) -> None:
        """One step of Θ on the mean over the mini-batch of Σ_t β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖², η_t by block."""
        epoch = self.epoch
        for t in epoch.trained:
            self.chain.vjp(t, self._force(t).mul_(-1.0 / self.y.shape[1]), grad_params=epoch.gradient)
        theta, gradient = epoch.slices
        for t in epoch.trained:
            epoch.options.update.apply(theta[t - 1], gradient[t - 1], epoch.state.moments[t - 1], steps[t - 1])
        self.chain.forget_all()

    def update_duals(self, step: float | Tensor) -> None:
        """U_t and V grow by `step` times their constraint's residual (Alg. 1, line 12)."""
        for t, u in enumerate(self.u, start=1):
            residual = self.residual(t)
            u.add_(residual.mul_(broadcast(step, residual)))

    def _update_scores(self, t: int) -> None:
        """S ≥ 0 by sweeps on γ/2 ‖Z + V − M S‖² + ⟨∇, S⟩ + β_{t+1} σ²/2 ‖S − S_now‖², where ∇ is the gradient of
        coupling term t + 1 at S_now and σ the spectral norm of block t + 1: above Eq. 9, and equal to it at S_now."""
        now = self.chain.z[t - 1]
        gamma, beta = (self.epoch.beta[k].view(-1, 1, 1) for k in (t - 1, t))
        weight = self.epoch.blocks[t].linear_weight(self.epoch.theta.blocks[t])
        curvature = beta * largest_singular_value(weight).square().view(-1, 1, 1)
        descent = (self._force(t + 1) @ weight).view_as(now)  # −∇; a ReLU before W is the identity on S ≥ 0
        gram, cross = self._normal(t)
        gram = gamma * gram
        gram.diagonal(dim1=1, dim2=2).add_(curvature.squeeze(2))
        cross = gamma * cross + curvature * matrix(now) + matrix(descent)
        scores = matrix(now).clone(memory_format=torch.contiguous_format)  # of one sample it is a view
        for _ in range(self.epoch.options.score_sweeps):
            sweep(gram, cross, scores)
        self.chain.move(t, feature_maps(scores, like=self.before(t)))

    def _projected(self, t: int) -> Tensor:
        """argmin over S ≥ 0 of ‖Z + V − M S‖², from what S is."""
        scores = nonnegative_least_squares(*self._normal(t), matrix(self.chain.z[t - 1]))
        return feature_maps(scores, like=self.before(t))

    def _normal(self, t: int) -> tuple[Tensor, Tensor]:
        """MᵀM [R, r, r] and Mᵀ(Z + V) [R, r, n·…]."""
        basis = self.epoch.factors[t]
        return basis.mT @ basis, basis.mT @ matrix(self.before(t) + self._dual(t))

    def _update_factorised(self, t: int) -> None:
        """Z_t before a factorisation: the exact minimiser of β/2 ‖Z − block_t + U‖² + γ/2 ‖Z − M S + V‖²."""
        beta, gamma = (broadcast(self.epoch.beta[k], self.chain.z[t - 1]) for k in (t - 1, t))
        target = beta * (self.chain.output(t) - self._dual(t)) + gamma * (self._product(t + 1) - self._dual(t + 1))
        self.chain.move(t, target / (beta + gamma))

    def _product(self, t: int) -> Tensor:
        """M S as feature maps."""
        return feature_maps(self.epoch.factors[t] @ matrix(self.chain.z[t - 1]), like=self.before(t))

    def _dual(self, t: int) -> Tensor | float:
        return self.u[t - 1] if self.u else 0.0

    def _force(self, t: int) -> Tensor:
        """Derivative β_t (Z_t − block_t(Z_{t−1}) + U_t) of coupling term t by Z_t (Eq. 2)."""
        force = self.chain.residual(t).add_(self._dual(t))
        return force.mul_(broadcast(self.epoch.beta[t - 1], force))

    def _pulled(self, t: int) -> Tensor:
        """Minus the derivative of coupling term t by what block t is applied to."""
        pulled = self.chain.vjp(t, self._force(t))
        assert pulled is not None
        return pulled
