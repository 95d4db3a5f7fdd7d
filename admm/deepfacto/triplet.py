"""The triplet loss of face verification, with semi-hard negatives of the mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from admm.checks import check_positive
from admm.losses import Loss


@dataclass(frozen=True)
class TripletLoss(Loss):
    """J of an anchor a = the mean over its positives p of scale · max(0, d(a, p) − d(a, n) + margin), with squared
    distances of embeddings of length 1 and n the nearest negative beyond p, or the farthest one where none is (Schroff
    et al. 2015, Eq. 3 and §3.2; Hoffer & Ailon 2015). It is 0 where a has no positive or no negative.

    Shapes: embeddings z [..., B, d]; identities y [..., B]; the mini-batch is what triplets are made of. There is no
    proximal operator: the loss is not a sum over samples.
    """

    scale: float = 1.0
    margin: float = 0.2

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_positive("margin", self.margin)

    def targets(self, y: Tensor, outputs: Sequence[int], like: Tensor) -> Tensor:
        """Identities [N], whole numbers. Raises ValueError for others."""
        if y.ndim != 1 or y.is_floating_point() or y.is_complex():
            raise ValueError(f"y: TripletLoss takes identities [N], whole numbers, not {y.dtype} {list(y.shape)}")
        return y

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """J of each anchor, [..., B]."""
        unit = functional.normalize(z, dim=-1)
        distance = 2.0 - 2.0 * (unit @ unit.mT)
        same = y.unsqueeze(-1) == y.unsqueeze(-2)
        positive = same & ~torch.eye(y.shape[-1], dtype=torch.bool, device=y.device)
        negative = self._negative(distance.detach(), same)
        excess = (distance - distance.gather(-1, negative) + self.margin).clamp(min=0.0)
        used = positive & ~same.all(-1, keepdim=True)
        return self.scale * (excess * used).sum(-1) / used.sum(-1).clamp(min=1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """Of the sum over anchors, [..., B, d]; the choice of negatives counts as fixed."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, y).sum(), leaf)[0]

    @staticmethod
    def _negative(distance: Tensor, same: Tensor) -> Tensor:
        """For each anchor a and positive p the index of their negative, [..., B, B]."""
        # In the order of distance from a, with those of a's own identity last, p is followed by the nearest beyond it.
        ordered, order = distance.masked_fill(same, torch.inf).sort(-1)
        others = (~same).sum(-1, keepdim=True)
        beyond = torch.searchsorted(ordered, distance.contiguous(), right=True)
        return order.gather(-1, torch.minimum(beyond, others - 1).clamp(min=0))
