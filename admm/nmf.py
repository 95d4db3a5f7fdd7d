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
CHECK_EVERY = 10  # steps between two checks for convergence
LEAVE = 0.1  # converged columns are dropped once they are this part of all
COLUMNS = 2**20  # entries of a factor that are processed at a time, so that they stay in the CPU's cache


def matrix(maps: Tensor) -> Tensor:
    """Return feature maps [R, n, C, ...] as a matrix [R, C, n·…] (supplement D)."""
    places: Tensor = maps.flatten(3) if maps.ndim > 3 else maps.unsqueeze(3)
    return places.transpose(1, 2).flatten(2)


def feature_maps(values: Tensor, like: Tensor) -> Tensor:
    """Return a matrix [R, r, n·…] as feature maps [R, n, r, ...] of the samples and places of `like` [R, n, C, ...]."""
    by_sample = values.view(*values.shape[:2], like.shape[1], -1).transpose(1, 2)
    return by_sample.reshape(*like.shape[:2], -1, *like.shape[3:])


def nonnegative_least_squares(
    gram: Tensor, cross: Tensor, start: Tensor, steps: int = 5000, tolerance: float = 1e-5
) -> Tensor:
    """Return the minimiser over S ≥ 0 of ½⟨S, G S⟩ − ⟨S, B⟩, which is that of ½‖Z − M S‖² for G = MᵀM and B = MᵀZ.

    The method is accelerated projected gradient (FISTA), column by column, on rows scaled so that G has a unit
    diagonal. A column loses its momentum where that points uphill.

    Args:
        gram: G [R, r, r], positive semi-definite.
        cross: B [R, r, m].
        start: the S [R, r, m] of the first step, which is not changed.
        steps: the most steps of a column.
        tolerance: a column has converged when in ten steps none of its entries has changed by more than this times the
            largest.

    References:
        Beck & Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm for linear inverse problems",
        https://doi.org/10.1137/080716542
        O'Donoghue & Candès (2015), "Adaptive restart for accelerated gradient schemes", §3.2,
        https://arxiv.org/abs/1204.3982
    """
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0).unsqueeze(2)
    gram = gram / scale / scale.mT
    largest = torch.linalg.eigvalsh(gram.nan_to_num())[:, -1].clamp(min=1.0).view(-1, 1, 1)
    advance = torch.eye(gram.shape[-1]).to(gram) - gram / largest  # y − (G y − B)/L = advance · y + B/L
    scores = torch.empty_like(cross)
    for replica in (slice(r, r + 1) for r in range(len(cross))):  # each stops when its own columns have converged
        for part in slices(cross.shape[2], _columns(cross)):
            b, s = (v[replica, :, part] / d[replica] for v, d in ((cross, scale * largest), (start, 1.0 / scale)))
            scores[replica, :, part] = _accelerated(advance[replica], b, s, steps, tolerance) / scale[replica]
    return scores


def by_lbfgs(gram: Tensor, cross: Tensor, start: Tensor) -> Tensor:
    """Return the minimiser of `nonnegative_least_squares` by SciPy's L-BFGS-B in float64, the paper's choice (§3.4).

    It solves for all columns of a replica at once, in units in which the objective is not small, as SciPy compares its
    change with 1. A replica that is not finite gets NaN. Raises ImportError without SciPy.
    """
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise ImportError(f"{error}; lbfgs needs SciPy: pip install scipy") from None

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
        result = minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return np.asarray(result.x).reshape(cross.shape) * unit

    replicas = zip(*(v.double().cpu().numpy() for v in (gram, cross, start)), strict=True)
    return torch.stack([torch.from_numpy(solved(*replica)) for replica in replicas]).to(cross)


