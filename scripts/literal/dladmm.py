"""dlADMM (Wang et al., KDD 2019, Algorithm 1, https://arxiv.org/abs/1905.13611), every update from its own formula.

There is one replica, and samples are columns. Nothing is cached: every update evaluates the products that it needs, and
each trial of the two searches evaluates the objective and the quadratic model from the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Variables:
    """The variables, the penalty and the starts of the searches.

    w, b, z: L tensors [d_l, d_{l−1}], [d_l, 1], [d_l, N]. a: L − 1 tensors [d_l, N]. u: [C, N]. costs: the mean loss
    after each iteration. accepted_theta, accepted_tau: those of the last iteration, in its order.
    """

    w: list[Tensor]
    b: list[Tensor]
    z: list[Tensor]
    a: list[Tensor]
    u: Tensor
    rho: float = 1e-6
    theta: float = 1.0
    tau: float = 1.0
    costs: list[float] = field(default_factory=list)
    accepted_theta: list[float] = field(default_factory=list)
    accepted_tau: list[float] = field(default_factory=list)


def iterate(v: Variables, x: Tensor, y: Tensor, loss: str = "cross_entropy", step: float = 4.0) -> None:
    """Do one iteration in place. x: [d_0, N]; y: one-hot [C, N]; step: FISTA's, 4 in the authors' program."""
    last = len(v.w) - 1
    v.accepted_theta, v.accepted_tau = [], []

    def before(i: int) -> Tensor:
        return x if i == 0 else v.a[i - 1]

    def dual(i: int) -> Tensor | float:
        return v.u if i == last else 0.0

    def z_step(i: int) -> None:
        if i == last:
            v.z[i] = fista(before(i), v.w[i], v.b[i], v.z[i], v.u, y, v.rho, loss, step)
        else:
            v.z[i] = z_minimiser(before(i), v.w[i], v.b[i], v.a[i])

    def b_step(i: int) -> None:
        gradient = v.rho * (v.w[i] @ before(i) + v.b[i] - v.z[i] - dual(i) / v.rho)
        v.b[i] = v.b[i] - gradient.mean(1, keepdim=True) / v.rho

    def w_step(i: int) -> None:
        v.w[i], theta = w_search(before(i), v.w[i], v.b[i], v.z[i], dual(i), v.rho, v.theta)
        v.accepted_theta.append(theta)

    def a_step(i: int) -> None:
        v.a[i], tau = a_search(v.a[i], v.w[i + 1], v.b[i + 1], v.z[i + 1], dual(i + 1), v.z[i], v.rho, v.tau)
        v.accepted_tau.append(tau)

    for i in range(last, -1, -1):
        z_step(i)
        b_step(i)
        w_step(i)
        if i > 0:
            a_step(i - 1)
    for i in range(last + 1):
        w_step(i)
        b_step(i)
        z_step(i)
        if i < last:
            a_step(i)
    v.u = v.u + v.rho * (v.z[last] - v.w[last] @ before(last) - v.b[last])
    schedule(v, x, y, loss)


def schedule(v: Variables, x: Tensor, y: Tensor, loss: str) -> None:
    """Raise ρ, and where the searches start, when the cost has risen three times in a row."""
    output = x
    for i, (w, b) in enumerate(zip(v.w, v.b, strict=True)):
        output = w @ (output if i == 0 else output.clamp(min=0)) + b
    v.costs.append(float(value(output, y, loss) / y.shape[1]))
    c = v.costs[-4:]
    if len(c) == 4 and c[0] < c[1] < c[2] < c[3]:
        v.rho = min(10 * v.rho, 0.1)
        if v.a and max(a.shape[0] for a in v.a) >= 100:
            v.theta, v.tau = 10 * v.theta, 10 * v.tau


def phi(a: Tensor, w: Tensor, b: Tensor, z: Tensor, u: Tensor | float, rho: float) -> Tensor:
    """Return φ = ρ/2 ‖z − W a − b + u/ρ‖²."""
    return rho / 2 * (z - w @ a - b + u / rho).square().sum()


def phi_by_w(a: Tensor, w: Tensor, b: Tensor, z: Tensor, u: Tensor | float, rho: float) -> Tensor:
    """Return the gradient of φ by W."""
    return rho * (w @ a + b - z - u / rho) @ a.T


def phi_by_a(a: Tensor, w: Tensor, b: Tensor, z: Tensor, u: Tensor | float, rho: float) -> Tensor:
    """Return the gradient of φ by a."""
    return rho * w.T @ (w @ a + b - z - u / rho)


def w_search(
    a: Tensor, w: Tensor, b: Tensor, z: Tensor, u: Tensor | float, rho: float, theta: float
) -> tuple[Tensor, float]:
    """Return W after a step of 1/θ on φ, and θ."""
    return bounded_step(lambda w: phi(a, w, b, z, u, rho), lambda w: phi_by_w(a, w, b, z, u, rho), w, theta)


def a_search(
    a: Tensor, w: Tensor, b: Tensor, z_next: Tensor, u: Tensor | float, z: Tensor, rho: float, tau: float
) -> tuple[Tensor, float]:
    """Return A after a step of 1/τ on φ + ρ/2 ‖A − relu(Z)‖², and τ; w, b, z_next and u are the next layer's."""

    def objective(a: Tensor) -> Tensor:
        return phi(a, w, b, z_next, u, rho) + rho / 2 * (a - torch.relu(z)).square().sum()

    def gradient(a: Tensor) -> Tensor:
        return phi_by_a(a, w, b, z_next, u, rho) + rho * (a - torch.relu(z))

    return bounded_step(objective, gradient, a, tau)


