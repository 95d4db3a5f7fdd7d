"""What the algorithms for fully connected ReLU networks share: the network's form, starting values, the ReLU's prox,
the constraints' residuals.

Notation: layer l = 1..L has a weight W_l [S, d_l, d_{l−1}] and, if the algorithm knows it, a bias b_l [S, d_l];
Z_l = A_{l−1} W_lᵀ + b_l is the pre-activation [S, N, d_l], A_l = relu(Z_l), and A_0 = X. Python lists start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from admm.blocks import ParamDict, Parameters, has_hooks, leaves
from admm.minibatches import slices, stateless_rng
from admm.optimizers.protocol import Problem

Start = Mapping[str, Sequence[Tensor]]  # starting values by the name of a state's variable


def linear_layers(problem: Problem, theta: Parameters, algorithm: str, biases: bool = True) -> list[ParamDict]:
    """`weight` and `bias` of layers 1..L, as views into theta.

    Raises ValueError unless the network is `Linear, ReLU, Linear, …, Linear`, after a `Flatten` or not, and if `biases`
    are needed, all of its layers have one; and for an augmentation.
    """
    problem.refuse_augmentation(algorithm)
    network = problem.blocks.network
    modules = dict(network.named_modules(remove_duplicate=False))
    kinds = [type(modules[name]) for name in leaves(network)]
    if hooked := [name for name in leaves(network) if has_hooks(modules[name])]:
        raise ValueError(f"optimizer: {algorithm} would not call the hooks of layer {hooked[0]!r}; remove them")
    body = kinds[1:] if kinds[0] is nn.Flatten else kinds
    if len(body) % 2 == 0 or body != [nn.Linear, nn.ReLU] * (len(body) // 2) + [nn.Linear]:
        raise ValueError(
            f"optimizer: {algorithm} supports fully connected ReLU networks (Linear, ReLU, …, Linear), not "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    layers = [views for block in theta.blocks for views in block if views]
    if biases and not all("bias" in layer for layer in layers):
        raise ValueError(f"optimizer: {algorithm} supports fully connected ReLU networks with a bias in every layer")
    return layers


def put(name: str, variables: Sequence[Tensor], start: Start | None) -> None:
    """Overwrite variables by the starting values of that name, if there are any.

    Raises ValueError for another number of tensors or another shape.
    """
    if start is None or name not in start:
        return
    given = [torch.as_tensor(value) for value in start[name]]
    if [v.shape for v in given] != [v.shape for v in variables]:
        raise ValueError(
            f"start[{name!r}]: shapes {[list(v.shape) for v in given]}, expected {[list(v.shape) for v in variables]}"
        )
    for variable, value in zip(variables, given, strict=True):
        variable.copy_(value)


def known(start: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Raises ValueError for a starting value that the algorithm does not have."""
    if unknown := set(start or ()) - set(names):
        raise ValueError(f"start: no variable {sorted(unknown)}; the variables are {', '.join(names)}")


def draw(
    name: str,
    variables: Sequence[Tensor],
    seeds: Sequence[int],
    spread: Tensor,
    distribution: Literal["normal", "uniform"],
) -> None:
    """Overwrite replica s of each variable by draws from N(0, spread_s²) or U(0, spread_s), each by a generator of its
    own that follows from the seed and the name."""
    for number, variable in enumerate(variables, start=1):
        for replica, seed, width in zip(variable, seeds, spread.tolist(), strict=True):
            random, drawn = stateless_rng(seed, name, number), torch.empty_like(replica, device="cpu")
            if distribution == "normal":
                drawn.normal_(0.0, width, generator=random)
            else:
                drawn.uniform_(0.0, width, generator=random)
            replica.copy_(drawn)


def pre_activation(layer: ParamDict, a: Tensor, out: Tensor | None = None) -> Tensor:
    """Z = A Wᵀ + b [S, n, d_l] of A [S, n, d_{l−1}], in a new tensor or in `out`; b is 0 if the layer has none."""
    if "bias" not in layer:
        return torch.bmm(a, layer["weight"].mT, out=out)
    return torch.baddbmm(layer["bias"].unsqueeze(1), a, layer["weight"].mT, out=out)


