"""The augmented Lagrangians of the block-wise algorithms, and how often these evaluate a block."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm.blocks import Block, flattened, split
from admm.checkpoints import restore, save
from admm.losses import CrossEntropy
from admm.models import initialiser
from admm.nmf import NMF
from admm.optimizers import BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.coupling import AugmentedLagrangian
from admm.optimizers.deepfacto import FactorisedLagrangian, factorisations
from admm.optimizers.gotmare import GluingTerms
from admm.optimizers.online_block_admm import ScalarDuals

SEEDS = (3, 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lagrangian_of(kind: type[AugmentedLagrangian], problem: Problem) -> AugmentedLagrangian:
    """At random variables."""
    theta, beta = problem.initial(SEEDS), torch.tensor([[0.5, 0.7], [2.0, 1.0], [1.3, 0.4]]).double()
    visit = problem.visit(SEEDS, slice(None))
    shapes = [output.shape for output in problem.blocks.outputs(theta, visit.x, visit)]
    z, u = ([gaussian(*shape, seed=seed + t) for t, shape in enumerate(shapes)] for seed in (1, 9))
    if kind is ScalarDuals:
        return ScalarDuals(problem, theta, beta, visit, z, list(gaussian(3, 2).abs()))
    if kind is FactorisedLagrangian:
        factors = factorisations(problem.blocks, theta)
        v = [before if t in factors else z[t - 1] for t, before in enumerate([visit.x, *z[:-1]], start=1)]
        u = [gaussian(*of_block.shape, seed=9 + t) for t, of_block in enumerate(v)]
        return FactorisedLagrangian(problem, theta, factors, beta, visit, z, u)
    return kind(problem, theta, beta, visit, z, () if kind is GluingTerms else u)


def factorised_problem() -> Problem:
    network = nn.Sequential(nn.Linear(6, 5), NMF(5, 3), nn.Linear(3, 3))
    blocks = split(network, after=["0", "1"])
    return Problem(gaussian(8, 6), torch.arange(8) % 3, blocks, CrossEntropy(0.7), initialiser("pytorch"))


def slope(lagrangian: AugmentedLagrangian, shift: Callable[[float], None], by: float = 1e-6) -> Tensor:
    """Central difference of the value, [S], along what `shift` adds."""
    values = []
    for change in (by, -2.0 * by):
        shift(change)
        values.append(lagrangian.value())
    shift(by)
    return (values[0] - values[1]) / (2.0 * by)


@pytest.mark.parametrize("kind", [AugmentedLagrangian, ScalarDuals, GluingTerms, FactorisedLagrangian])
def test_gradients_are_differences_of_the_value(kind: type, mlp_problem: Callable[..., Problem]) -> None:
    problem = factorised_problem() if kind is FactorisedLagrangian else mlp_problem(CrossEntropy(0.7))
    lagrangian = lagrangian_of(kind, problem)
    moving = {GluingTerms: (1, 2), FactorisedLagrangian: (3,)}.get(kind, (1, 2, 3))  # those by gradient steps
    for t in moving:
        direction = gaussian(*lagrangian.z[t - 1].shape, seed=30)
        expected = (lagrangian.z_gradient(t) * direction).flatten(1).sum(1)

        def shift_z(by: float, t: int = t, direction: Tensor = direction) -> None:
            lagrangian.set_z(t, lagrangian.z[t - 1] + by * direction)

        torch.testing.assert_close(slope(lagrangian, shift_z), expected, rtol=1e-6, atol=1e-6)
    theta, gradient = lagrangian.theta, problem.blocks.gradient()
    direction = gaussian(*theta.flat().shape, seed=31)
    trained = [1, 3] if kind is FactorisedLagrangian else [1, 2, 3]
    lagrangian.theta_gradient(gradient, trained)
    of_trained = flattened(problem.blocks.total(gradient, [t - 1 for t in trained]))
    expected = (of_trained * direction).sum(1) * len(problem.x)

    def shift_theta(by: float) -> None:
        theta.fill(theta.flat() + by * direction)
        lagrangian.forget_all()

    torch.testing.assert_close(slope(lagrangian, shift_theta), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [AugmentedLagrangian, ScalarDuals, GluingTerms])
def test_a_clipped_step_takes_up_a_tenth_of_the_next_residual_at_most(
    kind: type[AugmentedLagrangian], mlp_problem: Callable[..., Problem]
) -> None:
    """To first order, for each sample; a shorter step stays as it is."""
    lagrangian, step, clipped = lagrangian_of(kind, mlp_problem(CrossEntropy(0.7))), torch.tensor([0.1, 1.0]), []
    for t in (1,) if kind is GluingTerms else (1, 2):
        z, own = lagrangian.z[t - 1], lagrangian.coupling_gradient(t)
        residual = lagrangian.residual(t + 1) + (lagrangian.u[t] if kind is AugmentedLagrangian else 0.0)
        full, direction = (lagrangian.z_gradient(t, clip_for) - own for clip_for in (None, step))

        def moved(gradient: Tensor, by: float, t: int = t, z: Tensor = z) -> Tensor:
            lagrangian.set_z(t, z - by * step.double()[:, None, None] * gradient)
            return lagrangian.output(t + 1)

        change = (moved(full, 1e-5) - moved(full, -1e-5)) / 2e-5
        share = (change * residual).sum(2) / residual.square().sum(2)
        expected = full * torch.clamp(0.1 / share, max=1.0)[:, :, None]
        torch.testing.assert_close(direction, expected, rtol=1e-6, atol=1e-9)
        clipped.append(share > 0.1)
    assert 0.05 < torch.stack(clipped).double().mean() < 0.95


# With three blocks, the steps of Z evaluate each, and take a VJP through two; Θ needs two of them again, whose inputs
# have moved, and three VJPs; U needs all again, unless its step is 0. Where Z starts from a forward pass, this has
# evaluated them. Slices share nothing.
DEFAULTS = BlockADMM(1, 0.01, batch_size=24)
WITH_DUALS = replace(DEFAULTS, forward_mixing=0.0, dual_step=1.0)
ONLINE = OnlineBlockADMM(1, 0.01, batch_size=24)
EVALUATIONS = {
    "mini-batch": ({"linearize": 8, "vjp": 5}, WITH_DUALS),
    "without duals": ({"linearize": 5, "vjp": 5}, replace(WITH_DUALS, dual_step=0.0)),
    "with a forward pass": ({"forward": 2, "linearize": 5, "vjp": 5}, DEFAULTS),
    "two slices": ({"linearize": 15, "vjp": 7}, replace(WITH_DUALS, sweep="batch", slice_size=12)),
    "online": ({"linearize": 5, "vjp": 5}, ONLINE),
    "online with a dual": ({"linearize": 8, "vjp": 5}, replace(ONLINE, dual="paper")),
    "blockprop": ({"linearize": 5, "vjp": 5}, Gotmare(1, 0.01, batch_size=24)),
}


def counted(name: str, original: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        counts[name] += 1
        return original(*given, **named)

    return call


@pytest.mark.parametrize("case", EVALUATIONS)
def test_no_block_is_evaluated_more_often_than_needed(
    case: str, mlp_problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, optimizer = EVALUATIONS[case]
    problem, counts = mlp_problem(), Counter[str]()
    state = optimizer.init(problem, SEEDS)
    for name in ("forward", "linearize", "vjp"):
        monkeypatch.setattr(Block, name, counted(name, getattr(Block, name), counts))
    optimizer.step(problem, state)
    assert counts == expected


@pytest.mark.parametrize("name", ["lipschitz", "majorised"])
def test_a_resumed_z_update_goes_on_as_it_was(name: str, mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    for optimizer in (BlockADMM(4, 0.01, batch_size=8), OnlineBlockADMM(4, 0.01, batch_size=8)):
        options = replace(optimizer, z_update=ZUpdate(name), curvature_every=2)
        state, other = (options.init(problem, SEEDS) for _ in range(2))
        options.step(problem, state)
        restore(other, copy.deepcopy(save(state)))
        for one in (state, other):
            options.step(problem, one)
        assert torch.equal(state.theta.flat(), other.theta.flat())
        for a, b in zip(state.z_state.inverse_curvature, other.z_state.inverse_curvature, strict=True):
            assert torch.equal(a, b)
