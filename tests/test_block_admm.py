"""Block-ADMM against the literal Algorithm 1 (`scripts.literal`), and against what theory says."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fully_connected import NoProx
from references import clipped, loss_sum, statistics_kept, torch_rule
from scipy.optimize import minimize
from torch import Tensor, nn

from admm.blocks import Parameters, split
from admm.losses import CrossEntropy, Loss, SquaredError, one_hot
from admm.minibatches import minibatches
from admm.models import initialiser
from admm.optimizers import SGD, Adam, AdaptivePenalty, BlockADMM, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.block_admm import BlockADMMState
from scripts.literal.block_admm import Algorithm1

SEEDS = (3, 1, 7)
ITERATIONS = 4
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
SHARP = CrossEntropy(0.7, tolerance=1e-13)  # its proximal operator to machine precision


# --- The literal Algorithm 1, and our options


def cosine(value: Any, progress: float) -> float:
    if not isinstance(value, dict):
        return float(value)
    return value["end"] + (value["start"] - value["end"]) * (1 + math.cos(math.pi * progress)) / 2


def by_block(value: Any, blocks: int) -> list[Any]:
    return value["blocks"] if isinstance(value, dict) and "blocks" in value else [value] * blocks


def as_blocks(problem: Problem, network: nn.Module) -> list[nn.Sequential]:
    modules = dict(network.named_modules())
    return [nn.Sequential(*(modules[name] for name in names)) for names in problem.blocks.names]


class Reference(Algorithm1):
    """The literal Algorithm 1 with our options, among them an Adam for each Z_t of each sample, for one seed."""

    def __init__(self, problem: Problem, options: BlockADMM, seed: int, u: Sequence[Tensor] | None = None) -> None:
        self.problem, self.options, self.seed = problem, options, seed
        self.network, self.k, self.rounds_done = problem.blocks.export(problem.initial([seed])), 0, 0
        block = as_blocks(problem, self.network)
        J, beta = partial(loss_sum, problem.loss), by_block(options.beta, len(block))
        super().__init__(
            block, problem.x, problem.y, J, beta, torch_rule(options.theta_update, self.network.parameters()), u
        )
        adam = options.z_update
        self.z_leaf = [[torch.zeros_like(Z[:1]) for _ in Z] for Z in self.Z]
        self.z_adam = [
            [torch.optim.Adam([leaf], 1.0, (adam.beta1, adam.beta2), adam.epsilon) for leaf in leaves]
            for leaves in self.z_leaf
        ]

    def update_Z(self, i: Tensor, zeta: Sequence[float]) -> None:
        for _ in range(self.options.z_update.steps):
            super().update_Z(i, zeta)

    def descend(self, t: int, i: Tensor, gradient: Tensor, zeta: float) -> None:
        update = self.options.z_update
        if t == self.T and update.output_update == "prox":
            self.Z[t - 1][i] = self.prox(i)
        elif update.name == "adam":
            for row, sample in enumerate(i.tolist()):
                leaf, adam = self.z_leaf[t - 1][sample], self.z_adam[t - 1][sample]
                adam.param_groups[0]["lr"] = zeta
                leaf.data.copy_(self.Z[t - 1][sample : sample + 1])
                leaf.grad = gradient[row : row + 1]
                adam.step()
                self.Z[t - 1][sample] = leaf[0]
        else:
            if update.name == "majorised" and t < self.T:
                weight = self.weights[t]
                hessian = self.beta[t - 1] * torch.eye(weight.shape[1]).double() + self.beta[t] * weight.T @ weight
                gradient = torch.linalg.solve(hessian, gradient.T).T
            elif update.name == "clipped" and t < self.T:
                own = self.beta[t - 1] * self.residual(t, i)
                gradient = clipped(own, gradient, self.Z[t - 1][i], self.block[t], self.beta[t], zeta)
            super().descend(t, i, gradient, zeta)

    def residual(self, t: int, i: Tensor) -> Tensor:
        before = self.X[i] if t == 1 else self.Z[t - 2][i]
        with torch.no_grad():
            residual: Tensor = self.Z[t - 1][i] - self.block[t - 1](before) + self.U[t - 1][i]
        return residual

    def prox(self, i: Tensor) -> Tensor:
        """Argmin over Z_T of J + T, in closed form or by a fixed-point iteration."""
        loss, beta, y = self.problem.loss, self.beta[-1], self.Y[i]
        before = self.X[i] if self.T == 1 else self.Z[-2][i]
        with torch.no_grad():
            v = self.block[-1](before) - self.U[-1][i]
        if isinstance(loss, SquaredError):
            return (loss.scale * y + beta * v) / (loss.scale + beta)

        z = v  # Stationarity, scale (softmax z − y) + β (z − v) = 0, as a contraction.
        for _ in range(120):
            z = v + loss.scale / beta * (y - z.softmax(-1))
        return z

    def remember_weights(self) -> None:
        linear = [[m for m in block if isinstance(m, nn.Linear)] for block in self.block]
        self.weights = [m[0].weight.detach().clone() if m else None for m in linear]

    def mix(self, i: Tensor, pull: float) -> None:
        for z, ahead in zip(self.Z, self.forward(self.X[i]), strict=True):
            z[i] = (1 - pull) * z[i] + pull * ahead

    def zetas(self, part: float) -> list[float]:
        values = by_block(self.options.z_step, self.T)
        return [cosine(value, (self.k + part) / self.options.iterations) for value in values]

    def value(self, name: str, part: float) -> float:
        return cosine(getattr(self.options, name), (self.k + part) / self.options.iterations)

    def step(self) -> None:
        options, everything = self.options, torch.arange(len(self.X))
        rounds = options.primal_rounds + int((options.primal_growth or 0) * self.k)
        if options.sweep == "batch":
            for r in range(rounds):
                part = r / rounds
                if r == 0:
                    self.mix(everything, self.value("forward_mixing", part))
                self.remember_weights()
                self.update_Z(everything, self.zetas(part))
                for i in self.batches(self.rounds_done + r):
                    self.update_Theta(i, self.value("theta_step", part))
            self.update_U(everything, self.value("dual_step", part))
        else:
            batches = self.batches(self.k)
            for number, i in enumerate(batches):
                part = number / len(batches)
                self.mix(i, self.value("forward_mixing", part))
                if number % options.curvature_every == 0:
                    self.remember_weights()
                for _ in range(rounds):
                    self.update_Z(i, self.zetas(part))
                    self.update_Theta(i, self.value("theta_step", part))
                self.update_U(i, self.value("dual_step", part))
        self.k += 1
        self.rounds_done += rounds

    def batches(self, epoch: int) -> list[Tensor]:
        size = self.options.batch_size
        return [b[0] for b in minibatches(len(self.X), size, [self.seed], epoch, torch.device("cpu"))]


class NormalisedReference(Reference):
    """With batch normalisation, whose running statistics follow the steps of Θ alone."""

    def __init__(self, problem: Problem, options: BlockADMM, seed: int) -> None:
        super().__init__(problem, options, seed)
        self.network.train()
        with statistics_kept(self.network):
            self.Z = self.forward(problem.x)

    def update_Z(self, i: Tensor, zeta: Sequence[float]) -> None:
        with statistics_kept(self.network):
            super().update_Z(i, zeta)

    def mix(self, i: Tensor, pull: float) -> None:
        with statistics_kept(self.network):
            super().mix(i, pull)

    def update_U(self, i: Tensor, alpha: float) -> None:
        with statistics_kept(self.network):
            super().update_U(i, alpha)


def assert_same(problem: Problem, state: BlockADMMState, s: int, reference: Reference) -> None:
    torch.testing.assert_close(state.theta.flat()[s], problem.blocks.flatten(reference.network), **CLOSE)
    for t in range(reference.T):
        torch.testing.assert_close(state.z[t][s], reference.Z[t], **CLOSE)
        torch.testing.assert_close(state.u[t][s], reference.U[t], **CLOSE)


GRADIENT, ADAM, MAJORISED = (
    ZUpdate("gradient", output_update="step"),
    ZUpdate("adam", output_update="prox"),
    ZUpdate("majorised", output_update="prox"),
)
BASE = BlockADMM(
    ITERATIONS,
    0.05,
    z_step=0.1,
    beta=1.0,
    sweep="batch",
    batch_size=7,
    z_update=GRADIENT,
    theta_update=SGD(),
    dual_step=1.0,
    forward_mixing=0.0,
)
VARIANTS = {
    "as printed": BASE,
    "prox": replace(BASE, z_update=ZUpdate("gradient", output_update="prox")),
    "several steps": replace(BASE, z_update=ZUpdate("gradient", steps=3, output_update="step")),
    "several rounds": replace(BASE, primal_rounds=3),
    "more and more rounds": replace(
        BASE, primal_growth=0.7, z_update=ADAM, theta_update=Adam(), theta_step=1e-2, z_step=1e-2
    ),
    "momentum": replace(BASE, theta_update=SGD(momentum=0.9, weight_decay=0.1)),
    "paper's setting": replace(BASE, primal_rounds=3, z_update=ADAM, theta_update=Adam(), theta_step=1e-2, z_step=1e-2),
    "adam's options": replace(
        BASE,
        primal_rounds=2,
        z_update=ZUpdate("adam", 2, "step", beta1=0.7, beta2=0.8, epsilon=1e-2),
        theta_update=Adam(beta1=0.8, beta2=0.9, epsilon=1e-4, weight_decay=0.5),
        theta_step=1e-2,
    ),
    "clipped": replace(BASE, z_update=ZUpdate("clipped", 2), z_step=0.2, beta={"blocks": [0.5, 2.0, 1.3]}),
    "beta by block": replace(
        BASE, beta={"blocks": [0.5, 2.0, 1.3]}, z_update=ZUpdate("gradient", output_update="prox")
    ),
    "zeta by block": replace(BASE, z_step={"blocks": [0.1, {"start": 0.2, "end": 0.0}, 0.3]}),
    "dual step": replace(BASE, dual_step=0.3),
    "no dual step": replace(BASE, dual_step=0.0),
    "mixing": replace(BASE, forward_mixing=0.4, primal_rounds=2),
    "full mixing": replace(BASE, forward_mixing=1.0),
    "schedules": replace(
        BASE,
        theta_step={"start": 0.1, "end": 0.01},
        z_step={"start": 0.2, "end": 0.0},
        dual_step={"start": 1.0, "end": 0.2},
        forward_mixing={"start": 0.9, "end": 0.1},
        primal_rounds=2,
    ),
    "majorised": replace(BASE, z_update=MAJORISED, z_step=0.8, beta={"blocks": [0.5, 2.0, 1.3]}, primal_rounds=2),
    "majorised, step": replace(BASE, z_update=ZUpdate("majorised", 2, "step"), z_step=0.3),
}


def test_it_is_algorithm_1_as_printed(mlp_problem):
    problem = mlp_problem(SHARP)
    state, networks = BASE.init(problem, SEEDS), [problem.blocks.export(problem.initial([seed])) for seed in SEEDS]
    J, rules = partial(loss_sum, SHARP), [torch_rule(SGD(), net.parameters()) for net in networks]
    literal = [
        Algorithm1(as_blocks(problem, net), problem.x, problem.y, J, [1.0] * 3, rule)
        for net, rule in zip(networks, rules, strict=True)
    ]
    for k in range(ITERATIONS):
        BASE.step(problem, state)
        for s, (seed, net, own) in enumerate(zip(SEEDS, networks, literal, strict=True)):
            drawn = minibatches(24, BASE.batch_size, [seed], k, torch.device("cpu"))
            own.iterate([0.1] * 3, 0.05, 1.0, [i[0] for i in drawn])
            torch.testing.assert_close(state.theta.flat()[s], problem.blocks.flatten(net), **CLOSE)
            torch.testing.assert_close([z[s] for z in state.z], own.Z, **CLOSE)
            torch.testing.assert_close([u[s] for u in state.u], own.U, **CLOSE)
    assert max(u.abs().max() for u in state.u) > 1e-3


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize(
    "loss, variant",
    [(SquaredError(0.8), name) for name in VARIANTS]
    + [(SHARP, name) for name in ("as printed", "prox", "paper's setting", "majorised")],
)
def test_it_is_algorithm_1(mlp_problem, loss, variant, sweep):
    problem, options = mlp_problem(loss), replace(VARIANTS[variant], sweep=sweep)
    references = [Reference(problem, options, seed) for seed in SEEDS[:2]]
    state = options.init(problem, SEEDS[:2])
    for _ in range(ITERATIONS):
        options.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            assert_same(problem, state, s, reference)
    assert max(u.abs().max() for u in state.u) > 1e-3 or options.dual_step == 0.0


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize("cut", [{"n_blocks": 1}, {"n_blocks": 2}, {"per_layer": True, "activation": "start"}], ids=str)
def test_it_is_algorithm_1_however_the_network_is_cut(mlp_problem, cut, sweep):
    adam = ZUpdate("adam", output_update="prox", epsilon=1e-3)  # which does not enlarge the rounding of tiny gradients
    problem, options = mlp_problem(**cut), replace(VARIANTS["schedules"], sweep=sweep, z_update=adam)
    state, reference = options.init(problem, SEEDS), Reference(problem, options, SEEDS[2])
    for _ in range(ITERATIONS):
        options.step(problem, state)
        reference.step()
        assert_same(problem, state, 2, reference)


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize("name", ["gradient", "adam"])
def test_it_is_algorithm_1_for_images_between_blocks(conv_problem, name, sweep):
    problem = conv_problem()
    options = replace(
        VARIANTS["mixing"],
        sweep=sweep,
        z_update=ZUpdate(name, output_update="prox"),
        dual_step=0.5,
        beta={"blocks": [0.7, 1.5]},
    )
    state = options.init(problem, SEEDS)
    references = [Reference(problem, options, seed) for seed in SEEDS]
    for _ in range(ITERATIONS):
        options.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            assert_same(problem, state, s, reference)


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize("output_update", ["prox", "step"])
def test_it_is_algorithm_1_for_a_resnet_running_statistics_included(resnet_problem, output_update, sweep):
    problem = resnet_problem(SquaredError(0.6))
    options = replace(
        VARIANTS["mixing"],
        sweep=sweep,
        batch_size=6,
        theta_step=2e-3,
        z_step=0.05,
        z_update=ZUpdate("gradient", output_update=output_update),
    )
    state = options.init(problem, SEEDS[:2])
    references = [NormalisedReference(problem, options, seed) for seed in SEEDS[:2]]
    for _ in range(2):
        options.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            assert_same(problem, state, s, reference)
            buffers = problem.blocks.flatten(reference.network, "buffers")
            torch.testing.assert_close(state.theta.buffers[s], buffers, **CLOSE)


@pytest.mark.parametrize("every", [2, 3, 100])
def test_curvature_is_evaluated_every_so_many_visits(mlp_problem, every):
    problem = mlp_problem()
    options = replace(VARIANTS["majorised"], sweep="minibatch", curvature_every=every)
    state, reference = options.init(problem, SEEDS), Reference(problem, options, SEEDS[0])
    for _ in range(2):
        options.step(problem, state)
        reference.step()
        assert_same(problem, state, 0, reference)


@pytest.mark.parametrize("slice_size", [1, 5, 24])
@pytest.mark.parametrize("variant", ["paper's setting", "schedules", "majorised"])
def test_the_slice_size_changes_nothing(mlp_problem, variant, slice_size):
    problem, states = mlp_problem(), []
    for size in (2000, slice_size):
        options = replace(VARIANTS[variant], slice_size=size)
        states.append(options.init(problem, SEEDS))
        for _ in range(2):
            options.step(problem, states[-1])
    values = [options.diagnostics(problem, s) for s in states]
    torch.testing.assert_close(states[0].theta.flat(), states[1].theta.flat(), **CLOSE)
    for a, b in zip([*states[0].z, *states[0].u], [*states[1].z, *states[1].u], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(values[0], values[1], **CLOSE)


@pytest.mark.parametrize("theta_passes, updates", [(0.1, 1), (0.5, 2), (1.0, 4), (1.25, 5), (2.0, 8)])
def test_theta_passes_counts_passes_over_the_samples(mlp_problem, theta_passes, updates):
    problem = mlp_problem()
    options = replace(BASE, theta_update=Adam(), primal_rounds=2, theta_passes=theta_passes)  # 4 mini-batches a pass
    state = options.init(problem, SEEDS)
    options.step(problem, state)
    assert state.moments[-1][0].tolist() == [2 * updates] * 3  # Adam's count of steps


def test_theta_is_trained_on_new_mini_batches_in_each_round_and_pass(mlp_problem, monkeypatch):
    epochs = []

    def recorded(samples, batch_size, seeds, epoch, device):
        epochs.append(epoch)
        return minibatches(samples, batch_size, seeds, epoch, device)

    monkeypatch.setattr("admm.optimizers.block_admm.minibatches", recorded)
    problem, options = mlp_problem(), replace(BASE, primal_rounds=3, theta_passes=2.0)
    state = options.init(problem, SEEDS)
    for _ in range(2):
        options.step(problem, state)
    assert epochs == list(range(12))


# --- Initialisation


def test_coupling_variables_begin_with_a_forward_pass_and_duals_at_zero(mlp_problem):
    problem = mlp_problem()
    state = replace(BASE, slice_size=5).init(problem, SEEDS)
    for s, seed in enumerate(SEEDS):
        reference = Reference(problem, BASE, seed)
        for t in range(3):
            torch.testing.assert_close(state.z[t][s], reference.Z[t], rtol=1e-12, atol=1e-14)
            assert not state.u[t].any()


def test_duals_begin_uniform_and_depend_on_the_seed_and_the_block_alone(mlp_problem):
    problem, options = mlp_problem(), replace(BASE, dual_init=1e-2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state, alone = options.init(problem, SEEDS), options.init(problem, SEEDS[1:2])
    assert torch.equal(torch.get_rng_state(), before)
    for u, v in zip(state.u, alone.u, strict=True):
        assert 0.0 <= u.min() < 2e-3 and 8e-3 < u.max() <= 1e-2
        assert torch.equal(u[1], v[0]) and not torch.equal(u[0], u[1])
    assert not torch.equal(state.u[0][0, :, 0], state.u[1][0, :, 0])


@pytest.mark.parametrize("variant", ["as printed", "paper's setting"])
def test_it_is_algorithm_1_with_uniform_duals(mlp_problem, variant):
    problem, options = mlp_problem(), replace(VARIANTS[variant], dual_init=0.1)
    state = options.init(problem, SEEDS)
    reference = Reference(problem, options, SEEDS[1], [u[1] for u in state.u])
    for _ in range(2):
        options.step(problem, state)
        reference.step()
        assert_same(problem, state, 1, reference)


# --- The Z updates


def lagrangian(problem: Problem, state: BlockADMMState, s: int, z: Sequence[Tensor]) -> Tensor:
    """Eq. 2 for replica s at coupling variables z."""
    blocks = as_blocks(problem, problem.blocks.export(state.theta, s))
    value = loss_sum(problem.loss, z[-1], problem.y)
    for t, (block, before) in enumerate(zip(blocks, [problem.x, *z[:-1]], strict=True)):
        value = value + state.beta[t, s] / 2 * ((z[t] - block(before) + state.u[t][s]) ** 2).sum()
    return value


def mixed_state(problem: Problem, options: BlockADMM) -> BlockADMMState:
    """A state in the middle of nowhere: all variables are random."""
    state, rng = options.init(problem, SEEDS), torch.Generator().manual_seed(0)
    for v in (*state.z, *state.u):
        v.copy_(torch.randn(v.shape, dtype=v.dtype, generator=rng))
    return state


def curvature(update: ZUpdate, problem: Problem, theta: Parameters, beta: Tensor, evaluations: int = 1) -> list[Tensor]:
    state = update.init(problem.blocks, theta)
    for _ in range(evaluations):
        update.update_curvature(problem.blocks, theta, beta, state)
    return state.inverse_curvature


def z_of(state: BlockADMMState, s: int) -> list[Tensor]:
    return [z[s].clone() for z in state.z]


FROZEN = replace(BASE, theta_step=0.0, dual_step=0.0, z_step=1.0)


def test_a_gradient_step_takes_the_terms_in_reverse_order(mlp_problem):
    problem = mlp_problem(SHARP)
    options = replace(FROZEN, z_step=0.1)
    state = mixed_state(problem, options)
    z = z_of(state, 1)
    for t in (2, 1, 0):
        leaves = [v.clone().requires_grad_() for v in z]
        z[t] = z[t] - 0.1 * torch.autograd.grad(lagrangian(problem, state, 1, leaves), leaves[t])[0]
    options.step(problem, state)
    for t in range(3):
        torch.testing.assert_close(state.z[t][1], z[t], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, {"blocks": [0.5, 2.0, 3.0]}], ids=str)
def test_majorised_is_the_exact_minimiser_before_an_affine_block(mlp_problem, beta):
    problem = mlp_problem()
    options = replace(FROZEN, z_update=MAJORISED, beta=beta)
    state = mixed_state(problem, options)
    before = z_of(state, 2)
    options.step(problem, state)
    after = z_of(state, 2)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        middle = torch.tensor(flat).view_as(after[1]).requires_grad_()
        value = lagrangian(problem, state, 2, [before[0], middle, after[2]])
        value.backward()
        return value.item(), middle.grad.numpy().ravel()

    found = minimize(objective, before[1].numpy().ravel(), jac=True, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(after[1].numpy().ravel(), found.x, atol=1e-6)
    assert np.abs(objective(after[1].numpy().ravel())[1]).max() < 1e-10


@pytest.mark.parametrize("loss", [SquaredError(0.8), SHARP], ids=["squared error", "cross-entropy"])
def test_prox_is_the_exact_minimiser_over_the_last_coupling_variable(mlp_problem, loss):
    problem = mlp_problem(loss)
    options = replace(FROZEN, z_update=MAJORISED, beta={"blocks": [1.0, 1.0, 0.6]})
    state = mixed_state(problem, options)
    before = z_of(state, 0)
    options.step(problem, state)
    last = state.z[-1][0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lagrangian(problem, state, 0, [*before[:2], last]), last)
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize(
    "update", [MAJORISED, ZUpdate("lipschitz", output_update="prox"), ZUpdate("lipschitz", 2, "step")], ids=str
)
@pytest.mark.parametrize("activation", ["end", "start"])
def test_majorised_and_lipschitz_steps_decrease_the_augmented_lagrangian(mlp_problem, update, activation):
    if update.name == "majorised" and activation == "start":
        pytest.skip("no majoriser there, see the next test")
    problem = mlp_problem(SquaredError(0.5), per_layer=True, activation=activation)
    options = replace(
        FROZEN,
        z_update=update,
        beta={"blocks": [0.5, 2.0, 1.0]},
        z_step=1.0 if update.output_update == "prox" else 0.6,
    )
    state = mixed_state(problem, options)
    for _ in range(50):  # of the power iteration
        options.z_update.update_curvature(problem.blocks, state.theta, state.beta, state.z_state)
    values = [[lagrangian(problem, state, s, z_of(state, s)).item() for s in range(3)]]
    for _ in range(8):
        options.step(problem, state)
        values.append([lagrangian(problem, state, s, z_of(state, s)).item() for s in range(3)])
    assert (np.diff(values, axis=0) < 0).all()


def test_the_majorised_step_is_at_most_newtons_before_a_relu(mlp_problem):
    problem = mlp_problem()
    theta, beta = problem.initial((0,)), torch.tensor([[0.5], [2.0], [1.0]]).double()
    unit = torch.eye(5).double()
    inverse = curvature(ZUpdate("majorised", output_update="prox"), problem, theta, beta)[0]
    weight = theta.blocks[1][0]["weight"][0]
    for pattern in range(2**4):
        active = torch.tensor([pattern >> k & 1 for k in range(4)]).double()
        hessian = 0.5 * unit + 2.0 * (weight.T * active) @ weight
        assert torch.linalg.eigvals(inverse[0] @ hessian).real.max() < 1 + 1e-12


@pytest.mark.parametrize("size", [1e2, 1e4, 1e7])
def test_the_majorised_step_before_a_large_weight_in_float32_is_float64_s(mlp_problem, size):
    """W_3 is [3, 4]: one direction of Z_2 in four is seen by β_2 alone."""
    problem = mlp_problem()
    problem = replace(problem, x=problem.x.float())
    theta, beta = problem.initial((0, 1)), torch.tensor([[0.5], [2.0], [1.0]]).expand(3, 2)
    weight = theta.blocks[2][0]["weight"].mul_(size)
    weight[1] = torch.inf
    inverse = curvature(ZUpdate("majorised"), problem, theta, beta)[1]
    w = weight[0].double()
    expected = torch.linalg.inv(2.0 * torch.eye(4).double() + w.T @ w)
    torch.testing.assert_close(inverse[0].double(), expected, rtol=0.0, atol=1e-3)
    assert inverse[1].isnan().all()  # of a replica that has diverged, without an error for the other


def test_the_lipschitz_step_is_near_the_largest_safe_one(mlp_problem):
    problem = mlp_problem()
    update, theta = ZUpdate("lipschitz", output_update="prox"), mlp_problem().initial(SEEDS)
    beta = torch.tensor([0.5, 2.0, 3.0]).double()
    steps = curvature(update, problem, theta, beta[:, None].expand(3, 3), 100)
    for t in (0, 1):
        weight = theta.blocks[t + 1][0]["weight"]
        safe = 1 / (beta[t] + beta[t + 1] * torch.linalg.matrix_norm(weight, 2) ** 2)
        assert (steps[t].flatten() < safe).all() and (steps[t].flatten() > 0.9 * safe).all()


@pytest.mark.parametrize("update", ["gradient", "lipschitz", "majorised"])
def test_rows_of_a_sample_move_as_samples_of_their_own(update):
    problem = consensus_problem(SquaredError(0.5), nn.ReLU)
    rows = replace(problem, x=problem.x.unflatten(0, (4, 2)), y=problem.y.unflatten(0, (4, 2)))
    options = replace(FROZEN, z_update=ZUpdate(update, 2), z_step=0.5, dual_step=1.0, batch_size=4)
    of_samples, of_rows = (options.init(p, SEEDS) for p in (problem, rows))
    for _ in range(3):
        options.step(problem, of_samples)
        options.step(rows, of_rows)
    for name in ("z", "u"):
        for z, z_of_rows in zip(getattr(of_samples, name), getattr(of_rows, name), strict=True):
            torch.testing.assert_close(z_of_rows.flatten(1, 2), z)
    assert of_samples.u[0].abs().max() > 1e-3


def consensus_problem(loss: Loss, activation: type[nn.Module]) -> Problem:
    network = nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3))
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = one_hot(torch.arange(8) % 3, 3, x)
    return Problem(x, y, split(network, per_layer=True), loss, initialiser("pytorch"))


@pytest.mark.parametrize(
    "loss, activation, update, step",
    [
        (SquaredError(0.5), nn.Flatten, ZUpdate("majorised", 4, output_update="prox"), 1.0),
        (CrossEntropy(0.5, tolerance=1e-13), nn.Tanh, ZUpdate("gradient", 6, output_update="prox"), 0.5),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (CrossEntropy(0.5, tolerance=1e-13), nn.Flatten, ZUpdate("majorised", 4, output_update="prox"), 1.0),
                (SquaredError(0.5), nn.Tanh, ZUpdate("gradient", 6, output_update="prox"), 0.5),
            )
        ),
    ],
)
def test_in_consensus_the_duals_are_the_back_propagated_gradients(loss, activation, update, step):
    """With Θ fixed and the constraints met, β_t U_t = −∂J/∂Z_t along the network's own forward pass."""
    problem = consensus_problem(loss, activation)
    options = replace(
        FROZEN, z_update=update, z_step=step, dual_step=1.0, beta={"blocks": [1.0, 0.8, 0.6]}, dual_init=0.5
    )
    state = options.init(problem, SEEDS)
    for _ in range(150):
        options.step(problem, state)
    for s in range(len(SEEDS)):
        z, values = problem.x.clone().requires_grad_(), []
        for block in as_blocks(problem, problem.blocks.export(state.theta, s)):
            z = block(z)
            values.append(z)
        gradients = torch.autograd.grad(loss_sum(loss, z, problem.y), values)
        for t in range(3):
            torch.testing.assert_close(state.z[t][s], values[t].detach(), rtol=0.0, atol=1e-6)
            torch.testing.assert_close(state.beta[t, s] * state.u[t][s], -gradients[t], rtol=0.0, atol=1e-6)


