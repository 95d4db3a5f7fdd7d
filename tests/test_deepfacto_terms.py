"""What trains DeepFacto's backbone: the parts of its gradient, against autograd, differences and SciPy."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from test_deepfacto import BASE, SEEDS, problem, trained
from torch.testing import assert_close

from admm.nmf import matrix, nonnegative_least_squares
from admm.optimizers.deepfacto import factorisations
from scripts.benchmarks import deepfacto_terms
from scripts.benchmarks.deepfacto_terms import Following, by_backbone, by_features, lagrangian_of

OPTIONS = replace(BASE, dual_step=0.0, forward_mixing=1.0)
C = 1.5 * 0.7 / (1.5 + 0.7)
ALL = torch.arange(20).unsqueeze(0)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Projections to rounding."""
    exact = partial(nonnegative_least_squares, tolerance=1e-11)
    monkeypatch.setattr("admm.optimizers.deepfacto.nonnegative_least_squares", exact)


@pytest.fixture
def visit():
    """Eq. 9 after Z and S have moved, the scores before, the gradients by the features, and the network."""
    task = problem()
    state = trained(OPTIONS, task, SEEDS[:1])
    lagrangian = lagrangian_of(OPTIONS, task, state, ALL)
    projected = lagrangian.z[1][0].clone()
    gradients = by_features(OPTIONS, lagrangian, [0.1, 0.1, 0.1])
    return lagrangian, projected, gradients, task.blocks.export(state.theta, 0)


def by_parameters(value, network):
    gradients = torch.autograd.grad(value, list(network[0].parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def test_the_parts_of_the_gradient_by_the_backbone_are_those_of_autograd(visit):
    lagrangian, projected, gradients, network = visit
    features, z, basis = network[0](lagrangian.visit.x[0]), lagrangian.z, network[1].basis
    error = features - torch.einsum("cr,nrhw->nchw", basis, projected)
    expected = {
        "both": by_parameters(1.5 / 2 * (z[0][0] - features).square().sum(), network),
        "reconstruction": by_parameters(C / 2 * error.square().sum(), network),
    }
    expected["loss"] = expected["both"] - expected["reconstruction"]
    for part, gradient in expected.items():
        assert_close(by_backbone(lagrangian, gradients[part]), gradient)


def test_the_gradient_through_the_projection_is_that_of_differences(visit):
    lagrangian, _, gradients, network = visit
    features, basis = network[0](lagrangian.visit.x[0]).detach(), network[1].basis.numpy()
    direction = torch.rand(features.shape, generator=torch.Generator().manual_seed(0), dtype=features.dtype) - 0.5

    def loss(moved):
        columns = matrix(moved[None])[0].T.numpy()
        scores = np.stack([nnls(basis, column)[0] for column in columns]).reshape(20, 3, 3, 3)
        output = network[2](torch.tensor(scores).permute(0, 3, 1, 2))
        return float(lagrangian.loss.value(output.detach(), lagrangian.visit.y[0]).sum())

    step = 1e-6
    difference = (loss(features + step * direction) - loss(features - step * direction)) / (2 * step)
    assert float((gradients["through"][0] * direction).sum()) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize(("part", "weight"), [("both", None), ("loss", 0.0)])
def test_following_both_parts_or_the_loss_is_deepfacto(part, weight):
    task = problem()
    options = replace(OPTIONS, error_weight=weight)
    states = [trained(optimizer, task) for optimizer in (options, Following(**vars(OPTIONS), part=part))]
    assert_close(states[0].theta.flat(), states[1].theta.flat())


def test_the_optimum_of_the_generated_data_is_zero():
    options, task = deepfacto_terms.toy()
    state = options.init(task, [0])
    state.theta.fill(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    factorisations(task.blocks, state.theta)[2].copy_(torch.tensor([[0.0], [1.0]]))
    lagrangian = lagrangian_of(options, task, state, torch.arange(256).unsqueeze(0))
    assert float(lagrangian.value()) == pytest.approx(0.0, abs=1e-12)