def _accelerated(advance: Tensor, offset: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Return the minimiser for one replica; converged columns are dropped, most of them long before the last one."""
    result, columns = start.clone(), torch.arange(start.shape[2], device=start.device)
    s = ahead = at_check = start
    momentum = torch.ones_like(start[:, :1])
    converged = torch.zeros_like(columns, dtype=torch.bool)
    for step in range(1, steps + 1):
        new = torch.baddbmm(offset, advance, ahead).clamp_(min=0.0)
        change = new - s
        uphill = torch.linalg.vecdot(ahead - new, change, dim=1).unsqueeze(1) > 0.0
        grown = torch.where(uphill, 1.0, 0.5 + (0.25 + momentum.square()).sqrt())
        ahead = torch.addcmul(new, change, torch.where(uphill, 0.0, (momentum - 1.0) / grown))
        s, momentum = new, grown
        if step % CHECK_EVERY == 0:
            converged |= ~((s - at_check).abs().amax(1) > tolerance * s.amax(1))[0]  # NaN counts as converged
            at_check = s
            if converged.sum() >= LEAVE * len(converged):
                result[:, :, columns[converged]] = s[:, :, converged]
                active = ~converged
                s, ahead, at_check, momentum, offset = (v[:, :, active] for v in (s, ahead, at_check, momentum, offset))
                columns, converged = columns[active], converged[active]
                if not len(columns):
                    break
    result[:, :, columns] = s
    return result


def hals_sweep(gram: Tensor, cross: Tensor, factor: Tensor) -> None:
    """Do one sweep of hierarchical alternating least squares over the rows of S [R, r, m] = `factor`, in place.

    Each row in turn becomes the exact minimiser over it of ½⟨S, G S⟩ − ⟨S, B⟩ on S ≥ 0, with G = `gram` [R, r, r] and
    B = `cross` [R, r, m] (Cichocki & Phan 2009). The effect of `WIDTH` rows on the gradient by all others is one
    product. A row whose entry in G's diagonal is negligible stays.
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
    """Do the sweep on a few rows, in place, and return their change; `descent` is left as it is."""
    descent, change = descent.clone(), torch.empty_like(s)
    for k in range(s.shape[1]):
        row = slice(k, k + 1)
        torch.addcmul(s[:, row], descent[:, row], inverse[:, row], out=change[:, row]).clamp_(min=0.0)
        change[:, row] -= s[:, row]
        descent[:, k + 1 :].baddbmm_(gram[:, k + 1 :, row], change[:, row], alpha=-1.0)
    s += change
    return change


def nmf_steps(z: Tensor, basis: Tensor, scores: Tensor, rounds: int) -> None:
    """Lower ½‖Z − M S‖² for Z = `z` [R, C, m] ≥ 0, by `rounds` sweeps of S and of M in turn, in place.

    `basis` is M [R, C, r], `scores` is S [R, r, m]. No sweep raises the objective. The sweeps are those of
    scikit-learn's `NMF` with `solver="cd"`.
    """
    transposed = basis.mT.contiguous()
    for _ in range(rounds):
        hals_sweep(transposed @ transposed.mT, transposed @ z, scores)
        hals_sweep(scores @ scores.mT, scores @ z.mT, transposed)
    basis.copy_(transposed.mT)


def warm_start(z: Tensor, basis: Tensor, rounds: int) -> Tensor:
    """Return S [R, r, m] for Z = `z` [R, C, m] ≥ 0, and update M = `basis` [R, C, r] in place from its random entries.

    It scales M, and a constant S, so that M S is of the size of Z, and then does `rounds` of `nmf_steps`.
    """
    size = (z.mean((1, 2), keepdim=True).clamp(min=0.0) / basis.shape[2]).sqrt()
    scores = size.expand(-1, basis.shape[2], z.shape[2]).clone()
    basis.mul_(size)
    nmf_steps(z, basis, scores, rounds)
    return scores


def _columns(factor: Tensor) -> int:
    """Return how many columns of a factor [R, r, m] are processed at a time."""
    return max(1, COLUMNS // (factor.shape[0] * factor.shape[1]))


class NMF(nn.Module):
    """A layer from feature maps Z [n, C, ...] to scores S ≥ 0 [n, r, ...] with Z ≈ M S (paper, §3.4, Figure 2).

    S is the non-negative projection of Z on the basis M [C, r]. M is a buffer, which `DeepFacto` trains. No gradient
    goes back through the layer.

    Args:
        channels: C.
        rank: r.
        lbfgs: projects by L-BFGS, as the paper does.

    Raises:
        ValueError: for a rank that is not between 1 and C.
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
        """Draw half-normal entries of M, which `DeepFacto` scales to its data."""
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
