"""What batch and online Block-ADMM share: the blocks' values along the coupling variables, and the Z updates.

Blocks are numbered t = 1..T as in the paper; Python lists of them start at 0, so `z[t - 1]` is Z_t.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from admm.blocks import Blocks, Parameters
from admm.checks import at_least_one, in_range, one_of
from admm.losses import Loss
from admm.numbers import Options
from admm.optimizers.checks import check_prox
from admm.optimizers.least_squares import cholesky_with_ridge
from admm.optimizers.protocol import Problem
from admm.schedules import BlockValue, Schedule, Value, block_values, broadcast, positive, schedule

Force = Callable[[int], Tensor]  # t to the derivative of coupling term t by Z_t, in a new tensor


def penalties(beta: BlockValue, blocks: int, replicas: int, like: Tensor) -> Tensor:
    """β [T, S] of a hyperparameter, in the dtype of `like`. Raises ValueError unless all are positive."""
    return torch.stack([positive("beta", value, replicas) for value in block_values("beta", beta, blocks)]).to(like)


def probe(samples: int, batch_size: int, replicas: int, device: torch.device) -> Tensor:
    """Indices [S, B] of a mini-batch at even distances among N samples, the same for all replicas."""
    return (torch.arange(batch_size, device=device) * samples // batch_size).expand(replicas, -1)


def label_leak(loss: Loss, y: Tensor, forward: Tensor, moved: Tensor) -> dict[str, Tensor]:
    """`loss_forward` and `loss_moved` [S], the mean J of the last block's outputs [S, n, ...] after a forward pass and
    at a Z_{T−1} that has been moved by J's gradient and so tells something of the label."""
    outputs = {"loss_forward": forward, "loss_moved": moved}
    return {name: loss.value(z, y).flatten(1).mean(1) for name, z in outputs.items()}


def warn_of_label_leak(optimizer: object, rows: Sequence[Mapping[str, float]]) -> None:
    """Warns where the newest rows of a history are the first in which the label shows in the coupling variables.

    It shows where, from the middle of the optimizer's iterations on, some replica's `loss_forward`, the loss in
    evaluation, exceeds `loss_moved`, the loss that the last block is trained on, by more than a sixth of its
    `loss_forward` before the first iteration. With less, networks still reach the accuracy that they have without a
    leak.
    """
    if not rows or "loss_moved" not in rows[-1]:
        return
    start = {row["replica"]: row["loss_forward"] for row in takewhile(lambda row: row["iteration"] == 0, rows)}
    newest, middle = rows[-1]["iteration"], getattr(optimizer, "iterations", 0) / 2

    def leaks(row: Mapping[str, float]) -> bool:
        is_late = row["iteration"] >= max(middle, 1)
        return is_late and row["loss_forward"] - row["loss_moved"] > start[row["replica"]] / 6 > 0

    # The others are looked through only where one of the newest leaks.
    if any(map(leaks, takewhile(lambda row: row["iteration"] == newest, reversed(rows)))):
        first = next(filter(leaks, rows))
        if first["iteration"] < newest:
            return
        warnings.warn(
            f"z_step: the label shows in the coupling variables: after iteration {first['iteration']:g} the "
            f"loss is {first['loss_moved']:.3g} where these have moved, on which the last block is trained, and "
            f"{first['loss_forward']:.3g} after a forward pass, as in evaluation; lower z_step (ζ)",
            stacklevel=3,
        )


