"""DeepFacto (paper, §3.4): Block-ADMM for networks with non-negative factorisations between their blocks (Eq. 9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.checks import at_least_one, in_range
from admm.layers import LinearLayer
from admm.minibatches import expand, minibatches, slices
from admm.nmf import NMF, feature_maps, hals_sweep, matrix, nonnegative_least_squares, warm_start
from admm.numbers import Options
from admm.optimizers.block_admm import update_minibatch
from admm.optimizers.checks import check_last_part, check_minibatch_options, same_samples
from admm.optimizers.coupling import (
    AugmentedLagrangian,
    Hyperparameters,
    Schedules,
    StepSize,
    ZState,
    ZUpdate,
    gather,
    mixing_schedule,
    penalties,
    scatter,
)
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, largest_singular_value, whole_seeds
from admm.optimizers.rules import Adam, Moments, UpdateRule
from admm.optimizers.running import Runner
from admm.schedules import BlockValue, Value, block_schedules, schedule
from admm.visits import Visit

Factors = dict[int, Tensor]  # the basis M [R, C, r] of a factorisation, by the number t of its block


@dataclass(repr=False)
class DeepFactoState(ShortRepr):
    """DeepFacto's variables for T blocks, N samples, R replicas; each factorisation is a block.

    Attributes:
        seeds, iteration, made_with: see `admm.optimizers.protocol.State`.
        theta: parameters [R, P]; the bases M are among its buffers.
        moments: those of `theta_update`, by block.
        z: T tensors [R, N, ...], coupling variables Z_t, or the scores S ≥ 0 of a factorisation.
        u: T duals, U_t in the shape of Z_t, or V in that of a factorisation's input; empty where the dual step is 0.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    moments: list[Moments]
    z: list[Tensor]
    u: list[Tensor]
    made_with: dict[str, str] = field(default_factory=dict, kw_only=True)


