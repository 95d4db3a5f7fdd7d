"""Losses: values and gradients against PyTorch's, proximal operators against independent minimisers."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import wrightomega
from torch import Tensor, nn

from admm.blocks import split
from admm.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    FunctionLoss,
    Hinge,
    Huber,
    Loss,
    SquaredError,
    TripletLoss,
    as_targets,
    is_one_hot,
    one_hot,
)
from admm.models import as_given
from admm.optimizers import Problem

LOSSES = [
    SquaredError(),
    SquaredError(0.3),
    CrossEntropy(),
    CrossEntropy(2.5),
    BinaryCrossEntropy(1.5),
    Huber(0.7, 1.3),
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def example(samples: int = 8, classes: int = 4, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [2, n, C], one-hot targets [2, n, C] and their labels [2, n]."""
    rng = torch.Generator().manual_seed(0)
    z = spread * torch.randn(2, samples, classes, dtype=torch.float64, generator=rng)
    labels = torch.randint(classes, (2, samples), generator=rng)
    return z, torch.stack([one_hot(row, classes, z) for row in labels]), labels


def exact_prox(scale: float, v: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Cross-entropy's, in closed form but for one number: stationarity is κ p_c exp(κ p_c) =
    κ exp(v_c + κ y_c − l) with κ = scale / penalty and l = log Σ exp z, and Σ p_c = 1 determines l."""
    kappa = scale / penalty
    shifted = np.log(kappa) + v + kappa * y
    p = lambda l: wrightomega(shifted - l) / kappa  # noqa: E731, E741
    top = (v + kappa * y).max()
    root = brentq(lambda l: p(l).sum() - 1.0, top - kappa - 9, top + 9, xtol=1e-13, rtol=1e-15)  # noqa: E741
    return v + kappa * (y - p(root))


def sharp(loss: Loss) -> Loss:
    """With a proximal operator to machine precision."""
    return replace(loss, tolerance=1e-12) if hasattr(loss, "tolerance") else loss


def stationarity(loss: Loss, z: Tensor, v: Tensor, y: Tensor, penalty: Any) -> Tensor:
    """Norm of the gradient of the proximal objective, by autograd."""
    z = z.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.value(z, y).sum() + (penalty / 2 * (z - v) ** 2).sum(), z)
    return gradient.abs()


def test_squared_error_is_pytorch_s_with_scale_2_over_c():
    z, y, _ = example()
    expected = nn.MSELoss(reduction="none")(z, y).mean(-1)
    torch.testing.assert_close(SquaredError(2 / z.shape[-1]).value(z, y), expected, **EXACT)


def test_squared_error_without_scale_is_half_the_square():
    value = SquaredError().value(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    assert value.tolist() == [4.5]


def test_cross_entropy_is_pytorch_s():
    z, y, labels = example()
    expected = nn.CrossEntropyLoss(reduction="none")(z.flatten(0, 1), labels.flatten()).view(labels.shape)
    torch.testing.assert_close(CrossEntropy().value(z, y), expected, **EXACT)
    torch.testing.assert_close(CrossEntropy(0.3).value(z, y), 0.3 * expected, **EXACT)


def test_cross_entropy_takes_any_distribution():
    z, _, _ = example()
    y = torch.softmax(z.flip(-1), -1)
    expected = nn.CrossEntropyLoss(reduction="none")(z.flatten(0, 1), y.flatten(0, 1)).view(z.shape[:-1])
    torch.testing.assert_close(CrossEntropy().value(z, y), expected, **EXACT)


@each_loss
def test_gradient_is_autograd_s(loss):
    z, y, _ = example()
    z.requires_grad_()
    (expected,) = torch.autograd.grad(loss.value(z, y).sum(), z)
    torch.testing.assert_close(loss.gradient(z.detach(), y), expected, **EXACT)


@each_loss
def test_arguments_are_left_alone_and_targets_broadcast_over_replicas(loss):
    z, y, _ = example()
    before = z.clone(), y.clone()
    for function in (loss.value, loss.gradient, lambda z, y: loss.prox(z, y, 0.7)):
        shared = function(z, y[0])
        torch.testing.assert_close(shared[1], function(z[1:], y[:1])[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(z, before[0]) and torch.equal(y, before[1])


@each_loss
@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_prox_is_scipy_s_minimiser(loss, penalty):
    v, y, _ = example(3)
    z = sharp(loss).prox(v, y, penalty)
    for i in np.ndindex(*v.shape[:2]):

        def objective(x: np.ndarray, i: tuple[int, ...] = i) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(x, requires_grad=True)
            value = loss.value(leaf, y[i]) + penalty / 2 * (leaf - v[i]).square().sum()
            value.backward()
            return value.item(), leaf.grad.numpy()

        found = minimize(objective, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(z[i].numpy(), found.x, rtol=0, atol=1e-6)


@each_loss
def test_prox_of_two_classes_is_the_lowest_point_of_a_grid(loss):
    v, y = torch.tensor([[0.7, -0.4]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    axis = torch.linspace(-2.0, 2.0, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    objective = loss.value(grid, y) + 1.5 / 2 * (grid - v).square().sum(-1)
    torch.testing.assert_close(loss.prox(v, y, 1.5)[0], grid[objective.argmin()], rtol=0.0, atol=0.0051)


# What a prox must satisfy whatever it is given. The ratio of scale to penalty is at most 100.
logits = st.lists(st.floats(-50, 50), min_size=3, max_size=3)
moderate = st.floats(0.1, 10.0)


@settings(max_examples=150, deadline=None)
@given(
    v=logits,
    label=st.integers(0, 2),
    scale=moderate,
    penalty=moderate,
    kind=st.sampled_from([SquaredError, CrossEntropy]),
)
def test_prox_is_stationary(v, label, scale, penalty, kind):
    loss, v = kind(scale), torch.tensor([v], dtype=torch.float64)
    y = one_hot(torch.tensor([label]), 3, v)
    z = loss.prox(v, y, penalty)
    assert stationarity(loss, z, v, y, penalty).max() <= 2e-6 * (scale + penalty * (1 + v.abs().max()))


@settings(max_examples=150, deadline=None)
@given(v=logits, w=logits, scale=moderate, penalty=moderate, kind=st.sampled_from([SquaredError, CrossEntropy]))
def test_prox_is_firmly_non_expansive(v, w, scale, penalty, kind):
    v, w = (torch.tensor([values], dtype=torch.float64) for values in (v, w))
    loss = sharp(kind(scale))
    y = one_hot(torch.tensor([1]), 3, v)
    difference = loss.prox(v, y, penalty) - loss.prox(w, y, penalty)
    assert difference.square().sum() <= (difference * (v - w)).sum() + 1e-8


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "scale, penalty", [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e6), (5.0, 1.0), (0.01, 0.001), (1.0, 0.02)]
)
def test_cross_entropy_s_prox_is_exact_for_extreme_logits(magnitude, scale, penalty):
    v, y, _ = example(30, spread=magnitude)
    z = CrossEntropy(scale, tolerance=1e-12).prox(v, y, penalty)
    expected = [
        [exact_prox(scale, a.numpy(), b.numpy(), penalty) for a, b in zip(*p, strict=True)]
        for p in zip(v, y, strict=True)
    ]
    torch.testing.assert_close(z, torch.tensor(np.array(expected)), rtol=1e-11, atol=1e-9 * (1 + scale / penalty))


@pytest.mark.parametrize("ratio", [300.0, 1000.0])
def test_cross_entropy_s_prox_converges_for_a_small_penalty(ratio):
    v, y, _ = example(10, spread=1e4)
    z = CrossEntropy(ratio).prox(v, y, 1.0)
    expected = [
        [exact_prox(ratio, a.numpy(), b.numpy(), 1.0) for a, b in zip(*p, strict=True)] for p in zip(v, y, strict=True)
    ]
    torch.testing.assert_close(z, torch.tensor(np.array(expected)), rtol=1e-4, atol=1e-2)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prox_is_finite_for_any_scale(loss, dtype):
    v, y, _ = example(spread=1e4)
    for penalty in (1e-6, 1.0, 1e6):
        assert loss.prox(v.to(dtype), y.to(dtype), penalty).isfinite().all()


@each_loss
def test_prox_tends_to_its_argument_for_a_large_penalty(loss):
    v, y, _ = example()
    distance = [(loss.prox(v, y, penalty) - v).abs().max().item() for penalty in (1.0, 1e2, 1e4)]
    assert distance[1] < 0.1 * distance[0] and distance[2] < 0.1 * distance[1]


def test_prox_tends_to_the_minimiser_for_a_small_penalty():
    v, y, labels = example()
    torch.testing.assert_close(SquaredError().prox(v, y, 1e-9), y, rtol=0.0, atol=1e-7)
    z = CrossEntropy().prox(v, y, 0.02)
    assert (
        torch.equal(z.argmax(-1), labels) and CrossEntropy().value(z, y).max() < 0.2 < CrossEntropy().value(v, y).max()
    )


@each_loss
@pytest.mark.parametrize("penalty", [0.5, 2.0])
def test_prox_keeps_what_is_already_optimal(loss, penalty):
    if isinstance(loss, SquaredError | Huber):
        _, y, _ = example()
        torch.testing.assert_close(loss.prox(y, y, penalty), y, **EXACT)
    else:
        z, _, _ = example()
        y = torch.sigmoid(z) if isinstance(loss, BinaryCrossEntropy) else torch.softmax(z, -1)
        torch.testing.assert_close(loss.prox(z, y, penalty), z, **EXACT)


@each_loss
def test_a_penalty_may_differ_by_replica(loss):
    v, y, _ = example()
    together = loss.prox(v, y, torch.tensor([0.2, 3.0], dtype=torch.float64).view(2, 1, 1))
    for s, penalty in enumerate((0.2, 3.0)):
        torch.testing.assert_close(together[s], loss.prox(v[s], y[s], penalty), **EXACT)


@each_loss
def test_prox_of_a_sample_does_not_depend_on_the_others(loss):
    v, y, _ = example()
    v[0] *= 100  # takes more steps
    together = loss.prox(v, y, 0.3)
    torch.testing.assert_close(together[1], loss.prox(v[1], y[1], 0.3), **EXACT)
    v[0] = torch.nan
    diverged = loss.prox(v, y, 0.3)
    assert torch.equal(diverged[1], together[1]) and diverged[0].isnan().all()


def test_one_hot_has_a_single_one_in_the_dtype_asked_for():
    y = one_hot(torch.tensor([2, 0]), 3, torch.zeros(0, dtype=torch.float64))
    assert y.dtype == torch.float64 and y.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("key", ["scale", "max_steps", "tolerance"])
def test_what_is_not_positive_is_refused(key):
    with pytest.raises(ValueError, match=rf"^{key}: 0 is not a (positive|whole) number"):
        CrossEntropy(**{key: 0})


# --- Targets


def test_binary_cross_entropy_is_pytorch_s():
    z, _, _ = example()
    y = torch.rand(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    expected = nn.BCEWithLogitsLoss(reduction="none")(z, y).sum(-1)
    torch.testing.assert_close(BinaryCrossEntropy(0.3).value(z, y), 0.3 * expected, **EXACT)


@pytest.mark.parametrize("function", [nn.functional.cross_entropy, nn.CrossEntropyLoss], ids=["function", "module"])
def test_a_plain_function_is_a_loss(function):
    z, y, labels = example()
    made = function(reduction="none") if isinstance(function, type) else partial(function, reduction="none")
    loss = FunctionLoss(made)
    torch.testing.assert_close(loss.value(z, labels), CrossEntropy().value(z, y), **EXACT)
    torch.testing.assert_close(loss.gradient(z, labels), CrossEntropy().gradient(z, y), **EXACT)


def test_a_function_s_value_may_be_of_a_sample_s_parts():
    z, y, _ = example()
    loss = FunctionLoss(lambda z, y: (z - y).square() / 2)
    torch.testing.assert_close(loss.value(z, y).sum(-1), SquaredError().value(z, y), **EXACT)
    torch.testing.assert_close(loss.gradient(z, y), z - y, **EXACT)


def test_a_function_of_all_samples_is_refused():
    z, _, labels = example()
    with pytest.raises(ValueError, match=r'cross_entropy.* returns \[\] for 16 samples; .*reduction="none"'):
        FunctionLoss(nn.functional.cross_entropy).value(z, labels)


def test_a_function_that_compares_each_sample_with_all_targets_is_refused():
    z, y = torch.zeros(2, 3, 1), torch.zeros(2, 3)
    with pytest.raises(
        ValueError,
        match=r"returns \[6, 6\] for 6 samples; .* of outputs \[n, 1\] and targets \[n\]: give y\[:, None\]$",
    ):
        FunctionLoss(lambda z, y: (z - y) ** 2).value(z, y)


LIKE = torch.zeros(0, dtype=torch.float64)
CLASSES = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("labels", [CLASSES, CLASSES[:, None], CLASSES.byte(), CLASSES.int()], ids=str)
@pytest.mark.parametrize("loss", [SquaredError(), BinaryCrossEntropy(), Hinge(), Huber()], ids=str)
def test_class_indices_become_one_hot(loss, labels):
    assert torch.equal(loss.targets(labels, (3,), LIKE), torch.eye(3, dtype=torch.float64)[CLASSES])


@pytest.mark.parametrize("labels", [CLASSES, CLASSES[:, None], CLASSES.byte(), CLASSES.int()], ids=str)
def test_class_indices_of_cross_entropy_stay_indices(labels):
    targets = CrossEntropy().targets(labels, (3,), LIKE)
    assert torch.equal(targets, CLASSES) and targets.dtype == torch.int64


def test_class_indices_of_positions_become_one_hot_over_the_last_axis():
    labels = torch.tensor([[2, 0], [1, 1], [0, 2]])
    assert torch.equal(SquaredError().targets(labels, (2, 3), LIKE), torch.eye(3, dtype=torch.float64)[labels])
    assert torch.equal(CrossEntropy().targets(labels, (2, 3), LIKE), labels)


def test_numbers_for_one_output_need_no_axis():
    y = torch.tensor([0.5, -1.0, 3.0])
    assert torch.equal(SquaredError().targets(y, (1,), LIKE), y.double()[:, None])
    assert torch.equal(Hinge().targets(torch.tensor([True, False, True]), (1,), LIKE), LIKE.new_tensor([[1], [0], [1]]))


HALVES = torch.full((2, 4), 0.25)


@pytest.mark.parametrize(
    "loss, y, outputs, message",
    [
        (CrossEntropy(), torch.tensor([0, 3]), (3,), "go from 0 to 3, the network has outputs for 0 to 2"),
        (CrossEntropy(), torch.tensor([0, -100]), (3,), "y: class indices go from -100 to 0"),
        (SquaredError(), torch.tensor([0, 3]), (3,), "y: class indices go from 0 to 3"),
        (CrossEntropy(), torch.tensor([0.0, 1.0]), (3,), r"y: targets of torch.float32 \[2\] do not fit .* \[2, 3\]"),
        (SquaredError(), torch.zeros(2, 3), (2,), r"y: targets of torch.float32 \[2, 3\] do not fit"),
        (SquaredError(), torch.tensor([[1.0], [torch.nan]]), (1,), "y: targets must be finite numbers, found NaN"),
        (CrossEntropy(), torch.tensor([[0.0], [1.0]]), (1,), "CrossEntropy needs outputs for two classes or more"),
        (CrossEntropy(), torch.tensor([[1.0, 1.0, 0.0]]), (3,), "the rows sum to 2 to 2, .*BinaryCrossEntropy"),
        (CrossEntropy(), torch.zeros(1, 3), (3,), "the rows sum to 0 to 0"),
        (CrossEntropy(), torch.tensor([[1.5, -0.5]]), (2,), "not negative and sum to 1; .* smallest entry is -0.5"),
        (CrossEntropy(), 2.0 * torch.eye(3), (3,), "the rows sum to 2 to 2"),
        (BinaryCrossEntropy(), torch.tensor([[1.5, 0.0]]), (2,), "numbers from 0 to 1, found 0 to 1.5"),
        (Hinge(), torch.tensor([[-1.0, 1.0]]), (2,), "Hinge takes the values 0 and 1, found -1 to 1"),
        (Hinge(), HALVES, (4,), "Hinge takes the values 0 and 1, found 0.25 to 0.25"),
    ],
)  # fmt: skip
def test_targets_that_a_loss_is_not_defined_for_are_refused(loss, y, outputs, message):
    with pytest.raises(ValueError, match=message):
        loss.targets(y, outputs, LIKE)


LAST = r"the classes are the last axis .*movedim\(1, -1\)$"
ALONG_AXIS_1 = torch.eye(3)[torch.tensor([[0, 1, 2, 0]])].mT  # [1, 3, 4]


@pytest.mark.parametrize("loss", [CrossEntropy(weight=[1.0] * 3), SquaredError(), Hinge(), BinaryCrossEntropy()])
@pytest.mark.parametrize("positions", [(4,), (4, 5)])
def test_class_indices_for_classes_along_axis_1_are_told_the_remedy(loss, positions):
    with pytest.raises(ValueError, match=rf"^y: targets of torch.int64 .* do not fit .*: {LAST}"):
        loss.targets(torch.zeros(2, *positions, dtype=torch.long), (3, *positions), LIKE)


@pytest.mark.parametrize("y", [ALONG_AXIS_1, torch.zeros(1, 1, dtype=torch.long)])
def test_distributions_and_one_position_along_axis_1_are_told_the_remedy(y):
    with pytest.raises(ValueError, match=LAST):
        CrossEntropy().targets(y, (3, y.shape[-1]), LIKE)


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()])
def test_class_indices_that_fit_along_two_axes_are_warned_of_unless_they_say_which(loss):
    blocks, labels = split(nn.Sequential(nn.Linear(3, 3)), after=[]), torch.arange(6).view(2, 3) % 3
    message = (
        r"^y: class indices int64 \[n, 3\] fit outputs \[n, 3, 3\] in two ways: .*; if .* y\[\.\.\., None\] says so$"
    )
    with pytest.warns(UserWarning, match=message):
        problem = Problem(torch.ones(2, 3, 3), labels, blocks, loss, as_given)
    with warnings.catch_warnings(action="error"):
        said = Problem(torch.ones(2, 3, 3), labels[..., None], blocks, loss, as_given)
        problem.samples(torch.ones(2, 3, 3), labels)
    assert torch.equal(problem.y, said.y)


NUMBERS = torch.linspace(-1, 1, 9)[:, None]


@pytest.mark.parametrize("loss", [SquaredError(), Huber()])
@pytest.mark.parametrize(
    ("y", "told"),
    [(2e5 + 3e4 * NUMBERS, "mean 2e[+]05 and standard deviation 1.94e[+]04"), (1e-3 * NUMBERS, "deviation 0.000645")],
)
def test_targets_of_a_scale_that_a_network_would_first_have_to_learn_are_warned_of(loss, y, told):
    with pytest.warns(UserWarning, match=f"^y: numbers with .*{told}, .*; train on"):
        Problem(torch.ones(9, 2), y, split(nn.Linear(2, 1), after=[]), loss, as_given)


@pytest.mark.parametrize("y", [NUMBERS, 30 + 20 * NUMBERS, 0 * NUMBERS, torch.eye(1000)[:9, :3], torch.arange(9) % 3])
def test_targets_of_an_ordinary_scale_are_not_warned_of(y):
    with warnings.catch_warnings(action="error"):
        Problem(
            torch.ones(9, 2),
            y,
            split(nn.Linear(2, 1 if y.shape[1:] == (1,) else 3), after=[]),
            SquaredError(),
            as_given,
        )


@pytest.mark.parametrize("loss", [SquaredError(), Huber(), BinaryCrossEntropy(), Hinge(), TripletLoss()])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_outputs_without_an_axis_of_features_are_refused(loss, shape):
    network = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    message = r"network: its outputs are \[5\], where the loss needs an axis of features, \[5, 1\]; leave out"
    with pytest.raises(ValueError, match=message):
        Problem(torch.ones(5, 2), torch.zeros(shape), split(network, after=[]), loss, as_given)


def test_distributions_and_numbers_are_taken_as_they_are():
    assert torch.equal(CrossEntropy().targets(HALVES, (4,), LIKE), HALVES.double())
    y = torch.tensor([[3, -2], [0, 7]])
    assert torch.equal(as_targets(y, (2,), LIKE), y.double())


@pytest.mark.parametrize(
    "y, expected",
    [
        (torch.eye(3), True),
        (torch.eye(3)[None], True),
        (HALVES, False),
        (torch.ones(3, 1), False),
        (torch.tensor([[1.0, 1.0]]), False),
        (torch.tensor([2.0, 1.0]), False),
    ],
)
def test_one_hot_is_recognised(y, expected):
    assert is_one_hot(y) == expected
