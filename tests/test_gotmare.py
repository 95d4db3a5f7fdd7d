"""BlockProp against a literal loop with autograd and `torch.optim`."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from references import clipped, loss_sum, statistics_kept, torch_rule
from torch import Tensor, nn

from admm.losses import CrossEntropy, SquaredError
from admm.minibatches import minibatches
from admm.optimizers import SGD, Adam, Problem
from admm.optimizers.gotmare import Gotmare

SEEDS = (3, 1, 7)
BASE = Gotmare(
    4,
    {"start": 0.05, "end": 0.0},
    {"start": 0.4, "end": 0.1},
    rho=0.8,
    batch_size=7,
    z_update=SGD(),
    theta_update=SGD(),
)
VARIANTS = {
    "gradient": BASE,
    "three rounds": replace(BASE, z_rounds=3),
    "clipped": replace(BASE, z_update="clipped", z_rounds=2),
    "adam": replace(BASE, theta_update=Adam(weight_decay=0.3), theta_step={"start": 0.01, "end": 0.0}, z_rounds=2),
    "adam on z": replace(BASE, z_update=Adam(0.8, 0.99, 1e-3), z_rounds=3, theta_update=SGD(momentum=0.8)),
    "a step for each z": replace(BASE, z_step={"blocks": [0.3, 0.6]}, z_rounds=2),
}
PROBLEMS = {
    "per layer": ("mlp_problem", {"per_layer": True, "activation": "start"}),
    "three blocks": ("mlp_problem", {"after": ["fc1.linear", "fc2.relu"]}),
}


def at(value: Any, progress: float) -> float:
    if not isinstance(value, dict):
        return value
    return value["end"] + (value["start"] - value["end"]) * (1 + math.cos(math.pi * progress)) / 2


class Reference:
    """One replica; every gradient is autograd's of the sum of all terms."""

    def __init__(self, problem: Problem, options: Gotmare, seed: int) -> None:
        self.problem, self.options, self.seed, self.epoch = problem, options, seed, 0
        self.network = problem.blocks.export(problem.initial([seed])).train()
        modules = dict(self.network.named_modules())
        self.blocks = [nn.Sequential(*(modules[name] for name in names)) for names in problem.blocks.names]
        self.rules = [torch_rule(options.theta_update, list(block.parameters())) for block in self.blocks]

    def own_term(self, t: int, z: list[Tensor], y: Tensor) -> Tensor:
        """Of block t, with z[0] = x."""
        output = self.blocks[t - 1](z[t - 1])
        if t == len(self.blocks):
            return loss_sum(self.problem.loss, output, y)
        return self.options.rho / 2 * ((z[t] - output) ** 2).sum()

    def update_z(self, z: list[Tensor], y: Tensor, progress: float) -> None:
        options = self.options
        for v in z[1:]:
            v.requires_grad_()
        is_clipped = options.z_update == "clipped"
        rules = [torch_rule(SGD() if is_clipped else options.z_update, [v]) for v in z[1:]]
        for _ in range(options.z_rounds):
            for t in range(len(self.blocks) - 1, 0, -1):
                steps = options.z_step["blocks"][t - 1] if "blocks" in options.z_step else options.z_step
                zeta = at(steps, progress)
                (z[t].grad,) = torch.autograd.grad(self.own_term(t, z, y) + self.own_term(t + 1, z, y), z[t])
                if is_clipped and t + 1 < len(self.blocks):
                    own, moving = options.rho * (z[t] - self.blocks[t - 1](z[t - 1])).detach(), z[t].detach()
                    z[t].grad = clipped(own, z[t].grad, moving, self.blocks[t], options.rho, zeta)
                rules[t - 1].param_groups[0]["lr"] = zeta
                rules[t - 1].step()

    def step(self) -> None:
        options, problem = self.options, self.problem
        batches = minibatches(len(problem.x), options.batch_size, [self.seed], self.epoch, problem.x.device)
        for number, batch in enumerate(batches):
            progress = (self.epoch + number / len(batches)) / options.iterations
            z, y = [problem.x[batch[0]]], problem.y[batch[0]]
            with statistics_kept(self.network):
                for block in self.blocks[:-1]:
                    z.append(block(z[-1]).detach())
                self.update_z(z, y, progress)
            z = [v.detach() for v in z]
            for t, rule in enumerate(self.rules, start=1):
                rule.param_groups[0]["lr"] = at(options.theta_step, progress)
                rule.zero_grad()
                (self.own_term(t, z, y) / len(y)).backward()
                rule.step()
        self.epoch += 1


