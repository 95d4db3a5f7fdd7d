"""Online Block-ADMM against the literal Algorithm 2 (`scripts.literal`)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from references import clipped, loss_sum, statistics_kept, torch_rule
from torch import Tensor, nn

from admm.blocks import split
from admm.layers import Execution
from admm.losses import CrossEntropy, SquaredError
from admm.minibatches import minibatches
from admm.models import initialiser
from admm.optimizers import SGD, Adam, OnlineBlockADMM, Problem, ZUpdate
from scripts.literal.online_block_admm import Algorithm2

SEEDS = (3, 1, 7)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
SHARP = CrossEntropy(0.7, tolerance=1e-13)


class Reference(Algorithm2):
    """The literal Algorithm 2 with our options, for one seed."""

    def __init__(self, problem: Problem, options: OnlineBlockADMM, seed: int) -> None:
        self.problem, self.options, self.seed, self.epoch = problem, options, seed, 0
        self.network = problem.blocks.export(problem.initial([seed])).train()
        modules = dict(self.network.named_modules())
        block = [nn.Sequential(*(modules[name] for name in names)) for names in problem.blocks.names]
        rule = torch_rule(options.theta_update, self.network.parameters())
        super().__init__(block, partial(loss_sum, problem.loss), [options.beta] * len(block), rule)

    def forward(self, x: Tensor) -> list[Tensor]:
        with statistics_kept(self.network):
            return super().forward(x)

    def coupling(self, t: int, z: Sequence[Tensor]) -> Tensor:
        if self.options.dual == "none":
            return self.beta[t - 1] / 2 * ((z[t] - self.block[t - 1](z[t - 1])) ** 2).sum()
        return super().coupling(t, z)

    def update_z(self, z: list[Tensor], y: Tensor, zeta: Sequence[float]) -> None:
        options = self.options.z_update
        self.y, self.leaves = y, [v.clone() for v in z]
        self.adam = [torch.optim.Adam([v], 1.0, (options.beta1, options.beta2), options.epsilon) for v in self.leaves]
        self.weights = [[m.weight.detach() for m in block if isinstance(m, nn.Linear)] for block in self.block]
        with statistics_kept(self.network):
            for _ in range(options.steps):
                super().update_z(z, y, zeta)

    def descend(self, t: int, z: list[Tensor], gradient: Tensor, zeta: float) -> None:
        options, loss, beta = self.options.z_update, self.problem.loss, self.options.beta
        if t == self.T and options.output_update == "prox":
            assert isinstance(loss, SquaredError) and self.options.dual == "none"
            v = self.block[-1](z[-2]).detach()
            z[-1] = (loss.scale * self.y + beta * v) / (loss.scale + beta)
        elif options.name == "adam":
            self.adam[t].param_groups[0]["lr"] = zeta
            self.leaves[t].grad = gradient
            self.adam[t].step()
            z[t] = self.leaves[t].clone()
        else:
            if options.name == "majorised" and t < self.T:
                hessian = torch.eye(z[t].shape[1]).double() + self.weights[t][0].T @ self.weights[t][0]
                gradient = torch.linalg.solve(hessian, gradient.T).T / beta
            elif options.name == "clipped" and t < self.T:
                gradient = clipped(beta * self.residual(t, z), gradient, z[t], self.block[t], beta, zeta)
            super().descend(t, z, gradient, zeta)

    def residual(self, t: int, z: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            residual: Tensor = z[t] - self.block[t - 1](z[t - 1])
        return residual

    def update_u(self, z: Sequence[Tensor]) -> None:
        if self.options.dual == "decay":
            self.u = [self.options.dual_decay * u for u in self.u]
        if self.options.dual != "none":
            with statistics_kept(self.network):
                super().update_u(z)

    def step(self) -> None:
        options, problem = self.options, self.problem
        if options.dual == "reset":
            self.u = [0.0] * self.T
        batches = minibatches(len(problem.x), options.batch_size, [self.seed], self.epoch, problem.x.device)
        for number, (i,) in enumerate(batches):
            decay = (1 + math.cos(math.pi * (self.epoch + number / len(batches)) / options.iterations)) / 2
            zeta, eta = options.z_step["start"] * decay, options.theta_step["start"] * decay
            self.visit(problem.x[i], problem.y[i], [zeta] * self.T, eta)
        self.epoch += 1


GRADIENT, ADAM = ZUpdate("gradient", 3, "step"), ZUpdate("adam", 3, "step", beta1=0.8, epsilon=1e-3)
BASE = OnlineBlockADMM(
    4,
    {"start": 0.05, "end": 0.0},
    {"start": 0.1, "end": 0.0},
    beta=0.8,
    batch_size=7,
    z_update=GRADIENT,
    theta_update=SGD(),
    dual="none",
)
VARIANTS = {
    "no dual": BASE,
    "no dual, clipped": replace(BASE, z_update=ZUpdate("clipped", 2)),
    "no dual, prox": replace(BASE, z_update=ZUpdate("gradient", 2, output_update="prox")),
    "no dual, adam": replace(
        BASE, z_update=ADAM, theta_update=Adam(weight_decay=0.3), theta_step={"start": 0.01, "end": 0.0}
    ),
    "no dual, majorised": replace(
        BASE, z_update=ZUpdate("majorised", 3, output_update="prox"), z_step={"start": 1.0, "end": 0.0}
    ),
    "paper": replace(BASE, dual="paper"),
    "paper, adam": replace(
        BASE, dual="paper", z_update=ADAM, theta_update=Adam(), theta_step={"start": 0.01, "end": 0.0}
    ),
    "reset": replace(BASE, dual="reset"),
    "decay": replace(BASE, dual="decay", dual_decay=0.5),
    "decay, momentum": replace(BASE, dual="decay", theta_update=SGD(momentum=0.8, weight_decay=0.1)),
}


def run(problem: Problem, options: OnlineBlockADMM, epochs: int) -> None:
    """Compares every replica with its reference after each epoch."""
    state, references = options.init(problem, SEEDS), [Reference(problem, options, seed) for seed in SEEDS]
    for _ in range(epochs):
        options.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            expected = problem.blocks.flatten(reference.network)
            torch.testing.assert_close(state.theta.flat()[s], expected, **CLOSE)
            statistics = problem.blocks.flatten(reference.network, "buffers")
            torch.testing.assert_close(state.theta.buffers[s], statistics, **CLOSE, check_dtype=False)
            torch.testing.assert_close(state.u[:, s], torch.tensor(reference.u, dtype=torch.float64), **CLOSE)
    assert bool(state.u.any()) == (options.dual != "none")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_algorithm_2(mlp_problem, variant):
    run(mlp_problem(SquaredError(0.6)), VARIANTS[variant], 3)


@pytest.mark.parametrize("variant", ["no dual", "paper", "paper, adam"])
def test_it_is_algorithm_2_for_cross_entropy(mlp_problem, variant):
    run(mlp_problem(SHARP), VARIANTS[variant], 2)


@pytest.mark.parametrize("cut", [{"n_blocks": 1}, {"n_blocks": 2}, {"per_layer": True, "activation": "start"}], ids=str)
@pytest.mark.parametrize("variant", ["no dual, adam", "decay"])
def test_it_is_algorithm_2_however_the_network_is_cut(mlp_problem, variant, cut):
    run(mlp_problem(SquaredError(0.6), **cut), VARIANTS[variant], 2)


@pytest.mark.parametrize("variant", ["no dual, prox", "no dual, adam", "paper", "decay"])
def test_it_is_algorithm_2_for_images_between_blocks(conv_problem, variant):
    run(conv_problem(), VARIANTS[variant], 2)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("variant, after", [("no dual, adam", "conv3_x"), ("paper", ["conv1", "conv3_x", "conv4_x"])])
def test_it_is_algorithm_2_for_a_resnet_running_statistics_included(resnet_problem, variant, after, recompute):
    problem = resnet_problem(SquaredError(0.6), Execution(recompute=recompute), after=after)
    run(problem, replace(VARIANTS[variant], batch_size=6, theta_step={"start": 0.002, "end": 0.0}), 2)


@pytest.mark.parametrize("dual", ["paper", "reset", "decay"])
def test_the_first_step_where_every_norm_is_zero_is_finite(mlp_problem, dual):
    problem = mlp_problem()
    options = replace(BASE, dual=dual, batch_size=24, z_update=ZUpdate("gradient", 1, "step"))
    state = options.init(problem, SEEDS)
    before = state.theta.flat().clone()
    for _ in range(3):
        options.step(problem, state)
    assert state.theta.flat().isfinite().all() and state.u.isfinite().all()
    assert not torch.equal(state.theta.flat(), before)


def test_a_printed_dual_only_grows(mlp_problem):
    problem, options = mlp_problem(), replace(BASE, dual="paper")
    state = options.init(problem, SEEDS)
    history = [options.step(problem, state).u.clone() for _ in range(4)]
    assert all((later > earlier).all() for earlier, later in pairwise(history))


def test_reset_begins_each_epoch_at_zero(mlp_problem):
    problem = mlp_problem()
    options = replace(BASE, dual="reset", theta_step=0.0, z_step=0.1, batch_size=24)
    state = options.init(problem, SEEDS)
    first = options.step(problem, state).u.clone()
    torch.testing.assert_close(options.step(problem, state).u, first, rtol=1e-10, atol=1e-12)


def test_curvature_is_evaluated_every_so_many_mini_batches(mlp_problem, monkeypatch):
    calls, original = [], ZUpdate.update_curvature
    monkeypatch.setattr(ZUpdate, "update_curvature", lambda *a: calls.append(1) or original(*a))
    problem = mlp_problem()
    options = replace(
        BASE, z_update=ZUpdate("lipschitz", output_update="prox"), curvature_every=3, batch_size=3
    )  # 8 mini-batches
    options.step(problem, options.init(problem, SEEDS))
    assert len(calls) == 3


def test_a_coupling_variable_may_be_one_number_per_sample():
    x, y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    layers = [nn.Linear(6, 1), nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3)]  # [n, 1], [n], [n, 1]
    optimizer, found = OnlineBlockADMM(2, 0.1, z_step=1.0, batch_size=4, dual="paper"), []
    for after in ("0", "1"):
        problem = Problem(x, y, split(nn.Sequential(*layers), after=after), CrossEntropy(), initialiser("pytorch"))
        state = optimizer.init(problem, SEEDS)
        for _ in range(2):
            optimizer.step(problem, state)
        found.append(state.theta.flat())
    torch.testing.assert_close(*found)


def test_diagnostics_are_the_duals_and_spectral_norms(mlp_problem):
    problem = mlp_problem()
    for dual, names in (("none", set()), ("paper", {"dual_1", "dual_2", "dual_3"})):
        options = replace(BASE, dual=dual)
        state = options.step(problem, options.init(problem, SEEDS))
        values = options.diagnostics(problem, state)
        assert set(values) == names | {"sigma_1", "sigma_2", "sigma_3", "loss_forward", "loss_moved"}
        assert all(torch.equal(values[name], state.u[int(name[-1]) - 1]) for name in names)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dual": "vector"}, "dual: 'vector' is not one of paper, reset, decay, none"),
        ({"batch_size": 0}, "batch_size: 0 is"),
        ({"curvature_every": 0}, "curvature_every: 0 is"),
        ({"dual": "paper", "z_update": ZUpdate("gradient", output_update="prox")}, "output_update='step'"),
        (
            {"dual": "reset", "z_update": ZUpdate("lipschitz", 1, "step")},
            "name 'adam', 'gradient' or 'clipped'",
        ),
        (
            {"dual": "decay", "z_update": ZUpdate("majorised", 1, "step")},
            "dual: 'decay' is not quadratic",
        ),
        ({"theta_step": (0.1, 0.2)}, "theta_step: 2 values for 3 replicas"),
        ({"z_step": {"start": 0.1}}, "z_step: a schedule is"),
        ({"beta": (1.0, 1.0)}, "beta: 2 values for 3 replicas"),
        ({"beta": {"start": 1.0, "end": 2.0}}, "beta"),
        ({"beta": 0.0}, "beta"),
        ({"beta": (1.0, 1.0, -1.0)}, "beta"),
    ],
)
def test_a_wrong_option_is_refused_by_name(mlp_problem, options, message):
    with pytest.raises(ValueError) as error:
        replace(BASE, **options).init(mlp_problem(), SEEDS)
    assert message in str(error.value)
