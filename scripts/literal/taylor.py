"""Algorithm 1 of Taylor et al. 2016, with the pseudo-inverse as printed there or by their transpose reduction (§5)."""

from __future__ import annotations

import torch
from torch import Tensor

Variables = dict[str, list[Tensor]]


def iterate(
    variables: Variables,
    x: Tensor,
    y: Tensor,
    beta: float,
    gamma: float,
    update_multiplier: bool,
    hinge: bool = False,
    scale: float = 1.0,
    transpose_reduction: bool = True,
) -> None:
    """Do one iteration, in place, with J = scale/2 ‖Z_L − Y‖² or scale times the binary hinge.

    w: L matrices [d_l, d_{l−1}]. z: L matrices [N, d_l]. a: L − 1 matrices [N, d_l]. multiplier: one, [N, d_L].
    x: [N, d_0].
    """
    w, z, a, multiplier = (variables[name] for name in ("w", "z", "a", "multiplier"))
    layers = len(w)
    for number in range(layers - 1):
        before = x if number == 0 else a[number - 1]
        w[number] = _regression(z[number], before, transpose_reduction)
        weight = w[number + 1]
        system = beta * weight.T @ weight + gamma * torch.eye(weight.shape[1]).to(x)
        right = beta * z[number + 1] @ weight + gamma * torch.relu(z[number])
        a[number] = right @ torch.linalg.inv(system)
        z[number] = _minimiser(before @ w[number].T, a[number], beta, gamma)
    before = a[-1] if a else x
    w[-1] = _regression(z[-1], before, transpose_reduction)
    prediction = before @ w[-1].T
    if hinge:
        z[-1] = _hinge_minimiser(prediction, multiplier[0], y, beta, scale)
    else:
        z[-1] = (scale * y + 2.0 * beta * prediction - multiplier[0]) / (scale + 2.0 * beta)
    if update_multiplier:
        multiplier[0] = multiplier[0] + beta * (z[-1] - before @ w[-1].T)


def _regression(z: Tensor, a: Tensor, transpose_reduction: bool) -> Tensor:
    """Return Zᵀ (A†)ᵀ, directly or as ZᵀA (AᵀA)†."""
    if transpose_reduction:
        inverse: Tensor = torch.linalg.pinv(a.T @ a, hermitian=True)
        return z.T @ a @ inverse
    pseudo_inverse: Tensor = torch.linalg.pinv(a)
    return z.T @ pseudo_inverse.T


def _minimiser(m: Tensor, a: Tensor, beta: float, gamma: float) -> Tensor:
    """Return the elementwise argmin_z γ (a − max(z, 0))² + β (z − m)²: the better minimiser of the two half-lines."""
    negative = torch.clamp(m, max=0.0)
    positive = torch.clamp((beta * m + gamma * a) / (beta + gamma), min=0.0)
    at_negative = gamma * (a - torch.relu(negative)) ** 2 + beta * (negative - m) ** 2
    at_positive = gamma * (a - torch.relu(positive)) ** 2 + beta * (positive - m) ** 2
    return torch.where(at_positive < at_negative, positive, negative)


def _hinge_minimiser(m: Tensor, multiplier: Tensor, y: Tensor, beta: float, scale: float) -> Tensor:
    """Return the elementwise argmin_z ℓ(z, y) + λz + β (z − m)²: the best of the kink and the two stationary points."""
    kink = y
    flat = m - multiplier / (2.0 * beta)
    sloped = flat + torch.where(y == 1, scale, -scale) / (2.0 * beta)
    candidates = torch.stack([kink, flat, sloped])
    loss = scale * torch.where(y == 1, torch.relu(1.0 - candidates), torch.relu(candidates))
    best = (loss + multiplier * candidates + beta * (candidates - m) ** 2).argmin(0, keepdim=True)
    return candidates.gather(0, best)[0]
