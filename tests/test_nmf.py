"""Non-negative least squares and factorisation against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.decomposition import NMF as Reference
from torch.testing import assert_close

from admm import nmf
from admm.nmf import NMF, by_lbfgs, feature_maps, hals_sweep, matrix, nmf_steps, nonnegative_least_squares


def draw(*shape, seed=0, power=0.5):
    return torch.tensor(np.random.default_rng(seed).gamma(power, size=shape))


def objective(z, basis, scores):
    return 0.5 * (z - basis @ scores).square().sum((1, 2))


@pytest.mark.parametrize(("channels", "rank"), [(30, 1), (30, 7), (40, 40)])
def test_projection_reaches_scipys_optimum(channels, rank):
    basis, noise = draw(2, channels, rank), draw(2, channels, 25, seed=1)
    z = basis @ draw(2, rank, 25, seed=2) + noise
    start = torch.zeros(2, rank, 25, dtype=z.dtype)
    scores = nonnegative_least_squares(basis.mT @ basis, basis.mT @ z, start)
    assert scores.min() >= 0.0
    for r in range(2):
        for column in range(25):
            _, norm = nnls(basis[r].numpy(), z[r, :, column].numpy())
            ours = (z[r, :, column] - basis[r] @ scores[r, :, column]).square().sum().item()
            assert ours <= norm**2 * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("rank", [1, 7])
def test_lbfgs_projects_to_the_same_optimum(rank):
    basis = draw(2, 30, rank)
    z = basis @ draw(2, rank, 25, seed=2) + draw(2, 30, 25, seed=1)
    gram, cross = basis.mT @ basis, basis.mT @ z
    expected = nonnegative_least_squares(gram, cross, torch.zeros_like(cross), tolerance=1e-10)
    assert_close(by_lbfgs(gram, cross, torch.zeros_like(cross)), expected, atol=1e-4, rtol=1e-4)
    maps = draw(1, 4, 30, 2, 2)[0].float()
    plain, other = (NMF(30, rank, lbfgs) for lbfgs in (False, True))
    other.load_state_dict(plain.state_dict())
    assert_close(other(maps), plain(maps), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solve", [nonnegative_least_squares, by_lbfgs])
@pytest.mark.parametrize(("of_basis", "of_z"), [(1.0, 1e-6), (1e-6, 1.0), (1e6, 1e-6), (1.0, 1e8)])
def test_projection_is_the_same_in_all_units(solve, of_basis, of_z):
    basis, z = draw(4, 30, 7), draw(4, 30, 9, seed=1)
    basis[1], basis[2, :, 3] = 0.0, basis[2, :, 4]
    z[3, 0, 0] = torch.nan  # a replica that has diverged: no error, and no effect on the others
    gram, cross = (of_basis * basis).mT @ (of_basis * basis), of_basis * of_z * basis.mT @ z
    scores = solve(gram, cross, torch.zeros_like(cross)) * (of_basis / of_z)
    assert not scores[1].any() and not scores[3].isfinite().all()
    for r in (0, 2):
        for column in range(9):
            _, norm = nnls(basis[r].numpy(), z[r, :, column].numpy())
            assert (z[r, :, column] - basis[r] @ scores[r, :, column]).norm().item() <= norm * (1 + 1e-6)


def test_a_replica_that_has_diverged_does_not_take_all_steps(monkeypatch):
    steps, vecdot = [], torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda *args, **named: (steps.append(1), vecdot(*args, **named))[1])
    gram = torch.eye(3)[None]
    assert nonnegative_least_squares(gram, torch.full((1, 3, 4), torch.nan), torch.zeros(1, 3, 4)).isnan().all()
    assert len(steps) == nmf.CHECK_EVERY


def test_projection_on_a_basis_of_all_sizes_in_single_precision():
    # Columns of lengths 1e-2 to 1e2, as a factorisation leaves them.
    basis = draw(1, 60, 60) * torch.logspace(-2, 2, 60)
    z = basis @ draw(1, 60, 20, seed=2) / 8 + draw(1, 60, 20, seed=1)
    short = basis.float()
    scores = nonnegative_least_squares(short.mT @ short, short.mT @ z.float(), torch.zeros(1, 60, 20))
    for column in range(20):
        _, norm = nnls(basis[0].numpy(), z[0, :, column].numpy())
        ours = (z[0, :, column] - basis[0] @ scores[0, :, column].double()).square().sum().item()
        assert ours <= norm**2 * (1 + 1e-4) + 1e-6 * z[0, :, column].square().sum().item()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_projection_fulfils_the_optimality_conditions(rank, channels, seed):
    random = np.random.default_rng(seed)
    basis = torch.tensor(random.normal(size=(1, channels, rank)))  # of any sign, and singular for rank > channels
    z = torch.tensor(random.normal(size=(1, channels, 4)))
    gram, cross = basis.mT @ basis, basis.mT @ z
    scores = nonnegative_least_squares(gram, cross, torch.zeros(1, rank, 4).double(), 100_000, 1e-10)
    gradient = gram @ scores - cross
    scale = 1e-4 * (cross.abs().max() + 1)
    assert scores.min() >= 0.0
    assert gradient.min() >= -scale
    assert (gradient * scores).abs().max() <= scale * (1 + scores.max())


def test_projection_is_the_same_in_parts_and_from_any_start(monkeypatch):
    basis, z = draw(1, 12, 5), draw(1, 12, 33, seed=1)
    gram, cross = basis.mT @ basis, basis.mT @ z
    whole = nonnegative_least_squares(gram, cross, torch.zeros_like(cross), tolerance=1e-12)
    monkeypatch.setattr(nmf, "COLUMNS", 20)
    assert_close(nonnegative_least_squares(gram, cross, 3 * draw(1, 5, 33, seed=4), tolerance=1e-12), whole)


def test_each_row_of_a_sweep_is_its_exact_minimiser():
    basis, z, scores = draw(2, 9, 20), draw(2, 9, 15, seed=1), draw(2, 20, 15, seed=2)  # more rows than WIDTH
    expected = scores.clone()
    for k in range(20):
        rest = z - basis @ expected + basis[:, :, k : k + 1] @ expected[:, k : k + 1]
        alone = basis[:, :, k : k + 1].mT @ rest / basis[:, :, k].square().sum(1).view(-1, 1, 1)
        expected[:, k] = alone[:, 0].clamp(min=0.0)
    hals_sweep(basis.mT @ basis, basis.mT @ z, scores)
    assert_close(scores, expected)


@pytest.mark.parametrize(("rank", "columns"), [(3, 2**20), (20, 100)])
def test_factorisation_follows_scikit_learn(monkeypatch, rank, columns):
    monkeypatch.setattr(nmf, "COLUMNS", columns)
    z, basis, scores = draw(2, 24, 60), draw(2, 24, rank, seed=1), draw(2, rank, 60, seed=2)
    expected = []
    for r in range(2):
        model = Reference(rank, init="custom", solver="cd", max_iter=15, tol=0)
        w = model.fit_transform(z[r].T.numpy(), W=scores[r].T.numpy().copy(), H=basis[r].T.numpy().copy())
        expected.append(model.components_.T @ w.T)
    nmf_steps(z, basis, scores, 15)
    assert_close(basis @ scores, torch.tensor(np.stack(expected)))


def test_no_sweep_raises_the_objective_and_a_zero_column_is_left_alone():
    z, basis, scores = draw(2, 24, 60), draw(2, 24, 5, seed=1), draw(2, 5, 60, seed=2)
    basis[:, :, 2] = 0.0
    before = objective(z, basis, scores)
    kept = scores[:, 2].clone()
    hals_sweep(basis.mT @ basis, basis.mT @ z, scores)
    assert torch.equal(scores[:, 2], kept)
    for _ in range(10):
        after = objective(z, basis, scores)
        assert (after <= before).all() and min(basis.min(), scores.min()) >= 0.0
        before = after
        nmf_steps(z, basis, scores, 1)


@pytest.mark.parametrize("places", [(), (4,), (3, 2)])
def test_a_matrix_is_feature_maps_by_channel(places):
    maps = draw(2, 5, 3, *places)
    whole = matrix(maps)
    assert whole.shape == (2, 3, 5 * int(np.prod(places)))
    assert_close(whole[1, 2], maps[1, :, 2].flatten())  # the paper's: a row is a channel of all samples and places
    assert torch.equal(feature_maps(whole, like=maps), maps)


def test_the_layer_projects_without_a_gradient():
    layer = NMF(channels=8, rank=3)
    maps = draw(5, 8, 2, 2).float().requires_grad_()
    scores = layer(maps)
    assert scores.shape == (5, 3, 2, 2) and not scores.requires_grad and scores.min() >= 0.0
    rows = maps.detach().permute(0, 2, 3, 1).reshape(-1, 8)
    found = scores.permute(0, 2, 3, 1).reshape(-1, 3)
    for row, score in zip(rows, found, strict=True):
        _, norm = nnls(layer.basis.double().numpy(), row.double().numpy())
        assert torch.linalg.vector_norm(row - layer.basis @ score).item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 9])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank: . is not between 1 and the 8 channels"):
        NMF(8, rank)