# --- Adaptive penalty (Eq. 6)


def constraint_norm(problem: Problem, state: BlockADMMState, s: int) -> float:
    blocks = as_blocks(problem, problem.blocks.export(state.theta, s))
    with torch.no_grad():
        residuals = [z[s] - f(b) for z, f, b in zip(state.z, blocks, [problem.x, *z_of(state, s)], strict=False)]
    return math.sqrt(sum(r.square().sum().item() for r in residuals) / len(problem.x))


def test_beta_grows_exactly_when_the_residual_exceeds_its_bound(mlp_problem):
    problem, c = mlp_problem(), 0.8
    plain = replace(BASE, dual_step=0.5)
    state = plain.init(problem, SEEDS)
    plain.step(problem, state)
    residuals = sorted(constraint_norm(problem, state, s) for s in range(3))
    bound = (residuals[0] + residuals[1]) / 2  # the first step is the same: two replicas exceed it, one does not
    options = replace(plain, penalty=AdaptivePenalty(c=c, bound=bound / 0.9, shrink=0.9))
    adaptive, expected, changes = options.init(problem, SEEDS), torch.ones(3, dtype=torch.float64), set()
    for k in range(1, 9):
        options.step(problem, adaptive)
        values = options.diagnostics(problem, adaptive)
        assert values["bound"].tolist() == pytest.approx([bound * 0.9 ** (k - 1)] * 3)
        for s in range(3):
            norm = constraint_norm(problem, adaptive, s)
            assert values["h"][s].item() == pytest.approx(norm)
            grows = norm > bound / 0.9 * 0.9**k
            changes.add(grows)
            expected[s] *= 1 / c if grows else 1.0
        for t in range(3):
            torch.testing.assert_close(adaptive.beta[t], expected, rtol=1e-12, atol=0.0)
    assert changes == {True, False}


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
def test_the_multiplier_is_continuous_when_beta_changes(mlp_problem, sweep):
    problem, plain = mlp_problem(), replace(BASE, sweep=sweep, beta={"blocks": [0.5, 2.0, 1.0]})
    options = replace(plain, penalty=AdaptivePenalty(c=0.7, bound=0.0))
    constant, adaptive = plain.init(problem, SEEDS), options.init(problem, SEEDS)
    plain.step(problem, constant)
    options.step(problem, adaptive)
    for t in range(3):
        torch.testing.assert_close(adaptive.beta[t], constant.beta[t] / 0.7, rtol=1e-12, atol=0.0)
        multiplier = [state.beta[t].view(-1, 1, 1) * state.u[t] for state in (constant, adaptive)]
        torch.testing.assert_close(multiplier[0], multiplier[1], rtol=1e-12, atol=1e-14)


