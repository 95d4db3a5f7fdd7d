"""Standard ADMM as its Algorithm 3 is printed (paper, supplement A): every minimiser from its own formula."""

from __future__ import annotations

import torch
from torch import Tensor

Variables = dict[str, list[Tensor]]


def iterate(
    variables: Variables, x: Tensor, y: Tensor, beta: float, gamma: float, weight_decay: float, scale: float = 1.0
) -> None:
    """Do one iteration, in place, with J = scale/2 ‖Z_L − Y‖².

    w: [W_l b_l], L matrices [d_l, d_{l−1} + 1]. z, u: L matrices [N, d_l]. a, v: L − 1 matrices [N, d_l]. x: [N, d_0].
    """
    w, z, a, u, v = (variables[name] for name in "wzauv")
    layers = len(w)
    for number in range(layers):
        before = _extended(x if number == 0 else a[number - 1])
        system = beta * before.T @ before + 2.0 * weight_decay * torch.eye(before.shape[1]).to(x)
        w[number] = (torch.linalg.inv(system) @ (beta * before.T @ (z[number] + u[number]))).T
    for number in range(layers - 1):
        before = _extended(x if number == 0 else a[number - 1])
        z[number] = _minimiser(before @ w[number].T - u[number], a[number] + v[number], beta, gamma)
        weight, bias = w[number + 1][:, :-1], w[number + 1][:, -1]
        system = beta * weight.T @ weight + gamma * torch.eye(weight.shape[1]).to(x)
        right = beta * (z[number + 1] + u[number + 1] - bias) @ weight + gamma * (torch.relu(z[number]) - v[number])
        a[number] = right @ torch.linalg.inv(system)
    z[-1] = (scale * y + beta * (_extended(_before(x, a)) @ w[-1].T - u[-1])) / (scale + beta)
    for number in range(layers - 1):
        before = _extended(x if number == 0 else a[number - 1])
        u[number] = u[number] + z[number] - before @ w[number].T
        v[number] = v[number] + a[number] - torch.relu(z[number])
    u[-1] = u[-1] + z[-1] - _extended(_before(x, a)) @ w[-1].T


def _before(x: Tensor, a: list[Tensor]) -> Tensor:
    """Return A_{L−1}, which is X for one layer."""
    return a[-1] if a else x


def _extended(a: Tensor) -> Tensor:
    """Return [A 1], with the intercept's column of ones."""
    return torch.cat([a, a.new_ones(len(a), 1)], 1)


def _minimiser(p: Tensor, q: Tensor, beta: float, gamma: float) -> Tensor:
    """Return the elementwise argmin_z β/2 (z − p)² + γ/2 (q − max(z, 0))², the better one of the two half-lines."""
    negative = torch.clamp(p, max=0.0)
    positive = torch.clamp((beta * p + gamma * q) / (beta + gamma), min=0.0)
    at_negative = beta / 2 * (negative - p) ** 2 + gamma / 2 * (q - torch.relu(negative)) ** 2
    at_positive = beta / 2 * (positive - p) ** 2 + gamma / 2 * (q - torch.relu(positive)) ** 2
    return torch.where(at_positive < at_negative, positive, negative)
