"""dlADMM against its formulas in plain NumPy, a literal search, and what theory promises."""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from admm.blocks import split
from admm.checkpoints import restore, save
from admm.losses import CrossEntropy, Loss, SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import Problem
from admm.optimizers.dladmm import DLADMM, DLADMMState, _Sweep
from admm.optimizers.fully_connected import linear_layers
from scripts.literal import dladmm as literal

SEEDS = (5, 0, 11)
WIDTHS = {2: [7], 3: [6, 5], 4: [6, 5, 7]}
# ρ of a size where the searches have something to do; starts from which some need no doubling, others several.
STRONG = DLADMM(rho=0.02, theta=0.003, tau=0.004, deviation=0.4)


def make_problem(depth: int = 3, loss: Any = None, dtype: torch.dtype = torch.float64, samples: int = 40) -> Problem:
    random = torch.Generator().manual_seed(3)
    x = torch.rand(samples, 6, dtype=torch.float64, generator=random).to(dtype)
    y = one_hot(torch.randint(3, (samples,), generator=random), 3, x)
    return Problem(
        x, y, split(mlp(6, WIDTHS[depth], 3), per_layer=True), loss or CrossEntropy(), initialiser("pytorch")
    )


def starting(problem: Problem, seed: int = 0, noise: float = 0.3) -> dict[str, list[Tensor]]:
    """Starting values of one replica that satisfy no constraint."""
    state = STRONG.init(problem, (seed,))
    random = torch.Generator().manual_seed(7)
    layers = linear_layers(problem, state.theta, "dladmm")

    def near(value: Tensor) -> Tensor:
        return value + noise * torch.randn(value.shape, dtype=torch.float64, generator=random).to(value)

    return {
        "weight": [near(layer["weight"]) for layer in layers],
        "bias": [near(layer["bias"]) for layer in layers],
        "z": [near(z) for z in state.z],
        "a": [near(a) for a in state.a],
        "u": [near(u).mul_(0.1) for u in state.u],
    }