def test_a_state_goes_on_with_the_optimizers_penalties_and_its_own_multipliers(mlp_problem):
    problem, plain, penalties = mlp_problem(), replace(BASE, dual_step=0.5), (0.5, 2.0, 1.5)
    state, other = plain.init(problem, SEEDS), replace(plain, beta={"blocks": list(penalties)})
    plain.step(problem, state)
    expected = copy.deepcopy(state)
    for t, beta in enumerate(penalties):
        expected.u[t] *= (expected.beta[t] / beta).view(-1, 1, 1)
        expected.beta[t] = beta
    other.step(problem, state)
    other.step(problem, expected)
    assert torch.equal(state.beta, expected.beta)
    torch.testing.assert_close(state.theta.flat(), expected.theta.flat(), rtol=1e-12, atol=1e-14)


def test_beta_stays_below_its_largest_value(mlp_problem):
    problem, options = mlp_problem(), replace(BASE, penalty=AdaptivePenalty(c=0.5, bound=0.0, largest=5.0))
    state = options.init(problem, SEEDS)
    betas = [options.step(problem, state).beta.unique().tolist() for _ in range(4)]
    assert betas == [[2.0], [4.0], [4.0], [4.0]]


@pytest.mark.parametrize(
    "key, value",
    [("c", 0.0), ("c", 1.0), ("c", 1.5), ("bound", -1.0), ("shrink", float("nan")), ("largest", 0.0)],
)
def test_a_wrong_penalty_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"^{key}: {value} is not"):
        AdaptivePenalty(**{key: value})


