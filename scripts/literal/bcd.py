"""A literal transcription of the update of block coordinate descent, three-splitting (Zeng et al., ICML 2019).

One replica, samples are columns, every expression where it is needed and as it is printed: products are evaluated
again, systems are solved by explicit inverses. For the benchmark and for a test of `admm.optimizers.bcd`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> dict[str, list[Tensor]]:
    """The variables before the first iteration: w [d_l, d_{l-1}], b [d_l, 1], u and v [d_l, N], for x [d_0, N]."""
    u: list[Tensor] = []
    v: list[Tensor] = []
    for w, b in zip(weights, biases, strict=True):
        u.append(torch.addmm(b.repeat(1, x.shape[1]), w, v[-1] if v else x))
        v.append(u[-1].relu())
    v[-1] = u[-1]
    return {"w": list(weights), "b": list(biases), "u": u, "v": v}


def iterate(
    variables: dict[str, list[Tensor]], x: Tensor, y: Tensor, gamma: float, rho: float, alpha: float
) -> dict[str, list[Tensor]]:
    """One iteration with squared error on x [d_0, N] and y [C, N]; replaces the lists' tensors, and returns them."""
    w, b, u, v = (variables[name] for name in ("w", "b", "u", "v"))
    samples, last = x.shape[1], len(w) - 1
    for layer in range(last, -1, -1):
        before = v[layer - 1] if layer else x
        if layer == last:
            v[layer] = (y + gamma * u[layer] + alpha * v[layer]) / (1 + gamma + alpha)
            affine = torch.mm(w[layer], before) + b[layer].repeat(1, samples)
            u[layer] = (gamma * v[layer] + rho * affine) / (gamma + rho)
        else:
            v[layer] = update_v(u[layer], u[layer + 1], w[layer + 1], b[layer + 1], rho, gamma)
            affine = torch.addmm(b[layer].repeat(1, samples), w[layer], before)
            merged = (rho * affine + alpha * u[layer]) / (rho + alpha)
            u[layer] = relu_prox(v[layer], merged, (rho + alpha) / gamma)
        w[layer], b[layer] = update_wb(u[layer], before, w[layer], b[layer], alpha, rho)
    return variables


def update_v(u: Tensor, u_above: Tensor, w: Tensor, b: Tensor, rho: float, gamma: float) -> Tensor:
    """argmin over V of rho/2 |u_above - w V - b|^2 + gamma/2 |V - relu(u)|^2."""
    identity = torch.eye(w.shape[1], dtype=w.dtype)
    right = rho * torch.mm(w.t(), u_above - b.repeat(1, u_above.shape[1])) + gamma * u.relu()
    return torch.mm(torch.inverse(rho * torch.mm(w.t(), w) + gamma * identity), right)


def update_wb(u: Tensor, v: Tensor, w: Tensor, b: Tensor, alpha: float, rho: float) -> tuple[Tensor, Tensor]:
    """The minimisers over W with the old b, and over b with the old W."""
    width, samples = v.shape
    identity = torch.eye(width, dtype=v.dtype)
    new_w = torch.mm(
        alpha * w + rho * torch.mm(u - b.repeat(1, samples), v.t()),
        torch.inverse(alpha * identity + rho * torch.mm(v, v.t())),
    )
    total = torch.sum(u - torch.mm(w, v), dim=1).reshape(b.shape)
    return new_w, (alpha * b + rho * total) / (rho * samples + alpha)


def relu_prox(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """argmin over u of (a - relu(u))^2 + gamma (u - b)^2, by cases."""
    slope = gamma - math.sqrt(gamma * (gamma + 1))
    both = (a + gamma * b) / (1 + gamma)
    negative = torch.min(b, torch.zeros_like(b))
    result = torch.where(a + gamma * b < 0, negative, torch.zeros_like(b))
    positive = ((a + gamma * b >= 0) & (b >= 0)) | ((a * slope <= gamma * b) & (b < 0))
    result = torch.where(positive, both, result)
    return torch.where((-a <= gamma * b) & (gamma * b <= a * slope), b, result)
