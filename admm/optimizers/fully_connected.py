"""What the algorithms for fully connected ReLU networks share: the network's form, starting values, the ReLU's prox.

Notation: layer l = 1..L has a weight W_l [S, d_l, d_{l−1}] and, if the algorithm knows it, a bias b_l [S, d_l];
Z_l = A_{l−1} W_lᵀ + b_l is the pre-activation [S, N, d_l], A_l = relu(Z_l), and A_0 = X. Python lists start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from admm.blocks import Blocks, Parameters, Views, leaves

Start = Mapping[str, Sequence[Tensor]]  # starting values by the name of a state's variable


def linear_layers(blocks: Blocks, theta: Parameters, algorithm: str) -> list[Views]:
    """`weight` and `bias` of layers 1..L, as views into theta.

    Raises ValueError unless the network is `Linear, ReLU, Linear, …, Linear`, after a `Flatten` or not.
    """
    modules = dict(blocks.network.named_modules())
    kinds = [type(modules[name]) for name in leaves(blocks.network)]
    body = kinds[1:] if kinds[0] is nn.Flatten else kinds
    if len(body) % 2 == 0 or body != [nn.Linear, nn.ReLU] * (len(body) // 2) + [nn.Linear]:
        raise ValueError(
            f"optimizer: {algorithm} supports fully connected ReLU networks (Linear, ReLU, …, Linear), not "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    return [views for block in theta.blocks for views in block if views]


def put(name: str, variables: Sequence[Tensor], start: Start | None) -> None:
    """Overwrite variables by the starting values of that name, if there are any.

    Raises ValueError for another number of tensors or another shape.
    """
    if start is None or name not in start:
        return
    given = start[name]
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


def pre_activation(layer: Views, a: Tensor, out: Tensor | None = None) -> Tensor:
    """Z = A Wᵀ + b [S, n, d_l] of A [S, n, d_{l−1}], in a new tensor or in `out`."""
    return torch.baddbmm(layer["bias"].unsqueeze(1), a, layer["weight"].mT, out=out)


def relu_prox(p: Tensor, q: Tensor, ratio: float | Tensor) -> Tensor:
    """argmin_z ½ (z − p)² + ratio/2 (q − max(z, 0))² of each element, for ratio > 0; the negative one of two minima.

    On z > 0 the minimiser is z⁺ = (p + ratio q)/(1 + ratio), on z ≤ 0 it is min(p, 0). For p > 0, z⁺ is better wherever
    it is positive; for p ≤ 0, where p > −(√(1 + ratio) − 1) q, which implies z⁺ > 0.
    """
    ratio = torch.as_tensor(ratio, dtype=q.dtype, device=q.device)
    positive = (ratio * q).add_(p).div_(1.0 + ratio).clamp_(min=0.0)
    chosen = ((1.0 - (1.0 + ratio).sqrt()) * q).clamp_(max=0.0).lt_(p)  # 1 where z⁺ is better, else 0, and p <= 0 there
    return torch.lerp(p, positive, chosen)  # exactly one of the two, several times faster than torch.where
