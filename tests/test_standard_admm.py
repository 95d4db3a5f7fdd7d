"""Standard ADMM against a plain NumPy transcription of Algorithm 3, from the same starting variables."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fully_connected import SEEDS, NoProx, assert_close, converted, depths, gaussian, make, trained
from torch import Tensor

from admm.blocks import split
from admm.losses import CrossEntropy, Hinge, SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers.protocol import Problem
from admm.optimizers.standard_admm import StandardADMM, StandardADMMState
from scripts.literal import standard_admm as literal

NAMES = ("weight", "bias", "z", "u", "a", "v")
ADMM = StandardADMM(beta=2.0, gamma=3.0, weight_decay=0.05, slice_size=13)


def variables_of(problem: Problem, state: StandardADMMState) -> dict[str, list[Tensor]]:
    layers = [layer for block in state.theta.blocks for layer in block if layer]
    own = {name: [layer[name] for layer in layers] for name in ("weight", "bias")}
    return own | {"z": state.z, "a": state.a, "u": state.u, "v": state.v}


@dataclass
class Reference:
    """One replica in NumPy: Eq. 11 and its minimisers, layer by layer as Algorithm 3 is printed."""

    x: np.ndarray
    y: np.ndarray
    w: list[np.ndarray]  # [W b]
    z: list[np.ndarray]
    a: list[np.ndarray]
    u: list[np.ndarray]
    v: list[np.ndarray]
    beta: float
    gamma: float
    weight_decay: float
    scale: float

    def before(self, number: int) -> np.ndarray:
        a = self.x if number == 0 else self.a[number - 1]
        return np.hstack([a, np.ones((len(a), 1))])

    def lagrangian(self, u: list[np.ndarray], v: list[np.ndarray]) -> float:
        """Eq. 11 with the duals u and v."""
        value = self.scale / 2 * ((self.z[-1] - self.y) ** 2).sum()
        for number, w in enumerate(self.w):
            residual = self.z[number] - self.before(number) @ w.T + u[number]
            value += self.weight_decay * (w**2).sum() + self.beta / 2 * (residual**2).sum()
        for a, z, own in zip(self.a, self.z, v, strict=False):
            value += self.gamma / 2 * ((a - np.maximum(z, 0) + own) ** 2).sum()
        return float(value)

    def iterate(self) -> None:
        last, beta, gamma = len(self.w) - 1, self.beta, self.gamma
        for number in range(last + 1):
            b = self.before(number)
            system = beta * b.T @ b + 2 * self.weight_decay * np.eye(b.shape[1])
            self.w[number] = np.linalg.solve(system, beta * b.T @ (self.z[number] + self.u[number])).T
        for number in range(last):
            p = self.before(number) @ self.w[number].T - self.u[number]
            q = self.a[number] + self.v[number]
            pieces = np.stack([np.minimum(p, 0), np.maximum((beta * p + gamma * q) / (beta + gamma), 0)])
            values = beta / 2 * (pieces - p) ** 2 + gamma / 2 * (q - np.maximum(pieces, 0)) ** 2
            self.z[number] = np.where(values[1] < values[0], pieces[1], pieces[0])
            weight, bias = self.w[number + 1][:, :-1], self.w[number + 1][:, -1]
            target = self.z[number + 1] + self.u[number + 1] - bias
            right = beta * weight.T @ target.T + gamma * (np.maximum(self.z[number], 0) - self.v[number]).T
            self.a[number] = np.linalg.solve(beta * weight.T @ weight + gamma * np.eye(len(right)), right).T
        p = self.before(last) @ self.w[last].T - self.u[last]
        self.z[last] = (self.scale * self.y + beta * p) / (self.scale + beta)
        for number in range(last + 1):
            self.u[number] = self.u[number] + self.z[number] - self.before(number) @ self.w[number].T
        for number in range(last):
            self.v[number] = self.v[number] + self.a[number] - np.maximum(self.z[number], 0)

    def variables(self) -> dict[str, list[np.ndarray]]:
        w = {"weight": [w[:, :-1] for w in self.w], "bias": [w[:, -1] for w in self.w]}
        return w | {"z": self.z, "a": self.a, "u": self.u, "v": self.v}


def reference(problem: Problem, given: dict[str, list[Tensor]], s: int, admm: StandardADMM) -> Reference:
    own = {name: [t[s].numpy().copy() for t in tensors] for name, tensors in given.items()}
    w = [np.column_stack([w, b]) for w, b in zip(own.pop("weight"), own.pop("bias"), strict=True)]
    x, y = problem.x.flatten(1).double().numpy(), problem.y.double().numpy()
    return Reference(x, y, w, **own, beta=admm.beta, gamma=admm.gamma, weight_decay=admm.weight_decay, scale=0.7)


@depths
def test_iterates_are_the_reference_s(hidden):
    problem, given = make(hidden), gaussian(hidden, 3, NAMES)
    state = ADMM.init(problem, SEEDS, given)
    references = [reference(problem, given, s, ADMM) for s in range(3)]
    for _ in range(10):
        ADMM.step(problem, state)
        for s, own in enumerate(references):
            own.iterate()
            assert_close(variables_of(problem, state), s, own.variables(), 1e-8)


@depths
def test_float32_weights_are_the_reference_s(hidden):
    problem, given = make(hidden, dtype=torch.float32), gaussian(hidden, 1, NAMES)
    state, own = ADMM.init(problem, (0,), converted(given, torch.float32)), reference(problem, given, 0, ADMM)
    for _ in range(10):
        ADMM.step(problem, state)
        own.iterate()
        weights = {"weight": own.variables()["weight"]}
        assert_close(variables_of(problem, state), 0, weights, 1e-3)
    assert state.z[0].dtype == torch.float32


@depths
def test_the_literal_transcription_has_the_same_iterates(hidden):
    problem, given = make(hidden), gaussian(hidden, 1, NAMES)
    state = ADMM.init(problem, (0,), given)
    theirs = {name: [t[0].clone() for t in given[name]] for name in "zauv"}
    pairs = zip(given["weight"], given["bias"], strict=True)
    theirs["w"] = [torch.cat([w[0], b[0, :, None]], 1) for w, b in pairs]
    for _ in range(10):
        ADMM.step(problem, state)
        literal.iterate(theirs, problem.x.flatten(1), problem.y, ADMM.beta, ADMM.gamma, ADMM.weight_decay, 0.7)
        w = {"weight": [w[:, :-1] for w in theirs["w"]], "bias": [w[:, -1] for w in theirs["w"]]}
        assert_close(variables_of(problem, state), 0, w | {name: theirs[name] for name in "zauv"}, 1e-8)


@depths
def test_primal_updates_never_raise_the_augmented_lagrangian(hidden):
    problem = make(hidden)
    state = ADMM.init(problem, SEEDS, gaussian(hidden, 3, NAMES))
    for _ in range(10):
        before = {name: [t.clone() for t in tensors] for name, tensors in variables_of(problem, state).items()}
        ADMM.step(problem, state)
        for s in range(3):
            old = reference(problem, before, s, ADMM)
            new = reference(problem, variables_of(problem, state), s, ADMM)
            assert new.lagrangian(old.u, old.v) < old.lagrangian(old.u, old.v)


@pytest.mark.parametrize("loss", [SquaredError(0.7), CrossEntropy(2.0, tolerance=1e-12)], ids=str)
def test_the_last_dual_carries_the_loss_s_gradient(loss):
    problem = make([5, 4], loss)
    state = ADMM.init(problem, SEEDS, gaussian([5, 4], 3, NAMES))
    ADMM.step(problem, state)
    expected = -loss.gradient(state.z[-1], problem.y) / ADMM.beta
    torch.testing.assert_close(state.u[-1], expected, rtol=1e-9, atol=1e-10)


def test_a_hinge_s_last_update_is_the_lowest_point_of_a_grid():
    problem = make([5], Hinge(1.5))
    state = ADMM.init(problem, (0,), gaussian([5], 1, NAMES))
    dual = state.u[-1].clone()
    ADMM.step(problem, state)
    p = state.z[-1] - state.u[-1]  # W_L A_{L−1} − U_L
    torch.testing.assert_close(p[0], _output(problem, state) - dual[0])
    grid = torch.linspace(-8.0, 8.0, 16001, dtype=torch.float64)
    for n, c in [(0, 0), (0, 1), (7, 2), (20, 0)]:
        loss = 1.5 * (torch.relu(1 - grid) if problem.y[n, c] == 1 else torch.relu(grid))
        objective = loss + ADMM.beta / 2 * (grid - p[0, n, c]) ** 2
        assert abs(grid[objective.argmin()] - state.z[-1][0, n, c]) <= 1e-3


def _output(problem: Problem, state: StandardADMMState) -> Tensor:
    """W_L A_{L−1} + b_L of the first replica."""
    layer = variables_of(problem, state)
    return state.a[-1][0] @ layer["weight"][-1][0].T + layer["bias"][-1][0]


def test_residuals_are_those_of_the_constraints():
    problem = make([5, 4])
    state = ADMM.step(problem, ADMM.init(problem, SEEDS, gaussian([5, 4], 3, NAMES)))
    values = ADMM.diagnostics(problem, state)
    for s in range(3):
        own = reference(problem, variables_of(problem, state), s, ADMM)
        for number, w in enumerate(own.w):
            residual = own.z[number] - own.before(number) @ w.T
            expected = {
                "residual": np.linalg.norm(residual) / np.linalg.norm(own.z[number]),
                "dual_rms": np.sqrt((own.u[number] ** 2).mean()),
            }
            if number < 2:
                gap = own.a[number] - np.maximum(own.z[number], 0)
                expected["activation_residual"] = np.linalg.norm(gap) / np.linalg.norm(own.a[number])
                expected["activation_dual_rms"] = np.sqrt((own.v[number] ** 2).mean())
            for name, value in expected.items():
                assert values[f"{name}_{number + 1}"][s].item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("admm", [StandardADMM(), StandardADMM(0.01, 0.01, start_from="forward")], ids=str)
def test_training_from_its_own_start_learns(admm):
    """The first in the paper's setting: β = γ = 10, λ = 5e-5, U(0, 1e-4)."""
    problem = make([8, 8])
    state = admm.init(problem, SEEDS)
    for _ in range(200):
        admm.step(problem, state)
    output = problem.blocks.forward(state.theta, problem.x.expand(3, *problem.x.shape))
    assert ((output.argmax(2) == problem.y.argmax(1)).double().mean(1) > 0.85).all()