@dataclass
class Reference:
    """One replica in NumPy, samples as rows, every quantity evaluated from the definition when it is needed."""

    x: np.ndarray
    y: np.ndarray
    squared: bool
    scale: float
    options: DLADMM
    w: list[np.ndarray]
    b: list[np.ndarray]
    z: list[np.ndarray]
    a: list[np.ndarray]
    u: np.ndarray

    def __post_init__(self) -> None:
        self.rho, self.theta, self.tau = self.options.rho, self.options.theta, self.options.tau
        self.costs: list[float] = []
        self.thetas: list[list[float]] = []
        self.taus: list[list[float]] = []
        self.changes: list[tuple[str, float, float]] = []  # of every subproblem: name, objective before and after
        self.ties = 0

    def phi(self, layer: int, w: Any = None, b: Any = None, z: Any = None, a: Any = None) -> float:
        """φ of layer 0..L−1, with some variables replaced."""
        a = (self.x if layer == 0 else self.a[layer - 1]) if a is None else a
        w, b, z = (own[layer] if v is None else v for v, own in ((w, self.w), (b, self.b), (z, self.z)))
        u = self.u if layer == len(self.w) - 1 else 0.0
        return float(self.rho / 2 * np.sum((z - a @ w.T - b + u / self.rho) ** 2))

    def gradient(self, layer: int) -> np.ndarray:
        """of φ by Z_{layer} times −1: ρ (A Wᵀ + b − Z − u/ρ)"""
        a = self.x if layer == 0 else self.a[layer - 1]
        u = self.u if layer == len(self.w) - 1 else 0.0
        return self.rho * (a @ self.w[layer].T + self.b[layer] - self.z[layer] - u / self.rho)

    def search(self, name: str, objective: Any, at: np.ndarray, slope: np.ndarray, curvature: float) -> Any:
        """The literal doubling search, which evaluates both sides at every trial."""
        first = objective(at)
        while True:
            change = -slope / curvature
            gap = objective(at + change) - (first + np.sum(slope * change) + curvature / 2 * np.sum(change**2))
            self.ties += abs(gap) < 100 * np.finfo(float).eps * first
            if gap <= 0:
                self.changes.append((name, first, objective(at + change)))
                return at + change, curvature
            curvature *= 2

    def w_step(self, layer: int) -> None:
        a = self.x if layer == 0 else self.a[layer - 1]
        slope = self.gradient(layer).T @ a
        self.w[layer], theta = self.search(
            f"w{layer}", lambda w: self.phi(layer, w=w), self.w[layer], slope, self.theta
        )
        self.thetas[-1].append(theta)

    def a_step(self, layer: int) -> None:
        relu = np.maximum(self.z[layer], 0)
        slope = self.gradient(layer + 1) @ self.w[layer + 1] + self.rho * (self.a[layer] - relu)

        def objective(a: np.ndarray) -> float:
            return self.phi(layer + 1, a=a) + float(self.rho / 2 * np.sum((a - relu) ** 2))

        self.a[layer], tau = self.search(f"a{layer}", objective, self.a[layer], slope, self.tau)
        self.taus[-1].append(tau)

    def b_step(self, layer: int) -> None:
        before = self.phi(layer)
        self.b[layer] = self.b[layer] - self.gradient(layer).mean(0) / self.rho
        self.changes.append((f"b{layer}", before, self.phi(layer)))

    def z_objective(self, layer: int, z: np.ndarray) -> float:
        if layer == len(self.w) - 1:
            return self.loss(z) + self.phi(layer, z=z)
        return self.phi(layer, z=z) + float(self.rho / 2 * np.sum((self.a[layer] - np.maximum(z, 0)) ** 2))

    def z_step(self, layer: int) -> None:
        before = self.z_objective(layer, self.z[layer])
        a = self.x if layer == 0 else self.a[layer - 1]
        m = a @ self.w[layer].T + self.b[layer]
        if layer == len(self.w) - 1:
            self.z[layer] = self.fista(m)
        else:
            candidates = np.minimum(m, 0), np.maximum((m + self.a[layer]) / 2, 0)
            value = [(z - m) ** 2 + (self.a[layer] - np.maximum(z, 0)) ** 2 for z in candidates]
            self.z[layer] = np.where(value[0] > value[1], candidates[1], candidates[0])
        self.changes.append((f"z{layer}", before, self.z_objective(layer, self.z[layer])))

    def loss(self, z: np.ndarray) -> float:
        if self.squared:
            return float(self.scale * 0.5 * np.sum((z - self.y) ** 2))
        return float(self.scale * np.sum(np.log(np.sum(np.exp(z), 1)) - np.sum(z * self.y, 1)))

    def fista(self, m: np.ndarray) -> np.ndarray:
        step, rho, z = (1.0 if self.squared else 4.0) / self.scale, self.rho, self.z[-1]
        zeta, weight, value = z, 1.0, math.inf
        for _ in range(self.options.fista_steps):
            last, value = value, self.z_objective(len(self.w) - 1, z)
            if abs(value - last) < self.options.fista_tolerance:
                break
            slope = z - self.y if self.squared else np.exp(z) / np.exp(z).sum(1, keepdims=True) - self.y
            slope = self.scale * slope
            old, last_weight = zeta, weight
            weight = (1 + math.sqrt(1 + 4 * weight**2)) / 2
            # argmin ⟨slope, ζ⟩ + ‖ζ − z‖²/(2 step) + ρ/2 ‖ζ − m + u/ρ‖²
            zeta = (z / step - slope + rho * (m - self.u / rho)) / (1 / step + rho)
            z = zeta + (last_weight - 1) / weight * (zeta - old)
        return z

    def iterate(self) -> None:
        self.thetas.append([])
        self.taus.append([])
        last = len(self.w) - 1
        for layer in range(last, -1, -1):
            self.z_step(layer)
            self.b_step(layer)
            self.w_step(layer)
            if layer > 0:
                self.a_step(layer - 1)
        for layer in range(last + 1):
            self.w_step(layer)
            self.b_step(layer)
            self.z_step(layer)
            if layer < last:
                self.a_step(layer)
        self.u = -self.gradient(last)
        output = self.x
        for w, b in zip(self.w, self.b, strict=True):
            output = (output if output is self.x else np.maximum(output, 0)) @ w.T + b
        self.costs.append(self.loss(output) / len(self.x))
        if len(self.costs) > 3 and all(self.costs[-k] > self.costs[-k - 1] for k in (1, 2, 3)):
            self.rho = min(10 * self.rho, 0.1)
            if max((a.shape[1] for a in self.a), default=0) >= self.options.wide:
                self.theta, self.tau = 10 * self.theta, 10 * self.tau


