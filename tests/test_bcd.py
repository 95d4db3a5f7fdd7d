"""Block coordinate descent against the published formulas in plain NumPy, one replica at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fully_connected import NoProx
from torch import Tensor, nn

from admm.blocks import split
from admm.losses import CrossEntropy, SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import Problem
from admm.optimizers.bcd import BCD
from scripts.literal import bcd as literal

SEEDS = (3, 1, 7)
NAMES = ("weight", "bias", "u", "v")
HIDDEN = {2: [9], 3: [8, 11], 4: [12, 7, 9]}  # wider and narrower than the next layer
PENALTIES = {"gamma": 0.7, "rho": 1.3, "alpha": 2.0}
OPTIMIZER = BCD(**PENALTIES)


def make(depth: int = 3, dtype: torch.dtype = torch.float64, loss: Any = None, samples: int = 40) -> Problem:
    x = torch.randn(samples, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    blocks = split(mlp(6, HIDDEN[depth], 3), per_layer=True)
    y = one_hot(x[:, :3].argmax(1), 3, x)
    return Problem(x, y, blocks, loss or SquaredError(), initialiser("normal", 0.1, mean=0.0, std=0.4))


def a_start(problem: Problem, replicas: int) -> dict[str, list[Tensor]]:
    """Random values of all variables, far from a forward pass."""
    generator, samples = torch.Generator().manual_seed(1), len(problem.x)
    linear = [m for m in problem.blocks.network.modules() if isinstance(m, nn.Linear)]
    shapes = {
        "weight": [tuple(m.weight.shape) for m in linear],
        "bias": [tuple(m.bias.shape) for m in linear],
        "u": [(samples, m.out_features) for m in linear],
        "v": [(samples, m.out_features) for m in linear],
    }
    return {
        name: [0.7 * torch.randn(replicas, *s, dtype=torch.float64, generator=generator) for s in shapes[name]]
        for name in NAMES
    }


def variables(state: Any) -> dict[str, list[Tensor]]:
    layers = [views for block in state.theta.blocks for views in block if views]
    return {n: [layer[n] for layer in layers] for n in ("weight", "bias")} | {"u": state.u, "v": state.v}


class Reference:
    """Zeng et al. 2019 with W and b as their program has them; V_L by Newton's method where J is cross-entropy."""

    def __init__(self, problem: Problem, start: dict[str, list[Tensor]], s: int, gamma: Any, rho: Any, alpha: Any):
        self.x, self.y, self.loss = problem.x.double().numpy(), problem.y.double().numpy(), problem.loss
        self.w, self.b, self.u, self.v = ([t[s].double().numpy().copy() for t in start[name]] for name in NAMES)
        self.gamma, self.rho, self.alpha = gamma, rho, alpha

    def before(self, i: int) -> Any:
        return self.x if i == 0 else self.v[i - 1]

    def step(self) -> None:
        for i in range(len(self.w) - 1, -1, -1):
            if i == len(self.w) - 1:
                self.v[i] = self.outputs(self.u[i], self.v[i])
                affine = self.before(i) @ self.w[i].T + self.b[i]
                self.u[i] = (self.gamma * self.v[i] + self.rho * affine) / (self.gamma + self.rho)
            else:
                w, b = self.w[i + 1], self.b[i + 1]
                right = self.rho * (self.u[i + 1] - b) @ w + self.gamma * np.maximum(self.u[i], 0.0)
                self.v[i] = np.linalg.solve(self.rho * w.T @ w + self.gamma * np.eye(w.shape[1]), right.T).T
                self.u[i] = self.preactivation(i)
            self.w[i], self.b[i] = self.weight(i), self.bias(i)

    def outputs(self, u: Any, v: Any) -> Any:
        if isinstance(self.loss, SquaredError):
            c = self.loss.scale
            return (c * self.y + self.gamma * u + self.alpha * v) / (c + self.gamma + self.alpha)
        z, unit = np.zeros_like(v), np.eye(v.shape[1])
        for _ in range(50):
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            slope = self.loss.scale * (p - self.y) + self.gamma * (z - u) + self.alpha * (z - v)
            curvature = (
                self.loss.scale * (p[:, None] * unit - p[:, :, None] * p[:, None]) + (self.gamma + self.alpha) * unit
            )
            z -= np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        return z

    def preactivation(self, i: int) -> Any:
        """The better one of the minimisers on either side of 0; the negative one of two equal minima."""
        affine, v, old = self.before(i) @ self.w[i].T + self.b[i], self.v[i], self.u[i]

        def value(z: Any) -> Any:
            terms = self.gamma * (v - np.maximum(z, 0)) ** 2, self.rho * (z - affine) ** 2, self.alpha * (z - old) ** 2
            return sum(terms)

        merged = self.rho * affine + self.alpha * old
        negative = np.minimum(merged / (self.rho + self.alpha), 0.0)
        positive = np.maximum((self.gamma * v + merged) / (self.gamma + self.rho + self.alpha), 0.0)
        return np.where(value(positive) < value(negative), positive, negative)

    def weight(self, i: int) -> Any:
        self.old_weight, before = self.w[i].copy(), self.before(i)
        system = self.alpha * np.eye(before.shape[1]) + self.rho * before.T @ before
        right = self.alpha * self.w[i] + self.rho * (self.u[i] - self.b[i]).T @ before
        return np.linalg.solve(system, right.T).T

    def bias(self, i: int) -> Any:
        total = (self.u[i] - self.before(i) @ self.old_weight.T).sum(0)
        return (self.alpha * self.b[i] + self.rho * total) / (self.rho * len(self.x) + self.alpha)