def test_the_uniform_start_is_uniform_and_the_forward_start_feasible():
    problem = make([5, 4])
    state = StandardADMM(spread=(1e-4, 1e-2, 1.0)).init(problem, SEEDS)
    for tensors in variables_of(problem, state).values():
        for tensor in tensors:
            for own, spread in zip(tensor, (1e-4, 1e-2, 1.0), strict=True):
                assert 0 <= own.min() < own.max() <= spread and (own.max() > 0.8 * spread or own.numel() < 30)
    state = StandardADMM(start_from="forward").init(problem, SEEDS)
    values = StandardADMM().diagnostics(problem, state)
    assert all(value.abs().max() < 1e-12 for name, value in values.items() if "residual" in name or "dual" in name)
    assert torch.equal(state.theta.flat(), problem.initial(SEEDS).flat())


GRID = {"beta": (2.0, 1.0, 5.0), "gamma": (3.0, 3.0, 0.5), "weight_decay": (0.0, 0.1, 5.0), "spread": (1.0, 0.1, 0.01)}


@pytest.mark.parametrize("grid", [{}, GRID], ids=["one value", "one a replica"])
@pytest.mark.parametrize("start_from", ["uniform", "forward"])
def test_a_stack_is_its_replicas_alone(grid, start_from):
    problem, admm = make([5, 4]), replace(ADMM, spread=1.0, start_from=start_from)
    together = trained(replace(admm, **grid), problem, SEEDS)
    for s, seed in enumerate(SEEDS):
        alone = trained(replace(admm, **{name: values[s] for name, values in grid.items()}), problem, (seed,))
        theirs = {name: [t[0] for t in tensors] for name, tensors in variables_of(problem, alone).items()}
        assert_close(variables_of(problem, together), s, theirs, 1e-10)
    assert not torch.allclose(together.theta.flat()[0], together.theta.flat()[1])


