"""The augmented Lagrangian of some samples, and the updates of Z and Θ (paper, Algorithms 1 and 2).

Block-ADMM, its online form, BlockProp and DeepFacto share them.

Blocks are numbered t = 1..T as in the paper; Python lists of them start at 0, so `z[t - 1]` is Z_t. The lines of an
algorithm are counted from its `Define` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.checks import at_least_one, in_range, one_of
from admm.layers import ParamDict
from admm.losses import ProximalLoss
from admm.minibatches import flat_indices, gather_per_replica, scatter_per_replica
from admm.numbers import Options
from admm.optimizers.checks import check_prox
from admm.optimizers.least_squares import ridge_inverse
from admm.optimizers.protocol import Problem, ShortRepr
from admm.optimizers.rules import Adam, Moments, UpdateRule
from admm.schedules import (
    BlockValue,
    Schedule,
    Value,
    block_schedules,
    block_values,
    broadcast,
    positive,
    replica_values,
    schedule,
)
from admm.user_warnings import warn
from admm.visits import Visit

StepSize = float | Tensor  # one for all replicas, or one per replica [S]
LARGEST_SHARE = 0.4  # of the way to the minimum of block t + 1's coupling term that a clipped step of Z_t goes
TURNED = 0.02  # β_{t+1} ζ_t of values by block, where ζ or β is not given
PASSED_ON = 0.05  # β ζ of the same values for all blocks then


class Hyperparameters(NamedTuple):
    """The values of what may have a schedule, at one moment of the run.

    Attributes:
        theta_steps: η for all of Θ, or for DeepFacto η_1..η_T; or in place of each what `UpdateRule.coefficients` are.
        z_steps: ζ_t of the coupling variables that the algorithm moves.
        dual_step: α.
        mixing: the part of the way to the forward pass that each visit first moves Z.
    """

    theta_steps: list[StepSize | list[Tensor]]
    z_steps: list[StepSize]
    dual_step: StepSize
    mixing: StepSize


class Schedules(NamedTuple):
    """The schedules of `Hyperparameters`; without options for α and the mixing, neither has an effect."""

    theta_steps: list[Schedule]
    z_steps: list[Schedule]
    dual_step: Schedule = Schedule(0.0, 0.0)
    mixing: Schedule = Schedule(0.0, 0.0)

    def at(self, progress: float) -> Hyperparameters:
        """Return the values where the part `progress` of the run, from 0 to 1, is done."""
        theta_steps, z_steps = ([at(progress) for at in schedules] for schedules in (self.theta_steps, self.z_steps))
        return Hyperparameters([*theta_steps], z_steps, self.dual_step(progress), self.mixing(progress))

    def table(
        self, progress: Sequence[float], replicas: int, rule: UpdateRule, moments: Sequence[Moments], rounds: int
    ) -> list[Hyperparameters]:
        """Return the values at K moments for each of some rounds of updates, [K, S] in float64 or a float that stays.

        In place of η is what `UpdateRule.coefficients` returns for these updates, where `moments` are those before.
        """
        z_steps = [at.table(progress, replicas) for at in self.z_steps]
        dual_step, mixing = (at.table(progress, replicas) for at in (self.dual_step, self.mixing))
        theta_steps: list[list[Tensor]] = []  # by block, all rounds of a moment before those of the next one
        for at, before in zip(self.theta_steps, moments, strict=True):
            steps = torch.as_tensor(at.table(progress, replicas), dtype=torch.float64).expand(len(progress), replicas)
            theta_steps.append(rule.coefficients(steps.repeat_interleave(rounds, 0), before))
        by_round = ([[c[r::rounds] for c in of_block] for of_block in theta_steps] for r in range(rounds))
        return [Hyperparameters([*steps], z_steps, dual_step, mixing) for steps in by_round]


def penalties(beta: BlockValue, n_blocks: int, n_replicas: int, like: Tensor, name: str = "beta") -> Tensor:
    """Return the penalties β [T, S] in the dtype of `like`.

    Raises ValueError with their `name` unless all are positive and finite, also in this dtype.
    """
    values = torch.stack([positive(name, value, n_replicas) for value in block_values(name, beta, n_blocks)])
    found = values.to(like)
    if bool((is_lost := (found == 0.0) | found.isinf()).any()):
        kind, lost = torch.finfo(like.dtype).dtype, float(values[is_lost].max())
        way = "smaller" if lost > 1.0 else "larger"
        raise ValueError(
            f"{name}: {lost:.0e}, for {n_blocks} blocks, is beyond {kind}; give {way} values of it and z_step, cut "
            "into fewer blocks, or take float64"
        )
    return found


def coupling_values(
    z_step: BlockValue | None,
    beta: BlockValue | None,
    n_blocks: int,
    n_replicas: int,
    last: float,
    by_block: bool | Tensor,
    name: str = "beta",
) -> tuple[BlockValue, BlockValue]:
    """Return ζ and β with values for what is None: with `by_block` such that β_{t+1} ζ_t = 0.02 and ζ_T = `last`.

    Without both, β_t ζ_t is 1 then, which gives the gradients by Θ the scale of those by back-propagation. This is for
    one clipped step per visit, from a forward pass: later ones would take Z_t back to block_t(Z_{t−1}), and block t + 1
    would learn to undo what block t has learnt. Else ζ = `last` and β = 0.05/ζ for all blocks. `by_block` may be one
    for each replica, [S]. `name` is that of β.

    Raises ValueError for another number of values, for a β of 0, or where ζ starts at 0 and β is None.
    """
    if isinstance(by_block, Tensor) and bool(by_block.any()) and not bool(by_block.all()):
        (steps, weights), (step, weight) = (
            coupling_values(z_step, beta, n_blocks, n_replicas, last, kind, name) for kind in (True, False)
        )
        return (
            _chosen(by_block, steps, step, n_blocks) if z_step is None else z_step,
            _chosen(by_block, weights, weight, n_blocks) if beta is None else beta,
        )
    if not torch.as_tensor(by_block).all():
        return last if z_step is None else z_step, PASSED_ON / last if beta is None else beta
    if z_step is None and beta is not None:
        behind = (positive(name, value, n_replicas) for value in block_values(name, beta, n_blocks)[1:])
        return {"blocks": [*(TURNED / b for b in behind), last]}, beta
    if z_step is None:
        z_step = {"blocks": [last * TURNED ** (n_blocks - t) for t in range(1, n_blocks + 1)]}
    if beta is None:
        starts = [at.start for at in block_schedules("z_step", z_step, n_blocks, n_replicas)]
        if not all(bool(torch.as_tensor(start, dtype=torch.float64).all()) for start in starts):
            raise ValueError(f"{name}: is None, but z_step starts at 0, from which it cannot be found; give it")
        beta = {"blocks": [1.0 / starts[0], *(TURNED / start for start in starts[:-1])] if starts else []}
    return z_step, beta


def _chosen(by_block: Tensor, one: BlockValue, other: BlockValue, n_blocks: int) -> BlockValue:
    """Return numbers per block and replica: of `one` where `by_block` [S], else of `other`."""
    pairs = zip(*(block_values("", values, n_blocks) for values in (one, other)), strict=True)
    return {"blocks": [torch.where(by_block, *(replica_values("", v, len(by_block)) for v in p)) for p in pairs]}


def label_leak(
    problem: Problem, theta: Parameters, batch_size: int, moved_lagrangian: Callable[[Tensor], AugmentedLagrangian]
) -> dict[str, Tensor]:
    """Return two losses [S] whose difference shows how much Z_{T−1} tells of the labels; nothing for one block.

    `loss_forward` is the mean J of `batch_size` training samples after a forward pass. `loss_moved` is that of the last
    block's outputs for Z_{T−1} in `moved_lagrangian`, that of the samples with indices [S, B], of whose Z it has moved
    copies by J's gradient.
    """
    last = len(problem.blocks)
    if last == 1:
        return {}
    moved = moved_lagrangian(problem.evenly_spaced(batch_size, theta.replicas))
    forward = BlockOutputs(problem.blocks, theta, moved.visit).z[-1]
    outputs = {"loss_forward": forward, "loss_moved": moved.output(last)}
    values = {name: problem.loss.value(z, moved.visit.y) for name, z in outputs.items()}
    positions = {name: moved.visit.n * math.prod(value.shape[2:]) for name, value in values.items()}
    means = {name: value.flatten(1).sum(1) / positions[name] for name, value in values.items()}
    problem.parallel.add_up(*means.values(), over="samples")
    return means


def _sample_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products [S, n] of the samples of values [S, n, …]."""
    return (a * b).unsqueeze(2).flatten(2).sum(2)


