"""Class indices, weights, ignored labels and smoothing, Huber, and functions with a prox, against PyTorch and SciPy."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from admm.blocks import split
from admm.comparison import outputs_of
from admm.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    FunctionLoss,
    Hinge,
    Huber,
    Loss,
    ProximalFunctionLoss,
    ProximalLoss,
    SampleWeighted,
    SquaredError,
    TripletLoss,
    one_hot,
)
from admm.models import initialiser, mlp
from admm.optimizers import Adam, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.bcd import BCD
from admm.optimizers.dladmm import DLADMM, _Sweep, _value_and_gradient
from admm.optimizers.standard_admm import StandardADMM
from admm.optimizers.taylor import Taylor
from admm.training import evaluate

EXACT = {"rtol": 1e-11, "atol": 1e-11}
IGNORED = -100


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int = 4) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def minimiser(objective: Any, start: Tensor) -> Tensor:
    """SciPy's, of a function of a vector."""

    def with_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(x, requires_grad=True)
        value = objective(leaf)
        value.backward()
        return value.item(), leaf.grad.numpy()

    found = minimize(with_gradient, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10})
    return torch.tensor(found.x)


def gradient_of(function: Any, z: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


# --- Cross-entropy

WEIGHT = [0.5, 2.0, 0.0, 1.3]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": WEIGHT},
    {"label_smoothing": 0.2},
    {"weight": WEIGHT, "label_smoothing": 0.2},
    {"ignore_index": IGNORED},
    {"ignore_index": 1, "weight": WEIGHT},
    {"ignore_index": 1, "label_smoothing": 0.3},
    {"ignore_index": IGNORED, "weight": WEIGHT, "label_smoothing": 0.3},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
# PyTorch ignores no class of a distribution.
each_option_and_kind = pytest.mark.parametrize(
    "options, kind",
    [(o, "indices") for o in OPTIONS] + [(o, "distributions") for o in OPTIONS if o.get("ignore_index", -1) < 0],
    ids=str,
)


def targets_of(kind: str, options: dict[str, Any]) -> Tensor:
    """Targets of 2 replicas and 9 samples."""
    if kind == "distributions":
        return torch.softmax(2 * gaussian(2, 9, 4, seed=2), -1)
    y = labels(2, 9)
    return torch.where(torch.arange(9) % 3 == 0, IGNORED, y) if options.get("ignore_index") == IGNORED else y


def pytorch_s(options: dict[str, Any]) -> Any:
    """PyTorch's cross-entropy, with classes last."""
    weight = torch.tensor(options["weight"], dtype=torch.float64) if "weight" in options else None
    function = partial(F.cross_entropy, reduction="none", **options | {"weight": weight})

    def values(z: Tensor, y: Tensor) -> Tensor:
        axes = z.ndim - 1
        found: Tensor = function(z.flatten(0, -2), y.flatten(0, axes - 1))
        return found.view(z.shape[:-1])

    return values


@each_option_and_kind
def test_cross_entropy_and_its_gradient_are_pytorch_s(options: dict[str, Any], kind: str) -> None:
    z, y, expected = 3 * gaussian(2, 9, 4), targets_of(kind, options), pytorch_s(options)
    loss = CrossEntropy(0.7, **options)
    assert_close(loss.value(z, y), 0.7 * expected(z, y), **EXACT)
    assert_close(loss.gradient(z, y), 0.7 * gradient_of(lambda z: expected(z, y), z), **EXACT)
    assert_close(gradient_of(lambda z: loss.value(z, y), z), loss.gradient(z, y), **EXACT)


@each_option_and_kind
def test_cross_entropy_s_prox_is_scipy_s_minimiser(options: dict[str, Any], kind: str) -> None:
    v, y, expected = 3 * gaussian(2, 9, 4), targets_of(kind, options), pytorch_s(options)
    z = CrossEntropy(2.5, tolerance=1e-12, **options).prox(v, y, 0.4)
    for s, n in np.ndindex(2, 3):

        def objective(x: Tensor, s: int = s, n: int = n) -> Tensor:
            value: Tensor = 2.5 * expected(x[None], y[s, n][None]).sum() + 0.2 * (x - v[s, n]).square().sum()
            return value

        assert_close(z[s, n], minimiser(objective, v[s, n]), rtol=0.0, atol=1e-6)
    stationary = 2.5 * gradient_of(lambda z: expected(z, y), z) + 0.4 * (z - v)
    assert stationary.abs().max() < 1e-10


@each_option
def test_positions_are_samples_of_their_own(options: dict[str, Any]) -> None:
    loss, z, y = CrossEntropy(**options), gaussian(2, 9, 4), targets_of("indices", options)
    for function in (loss.value, loss.gradient, lambda z, y: loss.prox(z, y, 0.5)):
        assert torch.equal(function(z.unflatten(1, (3, 3)), y.unflatten(1, (3, 3))).flatten(1, 2), function(z, y))


@each_option
def test_indices_are_shared_by_replicas(options: dict[str, Any]) -> None:
    loss, z, y = CrossEntropy(**options), gaussian(2, 9, 4), targets_of("indices", options)[0]
    for function in (loss.value, loss.gradient, lambda z, y: loss.prox(z, y, 0.5)):
        assert_close(function(z, y), function(z, y.expand(2, -1)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indices_give_the_very_numbers_of_one_hot_targets(dtype: torch.dtype) -> None:
    z, y = 4 * gaussian(3, 50, 7).to(dtype), labels(3, 50, classes=7)
    loss, vectors = CrossEntropy(0.3), one_hot(y, 7, z)
    assert torch.equal(loss.value(z, y), loss.value(z, vectors))
    assert torch.equal(loss.gradient(z, y), loss.gradient(z, vectors))
    assert torch.equal(loss.prox(z, y, 0.6), loss.prox(z, vectors, 0.6))


def test_distributions_over_other_classes_are_refused() -> None:
    """Such as of a single class, which would be broadcast."""
    for classes in (1, 4):
        with pytest.raises(ValueError, match=f"y: distributions over {classes} classes, the network has 3 outputs"):
            CrossEntropy().gradient(torch.zeros(2, 3), torch.ones(2, classes) / classes)


def test_what_is_ignored_stays_where_it_is() -> None:
    z, y = gaussian(2, 9, 4), targets_of("indices", {"ignore_index": IGNORED})
    ignored, loss = y == IGNORED, CrossEntropy(ignore_index=IGNORED, label_smoothing=0.1)
    assert ignored.any() and not ignored.all()
    assert (loss.value(z, y)[ignored] == 0).all() and (loss.gradient(z, y)[ignored] == 0).all()
    assert torch.equal((loss.prox(z, y, 0.1) == z).all(2), ignored)


def test_an_ignored_label_needs_no_output() -> None:
    y = torch.tensor([[1, IGNORED], [IGNORED, IGNORED]], dtype=torch.int32)
    targets = CrossEntropy(ignore_index=IGNORED).targets(y, (2, 3), torch.zeros(0))
    assert torch.equal(targets, y.long()) and targets.dtype == torch.int64


@pytest.mark.parametrize(
    "weight", [torch.tensor(WEIGHT), np.array(WEIGHT), tuple(WEIGHT)], ids=lambda w: type(w).__name__
)
def test_weights_may_be_a_tensor_or_an_array(weight: Any) -> None:
    assert CrossEntropy(weight=weight).weight == pytest.approx(tuple(WEIGHT))
    hash(CrossEntropy(weight=weight))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossEntropy(weight=[1.0, -1.0]), r"^weight: \[1.0, -1.0\] is not None or numbers from 0 up"),
        (lambda: CrossEntropy(weight=3.0), "^weight: 3.0 is not None or numbers from 0 up"),
        (lambda: CrossEntropy(weight=[]), "^weight: "),
        (lambda: CrossEntropy(weight=[0.0, 0]), r"^weight: \[0.0, 0\] are all 0, and so would the loss be"),
        (lambda: CrossEntropy(weight=[[1.0, 2.0]]), "^weight: "),
        (lambda: CrossEntropy(ignore_index=1.5), "^ignore_index: 1.5 is not None or a whole number, such as -100"),
        (lambda: CrossEntropy(label_smoothing=1.0), "^label_smoothing: 1.0 is not a number from 0 up and below 1"),
        (lambda: BinaryCrossEntropy(pos_weight=[math.nan]), "^pos_weight: "),
        (lambda: BinaryCrossEntropy(weight=[-1.0]), "^weight: "),
        (lambda: Huber(delta=0.0), "^delta: 0.0 is not a positive number"),
        (lambda: Huber(scale=-1.0), "^scale: -1.0 is not a positive number"),
        (lambda: ProximalFunctionLoss(F.mse_loss, max_steps=0), "^max_steps: 0 is not a whole number"),
        (lambda: ProximalFunctionLoss(F.mse_loss, tolerance=0.0), "^tolerance: 0.0 is not a positive number"),
        (lambda: SampleWeighted(TripletLoss()), "^loss: TripletLoss.* is no admm.losses.Loss that is a sum"),
        (lambda: SampleWeighted(F.mse_loss), "^loss: .*mse_loss.* is no admm.losses.Loss"),
        (lambda: replace(SampleWeighted(Hinge()), loss=FunctionLoss(F.mse_loss)), "^loss: FunctionLoss has no prox"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "loss, y, message",
    [
        (CrossEntropy(weight=WEIGHT), torch.tensor([0, 1]), "^weight: 4 numbers, expected one for each of the 3"),
        (BinaryCrossEntropy(pos_weight=WEIGHT), torch.ones(2, 3), "^pos_weight: 4 numbers, expected one for each"),
        (BinaryCrossEntropy(weight=WEIGHT), torch.ones(2, 3), "^weight: 4 numbers, expected one for each"),
        (CrossEntropy(ignore_index=5), torch.tensor([5, 3]), "^y: class indices go from 3 to 3, .* ignore_index"),
        (CrossEntropy(ignore_index=1), torch.eye(3), "^ignore_index: 1 needs class indices as y, found distributions"),
        (SquaredError(), (torch.eye(3), torch.eye(3)), "^y: a tuple, where the loss takes one tensor"),
        (SampleWeighted(SquaredError()), (torch.eye(3), torch.tensor([1.0, -1.0, 0.0])), "^y: weights .* -1 to 1; exp"),
        (SampleWeighted(SquaredError()), (torch.eye(3), torch.ones(3, 1)), r"^y: weights \[3, 1\] of 3 samples"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_the_options_are_refused(loss: Loss, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.targets(y, (3,), torch.zeros(0))


# --- Huber and the weights of labels


@pytest.mark.parametrize("delta, scale", [(1.0, 1.0), (0.3, 2.0), (5.0, 0.4)])
def test_huber_is_pytorch_s_and_its_prox_scipy_s_minimiser(delta: float, scale: float) -> None:
    loss, z, y = Huber(delta, scale), 3 * gaussian(2, 9, 4), gaussian(2, 9, 4, seed=3)

    def expected(z: Tensor) -> Tensor:
        return scale * F.huber_loss(z, y, delta=delta, reduction="none").sum(-1)

    assert_close(loss.value(z, y), expected(z), **EXACT)
    assert_close(loss.gradient(z, y), gradient_of(expected, z), **EXACT)
    for penalty in (0.1, 1.0, 20.0):
        found = loss.prox(z, y, penalty)
        for i in np.ndindex(2, 3, 4):

            def objective(x: float, i: tuple[int, ...] = i, penalty: float = penalty) -> float:
                error = torch.tensor(x, dtype=torch.float64)
                value = scale * F.huber_loss(error, y[i], delta=delta) + penalty / 2 * (error - z[i]) ** 2
                return value.item()

            best = minimize_scalar(objective, bounds=(-15.0, 15.0), method="bounded", options={"xatol": 1e-9})
            assert found[i].item() == pytest.approx(best.x, abs=1e-6)


def test_huber_with_a_large_delta_is_the_squared_error() -> None:
    z, y = gaussian(2, 9, 4), gaussian(2, 9, 4, seed=3)
    huber, squared = Huber(1e6, 0.7), SquaredError(0.7)
    assert_close(huber.value(z, y), squared.value(z, y))
    assert_close(huber.gradient(z, y), squared.gradient(z, y))
    for penalty in (1e-9, 0.3, 1e9):
        assert_close(huber.prox(z, y, penalty), squared.prox(z, y, penalty))


@pytest.mark.parametrize("weight", [None, [0.5, 0.0, 2.0]], ids=["", "weight"])
@pytest.mark.parametrize("pos_weight", [None, [3.0, 1.0, 0.2]], ids=["", "pos_weight"])
def test_weighted_labels_are_pytorch_s(weight: Any, pos_weight: Any) -> None:
    z, y = 2 * gaussian(2, 5, 3), torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    tensors = {
        name: None if value is None else torch.tensor(value, dtype=torch.float64)
        for name, value in (("weight", weight), ("pos_weight", pos_weight))
    }

    def expected(z: Tensor) -> Tensor:
        return 0.6 * F.binary_cross_entropy_with_logits(z, y, reduction="none", **tensors).sum(-1)

    loss = BinaryCrossEntropy(0.6, tolerance=1e-12, weight=weight, pos_weight=pos_weight)
    assert_close(loss.value(z, y), expected(z), **EXACT)
    assert_close(loss.gradient(z, y), gradient_of(expected, z), **EXACT)
    found = loss.prox(z, y, 0.3)
    assert (gradient_of(expected, found) + 0.3 * (found - z)).abs().max() < 1e-11


# --- Functions with a proximal operator

BINARY = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(4)).double()
AS_FUNCTIONS: dict[str, tuple[Any, ProximalLoss, Tensor]] = {
    "cross-entropy": (partial(F.cross_entropy, reduction="none"), CrossEntropy(tolerance=1e-12), labels(2, 9)),
    "squared error": (lambda z, y: (z - y).square() / 2, SquaredError(), BINARY),
    "logits": (
        partial(F.binary_cross_entropy_with_logits, reduction="none"), BinaryCrossEntropy(tolerance=1e-12), BINARY
    ),
    "huber": (partial(F.huber_loss, reduction="none"), Huber(), BINARY),
}  # fmt: skip
each_function = pytest.mark.parametrize("name", AS_FUNCTIONS)


@each_function
@pytest.mark.parametrize("penalty", [0.02, 1.0, torch.tensor([0.3, 4.0], dtype=torch.float64).view(2, 1, 1)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_a_function_s_prox_is_that_of_the_loss(name: str, penalty: Any, spread: float) -> None:
    function, loss, y = AS_FUNCTIONS[name]
    v = spread * gaussian(2, 9, 4)
    before = v.clone()
    found = ProximalFunctionLoss(function, tolerance=1e-10).prox(v, y, penalty)
    assert_close(found, loss.prox(v, y, penalty), rtol=0.0, atol=1e-8 * spread)
    assert torch.equal(v, before)


@each_function
def test_in_float32_a_function_s_prox_is_exact_to_rounding(name: str) -> None:
    function, loss, y = AS_FUNCTIONS[name]
    v, y = gaussian(2, 9, 4).float(), y.float() if y.is_floating_point() else y
    found = ProximalFunctionLoss(function, tolerance=1e-12).prox(v, y, 0.5)
    assert found.dtype == torch.float32
    assert_close(found, loss.prox(v, y, 0.5), rtol=0.0, atol=2e-6)


@each_function
def test_a_sample_s_newton_steps_do_not_depend_on_its_neighbours(name: str) -> None:
    function, _, y = AS_FUNCTIONS[name]
    loss, v = ProximalFunctionLoss(function), gaussian(2, 9, 4)
    together = loss.prox(v, y, 0.1)
    far = v.clone()
    far[0] *= 100  # takes more steps
    assert torch.equal(loss.prox(far, y, 0.1)[1], together[1])
    far[0] = torch.nan
    found = loss.prox(far, y, 0.1)
    assert torch.equal(found[1], together[1]) and found[0].isnan().all()
    assert_close(loss.prox(v[:, 3:4], y[:, 3:4], 0.1), together[:, 3:4], **EXACT)


def double_well(z: Tensor, y: Tensor) -> Tensor:
    return (z.square().sum(1) - 1.0).square() + 0.3 * z[:, 0] * y[:, 0]


def test_of_a_function_that_is_not_convex_a_local_minimum_is_found() -> None:
    loss, v, y = ProximalFunctionLoss(double_well, tolerance=1e-9), 0.7 * gaussian(2, 20, 3), gaussian(2, 20, 1, seed=5)
    z = loss.prox(v, y, 0.2)

    def objective(z: Tensor) -> Tensor:
        return loss.value(z, y) + 0.1 * (z - v).square().sum(2)

    assert gradient_of(objective, z).abs().max() < 1e-8
    assert (objective(z) <= objective(v)).all()
    for shift in 1e-3 * gaussian(20, 3, seed=6):
        assert (objective(z + shift) >= objective(z)).all()


def exponential(z: Tensor, y: Tensor) -> Tensor:
    return z.exp()


def test_a_function_that_overflows_on_the_way_is_minimised() -> None:
    v = torch.tensor([[[-30.0], [0.0], [30.0], [300.0]]], dtype=torch.float64)
    z = ProximalFunctionLoss(exponential, max_steps=400, tolerance=1e-12).prox(v, v, 0.01)
    assert_close(z + z.exp() / 0.01, v, rtol=1e-9, atol=1e-9)


def test_a_linear_function_s_prox_is_one_step() -> None:
    v, y = gaussian(2, 5, 3), gaussian(2, 5, 3, seed=7)
    assert_close(ProximalFunctionLoss(lambda z, y: (z * y).sum(1), max_steps=1).prox(v, y, 4.0), v - y / 4, **EXACT)


def nested(z: Tensor, y: dict[str, Any]) -> Tensor:
    mean, (variance, labels) = y["mean"], y["others"]
    likelihood = F.gaussian_nll_loss(z, mean, variance, reduction="none")  # which checks the variance by value
    return likelihood.sum(1) + F.cross_entropy(z, labels, reduction="none")


def test_targets_of_a_function_may_be_nested() -> None:
    v, mean, variance, y = (
        gaussian(2, 5, 3),
        gaussian(2, 5, 3, seed=8),
        0.1 + BINARY[:, :5, :3],
        labels(2, 5, classes=3),
    )
    loss = ProximalFunctionLoss(nested, tolerance=1e-11)
    z = loss.prox(v, {"mean": mean, "others": (variance, y)}, 2.0)

    def expected(z: Tensor) -> Tensor:
        entropy = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(2, 5)
        return (0.5 * ((z - mean).square() / variance)).sum(2) + entropy

    assert (gradient_of(expected, z) + 2.0 * (z - v)).abs().max() < 1e-9
    assert_close(loss.gradient(v, {"mean": mean, "others": (variance, y)}), gradient_of(expected, v), **EXACT)
    targets = loss.targets({"mean": mean[0], "others": (variance[0], y[0])}, (3,), torch.zeros(0))
    assert targets["mean"].dtype == torch.float32 and targets["others"][1].dtype == torch.int64


def problem(loss: Any, y: Any = None, dtype: torch.dtype = torch.float64) -> Problem:
    x = torch.randn(40, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1) if y is None else y(x)
    return Problem(x, y, split(mlp(6, [5, 4], 3), per_layer=True), loss, initialiser("pytorch"))


EXACT_Z = ZUpdate("gradient", output_update="prox")
PROXIMAL: list[Any] = [
    StandardADMM(),
    BCD(),
    Taylor(),
    BlockADMM(3, 0.01, batch_size=8, z_update=EXACT_Z),
    OnlineBlockADMM(3, 0.01, batch_size=8, z_update=EXACT_Z),
]
OTHERS: list[Any] = [Backprop(3, Adam(), 0.01, 8), Gotmare(3, 0.01, batch_size=8), DLADMM(fista_curvature=0.5)]


def trained(problem: Problem, optimizer: Any) -> Tensor:
    state = optimizer.init(problem, [0, 1])
    for _ in range(2):
        optimizer.step(problem, state)
    optimizer.diagnostics(problem, state)
    theta: Tensor = state.theta.flat()
    return theta


@pytest.mark.parametrize("optimizer", PROXIMAL + OTHERS, ids=lambda optimizer: type(optimizer).__name__)
def test_training_with_indices_one_hot_targets_or_a_function_is_the_same(optimizer: Any) -> None:
    start = {"rtol": 1e-6, "atol": 1e-8}
    expected = trained(problem(CrossEntropy(tolerance=1e-12), lambda x: one_hot(x[:, :3].argmax(1), 3, x)), optimizer)
    assert torch.equal(trained(problem(CrossEntropy(tolerance=1e-12)), optimizer), expected)
    if not isinstance(optimizer, DLADMM):  # which starts elsewhere, without classes
        function = ProximalFunctionLoss(partial(F.cross_entropy, reduction="none"), tolerance=1e-12)
        assert_close(trained(problem(function), optimizer), expected, **start)


@pytest.mark.parametrize("options", OPTIONS[1:4] + OPTIONS[5:7], ids=str)
def test_dladmm_has_the_values_and_gradients_of_the_options(options: dict[str, Any]) -> None:
    loss, z, y = CrossEntropy(0.7, **options), gaussian(2, 9, 4), labels(9)
    t = loss.distribution(z[0], y)
    value, gradient = _value_and_gradient(loss, z.mT, t, t.sum(1))
    assert_close(value, loss.value(z, y).sum(1), **EXACT)
    assert_close(gradient.mT, loss.gradient(z, y), **EXACT)


@pytest.mark.parametrize(
    "options", [{"weight": [0.5, 3.0, 1.0], "label_smoothing": 0.2}, {"ignore_index": 2}], ids=["weights", "ignored"]
)
def test_dladmm_s_last_step_minimises_what_it_says(options: dict[str, Any]) -> None:
    task = problem(CrossEntropy(tolerance=1e-12, **options))
    dladmm = DLADMM(rho=0.5, fista_tolerance=0.0, fista_steps=3000)
    state = dladmm.init(task, [0])
    assert torch.equal(state.z[-1][0], 2.0 * one_hot(task.y, 3, task.x) - 1.0)
    target = gaussian(1, 40, 3)
    found = _Sweep(dladmm, task, state)._fista(state.z[-1], target)
    assert_close(found, task.loss.prox(target, task.y, 0.5), rtol=0.0, atol=1e-6)  # type: ignore[attr-defined]


# --- Weights of samples

WEIGHTED: list[tuple[Loss, Tensor]] = [
    (SquaredError(0.7), gaussian(2, 9, 4, seed=3)),
    (CrossEntropy(tolerance=1e-12), labels(2, 9)),
    (BinaryCrossEntropy(tolerance=1e-12), BINARY),
    (Hinge(), one_hot(labels(18), 4, BINARY).view(2, 9, 4)),
    (Huber(), gaussian(2, 9, 4, seed=3)),
    (ProximalFunctionLoss(lambda z, y: (z - y).square().sum(1), tolerance=1e-12), gaussian(2, 9, 4, seed=3)),
]
each_weighted = pytest.mark.parametrize("loss, y", WEIGHTED, ids=lambda value: type(value).__name__)
SAMPLE_WEIGHTS = torch.tensor([0.0, 1.0, 0.3, 2.0, 5.0, 1e-30, 1.0, 0.0, 0.7], dtype=torch.float64).expand(2, -1)


@each_weighted
def test_a_weighted_loss_is_the_weight_times_the_loss(loss: ProximalLoss, y: Tensor) -> None:
    weighted, z, w = SampleWeighted(loss), gaussian(2, 9, 4), SAMPLE_WEIGHTS
    assert_close(weighted.value(z, (y, w)), w * loss.value(z, y), **EXACT)
    assert_close(gradient_of(lambda z: weighted.value(z, (y, w)), z), weighted.gradient(z, (y, w)), **EXACT)


@each_weighted
def test_a_weighted_prox_is_that_of_a_loss_of_another_scale(loss: ProximalLoss, y: Tensor) -> None:
    weighted, v, w = SampleWeighted(loss), gaussian(2, 9, 4), SAMPLE_WEIGHTS
    assert isinstance(weighted, ProximalLoss)
    penalties = torch.tensor([0.3, 2.0], dtype=torch.float64).view(2, 1, 1)
    z = weighted.prox(v, (y, w), penalties)
    assert torch.equal(z[w < 1e-20], v[w < 1e-20])
    for s, n in np.ndindex(2, 9):
        if w[s, n] > 1e-20 and not isinstance(loss, ProximalFunctionLoss):
            scaled = replace(loss, scale=w[s, n].item() * loss.scale)  # type: ignore[attr-defined]
            assert_close(z[s, n], scaled.prox(v[s, n], y[s, n], penalties[s].item()), rtol=0.0, atol=1e-9)
    if not isinstance(loss, Hinge):
        stationary = weighted.gradient(z, (y, w)) + penalties * (z - v)
        assert stationary.abs().max() < 1e-9


def test_weights_are_of_samples_not_of_their_positions() -> None:
    loss, z, y = SampleWeighted(CrossEntropy()), gaussian(2, 3, 5, 4), labels(2, 3, 5)
    w = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64).expand(2, -1)
    assert_close(loss.value(z, (y, w)), w[..., None] * CrossEntropy().value(z, y))
    assert_close(loss.gradient(z, (y, w)), w[..., None, None] * CrossEntropy().gradient(z, y))
    with pytest.raises(ValueError, match=r"weights \[3\] do not have the axes of the samples, .* \[2, 3, 5\]"):
        loss.value(z, (y, w[0]))


def test_a_weighted_loss_has_a_prox_exactly_if_the_loss_has_one() -> None:
    with_prox, without = SampleWeighted(Huber()), SampleWeighted(FunctionLoss(F.mse_loss))
    for copied in (lambda loss: loss, copy.deepcopy, copy.copy, lambda loss: replace(loss, loss=loss.loss)):
        assert isinstance(copied(with_prox), ProximalLoss) and copied(with_prox) == with_prox
        assert not isinstance(copied(without), ProximalLoss) and isinstance(copied(without), SampleWeighted)
    assert isinstance(pickle.loads(pickle.dumps(with_prox)), ProximalLoss)


# --- Metrics


class WeightedProblem(Problem):
    """Whose targets may be pairs of targets and weights."""

    def targets(self, x: Tensor, y: Any) -> Any:
        return self.loss.targets(y, (outputs := outputs_of(self.blocks, x)).shape[1:], like=outputs)


def linear(loss: Any, y: Any, *shape: int, outputs: int) -> Problem:
    x = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(shape[-1], outputs))
    nn.init.normal_(network[0].weight, generator=torch.Generator().manual_seed(1))
    return WeightedProblem(x, y(x), split(network, after=[]), loss, lambda module: None)


def measured(task: Problem, y: Any = None) -> tuple[dict[str, float], Tensor]:
    """What `evaluate` finds, with the training samples as the test set, and the outputs."""
    theta = task.initial([0])
    found = evaluate(task, theta, (task.x, task.y if y is None else y))
    return {name: value.item() for name, value in found.items()}, task.blocks.forward(theta, task.x[None])[0]


def some_ignored(x: Tensor) -> Tensor:
    y = x[..., :3].argmax(-1)
    return torch.where(x[..., 3] > 0.5, IGNORED, y)


@pytest.mark.parametrize("shape", [(4,), (5, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight": [0.2, 3.0, 1.0], "label_smoothing": 0.3}], ids=["plain", "weights"])
def test_accuracy_leaves_out_what_is_ignored(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    task = linear(CrossEntropy(ignore_index=IGNORED, **options), some_ignored, *shape, outputs=3)
    found, z = measured(task)
    kept = task.y != IGNORED
    assert 0 < kept.sum() < kept.numel()
    expected = 100.0 * accuracy_score(task.y[kept], z.argmax(-1)[kept])
    assert found["test_accuracy"] == found["train_accuracy"] == pytest.approx(expected, rel=1e-6)
    assert found["train_loss"] == pytest.approx(task.loss.value(z, task.y).sum().item() / 300, rel=1e-5)


def test_with_the_documented_scale_the_loss_is_pytorch_s_mean() -> None:
    z, y, w = gaussian(40, 3), labels(40, classes=3), torch.tensor([0.2, 3.0, 1.0])
    y[::4] = -100
    loss = CrossEntropy(weight=w, ignore_index=-100, scale=len(y) / w[y[y != -100]].sum())
    expected = F.cross_entropy(z, y, w.to(z), ignore_index=-100)
    assert loss.value(z, y).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def weights_of(x: Tensor) -> Tensor:
    return x[:, 0].abs() * (x[:, 1] > -0.5)


def test_weighted_accuracy_is_scikit_learn_s() -> None:
    task = linear(SampleWeighted(CrossEntropy()), lambda x: (x[:, :3].argmax(1), weights_of(x)), 4, outputs=3)
    found, z = measured(task)
    labels, w = task.y
    expected = 100.0 * accuracy_score(labels, z.argmax(1), sample_weight=w)
    assert found["test_accuracy"] == found["train_accuracy"] == pytest.approx(expected, rel=1e-5)
    expected = np.average(F.cross_entropy(z, labels, reduction="none"), weights=w)
    assert found["test_loss"] == found["train_loss"] == pytest.approx(expected, rel=1e-5)
    unweighted = measured(task, labels)[0]
    assert unweighted["test_accuracy"] == pytest.approx(100.0 * accuracy_score(labels, z.argmax(1)), rel=1e-5)


@pytest.mark.parametrize("loss", [SquaredError(), Huber(0.5)], ids=str)
def test_weighted_regression_scores_are_scikit_learn_s(loss: Loss) -> None:
    task = linear(SampleWeighted(loss), lambda x: (x[:, :2].sin() + 3.0, weights_of(x)), 4, outputs=2)
    found, z = measured(task)
    y, w = task.y
    assert set(found) == {f"{part}_{name}" for part in ("train", "test") for name in ("loss", "mse", "r2")}
    assert found["test_mse"] == pytest.approx(mean_squared_error(y, z, sample_weight=w), rel=1e-5)
    r2 = r2_score(y, z, sample_weight=w, multioutput="variance_weighted")
    assert found["train_r2"] == pytest.approx(r2, rel=1e-4)


def test_weighted_labels_have_weighted_scores() -> None:
    task = linear(SampleWeighted(Hinge()), lambda x: ((x[:, :3] > 0).float(), weights_of(x)), 4, outputs=3)
    found, z = measured(task)
    right, w = (z > 0.5) == (task.y[0] == 1), task.y[1]
    assert found["test_label_accuracy"] == pytest.approx(100 * np.average(right.float().mean(1), weights=w), rel=1e-5)
    assert found["test_exact_match"] == pytest.approx(100 * np.average(right.all(1), weights=w), rel=1e-5)


def test_huber_s_scores_are_those_of_numbers() -> None:
    found, z = measured(task := linear(Huber(0.5), lambda x: x[:, :2].sin(), 4, outputs=2))
    assert found["test_mse"] == pytest.approx(F.mse_loss(z, task.y).item(), rel=1e-5)
    assert found["test_r2"] == pytest.approx(r2_score(task.y, z, multioutput="variance_weighted"), rel=1e-4)
