"""Non-negative least squares and non-negative matrix factorisation, for R replicas at once.

Shapes: a matrix Z [R, C, m] ≈ M S with a basis M [R, C, r] and scores S [R, r, m], both non-negative. Feature maps
[R, n, C, H, W] are the matrix [R, C, n·H·W] of the paper's supplement D.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from admm.minibatches import slices

Matrix = NDArray[np.float64]
WIDTH = 16  # rows of a factor whose effect on all others is one product
CHECK_EVERY = 10  # steps
LEAVE = 0.1  # the part of the columns that has ended, at which these leave
COLUMNS = 2**20  # entries of a factor that are worked on at a time, so that they stay in the processor's cache


def matrix(maps: Tensor) -> Tensor:
    """Feature maps [R, n, C, ...] as a matrix [R, C, n·…] (supplement D)."""
    places: Tensor = maps.flatten(3) if maps.ndim > 3 else maps.unsqueeze(3)
    return places.transpose(1, 2).flatten(2)


def feature_maps(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix [R, r, n·…] as feature maps [R, n, r, ...] with the samples and the places of `like` [R, n, C, ...]."""
    by_sample = matrix.view(*matrix.shape[:2], like.shape[1], -1).transpose(1, 2)
    return by_sample.reshape(*like.shape[:2], -1, *like.shape[3:])


def nonnegative_least_squares(
    gram: Tensor, cross: Tensor, start: Tensor, steps: int = 5000, tolerance: float = 1e-5
) -> Tensor:
    """argmin over S ≥ 0 of ½⟨S, G S⟩ − ⟨S, B⟩, column by column: of ½‖Z − M S‖² for G = MᵀM and B = MᵀZ.

    gram: G [R, r, r], positive semi-definite. cross: B [R, r, m]. start: S [R, r, m], not changed. By accelerated
    projected gradient (Beck & Teboulle 2009, FISTA) on rows scaled so that G has a unit diagonal; a column loses its
    momentum where that points uphill (O'Donoghue & Candès 2015, §3.2). A column ends when in ten steps none of its
    entries has changed by more than `tolerance` times the largest, or after `steps`.
    """
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0).unsqueeze(2)
    gram = gram / scale / scale.mT
    largest = torch.linalg.eigvalsh(gram.nan_to_num())[:, -1].clamp(min=1.0).view(-1, 1, 1)
    advance = torch.eye(gram.shape[-1]).to(gram) - gram / largest  # y − (G y − B)/L = advance · y + B/L
    found = torch.empty_like(cross)
    for replica in (slice(r, r + 1) for r in range(len(cross))):  # none goes on for another's sake
        for part in slices(cross.shape[2], _columns(cross)):
            b, s = (v[replica, :, part] / d[replica] for v, d in ((cross, scale * largest), (start, 1.0 / scale)))
            found[replica, :, part] = _accelerated(advance[replica], b, s, steps, tolerance) / scale[replica]
    return found


def by_lbfgs(gram: Tensor, cross: Tensor, start: Tensor) -> Tensor:
    """The same minimiser by SciPy's L-BFGS-B in float64, the paper's choice (§3.4), a replica's columns at once. The
    units are such that the objective is not small, as SciPy compares its change with 1. NaN for a replica that is not
    finite. Raises ImportError without SciPy."""
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise ImportError(f"{error}; lbfgs needs SciPy: pip install 'block-admm[suite]'") from None

    def solved(gram: Matrix, cross: Matrix, start: Matrix) -> Matrix:
        lengths = np.sqrt(gram.diagonal())[:, None]
        lengths[lengths == 0.0] = 1.0
        gram, cross = gram / lengths / lengths.T, cross / lengths
        unit = (np.abs(cross).max() or 1.0) / lengths  # of S
        cross = cross / (unit * lengths)
        if not np.isfinite(cross).all() or not np.isfinite(gram).all():
            return np.full_like(start, np.nan)

        def objective(flat: Matrix) -> tuple[float, Matrix]:
            product = gram @ flat.reshape(cross.shape)
            return float((flat * (0.5 * product - cross).ravel()).sum()), (product - cross).ravel()

        options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-13, "gtol": 1e-9}
        begin, bounds = (start / unit).ravel(), Bounds(0.0, np.inf)
        found = minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        return np.asarray(found).reshape(cross.shape) * unit

    replicas = zip(*(v.double().cpu().numpy() for v in (gram, cross, start)), strict=True)
    return torch.stack([torch.from_numpy(solved(*replica)) for replica in replicas]).to(cross)