def warn_of_label_leak(optimizer: object, rows: Sequence[Mapping[str, float]]) -> None:
    """Warn if the newest rows of a history are the first in which the label shows in the coupling variables.

    The label shows if, from the middle of the optimizer's iterations on, some replica's `loss_forward` (the loss in
    evaluation) exceeds its `loss_moved` (the loss that the last block is trained on) by more than a sixth of its
    `loss_forward` before the first iteration. With a smaller difference, networks still reach the accuracy that they
    have without a leak. Of a history that begins later, this loss is not known, and there is no warning.
    """
    if not rows or "loss_moved" not in rows[-1]:
        return
    start = {row["replica"]: row["loss_forward"] for row in takewhile(lambda row: row["iteration"] == 0, rows)}
    newest, middle = rows[-1]["iteration"], getattr(optimizer, "iterations", 0) / 2

    def leaks(row: Mapping[str, float]) -> bool:
        is_late = row["iteration"] >= max(middle, 1)
        return is_late and row["loss_forward"] - row["loss_moved"] > start.get(row["replica"], math.inf) / 6 > 0

    # Older rows are searched only if one of the newest leaks.
    if any(map(leaks, takewhile(lambda row: row["iteration"] == newest, reversed(rows)))):
        first = next(filter(leaks, rows))
        if first["iteration"] < newest:
            return
        warn(
            f"z_step: the label shows in the coupling variables: after iteration {first['iteration']:g} the "
            f"loss is {first['loss_moved']:.3g} where these have moved, on which the last block is trained, and "
            f"{first['loss_forward']:.3g} after a forward pass, as in evaluation; lower z_step (ζ)"
        )


