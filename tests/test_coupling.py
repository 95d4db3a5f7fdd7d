"""The augmented Lagrangians of the block-wise algorithms, and how often these evaluate a block."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from admm.blocks import Block, flattened, split
from admm.checkpoints import restore, save
from admm.losses import CrossEntropy
from admm.models import initialiser
from admm.nmf import NMF
from admm.optimizers import BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.coupling import AugmentedLagrangian, coupling_values, penalties
from admm.optimizers.deepfacto import FactorisedLagrangian, factorisations
from admm.optimizers.gotmare import GluingTerms
from admm.optimizers.online_block_admm import ScalarDuals
from admm.schedules import block_schedules

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


@pytest.mark.parametrize("kind", [AugmentedLagrangian, GluingTerms])
def test_a_clipped_step_goes_two_fifths_of_the_way_to_the_minimum_at_most(kind: type[AugmentedLagrangian]) -> None:
    """Of the next block's coupling term, for each sample; a shorter step stays as it is."""
    network, factors = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), list[float]()
    blocks = split(network, per_layer=True)
    problem = Problem(gaussian(8, 6), torch.arange(8) % 3, blocks, CrossEntropy(), initialiser("pytorch"))
    lagrangian = lagrangian_of(kind, problem)
    for t in (1,) if kind is GluingTerms else (1, 2):
        own, residual = lagrangian.coupling_gradient(t), lagrangian.residual(t + 1)
        residual += lagrangian.u[t] if lagrangian.u else 0.0
        full, clipped = (own - lagrangian.z_gradient(t, clip_for) for clip_for in (None, torch.tensor([0.2, 2.0])))
        weight = lagrangian.theta.blocks[t][0]["weight"]
        for s, zeta in enumerate((0.2, 2.0)):
            for r, direction, shorter in zip(residual[s], full[s], clipped[s], strict=True):

                def term(part: float, r: Tensor = r, step: Tensor = zeta * weight[s] @ direction) -> float:
                    return float((r - part * step).square().sum())

                factors.append(min(1.0, 0.4 * minimize_scalar(term).x))
                torch.testing.assert_close(shorter, factors[-1] * direction, rtol=1e-6, atol=1e-9)
    assert 0.05 < sum(factor < 1.0 for factor in factors) / len(factors) < 0.95


@pytest.mark.parametrize("kind", [AugmentedLagrangian, ScalarDuals, GluingTerms])
def test_a_clipped_step_is_measured_where_it_leads(
    kind: type[AugmentedLagrangian], mlp_problem: Callable[..., Problem]
) -> None:
    """Across the kinks of ReLUs, and for terms that are not quadratic, by the slopes at both ends of the step."""
    lagrangian, step, factors = lagrangian_of(kind, mlp_problem(CrossEntropy(0.7))), torch.tensor([0.1, 1.0]), []
    for t in (1,) if kind is GluingTerms else (1, 2):
        z, own = lagrangian.z[t - 1], lagrangian.coupling_gradient(t)
        full, direction = (lagrangian.z_gradient(t, clip_for) - own for clip_for in (None, step))
        change, ends = -step.double()[:, None, None] * full, []
        for moved in (z, z + change):
            lagrangian.set_z(t, moved)
            ends.append((lagrangian.output(t + 1), lagrangian.coupling_gradient(t + 1)))
        (output, slope), (later, flatter) = ends
        bend = ((slope - flatter) * (later - output)).sum(2)
        factors.append((-0.4 * (full * change).sum(2) / bend.clamp_min(1e-300)).clamp(max=1.0))
        torch.testing.assert_close(direction, full * factors[-1][:, :, None], rtol=1e-6, atol=1e-9)
    assert 0.05 < (torch.stack(factors) < 1.0).double().mean() < 0.95


