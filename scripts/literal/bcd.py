"""Block coordinate descent, three-splitting (Zeng, Lau, Lin & Yao, ICML 2019, "Global Convergence of Block Coordinate
Descent in Deep Learning", https://arxiv.org/abs/1803.00225), each minimiser from its own formula.

With V_0 = X, samples as rows and γ, ρ > 0 it minimises

    ½ ‖V_L − Y‖² + γ/2 (‖V_L − U_L‖² + Σ_{l<L} ‖V_l − relu(U_l)‖²) + ρ/2 Σ_l ‖U_l − V_{l−1} W_lᵀ − b_l‖²

over one variable after the other, from the last layer to the first: V_l, U_l, and W_l and b_l at once. V_L, hidden U_l,
W_l and b_l also have a proximal term α/2 ‖· − its old value‖². There is one replica, and every product is made where it
is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

Variables = dict[str, list[Tensor]]


def forward(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Variables:
    """Return the variables before the first iteration.

    w, b: W_l [d_l, d_{l−1}] and b_l [d_l]. u, v: U_l and V_l [N, d_l]. x: [N, d_0].
    """
    variables: Variables = {"w": list(weights), "b": list(biases), "u": [], "v": []}
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        x = x @ weight.T + bias
        variables["u"].append(x)
        x = torch.relu(x) if number < len(weights) else x
        variables["v"].append(x)
    return variables


def iterate(variables: Variables, x: Tensor, y: Tensor, gamma: float, rho: float, alpha: float) -> None:
    """Do one iteration, in place, on x [N, d_0] and y [N, C]."""
    w, b, u, v = (variables[name] for name in "wbuv")
    layers = len(w)
    for number in reversed(range(layers)):
        before = x if number == 0 else v[number - 1]
        if number == layers - 1:
            v[number] = (y + gamma * u[number] + alpha * v[number]) / (1.0 + gamma + alpha)
            u[number] = (gamma * v[number] + rho * (before @ w[number].T + b[number])) / (gamma + rho)
        else:
            v[number] = activations(u[number], u[number + 1], w[number + 1], b[number + 1], gamma, rho)
            mean = (rho * (before @ w[number].T + b[number]) + alpha * u[number]) / (rho + alpha)
            u[number] = relu_minimiser(mean, v[number], gamma / (rho + alpha))
        old = w[number], b[number]
        w[number] = weight_minimiser(*old, u[number], before, rho, alpha)
        b[number] = bias_minimiser(*old, u[number], before, rho, alpha)


def activations(u: Tensor, u_next: Tensor, w_next: Tensor, b_next: Tensor, gamma: float, rho: float) -> Tensor:
    """Return the argmin over V of ρ/2 ‖U_{l+1} − V Wᵀ − b‖² + γ/2 ‖V − relu(U_l)‖² with W = W_{l+1}, b = b_{l+1}."""
    hessian = rho * w_next.T @ w_next + gamma * torch.eye(w_next.shape[1]).to(w_next)
    right = gamma * torch.relu(u) + rho * (u_next - b_next) @ w_next
    return right.matmul(torch.linalg.inv(hessian))


def weight_minimiser(w: Tensor, b: Tensor, u: Tensor, before: Tensor, rho: float, alpha: float) -> Tensor:
    """Return the argmin over W of ρ/2 ‖U_l − V_{l−1} Wᵀ − b_l‖² + α/2 ‖W − W_l‖²."""
    hessian = rho * before.T @ before + alpha * torch.eye(before.shape[1]).to(w)
    right = rho * (u - b).T @ before + alpha * w
    return right.matmul(torch.linalg.inv(hessian))


def bias_minimiser(w: Tensor, b: Tensor, u: Tensor, before: Tensor, rho: float, alpha: float) -> Tensor:
    """Return the argmin over b of ρ/2 ‖U_l − V_{l−1} W_lᵀ − b‖² + α/2 ‖b − b_l‖², for the old W_l."""
    return (rho * (u - before @ w.T).sum(0) + alpha * b) / (rho * len(u) + alpha)


def relu_minimiser(p: Tensor, q: Tensor, ratio: float) -> Tensor:
    """Return the elementwise argmin_z ½ (z − p)² + ratio/2 (q − relu(z))², the better one of the two half-lines."""
    negative = torch.clamp(p, max=0.0)
    positive = torch.clamp((p + ratio * q) / (1.0 + ratio), min=0.0)
    at_negative = (negative - p) ** 2 + ratio * q**2
    at_positive = (positive - p) ** 2 + ratio * (q - positive) ** 2
    return torch.where(at_positive < at_negative, positive, negative)