def reference(problem: Problem, start: dict[str, list[Tensor]], options: DLADMM) -> Reference:
    arrays = {name: [v[0].double().numpy() for v in values] for name, values in start.items()}
    squared = isinstance(problem.loss, SquaredError)
    x, y = problem.x.double().numpy(), problem.y.double().numpy()
    names = ("weight", "bias", "z", "a")
    return Reference(x, y, squared, problem.loss.scale, options, *(arrays[n] for n in names), arrays["u"][0])


def variables(problem: Problem, state: DLADMMState) -> dict[str, list[np.ndarray]]:
    layers = linear_layers(problem, state.theta, "dladmm")
    named = {"w": [v["weight"] for v in layers], "b": [v["bias"] for v in layers], "z": state.z, "a": state.a}
    return {name: [v[0].numpy() for v in values] for name, values in named.items()} | {"u": [state.u[0][0].numpy()]}


def assert_close(ours: Any, theirs: Any, tolerance: float, name: str = "") -> None:
    """Relative to the largest entry."""
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name


def in_order(accepted: list[Tensor]) -> list[float]:
    """Of one replica in the order of the updates: backward from the last, then forward from the first."""
    return [float(c[0, 0]) for c in accepted[::-1]] + [float(c[0, 1]) for c in accepted]


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError(), CrossEntropy(0.7), SquaredError(1.6)], ids=str)
@pytest.mark.parametrize("options", [STRONG, replace(STRONG, rho=2e-4, theta=1e-5, tau=1.0, wide=3)], ids=["1", "2"])
def test_iterates_and_accepted_curvatures_are_the_formulas(depth, loss, options):
    problem = make_problem(depth, loss)
    start = starting(problem)
    expected, state = reference(problem, start, options), options.init(problem, (0,), start)
    doublings = set()
    for _ in range(10):
        expected.iterate()
        options.step(problem, state)
        assert expected.ties == 0  # where rounding could decide
        assert in_order(state.accepted_theta) == expected.thetas[-1]
        assert in_order(state.accepted_tau) == expected.taus[-1]
        doublings |= {round(math.log2(theta / expected.theta)) for theta in expected.thetas[-1]}
        ours = variables(problem, state)
        for name in ours:
            theirs = [expected.u] if name == "u" else getattr(expected, name)
            for number, (own, other) in enumerate(zip(ours[name], theirs, strict=True)):
                assert_close(own, other, 1e-8, f"{name}{number}")
        assert_close(state.rho.numpy(), np.array([expected.rho]), 1e-12)
    assert max(doublings) >= 3  # the searches did search


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_float32_weights_are_the_formulas(depth):
    problem = make_problem(depth, dtype=torch.float32)
    start = starting(problem)
    expected, state = reference(problem, start, STRONG), STRONG.init(problem, (0,), start)
    for _ in range(10):
        expected.iterate()
        STRONG.step(problem, state)
    for own, other in zip(variables(problem, state)["w"], expected.w, strict=True):
        assert own.dtype == np.float32
        assert_close(own, other, 1e-3)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["cross-entropy", "squared error"])
def test_iterates_are_those_of_the_literal_transcription(depth, loss):
    problem, name = make_problem(depth, loss), "cross_entropy" if isinstance(loss, CrossEntropy) else "squared_error"
    start = starting(problem)
    state = STRONG.init(problem, (0,), start)
    theirs = literal.Variables(
        w=[w[0] for w in start["weight"]],
        b=[b[0][:, None] for b in start["bias"]],
        z=[z[0].T for z in start["z"]],
        a=[a[0].T for a in start["a"]],
        u=start["u"][0][0].T,
        rho=STRONG.rho,
        theta=STRONG.theta,
        tau=STRONG.tau,
    )
    for _ in range(10):
        literal.iterate(theirs, problem.x.T, problem.y.T, name, 4.0 if name == "cross_entropy" else 1.0)
        STRONG.step(problem, state)
        assert in_order(state.accepted_theta) == theirs.accepted_theta
        assert in_order(state.accepted_tau) == theirs.accepted_tau
    ours = variables(problem, state)
    for number in range(depth):
        assert_close(ours["w"][number], theirs.w[number].numpy(), 1e-8)
        assert_close(ours["b"][number], theirs.b[number].numpy()[:, 0], 1e-8)
        assert_close(ours["z"][number], theirs.z[number].numpy().T, 1e-8)
    for own, other in zip(ours["a"], theirs.a, strict=True):
        assert_close(own, other.numpy().T, 1e-8)
    assert_close(ours["u"][0], theirs.u.numpy().T, 1e-8)
    assert float(state.cost) == pytest.approx(theirs.costs[-1], rel=1e-8)


