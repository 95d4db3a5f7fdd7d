"""ADMM with one multiplier for fully connected ReLU networks (Taylor et al. 2016, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one, one_of, shown
from admm.layers import ParamDict
from admm.minibatches import expand, slices
from admm.numbers import Options, is_whole
from admm.optimizers.checks import check_prox, same_samples
from admm.optimizers.fully_connected import (
    Start,
    check_initial_names,
    linear_layers,
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

_NAME = "Taylor"


@dataclass(repr=False)
class TaylorState(ShortRepr):
    """The variables for L layers, N samples, S replicas.

    Attributes:
        seeds, iteration: see `admm.optimizers.protocol.State`.
        theta: parameters [S, P], all biases 0.
        z: pre-activations Z_l, L tensors [S, N, d_l].
        a: activations A_l, L − 1 tensors [S, N, d_l].
        multiplier: Λ [S, N, d_L].
    """

    of_samples = ("z", "a", "multiplier")

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    z: list[Tensor]
    a: list[Tensor]
    multiplier: Tensor


@dataclass(frozen=True)
class Taylor(Options, Optimizer[TaylorState]):
    """Algorithm 1 of Taylor et al. 2016, for fully connected ReLU networks without biases, on

        J(Z_L, Y) + ⟨Z_L, Λ⟩ + β‖Z_L − A_{L−1}W_Lᵀ‖² + Σ_{l<L} [γ‖A_l − h(Z_l)‖² + β‖Z_l − A_{l−1}W_lᵀ‖²],

    with J the sum over the samples, of any loss with a prox. W_l = Z_lᵀA (AᵀA)⁻¹ with A = A_{l−1}, the authors'
    transpose reduction of Z_l A†; where AᵀA is singular to the data's precision, a ridge of that precision times its
    trace stands for the pseudo-inverse. With `weight_decay` λ the objective has λ Σ‖W_l‖² too.

    Args:
        beta: β > 0, a number or one per replica, as γ, λ and `spread`.
        gamma: γ > 0.
        warm_start: for how many iterations Λ stays at 0.
        weight_decay: λ ≥ 0.
        start_from: "gaussian", A_l and Z_l ~ N(0, spread²), W_l by the problem's initialisation; "uniform", A_l, Z_l
            and W_l ~ U(0, spread), which is the paper's "all the parameters" (§4.1) but for Λ, which starts at 0.
        spread: see above.
        slice_size: how many samples are visited at a time, so that their temporaries stay in the CPU's cache.

    References:
        Taylor et al., "Training neural networks without gradients: a scalable ADMM approach", ICML 2016,
        https://arxiv.org/abs/1605.02026

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> blocks = split(mlp(1, hidden=[8], classes=1), per_layer=True)
    >>> problem = Problem(x, x.abs(), blocks, SquaredError(), initialiser("normal", std=0.5))
    >>> optimizer = Taylor(warm_start=5)
    >>> state = optimizer.init(problem, seeds=[0])
    >>> for _ in range(200):
    ...     state = optimizer.step(problem, state)
    >>> bool(optimizer.diagnostics(problem, state)["residual_2"] < 1e-2)
    True
    """

    parallel = ("samples",)

    beta: Number = 1.0
    gamma: Number = 10.0
    warm_start: int = 10
    weight_decay: Number = 0.0
    start_from: Literal["gaussian", "uniform"] = "gaussian"
    spread: Number = 1.0
    slice_size: int = 1000

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> TaylorState:
        """Return the variables that `start_from` says, and Λ = 0.

        Args:
            problem: what is trained on.
            seeds: one per replica.
            start: initial values in place of these: any of `weight` [S, d_l, d_{l−1}] and `z` [S, N, d_l], l = 1..L,
                `a` [S, N, d_l], l = 1..L−1, and `multiplier`, one tensor [S, N, d_L]. (W_1 is overwritten at once.)

        Raises:
            ValueError: for another network, a loss without prox, a value that is out of range, or initial values of
                another name or shape.
        """
        seeds = whole_seeds(seeds)
        theta = problem.initial(seeds)
        layers = linear_layers(problem, theta, _NAME, biases=False)
        self._check(problem, len(seeds))
        check_initial_names(start, ("weight", "z", "a", "multiplier"))
        x, replicas = problem.whole(_NAME)[0].flatten(1), len(seeds)
        for layer in layers:
            if "bias" in layer:
                layer["bias"].zero_()
        w = [layer["weight"] for layer in layers]
        z = [x.new_zeros(replicas, len(x), weight.shape[1]) for weight in w]
        a, multiplier = [torch.zeros_like(t) for t in z[:-1]], torch.zeros_like(z[-1])
        is_gaussian = self.start_from == "gaussian"
        spread = replica_values("spread", self.spread, len(seeds))
        for name, tensors in ({"z": z, "a": a} | ({} if is_gaussian else {"weight": w})).items():
            distribution: Literal["normal", "uniform"] = "normal" if is_gaussian else "uniform"
            owner = None if name == "weight" else problem
            sample_initial_values(f"taylor {name}", tensors, seeds, spread, distribution, owner)
        for name, tensors in {"weight": w, "z": z, "a": a, "multiplier": [multiplier]}.items():
            set_initial_values(name, tensors, start)
        self._input_factor(problem, replicas)  # which each step asks for
        return TaylorState(seeds, 0, theta, z, a, multiplier)

    def step(self, problem: Problem, state: TaylorState) -> TaylorState:
        """Do one iteration of Algorithm 1."""
        same_samples(problem, state.z[0])
        layers = linear_layers(problem, state.theta, _NAME, biases=False)
        layer_input = problem.whole(_NAME)[0].flatten(1).expand(len(state.seeds), -1, -1)
        factor = self._input_factor(problem, len(state.seeds))
        cross, scratch = _zero_cross(layer_input, state.z[0]), Scratch(layer_input)
        for part in slices(layer_input.shape[1], self.slice_size):
            add_cross(cross, layer_input[:, part], state.z[0][:, part], scratch)
        problem.parallel.add_up(cross)
        for number, (layer, next_layer) in enumerate(pairwise(layers)):
            solve_ridge(factor, cross, layer["weight"])  # W_l = Z_l A†_{l−1}
            factor, cross = self._update_hidden(problem, layer_input, layer, next_layer, state, number, scratch)
            layer_input = state.a[number]
        solve_ridge(factor, cross, layers[-1]["weight"])
        self._update_last(problem, layer_input, layers[-1], state)
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: TaylorState) -> dict[str, Tensor]:
        """Return `residual_l` and `activation_residual_l` (see `relative_residuals`) by layer; `multiplier_rms` =
        rms(Λ); `sigma_t`."""
        same_samples(problem, state.z[0])
        layers = linear_layers(problem, state.theta, _NAME, biases=False)
        x = problem.whole(_NAME)[0].flatten(1).expand(len(state.seeds), -1, -1)
        squares = square_residuals(problem, x, layers, state.z, state.a, self.slice_size)
        return {
            **relative_residuals(problem, *squares, state.z, state.a),
            "multiplier_rms": root_mean_square(problem, state.multiplier),
            **spectral_norms(problem, state.theta),
        }

    def _update_hidden(
        self,
        problem: Problem,
        layer_input: Tensor,
        layer: ParamDict,
        next_layer: ParamDict,
        state: TaylorState,
        number: int,
        scratch: Scratch,
    ) -> tuple[Tensor, Tensor]:
        """Update A_l and Z_l; return the factor of A_lᵀA_l and A_lᵀZ_{l+1}, which W_{l+1} will need."""
        z_all, a_all, next_all = state.z[number], state.a[number], state.z[number + 1]
        ratio = self._value("gamma", state) / self._value("beta", state)
        gram, cross = zero_gram(len(a_all), a_all.shape[2], a_all, a_all.dtype), _zero_cross(a_all, next_all)
        next_gain = ridge_gain(next_layer["weight"], ratio)  # of W_{l+1} before its update, as in Algorithm 1
        for part in slices(z_all.shape[1], self.slice_size):
            z, a, next_z = z_all[:, part], a_all[:, part], next_all[:, part]
            activation = torch.clamp(z, min=0.0, out=scratch.take("activation", z.shape))
            gap = scratch.take("gap", next_z.shape)
            torch.baddbmm(next_z, activation, next_layer["weight"].mT, alpha=-1, out=gap)
            torch.baddbmm(activation, gap, next_gain, out=a)
            torch.bmm(layer_input[:, part], layer["weight"].mT, out=z)
            relu_prox_(z, a, ratio, activation, scratch.take("gap", z.shape))
            add_gram(gram, a, scratch)
            add_cross(cross, a, next_z, scratch)
        problem.parallel.add_up(gram, cross)
        return cholesky_with_ridge(gram, self._ridge(len(gram)), torch.finfo(gram.dtype).eps), cross

    def _update_last(self, problem: Problem, layer_input: Tensor, layer: ParamDict, state: TaylorState) -> None:
        """Update Z_L, and Λ after the warm start."""
        loss, beta, y = check_prox(problem.loss, _NAME), self._value("beta", state), problem.whole(_NAME)[1]
        for part in slices(layer_input.shape[1], self.slice_size):
            z, multiplier = state.z[-1][:, part], state.multiplier[:, part]
            prediction = torch.bmm(layer_input[:, part], layer["weight"].mT)
            # argmin J + ⟨z, Λ⟩ + β‖z − m‖² = argmin J + 2β/2 ‖z − (m − Λ/2β)‖²
            targets = expand(take(y, part), len(z))
            z.copy_(loss.prox(prediction - multiplier / (2.0 * beta), targets, 2.0 * beta))
            if state.iteration >= self.warm_start:
                multiplier.add_((z - prediction).mul_(beta))

    def _input_factor(self, problem: Problem, replicas: int) -> Tensor:
        """Return the Cholesky factor of λ/β I + XᵀX, [S, d_0, d_0] in float64."""
        x, _ = problem.whole(_NAME)
        return input_factor(problem, x, self._ridge(replicas), self.slice_size, epsilon=torch.finfo(x.dtype).eps)

    def _ridge(self, replicas: int) -> Tensor:
        """Return λ/β, [S, 1]."""
        weight_decay, beta = (replica_values(k, getattr(self, k), replicas) for k in ("weight_decay", "beta"))
        return (weight_decay / beta).view(-1, 1)

    def _value(self, name: str, state: TaylorState) -> float | Tensor:
        """Return a hyperparameter, a number or [S, 1, 1]."""
        return broadcast(per_replica(name, getattr(self, name), len(state.seeds)), state.multiplier)

    def _check(self, problem: Problem, replicas: int) -> None:
        one_of("start_from", self.start_from, ("gaussian", "uniform"))
        at_least_one("slice_size", self.slice_size)
        if not is_whole(self.warm_start):
            raise ValueError(f"warm_start: {shown(self.warm_start)} is not a whole number from 0 up")
        for name in ("beta", "gamma"):
            positive(name, getattr(self, name), replicas)
        check_prox(problem.loss, _NAME)


def _zero_cross(a: Tensor, target: Tensor) -> Tensor:
    """Return zeros [S, d', d] for `add_cross`."""
    return a.new_zeros(len(target), target.shape[2], a.shape[2])
