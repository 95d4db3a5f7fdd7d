"""What the algorithms for fully connected networks share."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from admm.blocks import split
from admm.losses import SquaredError
from admm.models import initialiser, mlp
from admm.optimizers import BCD, DLADMM, Problem, StandardADMM, Taylor
from admm.optimizers.fully_connected import relu_prox_, sample_initial_values
from scripts.literal import bcd as literal

numbers = st.floats(-4.0, 4.0, width=32)


def prox(p, q, ratio):
    result, other = p.clone(), q.clone()
    relu_prox_(result, other, ratio, torch.empty_like(p), torch.empty_like(p))
    assert torch.equal(other, q)
    return result


@given(p=numbers, q=numbers, ratio=st.floats(0.01, 100.0))
def test_the_relu_s_prox_is_the_lowest_point_of_a_grid(p, q, ratio):
    grid = torch.linspace(-5.0, 5.0, 2001, dtype=torch.float64)

    def value(z):
        return 0.5 * (z - p) ** 2 + ratio / 2 * (q - z.relu()) ** 2

    lowest = value(grid).min()
    found = value(prox(*(torch.tensor([v], dtype=torch.float64) for v in (p, q)), ratio))
    assert lowest - (1 + ratio) * 0.005**2 <= found <= lowest + 1e-12


@pytest.mark.parametrize("ratio", [1.0 / 6.0, 0.3 / 2.1, 1.0, 2.5])
def test_the_relu_s_prox_is_the_better_of_two_half_lines(ratio):
    p, q = (0.1 * t.flatten() for t in torch.meshgrid(*[torch.arange(-31.0, 32.0).double()] * 2, indexing="ij"))
    torch.testing.assert_close(prox(p, q, ratio), literal.relu_minimiser(p, q, ratio), rtol=1e-12, atol=1e-12)


def test_the_relu_s_prox_takes_a_ratio_for_each_replica():
    p, q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    ratios = torch.tensor([0.1, 1.0, 10.0])
    together = prox(p, q, ratios.view(3, 1, 1))
    for s, ratio in enumerate(ratios.tolist()):
        torch.testing.assert_close(together[s], prox(p[s], q[s], ratio))


@pytest.mark.parametrize("distribution, mean, deviation", [("normal", 0.0, 1.0), ("uniform", 0.5, 12**-0.5)])
def test_draws_have_the_spread_of_their_replica_and_follow_from_seed_and_name(distribution, mean, deviation):
    def drawn(name, seeds, spread):
        variables = [torch.empty(len(seeds), 100, 200) for _ in range(2)]
        sample_initial_values(name, variables, seeds, torch.tensor(spread), distribution)
        return variables

    both = drawn("weight", (3, 4), (1.0, 10.0))
    for s, spread in enumerate((1.0, 10.0)):
        assert abs(float(both[0][s].mean()) / spread - mean) < 0.03
        assert abs(float(both[0][s].std()) / spread - deviation) < 0.02
        alone = drawn("weight", (3 + s,), (spread,))
        assert all(torch.equal(a[0], b[s]) for a, b in zip(alone, both, strict=True))
    assert not torch.equal(both[0][0], both[1][0])
    assert not torch.equal(both[0][0], drawn("bias", (3,), (1.0,))[0][0])


@pytest.mark.parametrize("optimizer", [StandardADMM(), Taylor(), DLADMM(), BCD()], ids=lambda made: type(made).__name__)
def test_a_hook_that_would_not_be_called_is_named(optimizer):
    network = mlp(4, [3], 2)
    network.fc1.linear.register_forward_hook(lambda module, inputs, output: output / 2)
    problem = Problem(
        torch.randn(6, 4), torch.arange(6) % 2, split(network, per_layer=True), SquaredError(), initialiser("pytorch")
    )
    with pytest.raises(ValueError, match=r"network: \w+ would not call the hooks of layer 'fc1.linear'; remove them"):
        optimizer.init(problem, [0])


class Shifted(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1.0


def shared() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    network[2].weight = network[0].weight
    return network


def frozen() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "network, message",
    [
        (Shifted(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), "an nn.Sequential of .*, not a Shifted"),
        (frozen(), "trains all parameters, but '0.weight' has requires_grad=False"),
        (shared(), "does not support layers that share parameters"),
    ],
)
@pytest.mark.parametrize("optimizer", [StandardADMM(), Taylor(), DLADMM(), BCD()], ids=lambda made: type(made).__name__)
def test_networks_that_would_not_be_trained_as_they_are_are_refused(optimizer, network, message):
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    task = Problem(x, y, split(network, after=[]), SquaredError(), initialiser("pytorch"))
    with pytest.raises(ValueError, match=message):
        optimizer.init(task, [0])


@pytest.mark.parametrize(
    ("optimizer", "penalties", "variables"),
    [
        (BCD(), {"alpha": 0.5, "rho": 2.0}, ("bias", "u", "v")),
        (StandardADMM(spread=1.0), {"weight_decay": 3.0, "beta": 2.0}, ("bias", "z", "a", "u", "v")),
        (Taylor(warm_start=0), {"weight_decay": 3.0, "beta": 2.0}, ("z", "a", "multiplier")),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_state_goes_on_by_today_s_penalties_and_samples(optimizer, penalties, variables, shift, mlp_problem):
    """As a state does that begins with its variables: nothing that follows from penalties and samples is kept in it."""
    problem, changed = mlp_problem(), replace(optimizer, **penalties)
    state = optimizer.step(problem, optimizer.init(problem, seeds=[5, 0]))
    other = replace(problem, x=problem.x + shift)
    layers = [layer for block in state.theta.blocks for layer in block if layer]
    of_theta = {name: [layer[name] for layer in layers] for name in ("weight", "bias")}
    values = {name: of_theta.get(name) or getattr(state, name) for name in ("weight", *variables)}
    start = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    begun = changed.init(other, seeds=[5, 0], start=start)
    for each in (state, begun):
        changed.step(other, each)
    torch.testing.assert_close(state.theta.flat(), begun.theta.flat(), rtol=1e-12, atol=1e-12)