def warn_of_lost_signal(
    steps: Sequence[Schedule], weights: Sequence[Tensor], dtype: torch.dtype, rule: UpdateRule, is_exact: bool
) -> None:
    """Warn if the loss's gradient is lost on its way to block 1, below rounding errors or the ε of Adam for Θ.

    Gradient steps ζ_t, with penalties β_t [S], move Z_1 by ζ_1 Π_{t>1} β_t ζ_t of it, and Θ_1 gets β_1 of this. A tenth
    of the rounding errors is too little, unless residuals are kept besides Z, and so are ten ε, as gradients by Θ are
    far below 1 in the first place. The caller is a check of an optimizer's `init`.
    """
    signal = math.prod(float(beta.max()) * step.largest for beta, step in zip(weights, steps, strict=True))
    if signal == 0.0:
        return
    move, kind = signal / float(weights[0].max()), torch.finfo(dtype)
    if move < (1e8 * kind.tiny if is_exact else kind.eps / 10.0):
        warn(
            f"z_step: Z_1 moves by the part {move:.0e} of the loss's gradient, less than {kind.dtype} can tell, and "
            "block 1 will hardly learn, as each block passes on z_step times beta (or rho) of it; raise z_step or "
            "beta, or cut into fewer blocks. "
            'The defaults, with z_update "clipped", reach 18 blocks, but not with sweep="batch"'
        )
    elif isinstance(rule, Adam) and signal < 10.0 * rule.epsilon:
        warn(
            f"z_step: block 1 gets the part {signal:.0e} of the loss's gradient and will hardly learn, as each block "
            "passes on z_step times beta (or rho) of it; raise z_step or beta, cut into fewer blocks, or give "
            f"theta_update a smaller epsilon than {rule.epsilon:g}"
        )


def mixing_schedule(value: Value, replicas: int) -> Schedule:
    """Return the schedule of `forward_mixing`. Raises ValueError for more than 1, and as `schedule` does."""
    mixing = schedule("forward_mixing", value, replicas)
    if mixing.largest > 1.0:
        raise ValueError(f"forward_mixing: {value} is more than the whole way to the forward pass, 1")
    return mixing


def is_zero(step: StepSize) -> bool:
    """Whether a step size or a mixing is 0.0 for all replicas, without a look at the numbers of a tensor."""
    return isinstance(step, float) and step == 0.0