def _accelerated(advance: Tensor, offset: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Of one replica. Columns that have ended leave, most of them long before the last."""
    found, left = start.clone(), torch.arange(start.shape[2], device=start.device)
    s = ahead = kept = start
    momentum = torch.ones_like(start[:, :1])
    ended = torch.zeros_like(left, dtype=torch.bool)
    for step in range(1, steps + 1):
        new = torch.baddbmm(offset, advance, ahead).clamp_(min=0.0)
        change = new - s
        uphill = torch.linalg.vecdot(ahead - new, change, dim=1).unsqueeze(1) > 0.0
        grown = torch.where(uphill, 1.0, 0.5 + (0.25 + momentum.square()).sqrt())
        ahead = torch.addcmul(new, change, torch.where(uphill, 0.0, (momentum - 1.0) / grown))
        s, momentum = new, grown
        if step % CHECK_EVERY == 0:
            ended |= ~((s - kept).abs().amax(1) > tolerance * s.amax(1))[0]  # NaN has ended, too
            kept = s
            if ended.sum() >= LEAVE * len(ended):
                found[:, :, left[ended]] = s[:, :, ended]
                s, ahead, kept, momentum, offset = (v[:, :, ~ended] for v in (s, ahead, kept, momentum, offset))
                left, ended = left[~ended], ended[~ended]
                if not len(left):
                    break
    found[:, :, left] = s
    return found


def hals_sweep(gram: Tensor, cross: Tensor, factor: Tensor) -> None:
    """One sweep of hierarchical alternating least squares over the rows of S [R, r, m], in place: each becomes in turn
    the exact minimiser over it of ½⟨S, G S⟩ − ⟨S, B⟩ on S ≥ 0 (Cichocki & Phan 2009). Gram and cross are as above.

    What `WIDTH` rows change in the gradient of all others is one product. A row that G hardly sees stays.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2).unsqueeze(2)
    seen = diagonal > torch.finfo(gram.dtype).eps ** 2 * diagonal.amax(1, keepdim=True)
    inverse = torch.where(seen, 1.0 / diagonal, 0.0)
    for s, b in zip(factor.split(_columns(factor), 2), cross.split(_columns(cross), 2), strict=True):
        descent = torch.baddbmm(b, gram, s, alpha=-1.0)  # B − G S
        for begin in range(0, factor.shape[1], WIDTH):
            rows = slice(begin, begin + WIDTH)
            descent.baddbmm_(
                gram[:, :, rows],
                _hals_rows(gram[:, rows, rows], inverse[:, rows], descent[:, rows], s[:, rows]),
                alpha=-1.0,
            )


def _hals_rows(gram: Tensor, inverse: Tensor, descent: Tensor, s: Tensor) -> Tensor:
    """The same for a few rows, in place; returns their change. `descent` is left as it is."""
    descent, change = descent.clone(), torch.empty_like(s)
    for k in range(s.shape[1]):
        row = slice(k, k + 1)
        torch.addcmul(s[:, row], descent[:, row], inverse[:, row], out=change[:, row]).clamp_(min=0.0)
        change[:, row] -= s[:, row]
        descent[:, k + 1 :].baddbmm_(gram[:, k + 1 :, row], change[:, row], alpha=-1.0)
    s += change
    return change


def nmf_steps(z: Tensor, basis: Tensor, scores: Tensor, rounds: int) -> None:
    """Makes ½‖Z − M S‖² smaller for z [R, C, m] ≥ 0, by `rounds` sweeps of S and of M in turn, in place.

    basis: M [R, C, r]. scores: S [R, r, m]. No sweep raises the objective; they are those of scikit-learn's `NMF` with
    `solver="cd"`.
    """
    transposed = basis.mT.contiguous()
    for _ in range(rounds):
        hals_sweep(transposed @ transposed.mT, transposed @ z, scores)
        hals_sweep(scores @ scores.mT, scores @ z.mT, transposed)
    basis.copy_(transposed.mT)


def warm_start(z: Tensor, basis: Tensor, rounds: int) -> Tensor:
    """S [R, r, m] for z [R, C, m] ≥ 0 by `rounds` of `nmf_steps`; M [R, C, r], in place, from its random entries."""
    size = (z.mean((1, 2), keepdim=True).clamp(min=0.0) / basis.shape[2]).sqrt()  # then M S is of the size of Z
    scores = size.expand(-1, basis.shape[2], z.shape[2]).clone()
    basis.mul_(size)
    nmf_steps(z, basis, scores, rounds)
    return scores


def _columns(factor: Tensor) -> int:
    return max(1, COLUMNS // (factor.shape[0] * factor.shape[1]))


class NMF(nn.Module):
    """A layer that passes on the scores S ≥ 0 with Z ≈ M S alone (paper, §3.4, Figure 2): feature maps [n, C, ...] to
    [n, r, ...], by the non-negative projection on the basis M [C, r], its buffer, which `DeepFacto` trains; with
    `lbfgs` by L-BFGS, as in the paper.

    No gradient goes back through it. Raises ValueError for a rank that is not between 1 and C.
    """

    basis: Tensor

    def __init__(self, channels: int, rank: int, lbfgs: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= channels:
            raise ValueError(f"rank: {rank} is not between 1 and the {channels} channels")
        self.rank, self.lbfgs = rank, lbfgs
        self.register_buffer("basis", torch.empty(channels, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half-normal entries; `DeepFacto` starts from them, at the scale of its data."""
        nn.init.normal_(self.basis).abs_()

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        basis, maps = self.basis.unsqueeze(0), z.unsqueeze(0)
        cross = basis.mT @ matrix(maps).to(basis)
        solve = by_lbfgs if self.lbfgs else nonnegative_least_squares
        scores = solve(basis.mT @ basis, cross, torch.zeros_like(cross))
        return feature_maps(scores, like=maps)[0].to(z)

    def extra_repr(self) -> str:
        return f"channels={len(self.basis)}, rank={self.rank}"