def differences(state: Any, s: int, reference: Reference, names: tuple[str, ...] = NAMES) -> list[float]:
    expected = dict(zip(NAMES, (reference.w, reference.b, reference.u, reference.v), strict=True))
    return [
        float(np.linalg.norm(mine[s].double().numpy() - theirs) / np.linalg.norm(theirs))
        for name in names
        for mine, theirs in zip(variables(state)[name], expected[name], strict=True)
    ]


def trained(optimizer: BCD, problem: Problem, seeds: tuple[int, ...], steps: int) -> Any:
    state = optimizer.init(problem, seeds)
    for _ in range(steps):
        optimizer.step(problem, state)
    return state


@pytest.mark.parametrize("slice_size", [13, 10**6], ids=["slices", "at once"])
@pytest.mark.parametrize("depth", HIDDEN)
@pytest.mark.parametrize("loss", [SquaredError(), SquaredError(0.3), CrossEntropy(2.0, tolerance=1e-14)], ids=str)
def test_its_iterates_are_the_formulas(depth, loss, slice_size, monkeypatch):
    monkeypatch.setattr("admm.optimizers.bcd._SLICE", slice_size)
    problem = make(depth, loss=loss)
    start = a_start(problem, len(SEEDS))
    state = OPTIMIZER.init(problem, SEEDS, start)
    references = [Reference(problem, start, s, **PENALTIES) for s in range(len(SEEDS))]
    for _ in range(10):
        OPTIMIZER.step(problem, state)
        for s, reference in enumerate(references):
            reference.step()
            assert max(differences(state, s, reference)) < 1e-8


@pytest.mark.parametrize("depth", HIDDEN)
def test_its_weights_in_float32_are_the_formulas(depth):
    problem = make(depth, torch.float32)
    start = a_start(problem, 1)
    state, reference = OPTIMIZER.init(problem, (0,), start), Reference(problem, start, 0, **PENALTIES)
    for _ in range(10):
        OPTIMIZER.step(problem, state)
        reference.step()
        assert max(differences(state, 0, reference, ("weight",))) < 1e-3
    assert {t.dtype for name in NAMES for t in variables(state)[name]} == {torch.float32}


def test_its_weights_in_float32_are_near_the_formulas_with_hardly_any_proximal_term():
    """Four samples of six inputs: XᵀX is singular, and the rounding of float32 sums over α would be hundreds."""
    hardly = {"gamma": 0.7, "rho": 1.3, "alpha": 1e-10}
    problem = make(2, torch.float32, samples=4)
    start = a_start(problem, 1)
    state, reference = BCD(**hardly).init(problem, (0,), start), Reference(problem, start, 0, **hardly)
    for _ in range(10):
        BCD(**hardly).step(problem, state)
        reference.step()
        assert max(differences(state, 0, reference)) < 0.3


