"""Any traced network trains in blocks: networks of many kinds against PyTorch's autograd and optimizers."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import LABELS, NETWORKS, VECTORS, Inputs, Network, call, changed

from admm.checkpoints import restore, save
from admm.minibatches import minibatches
from admm.models import as_constructed, as_given
from admm.optimizers import SGD, Adam, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem
from admm.training import train

SEED = 5
HALF = ("bfloat16", "mixed types")
TRAINED = [case for case in NETWORKS if case.size != "large"]
SINGLE = [case.without_draws() for case in TRAINED if case.name != "float64"]
DOUBLE = [case.without_draws().double() for case in TRAINED if case.name not in HALF]
DRAWING = [case.double() for case in TRAINED if case.size == "small" and case.draws]


def each(cases: Iterable[Network], *long: str) -> pytest.MarkDecorator:
    """Each of these networks. long: the names of those that are left to `make test-long`."""
    marks = {name: [pytest.mark.long] for name in long}
    chosen = [pytest.param(case, marks=marks.get(case.name, [])) for case in cases]
    return pytest.mark.parametrize("case", chosen, ids=str)


def problem_of(case: Network, network: nn.Module, cuts: Sequence[str] | None = None, start: Any = as_given) -> Problem:
    return Problem(case.inputs, case.targets, case.split(network, cuts), case.loss, start)


@cache
def prepared(case: Network, cuts: tuple[str, ...] | None = None) -> tuple[nn.Module, Problem]:
    """The network of a case, and its problem, which no test changes: to trace and to compare a network takes longer
    than to train it."""
    network = case.make()
    return network, problem_of(case, network, cuts)


def evaluated(network: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = call(network.eval(), inputs)
    return outputs


def evaluated_in_blocks(problem: Problem, theta: Any, inputs: Inputs) -> Tensor:
    """The outputs [n, ...] of the one replica."""
    return problem.blocks.forward(theta, changed(inputs, lambda v: v.unsqueeze(0)))[0]


def numbers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the network's parameters and buffers, counters included."""
    return {name: v.to_dense().clone() for name, v in network.state_dict().items()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """That each tensor is as expected, up to a part of its largest entry."""
    assert ours.keys() == expected.keys()
    for name, v in expected.items():
        tolerance = relative * float(v[v.isfinite()].abs().max())
        torch.testing.assert_close(ours[name], v, rtol=0.0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


# --- evaluation


LARGE = {case: [pytest.mark.long] for case in NETWORKS if case.size == "large"}
CUT_AND_WHOLE = {f"{case}-cut": pytest.param(case, None, marks=LARGE.get(case, [])) for case in NETWORKS}
CUT_AND_WHOLE |= {
    f"{case}-whole": pytest.param(case, (), marks=[pytest.mark.long] if case.size == "medium" else [])
    for case in NETWORKS
    if case not in LARGE
}


@pytest.mark.parametrize(("case", "cuts"), CUT_AND_WHOLE.values(), ids=CUT_AND_WHOLE)
def test_blocks_compute_what_the_network_computes(case: Network, cuts: Any) -> None:
    network = case.make()
    problem = problem_of(case, network, cuts)
    theta, expected = problem.initial([SEED]), evaluated(network, case.inputs)
    outputs = evaluated_in_blocks(problem, theta, case.inputs)
    assert_close({"": outputs}, {"": expected}, 1e-2 if expected.dtype == torch.bfloat16 else 1e-5)
    exported = problem.blocks.export(theta).state_dict()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    assert not torch.equal(evaluated(network, case.inputs), expected)
    network.load_state_dict(exported)
    assert torch.equal(evaluated(network, case.inputs), expected)


# --- back-propagation

RULES = {
    "sgd": (
        SGD(momentum=0.9, weight_decay=0.05),
        lambda p, step: torch.optim.SGD(p, step, momentum=0.9, weight_decay=0.05),
    ),
    "adamw": (
        Adam(epsilon=1e-4, weight_decay=0.05),
        lambda p, step: torch.optim.AdamW(p, step, eps=1e-4, weight_decay=0.05),
    ),
}


def plain_training(case: Network, network: nn.Module, rule: str, epochs: int) -> Iterator[dict[str, Tensor]]:
    """What is in the network after each epoch of a plain PyTorch loop."""
    network = copy.deepcopy(network).train()
    optimizer = RULES[rule][1]([p for p in network.parameters() if p.requires_grad], case.step_size)
    for epoch in range(epochs):
        for (batch,) in minibatches(len(case.targets), case.batch_size, [SEED], epoch, torch.device("cpu")):
            optimizer.zero_grad()
            x = changed(case.inputs, lambda v, batch=batch: v[batch])
            case.mean_loss(call(network, x), case.targets[batch]).backward()
            optimizer.step()
        yield numbers(network)


def assert_trains_as_plain_pytorch(case: Network, cuts: Any, rule: str, relative: float) -> None:
    network, problem = prepared(case, cuts)
    epochs = 4 if case.size == "small" else 2
    optimizer = Backprop(epochs, RULES[rule][0], case.step_size, case.batch_size)
    state = optimizer.init(problem, [SEED])
    for expected in plain_training(case, network, rule, epochs):
        optimizer.step(problem, state)
        assert_close(numbers(problem.blocks.export(state.theta)), expected, relative)


@each(SINGLE)
def test_back_propagation_is_torch_optim_s(case: Network) -> None:
    assert_trains_as_plain_pytorch(case, (), "sgd", 2e-2 if case.name in HALF else 1e-5)


@each(DOUBLE, "resnet18", "mobilenet_v3_small")
def test_back_propagation_through_blocks_is_torch_optim_s(case: Network) -> None:
    assert_trains_as_plain_pytorch(case, None, "sgd", 1e-12)


@each([case for case in DOUBLE if case.size == "small"])
def test_back_propagation_with_adam_is_torch_optim_s(case: Network) -> None:
    """In float32, Adam would follow the rounding errors of gradients that are 0, such as those of a bias before a batch
    normalisation, or of the keys of an attention."""
    assert_trains_as_plain_pytorch(case, (), "adamw", 1e-12)


# --- the block methods

TOWARDS_BACKPROP = {
    "online": lambda step: OnlineBlockADMM(1, 1e8, step, beta=1.0, theta_update=SGD()),
    "block": lambda step: BlockADMM(1, 1e8, step, beta=1.0, forward_mixing=1.0, theta_update=SGD()),
    "gotmare": lambda step: Gotmare(1, 1e8, step, rho=1.0, theta_update=SGD()),
}


def hardly_moving(name: str, case: Network) -> Any:
    """A method with steps ζ of Z so small that a gradient is off by O(ζ), and so large that ζ^T, of which it is a
    multiple in the first of T blocks, is not lost in rounding. Θ makes a long step, to show it."""
    return TOWARDS_BACKPROP[name](1e-4 if len(case.cuts) > 1 else 1e-5)


def after_one_step(problem: Problem, optimizer: Any) -> nn.Module:
    """The network after a step of all samples."""
    optimizer = replace(optimizer, batch_size=len(problem.y))
    return problem.blocks.export(optimizer.step(problem, optimizer.init(problem, [SEED])).theta)


def assert_gradients_are_parallel(case: Network, before: nn.Module, after: nn.Module, oracle: nn.Module) -> None:
    """That each block's parameters have moved along the oracle's gradient. A tied parameter is left out: it has parts
    of its gradient from two blocks, to which ζ gives different lengths."""
    blocks, start, expected = case.block_of(before), dict(before.named_parameters()), dict(oracle.named_parameters())
    moved: dict[int, list[Tensor]] = defaultdict(list)
    gradients: dict[int, list[Tensor]] = defaultdict(list)
    for name, p in after.named_parameters():
        if not start[name].requires_grad:
            assert torch.equal(p, start[name])
        elif name not in case.tied:
            moved[blocks[name]].append((start[name] - p).detach().flatten())
            gradients[blocks[name]].append(expected[name].grad.flatten())
    for t, parts in moved.items():
        assert 1.0 - torch.cosine_similarity(torch.cat(parts), torch.cat(gradients[t]), dim=0) < 1e-5, f"block {t}"


@pytest.mark.parametrize("method", TOWARDS_BACKPROP)
@each(DOUBLE, "resnet18")
def test_gradients_are_parallel_to_back_propagation_s_where_z_hardly_moves(case: Network, method: str) -> None:
    if case.size == "medium" and method != "online":
        pytest.skip("the other methods are tried on small networks")
    network, problem = prepared(case)
    oracle = copy.deepcopy(network).train()
    case.mean_loss(call(oracle, case.inputs), case.targets).backward()
    after = after_one_step(problem, hardly_moving(method, case))
    assert_gradients_are_parallel(case, network, after, oracle)
    statistics = dict(oracle.named_buffers())
    assert_close(*({name: numbers(one)[name] for name in statistics} for one in (after, oracle)), 1e-3)


@pytest.mark.parametrize("method", TOWARDS_BACKPROP)
@each(DRAWING)
def test_all_evaluations_of_a_visit_draw_the_same(case: Network, method: str) -> None:
    """Else the gradients would not be those of back-propagation with one draw."""
    network, problem = prepared(case)
    oracle = after_one_step(problem, Backprop(1, SGD(), 1.0))
    for p, before in zip(oracle.parameters(), network.parameters(), strict=True):
        p.grad = (before - p).detach()
    after = after_one_step(problem, hardly_moving(method, case))
    assert_gradients_are_parallel(case, network, after, oracle)


# --- dropout


@cache
def of_one_sample(case: Network, draws: bool = True) -> Network:
    """The same with copies of the first sample, in one mini-batch, so that the order of the samples has no effect."""
    copies = min(4, len(case.targets))
    x, y = (changed(v, lambda u: u[:1].repeat(copies, *[1] * (u.ndim - 1))) for v in (case.inputs, case.targets))
    case = replace(case, inputs=x, targets=y, batch_size=copies)
    return case if draws else case.without_draws()


DROPPING = {
    "online": OnlineBlockADMM(2, 1e-2, z_step=0.1),
    "block": BlockADMM(2, 1e-2, z_step=0.1),
    "gotmare": Gotmare(2, 1e-2, z_step=0.1),
    "backprop": Backprop(2, SGD(), 1e-2),
}


@pytest.mark.parametrize("optimizer", DROPPING.values(), ids=DROPPING)
@each(DRAWING)
def test_what_is_dropped_follows_from_the_seed(case: Network, optimizer: Any) -> None:
    (_, problem), (_, still) = (prepared(of_one_sample(case, draws)) for draws in (True, False))
    optimizer = replace(optimizer, batch_size=len(problem.y))
    one, other = trained(problem, optimizer, [1, 2])
    assert not same(one, other) and same(*trained(still, optimizer, [1, 2]))
    assert same(one, *trained(problem, optimizer, [1])) and same(other, *trained(problem, optimizer, [2]))
    assert same(one, *trained(problem, optimizer, [1], interrupted=True))


def trained(
    problem: Problem, optimizer: Any, seeds: Sequence[int], interrupted: bool = False
) -> list[dict[str, Tensor]]:
    """What is in the networks after two steps; PyTorch's own random state is not to matter."""
    torch.rand(1)
    state = optimizer.step(problem, optimizer.init(problem, seeds))
    if interrupted:
        saved, state = copy.deepcopy(save(state)), optimizer.init(problem, seeds)
        restore(state, saved)
    optimizer.step(problem, state)
    return [numbers(problem.blocks.export(state.theta, replica)) for replica in range(len(seeds))]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@each(DRAWING)
def test_each_visit_draws_anew(case: Network) -> None:
    for draws in (True, False):
        network, problem = prepared(of_one_sample(case, draws))
        optimizer = Backprop(2, SGD(), 1e-9, len(problem.y))
        states = [torch.cat([p.flatten() for p in network.parameters()])]
        state = optimizer.init(problem, [SEED])
        for _ in range(2):
            exported = problem.blocks.export(optimizer.step(problem, state).theta)
            states.append(torch.cat([p.flatten() for p in exported.parameters()]))
        first, second = (after - before for before, after in pairwise(states))
        differ = torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(first)
        assert differ > 1e-2 if draws else differ < 1e-4


@each(DRAWING)
def test_the_mode_in_which_a_network_is_given_does_not_matter(case: Network) -> None:
    network, problem = prepared(case)
    optimizer = OnlineBlockADMM(2, 1e-2, batch_size=case.batch_size)
    other = problem_of(case, copy.deepcopy(network).eval())
    of_training, of_evaluation = (trained(task, optimizer, [1]) for task in (problem, other))
    assert same(*of_training, *of_evaluation)


# --- training


@cache
def as_built(case: Network) -> Problem:
    return problem_of(case, case.build(), start=as_constructed(case.build))


@pytest.mark.parametrize("method", [OnlineBlockADMM, BlockADMM, Gotmare])
@each(TRAINED, "resnet18", "mobilenet_v3_small")
def test_a_network_trains_with_the_defaults(case: Network, method: Any) -> None:
    if case.size == "medium" and method is not OnlineBlockADMM:
        pytest.skip("the other methods are tried on small networks")
    problem = as_built(case)
    iterations, seeds = 2 if case.size == "small" else 1, (1, 2)
    optimizer = method(iterations, 1e-3, batch_size=case.batch_size)
    together = optimizer.init(problem, seeds)
    before = [problem.blocks.export(together.theta, replica) for replica in range(2)]
    few = changed(case.inputs, lambda v: v[:3]), case.targets[:3]
    history = train(problem, optimizer, together, iterations, test=few)
    assert not history.diverged
    found = [(row["iteration"], row["replica"]) for row in history.rows]
    assert found == [(k, replica) for k in range(iterations + 1) for replica in range(2)]
    assert all(math.isfinite(value) for row in history.rows for value in row.values())
    close = 2e-2 if case.name in HALF else 1e-4
    for replica in range(2):
        rows = [row for row in history.rows if row["replica"] == replica]
        for name, (x, y) in {"train_loss": (case.inputs, case.targets), "test_loss": few}.items():
            expected = case.mean_loss(evaluated(before[replica], x).float(), y)
            assert rows[0][name] == pytest.approx(float(expected), rel=close)
        assert not same(numbers(problem.blocks.export(together.theta, replica)), numbers(before[replica]))


@pytest.mark.parametrize("method", [OnlineBlockADMM, BlockADMM, Gotmare])
@each(TRAINED, "resnet18", "mobilenet_v3_small")
def test_seeds_train_together_as_alone(case: Network, method: Any) -> None:
    """In float64, since Adam follows the rounding errors of small gradients. Where a network has types of its own, the
    losses alone are compared."""
    if case.size == "medium" and method is not OnlineBlockADMM:
        pytest.skip("the other methods are tried on small networks")
    has_own_types = case.name in HALF
    problem = as_built(case if has_own_types else case.double())
    optimizer = method(1, 1e-3, batch_size=case.batch_size)
    together, alone = (optimizer.init(problem, seeds) for seeds in ([1, 2], [2]))
    (*_, first, second), (*_, only) = (train(problem, optimizer, state, 1).rows for state in (together, alone))
    assert first["train_loss"] != second["train_loss"]
    assert only["train_loss"] == pytest.approx(second["train_loss"], rel=2e-2 if has_own_types else 1e-9)
    if not has_own_types:
        trained = (numbers(problem.blocks.export(*one)) for one in ((together.theta, 1), (alone.theta,)))
        torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-9)


# --- what cannot be trained as PyTorch would train it


@dataclass
class Halves:
    """Not known to PyTorch as a structure of tensors."""

    one: Tensor
    other: Tensor


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Halves:  # type: ignore[override]
        return Halves(*super().forward(x).chunk(2, dim=1))


class OfHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Halved(5, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x)
        return self.head(halves.one * halves.other)


class WithoutGradient(nn.Module):
    """Its first layer is not trained, though its parameters are none of the frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.features(x)
        return self.head(self.hidden(z).tanh())


@pytest.mark.parametrize(("build", "cut"), [(OfHalves, "first"), (WithoutGradient, "hidden")])
def test_a_network_is_trained_as_pytorch_trains_it_or_refused(build: Any, cut: str) -> None:
    case = Network("", build, VECTORS, LABELS, (cut,)).double()
    try:
        problem_of(case, case.build())
    except ValueError:
        return
    assert_trains_as_plain_pytorch(case, None, "sgd", 1e-12)
