"""The hinge of Taylor et al.: value and gradient against its definition, prox against brute force."""

import pytest
import torch

from admm.losses import Hinge

GRID = torch.linspace(-6.0, 6.0, 24001, dtype=torch.float64)
POINTS = [-3.0, -0.2, 0.0, 0.3, 0.999, 1.0, 1.4, 4.0]


def definition(z: float, y: float) -> float:
    return max(1.0 - z, 0.0) if y == 1.0 else max(z, 0.0)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_value_and_gradient_are_the_definition_s(scale):
    loss, z = Hinge(scale), torch.tensor(POINTS, dtype=torch.float64)
    for y in (0.0, 1.0):
        targets = torch.full_like(z, y)
        expected = torch.tensor([definition(point, y) for point in POINTS], dtype=torch.float64)
        torch.testing.assert_close(loss.value(z[:, None], targets[:, None]), scale * expected)
        torch.testing.assert_close(loss.value(z, targets), scale * expected.sum())
        step = 1e-6
        slopes = [(definition(p + step, y) - definition(p - step, y)) / (2 * step) for p in POINTS]
        smooth = torch.tensor([p != y for p in POINTS])
        torch.testing.assert_close(loss.gradient(z, targets)[smooth], scale * torch.tensor(slopes).to(z)[smooth])
        assert (loss.gradient(z, targets)[~smooth] == 0).all()


@pytest.mark.parametrize("scale, penalty", [(1.0, 1.0), (0.4, 2.0), (3.0, 0.7), (1e-3, 1.0), (2.0, 20.0)])
def test_prox_is_the_lowest_point_of_a_grid(scale, penalty):
    loss, v = Hinge(scale), torch.tensor(POINTS, dtype=torch.float64)
    for y in (0.0, 1.0):
        found = loss.prox(v, torch.full_like(v, y), penalty)
        for point, z in zip(v, found, strict=True):
            objective = loss.value(GRID[:, None], torch.full_like(GRID, y)[:, None]) + penalty / 2 * (GRID - point) ** 2
            assert abs(GRID[objective.argmin()] - z) <= 5.1e-4


def test_prox_of_a_stack_with_its_own_penalties_leaves_its_arguments_alone():
    z = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    y = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1, 2]]
    before, penalties = z.clone(), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64).view(3, 1, 1)
    together = Hinge(2.0).prox(z, y, penalties)
    for s in range(3):
        assert torch.equal(together[s], Hinge(2.0).prox(z[s], y, penalties[s].item()))
    assert torch.equal(z, before)


def test_nan_stays_nan():
    assert Hinge().prox(torch.tensor([torch.nan, torch.nan]), torch.tensor([0.0, 1.0]), 1.0).isnan().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, "1"])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"^scale: "):
        Hinge(scale)
