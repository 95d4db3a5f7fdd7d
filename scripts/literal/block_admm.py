"""Algorithm 1, Stochastic Block-ADMM, line by line in the paper's letters, with autograd's gradients.

Khorram, Fu, Danesh, Qi & Li 2021, "Stochastic Block-ADMM for Training Deep Networks", https://arxiv.org/abs/2105.00339.
One network. Lines are counted from `Define` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


class Algorithm1:
    """The variables Z_t and U_t [N, d_t] of all samples, and Θ in the blocks.

    J sums over samples. `theta_rule` is PyTorch's SGD or Adam for the parameters of all blocks.
    """

    def __init__(
        self,
        block: Sequence[nn.Module],
        X: Tensor,
        Y: Tensor,
        J: Callable[[Tensor, Tensor], Tensor],
        beta: Sequence[float],
        theta_rule: torch.optim.Optimizer,
        U: Sequence[Tensor] | None = None,
    ) -> None:
        self.block, self.X, self.Y, self.J, self.beta, self.theta_rule = block, X, Y, J, beta, theta_rule
        self.T = len(block)
        self.Z = self.forward(X)  # line 3
        self.U = [torch.zeros_like(Z) for Z in self.Z] if U is None else [V.clone() for V in U]  # line 2

    def iterate(self, zeta: Sequence[float], eta: float, alpha: float, batches: Iterable[Tensor]) -> None:
        """Do lines 4 to 13, where α = 1 in line 12; `batches` are the indices that line 11 draws, one by one."""
        everything = torch.arange(len(self.X))
        self.update_Z(everything, zeta)
        for i in batches:
            self.update_Theta(i, eta)
        self.update_U(everything, alpha)

    def coupling(self, t: int, Z: Sequence[Tensor], i: Tensor) -> Tensor:
        """Return 𝒯(Z_t, Z_{t−1}, U_t, Θ_t) of line 1 for the samples i, whose coupling variables are Z."""
        before = self.X[i] if t == 1 else Z[t - 2]
        residual: Tensor = Z[t - 1] - self.block[t - 1](before)
        return self.beta[t - 1] / 2 * (residual + self.U[t - 1][i]).square().sum()

    def update_Z(self, i: Tensor, zeta: Sequence[float]) -> None:
        """Do lines 5 to 8 for the samples i."""
        for t in range(self.T, 0, -1):
            self.descend(t, i, self.gradient(t, i), zeta[t - 1])

    def gradient(self, t: int, i: Tensor) -> Tensor:
        """Return the gradient by Z_t of line 5 (t = T) or 7."""
        Z = [of_block[i].clone() for of_block in self.Z]
        Z[t - 1].requires_grad_()
        above = self.J(Z[-1], self.Y[i]) if t == self.T else self.coupling(t + 1, Z, i)
        return torch.autograd.grad(self.coupling(t, Z, i) + above, Z[t - 1])[0]

    def descend(self, t: int, i: Tensor, gradient: Tensor, zeta: float) -> None:
        """Set Z_t ← Z_t − ζ_t ∇."""
        self.Z[t - 1][i] -= zeta * gradient

    def update_Theta(self, i: Tensor, eta: float) -> None:
        """Do line 10 for all t, on the mean over the samples i."""
        Z = [of_block[i] for of_block in self.Z]
        self.theta_rule.param_groups[0]["lr"] = eta
        self.theta_rule.zero_grad()
        (sum(self.coupling(t, Z, i) for t in range(1, self.T + 1)) / len(i)).backward()  # type: ignore[union-attr]
        self.theta_rule.step()

    def update_U(self, i: Tensor, alpha: float) -> None:
        """Do line 12 for all t and the samples i."""
        with torch.no_grad():
            for t in range(1, self.T + 1):
                before = self.X[i] if t == 1 else self.Z[t - 2][i]
                self.U[t - 1][i] += alpha * (self.Z[t - 1][i] - self.block[t - 1](before))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of all blocks in a forward pass."""
        outputs = []
        with torch.no_grad():
            for block in self.block:
                x = block(x)
                outputs.append(x)
        return outputs