def objective(problem: Problem, state: DLADMMState, name: str, layer: int) -> Tensor:
    """Of the subproblem of a variable of layer l = 1..L, [S], from the definition."""
    layers, last = linear_layers(problem, state.theta, "dladmm"), len(state.z)
    rho = state.rho

    def phi(number: int) -> Tensor:
        before = problem.x if number == 1 else state.a[number - 2]
        weight, bias = layers[number - 1]["weight"], layers[number - 1]["bias"]
        u = state.u[0] / rho[:, None, None] if number == last else 0.0
        residual = state.z[number - 1] - before @ weight.mT - bias[:, None] + u
        return rho / 2 * residual.square().sum((1, 2))

    def coupling(number: int) -> Tensor:
        return rho / 2 * (state.a[number - 1] - state.z[number - 1].relu()).square().sum((1, 2))

    if name == "a":
        return phi(layer + 1) + coupling(layer)
    if name == "z" and layer == last:
        return phi(layer) + problem.loss.value(state.z[-1], problem.y).sum(1)
    return phi(layer) + (coupling(layer) if name == "z" else 0.0)


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["cross-entropy", "squared error"])
@pytest.mark.parametrize("rho", [0.02, 1e-6])
def test_no_inner_step_increases_its_subproblem(loss, rho, monkeypatch):
    """All updates of 20 iterations of three replicas, on what `step` itself calls."""
    problem, options = make_problem(3, loss), replace(STRONG, rho=rho)
    state = options.init(problem, SEEDS)
    seen = []

    def checked(name, update):
        def run(self, layer, *sweep):
            before = objective(problem, state, name, layer)
            update(self, layer, *sweep)
            after = objective(problem, state, name, layer)
            # FISTA is not monotone: it promises an end within its tolerance of where it was.
            slack = options.fista_tolerance if (name, layer) == ("z", 3) else 1e-13 * before
            assert (after <= before + slack).all(), (name, layer)
            seen.append((name, layer, bool((after < before).any())))

        return run

    for name in ("z", "b", "w", "a"):
        monkeypatch.setattr(_Sweep, f"update_{name}", checked(name, getattr(_Sweep, f"update_{name}")))
    for _ in range(20):
        options.step(problem, state)
    assert len(seen) == 20 * 2 * (3 * 3 + 2)
    assert {(name, layer) for name, layer, fell in seen if fell} == {(name, layer) for name, layer, _ in seen}


def test_the_error_of_the_state_is_the_constraint():
    """After 30 iterations of corrections by linearity."""
    problem = make_problem(4)
    state = STRONG.init(problem, SEEDS)
    for _ in range(30):
        STRONG.step(problem, state)
    layers = linear_layers(problem, state.theta, "dladmm")
    for number, (views, z, error) in enumerate(zip(layers, state.z, state.error, strict=True)):
        before = problem.x if number == 0 else state.a[number - 1]
        expected = before @ views["weight"].mT + views["bias"][:, None] - z
        if number == 3:
            expected -= state.u[0] / state.rho[:, None, None]
        torch.testing.assert_close(error, expected, rtol=0.0, atol=1e-12 * float(z.abs().max() + expected.abs().max()))


def test_z_of_a_hidden_layer_is_the_minimiser_of_a_grid():
    problem = make_problem(2)
    m, a = torch.meshgrid(torch.linspace(-2, 2, 7).double(), torch.linspace(-1.9, 2.1, 40).double(), indexing="ij")
    start = {"weight": [torch.zeros(1, 7, 6), torch.zeros(1, 3, 7)], "bias": [m[:, 0][None].clone(), torch.zeros(1, 3)]}
    start |= {"a": [a.T[None].clone()]}
    state = STRONG.init(problem, (0,), start)
    _Sweep(STRONG, problem, state).update_z(1)
    z = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for i in range(7):
        for j in range(40):
            values = (z - m[i, j]) ** 2 + (a[i, j] - z.relu()) ** 2
            ours = state.z[0][0, j, i]
            assert float((ours - m[i, j]) ** 2 + (a[i, j] - ours.relu()) ** 2) <= float(values.min()) + 1e-15


