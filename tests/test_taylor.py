"""Taylor et al. 2016 against a plain NumPy transcription of their Algorithm 1, from the same starting variables."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from fully_connected import CLASSES, SAMPLES, SEEDS, NoProx, assert_close, converted, depths, gaussian, make, trained
from torch import Tensor

from admm.losses import Hinge, SquaredError
from admm.optimizers.protocol import Problem
from admm.optimizers.taylor import Taylor, TaylorState
from scripts.literal import taylor as literal

NAMES = ("weight", "z", "a", "multiplier")
TAYLOR = Taylor(beta=2.0, gamma=3.0, warm_start=4, slice_size=13)
LOSSES = [SquaredError(0.7), Hinge(1.5)]
losses = pytest.mark.parametrize("loss", LOSSES, ids=str)


def variables_of(state: TaylorState) -> dict[str, list[Tensor]]:
    weight = [layer["weight"] for block in state.theta.blocks for layer in block if layer]
    return {"weight": weight, "z": state.z, "a": state.a, "multiplier": [state.multiplier]}


def hinge(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y == 1, np.maximum(1 - z, 0), np.maximum(z, 0))


@dataclass
class Reference:
    """One replica in NumPy, as Algorithm 1 is printed, with the pseudo-inverse of the activations."""

    x: np.ndarray
    y: np.ndarray
    weight: list[np.ndarray]
    z: list[np.ndarray]
    a: list[np.ndarray]
    multiplier: list[np.ndarray]
    beta: float
    gamma: float
    loss: Any
    weight_decay: float = 0.0

    def before(self, number: int) -> np.ndarray:
        return self.x if number == 0 else self.a[number - 1]

    def objective(self) -> float:
        z = self.z[-1]
        loss = ((z - self.y) ** 2).sum() / 2 if isinstance(self.loss, SquaredError) else hinge(z, self.y).sum()
        value = self.loss.scale * loss + (z * self.multiplier[0]).sum()
        for number, weight in enumerate(self.weight):
            value += self.beta * ((self.z[number] - self.before(number) @ weight.T) ** 2).sum()
            value += self.weight_decay * (weight**2).sum()
        for a, hidden in zip(self.a, self.z, strict=False):
            value += self.gamma * ((a - np.maximum(hidden, 0)) ** 2).sum()
        return float(value)

    def regression(self, number: int) -> np.ndarray:
        a = self.before(number)
        if self.weight_decay:
            system = self.beta * a.T @ a + self.weight_decay * np.eye(a.shape[1])
            return np.linalg.solve(system, self.beta * a.T @ self.z[number]).T
        return (np.linalg.pinv(a) @ self.z[number]).T

    def iterate(self, update_multiplier: bool) -> None:
        last, beta, gamma = len(self.weight) - 1, self.beta, self.gamma
        for number in range(last):
            self.weight[number] = self.regression(number)
            w = self.weight[number + 1]
            right = beta * w.T @ self.z[number + 1].T + gamma * np.maximum(self.z[number], 0).T
            self.a[number] = np.linalg.solve(beta * w.T @ w + gamma * np.eye(len(right)), right).T
            m, a = self.before(number) @ self.weight[number].T, self.a[number]
            pieces = np.stack([np.minimum(m, 0), np.maximum((beta * m + gamma * a) / (beta + gamma), 0)])
            values = gamma * (a - np.maximum(pieces, 0)) ** 2 + beta * (pieces - m) ** 2
            self.z[number] = np.where(values[1] < values[0], pieces[1], pieces[0])
        self.weight[last] = self.regression(last)
        m = self.before(last) @ self.weight[last].T
        self.z[last] = self.last_minimiser(m)
        if update_multiplier:
            self.multiplier[0] = self.multiplier[0] + beta * (self.z[last] - m)

    def last_minimiser(self, m: np.ndarray) -> np.ndarray:
        """argmin_z ℓ(z, y) + λz + β(z − m)² of each entry; the hinge's by comparing its pieces."""
        scale, beta, multiplier = self.loss.scale, self.beta, self.multiplier[0]
        if isinstance(self.loss, SquaredError):
            return (scale * self.y + 2 * beta * m - multiplier) / (scale + 2 * beta)
        pieces = np.stack([m - (multiplier + slope) / (2 * beta) for slope in (-scale, 0, scale)] + [self.y])
        values = scale * hinge(pieces, self.y) + multiplier * pieces + beta * (pieces - m) ** 2
        return np.take_along_axis(pieces, values.argmin(0)[None], 0)[0]