def compare(problem: Problem, options: Gotmare, epochs: int) -> None:
    state, references = options.init(problem, SEEDS), [Reference(problem, options, seed) for seed in SEEDS]
    start = state.theta.flat().clone()
    for _ in range(epochs):
        options.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            expected = problem.blocks.flatten(reference.network)
            torch.testing.assert_close(state.theta.flat()[s], expected, rtol=1e-8, atol=1e-9)
            statistics = problem.blocks.flatten(reference.network, "buffers")
            torch.testing.assert_close(state.theta.buffers[s], statistics, rtol=1e-8, atol=1e-9, check_dtype=False)
    assert (state.theta.flat() != start).double().mean() > 0.5


@pytest.mark.parametrize("after", ["conv3_x", ["conv1", "conv3_x", "conv4_x"]], ids=str)
def test_it_is_blockprop_for_a_resnet_running_statistics_included(resnet_problem, after):
    options = replace(VARIANTS["adam"], batch_size=6, theta_step={"start": 0.002, "end": 0.0})
    compare(resnet_problem(after=after), options, 2)


def trained(options: Gotmare, problem: Problem, seeds: tuple[int, ...], steps: int) -> Any:
    state = options.init(problem, seeds)
    for _ in range(steps):
        options.step(problem, state)
    return state


@pytest.mark.parametrize("loss", [SquaredError(0.6), CrossEntropy(0.7)], ids=str)
@pytest.mark.parametrize("cut", PROBLEMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_literal_loop(variant, cut, loss, request):
    name, keywords = PROBLEMS[cut]
    compare(request.getfixturevalue(name)(loss, **keywords), VARIANTS[variant], 3)


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=str)
@pytest.mark.parametrize("variant", ["three rounds", "adam", "adam on z"])
def test_it_is_the_literal_loop_on_convolutions(variant, loss, conv_problem):
    compare(conv_problem(loss), replace(VARIANTS[variant], batch_size=4), 3)


def test_one_block_is_back_propagation(mlp_problem):
    compare(mlp_problem(CrossEntropy(), n_blocks=1), VARIANTS["adam"], 3)


def test_a_tiny_step_of_z_makes_the_step_of_theta_the_gradient(mlp_problem):
    """For ζ → 0 and as many rounds as needed to reach block 1, ρ (z_1 − block_1(x)) = −ζ ρ ∂J/∂z_1."""
    problem, zeta = mlp_problem(SquaredError(), per_layer=True), 1e-5
    options = replace(BASE, batch_size=24, z_step=zeta, rho=1.0, theta_step=1.0)
    state = options.init(problem, (3,))
    network = problem.blocks.export(state.theta)
    before = state.theta.flat().clone()
    options.step(problem, state)
    (loss_sum(problem.loss, network(problem.x), problem.y) / 24).backward()
    gradients = [p.grad.flatten() for p in network.parameters()]
    moved = (before - state.theta.flat())[0].split([g.numel() for g in gradients])
    for number, (step, gradient) in enumerate(zip(moved, gradients, strict=True)):
        scale = zeta ** (2 - number // 2)  # the residual of block t < T carries ρ ζ for each gluing variable above it
        torch.testing.assert_close(step / scale, gradient, rtol=1e-2, atol=1e-3)


def assert_replica(state: Any, s: int, other: Any) -> None:
    for a, b in zip([state.theta.flat(), *state.moments], [other.theta.flat(), *other.moments], strict=True):
        torch.testing.assert_close(a[s], b[0], rtol=1e-10, atol=1e-10)


def test_it_learns(mlp_problem):
    problem = mlp_problem(CrossEntropy(), per_layer=True, activation="start")
    options = Gotmare(40, {"start": 0.02, "end": 0.0}, 0.5, batch_size=8)
    state = trained(options, problem, SEEDS, 40)
    outputs = problem.blocks.forward(state.theta, problem.x.expand(3, *problem.x.shape))
    assert ((outputs.argmax(2) == problem.y.argmax(1)).double().mean(1) > 0.9).all()
    assert set(options.diagnostics(problem, state)) == {"sigma_1", "sigma_2", "sigma_3", "loss_forward", "loss_moved"}


def test_it_goes_on_from_given_parameters(mlp_problem):
    problem = mlp_problem()
    given = trained(VARIANTS["adam"], problem, SEEDS, 2).theta.flat().clone()
    state = VARIANTS["adam"].init(problem, (1, 1, 1), {"theta": [given]})
    assert torch.equal(state.theta.flat(), given) and state.iteration == 0
    with pytest.raises(ValueError, match=r"start: no variable \['z'\]"):
        VARIANTS["adam"].init(problem, SEEDS, {"z": []})


def test_it_refuses_wrong_values(mlp_problem):
    for key, value in {"rho": 0.0, "z_rounds": 0, "batch_size": 100, "z_step": {"blocks": [1.0] * 3}}.items():
        with pytest.raises(ValueError, match=rf"^{key}: "):
            replace(BASE, **{key: value}).init(mlp_problem(), SEEDS)
