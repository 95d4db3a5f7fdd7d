"""Standard ADMM for fully connected ReLU networks (paper, supplement A, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, one_of
from admm.layers import ParamDict
from admm.minibatches import expand, slices
from admm.numbers import Options
from admm.optimizers.checks import check_prox, same_samples
from admm.optimizers.fully_connected import (
    Start,
    check_initial_names,
    forward,
    linear_layers,
    pre_activation,
    relative_residuals,
    relu_prox_,
    root_mean_square,
    sample_initial_values,
    set_initial_values,
    square_residuals,
)
from admm.optimizers.least_squares import (
    Scratch,
    add_cross,
    add_gram,
    cholesky_with_ridge,
    input_factor,
    ridge_gain,
    solve_ridge,
    zero_gram,
)
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.samples import take
from admm.schedules import Number, broadcast, per_replica, positive, replica_values

_NAME = "StandardADMM"


@dataclass(repr=False)
class StandardADMMState(ShortRepr):
    """The variables of Eq. 11 for L layers, N samples, S replicas.

    Attributes:
        seeds, iteration, theta: see `admm.optimizers.protocol.State`.
        z, u: pre-activations Z_l and their scaled duals U_l, L tensors [S, N, d_l] each.
        a, v: activations A_l and their scaled duals V_l, L − 1 tensors [S, N, d_l] each.
    """

    of_samples = ("z", "a", "u", "v")

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    z: list[Tensor]
    a: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]


@dataclass(frozen=True)
class StandardADMM(Options, Optimizer[StandardADMMState]):
    """Standard ADMM: Algorithm 3 on Eq. 11, every step an exact minimiser; J is summed over the samples and has a prox.

    It is for fully connected ReLU networks with biases. The intercept is an extra column of ones in A_{l−1}, so that
    W_l and b_l are one ridge regression, with the penalty λ‖[W_l b_l]‖² on both; for λ = 0 they are the shortest of all
    minimisers.

    Args:
        beta: β > 0, a number or one per replica, as γ, λ and `spread`.
        gamma: γ > 0.
        weight_decay: λ ≥ 0.
        start_from: "uniform", all variables ~ U(0, spread) (§4.1); "forward", the problem's own initialisation, Z and A
            by a forward pass, duals 0.
        spread: the width of the uniform start.
        slice_size: how many samples are visited at a time, so that their temporaries stay in the CPU's cache.

    References:
        "Stochastic Block-ADMM for training deep networks", supplement A, https://arxiv.org/abs/2105.00339

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> blocks = split(mlp(1, hidden=[8], classes=1), per_layer=True)
    >>> problem = Problem(x, x.abs(), blocks, SquaredError(), initialiser("normal", std=0.5))
    >>> optimizer = StandardADMM(beta=1.0, gamma=1.0, start_from="forward")
    >>> state = optimizer.init(problem, seeds=[0])
    >>> for _ in range(200):
    ...     state = optimizer.step(problem, state)
    >>> bool(optimizer.diagnostics(problem, state)["residual_2"] < 1e-3)
    True
    """

    parallel = ("samples",)

    beta: Number = 10.0
    gamma: Number = 10.0
    weight_decay: Number = 5e-5
    start_from: Literal["uniform", "forward"] = "uniform"
    spread: Number = 1e-4
    slice_size: int = 1000

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> StandardADMMState:
        """Return the variables that `start_from` says.

        Args:
            problem: what is trained on.
            seeds: one per replica.
            start: initial values in place of these: any of `weight` [S, d_l, d_{l−1}], `bias` [S, d_l], `z`, `u`
                [S, N, d_l], l = 1..L, and `a`, `v` [S, N, d_l], l = 1..L−1. (W and b are overwritten first.)

        Raises:
            ValueError: for another network, a layer without bias, a loss without prox, a value that is out of range, or
                initial values of another name or shape.
        """
        seeds = whole_seeds(seeds)
        theta = problem.initial(seeds)
        layers = linear_layers(problem, theta, _NAME)
        self._check(problem, len(seeds))
        spread = replica_values("spread", self.spread, len(seeds))
        check_initial_names(start, ("weight", "bias", "z", "a", "u", "v"))
        x, replicas = problem.whole(_NAME)[0].flatten(1), len(seeds)
        z = [x.new_zeros(replicas, len(x), layer["bias"].shape[1]) for layer in layers]
        a, u, v = ([torch.zeros_like(t) for t in variables] for variables in (z[:-1], z, z[:-1]))
        variables = {name: [layer[name] for layer in layers] for name in ("weight", "bias")}
        variables |= {"z": z, "a": a, "u": u, "v": v}
        if self.start_from == "uniform":
            for name, tensors in variables.items():
                owner = None if name in ("weight", "bias") else problem
                sample_initial_values(f"standard_admm {name}", tensors, seeds, spread, "uniform", owner)
        else:
            forward(layers, x, z, a, self.slice_size)
        for name, tensors in variables.items():
            set_initial_values(name, tensors, start)
        self._input_factor(problem, replicas)  # which each step asks for
        return StandardADMMState(seeds, 0, theta, z, a, u, v)

    def step(self, problem: Problem, state: StandardADMMState) -> StandardADMMState:
        """Do one iteration of Algorithm 3."""
        same_samples(problem, state.z[0])
        layers = linear_layers(problem, state.theta, _NAME)
        x = problem.whole(_NAME)[0].flatten(1).expand(len(state.seeds), -1, -1)
        scratch = Scratch(x)
        self._update_weights(problem, x, layers, state, scratch)
        beta, gamma = (broadcast(per_replica(n, getattr(self, n), len(x)), x) for n in ("beta", "gamma"))
        gains = [ridge_gain(layer["weight"], gamma / beta) for layer in layers[1:]]
        for part in slices(x.shape[1], self.slice_size):
            self._update_samples(problem, x, layers, state, part, beta, gamma / beta, gains, scratch)
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: StandardADMMState) -> dict[str, Tensor]:
        """Return `residual_l` and `activation_residual_l` (see `relative_residuals`), `dual_rms_l` = rms(U_l) and
        `activation_dual_rms_l` = rms(V_l) by layer; `sigma_t`."""
        same_samples(problem, state.z[0])
        layers = linear_layers(problem, state.theta, _NAME)
        x = problem.whole(_NAME)[0].flatten(1).expand(len(state.seeds), -1, -1)
        squares = square_residuals(problem, x, layers, state.z, state.a, self.slice_size)
        values = relative_residuals(problem, *squares, state.z, state.a)
        for name, duals in (("dual_rms", state.u), ("activation_dual_rms", state.v)):
            for number, dual in enumerate(duals, start=1):
                values[f"{name}_{number}"] = root_mean_square(problem, dual)
        return values | spectral_norms(problem, state.theta)

    def _update_weights(
        self, problem: Problem, x: Tensor, layers: list[ParamDict], state: StandardADMMState, scratch: Scratch
    ) -> None:
        """Set all W_l, b_l to argmin β/2 ‖Z_l + U_l − [A_{l−1} 1][W_l b_l]ᵀ‖² + λ‖[W_l b_l]‖² (Alg. 3, first loop)."""
        inputs, replicas = [x, *state.a], len(state.seeds)
        cross = [
            x.new_zeros(replicas, z.shape[2], a.shape[2] + 1, dtype=torch.float64)
            for a, z in zip(inputs, state.z, strict=True)
        ]
        grams = [zero_gram(replicas, a.shape[2] + 1, x) for a in state.a]
        for part in slices(x.shape[1], self.slice_size):
            for cross_l, a, z, u in zip(cross, inputs, state.z, state.u, strict=True):
                target = scratch.take("regression's target", z[:, part].shape, cross_l.dtype)
                add_cross(cross_l, a[:, part], torch.add(z[:, part], u[:, part], out=target), scratch)
            for gram, a in zip(grams, state.a, strict=True):
                add_gram(gram, a[:, part], scratch)
        problem.parallel.add_up(*cross, *grams)
        factors = [
            self._input_factor(problem, replicas),
            *(cholesky_with_ridge(gram, self._ridge(replicas)) for gram in grams),
        ]
        for layer, factor, cross_l in zip(layers, factors, cross, strict=True):
            solve_ridge(factor, cross_l, layer["weight"], layer["bias"])

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
        """Update Z_l, A_l and then Z_L, with the duals (Alg. 3, second and third loop), of a slice of samples.

        Samples depend on one another by Θ alone. No U_l is read again after Z_l and A_{l−1}, and no V_l after A_l, so
        that each dual follows at once.
        """
        loss, layer_input = check_prox(problem.loss, _NAME), x[:, part]
        for number, layer in enumerate(layers):
            z, u = state.z[number][:, part], state.u[number][:, part]
            target = pre_activation(layer, layer_input, scratch.take("target", z.shape))
            target.sub_(u)  # W_l A_{l−1} + b_l − U_l
            if number == len(layers) - 1:
                z.copy_(loss.prox(target, expand(take(problem.whole(_NAME)[1], part), len(z)), beta))
            else:
                a, v = state.a[number][:, part], state.v[number][:, part]
                anchor = torch.add(a, v, out=scratch.take("anchor", z.shape))
                z.copy_(target)
                relu_prox_(z, anchor, ratio, anchor, scratch.take("gap", z.shape))  # argmin P_l + Q_l
                torch.clamp(z, min=0.0, out=anchor).sub_(v)
                next_z, next_u = state.z[number + 1][:, part], state.u[number + 1][:, part]
                next_layer = layers[number + 1]
                gap = torch.add(next_z, next_u, out=scratch.take("gap", next_z.shape))
                gap.sub_(next_layer["bias"].unsqueeze(1)).baddbmm_(anchor, next_layer["weight"].mT, alpha=-1)
                torch.bmm(gap, gains[number], out=v)  # A_l − anchor, which is V_l + A_l − h(Z_l)
                torch.add(anchor, v, out=a)  # argmin P_{l+1} + Q_l
                layer_input = a
            torch.sub(z, target, out=u)  # U_l + Z_l − W_l A_{l−1} − b_l

    def _input_factor(self, problem: Problem, replicas: int) -> Tensor:
        """Return the Cholesky factor of W_1's ridge regression, [S, d_0 + 1, d_0 + 1] in float64."""
        return input_factor(problem, problem.whole(_NAME)[0], self._ridge(replicas), self.slice_size, intercept=True)

    def _ridge(self, replicas: int) -> Tensor:
        """Return 2λ/β, [S, 1]."""
        weight_decay, beta = (replica_values(k, getattr(self, k), replicas) for k in ("weight_decay", "beta"))
        return (2.0 * weight_decay / beta).view(-1, 1)

    def _check(self, problem: Problem, replicas: int) -> None:
        one_of("start_from", self.start_from, ("uniform", "forward"))
        at_least_one("slice_size", self.slice_size)
        for name in ("beta", "gamma"):
            positive(name, getattr(self, name), replicas)
        check_prox(problem.loss, _NAME)
