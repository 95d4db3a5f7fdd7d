"""Block coordinate descent, three-splitting, whose variables include all pre-activations and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.layers import ParamDict
from admm.losses import ProximalLoss
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
    set_initial_values,
    square_residuals,
)
from admm.optimizers.least_squares import Scratch, add_gram, cholesky_with_ridge, input_factor, ridge_gain, zero_gram
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, spectral_norms, whole_seeds
from admm.samples import take
from admm.schedules import Number, positive

_SLICE = 2000  # samples that are visited at a time: their temporaries stay in the CPU's cache
Penalties = tuple[Tensor, Tensor, Tensor]  # γ, ρ and α, [S, 1, 1] each


@dataclass(repr=False)
class BCDState(ShortRepr):
    """BCD's variables for L layers, N samples, S replicas.

    Attributes:
        seeds, iteration: see `admm.optimizers.protocol.State`.
        theta: weights W_l [S, d_l, d_{l−1}] and biases b_l [S, d_l].
        u, v: pre-activations U_l and activations V_l, l = 1..L, [S, N, d_l] each.
    """

    of_samples = ("u", "v")

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    u: list[Tensor]
    v: list[Tensor]


@dataclass(frozen=True)
class BCD(Options, Optimizer[BCDState]):
    """Block coordinate descent, for fully connected ReLU networks and losses with a proximal operator.

    It minimises over W, b, U and V, block by block from the last layer to the first and each block exactly,

        Σ J(V_L, Y) + γ/2 (‖V_L − U_L‖² + Σ_{l<L} ‖V_l − relu(U_l)‖²) + ρ/2 Σ_l ‖U_l − V_{l−1} W_lᵀ − b_l‖²

    with V_0 = X and sums over samples. V_L, hidden U_l, W_l and b_l have a proximal term α/2 ‖· − its old value‖².
    An iteration visits every block once and never raises the objective. The authors start with W ~ 0.01 N(0, 1) and
    b = 0.1.

    In float64 the iterates are those of the authors' program, but not in float32. The authors sum and invert
    α I + ρ V_{l−1}ᵀV_{l−1} in float32; here it is summed and factored in float64. Rounding errors of their inverse let
    the objective rise, so that in a deep network it stops falling where this one goes on.

    Args:
        gamma: γ > 0, a number or one per replica.
        rho: ρ > 0, likewise.
        alpha: α > 0, likewise. For W_l, an α below the rounding error of ρ V_{l−1}ᵀV_{l−1} in the data's precision is
            raised to it.

    References:
        Zeng, Lau, Lin & Yao, "Global convergence of block coordinate descent in deep learning", ICML 2019,
        https://arxiv.org/abs/1803.00225

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> blocks = split(mlp(1, hidden=[8], classes=1), per_layer=True)
    >>> problem = Problem(x, x.abs(), blocks, SquaredError(), initialiser("pytorch"))
    >>> optimizer = BCD(alpha=0.1)
    >>> state = optimizer.init(problem, seeds=[0])
    >>> objective = [optimizer.diagnostics(problem, optimizer.step(problem, state))["objective"] for _ in range(3)]
    >>> bool(objective[0] > objective[1] > objective[2])
    True
    """

    parallel = ("samples",)

    gamma: Number = 1.0
    rho: Number = 1.0
    alpha: Number = 5.0

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> BCDState:
        """Return W and b by the problem's initialisation, U and V by a forward pass, and V_L = U_L.

        Args:
            problem: what is trained on.
            seeds: one per replica.
            start: initial values in place of these: any of `weight` (W_l [S, d_l, d_{l−1}]), `bias` (b_l [S, d_l]), `u`
                and `v` (U_l and V_l [S, N, d_l]), L tensors each.

        Raises:
            ValueError: for another network, a loss without a prox, a value that is not positive, or initial values of
                another name or shape.
        """
        seeds = whole_seeds(seeds)
        check_initial_names(start, ("weight", "bias", "u", "v"))
        check_prox(problem.loss, "BCD")
        replicas = len(seeds)
        _, rho, alpha = self._penalties(problem, replicas)
        theta = problem.initial(seeds)
        layers = linear_layers(problem, theta, "BCD")
        set_initial_values("weight", [layer["weight"] for layer in layers], start)
        set_initial_values("bias", [layer["bias"] for layer in layers], start)
        widths = [layer["weight"].shape[1] for layer in layers]
        x, _ = problem.whole("BCD")
        u = [problem.like.new_empty(replicas, len(x), width) for width in widths]
        v = [torch.empty_like(values) for values in u]
        forward(layers, x.flatten(1), u, v[:-1], _SLICE)
        v[-1].copy_(u[-1])
        set_initial_values("u", u, start)
        set_initial_values("v", v, start)
        _input_factor(problem, alpha / rho, layers[0]["weight"])  # which each step asks for
        return BCDState(seeds, 0, theta, u, v)

    def step(self, problem: Problem, state: BCDState) -> BCDState:
        """Update the blocks V_L, U_L, (W_L, b_L), then V_l, U_l, (W_l, b_l) for l = L−1..1, in the authors' order.

        In one iteration a replica needs, of size N x d_l x d_{l−1}, for every layer V_{l−1} W_lᵀ for U_l, and its
        residual times V_{l−1} for W_l; for l > 1 also V_{l−1}ᵀV_{l−1}, symmetric and thus half a product, and two for
        V_{l−1}. That is 2 products for l = 1 and 4.5 for the others; b_l needs none. Each passes over the samples once,
        in slices, so that nothing but the state has N rows.
        """
        same_samples(problem, state.u[0])
        layers = linear_layers(problem, state.theta, "BCD")
        for number in range(len(layers), 0, -1):
            self._update_layer(problem, state, layers, number)
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: BCDState) -> dict[str, Tensor]:
        """Return `objective`, `residual_l` and `activation_residual_l` (see `relative_residuals`), and `sigma_t`."""
        same_samples(problem, state.u[0])
        gamma, rho, _ = (p.flatten() for p in self._penalties(problem, len(state.seeds)))
        layers = linear_layers(problem, state.theta, "BCD")
        inputs, targets = problem.whole("BCD")
        x = inputs.flatten(1).expand(len(state.seeds), -1, -1)
        affine, activation = square_residuals(problem, x, layers, state.u, state.v, _SLICE)
        loss = problem.loss.value(state.v[-1], expand(targets, len(gamma))).sum(1, dtype=torch.float64)
        problem.parallel.add_up(loss)
        return {
            "objective": loss + 0.5 * (gamma * activation.sum(0) + rho * affine.sum(0)),
            **relative_residuals(problem, affine, activation, state.u, state.v),
            **spectral_norms(problem, state.theta),
        }

    def _penalties(self, problem: Problem, replicas: int) -> Penalties:
        """Return γ, ρ and α, [S, 1, 1] each. Raises ValueError that names one that is not positive."""
        gamma, rho, alpha = (
            positive(name, getattr(self, name), replicas).to(problem.like).view(-1, 1, 1)
            for name in ("gamma", "rho", "alpha")
        )
        return gamma, rho, alpha

    def _update_layer(self, problem: Problem, state: BCDState, layers: list[ParamDict], number: int) -> None:
        """Update V_l, U_l, and W_l and b_l, for l = `number`."""
        penalties = self._penalties(problem, len(state.seeds))
        gamma, rho, alpha = penalties
        layer, is_last = layers[number - 1], number == len(layers)
        above_gain = None if is_last else ridge_gain(layers[number]["weight"], gamma / rho)
        weight, bias, scratch = layer["weight"], layer["bias"], Scratch(layer["weight"])
        cross, total = torch.zeros_like(weight), torch.zeros_like(bias)
        gram = zero_gram(len(weight), weight.shape[2], weight) if number > 1 else None
        targets = problem.whole("BCD")[1]
        for part in slices(problem.n_held, _SLICE):
            layer_input = _layer_input(problem, state, number, part)
            u, v = state.u[number - 1][:, part], state.v[number - 1][:, part]
            affine = pre_activation(layer, layer_input, scratch.take("affine", u.shape))
            if above_gain is None:
                y = expand(take(targets, part), len(v))
                _update_last(penalties, u, v, affine, check_prox(problem.loss, "BCD"), y)
            else:
                _update_hidden(penalties, u, v, affine, layers[number], above_gain, state.u[number][:, part], scratch)
            residual = torch.sub(u, affine, out=affine)
            cross.baddbmm_(residual.mT, layer_input)
            total += residual.sum(1)
            if gram is not None:
                add_gram(gram, layer_input, scratch)
        problem.parallel.add_up(cross, total, *([] if gram is None else [gram]))
        # With E = U_l − W_l V_{l−1} − b_l for the old W_l and b_l, the authors' updates of both are
        # W_l = (α W_l + ρ (U_l − b_l)ᵀV_{l−1}) (α I + ρ VᵀV)⁻¹ = W_l + EᵀV_{l−1} (α/ρ I + VᵀV)⁻¹ and
        # b_l = (α b_l + ρ Σ (U_l − W_l V_{l−1}))/(ρ N + α) = b_l + ρ Σ E/(ρ N + α). Both start from the old values: for
        # two blocks of a convex quadratic this never raises the objective either.
        if gram is None:
            factor = _input_factor(problem, alpha / rho, weight)
        else:
            factor = cholesky_with_ridge(gram, (alpha / rho).view(-1, 1), _epsilon(weight))
        weight += torch.cholesky_solve(cross.mT.double(), factor).mT
        bias += (rho / (rho * problem.n_samples + alpha)).squeeze(2) * total


def _update_last(penalties: Penalties, u: Tensor, v: Tensor, affine: Tensor, loss: ProximalLoss, y: Any) -> None:
    """Update V_L and U_L of some samples, in place; `affine` is W_L V_{L−1} + b_L."""
    gamma, rho, alpha = penalties
    # V_L = argmin J(V) + γ/2 ‖V − U_L‖² + α/2 ‖V − V_L‖²; U_L = (γ V_L + ρ (W_L V_{L−1} + b_L))/(γ + ρ)
    v.copy_(loss.prox((gamma * u + alpha * v) / (gamma + alpha), y, gamma + alpha))
    u.copy_((gamma * v + rho * affine) / (gamma + rho))


def _update_hidden(
    penalties: Penalties,
    u: Tensor,
    v: Tensor,
    affine: Tensor,
    above: ParamDict,
    above_gain: Tensor,
    next_u: Tensor,
    scratch: Scratch,
) -> None:
    """Update V_l and U_l of some samples, in place, for l < L.

    `affine` is W_l V_{l−1} + b_l; `above` has W_{l+1} and b_{l+1}, of which `above_gain` is the `ridge_gain`; `next_u`
    is U_{l+1}.
    """
    gamma, rho, alpha = penalties
    # V_l = (ρ WᵀW + γ I)⁻¹ (ρ Wᵀ(U_{l+1} − b) + γ h) with W = W_{l+1}, b = b_{l+1}, h = relu(U_l), which is
    # h + (ρ WᵀW + γ I)⁻¹ ρ Wᵀ (U_{l+1} − b − W h)
    hidden = torch.clamp(u, min=0.0, out=scratch.take("hidden", u.shape))
    gap = pre_activation(above, hidden, scratch.take("gap", next_u.shape))
    torch.baddbmm(hidden, torch.sub(next_u, gap, out=gap), above_gain, out=v)
    # U_l = argmin γ/2 ‖V_l − relu(U)‖² + ρ/2 ‖U − W_l V_{l−1} − b_l‖² + α/2 ‖U − U_l‖²
    u.lerp_(affine, rho / (rho + alpha))
    relu_prox_(u, v, gamma / (rho + alpha), hidden, scratch.take("gap", u.shape))


def _input_factor(problem: Problem, ridge: Tensor, weight: Tensor) -> Tensor:
    """Return the Cholesky factor of ridge I + XᵀX, [S, d_0, d_0] in float64; `weight` is W_1."""
    x, _ = problem.whole("BCD")
    return input_factor(problem, x, ridge.view(-1, 1), _SLICE, epsilon=_epsilon(weight))


def _epsilon(weight: Tensor) -> float:
    """Return the epsilon for `cholesky_with_ridge` with which α/ρ shows next to the mean eigenvalue of VᵀV."""
    return torch.finfo(weight.dtype).eps / weight.shape[2]


def _layer_input(problem: Problem, state: BCDState, number: int, part: slice) -> Tensor:
    """Return V_{l−1} of a slice of samples, [S, n, d_{l−1}]; all replicas share V_0 = X."""
    if number > 1:
        return state.v[number - 2][:, part]
    x = problem.whole("BCD")[0][part].flatten(1)
    return x.expand(len(state.seeds), *x.shape)