class Gate(nn.Module):
    """The mask that crosses the cut behind `masked` depends on coupling variables."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.masked = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        mask = x > 0
        output: Tensor = self.last(self.masked(x) * mask)
        return output


def test_what_is_carried_across_a_cut_is_not_that_of_a_tentative_step() -> None:
    blocks = split(Gate(), after=["first", "masked"])
    problem = Problem(gaussian(8, 6), torch.arange(8) % 3, blocks, CrossEntropy(), initialiser("pytorch"))
    lagrangian = lagrangian_of(AugmentedLagrangian, problem)
    lagrangian.output(2)
    before = copy.deepcopy(lagrangian.visit.carried)
    lagrangian.z_gradient(1, clip_for=10.0)
    for (_, (mask,)), (_, (kept,)) in zip(lagrangian.visit.carried[2], before[2], strict=True):
        assert torch.equal(mask, kept)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_a_clipped_step_does_not_leave_the_domain_of_the_next_block() -> None:
    """A sample whose step would lead to negative numbers under a logarithm stays; the others move."""
    blocks = split(nn.Sequential(nn.Linear(6, 5), nn.Softplus(), Log(), nn.Linear(5, 3)), after=["1", "2"])
    problem = Problem(gaussian(8, 6), torch.arange(8) % 3, blocks, CrossEntropy(), initialiser("pytorch"))
    lagrangian = lagrangian_of(AugmentedLagrangian, problem)
    lagrangian.set_z(1, lagrangian.z[0].exp())
    own = lagrangian.coupling_gradient(1)
    full, clipped = (own - lagrangian.z_gradient(1, clip_for) for clip_for in (None, 0.3))
    leaves = (lagrangian.z[0] + 0.3 * full < 0).any(2)
    assert 0 < leaves.sum() < leaves.numel()
    assert torch.equal((clipped == 0).all(2), leaves)


# With three blocks, the steps of Z evaluate each, and take a VJP through two; Θ needs two of them again, whose inputs
# have moved, and three VJPs; U needs all again, unless its step is 0. Where Z starts from a forward pass, this has
# evaluated them. To clip a step is one forward pass more. Slices share nothing.
DEFAULTS = BlockADMM(1, 0.01, batch_size=24)
WITH_DUALS = replace(DEFAULTS, forward_mixing=0.0, dual_step=1.0)
ONLINE = OnlineBlockADMM(1, 0.01, batch_size=24)
EVALUATIONS = {
    "mini-batch": ({"forward": 2, "linearize": 8, "vjp": 5}, WITH_DUALS),
    "without duals": ({"forward": 2, "linearize": 5, "vjp": 5}, replace(WITH_DUALS, dual_step=0.0)),
    "with a forward pass": ({"forward": 4, "linearize": 5, "vjp": 5}, DEFAULTS),
    "two slices": ({"forward": 4, "linearize": 15, "vjp": 7}, replace(WITH_DUALS, sweep="batch", slice_size=12)),
    "online": ({"forward": 2, "linearize": 5, "vjp": 5}, ONLINE),
    "online with a dual": ({"forward": 2, "linearize": 8, "vjp": 5}, replace(ONLINE, dual="paper")),
    "blockprop": ({"forward": 1, "linearize": 5, "vjp": 5}, Gotmare(1, 0.01, batch_size=24)),
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


VALUES = {
    "neither": (None, None, [0.1 / 2500, 0.1 / 50, 0.1], [25000.0, 500.0, 10.0]),
    "one ζ": (0.2, None, [0.2, 0.2, 0.2], [5.0, 0.1, 0.1]),
    "one β": (None, 2.0, [0.01, 0.01, 0.1], [2.0, 2.0, 2.0]),
    "ζ of each replica": ([0.2, 0.4], None, [[0.2, 0.4]] * 3, [[5.0, 2.5], [0.1, 0.05], [0.1, 0.05]]),
    "a schedule of ζ": ({"start": 0.2, "end": 0.0}, None, [0.2, 0.2, 0.2], [5.0, 0.1, 0.1]),
    "β of each block": (None, {"blocks": [1.0, [0.5, 1.0], 2.0]}, [[0.04, 0.02], 0.01, 0.1], [1.0, [0.5, 1.0], 2.0]),
    "both": (0.3, 7.0, [0.3, 0.3, 0.3], [7.0, 7.0, 7.0]),
}


@pytest.mark.parametrize(("z_step", "beta", "steps", "weights"), VALUES.values(), ids=VALUES)
def test_a_step_of_z_or_a_penalty_that_is_not_given_turns_a_fiftieth_of_the_next_residual(z_step, beta, steps, weights):
    found, of_blocks = coupling_values(z_step, beta, 3, 2, last=0.1, by_block=True)
    starts = [at.start for at in block_schedules("z_step", found, 3, 2)]
    for start, expected in zip(starts, steps, strict=True):
        found_of_each = torch.as_tensor(start, dtype=torch.float64).expand(2)
        torch.testing.assert_close(found_of_each, torch.tensor(expected, dtype=torch.float64).expand(2))
    like = torch.zeros((), dtype=torch.float64)
    expected = torch.stack([torch.tensor(weight, dtype=torch.float64).expand(2) for weight in weights])
    torch.testing.assert_close(penalties(of_blocks, 3, 2, like), expected)


def test_a_penalty_is_not_found_from_a_step_of_z_that_is_zero():
    with pytest.raises(
        ValueError, match=r"^rho: is None, but z_step starts at 0, from which it cannot be found; give it$"
    ):
        coupling_values({"blocks": [0.0, 1.0]}, None, 2, 1, last=0.01, by_block=True, name="rho")


@pytest.mark.parametrize("kind", [OnlineBlockADMM, BlockADMM, Gotmare])
@pytest.mark.parametrize("given", [0.0, 1e-60, 1e60])
def test_a_penalty_that_is_zero_or_lost_in_the_type_is_refused(kind, given):
    """Also where a step of Z is to be found from it."""
    name, x = "rho" if kind is Gotmare else "beta", torch.zeros(4, 2)
    blocks = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), per_layer=True)
    problem = Problem(x, torch.zeros(4, dtype=torch.int64), blocks, CrossEntropy(), initialiser("pytorch"))
    told = f"^{name}: 0.0 is not positive$" if given == 0.0 else f"^{name}: 1e[+-]60, for 3 blocks, is beyond float32; "
    with pytest.raises(ValueError, match=told):
        kind(1, 0.1, batch_size=4, **{name: given}).init(problem, [0])


@pytest.mark.parametrize("other", [{"forward_mixing": 0.5}, {"dual_step": 0.5}, {"forward_mixing": 1.0}])
def test_values_that_follow_from_options_of_a_replica_are_those_of_its_run_alone(other, mlp_problem):
    """In a stack in which the visits of one replica start anew, and those of the other do not."""
    problem, (name,) = mlp_problem(CrossEntropy()), other

    def trained(seeds, value):
        optimizer = BlockADMM(1, 0.1, batch_size=4, **{name: value})
        return optimizer.step(problem, optimizer.init(problem, seeds)).theta.flat()

    values = [getattr(BlockADMM(1, 0.1), name), other[name]]
    stack = trained(SEEDS, values)
    for s, value in enumerate(values):
        assert torch.equal(stack[s], trained(SEEDS[s : s + 1], value)[0])
