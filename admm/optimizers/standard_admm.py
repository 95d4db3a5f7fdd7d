"""Standard ADMM for fully connected ReLU networks (paper, supplement A, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import ParamDict, Parameters
from admm.minibatches import slices
from admm.numbers import Options
from admm.optimizers.fully_connected import (
    Start,
    draw,
    forward,
    known,
    linear_layers,
    pre_activation,
    put,
    relative_residuals,
    relu_prox_,
    square_residuals,
    squared_norm,
)
from admm.optimizers.least_squares import (
    Scratch,
    add_cross,
    add_gram,
    cholesky_with_ridge,
    gain,
    input_factor,
    regress,
    zero_gram,
)
from admm.optimizers.protocol import (
    Problem,
    at_least_one,
    check_prox,
    one_of,
    same_samples,
    spectral_norms,
    whole_seeds,
)
from admm.schedules import Number, broadcast, per_replica, positive, replica_values

_NAME = "standard_admm"


@dataclass
class StandardADMMState:
    """The variables of Eq. 11 for L layers, N samples, S replicas.

    theta: parameters [S, P]. z, u: pre-activations Z_l and their scaled duals U_l, L tensors [S, N, d_l] each.
    a, v: activations A_l and their scaled duals V_l, L − 1 tensors [S, N, d_l] each. factor: the Cholesky factor of
    W_1's ridge regression, [S, d_0 + 1, d_0 + 1] in float64, which never changes.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    z: list[Tensor]
    a: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    factor: Tensor