# --- Diagnostics


def test_the_primal_rounds_of_the_last_iteration_are_recorded(mlp_problem):
    problem, options = mlp_problem(), replace(BASE, primal_rounds=2, primal_growth=0.7)
    state, recorded = options.init(problem, SEEDS), []
    for _ in range(4):
        options.step(problem, state)
        recorded.append(options.diagnostics(problem, state)["primal_rounds"].tolist())
    assert recorded == [[rounds] * 3 for rounds in (2, 2, 3, 4)]


@pytest.mark.parametrize("slice_size", [7, 2000])
@pytest.mark.parametrize("loss", [SquaredError(0.8), SHARP], ids=["squared error", "cross-entropy"])
def test_diagnostics_are_autograd_s(mlp_problem, loss, slice_size):
    problem = mlp_problem(loss)
    options = replace(BASE, beta={"blocks": [0.5, 2.0, 1.3]}, slice_size=slice_size)
    state = mixed_state(problem, options)
    values = options.diagnostics(problem, state)
    names = {f"{kind}_{t}" for kind in ("residual", "dual_rms", "beta", "sigma") for t in (1, 2, 3)}
    assert set(values) == names | {"kkt", "h", "loss_forward", "loss_moved"}
    for s in range(3):
        network = problem.blocks.export(state.theta, s)
        z, total = [v.requires_grad_() for v in z_of(state, s)], loss_sum(loss, state.z[-1][s], problem.y)
        total = loss_sum(loss, z[-1], problem.y)
        for t, (block, before) in enumerate(zip(as_blocks(problem, network), [problem.x, *z[:-1]], strict=True)):
            residual = z[t] - block(before)
            total = total + (state.beta[t, s] * state.u[t][s] * residual).sum()
            torch.testing.assert_close(
                values[f"residual_{t + 1}"][s], (residual.norm() / z[t].norm()).detach(), **CLOSE
            )
            rms = state.u[t][s].norm() / math.sqrt(state.u[t][s].numel())
            torch.testing.assert_close(values[f"dual_rms_{t + 1}"][s], rms, **CLOSE)
            assert values[f"beta_{t + 1}"][s] == state.beta[t, s]
        by_z = torch.autograd.grad(total, z, retain_graph=True)
        by_theta = torch.autograd.grad(total, list(network.parameters()))
        samples = len(problem.x)
        square = sum(g.square().sum() for g in by_z) / samples + sum((g / samples).square().sum() for g in by_theta)
        torch.testing.assert_close(values["kkt"][s], square.sqrt(), **CLOSE)