@pytest.mark.parametrize("rises, wide, expected", [(3, 100, (1e-3, 1.0)), (3, 5, (1e-3, 10.0)), (2, 5, (1e-2, 100.0))])
def test_the_schedule_waits_for_rises_in_a_row_of_each_replica(rises, wide, expected):
    """Costs by hand: replica 0 rises three times after its first value, replica 1 is interrupted."""
    options = DLADMM(rho=1e-4, rises=rises, wide=wide)
    state = options.init(make_problem(3), (0, 1))
    for costs in ([1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 3.0]):
        options._schedule(state, torch.tensor(costs, dtype=torch.float64))
    interrupted = (1e-4, 1.0) if rises == 3 else (1e-3, 10.0)
    for s, (rho, start) in enumerate((expected, interrupted)):
        assert float(state.rho[s]) == pytest.approx(rho)
        assert float(state.theta_start[s]) == float(state.tau_start[s]) == start


def test_the_schedule_stops_at_its_largest_penalty():
    options = DLADMM(rho=0.05, rises=1)
    state = options.init(make_problem(3), (0,))
    for cost in (1.0, 2.0, 3.0):
        options._schedule(state, torch.tensor([cost], dtype=torch.float64))
    assert float(state.rho) == 0.1


def test_the_training_cost_is_the_mean_loss_of_a_forward_pass(monkeypatch):
    monkeypatch.setattr("admm.optimizers.dladmm._SLICE", 17)  # 40 samples in three slices
    problem = make_problem(3)
    state = STRONG.step(problem, STRONG.init(problem, SEEDS))
    output = problem.blocks.forward(state.theta, problem.x.expand(3, -1, -1))
    torch.testing.assert_close(state.cost, problem.loss.value(output, problem.y).mean(1), rtol=1e-12, atol=0.0)


def tensors(saved: Any) -> list[Tensor]:
    if isinstance(saved, dict):
        return tensors([saved[name] for name in saved if name not in ("seeds", "iteration", "gram")])
    return [t for item in saved for t in tensors(item)] if isinstance(saved, list) else [saved]


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["cross-entropy", "squared error"])
def test_a_stack_of_different_hyperparameters_is_its_replicas_alone(loss):
    """Also of different numbers of FISTA's steps: their tolerances differ."""
    problem = make_problem(3, loss)
    grid = {
        "rho": (0.02, 1e-4, 1e-3),
        "theta": (0.003, 1.0, 1e-5),
        "tau": (0.004, 1e-4, 1.0),
        "deviation": (0.4, 0.1, 0.2),
        "fista_tolerance": (1e-3, 1e-6, 1.0),
        "fista_curvature": (1.0, 1.5, 2.0),
        "rho_factor": (10.0, 2.0, 3.0),
        "rho_max": (0.1, 0.01, 0.05),
        "start_factor": (10.0, 2.0, 1.0),
    }
    common = DLADMM(wide=5, rises=1)
    together = replace(common, **grid)
    state = together.init(problem, SEEDS)
    alone = []
    for s, seed in enumerate(SEEDS):
        options = replace(common, **{name: values[s] for name, values in grid.items()})
        alone.append((options, options.init(problem, (seed,))))
    for _ in range(8):
        together.step(problem, state)
        for options, own in alone:
            options.step(problem, own)
    for s, (_, own) in enumerate(alone):
        for stacked, single in zip(tensors(save(state)), tensors(save(own)), strict=True):
            torch.testing.assert_close(stacked[s], single[0], rtol=1e-10, atol=1e-10)
    assert (state.rho != torch.tensor(grid["rho"], dtype=torch.float64)).any()  # the schedule has acted


def test_resuming_from_a_checkpoint_is_bit_identical():
    problem, options = make_problem(4), replace(STRONG, rises=1, wide=5)
    through, half = options.init(problem, SEEDS), options.init(problem, SEEDS)
    for _ in range(4):
        options.step(problem, through)
    for _ in range(2):
        options.step(problem, half)
    buffer = io.BytesIO()
    torch.save(save(half), buffer)
    buffer.seek(0)
    resumed = options.init(problem, SEEDS)
    restore(resumed, torch.load(buffer, weights_only=True))
    for _ in range(2):
        options.step(problem, resumed)
    assert resumed.iteration == 4
    assert all(torch.equal(a, b) for a, b in zip(tensors(save(resumed)), tensors(save(through)), strict=True))