@pytest.mark.parametrize("depth", HIDDEN)
def test_the_literal_transcription_has_the_same_iterates(depth):
    problem = make(depth)
    state = OPTIMIZER.init(problem, (0,))
    ours = variables(state)
    weights, biases = ([t[0].clone() for t in ours[name]] for name in ("weight", "bias"))
    theirs = literal.forward(weights, biases, problem.x)
    for mine, other in zip(ours["u"] + ours["v"], theirs["u"] + theirs["v"], strict=True):
        torch.testing.assert_close(mine[0], other)
    for _ in range(10):
        OPTIMIZER.step(problem, state)
        literal.iterate(theirs, problem.x, problem.y, **PENALTIES)
        for name, mine in ours.items():
            for a, b in zip(mine, theirs[{"weight": "w", "bias": "b"}.get(name, name)], strict=True):
                assert float((a[0] - b).norm() / b.norm()) < 1e-8


LOSSES = [SquaredError(), CrossEntropy()]


@pytest.mark.parametrize("depth", HIDDEN)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("gamma, rho, alpha", [(1.0, 1.0, 5.0), (0.1, 4.0, 0.01), (5.0, 0.2, 1.0)])
def test_the_objective_never_rises(depth, loss, gamma, rho, alpha):
    problem, optimizer = make(depth, loss=loss), BCD(gamma, rho, alpha)
    for start in (None, a_start(problem, len(SEEDS))):
        state = optimizer.init(problem, SEEDS, start)
        before = first = optimizer.diagnostics(problem, state)["objective"]
        for _ in range(40):
            optimizer.step(problem, state)
            after = optimizer.diagnostics(problem, state)["objective"]
            assert (after <= before * (1.0 + 1e-12)).all()
            before = after
        assert (before < 0.9 * first).all()


def test_the_objective_is_the_printed_one():
    problem = make(4)
    state = OPTIMIZER.init(problem, SEEDS, a_start(problem, len(SEEDS)))
    values, now = OPTIMIZER.diagnostics(problem, state), variables(state)
    for s in range(len(SEEDS)):
        w, b, u, v = ([t[s].numpy() for t in now[name]] for name in NAMES)
        before = [problem.x.numpy(), *v[:-1]]
        residuals = [np.linalg.norm(u[i] - before[i] @ w[i].T - b[i]) for i in range(4)]
        activations = [np.linalg.norm(v[i] - np.maximum(u[i], 0)) for i in range(3)] + [np.linalg.norm(v[3] - u[3])]
        objective = 0.5 * np.sum((v[-1] - problem.y.numpy()) ** 2)
        objective += 0.35 * np.sum(np.square(activations)) + 0.65 * np.sum(np.square(residuals))
        assert values["objective"][s].item() == pytest.approx(objective, rel=1e-12)
        for i in range(4):
            assert values[f"residual_{i + 1}"][s].item() == pytest.approx(residuals[i] / np.linalg.norm(u[i]))
            assert values[f"activation_residual_{i + 1}"][s].item() == pytest.approx(
                activations[i] / np.linalg.norm(v[i])
            )


def assert_replica(state: Any, s: int, other: Any) -> None:
    for name in NAMES:
        for a, b in zip(variables(state)[name], variables(other)[name], strict=True):
            torch.testing.assert_close(a[s], b[0], rtol=1e-10, atol=1e-10)


def test_it_learns_without_being_given_a_start():
    problem = make(3, samples=200)
    state = trained(BCD(), problem, SEEDS, 60)
    outputs = problem.blocks.forward(state.theta, problem.x.expand(3, *problem.x.shape))
    assert ((outputs.argmax(2) == problem.y.argmax(1)).double().mean(1) > 0.6).all()  # chance: 0.33


def test_it_refuses_what_it_cannot_do(conv_problem):
    problem = make()
    with pytest.raises(ValueError, match=r"^network: BCD supports fully connected ReLU networks .*, not Conv2d, Tanh"):
        OPTIMIZER.init(conv_problem(), SEEDS)
    with pytest.raises(ValueError, match=r"^loss: NoProx has no prox; BCD needs an admm.losses.ProximalLoss"):
        OPTIMIZER.init(replace(problem, loss=NoProx()), SEEDS)
    for name in PENALTIES:
        with pytest.raises(ValueError, match=rf"^{name}: \(1.0, 0.0, 1.0\) is not positive"):
            replace(OPTIMIZER, **{name: (1.0, 0.0, 1.0)}).init(problem, SEEDS)
    with pytest.raises(ValueError, match=r"start: no variable \['w'\]; the variables are weight, bias, u, v"):
        OPTIMIZER.init(problem, SEEDS, {"w": []})
    with pytest.raises(ValueError, match=r"start\['bias'\]: shapes"):
        OPTIMIZER.init(problem, SEEDS, {"bias": [torch.zeros(3, 2)]})
