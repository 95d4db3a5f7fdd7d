"""Normal equations against NumPy's least squares of the features themselves, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from admm.optimizers.least_squares import (
    Scratch,
    add_cross,
    add_gram,
    cholesky_with_ridge,
    ridge_gain,
    ridge_inverse,
    solve_ridge,
    zero_gram,
)


def solve(x: Tensor, target: Tensor, ridge: float) -> Tensor:
    """[W b] of each replica, summed in float64, in two slices."""
    scratch = Scratch(x)
    gram = zero_gram(len(x), x.shape[2] + 1, x)
    cross = x.new_zeros(len(x), target.shape[2], x.shape[2] + 1, dtype=torch.float64)
    for part in (slice(0, 8), slice(8, None)):
        add_gram(gram, x[:, part], scratch)
        add_cross(cross, x[:, part], target[:, part].double(), scratch)
    weight, bias = x.new_empty(len(x), target.shape[2], x.shape[2]), x.new_empty(len(x), target.shape[2])
    solve_ridge(cholesky_with_ridge(gram, torch.full((len(x), 1), ridge, dtype=torch.float64)), cross, weight, bias)
    return torch.cat([weight, bias.unsqueeze(2)], 2)


def reference(x: Tensor, target: Tensor, ridge: float) -> np.ndarray:
    """Of one replica, by the singular values of the features: without a ridge the shortest of all solutions."""
    columns = np.hstack([x.double().numpy(), np.ones((len(x), 1))])
    below = np.sqrt(ridge) * np.eye(columns.shape[1])
    right = np.vstack([target.double().numpy(), np.zeros((len(below), target.shape[1]))])
    return np.linalg.lstsq(np.vstack([columns, below]), right, rcond=None)[0].T


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("samples", "ridge"), [(12, 0.0), (12, 1e-9), (60, 0.0), (60, 1e-5)])
def test_regressions_on_float32_data_are_numpy_s(samples, ridge, scale):
    """Fewer samples than features, and more: a sum of products in float32 is wrong by far more than 1e-9."""
    x, target = drawn(2, samples, 30) * scale, drawn(2, samples, 3, seed=1)
    x[:, :, 4], x[:, :, 7] = x[:, :, 5], 0.0  # a copy, and a feature that is always 0
    for own, features, right in zip(solve(x, target, ridge * scale**2).double().numpy(), x, target, strict=True):
        expected = reference(features, right, ridge * scale**2)
        columns = np.hstack([features.double().numpy(), np.ones((samples, 1))])
        assert np.abs(columns @ (own - expected).T).max() < 1e-4
        if scale == 1.0:  # else the intercept's column is of another size, and what is shortest hangs on rounding
            assert np.linalg.norm(own - expected) < (0.1 if ridge == 0.0 else 1e-3) * np.linalg.norm(expected)
        assert not own[:, 7].any()


def test_singular_replicas_and_those_that_are_not_finite_leave_the_others_as_they_are():
    gram = drawn(5, 4, 9).mT
    gram = (gram @ gram.mT).double() + torch.eye(9).double()
    gram[1] = 0.0
    gram[2, 3, 3] = gram[3, 0, 0] = torch.nan
    gram[3], gram[4] = torch.inf, torch.diag(torch.tensor([1.0] * 8 + [-1e-9]))
    ridge = torch.zeros(5, 1)
    factor = cholesky_with_ridge(gram, ridge)
    assert torch.equal(factor[:1], cholesky_with_ridge(gram[:1], ridge[:1]))
    torch.testing.assert_close(factor[0] @ factor[0].T, gram[0])
    assert torch.equal(factor[1], torch.eye(9).double())  # of nothing but zeros: what it is multiplied with is 0
    assert factor[2:4].isnan().all()
    torch.testing.assert_close(factor[4] @ factor[4].T, gram[4], rtol=0.0, atol=1e-7)  # below 0 by rounding
    assert (factor[4].diagonal() > 0).all()


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_a_gain_of_hardly_any_ratio_is_the_pseudo_inverse(shape):
    weight = drawn(2, *shape)
    for found, own in zip(ridge_gain(weight, 1e-30), weight, strict=True):
        np.testing.assert_allclose(found, np.linalg.pinv(own.double().numpy()).T, rtol=1e-5, atol=1e-6)
    by_replica = ridge_gain(weight, torch.tensor([0.1, 2.0]).view(2, 1, 1))
    for found, own, ratio in zip(by_replica, weight.double(), (0.1, 2.0), strict=True):
        expected = torch.linalg.solve(ratio * torch.eye(shape[0]).double() + own @ own.T, own)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ridge_gain(torch.zeros(1, *shape), 0.5), torch.zeros(1, *shape))


@pytest.mark.parametrize("shape", [(3, 8), (8, 8), (9, 8)])
def test_an_inverse_with_a_ridge_is_that_of_each_replica(shape):
    weight, ridge = drawn(3, *shape), torch.tensor([1e-6, 0.1, 20.0]).view(3, 1, 1)
    weight[2] = 0.0
    system = ridge * torch.eye(8).double() + weight.mT.double() @ weight.double()
    inverse = ridge_inverse(weight, ridge)
    torch.testing.assert_close(inverse @ system, torch.eye(8).double().expand(3, -1, -1), rtol=0.0, atol=1e-8)
    weight[0, 0, 0] = torch.nan
    assert ridge_inverse(weight, ridge)[0].isnan().any()
    assert torch.equal(ridge_inverse(weight, ridge)[1:], inverse[1:])