def reference(problem: Problem, given: dict[str, list[Tensor]], s: int, taylor: Taylor) -> Reference:
    own = {name: [t[s].numpy().copy() for t in tensors] for name, tensors in given.items()}
    x, y = problem.x.flatten(1).double().numpy(), problem.y.double().numpy()
    options = {name: getattr(taylor, name) for name in ("beta", "gamma", "weight_decay")}
    return Reference(x, y, **own, **options, loss=problem.loss)


@depths
@losses
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_iterates_are_the_reference_s(hidden, loss, weight_decay):
    problem, given, taylor = make(hidden, loss), gaussian(hidden, 3, NAMES), replace(TAYLOR, weight_decay=weight_decay)
    state = taylor.init(problem, SEEDS, given)
    references = [reference(problem, given, s, taylor) for s in range(3)]
    for iteration in range(10):
        taylor.step(problem, state)
        for s, own in enumerate(references):
            own.iterate(iteration >= taylor.warm_start)
            expected = {name: getattr(own, name) for name in ("weight", "z", "a", "multiplier")}
            assert_close(variables_of(state), s, expected, 1e-8)


@depths
@losses
def test_float32_weights_are_the_reference_s(hidden, loss):
    problem, given = make(hidden, loss, torch.float32), gaussian(hidden, 1, NAMES)
    state, own = TAYLOR.init(problem, (0,), converted(given, torch.float32)), reference(problem, given, 0, TAYLOR)
    for iteration in range(10):
        TAYLOR.step(problem, state)
        own.iterate(iteration >= TAYLOR.warm_start)
        assert_close(variables_of(state), 0, {"weight": own.weight}, 1e-3)
    assert state.z[0].dtype == torch.float32


@depths
@losses
@pytest.mark.parametrize("reduction", [True, False])
def test_the_literal_transcription_has_the_same_iterates(hidden, loss, reduction):
    problem, given = make(hidden, loss), gaussian(hidden, 1, NAMES)
    state = TAYLOR.init(problem, (0,), given)
    theirs = {name: [t[0].clone() for t in given[name]] for name in ("z", "a", "multiplier")}
    theirs["w"] = [w[0].clone() for w in given["weight"]]
    options = {"beta": TAYLOR.beta, "gamma": TAYLOR.gamma, "hinge": isinstance(loss, Hinge), "scale": loss.scale}
    options["transpose_reduction"] = reduction
    for iteration in range(10):
        TAYLOR.step(problem, state)
        literal.iterate(
            theirs, problem.x.flatten(1), problem.y, update_multiplier=iteration >= TAYLOR.warm_start, **options
        )
        expected = {name: theirs[name] for name in ("z", "a", "multiplier")}
        assert_close(variables_of(state), 0, expected | {"weight": theirs["w"]}, 1e-8)


@depths
@losses
def test_updates_with_a_constant_multiplier_never_raise_the_objective(hidden, loss):
    problem, taylor = make(hidden, loss), replace(TAYLOR, warm_start=20, weight_decay=0.1)
    state = taylor.init(problem, SEEDS, gaussian(hidden, 3, NAMES))
    for _ in range(20):
        before = [reference(problem, variables_of(state), s, taylor).objective() for s in range(3)]
        taylor.step(problem, state)
        for s in range(3):
            assert reference(problem, variables_of(state), s, taylor).objective() < before[s]