def bounded_step(
    objective: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], start: Tensor, curvature: float
) -> tuple[Tensor, float]:
    """Return start − ∇/c and c, the first of curvature · 2^k whose quadratic model bounds the objective from above.

    The model is f(start) + ⟨∇, Δ⟩ + c/2 ‖Δ‖², evaluated anew for each c."""
    slope = gradient(start)
    while True:
        end = start - slope / curvature
        change = end - start
        linear = (gradient(start) * change).sum()
        if not objective(end) > objective(start) + linear + curvature / 2 * change.square().sum():
            return end, curvature
        curvature *= 2.0


def z_minimiser(before: Tensor, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return the minimiser of ‖z − W a_{l−1} − b‖² + ‖a − relu(z)‖², the better one of the two half-lines."""

    def objective(z: Tensor) -> Tensor:
        return (z - w @ before - b).square() + (a - torch.relu(z)).square()

    m = w @ before + b
    negative, positive = m.clamp(max=0), ((m + a) / 2).clamp(min=0)
    return torch.where(objective(negative) > objective(positive), positive, negative)


def fista(
    before: Tensor,
    w: Tensor,
    b: Tensor,
    z: Tensor,
    u: Tensor,
    y: Tensor,
    rho: float,
    loss: str,
    step: float,
) -> Tensor:
    """Minimise J(z, y) + ρ/2 ‖z − W a − b + u/ρ‖² by FISTA (Beck & Teboulle 2009), which takes 1/step for the Lipschitz
    constant of J's gradient; at most 500 steps, until the objective changes by less than 1e-3. Return the extrapolated
    point, as the authors' program does."""
    target, inertia, previous, last_value = w @ before + b - u / rho, 1.0, z, math.inf
    for _ in range(500):
        objective = float(value(z, y, loss) + rho / 2 * ((z - target) ** 2).sum())
        if abs(last_value - objective) < 1e-3:
            break
        slope = torch.softmax(z, 0) - y if loss == "cross_entropy" else z - y
        current = (rho * target + z / step - slope) / (rho + 1 / step)
        following = 0.5 + math.sqrt(0.25 + inertia**2)
        z = current + (inertia - 1) / following * (current - previous)
        inertia, previous, last_value = following, current, objective
    return z


def value(z: Tensor, y: Tensor, loss: str) -> Tensor:
    """Return J summed over the samples. The authors' softmax clips what overflows; this one cannot overflow."""
    if loss == "cross_entropy":
        return -(y * torch.log_softmax(z, 0)).sum()
    return (z - y).square().sum() / 2