def warn_of_lost_signal(steps: Sequence[Schedule], weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Warns where gradient steps ζ_t of the coupling variables between the blocks, under penalties β_t [S], hand less
    of the loss on to block 1 than rounding leaves: from block to block it is the part β_t ζ_t."""
    signal = math.prod(float(beta.max()) * step.largest for beta, step in zip(weights, steps, strict=True))
    if 0.0 < signal < torch.finfo(dtype).eps:
        warnings.warn(
            f"z_step: block 1 gets the part {signal:.0e} of the loss's gradient, as each block hands on "
            "z_step times beta (or rho) of it, and will hardly learn; raise z_step or beta, or cut fewer blocks",
            stacklevel=4,
        )


class BlockOutputs:
    """block_t(Z_{t−1}) for t = 1..T, each evaluated when asked for and kept until its input or Θ changes."""

    def __init__(self, blocks: Blocks, theta: Parameters, x: Tensor, z: list[Tensor] | None = None) -> None:
        """x: inputs [S, n, ...]. z: coupling variables, T tensors [S, n, d_t]; a forward pass makes them if None."""
        self.blocks, self.theta, self.x = blocks, theta, x
        self._evaluations: list[tuple[Tensor, Any] | None] = [None] * len(blocks)  # a record may be None
        self.z: list[Tensor] = [] if z is None else z
        if z is None:
            for t in range(1, len(blocks) + 1):
                self.z.append(self.output(t, pulled=t == len(blocks)))

    def output(self, t: int, pulled: bool | None = None) -> Tensor:
        """block_t(Z_{t−1}), [S, n, d_t]; not to be written to. `pulled` says that `vjp` through block t comes
        next, by default for t > 1: block 1's is for Θ's gradient alone. Otherwise, where that is recomputed, what it
        needs is not kept."""
        if (evaluation := self._evaluations[t - 1]) is None:
            pulled = t > 1 if pulled is None else pulled
            evaluation = self._evaluate(t, record=pulled or not self._recomputes(t))
        return evaluation[0]

    def residual(self, t: int, pulled: bool | None = None) -> Tensor:
        """Z_t − block_t(Z_{t−1}), [S, n, d_t]; `pulled` as in `output`."""
        return self.z[t - 1] - self.output(t, pulled)

    def vjp(self, t: int, grad_output: Tensor, grad_params: Parameters | None = None) -> Tensor | None:
        """∂block_tᵀ · grad_output: by Z_{t−1}, returned, or, with `grad_params`, by Θ_t, written there; this moves
        running statistics in `theta`."""
        output, record = self._evaluations[t - 1] or (None, None)
        if record is None:
            output, record = self._evaluate(t)
        assert output is not None
        block, views = self.blocks[t - 1], self.theta.blocks[t - 1]
        if grad_params is None:
            return block.vjp(views, record, grad_output)
        block.vjp(views, record, grad_output, grad_params.blocks[t - 1], needs_input_grad=False)
        if self._recomputes(t):
            self._evaluations[t - 1] = output, None
        return None

    def move(self, t: int, z: Tensor) -> None:
        """Replace Z_t, which makes block_{t+1}'s value stale."""
        self.z[t - 1] = z
        if t < len(self.blocks):
            self.forget(t + 1)

    def forget(self, t: int) -> None:
        """Let go of block t's value and activations, before another block's are made."""
        self._evaluations[t - 1] = None

    def forget_all(self) -> None:
        """Forget every value: Θ has been updated."""
        self._evaluations = [None] * len(self.blocks)

    def _recomputes(self, t: int) -> bool:
        return self.blocks.execution.recompute and bool(self.blocks[t - 1].is_autograd)

    def _evaluate(self, t: int, record: bool = True) -> tuple[Tensor, Any]:
        block, views, before = self.blocks[t - 1], self.theta.blocks[t - 1], self.x if t == 1 else self.z[t - 2]
        evaluation = block.linearize(views, before, True) if record else (block.forward(views, before, True), None)
        self._evaluations[t - 1] = evaluation
        return evaluation


@dataclass(frozen=True)
class ZUpdate(Options):
    """How the coupling variables follow their gradients. With step size ζ, the step subtracted from Z_t is

    - `gradient`: ζ ∇ (Algorithm 1);
    - `adam`: ζ times Adam's direction, with moments for every entry of Z_t (paper, §4.1);
    - `lipschitz`: ζ ∇ / (β_t + β_{t+1} σ²), with σ = σ_max(W_{t+1}) by one power iteration an evaluation, so that the
      first few are inexact;
    - `majorised`: ζ H⁻¹ ∇ with H = β_t I + β_{t+1} WᵀW and W = W_{t+1}: for ζ = 1 the exact minimiser over Z_t where
      block t+1 is affine.

    The last two need every block but the first to have exactly one linear layer. A ReLU at its end makes WᵀW smaller,
    so that for ζ ≤ 1 the step is no longer than Newton's wherever the ReLU is differentiable. For a ReLU at its start
    this holds for `lipschitz` alone; there `majorised` may jump to and fro across the kink, which an even number of
    `steps` undoes and an odd one does not.

    Z_T moves likewise (`last="step"`), or to its exact minimiser by the loss's proximal operator (`last="prox"`).
    """

    name: Literal["gradient", "adam", "lipschitz", "majorised"]
    steps: int = 1  # rounds from Z_T to Z_1 a primal update
    last: Literal["prox", "step"] = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def check(self, problem: Problem, theta: Parameters) -> None:
        """Raises ValueError for an unknown name, or where blocks or loss do not have what the update needs."""
        blocks = problem.blocks
        one_of("name", self.name, ("gradient", "adam", "lipschitz", "majorised"))
        one_of("last", self.last, ("prox", "step"))
        at_least_one("steps", self.steps)
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf)):
            in_range(name, getattr(self, name), below)
        if self.last == "prox":
            check_prox(problem.loss, "last='prox'")
        if self.name in ("lipschitz", "majorised"):
            for t, (block, views) in enumerate(zip(blocks, theta.blocks, strict=True), start=1):
                if t > 1 and block.linear_weight(views) is None:
                    raise ValueError(
                        f"name: {self.name!r} needs blocks of one linear layer, with or without a "
                        f"ReLU; block {t} is {list(blocks.names[t - 1])}; use gradient or adam, or split "
                        "per_layer"
                    )

    def power_vectors(self, blocks: Blocks, theta: Parameters) -> list[Tensor]:
        """Starting vectors [S, d_t, 1], t = 1..T−1, of the power iterations; none where they are not needed."""
        if self.name != "lipschitz":
            return []
        weights = (block.linear_weight(views) for block, views in zip(blocks, theta.blocks, strict=True))
        return [w.new_ones(len(w), w.shape[2], 1) for t, w in enumerate(weights, start=1) if t > 1 and w is not None]

    def inverse_curvature(
        self, blocks: Blocks, theta: Parameters, beta: Tensor, power_vectors: list[Tensor]
    ) -> list[Tensor]:
        """For t = 1..T−1 what multiplies the gradient of Z_t: [S, 1, 1], or [S, d_t, d_t] from the right; of penalties
        `beta` [T, S]."""
        if self.name in ("gradient", "adam"):
            return []
        inverses = []
        for t in range(1, len(blocks)):
            weight = blocks[t].linear_weight(theta.blocks[t])
            assert weight is not None
            own, above = beta[t - 1].view(-1, 1, 1), beta[t].view(-1, 1, 1)
            if self.name == "majorised":
                w = weight.double()  # float32 does not see β_t beside a large W
                factor = cholesky_with_ridge(torch.bmm(w.mT, above * w), own.squeeze(2))
                inverses.append(torch.cholesky_inverse(factor).to(weight))
            else:
                # Tends to σ² from below, after a first one of up to d_t^½ σ².
                image = weight.mT @ (weight @ power_vectors[t - 1])
                square = torch.linalg.vector_norm(image, dim=1, keepdim=True)
                torch.where(square > 0, image / square, power_vectors[t - 1], out=power_vectors[t - 1])
                inverses.append(1.0 / (own + 1.1 * above * square))
        return inverses

    @property
    def moments_of_each(self) -> int:
        """How many moments go with a coupling variable."""
        return 2 if self.name == "adam" else 0

    def moments(self, z: Sequence[Tensor]) -> list[list[Tensor]]:
        """Zero moments for coupling variables."""
        return [[torch.zeros_like(v) for _ in range(self.moments_of_each)] for v in z]

    def apply(
        self,
        chain: BlockOutputs,
        force: Force,
        loss: Loss,
        y: Tensor,
        dual: Tensor | float,
        beta: Tensor,
        steps: Sequence[float | Tensor],
        inverse_curvature: list[Tensor],
        moments: list[list[Tensor]],
        count: int,
    ) -> None:
        """`steps` rounds, each from Z_T to Z_1 (Algorithm 1, lines 5-9; Algorithm 2).

        y: targets. dual: U_T. beta: penalties [T, S]. steps: ζ_1..ζ_T. count: Adam's steps that the moments have seen.
        """
        blocks = len(chain.blocks)

        def move(t: int, gradient: Tensor) -> None:
            curvature = inverse_curvature[t - 1] if t <= len(inverse_curvature) else None
            direction = self._direction(gradient, curvature, moments[t - 1], count)
            chain.move(t, chain.z[t - 1] - direction.mul_(broadcast(steps[t - 1], direction)))

        for _ in range(self.steps):
            count += 1
            if self.last == "prox":
                anchor = chain.output(blocks) - dual
                chain.move(blocks, check_prox(loss, "last='prox'").prox(anchor, y, broadcast(beta[-1], anchor)))
            else:
                move(blocks, force(blocks).add_(loss.gradient(chain.z[-1], y)))
            for t in range(blocks - 1, 0, -1):
                pulled = chain.vjp(t + 1, force(t + 1))
                assert pulled is not None
                chain.forget(t + 1)
                move(t, force(t).sub_(pulled))

    def _direction(
        self, gradient: Tensor, inverse_curvature: Tensor | None, moments: Sequence[Tensor], count: int
    ) -> Tensor:
        """The step to subtract from Z_t, for ζ = 1; may overwrite the gradient."""
        if inverse_curvature is not None:
            if inverse_curvature.shape[1] == 1:
                return gradient.mul_(broadcast(inverse_curvature.view(-1), gradient))
            rows = gradient.reshape(len(gradient), -1, inverse_curvature.shape[1])  # the next layer's inputs
            return torch.bmm(rows, inverse_curvature).view_as(gradient)
        if self.name != "adam":
            return gradient
        mean, square = moments
        mean.lerp_(gradient, 1.0 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
        scale = (square / (1.0 - self.beta2**count)).sqrt_().add_(self.epsilon)
        return (mean / (1.0 - self.beta1**count)).div_(scale)


def refresh_schedule(value: Value, replicas: int) -> Schedule:
    """Return the schedule of the part of the way to the forward pass that coupling variables are moved.

    Raises ValueError for more than 1, and as `schedule` does.
    """
    refresh = schedule("refresh", value, replicas)
    if refresh.largest > 1.0:
        raise ValueError(f"refresh: {value} is more than the whole way to the forward pass, 1")
    return refresh