class BlockOutputs:
    """The outputs block_t(Z_{t−1}) for t = 1..T, each evaluated on demand and cached until its input or Θ changes.

    Args:
        blocks: the network.
        theta: its parameters.
        visit: the samples.
        z: coupling variables, T tensors [S, n, d_t]; a forward pass makes them if None.
    """

    def __init__(self, blocks: Blocks, theta: Parameters, visit: Visit, z: list[Tensor] | None = None) -> None:
        self.blocks, self.theta, self.visit = blocks, theta, visit
        self._evaluations: list[tuple[Tensor, Any] | None] = [None] * len(blocks)  # a record may be None
        self.z: list[Tensor] = [] if z is None else z
        if z is None:
            for t in range(1, len(blocks) + 1):
                self.z.append(self.output(t, for_vjp=t == len(blocks)))

    def block_input(self, t: int) -> Tensor:
        """Return what block t is applied to: Z_{t−1}, or the inputs for t = 1."""
        return self.visit.x if t == 1 else self.z[t - 2]

    def output(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return block_t(Z_{t−1}) [S, n, d_t], which must not be written to.

        `for_vjp` keeps the activations that `vjp` through block t needs; by default it is true for t > 1, as block 1
        has no Z below it. If it is false and the blocks' execution says `recompute`, `vjp` evaluates the block again.
        """
        if (evaluation := self._evaluations[t - 1]) is None:
            for_vjp = t > 1 if for_vjp is None else for_vjp
            evaluation = self._evaluate(t, record=for_vjp or not self._recomputes(t))
        return evaluation[0]

    def vjp(
        self, t: int, grad_output: Tensor, grad_params: list[list[ParamDict]] | None = None, retain_graph: bool = True
    ) -> Tensor | None:
        """Multiply the transposed Jacobian of block t by `grad_output` [S, n, d_t].

        Returns the product with respect to Z_{t−1}. With `grad_params`, the product with respect to Θ_t is written
        there instead, running statistics in `theta` are updated, and None is returned. Without `retain_graph` block t
        must be forgotten afterwards.
        """
        output, record = self._evaluations[t - 1] or (None, None)
        if record is None:
            del output  # before the block is evaluated once more
            self.forget(t)
            output, record = self._evaluate(t)
        assert output is not None
        block, views = self.blocks[t - 1], self.theta.blocks[t - 1]
        if grad_params is None:
            return block.vjp(views, record, grad_output, retain_graph=retain_graph)
        retain_graph = retain_graph and not self._recomputes(t)
        block.vjp(views, record, grad_output, grad_params[t - 1], False, retain_graph)
        if self._recomputes(t):
            self._evaluations[t - 1] = output, None
        return None

    def set_z(self, t: int, z: Tensor) -> None:
        """Replace Z_t, and forget block t + 1's output, which depends on it."""
        self.z[t - 1] = z
        if t < len(self.blocks):
            self.forget(t + 1)

    def forget(self, t: int) -> None:
        """Free block t's output and activations."""
        self._evaluations[t - 1] = None

    def forget_all(self) -> None:
        """Free the outputs and activations of all blocks, as is needed after an update of Θ."""
        self._evaluations = [None] * len(self.blocks)

    def _recomputes(self, t: int) -> bool:
        return self.blocks.execution.recompute and bool(self.blocks[t - 1].is_autograd)

    def _evaluate(self, t: int, record: bool = True) -> tuple[Tensor, Any]:
        if t > 1 and not self.blocks.crossings[t - 2].is_plain and t - 1 not in self.visit.carried:
            self.output(t - 1)  # carries what else than Z_{t−1} crosses the cut
        block, views, before = self.blocks[t - 1], self.theta.blocks[t - 1], self.block_input(t)
        visit = self.visit
        evaluation = block.linearize(views, before, visit) if record else (block.forward(views, before, visit), None)
        self._evaluations[t - 1] = evaluation
        return evaluation


class AugmentedLagrangian(BlockOutputs):
    """Eq. 2 for some samples: J(Y, Z_T) + Σ_t β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖², with J summed over them.

    Args:
        problem: has the blocks and the loss J.
        theta: the blocks' parameters.
        beta: penalties [T, S].
        visit: the samples.
        z: coupling variables, T tensors [S, n, d_t]; a forward pass makes them if None.
        u: scaled duals in the shapes of z; an empty sequence stands for 0.
        held: the numbers t of the blocks whose terms, Z_t and Θ_t are meant by all methods that do not take a t; None
            stands for those that this process holds. Of other blocks Z_{t−1} of the first one is needed alone.

    Attributes:
        weights: β_t in the shape [S, 1, …] that multiplies Z_t, for t = 1..T.
        from_above: the product of the transposed Jacobian of the block above those that are held with its coupling
            gradient, [S, n, d_t], once another process has evaluated it.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Parameters,
        beta: Tensor,
        visit: Visit,
        z: list[Tensor] | None = None,
        u: Sequence[Tensor] = (),
        held: range | None = None,
    ) -> None:
        super().__init__(problem.blocks, theta, visit, z)
        self.held = problem.held_blocks if held is None else held
        self._references: dict[int, tuple[Tensor, Tensor]] = {}  # by t; a residual, and block t's output for it
        self.from_above: Tensor | None = None
        self.problem, self.loss, self.beta, self.u = problem, problem.loss, beta.unbind(), u
        self.weights = [broadcast(b, v) for b, v in zip(self.beta, self.z, strict=True)]

    def residual(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return Z_t − block_t(Z_{t−1}) [S, n, d_t] in a new tensor; `for_vjp` is as in `output`."""
        if t not in self._references:
            return self.z[t - 1] - self.output(t, for_vjp)
        residual, before = self._references[t]
        return residual - (self.output(t, for_vjp) - before)

    def set_z(self, t: int, z: Tensor) -> None:
        self._references.pop(t, None)
        super().set_z(t, z)

    def move_z(self, t: int, step: Tensor) -> None:
        """Add `step` to Z_t, which rounds off what is far smaller than itself; `residual` still has all of it.

        So deep blocks learn from a residual that is far below the rounding errors of Z_t. It is the sum of the step and
        what block t's output changes by from now on, 0 where nothing moves the block's input or Θ_t.
        """
        reference = self.residual(t).add_(step), self.output(t)
        self.set_z(t, self.z[t - 1] + step)
        self._references[t] = reference

    def squared_residual(self) -> Tensor:
        """Return Σ_t ‖Z_t − block_t(Z_{t−1})‖² [S]."""
        square = torch.zeros_like(self.beta[0])
        for t in self.held:
            square += self.residual(t, for_vjp=False).square().flatten(1).sum(1)
        return square

    def value(self) -> Tensor:
        """Return the augmented Lagrangian [S]."""
        value = self.loss.value(self.z[-1], self.visit.y).flatten(1).sum(1)
        for t in range(1, len(self.blocks) + 1):
            value = value + self.coupling_value(t)
        return value

    def coupling_value(self, t: int) -> Tensor:
        """Return coupling term t, β_t/2 ‖Z_t − block_t(Z_{t−1}) + U_t‖² [S]."""
        return self.beta[t - 1] / 2 * self._with_dual(t).square().flatten(1).sum(1)

    def coupling_gradient(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return the gradient β_t (Z_t − block_t(Z_{t−1}) + U_t) of coupling term t by Z_t, in a new tensor.

        The gradient by block_t(Z_{t−1}) is its negative. `for_vjp` is as in `output`.
        """
        return self._with_dual(t, for_vjp).mul_(self.weights[t - 1])

    def z_gradient(self, t: int, clip_for: StepSize | None = None) -> Tensor:
        """Return the gradient by Z_t in a new tensor, and forget block t + 1's output, as Z_t is to move.

        `clip_for` is as in `to_below`.
        """
        if t == len(self.blocks):
            return self.coupling_gradient(t).add_(self.loss.gradient(self.z[-1], self.visit.y))
        from_above = self.to_below(t + 1, clip_for) if t + 1 in self.held else self.from_above
        assert from_above is not None
        return self.coupling_gradient(t).sub_(from_above)

    def to_below(self, t: int, clip_for: StepSize | None = None) -> Tensor:
        """Return the product of block t's transposed Jacobian with its coupling gradient, and forget its output.

        It is minus the gradient by Z_{t−1} of coupling term t; Z_{t−1} is to move. With the step size ζ of Z_{t−1} in
        `clip_for`, it is clipped for each sample as `ZUpdate` says of "clipped".
        """
        gradient = self.coupling_gradient(t)
        product = self.vjp(t, gradient, retain_graph=False)
        assert product is not None
        if clip_for is not None:
            factor = self._clipping_factor(t, gradient, product, product * broadcast(clip_for, product))
            product = product * factor.view(*factor.shape, *[1] * (product.ndim - 2))
        self.forget(t)
        return product

    def _clipping_factor(self, t: int, gradient: Tensor, product: Tensor, step: Tensor) -> Tensor:
        """Return the factor [S, n] of a step of Z_{t−1} along `product`, block t's Aᵀg for its coupling gradient g.

        At the part τ of the step d, coupling term t is changed by −τ ⟨Aᵀg, d⟩ + τ²/2 ⟨g − g', Δ⟩ for a block that is
        affine along d, where g' is the coupling gradient and Δ the change of the block's output at τ = 1. So it is
        smallest at τ = ⟨Aᵀg, d⟩ / ⟨g − g', Δ⟩, as in steepest descent with an exact line search. It is 0 where d leads
        out of the block's domain, so that its output is not a number.
        """
        output, ahead = self.output(t), replace(self.visit, carried=dict(self.visit.carried))
        self.forget(t)  # frees the activations
        moved = self.blocks[t - 1].forward(self.theta.blocks[t - 1], self.block_input(t) + step, ahead)
        self._evaluations[t - 1] = moved, None
        bend = _sample_products(gradient - self.coupling_gradient(t), moved - output)
        longest = LARGEST_SHARE * _sample_products(product, step)
        return torch.where(bend <= longest, 1.0, longest / bend).nan_to_num(0.0)

    def last_minimiser(self) -> Tensor:
        """Return the minimiser over Z_T, by the loss's proximal operator."""
        last = len(self.blocks)
        assert isinstance(self.loss, ProximalLoss)
        anchor = self.output(last) - self.u[-1] if self.u else self.output(last)
        return self.loss.prox(anchor, self.visit.y, self.weights[-1])

    def theta_gradient(self, gradient: list[list[ParamDict]], trained: Iterable[int] | None = None) -> None:
        """Write the gradient by Θ_t of the mean coupling term of a sample to `gradient`; update running statistics.

        `trained` are the numbers t of the blocks, by default those that are held.
        """
        for t in self.held if trained is None else trained:
            by_output = self.coupling_gradient(t, for_vjp=True).mul_(-1.0 / self.visit.n)
            self.vjp(t, by_output, grad_params=gradient)

    def gradient(self) -> list[list[ParamDict]]:
        """Return where `theta_gradient` puts the gradient by Θ_t; of blocks that are not held it is tensors [S, 0]."""
        gradient, numbers = self.blocks.gradient(), range(1, len(self.blocks) + 1)
        for t in numbers if self.held != numbers else ():
            if t not in self.held:
                layers = self.theta.blocks[t - 1]
                gradient[t - 1] = [{name: p.new_empty(len(p), 0) for name, p in views.items()} for views in layers]
        return gradient

    def mix_with_forward(self, mixing: StepSize, ahead: Tensor | None = None) -> Tensor | None:
        """Move each Z_t the part `mixing` of the way to its value in a forward pass; return that of the last one.

        `ahead` is that of Z_{t−1} for the first block that is held, which moves too, and None for the inputs. For a
        mixing of 0.0 nothing is done.
        """
        if is_zero(mixing):
            return None
        if ahead is None:
            ahead = self.visit.x
        else:
            self._mix(self.held[0] - 1, ahead, mixing)
        for t in self.held:
            ahead = self._forward_output(t, ahead)
            self._mix(t, ahead, mixing)
        return ahead

    def _mix(self, t: int, ahead: Tensor, mixing: StepSize) -> None:
        self.set_z(t, torch.lerp(self.z[t - 1], ahead, broadcast(mixing, ahead)))

    def update_duals(self, step: StepSize) -> None:
        """Update U_t ← U_t + α (Z_t − block_t(Z_{t−1})) in place, with α = `step` (Algorithm 1, line 12)."""
        if is_zero(step):
            return
        for t in self.held if self.u else ():
            u, residual = self.u[t - 1], self.residual(t, for_vjp=False)
            u.add_(residual.mul_(broadcast(step, residual)))

    def _with_dual(self, t: int, for_vjp: bool | None = None) -> Tensor:
        """Return Z_t − block_t(Z_{t−1}) + U_t in a new tensor."""
        residual = self.residual(t, for_vjp)
        return residual.add_(self.u[t - 1]) if self.u else residual

    def _forward_output(self, t: int, before: Tensor) -> Tensor:
        """Return block t's output for `before`, its input in a forward pass; for t = 1 these are the inputs."""
        return self.output(1) if t == 1 else self.blocks[t - 1].forward(self.theta.blocks[t - 1], before, self.visit)


def update_theta(
    lagrangian: AugmentedLagrangian, rule: UpdateRule, moments: Moments, steps: Sequence[StepSize | list[Tensor]]
) -> None:
    """Move Θ once, on the mean coupling terms of some samples, by the one step size η in `steps`.

    This is line 10 of Algorithm 1, and line 11 of Algorithm 2.
    """
    problem, gradient, (step,) = lagrangian.problem, lagrangian.gradient(), steps
    lagrangian.theta_gradient(gradient)
    rule.update(problem.held_stacks(lagrangian.theta), problem.total_gradient(gradient), moments, step)
    lagrangian.forget_all()


@dataclass(repr=False)
class ZState(ShortRepr):
    """The state that a `ZUpdate` carries from step to step; a list is empty if the update does not need it.

    Attributes:
        moments: Adam's two moments per block, in the shape of Z_t.
        count: the number of Adam's steps so far, in a compiled visit a tensor [] in float64.
        power_vectors: the vectors of the power iterations, [S, d_t, 1] for t = 1..T−1.
        inverse_curvature: the factor of the gradient by Z_t for t = 1..T−1: [S, 1, 1], or [S, d_t, d_t] from the right;
            0 before it is known.
    """

    moments: list[list[Tensor]] = field(default_factory=list)
    count: int | Tensor = 0
    power_vectors: list[Tensor] = field(default_factory=list)
    inverse_curvature: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Return all moments, block by block."""
        return list(chain.from_iterable(self.moments))

    def with_own_curvature(self) -> ZState:
        """Return this state with copies of the power vectors and the inverse curvature."""
        vectors, inverses = ([v.clone() for v in of_kind] for of_kind in (self.power_vectors, self.inverse_curvature))
        return replace(self, power_vectors=vectors, inverse_curvature=inverses)


@dataclass(frozen=True)
class ZUpdate(Options):
    """The update of the coupling variables by their gradients ∇, in rounds from Z_T to Z_1.

    "lipschitz" and "majorised" need every block but the first to have exactly one linear layer. A ReLU at its end makes
    WᵀW smaller, so that for ζ ≤ 1 the step is no longer than Newton's wherever the ReLU is differentiable. For a ReLU
    at its start this holds for "lipschitz" alone; there "majorised" may jump to and fro across the kink, which an even
    number of `steps` undoes and an odd one does not.

    Args:
        name: the step subtracted from Z_t for a step size ζ_t, with W = W_{t+1}.
            "gradient": ζ_t ∇ (Algorithm 1).
            "clipped": the same, where what block t + 1 adds to the step is clipped for each sample: it goes at most two
            fifths of the way to where the coupling term of this block is smallest along it, as evaluated by one more
            forward pass of the block. A longer one turns the sign of parts of the residual where the block is steep,
            and the block then moves away from what the loss asks for. Residuals are kept besides Z, so that those far
            below the rounding errors of Z are exact as long as the same visit goes on. This is not in the paper.
            "adam": ζ_t times Adam's direction, with moments for every entry of Z_t (paper, §4.1).
            "lipschitz": ζ_t ∇ / (β_t + β_{t+1} σ²), with σ = σ_max(W) by one power iteration per evaluation, so that
            the first few are inexact.
            "majorised": ζ_t H⁻¹ ∇ with H = β_t I + β_{t+1} WᵀW: for ζ_t = 1 the exact minimiser over Z_t where block
            t + 1 is affine.
        steps: rounds per primal update, at least 1.
        output_update: "step": Z_T takes the same step. "prox": it moves to its exact minimiser, by the loss's proximal
            operator.
        beta1: Adam's decay rate of the mean, in [0, 1).
        beta2: Adam's decay rate of the mean square, in [0, 1).
        epsilon: Adam's ε ≥ 0.

    Raises:
        ValueError: for an unknown name, or a number out of range.

    References:
        Kingma & Ba (2014), "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980
    """

    name: Literal["gradient", "clipped", "adam", "lipschitz", "majorised"]
    steps: int = 1
    output_update: Literal["prox", "step"] = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("name", self.name, ("gradient", "clipped", "adam", "lipschitz", "majorised"))
        one_of("output_update", self.output_update, ("prox", "step"))
        at_least_one("steps", self.steps)
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf)):
            in_range(name, getattr(self, name), below)

    def check(
        self,
        problem: Problem,
        theta: Parameters,
        steps: Sequence[Schedule],
        beta: Tensor,
        rule: UpdateRule,
        is_exact: bool = True,
    ) -> None:
        """Raise ValueError if the blocks or the loss lack what the update needs; warn as `warn_of_lost_signal` does.

        Args:
            problem: what is trained on.
            theta: the blocks' parameters.
            steps: schedules of ζ_1..ζ_T.
            beta: penalties [T, S].
            rule: the update of Θ.
            is_exact: whether Θ is updated with the Lagrangian in which Z has moved, which has its residuals exactly.
        """
        if self.output_update == "prox":
            check_prox(problem.loss, "output_update='prox'")
        if self.name in ("lipschitz", "majorised"):
            for t, (block, views) in enumerate(zip(problem.blocks, theta.blocks, strict=True), start=1):
                if t > 1 and block.linear_weight(views) is None:
                    raise ValueError(
                        f"name: {self.name!r} needs blocks of one linear layer, with or without a ReLU; block {t} is "
                        f"{list(problem.blocks.names[t - 1])}; take 'clipped' or 'adam', or cut with per_layer=True"
                    )
        moved = len(steps) - (self.output_update == "prox")
        if self.name in ("gradient", "clipped") and moved:
            is_exact = is_exact and self.name == "clipped"
            warn_of_lost_signal(steps[:moved], beta[:moved].unbind(), problem.like.dtype, rule, is_exact)

    def init(self, blocks: Blocks, theta: Parameters, moments: Iterable[Sequence[Tensor]] = ()) -> ZState:
        """Return the state before the first step; `moments` are zeros, by block."""
        state = ZState([list(pair) for pair in moments])
        if self.name in ("lipschitz", "majorised"):
            weights = [block.linear_weight(views) for block, views in zip(blocks, theta.blocks, strict=True)]
            sizes = [w.shape[2] for w in weights[1:] if w is not None]
            ones = next(iter(theta.stacks.values())).new_ones(theta.replicas, 1, 1)
            if self.name == "lipschitz":
                state.power_vectors = [ones.repeat(1, size, 1) for size in sizes]
            state.inverse_curvature = [
                torch.zeros_like(ones) if self.name == "lipschitz" else ones.new_zeros(len(ones), size, size)
                for size in sizes
            ]
        return state

    def keeps(self, moments: bool) -> str:
        """Return what a `ZState` with moments, or without, keeps, as text; see `Optimizer.keeps`."""
        if self.name == "adam" and moments:
            return f"ZUpdate('adam', output_update={self.output_update!r})"  # "prox" leaves those of Z_T at 0
        if self.name in ("gradient", "clipped", "adam"):
            return "a ZUpdate that keeps nothing"
        return f"ZUpdate({self.name!r})"

    @property
    def moments_of_each(self) -> int:
        """The number of moments per coupling variable."""
        return 2 if self.name == "adam" else 0

    def moments(self, z: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return moments of zeros for coupling variables, by block."""
        return [[torch.zeros_like(v) for _ in range(self.moments_of_each)] for v in z]

    def update_curvature(self, blocks: Blocks, theta: Parameters, beta: Tensor, state: ZState) -> None:
        """Overwrite the inverse curvature and the power vectors in `state`, if the update needs them.

        `beta` are penalties [T, S].
        """
        if self.name not in ("lipschitz", "majorised"):
            return
        of_block = beta.unsqueeze(2).unsqueeze(3).unbind()
        for t in range(1, len(blocks)):
            weight = blocks[t].linear_weight(theta.blocks[t])
            assert weight is not None
            below, above = of_block[t - 1], of_block[t]  # β_t, β_{t+1}
            if self.name == "majorised":
                inverse = ridge_inverse(weight, below.double() / above)  # float32 does not see β_t beside a large W
                state.inverse_curvature[t - 1].copy_(inverse.div_(above))
            else:
                # ‖WᵀW v‖ tends to σ² from below; the first one is at most d_t^½ σ².
                image = torch.bmm(weight.mT, torch.bmm(weight, state.power_vectors[t - 1]))
                square = torch.linalg.vector_norm(image, dim=1, keepdim=True)
                vector = state.power_vectors[t - 1]
                vector.copy_(torch.where(square > 0, image / square, vector))
                state.inverse_curvature[t - 1].copy_(1.0 / (below + 1.1 * above * square))

    def step(self, lagrangian: AugmentedLagrangian, state: ZState, steps: Sequence[StepSize]) -> None:
        """Move Z_T, …, Z_1 in each round, by steps ζ_1..ζ_T (Algorithm 1, lines 5 to 8; Algorithm 2, lines 6 to 9)."""
        for _ in range(self.steps):
            self.round(lagrangian, state, steps)

    def round(self, lagrangian: AugmentedLagrangian, state: ZState, steps: Sequence[StepSize]) -> None:
        """Move Z_t once for all blocks t that are held, from the last one to the first."""
        state.count = state.count + 1
        for t in reversed(lagrangian.held):
            self.update_z(lagrangian, state, t, steps[t - 1])

    def update_z(self, lagrangian: AugmentedLagrangian, state: ZState, t: int, step: StepSize) -> None:
        """Move Z_t by its step ζ_t (Algorithm 1, lines 5 and 7)."""
        if t == len(lagrangian.blocks) and self.output_update == "prox":
            lagrangian.set_z(t, lagrangian.last_minimiser())
            return
        direction = self._direction(lagrangian.z_gradient(t, self.clip_for(step)), state, t)
        direction.mul_(broadcast(step, direction))
        if self.name == "clipped":
            lagrangian.move_z(t, direction.neg_())
        else:
            lagrangian.set_z(t, lagrangian.z[t - 1] - direction)

    def coupling_values(
        self, z_step: BlockValue | None, beta: BlockValue | None, n_blocks: int, n_replicas: int, is_anew: bool | Tensor
    ) -> tuple[BlockValue, BlockValue]:
        """Return ζ and β as the function of this name does; `is_anew`, one or [S], if each visit is one round from a
        forward pass, without duals."""
        by_block = is_anew if self.name == "clipped" else False
        return coupling_values(z_step, beta, n_blocks, n_replicas, last=0.1, by_block=by_block)

    def clip_for(self, step: StepSize) -> StepSize | None:
        """Return the step size for which `AugmentedLagrangian.z_gradient` clips the gradient, if it does."""
        return step if self.name == "clipped" else None

    def _direction(self, gradient: Tensor, state: ZState, t: int) -> Tensor:
        """Return the step to subtract from Z_t for ζ = 1; it may overwrite the gradient."""
        if t <= len(state.inverse_curvature):
            inverse = state.inverse_curvature[t - 1]
            if inverse.shape[1] == 1:
                return gradient.mul_(broadcast(inverse.view(-1), gradient))
            inputs = gradient.reshape(len(gradient), -1, inverse.shape[1])  # of the next block's linear layer
            return torch.bmm(inputs, inverse).view_as(gradient)
        if self.name != "adam":
            return gradient
        mean, square = state.moments[t - 1]
        mean.lerp_(gradient, 1.0 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
        scale = (square / (1.0 - self.beta2**state.count)).sqrt_().add_(self.epsilon)
        return (mean / (1.0 - self.beta1**state.count)).div_(scale)


def gather(problem: Problem, batch: Tensor | slice, variables: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the part of some samples of each list of variables.

    Args:
        problem: has the data of all N samples.
        batch: the places [S, B] of a mini-batch among the samples that are held here, for which copies are returned; or
            a slice of these, the same for all replicas, for which views are returned where the variables are on the
            device.
        variables: lists of tensors [S, N, ...] of the samples that are held here.
    """
    if isinstance(batch, Tensor):
        indices = flat_indices(batch, problem.n_held)
        return [[gather_per_replica(v, indices) if is_held(v) else v for v in group] for group in variables]
    device = problem.device
    return [[variable[:, batch].to(device, non_blocking=True) for variable in group] for group in variables]


def is_held(variable: Tensor) -> bool:
    """Whether this process holds a variable [S, n, d_t] of its samples; else it is [S, 0, d_t]."""
    return variable.shape[1] > 0


def scatter(batch: Tensor | slice, variables: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write the samples' `values` [S, n, ...] back to variables [S, N, ...], from where `gather` has read them.

    A value that is a view of its variable, and was changed in place, is there already.
    """
    if isinstance(batch, Tensor):
        indices = flat_indices(batch, max(variable.shape[1] for variable in variables))
        for variable, value in zip(variables, values, strict=True):
            if is_held(variable):
                scatter_per_replica(variable, indices, value)
    else:
        for variable, value in zip(variables, values, strict=True):
            if variable[:, batch].data_ptr() != value.data_ptr():
                variable[:, batch] = value