@losses
def test_the_multiplier_waits_for_the_warm_start(loss):
    problem, taylor = make([5], loss), replace(TAYLOR, warm_start=2)
    state = taylor.init(problem, SEEDS)
    for iteration in range(4):
        before = state.multiplier.clone()
        taylor.step(problem, state)
        if iteration < 2:
            assert not state.multiplier.any()
        else:
            prediction = state.a[-1] @ variables_of(state)["weight"][-1].mT
            torch.testing.assert_close(state.multiplier, before + taylor.beta * (state.z[-1] - prediction))
            assert (state.multiplier != before).any(1).any(1).all()


@losses
def test_elementwise_minimisers_are_the_lowest_points_of_a_grid(loss):
    problem = make([5], loss)
    state = TAYLOR.init(problem, (0,), gaussian([5], 1, NAMES))
    TAYLOR.step(problem, state)
    grid = torch.linspace(-10.0, 10.0, 20001, dtype=torch.float64)
    weight = [w[0] for w in variables_of(state)["weight"]]
    hidden, output = problem.x.flatten(1) @ weight[0].T, state.a[0][0] @ weight[1].T
    for n in range(SAMPLES):
        for j in range(5):
            gap = state.a[0][0, n, j] - grid.relu()
            objective = TAYLOR.gamma * gap**2 + TAYLOR.beta * (grid - hidden[n, j]) ** 2
            assert abs(grid[objective.argmin()] - state.z[0][0, n, j]) <= 1e-3
        for c in range(CLASSES):
            own = loss.value(grid[:, None], problem.y[n, c].expand(len(grid), 1))
            linear = state.multiplier[0, n, c] * grid
            objective = own + linear + TAYLOR.beta * (grid - output[n, c]) ** 2
            assert abs(grid[objective.argmin()] - state.z[1][0, n, c]) <= 1e-3


