"""The common parts of the algorithms for fully connected ReLU networks.

These are the network's form, initial values, the proximal operator of the ReLU, and the residuals of the constraints.

Notation: layer l = 1..L has a weight W_l [S, d_l, d_{l−1}] and, if the algorithm knows it, a bias b_l [S, d_l];
Z_l = A_{l−1} W_lᵀ + b_l is the pre-activation [S, N, d_l], A_l = relu(Z_l), and A_0 = X. Python lists start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from admm.blocks import Parameters
from admm.layers import ParamDict, has_hooks
from admm.minibatches import slices, stateless_rng
from admm.optimizers.protocol import Problem
from admm.splitting import is_chain, layer_names, modules_by_name

Start = Mapping[str, Sequence[Tensor]]  # initial values by the name of a state's variable


def linear_layers(problem: Problem, theta: Parameters, algorithm: str, biases: bool = True) -> list[ParamDict]:
    """Return `weight` and `bias` of layers 1..L, as views into theta.

    Raises ValueError, which names the algorithm, unless the network is `Linear, ReLU, Linear, …, Linear`, after a
    `Flatten` or not, in an `nn.Sequential`, all of it trained, without shared parameters and hooks and, if `biases` are
    needed, with one in each layer; and for an augmentation.
    """
    problem.refuse_augmentation(algorithm)
    network = problem.blocks.network
    if not is_chain(network):
        raise ValueError(
            f"network: {algorithm} supports fully connected ReLU networks (an nn.Sequential of Linear, ReLU, …, "
            f"Linear), not a {type(network).__name__}"
        )
    if frozen := [name for name, p in network.named_parameters() if not p.requires_grad]:
        raise ValueError(f"network: {algorithm} trains all parameters, but {frozen[0]!r} has requires_grad=False")
    if problem.blocks.shared_parameters:
        raise ValueError(f"network: {algorithm} does not support layers that share parameters")
    modules = modules_by_name(network)
    kinds = [type(modules[name]) for name in layer_names(network)]
    if hooked := [name for name in layer_names(network) if has_hooks(modules[name])]:
        raise ValueError(f"network: {algorithm} would not call the hooks of layer {hooked[0]!r}; remove them")
    body = kinds[1:] if kinds[0] is nn.Flatten else kinds
    if len(body) % 2 == 0 or body != [nn.Linear, nn.ReLU] * (len(body) // 2) + [nn.Linear]:
        raise ValueError(
            f"network: {algorithm} supports fully connected ReLU networks (Linear, ReLU, …, Linear), not "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    layers = [views for block in theta.blocks for views in block if views]
    if biases and not all("bias" in layer for layer in layers):
        raise ValueError(f"network: {algorithm} supports fully connected ReLU networks with a bias in every layer")
    return layers


def set_initial_values(name: str, variables: Sequence[Tensor], start: Start | None) -> None:
    """Overwrite variables by the initial values of that name, if there are any.

    Raises ValueError for another number of tensors or another shape.
    """
    if start is None or name not in start:
        return
    values = [torch.as_tensor(value) for value in start[name]]
    if [v.shape for v in values] != [v.shape for v in variables]:
        raise ValueError(
            f"start[{name!r}]: shapes {[list(v.shape) for v in values]}, expected {[list(v.shape) for v in variables]}"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.copy_(value)


def check_initial_names(start: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Raise ValueError for an initial value of a variable that the algorithm does not have."""
    if unknown := set(start or ()) - set(names):
        raise ValueError(f"start: no variable {sorted(unknown)}; the variables are {', '.join(names)}")


def sample_initial_values(
    name: str,
    variables: Sequence[Tensor],
    seeds: Sequence[int],
    spread: Tensor,
    distribution: Literal["normal", "uniform"],
    of_samples: Problem | None = None,
) -> None:
    """Overwrite replica s of each variable by samples of N(0, spread_s²) or U(0, spread_s).

    Each replica of a variable has its own generator, which follows from the seed, the name and the variable's place.
    For variables [S, n, ...] `of_samples` is the problem, of whose samples n are held here; without any, a variable is
    left out.
    """
    for number, variable in enumerate(variables, start=1):
        for replica, seed, width in zip(variable, seeds, spread.tolist(), strict=True):
            if not len(replica):
                continue
            n = len(replica) if of_samples is None else of_samples.n_samples
            rng = stateless_rng(seed, name, number)
            values = torch.empty(n, *replica.shape[1:], dtype=replica.dtype, device="cpu")
            if distribution == "normal":
                values.normal_(0.0, width, generator=rng)
            else:
                values.uniform_(0.0, width, generator=rng)
            replica.copy_(values if of_samples is None else values[of_samples.part])