class FactorisedLagrangian(AugmentedLagrangian):
    """Eq. 9 for some samples: Eq. 2, in which the term of a factorisation is γ/2 ‖Z − M S + V‖².

    For the factorisation of block t, Z is its input, S = Z_t, V = U_t and γ = β_t. `factors` has the bases M. With an
    `error_weight` w, Z keeps the part 1 − w of the error Z − M S that there is after the mixing.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Parameters,
        factors: Factors,
        beta: Tensor,
        visit: Visit,
        z: list[Tensor],
        u: Sequence[Tensor],
        error_weight: float | None = None,
    ) -> None:
        super().__init__(problem, theta, beta, visit, z, u)
        self.factors, self.error_weight = factors, error_weight
        self.kept_errors: Factors = {}

    def mix_with_forward(self, mixing: StepSize, ahead: Tensor | None = None) -> Tensor | None:
        """Do the mixing of Block-ADMM; then remember the errors that are kept."""
        output = super().mix_with_forward(mixing, ahead)
        if self.error_weight is not None:
            self.kept_errors = {t: self.residual(t).mul_(1.0 - self.error_weight) for t in self.factors}
        return output

    def residual(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return Z_t − block_t(Z_{t−1}), or Z − M S for a factorisation."""
        return self.block_input(t) - self.product(t) if t in self.factors else super().residual(t, for_vjp)

    def product(self, t: int) -> Tensor:
        """Return M S as feature maps."""
        return feature_maps(self.factors[t] @ matrix(self.z[t - 1]), like=self.block_input(t))

    def projected(self, t: int) -> Tensor:
        """Return the minimiser over S ≥ 0 of ‖Z + V − M S‖², by iterations from the current S."""
        scores = nonnegative_least_squares(*self._normal_equations(t), matrix(self.z[t - 1]))
        return feature_maps(scores, like=self.block_input(t))

    def factorised_minimiser(self, t: int) -> Tensor:
        """Return the minimiser over Z_t, the input of a factorisation, of the two terms of Eq. 9 that contain it.

        They are β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖² + γ/2 ‖Z_t − M S + V‖², the latter less the error that is kept.
        """
        beta, gamma = self.weights[t - 1 : t + 1]
        from_below, from_above = self.output(t), self.product(t + 1)
        if t + 1 in self.kept_errors:
            from_above = from_above + self.kept_errors[t + 1]
        if self.u:
            from_below, from_above = from_below - self.u[t - 1], from_above - self.u[t]
        return (beta * from_below + gamma * from_above) / (beta + gamma)

    def swept_scores(self, t: int, sweeps: int) -> Tensor:
        """Return S ≥ 0 after sweeps on an upper bound of Eq. 9, which is tight at the current scores S_now.

        It is γ/2 ‖Z + V − M S‖² + ⟨∇, S⟩ + β_{t+1} σ²/2 ‖S − S_now‖², up to a constant, where ∇ is the gradient of
        coupling term t + 1 at S_now, and σ the spectral norm of block t + 1.
        """
        now = self.z[t - 1]
        gamma, beta = (self.beta[k].view(-1, 1, 1) for k in (t - 1, t))
        weight = self.blocks[t].linear_weight(self.theta.blocks[t])
        assert weight is not None  # as `factorisations` has checked
        curvature = beta * largest_singular_value(weight).square().view(-1, 1, 1)
        descent = (self.coupling_gradient(t + 1) @ weight).view_as(now)  # −∇; a ReLU before W is the identity on S ≥ 0
        gram, cross = self._normal_equations(t)
        gram = gamma * gram
        gram.diagonal(dim1=1, dim2=2).add_(curvature.squeeze(2))
        cross = gamma * cross + curvature * matrix(now) + matrix(descent)
        scores = matrix(now).clone(memory_format=torch.contiguous_format)  # for one sample `matrix` returns a view
        for _ in range(sweeps):
            hals_sweep(gram, cross, scores)
        return feature_maps(scores, like=self.block_input(t))

    def _forward_output(self, t: int, before: Tensor) -> Tensor:
        # Z_{t−1} has moved already, unlike in a plain forward pass. If S stopped short of its projection, all S would
        # be off by the same shift; Θ would be trained to undo it, and a loss of directions alone never corrects it.
        return self.projected(t) if t in self.factors else self.output(t)

    def _normal_equations(self, t: int) -> tuple[Tensor, Tensor]:
        """Return MᵀM [R, r, r] and Mᵀ(Z + V) [R, r, n·…]."""
        basis, before = self.factors[t], self.block_input(t)
        return basis.mT @ basis, basis.mT @ matrix(before + self.u[t - 1] if self.u else before)


@dataclass(frozen=True)
class FactorisedZUpdate(ZUpdate):
    """An update of S by sweeps, of Z_t before a factorisation to its minimiser, and of any other Z_t as in `ZUpdate`.

    The `score_sweeps` are sweeps of non-negative least squares. Updates of S, and of Z_t before a factorisation, never
    raise Eq. 9; gradient steps lower it if they are small enough.
    """

    score_sweeps: int = 2

    def update_z(self, lagrangian: AugmentedLagrangian, state: ZState, t: int, step: StepSize) -> None:
        """Update Z_t, or S."""
        assert isinstance(lagrangian, FactorisedLagrangian)
        if t in lagrangian.factors:
            lagrangian.set_z(t, lagrangian.swept_scores(t, self.score_sweeps))
        elif t + 1 in lagrangian.factors:
            lagrangian.set_z(t, lagrangian.factorised_minimiser(t))
        else:
            super().update_z(lagrangian, state, t, step)


