"""Exact least-squares updates that algorithms with closed-form steps share: regressions and activations.

Sums over samples are taken slice by slice, so that what lies between two products stays in the processor's cache.
Systems are factored in float64. Normal equations with a small ridge have to be summed in float64 too, on both sides:
where Gram's eigenvalue λ is small, they multiply the rounding error of a sum by 1/λ, a factorisation of the features
themselves only by 1/√λ. Where there is no such ridge, sums in the data's own precision do, with an epsilon of that
precision in `cholesky_with_ridge`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from admm.minibatches import slices

EPSILON = 64.0 * torch.finfo(torch.float64).eps  # what sums of many products leave of its precision
_PANEL = 256  # columns of a symmetric product at a time: of 1500, 0.58 of its entries are computed


class Scratch:
    """Memory for a slice's temporaries, by name, taken again and again: fresh memory costs more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, which is valid until the name is taken again."""
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(*shape)


def zero_gram(replicas: int, inputs: int, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[S, m, m], for `add_gram`; m is the inputs and, for an intercept, one more."""
    return torch.zeros(replicas, inputs, inputs, dtype=dtype, device=like.device)


def add_gram(gram: Tensor, a: Tensor, scratch: Scratch) -> None:
    """gram += aᵀa of a [S, n, d], in gram's dtype; with a further column of ones if gram is [S, d + 1, d + 1].

    Of a wide one no more than the lower triangle, all that a Cholesky factorisation reads, is complete.
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
    """cross += aᵀ target, [S, m, d'], of samples a [S, n, d] in any dtype and target [S, n, d'] in cross's; m as in
    `add_gram`."""
    features = a.shape[-1]
    cross[:, :features].baddbmm_(_converted(a, cross.dtype, scratch).mT, target)
    if cross.shape[1] > features:
        cross[:, features] += target.sum(1)


def _converted(a: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Features [S, n, d] in another precision; those that all replicas share are converted once."""
    if a.dtype == dtype:
        return a
    own = a[:1] if a.stride(0) == 0 else a
    return scratch.take("converted", own.shape, dtype).copy_(own).expand_as(a)


def cholesky_with_ridge(gram: Tensor, ridge: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Cholesky factor [S, m, m] in float64 of gram + ridge I; `ridge` is [S, 1].

    Where this matrix is singular to the precision `epsilon` (a column of which less than mε is not in the span of those
    before it), epsilon · trace is added to its diagonal as well, and ten times as much until that does: a solution then
    is near the pseudo-inverse's. To a matrix of zeros 1 is added. A diverged replica, whose matrix is not finite, has a
    factor of NaN, and there is no exception for the others.
    """
    gram = gram.to(torch.float64, copy=True)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge.to(gram)
    lift = epsilon * diagonal.sum(-1)
    lift = torch.where(lift > 0, lift, 1.0)
    finite = gram.isfinite().flatten(1).all(1)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    own = factor.diagonal(dim1=-2, dim2=-1).square()
    singular = finite & ((failed > 0) | (own <= gram.shape[-1] * epsilon * diagonal).any(-1))
    while singular.any():
        diagonal += torch.where(singular, lift, 0.0).unsqueeze(-1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        singular, lift = finite & (failed > 0), 10.0 * lift
    factor[~finite] = math.nan
    return factor


def input_factor(
    x: Tensor, ridge: Tensor, slice_size: int, intercept: bool = False, epsilon: float = EPSILON
) -> Tensor:
    """Cholesky factors [S, m, m] in float64 of XᵀX + ridge I for the inputs [N, ...], which all replicas share.

    `ridge` is [S, 1]; m is the inputs' entries and, with an intercept, one more. See `cholesky_with_ridge` for singular
    inputs.
    """
    x = x.flatten(1)
    gram, scratch = zero_gram(1, x.shape[1] + intercept, x), Scratch(x)
    for part in slices(len(x), slice_size):
        add_gram(gram, x[None, part], scratch)
    return cholesky_with_ridge(gram.expand(len(ridge), -1, -1), ridge, epsilon)


def regress(factor: Tensor, cross: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Solve factor factorᵀ [Wᵀ; bᵀ] = cross for W [S, d', d] and, if cross has a row for it, b [S, d']; in place."""
    solution = torch.cholesky_solve(cross.to(factor), factor)
    weight.copy_(solution[:, : weight.shape[-1]].mT)
    if bias is not None:
        bias.copy_(solution[:, -1])


def gain(weight: Tensor, ratio: float | Tensor) -> Tensor:
    """K = (ratio I + W Wᵀ)⁻¹ W = W (ratio I + WᵀW)⁻¹, [S, d', d], of W [S, d', d] and ratio > 0, a number or [S, 1, 1],
    for the exact update

    argmin_A ½‖T − A Wᵀ‖² + ratio/2 ‖A − R‖² = R + (T − R Wᵀ) K,

    which is (ratio R + T W)(ratio I + WᵀW)⁻¹ by the matrix inversion lemma. The smaller system is solved: it is the
    cheaper one, and not singular without the ratio.
    """
    tall = weight.shape[1] > weight.shape[2]
    w = (weight.mT if tall else weight).double()
    factor = cholesky_with_ridge(torch.bmm(w, w.mT), torch.as_tensor(ratio, dtype=torch.float64).view(-1, 1))
    solution = torch.cholesky_solve(w, factor).to(weight)
    return solution.mT if tall else solution