@dataclass(frozen=True)
class StandardADMM(Options):
    """Algorithm 3 on Eq. 11, every step an exact minimiser; J is the sum over the samples and has a prox.

    The intercept is an extra column of ones in A_{l−1}, so that W_l and b_l are one ridge regression, with the penalty
    λ‖[W_l b_l]‖² on both; without it, for λ = 0, they are the shortest of all minimisers. `start_from="uniform"`: all
    variables ~ U(0, spread) (§4.1). "forward": the problem's own initialisation, Z and A by a forward pass, duals 0.

    Starting variables, for `init`: `weight` [S, d_l, d_{l−1}], `bias` [S, d_l], `z`, `u` [S, N, d_l], l = 1..L, and
    `a`, `v` [S, N, d_l], l = 1..L−1. (W and b are overwritten first.)
    """

    beta: Number = 10.0
    gamma: Number = 10.0
    weight_decay: Number = 5e-5  # λ
    start_from: Literal["uniform", "forward"] = "uniform"
    spread: Number = 1e-4
    slice_size: int = 1000  # samples that a sweep holds in the processor's cache at a time

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> StandardADMMState:
        """Raises ValueError for other networks, a layer without bias, a loss without prox, or a wrong value."""
        seeds = whole_seeds(seeds)
        theta = problem.initial(seeds)
        layers = linear_layers(problem, theta, _NAME)
        self._check(problem, len(seeds))
        spread = replica_values("spread", self.spread, len(seeds))
        known(start, ("weight", "bias", "z", "a", "u", "v"))
        x, replicas = problem.x.flatten(1), len(seeds)
        z = [x.new_zeros(replicas, len(x), layer["bias"].shape[1]) for layer in layers]
        a, u, v = ([torch.zeros_like(t) for t in variables] for variables in (z[:-1], z, z[:-1]))
        variables = {name: [layer[name] for layer in layers] for name in ("weight", "bias")}
        variables |= {"z": z, "a": a, "u": u, "v": v}
        if self.start_from == "uniform":
            for name, tensors in variables.items():
                draw(f"{_NAME} {name}", tensors, seeds, spread, "uniform")
        else:
            forward(layers, x, z, a, self.slice_size)
        for name, tensors in variables.items():
            put(name, tensors, start)
        factor = input_factor(x, self._ridge(replicas), self.slice_size, intercept=True)
        return StandardADMMState(seeds, 0, theta, z, a, u, v, factor)

    def step(self, problem: Problem, state: StandardADMMState) -> StandardADMMState:
        same_samples(problem, state.z[0])
        layers = linear_layers(problem, state.theta, _NAME)
        x = problem.x.flatten(1).expand(len(state.seeds), -1, -1)
        scratch = Scratch(x)
        self._update_weights(x, layers, state, scratch)
        beta, gamma = (broadcast(per_replica(n, getattr(self, n), len(x)), x) for n in ("beta", "gamma"))
        gains = [gain(layer["weight"], gamma / beta) for layer in layers[1:]]
        for part in slices(x.shape[1], self.slice_size):
            self._update_samples(problem, x, layers, state, part, beta, gamma / beta, gains, scratch)
        state.iteration += 1
        return state

    def parameters(self, state: StandardADMMState) -> Parameters:
        return state.theta

    def diagnostics(self, problem: Problem, state: StandardADMMState) -> dict[str, Tensor]:
        """`residual_l` and `activation_residual_l` (see `relative_residuals`), `dual_rms_l` = rms(U_l) and
        `activation_dual_rms_l` = rms(V_l) by layer; `sigma_t`."""
        layers = linear_layers(problem, state.theta, _NAME)
        x = problem.x.flatten(1).expand(len(state.seeds), -1, -1)
        squares = square_residuals(x, layers, state.z, state.a, self.slice_size)
        values = relative_residuals(*squares, state.z, state.a)
        for name, duals in (("dual_rms", state.u), ("activation_dual_rms", state.v)):
            for number, dual in enumerate(duals, start=1):
                values[f"{name}_{number}"] = (squared_norm(dual) / dual[0].numel()).sqrt()
        return values | spectral_norms(problem, state.theta)

    def _update_weights(self, x: Tensor, layers: list[ParamDict], state: StandardADMMState, scratch: Scratch) -> None:
        """W_l, b_l = argmin β/2 ‖Z_l + U_l − [A_{l−1} 1][W_l b_l]ᵀ‖² + λ‖[W_l b_l]‖² for all l (Alg. 3, first loop)."""
        before, replicas = [x, *state.a], len(state.seeds)
        cross = [
            x.new_zeros(replicas, a.shape[2] + 1, z.shape[2], dtype=torch.float64)
            for a, z in zip(before, state.z, strict=True)
        ]
        grams = [zero_gram(replicas, a.shape[2] + 1, x) for a in state.a]
        for part in slices(x.shape[1], self.slice_size):
            for own, a, z, u in zip(cross, before, state.z, state.u, strict=True):
                target = scratch.take("regression's target", z[:, part].shape, own.dtype)
                add_cross(own, a[:, part], torch.add(z[:, part], u[:, part], out=target), scratch)
            for gram, a in zip(grams, state.a, strict=True):
                add_gram(gram, a[:, part], scratch)
        factors = [state.factor, *(cholesky_with_ridge(gram, self._ridge(replicas)) for gram in grams)]
        for layer, factor, own in zip(layers, factors, cross, strict=True):
            regress(factor, own, layer["weight"], layer["bias"])

    def _update_samples(
        self,
        problem: Problem,
        x: Tensor,
        layers: list[ParamDict],
        state: StandardADMMState,
        part: slice,
        beta: float | Tensor,
        ratio: float | Tensor,
        gains: list[Tensor],
        scratch: Scratch,
    ) -> None:
        """Z_l, A_l and then Z_L, with the duals (Alg. 3, second and third loop): of other samples they depend on Θ
        alone, and no U_l is read again after Z_l and A_{l−1}, no V_l after A_l, so that each dual follows at once."""
        before = x[:, part]
        for number, layer in enumerate(layers):
            z, u = state.z[number][:, part], state.u[number][:, part]
            target = pre_activation(layer, before, scratch.take("target", z.shape)).sub_(u)  # W_l A_{l−1} + b_l − U_l
            if number == len(layers) - 1:
                z.copy_(problem.loss.prox(target, problem.y[part], beta))
            else:
                a, v = state.a[number][:, part], state.v[number][:, part]
                anchor = torch.add(a, v, out=scratch.take("anchor", z.shape))
                relu_prox_(z.copy_(target), anchor, ratio, scratch.take("gap", z.shape))  # argmin P_l + Q_l
                torch.clamp(z, min=0.0, out=anchor).sub_(v)
                next_z, next_u, following = (
                    state.z[number + 1][:, part],
                    state.u[number + 1][:, part],
                    layers[number + 1],
                )
                gap = torch.add(next_z, next_u, out=scratch.take("gap", next_z.shape))
                gap.sub_(following["bias"].unsqueeze(1)).baddbmm_(anchor, following["weight"].mT, alpha=-1)
                torch.bmm(gap, gains[number], out=v)  # A_l − anchor, which is V_l + A_l − h(Z_l)
                torch.add(anchor, v, out=a)  # argmin P_{l+1} + Q_l
                before = a
            torch.sub(z, target, out=u)  # U_l + Z_l − W_l A_{l−1} − b_l

    def _ridge(self, replicas: int) -> Tensor:
        """2λ/β, [S, 1]."""
        weight_decay, beta = (replica_values(k, getattr(self, k), replicas) for k in ("weight_decay", "beta"))
        return (2.0 * weight_decay / beta).view(-1, 1)

    def _check(self, problem: Problem, replicas: int) -> None:
        one_of("start_from", self.start_from, ("uniform", "forward"))
        at_least_one("slice_size", self.slice_size)
        for name in ("beta", "gamma"):
            positive(name, getattr(self, name), replicas)
        check_prox(problem.loss, _NAME)