def test_the_authors_start():
    problem = make_problem(3, samples=200)
    state = DLADMM(deviation=0.1).init(problem, tuple(range(40)))
    assert state.theta.flat().std().item() == pytest.approx(0.1, rel=0.05) and abs(state.theta.flat().mean()) < 0.01
    x = problem.x.expand(40, -1, -1)
    layers = linear_layers(problem, state.theta, "dladmm")
    torch.testing.assert_close(state.z[0], x @ layers[0]["weight"].mT + layers[0]["bias"][:, None])
    torch.testing.assert_close(state.a[0], state.z[0].relu())
    torch.testing.assert_close(state.z[1], state.a[0] @ layers[1]["weight"].mT + layers[1]["bias"][:, None])
    assert torch.equal(state.z[2], (2 * problem.y - 1).expand(40, -1, -1))
    assert not state.u[0].any()


class Unknown(Loss):
    """The cross-entropy, as a loss of which only the value and the gradient are known."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return CrossEntropy().value(z, y)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return CrossEntropy().gradient(z, y)

    def prox(self, v: Tensor, y: Tensor, penalty: float | Tensor) -> Tensor:
        raise NotImplementedError


def test_any_loss_with_value_and_gradient_trains():
    problem, options = make_problem(3, Unknown()), replace(STRONG, fista_curvature=0.25)
    state, known = options.init(problem, SEEDS), STRONG.init(make_problem(3), SEEDS)
    for _ in range(5):
        options.step(problem, state)
        STRONG.step(make_problem(3), known)
    torch.testing.assert_close(state.theta.flat(), known.theta.flat(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"fista_curvature: None is for CrossEntropy and SquaredError; give a number"):
        DLADMM().init(problem, SEEDS)


def test_diagnostics():
    problem = make_problem(3)
    state = STRONG.step(problem, STRONG.init(problem, SEEDS))
    values = STRONG.diagnostics(problem, state)
    names = {"rho", *(f"residual_{n}" for n in (1, 2, 3)), *(f"theta_{n}" for n in (1, 2, 3)), "tau_1", "tau_2"}
    assert set(values) == names and all(v.shape == (3,) and v.isfinite().all() for v in values.values())
    last = linear_layers(problem, state.theta, "dladmm")[-1]
    residual = state.z[-1] - state.a[-1] @ last["weight"].mT - last["bias"][:, None]
    norms = [torch.linalg.vector_norm(v, dim=(1, 2)) for v in (residual, state.z[-1])]
    torch.testing.assert_close(values["residual_3"], norms[0] / norms[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": 0.0}, "rho: 0.0 is not positive"),
        ({"tau": (1.0, 0.0)}, "tau: .* is not positive"),
        ({"theta": (1.0, 1.0, 1.0)}, "theta: 3 values for 2 replicas"),
        ({"fista_steps": 0}, "fista_steps: 0 is not a whole number from 1 up"),
        ({"fista_curvature": 0.25}, "fista_curvature: 0.25 is below 1.0, the scale of SquaredError"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DLADMM(**options).init(make_problem(3, SquaredError()), (0, 1))


def test_what_it_cannot_do_is_refused(conv_problem):
    with pytest.raises(ValueError, match=r"^network: DLADMM supports fully connected ReLU networks"):
        DLADMM().init(conv_problem(), SEEDS)
    problem = make_problem(3)
    network = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="with a bias in every layer"):
        DLADMM().init(replace(problem, blocks=split(network, per_layer=True)), SEEDS)
    with pytest.raises(ValueError, match=r"no variable \['v'\]; the variables are weight, bias, z, a, u"):
        DLADMM().init(problem, SEEDS, {"v": []})
    with pytest.raises(ValueError, match=r"start\['u'\]: shapes"):
        DLADMM().init(problem, SEEDS, {"u": [torch.zeros(1, 40, 3)]})


def test_a_single_layer_trains():
    problem = make_problem(3)
    problem = replace(problem, blocks=split(mlp(6, [], 3), per_layer=True))
    state = STRONG.init(problem, SEEDS)
    first = STRONG.step(problem, state).cost.clone()
    for _ in range(20):
        STRONG.step(problem, state)
    assert (state.cost < first).all()