def forward(layers: Sequence[ParamDict], x: Tensor, z: Sequence[Tensor], a: Sequence[Tensor], slice_size: int) -> None:
    """A forward pass of x [N, d_0], which all replicas share, into Z_1..Z_L and A_1..A_{L−1}, [S, N, d_l] each."""
    for part in slices(len(x), slice_size):
        before = x[part].expand(len(z[0]), -1, -1)
        for layer, own, activation in zip_longest(layers, z, a):
            own[:, part] = pre_activation(layer, before)
            if activation is not None:
                before = torch.clamp(own[:, part], min=0.0, out=activation[:, part])


def relu_prox_(p: Tensor, q: Tensor, ratio: float | Tensor, spare: Tensor) -> None:
    """argmin_z ½ (z − p)² + ratio/2 (q − max(z, 0))² of each element, into p; the negative one of two minima.

    ratio > 0 is a number or [S, 1, 1]; q and spare, of p's shape, are overwritten. On z > 0 the minimiser is
    z⁺ = (p + ratio q)/(1 + ratio), on z ≤ 0 it is min(p, 0). For p > 0, z⁺ is better wherever it is positive; for
    p ≤ 0, where p > −(√(1 + ratio) − 1) q, which implies z⁺ > 0.
    """
    below = -ratio / (1.0 + (1.0 + ratio) ** 0.5)  # 1 − √(1 + ratio), without cancellation
    torch.mul(q, below, out=spare).clamp_(max=0.0).lt_(p)  # 1 where z⁺ is better; p ≤ 0 elsewhere
    q.mul_(ratio).add_(p).mul_(1.0 / (1.0 + ratio)).clamp_(min=0.0)
    p.lerp_(q, spare)  # exactly one of the two, many times faster than torch.where


def squared_norm(values: Tensor) -> Tensor:
    """‖·‖² of each replica, [S], summed in float64."""
    return values.square().sum(tuple(range(1, values.ndim)), dtype=torch.float64)


def square_residuals(
    x: Tensor, layers: Sequence[ParamDict], z: Sequence[Tensor], a: Sequence[Tensor], slice_size: int
) -> tuple[Tensor, Tensor]:
    """‖Z_l − A_{l−1} W_lᵀ − b_l‖² [L, S] and ‖A_l − relu(Z_l)‖² [len(a), S], of an A_L that there is ‖A_L − Z_L‖².

    Of x [S, N, d_0], L tensors z and L − 1 or L tensors a, in float64.
    """
    affine, activation = (torch.zeros(len(v), len(x), dtype=torch.float64, device=x.device) for v in (z, a))
    for part in slices(x.shape[1], slice_size):
        for number, (layer, before, own) in enumerate(zip(layers, [x, *a], z, strict=False)):
            own = own[:, part]
            affine[number] += squared_norm(own - pre_activation(layer, before[:, part]))
            if number < len(a):
                activation[number] += squared_norm(a[number][:, part] - (own.relu() if number + 1 < len(z) else own))
    return affine, activation


def relative_residuals(
    affine: Tensor, activation: Tensor, z: Sequence[Tensor], a: Sequence[Tensor]
) -> dict[str, Tensor]:
    """`residual_l` = ‖Z_l − A_{l−1} W_lᵀ − b_l‖/‖Z_l‖ and `activation_residual_l` = ‖A_l − relu(Z_l)‖/‖A_l‖, of what
    `square_residuals` returns."""
    named = {"residual": (affine, z), "activation_residual": (activation, a)}
    return {
        f"{name}_{number}": (own / squared_norm(variable)).sqrt()
        for name, (squares, variables) in named.items()
        for number, (own, variable) in enumerate(zip(squares, variables, strict=True), start=1)
    }