def test_residuals_are_those_of_the_constraints():
    problem = make([5, 4])
    state = TAYLOR.step(problem, TAYLOR.init(problem, SEEDS, gaussian([5, 4], 3, NAMES)))
    values = TAYLOR.diagnostics(problem, state)
    for s in range(3):
        own = reference(problem, variables_of(state), s, TAYLOR)
        expected = {"multiplier_rms": np.sqrt((own.multiplier[0] ** 2).mean())}
        for number, weight in enumerate(own.weight):
            residual = own.z[number] - own.before(number) @ weight.T
            expected[f"residual_{number + 1}"] = np.linalg.norm(residual) / np.linalg.norm(own.z[number])
            if number < 2:
                gap = own.a[number] - np.maximum(own.z[number], 0)
                expected[f"activation_residual_{number + 1}"] = np.linalg.norm(gap) / np.linalg.norm(own.a[number])
        for name, value in expected.items():
            assert values[name][s].item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("singular", ["always zero", "a copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_inputs_have_the_pseudo_inverse_s_predictions(singular, dtype):
    """MNIST has pixels that are always 0: their weights are 0, as with the pseudo-inverse."""
    problem = make([5], dtype=dtype)
    problem.x[:, 0, 0] = 0.0 if singular == "always zero" else problem.x[:, 1, 1]
    given = gaussian([5], 1, NAMES)
    state = TAYLOR.init(problem, (0,), converted(given, dtype))
    expected = torch.tensor(reference(problem, given, 0, TAYLOR).regression(0))
    TAYLOR.step(problem, state)
    x, weight = problem.x.flatten(1).double(), variables_of(state)["weight"][0][0].double()
    tolerance = 2e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(x @ weight.T, x @ expected.T, rtol=tolerance, atol=tolerance)
    assert weight.norm() < 2 * expected.norm()
    if singular == "always zero":
        assert not weight[:, 0].any()


def test_training_from_its_own_start_learns():
    problem = make([8, 8], SquaredError())
    for taylor in (Taylor(spread=0.1), Taylor(beta=10.0, weight_decay=5e-5, start_from="uniform", spread=1e-4)):
        state = trained(taylor, problem, SEEDS, 60)
        output = problem.blocks.forward(state.theta, problem.x.expand(3, *problem.x.shape))
        right = (output.argmax(2) == problem.y.argmax(1)).double().mean(1)
        assert (right > 0.7).all()


def test_it_has_no_biases():
    problem = make([5, 4])
    state = trained(TAYLOR, problem, SEEDS)
    biases = [layer["bias"] for block in state.theta.blocks for layer in block if layer]
    assert len(biases) == 3 and not any(b.any() for b in biases)
    assert all(layer["bias"].any() for block in problem.initial(SEEDS).blocks for layer in block if layer)


def test_the_starts_have_their_spread():
    problem = make([40, 30])
    gaussian = Taylor(spread=(1.0, 0.1, 5.0)).init(problem, SEEDS)
    uniform = Taylor(start_from="uniform", spread=(1e-4, 0.1, 5.0)).init(problem, SEEDS)
    for s, spread in enumerate((1.0, 0.1, 5.0)):
        for tensor in (*gaussian.z, *gaussian.a):
            assert tensor[s].std().item() == pytest.approx(spread, rel=0.2)
            assert abs(tensor[s].mean().item()) < 0.2 * spread
    for s, spread in enumerate((1e-4, 0.1, 5.0)):
        for tensor in (*uniform.z, *uniform.a, *variables_of(uniform)["weight"]):
            assert 0 <= tensor[s].min() < 0.1 * spread and 0.9 * spread < tensor[s].max() <= spread
    initial = [layer["weight"] for block in problem.initial(SEEDS).blocks for layer in block if layer]
    assert all(torch.equal(a, b) for a, b in zip(variables_of(gaussian)["weight"], initial, strict=True))


GRID = {"beta": (2.0, 1.0, 5.0), "gamma": (3.0, 3.0, 0.5), "weight_decay": (0.0, 0.1, 5.0), "spread": (1.0, 0.1, 3.0)}


@pytest.mark.parametrize("grid", [{}, GRID, {"gamma": GRID["gamma"]}], ids=["one value", "one a replica", "γ alone"])
@pytest.mark.parametrize("start_from", ["gaussian", "uniform"])
@losses
def test_a_stack_is_its_replicas_alone(grid, start_from, loss):
    problem, taylor = make([5, 4], loss), replace(TAYLOR, warm_start=1, start_from=start_from)
    together = trained(replace(taylor, **grid), problem, SEEDS)
    for s, seed in enumerate(SEEDS):
        alone = trained(replace(taylor, **{name: values[s] for name, values in grid.items()}), problem, (seed,))
        theirs = {name: [t[0] for t in tensors] for name, tensors in variables_of(alone).items()}
        assert_close(variables_of(together), s, theirs, 1e-9)
    assert not torch.allclose(together.theta.flat()[0], together.theta.flat()[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, r"beta: 0\.0 is not positive"),
        ({"gamma": (1.0, 0.0, 1.0)}, r"gamma: .* is not positive"),
        ({"weight_decay": -1.0}, r"weight_decay: -1\.0 is not a number from 0 up"),
        ({"spread": (1.0, 2.0)}, r"spread: 2 values for 3 replicas"),
        ({"warm_start": -1}, r"warm_start: -1 is not a whole number from 0 up"),
        ({"slice_size": 0}, r"slice_size"),
        ({"start_from": "zeros"}, r"start_from: 'zeros' is not one of gaussian, uniform"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(TAYLOR, **options).init(make([5]), SEEDS)


def test_what_it_cannot_train_is_refused_before_training(conv_problem):
    with pytest.raises(ValueError, match=r"^network: Taylor supports fully connected ReLU networks .* not Conv2d"):
        TAYLOR.init(conv_problem(), SEEDS)
    with pytest.raises(ValueError, match=r"loss: NoProx has no prox; Taylor needs .*SquaredError"):
        TAYLOR.init(make([5], NoProx()), SEEDS)
    with pytest.raises(ValueError, match=r"no variable \['bias'\]; the variables are weight, z, a, multiplier"):
        TAYLOR.init(make([5]), SEEDS, {"bias": []})
    with pytest.raises(ValueError, match=r"start\['z'\]: shapes"):
        TAYLOR.init(make([5]), SEEDS, {"z": gaussian([4], 3, NAMES)["z"]})