def pre_activation(layer: ParamDict, a: Tensor, out: Tensor | None = None) -> Tensor:
    """Return Z = A Wᵀ + b [S, n, d_l] for A [S, n, d_{l−1}], in a new tensor or in `out`; b is 0 if there is none."""
    if "bias" not in layer:
        return torch.bmm(a, layer["weight"].mT, out=out)
    return torch.baddbmm(layer["bias"].unsqueeze(1), a, layer["weight"].mT, out=out)


def forward(layers: Sequence[ParamDict], x: Tensor, z: Sequence[Tensor], a: Sequence[Tensor], slice_size: int) -> None:
    """Overwrite Z_1..Z_L and A_1..A_{L−1} [S, N, d_l] by a forward pass of x [N, d_0], which all replicas share."""
    for part in slices(len(x), slice_size):
        layer_input = x[part].expand(len(z[0]), -1, -1)
        for layer, z_l, a_l in zip_longest(layers, z, a):
            z_l[:, part] = pre_activation(layer, layer_input)
            if a_l is not None:
                layer_input = torch.clamp(z_l[:, part], min=0.0, out=a_l[:, part])


def relu_prox_(p: Tensor, q: Tensor, ratio: float | Tensor, positive: Tensor, is_positive: Tensor) -> None:
    """Write argmin_z ½ (z − p)² + ratio/2 (q − max(z, 0))² of each element into p; of two minima the negative one.

    ratio > 0 is a number or [S, 1, 1]. All other tensors have p's shape; `positive`, which may be q, and `is_positive`
    are overwritten. On z > 0 the minimiser is z⁺ = (p + ratio q)/(1 + ratio), on z ≤ 0 it is min(p, 0). For p > 0, z⁺
    is better wherever it is positive; for p ≤ 0, where p > −(√(1 + ratio) − 1) q, which implies z⁺ > 0.
    """
    below = -ratio / (1.0 + (1.0 + ratio) ** 0.5)  # 1 − √(1 + ratio), without cancellation
    torch.mul(q, below, out=is_positive).clamp_(max=0.0).lt_(p)  # 1 where z⁺ is better; p ≤ 0 elsewhere
    torch.mul(q, ratio, out=positive).add_(p).mul_(1.0 / (1.0 + ratio)).clamp_(min=0.0)
    p.lerp_(positive, is_positive)  # exactly one of the two, many times faster than torch.where


def squared_norm(values: Tensor) -> Tensor:
    """Return ‖·‖² of each replica, [S], summed in float64."""
    return values.square().sum(tuple(range(1, values.ndim)), dtype=torch.float64)


def square_residuals(
    problem: Problem, x: Tensor, layers: Sequence[ParamDict], z: Sequence[Tensor], a: Sequence[Tensor], slice_size: int
) -> tuple[Tensor, Tensor]:
    """Return ‖Z_l − A_{l−1} W_lᵀ − b_l‖² [L, S] and ‖A_l − relu(Z_l)‖² [len(a), S], in float64.

    If there is an A_L, its residual is ‖A_L − Z_L‖². x is [S, N, d_0], z has L tensors, and a has L − 1 or L, of the
    samples that are held here; the sums are over all samples of the problem.
    """
    affine, activation = (torch.zeros(len(v), len(x), dtype=torch.float64, device=x.device) for v in (z, a))
    for part in slices(x.shape[1], slice_size):
        for number, (layer, layer_input, variable) in enumerate(zip(layers, [x, *a], z, strict=False)):
            z_l = variable[:, part]
            affine[number] += squared_norm(z_l - pre_activation(layer, layer_input[:, part]))
            if number < len(a):
                activation[number] += squared_norm(a[number][:, part] - (z_l.relu() if number + 1 < len(z) else z_l))
    problem.parallel.add_up(affine, activation)
    return affine, activation


def relative_residuals(
    problem: Problem, affine: Tensor, activation: Tensor, z: Sequence[Tensor], a: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return `residual_l` = ‖Z_l − A_{l−1} W_lᵀ − b_l‖/‖Z_l‖ and `activation_residual_l` = ‖A_l − relu(Z_l)‖/‖A_l‖, [S]
    each, from what `square_residuals` has returned."""
    named = {"residual": (affine, z), "activation_residual": (activation, a)}
    return {
        f"{name}_{number}": (square / whole_square(problem, variable)).sqrt()
        for name, (squares, variables) in named.items()
        for number, (square, variable) in enumerate(zip(squares, variables, strict=True), start=1)
    }


def whole_square(problem: Problem, variable: Tensor) -> Tensor:
    """Return ‖·‖² [S] of a variable [S, n, d] of all samples, of which n are held here, summed in float64."""
    square = squared_norm(variable)
    problem.parallel.add_up(square)
    return square


def root_mean_square(problem: Problem, variable: Tensor) -> Tensor:
    """Return the root mean square [S] of the entries of a variable [S, n, d] of all samples; n are held here."""
    return (whole_square(problem, variable) / (problem.n_samples * variable.shape[2])).sqrt()