def update_blocks(
    lagrangian: AugmentedLagrangian,
    rule: UpdateRule,
    moments: Sequence[Moments],
    trained: Sequence[int],
    steps: Sequence[StepSize | list[Tensor]],
) -> None:
    """Move Θ_t once, for each number t in `trained`, by its own η_t in `steps` and its own moments."""
    blocks, stacks = lagrangian.blocks, by_block(lagrangian.blocks, lagrangian.theta)
    gradient = blocks.gradient()
    lagrangian.theta_gradient(gradient, trained)
    for t in trained:
        rule.update(stacks[t - 1], blocks.total(gradient, [t - 1]), moments[t - 1], steps[t - 1])
    lagrangian.forget_all()


@dataclass(frozen=True)
class DeepFacto(Options, Optimizer[DeepFactoState]):
    """Block-ADMM on mini-batches for networks in which some blocks are factorisations, one `NMF` layer each.

    It minimises Eq. 9, Block-ADMM's augmented Lagrangian with γ/2 ‖Z − M S + V‖² for each factorisation, M ≥ 0, S ≥ 0.
    `init` makes the variables by a forward pass, those of each factorisation by the paper's warm start (§4.2). An
    iteration is an epoch of mini-batches in Gauss-Seidel order, as in `BlockADMM`. Each visit updates, from the last
    block to the first, S by sweeps of non-negative least squares, Z_t before a factorisation to its exact minimiser,
    and any other Z_t by a gradient step; then Θ, and the duals. After the epoch, sweeps over all samples update each M.
    They never raise Eq. 9. The defaults depart from the paper, which has dual_step=1 (Eq. 9) and forward_mixing=0
    (§3.1).

    Without an `error_weight` the blocks before a factorisation are trained to make its error small more than anything
    else, even by features that are nearly 0: J does not mind that if it takes outputs of length 1.

    Args:
        iterations: iterations until the schedules end, at least 1.
        theta_step: η_t ≥ 0, the step size of Θ_t; may have a schedule, and one value per replica, and per block.
        z_step: ζ_t ≥ 0, the step size of Z_t; as theta_step.
        beta: β_t > 0, the penalties, which are the γ of factorisations; one value per replica, and per block.
        batch_size: samples per mini-batch, from 1 to N.
        group_size: the number of samples of equal y that follow one another in a mini-batch, so that a loss of pairs
            has some; at least 1.
        primal_rounds: primal updates, Z and then Θ, per visit, at least 1.
        score_sweeps: sweeps of S per primal update, at least 1.
        basis_sweeps: sweeps of M per epoch, at least 1.
        warm_rounds: rounds of S and M in the warm start, at least 1.
        frozen: the first iterations, during which neither M nor the blocks before the first factorisation move; fewer
            than `iterations`.
        theta_update: the optimizer of Θ.
        dual_step: α ≥ 0, the part of the residual that U and V grow by, 1 in Algorithm 1; a schedule, or one value per
            replica.
        forward_mixing: from 0 to 1, the part of the way to block_t(Z_{t−1}), or to its projection, that each visit
            first moves Z_t and S; as dual_step.
        error_weight: w ≥ 0 and below 1; of the error Z − M S that there is after the mixing, Z keeps the part 1 − w in
            its update. With 0, only what J changes in S trains the blocks before a factorisation, by M (S − S_now).
            None keeps nothing, as in Eq. 9.
        slice_size: samples that are evaluated at a time outside of mini-batches, at least 1.

    Raises:
        ValueError: from `init`, with the name of an argument that is out of range or does not fit the problem, and as
            `factorisations` does.

    References:
        Khorram, Fu, Danesh, Qi & Li (2021), "Stochastic Block-ADMM for Training Deep Networks",
        https://arxiv.org/abs/2105.00339
    """

    iterations: int
    theta_step: BlockValue
    z_step: BlockValue = 0.1
    beta: BlockValue = 1.0
    batch_size: int = 128
    group_size: int = 4
    primal_rounds: int = 1
    score_sweeps: int = 2
    basis_sweeps: int = 2
    warm_rounds: int = 100
    frozen: int = 0
    theta_update: UpdateRule = field(default_factory=Adam)
    dual_step: Value = 0.0
    forward_mixing: Value = 1.0
    error_weight: float | None = None
    slice_size: int = 2000

    @property
    def keeps(self) -> dict[str, str]:
        return {"theta_update": self.theta_update.keeps}

    def init(self, problem: Problem, seeds: Sequence[int]) -> DeepFactoState:
        """Return Θ by the problem's initialisation, M by the warm start, Z and S by a forward pass, and duals 0."""
        seeds = whole_seeds(seeds)
        schedules = self._schedules(len(problem.blocks), len(seeds))
        self._check(problem, seeds)
        problem.refuse_augmentation("DeepFacto")
        theta = problem.initial(seeds)
        factors = factorisations(problem.blocks, theta)
        x, z = self._factorised_inputs(problem, factors, len(seeds)), list[Tensor]()
        for t, block in enumerate(problem.blocks, start=1):
            if t in factors:
                z.append(_warm_scores(z[-1] if z else x, factors[t], self.warm_rounds))
            else:
                views, parts = theta.blocks[t - 1], self._parts(problem, seeds, z)
                z.append(torch.cat([block.forward(views, part, Visit(seeds, (0,))) for part in parts], 1))
        residuals = [before if t in factors else z[t - 1] for t, before in enumerate([x, *z[:-1]], start=1)]
        return DeepFactoState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            moments=[self.theta_update.init(stacks) for stacks in by_block(problem.blocks, theta)],
            z=z,
            u=[torch.zeros_like(v) for v in residuals] if schedules.dual_step.largest > 0.0 else [],
            made_with=self.keeps,
        )

    def step(self, problem: Problem, state: DeepFactoState) -> DeepFactoState:
        """Do one epoch: `update_minibatch` for each mini-batch, then the sweeps of M."""
        same_samples(problem, state.z[0])
        schedules = self._schedules(len(state.z), len(state.seeds))
        if schedules.dual_step.largest > 0.0 and not state.u:
            raise ValueError(
                f"dual_step: {self.dual_step}, but the state was made with 0 and keeps no duals; take dual_step=0 "
                "or a new state"
            )
        factors, beta = factorisations(problem.blocks, state.theta), self._penalties(problem, state)
        is_frozen = bool(factors) and state.iteration < self.frozen
        first = min(factors) if is_frozen else 1
        trained = [t for t in range(first, len(state.z) + 1) if t not in factors]
        batches = self._minibatches(problem, state)
        visits = problem.visits(state.seeds, batches, [(state.iteration, number) for number in range(len(batches))])
        run = Runner(problem, self, (state, factors, beta), schedules, len(batches), self.primal_rounds)
        for batch, visit, row in zip(batches, visits, run.rows(state.moments), strict=True):
            run(visit, row, batch=batch, trained=tuple(trained))
        if not is_frozen:
            for t, basis in factors.items():
                self._update_basis(problem, state, t, basis)
        state.iteration += 1
        return state

    def visit(
        self,
        problem: Problem,
        state: DeepFactoState,
        factors: Factors,
        beta: Tensor,
        visit: Visit,
        rounds: list[Hyperparameters],
        batch: Tensor,
        trained: Sequence[int],
    ) -> None:
        """Update Z and S, Θ of the blocks in `trained`, and the duals of a mini-batch, in place."""
        lagrangian = _lagrangian(problem, state, factors, beta, batch, visit, self.error_weight)
        z_update = FactorisedZUpdate("gradient", score_sweeps=self.score_sweeps)

        def update(lagrangian: AugmentedLagrangian, h: Hyperparameters) -> None:
            update_blocks(lagrangian, self.theta_update, state.moments, trained, h.theta_steps)

        update_minibatch(lagrangian, z_update, ZState(), update, rounds)
        scatter(batch, [*state.z, *state.u], [*lagrangian.z, *lagrangian.u])

    def _minibatches(self, problem: Problem, state: DeepFactoState) -> list[Tensor]:
        """Return the indices [R, B] of an epoch's mini-batches."""
        n, k, device, groups = problem.n_samples, state.iteration, problem.device, self._groups(problem)
        return minibatches(n, self.batch_size, state.seeds, k, device, groups=groups, group_size=self.group_size)

    def _groups(self, problem: Problem) -> Tensor | None:
        """Return the targets [N] whose equal ones follow one another, or None. Raises ValueError."""
        if self.group_size == 1:
            return None
        if not isinstance(problem.y, Tensor | np.ndarray):
            raise ValueError(
                f"group_size: {self.group_size} needs the targets of all samples before training; take tensors or "
                "arrays of class indices, or group_size=1"
            )
        y = torch.as_tensor(np.array(problem.y)) if isinstance(problem.y, np.ndarray) else problem.y
        if y.ndim > 1:
            raise ValueError(f"group_size: {self.group_size} needs class indices as y, not {y.ndim} axes")
        return y

    def _parts(self, problem: Problem, seeds: Sequence[int], z: list[Tensor]) -> Iterator[Tensor]:
        """Yield slices of what the block after the coupling variables `z` is applied to."""
        if z:
            yield from z[-1].split(self.slice_size, 1)
            return
        parts = list(slices(problem.n_samples, self.slice_size))
        for visit in problem.visits(seeds, parts, [(0,)] * len(parts)):
            yield visit.x

    @staticmethod
    def _factorised_inputs(problem: Problem, factors: Iterable[int], replicas: int) -> Tensor:
        """Return all inputs [R, N, ...] if the first block is a factorisation; else nothing."""
        if 1 not in factors:
            return problem.like
        inputs: Tensor = expand(problem.whole("DeepFacto, whose first block is a factorisation,")[0], replicas)
        return inputs

    def _update_basis(self, problem: Problem, state: DeepFactoState, t: int, basis: Tensor) -> None:
        """Update M in place, by sweeps of non-negative least squares on γ/2 ‖Z − M S + V‖² over all samples."""
        before = state.z[t - 2] if t > 1 else self._factorised_inputs(problem, [t], len(state.seeds))
        gram = basis.new_zeros(len(basis), basis.shape[2], basis.shape[2])
        cross = basis.new_zeros(len(basis), basis.shape[2], basis.shape[1])
        for part in slices(problem.n_samples, self.slice_size):
            scores = matrix(state.z[t - 1][:, part])
            target = before[:, part] + state.u[t - 1][:, part] if state.u else before[:, part]
            gram.baddbmm_(scores, scores.mT)
            cross.baddbmm_(scores, matrix(target).mT)
        transposed = basis.mT.contiguous()
        for _ in range(self.basis_sweeps):
            hals_sweep(gram, cross, transposed)
        basis.copy_(transposed.mT)

    def diagnostics(self, problem: Problem, state: DeepFactoState) -> dict[str, Tensor]:
        """Return `residual_t` and `lagrangian`.

        `residual_t` is ‖Z_t − block_t(Z_{t−1})‖/‖Z_t‖, or ‖Z − M S‖/‖Z‖ for a factorisation. `lagrangian` is Eq. 9
        divided by N, with J evaluated on slices of `slice_size` samples.
        """
        same_samples(problem, state.z[0])
        factors, beta = factorisations(problem.blocks, state.theta), self._penalties(problem, state)
        square, norm = problem.like.new_zeros(2, len(state.z), len(state.seeds))
        value = torch.zeros_like(square[0])
        parts = list(slices(problem.n_samples, self.slice_size))
        visits = problem.visits(state.seeds, parts, [(state.iteration, part.start) for part in parts])
        for part, visit in zip(parts, visits, strict=True):
            lagrangian = _lagrangian(problem, state, factors, beta, part, visit)
            value += lagrangian.value()
            for t in range(1, len(state.z) + 1):
                target = lagrangian.block_input(t) if t in factors else lagrangian.z[t - 1]
                square[t - 1] += lagrangian.residual(t).square().flatten(1).sum(1)
                norm[t - 1] += target.square().flatten(1).sum(1)
        relative = {f"residual_{t}": r for t, r in enumerate((square / norm).sqrt(), start=1)}
        return relative | {"lagrangian": value / problem.n_samples}

    def _check(self, problem: Problem, seeds: Sequence[int]) -> None:
        check_minibatch_options(problem, seeds, self.iterations, self.theta_update, self.batch_size)
        sweeps = ("score_sweeps", "basis_sweeps", "warm_rounds")
        for name in ("group_size", "primal_rounds", *sweeps, "slice_size"):
            at_least_one(name, getattr(self, name))
        check_last_part(problem, "slice_size", self.slice_size)
        in_range("frozen", self.frozen, self.iterations)
        if self.error_weight is not None:
            in_range("error_weight", self.error_weight, 1.0)
        self._groups(problem)

    def _penalties(self, problem: Problem, state: DeepFactoState) -> Tensor:
        return penalties(self.beta, len(state.z), len(state.seeds), like=problem.like)

    def _schedules(self, n_blocks: int, n_replicas: int) -> Schedules:
        return Schedules(
            theta_steps=block_schedules("theta_step", self.theta_step, n_blocks, n_replicas),
            z_steps=block_schedules("z_step", self.z_step, n_blocks, n_replicas),
            dual_step=schedule("dual_step", self.dual_step, n_replicas),
            mixing=mixing_schedule(self.forward_mixing, n_replicas),
        )


