"""Algorithm 2, Online Stochastic Block-ADMM, line by line in the paper's letters, with autograd's gradients.

Khorram, Fu, Danesh, Qi & Li 2021, "Stochastic Block-ADMM for Training Deep Networks", https://arxiv.org/abs/2105.00339.
One network. Lines are counted from `Define` on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Algorithm2:
    """The scalar duals u_t, and Θ in the blocks.

    J sums over samples. `theta_rule` is PyTorch's SGD or Adam for the parameters of all blocks.
    """

    def __init__(
        self,
        block: Sequence[nn.Module],
        J: Callable[[Tensor, Tensor], Tensor],
        beta: Sequence[float],
        theta_rule: torch.optim.Optimizer,
    ) -> None:
        self.block, self.J, self.beta, self.theta_rule = block, J, beta, theta_rule
        self.T = len(block)
        self.u = [0.0] * self.T  # line 2

    def visit(self, x: Tensor, y: Tensor, zeta: Sequence[float], eta: float) -> None:
        """Do lines 5 to 13 on the samples x, y: one, as printed, or a mini-batch, for which Θ and u take the mean."""
        z = self.forward(x)
        self.update_z(z, y, zeta)
        self.update_Theta(z, eta)
        self.update_u(z)

    def coupling(self, t: int, z: Sequence[Tensor]) -> Tensor:
        """Return 𝒯(z_t, z_{t−1}, u_t, Θ_t) of line 1, where z[0] is x, summed over the samples."""
        return self.beta[t - 1] / 2 * ((norms(z[t] - self.block[t - 1](z[t - 1])) + self.u[t - 1]) ** 2).sum()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return z_0 = x and z_1..z_T of line 5, by a forward pass."""
        z = [x]
        with torch.no_grad():
            for block in self.block:
                z.append(block(z[-1]))
        return z

    def update_z(self, z: list[Tensor], y: Tensor, zeta: Sequence[float]) -> None:
        """Do lines 6 to 9."""
        for t in range(self.T, 0, -1):
            self.descend(t, z, self.gradient(t, z, y), zeta[t - 1])

    def gradient(self, t: int, z: list[Tensor], y: Tensor) -> Tensor:
        """Return the gradient by z_t of line 6 (t = T) or 8."""
        leaves = [v.detach().clone() for v in z]
        leaves[t].requires_grad_()
        above = self.J(leaves[-1], y) if t == self.T else self.coupling(t + 1, leaves)
        return torch.autograd.grad(self.coupling(t, leaves) + above, leaves[t])[0]

    def descend(self, t: int, z: list[Tensor], gradient: Tensor, zeta: float) -> None:
        """Set z_t ← z_t − ζ_t ∇."""
        z[t] = z[t] - zeta * gradient

    def update_Theta(self, z: Sequence[Tensor], eta: float) -> None:
        """Do line 11 for all t."""
        self.theta_rule.param_groups[0]["lr"] = eta
        self.theta_rule.zero_grad()
        (sum(self.coupling(t, z) for t in range(1, self.T + 1)) / len(z[0])).backward()  # type: ignore[union-attr]
        self.theta_rule.step()

    def update_u(self, z: Sequence[Tensor]) -> None:
        """Do line 12 for all t."""
        with torch.no_grad():
            for t in range(1, self.T + 1):
                self.u[t - 1] += norms(z[t] - self.block[t - 1](z[t - 1])).mean().item()


def norms(residual: Tensor) -> Tensor:
    """Return ‖·‖₂ of each sample, with the derivative 0 at 0."""
    square = residual.flatten(1).square().sum(1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