def test_diagnostics_leave_the_state_alone(mlp_problem):
    problem = mlp_problem()
    state = mixed_state(problem, BASE)
    before = [v.clone() for v in (state.theta.flat(), *state.z, *state.u, state.beta)]
    BASE.diagnostics(problem, state)["beta_1"].zero_()
    after = (state.theta.flat(), *state.z, *state.u, state.beta)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sweep": "online"}, "sweep: 'online' is not one of batch, minibatch"),
        ({"batch_size": 0}, "batch_size: 0 is"),
        ({"primal_rounds": 0}, "primal_rounds: 0 is"),
        ({"curvature_every": 0}, "curvature_every: 0 is"),
        ({"slice_size": 0}, "slice_size: 0 is"),
        ({"primal_rounds": 1.5}, "primal_rounds: 1.5 is"),
        ({"sweep": "minibatch", "theta_passes": 0.5}, "theta_passes: 0.5"),
        ({"theta_passes": 0.0}, "theta_passes"),
        ({"theta_passes": -1.0}, "theta_passes"),
        ({"beta": {"blocks": [1.0, 2.0]}}, "beta: has 2 values for blocks; 3 are needed"),
        ({"beta": {"blocks": [1.0, 2.0, (1.0, 2.0)]}}, "beta: 2 values for 3 replicas"),
        ({"beta": 0.0}, "beta: 0.0 is not positive"),
        ({"beta": {"blocks": [1.0, -1.0, 1.0]}}, "beta"),
        ({"beta": (1.0, 1.0, -1.0)}, "beta"),
        ({"z_step": {"blocks": [0.1, 0.2]}}, "z_step"),
        ({"theta_step": (0.1, 0.2)}, "theta_step: 2 values for 3 replicas"),
        ({"z_step": {"start": 0.1}}, "z_step: a schedule is"),
        ({"dual_step": (1.0,)}, "dual_step: 1 values for 3 replicas"),
        ({"forward_mixing": (1.0,)}, "forward_mixing: 1 values for 3 replicas"),
        ({"forward_mixing": {"start": 0.5, "end": (0.5, 1.5, 1.0)}}, "is more than the whole way to the forward pass"),
        ({"primal_growth": -1.0}, "primal_growth: -1.0 is not a number from 0 up"),
        ({"sweep": "minibatch", "theta_passes": 2.0}, "sweep='minibatch' has one step of Θ per visit"),
        ({"epoch_parts": 2}, "sweep='batch' moves all samples at a time"),
        ({"sweep": "minibatch", "epoch_parts": 2, "primal_growth": 0.1}, "epoch_parts must be None"),
    ],
)
def test_a_wrong_option_is_refused_by_name(mlp_problem, options, message):
    with pytest.raises(ValueError) as error:
        replace(BASE, **options).init(mlp_problem(), SEEDS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "newton"}, "name: 'newton' is not one of gradient, clipped, adam"),
        ({"output_update": "exact"}, "output_update: 'exact' is not one of prox, step"),
        ({"steps": 0}, "steps: 0 is not a whole number from 1 up"),
        ({"beta1": 1.0}, "beta1: 1.0 is not a number from 0 up and below 1.0"),
        ({"epsilon": -1.0}, "epsilon: -1.0 is not a number from 0 up"),
    ],
)
def test_a_z_update_refuses_a_wrong_field_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ZUpdate(**{"name": "adam"} | options)


@pytest.mark.parametrize("optimizer", [BASE, OnlineBlockADMM(1, 0.1, batch_size=7, dual="none")])
def test_an_exact_last_step_needs_a_loss_with_a_proximal_operator(mlp_problem, optimizer):
    options = replace(optimizer, z_update=ZUpdate("gradient", output_update="prox"))
    with pytest.raises(
        ValueError, match=r"loss: NoProx has no prox; output_update='prox' needs an admm.losses.ProximalLoss"
    ):
        options.init(mlp_problem(NoProx()), SEEDS)


@pytest.mark.parametrize("name", ["majorised", "lipschitz"])
def test_updates_by_curvature_need_one_linear_layer_a_block(mlp_problem, conv_problem, name):
    options = replace(BASE, z_update=ZUpdate(name, output_update="prox"))
    needs = rf"'{name}' needs blocks of one linear layer, with or without a ReLU; block 2 is \['1.0', '1.1'"
    with pytest.raises(ValueError, match=needs):
        options.init(conv_problem(), SEEDS)
    with pytest.raises(ValueError, match="block 2 is"):
        options.init(mlp_problem(after=["fc1"]), SEEDS)
    options.init(mlp_problem(n_blocks=2), SEEDS)  # the first block may have any number
