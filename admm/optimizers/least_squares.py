"""Exact least-squares updates that algorithms with closed-form steps share: regressions and activations.

Sums over samples are taken slice by slice, so that the temporaries stay in the CPU's cache.
Systems are factored in float64. Normal equations with a small ridge have to be summed in float64 too, on both sides:
where Gram's eigenvalue λ is small, they multiply the rounding error of a sum by 1/λ, a factorisation of the features
themselves only by 1/√λ. Where there is no such ridge, sums in the data's precision are enough, with an epsilon of that
precision in `cholesky_with_ridge`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from admm.minibatches import slices
from admm.optimizers.protocol import Problem

_EPSILON = 64.0 * torch.finfo(torch.float64).eps  # the precision of sums of many products
_PANEL = 256  # columns of a symmetric product at a time: of 1500, 0.58 of its entries are computed


class Scratch:
    """Memory for a slice's temporaries, by name, which is used again: fresh memory costs more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor, which is valid until the name is taken again."""
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(*shape)


def zero_gram(replicas: int, inputs: int, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return zeros [S, m, m] for `add_gram`; m is the number of inputs and, for an intercept, one more."""
    return torch.zeros(replicas, inputs, inputs, dtype=dtype, device=like.device)


def add_gram(gram: Tensor, a: Tensor, scratch: Scratch) -> None:
    """Add aᵀa of a [S, n, d] to gram, in its dtype; with a further column of ones in a if gram is [S, d + 1, d + 1].

    Of a wide gram only the lower triangle, all that a Cholesky factorisation reads, is complete.
    """
    features = a.shape[-1]
    columns = _converted(a, gram.dtype, scratch)
    for start in range(0, features, _PANEL):
        stop = min(start + _PANEL, features)
        gram[:, start:stop, :stop].baddbmm_(columns[:, :, start:stop].mT, columns[:, :, :stop])
    if gram.shape[1] > features:
        sums = columns.sum(1)
        gram[:, features, :features] += sums
        gram[:, :features, features] += sums
        gram[:, features, features] += a.shape[1]


def add_cross(cross: Tensor, a: Tensor, target: Tensor, scratch: Scratch) -> None:
    """Add targetᵀ a to cross [S, d', m], for samples a [S, n, d] in any dtype and target [S, n, d'] in cross's dtype.

    m is d or, for an intercept, d + 1, as in `add_gram`. aᵀ target, of the same entries, takes a third longer.
    """
    features = a.shape[-1]
    cross[:, :, :features].baddbmm_(target.mT, _converted(a, cross.dtype, scratch))
    if cross.shape[2] > features:
        cross[:, :, features] += target.sum(1)


def _converted(a: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Return features [S, n, d] in another precision; those that all replicas share are converted once."""
    if a.dtype == dtype:
        return a
    distinct = a[:1] if a.stride(0) == 0 else a
    return scratch.take("converted", distinct.shape, dtype).copy_(distinct).expand_as(a)


def cholesky_with_ridge(gram: Tensor, ridge: Tensor, epsilon: float = _EPSILON) -> Tensor:
    """Return the Cholesky factor [S, m, m] in float64 of gram + ridge I; `ridge` is [S, 1].

    Where this matrix is singular to the precision `epsilon` (less than the part mε of a column is outside the span of
    the columns before it), epsilon · trace is added to its diagonal as well, and ten times as much until there is a
    factor: a solution then is near the pseudo-inverse's. To a matrix of zeros 1 is added. A diverged replica, whose
    matrix is not finite, has a factor of NaN, and the others are not affected.
    """
    gram = gram.to(torch.float64, copy=True)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge.to(gram)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    regular = (pivots > gram.shape[-1] * epsilon * diagonal).all(-1) & (failed == 0)
    if regular.all():
        return factor
    finite = gram.isfinite().flatten(1).all(1)
    lift = epsilon * diagonal.sum(-1)
    lift = torch.where(lift > 0, lift, 1.0)
    singular = finite & ~regular
    while singular.any():
        diagonal += torch.where(singular, lift, 0.0).unsqueeze(-1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        singular, lift = finite & (failed > 0), 10.0 * lift
    factor[~finite] = math.nan
    return factor


def input_factor(
    problem: Problem, x: Tensor, ridge: Tensor, slice_size: int, intercept: bool = False, epsilon: float = _EPSILON
) -> Tensor:
    """Return the Cholesky factors [S, m, m] in float64 of XᵀX + ridge I for the inputs [N, ...] of all replicas.

    `ridge` is [S, 1]; m is the number of a sample's entries and, with an intercept, one more. For singular
    inputs see `cholesky_with_ridge`. x are those samples of the problem that are held here, the factors are of all.
    The problem keeps them, so that each iteration may ask for them, with whatever ridge it has.
    """

    def factor() -> Tensor:
        features = x.flatten(1)
        gram, scratch = zero_gram(1, features.shape[1] + intercept, features), Scratch(features)
        for part in slices(len(features), slice_size):
            add_gram(gram, features[None, part], scratch)
        problem.parallel.add_up(gram)
        return cholesky_with_ridge(gram.expand(len(ridge), -1, -1), ridge, epsilon)

    return problem.kept(("factor", *ridge.flatten().tolist(), slice_size, intercept, epsilon), factor)


def solve_ridge(factor: Tensor, cross: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Solve [W b] factor factorᵀ = cross for W [S, d', d] and, if cross has a column for it, b [S, d']; in place."""
    solution = torch.cholesky_solve(cross.mT.to(factor), factor)
    weight.copy_(solution[:, : weight.shape[-1]].mT)
    if bias is not None:
        bias.copy_(solution[:, -1])


def ridge_gain(weight: Tensor, ratio: float | Tensor) -> Tensor:
    """Return K = (ratio I + W Wᵀ)⁻¹ W = W (ratio I + WᵀW)⁻¹, [S, d', d], for W [S, d', d] and ratio > 0.

    The ratio is a number or [S, 1, 1]. K is for the exact update

    argmin_A ½‖T − A Wᵀ‖² + ratio/2 ‖A − R‖² = R + (T − R Wᵀ) K,

    which is (ratio R + T W)(ratio I + WᵀW)⁻¹ by the matrix inversion lemma. The smaller system is solved: it is the
    cheaper one, and not singular without the ratio.
    """
    tall = weight.shape[1] > weight.shape[2]
    w = (weight.mT if tall else weight).double()
    factor = cholesky_with_ridge(torch.bmm(w, w.mT), torch.as_tensor(ratio, dtype=torch.float64).view(-1, 1))
    solution = torch.cholesky_solve(w, factor).to(weight)
    return solution.mT if tall else solution


def ridge_inverse(weight: Tensor, ridge: Tensor) -> Tensor:
    """Return (ridge I + WᵀW)⁻¹, [S, d, d] in float64, for W [S, d', d] and ridge > 0, [S, 1, 1].

    For d' < d it is (I − WᵀK)/ridge, with K of `ridge_gain`, whose system is the smaller one.
    """
    w, ridge = weight.double(), ridge.double()
    if w.shape[1] >= w.shape[2]:
        return torch.cholesky_inverse(cholesky_with_ridge(torch.bmm(w.mT, w), ridge.squeeze(2)))
    inverse = torch.bmm(w.mT, ridge_gain(w, ridge)).neg_()
    inverse.diagonal(dim1=1, dim2=2).add_(1.0)
    return inverse.div_(ridge)