def test_a_constant_input_does_not_spoil_the_float32_regression():
    """MNIST has pixels that are always 0; XᵀX + 2λ/β I is then far beyond float32."""
    problem = make([5], dtype=torch.float32)
    problem.x[:, 0, 0] = 0.0
    admm = StandardADMM(weight_decay=5e-5)
    state = admm.init(problem, (0,), converted(gaussian([5], 1, NAMES), torch.float32))
    admm.step(problem, state)
    weight = variables_of(problem, state)["weight"][0][0]
    assert state.theta.flat().isfinite().all() and (weight[:, 0] == 0).all() and (weight[:, 1:] != 0).all()


@pytest.mark.parametrize("weight_decay", [0.0, 5e-5])
def test_float32_weights_are_the_reference_s_with_fewer_samples_than_inputs(weight_decay):
    """Without weight decay they are the shortest of all that are right; the reference's own system is singular then."""
    admm, random = StandardADMM(weight_decay=weight_decay), torch.Generator().manual_seed(0)
    x = torch.rand(20, 60, generator=random)
    y = one_hot(x[:, :3].argmax(1), 3, x)
    problem = Problem(x, y, split(mlp(60, [8], 3), per_layer=True), SquaredError(), initialiser("pytorch"))
    state = admm.init(problem, SEEDS)
    target = [(z + u).double().numpy() for z, u in zip(state.z, state.u, strict=True)]
    features = np.hstack([x.double().numpy(), np.ones((20, 1))])
    admm.step(problem, state)
    own = variables_of(problem, state)
    for s in range(3):
        below = np.sqrt(2 * weight_decay / admm.beta) * np.eye(61)
        right = np.vstack([target[0][s], np.zeros((61, 8))])
        expected = np.linalg.lstsq(np.vstack([features, below]), right, rcond=None)[0].T
        found = np.column_stack([own["weight"][0][s], own["bias"][0][s]])
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    for _ in range(15):
        admm.step(problem, state)
    outputs = problem.blocks.forward(state.theta, x.expand(3, -1, -1))
    assert torch.equal(outputs.argmax(2), y.argmax(1).expand(3, -1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, r"beta: 0\.0 is not positive"),
        ({"gamma": (1.0, 0.0, 1.0)}, r"gamma: .* is not positive"),
        ({"weight_decay": -1.0}, r"weight_decay: -1\.0 is not a number from 0 up"),
        ({"spread": "wide"}, r"spread: 'wide'"),
        ({"slice_size": 0}, r"slice_size"),
        ({"start_from": "zeros"}, r"start_from: 'zeros' is not one of uniform, forward"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(ADMM, **options).init(make([5]), SEEDS)


def test_what_it_cannot_train_is_refused_before_training(conv_problem):
    with pytest.raises(ValueError, match=r"^network: StandardADMM supports fully connected .* not Conv2d"):
        ADMM.init(conv_problem(), SEEDS)
    with pytest.raises(ValueError, match=r"loss: NoProx has no prox; StandardADMM needs .*SquaredError"):
        ADMM.init(make([5], NoProx()), SEEDS)
    with pytest.raises(ValueError, match=r"no variable \['w'\]; the variables are weight, bias, z, a, u, v"):
        ADMM.init(make([5]), SEEDS, {"w": []})
    with pytest.raises(ValueError, match=r"start\['z'\]: shapes"):
        ADMM.init(make([5]), SEEDS, {"z": gaussian([4], 3, NAMES)["z"]})


def test_layers_without_bias_are_refused():
    network = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    problem = replace(make([5]), x=make([5]).x.flatten(1), blocks=split(network, per_layer=True))
    with pytest.raises(ValueError, match=r"^network: StandardADMM supports .* with a bias in every layer"):
        ADMM.init(problem, SEEDS)