def factorisations(blocks: Blocks, theta: Parameters) -> Factors:
    """Return the basis M [R, C, r], a view into `theta`, of each block t that is one `NMF` layer.

    Raises ValueError unless each `NMF` layer is a block alone, followed by a block that ends with its one linear layer.
    """
    factors: Factors = {}
    modules = dict(blocks.network.named_modules())
    for t, (names, views) in enumerate(zip(blocks.names, theta.blocks, strict=True), start=1):
        if not any(isinstance(modules[name], NMF) for name in names):
            continue
        if len(names) > 1:
            raise ValueError(
                f"split: an NMF layer must be a block alone, but block {t} is {list(names)}; cut before and after it"
            )
        is_followed = t < len(blocks) and isinstance(blocks[t].layers[-1], LinearLayer)  # blocks[t] is block t + 1
        if not is_followed or blocks[t].linear_weight(theta.blocks[t]) is None:
            raise ValueError(
                f"split: the NMF layer {names[0]!r} must be followed by a block that ends with its one linear layer"
            )
        (factors[t],) = views[0].values()
    return factors


def by_block(blocks: Blocks, theta: Parameters) -> list[list[Tensor]]:
    """Return the trained parameters of each block, [R, *shape] each. Raises ValueError where they share some."""
    if blocks.shared_parameters:
        raise ValueError("network: blocks share parameters, which DeepFacto does not support")
    numbers = blocks.numbers_of_parameters()
    return [[p for name, p in theta.stacks.items() if numbers[name] == t] for t in range(1, len(blocks) + 1)]


def _lagrangian(
    problem: Problem,
    state: DeepFactoState,
    factors: Factors,
    beta: Tensor,
    batch: Tensor | slice,
    visit: Visit,
    error_weight: float | None = None,
) -> FactorisedLagrangian:
    """Return Eq. 9 for a visit of the samples `batch`, see `gather`."""
    z, u = gather(problem, batch, [state.z, state.u])
    return FactorisedLagrangian(problem, state.theta, factors, beta, visit, z, u, error_weight)


def _warm_scores(z: Tensor, basis: Tensor, rounds: int) -> Tensor:
    """Return S for feature maps z of all samples, by the projection on M, which `warm_start` has updated in place."""
    maps = matrix(z)
    scores = warm_start(maps, basis, rounds)
    scores = nonnegative_least_squares(basis.mT @ basis, basis.mT @ maps, scores)
    return feature_maps(scores, like=z).contiguous()
