"""Any traced network trains in blocks: networks of many kinds against PyTorch's autograd and optimizers."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import NETWORKS, Inputs, Network, call, changed, without_draws

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


def each(cases: Iterable[Network]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def problem_of(case: Network, network: nn.Module, cuts: Sequence[str] | None = None, start: Any = as_given) -> Problem:
    return Problem(case.inputs, case.targets, case.split(network, cuts), case.loss, start)


def evaluated(network: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = call(network.eval(), inputs)
    return outputs


def evaluated_in_blocks(problem: Problem, theta: Any, inputs: Inputs) -> Tensor:
    """The outputs [n, ...] of the one replica."""
    return problem.blocks.forward(theta, changed(inputs, lambda v: v.unsqueeze(0)))[0]


def numbers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the network's parameters and buffers that are numbers of floating point."""
    return {name: v.to_dense().clone() for name, v in network.state_dict().items() if v.is_floating_point()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """That each tensor is as expected, up to a part of its largest entry."""
    assert ours.keys() == expected.keys()
    for name, v in expected.items():
        tolerance = relative * float(v[v.isfinite()].abs().max())
        torch.testing.assert_close(ours[name], v, rtol=0.0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


# --- evaluation


@pytest.mark.parametrize("cuts", [None, ()], ids=["cut", "whole"])
@each(NETWORKS)
def test_blocks_compute_what_the_network_computes(case: Network, cuts: Any) -> None:
    network, fresh = case.make(), case.make(seed=1)
    problem = problem_of(case, network, cuts)
    theta, expected = problem.initial([SEED]), evaluated(network, case.inputs)
    assert not torch.equal(evaluated(fresh, case.inputs), expected)
    outputs = evaluated_in_blocks(problem, theta, case.inputs)
    assert_close({"": outputs}, {"": expected}, 1e-2 if expected.dtype == torch.bfloat16 else 1e-5)
    fresh.load_state_dict(problem.blocks.export(theta).state_dict())
    assert torch.equal(evaluated(fresh, case.inputs), expected)
    for name, v in network.state_dict().items():
        assert torch.equal(fresh.state_dict()[name].to_dense(), v.to_dense()), name


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
    network = case.make()
    problem = problem_of(case, network, cuts)
    optimizer = Backprop(4, RULES[rule][0], case.step_size, case.batch_size)
    state = optimizer.init(problem, [SEED])
    for expected in plain_training(case, network, rule, 4):
        optimizer.step(problem, state)
        assert_close(numbers(problem.blocks.export(state.theta)), expected, relative)


@each(SINGLE)
def test_back_propagation_is_torch_optim_s(case: Network) -> None:
    assert_trains_as_plain_pytorch(case, (), "sgd", 2e-2 if case.name in HALF else 1e-6)


@pytest.mark.parametrize(("cuts", "rule"), [(None, "sgd"), ((), "adamw")], ids=["cut, sgd", "whole, adamw"])
@each(DOUBLE)
def test_back_propagation_is_torch_optim_s_in_float64(case: Network, cuts: Any, rule: str) -> None:
    """In float32, Adam would follow the rounding errors of gradients that are 0, such as those of a bias before a batch
    normalisation, or of the keys of an attention."""
    assert_trains_as_plain_pytorch(case, cuts, rule, 1e-12)


# --- the block methods

# Θ makes a long step, so that differences of Θ show gradients as small as ζ³.
SMALL: dict[str, Any] = {"z_step": 1e-4, "theta_update": SGD()}
TOWARDS_BACKPROP = {
    "online": OnlineBlockADMM(1, 1e8, beta=1.0, **SMALL),
    "block": BlockADMM(1, 1e8, beta=1.0, forward_mixing=1.0, **SMALL),
    "gotmare": Gotmare(1, 1e8, rho=1.0, **SMALL),
}


def after_one_step(case: Network, network: nn.Module, optimizer: Any) -> nn.Module:
    """The network after a step of all samples."""
    problem = problem_of(case, network)
    optimizer = replace(optimizer, batch_size=len(case.targets))
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


@pytest.mark.parametrize("optimizer", TOWARDS_BACKPROP.values(), ids=TOWARDS_BACKPROP)
@each(DOUBLE)
def test_gradients_are_parallel_to_back_propagation_s_where_z_hardly_moves(case: Network, optimizer: Any) -> None:
    network = case.make()
    oracle = copy.deepcopy(network).train()
    case.mean_loss(call(oracle, case.inputs), case.targets).backward()
    after = after_one_step(case, network, optimizer)
    assert_gradients_are_parallel(case, network, after, oracle)
    statistics = [{n: v for n, v in numbers(m).items() if n in dict(m.named_buffers())} for m in (after, oracle)]
    assert_close(*statistics, 1e-3)


@pytest.mark.parametrize("optimizer", TOWARDS_BACKPROP.values(), ids=TOWARDS_BACKPROP)
@each(DRAWING)
def test_all_evaluations_of_a_visit_draw_the_same(case: Network, optimizer: Any) -> None:
    """Else the gradients would not be those of back-propagation with one draw."""
    network = case.make()
    oracle = after_one_step(case, network, Backprop(1, SGD(), 1.0))
    for p, before in zip(oracle.parameters(), network.parameters(), strict=True):
        p.grad = (before - p).detach()
    assert_gradients_are_parallel(case, network, after_one_step(case, network, optimizer), oracle)


# --- dropout


def of_one_sample(case: Network) -> Network:
    """The same with copies of the first sample, in one mini-batch, so that the order of the samples has no effect."""
    copies = min(4, len(case.targets))
    x, y = (changed(v, lambda u: u[:1].repeat(copies, *[1] * (u.ndim - 1))) for v in (case.inputs, case.targets))
    return replace(case, inputs=x, targets=y, batch_size=copies)


DROPPING = {
    "online": OnlineBlockADMM(4, 1e-2, z_step=0.1),
    "block": BlockADMM(4, 1e-2, z_step=0.1),
    "gotmare": Gotmare(4, 1e-2, z_step=0.1),
    "backprop": Backprop(4, SGD(), 1e-2),
}


@pytest.mark.parametrize("optimizer", DROPPING.values(), ids=DROPPING)
@each(DRAWING)
def test_what_is_dropped_follows_from_the_seed(case: Network, optimizer: Any) -> None:
    case = of_one_sample(case)
    network, optimizer = case.make(), replace(optimizer, batch_size=case.batch_size)
    problem, still = problem_of(case, network), problem_of(case, without_draws(copy.deepcopy(network)))
    one, other, again = (trained(problem, optimizer, [seed]) for seed in (1, 2, 1))
    assert same(one, again) and not same(one, other)
    assert same(*(trained(still, optimizer, [seed]) for seed in (1, 2)))
    assert all(same(trained(problem, optimizer, [1, 2], replica), alone) for replica, alone in enumerate((one, other)))
    assert same(trained(problem, optimizer, [1], interrupted=True), one)


def trained(
    problem: Problem, optimizer: Any, seeds: Sequence[int], replica: int = 0, interrupted: bool = False
) -> dict[str, Tensor]:
    """What is in the network of a replica after three steps; PyTorch's own random state is not to matter."""
    torch.rand(1)
    state = optimizer.step(problem, optimizer.init(problem, seeds))
    if interrupted:
        saved, state = copy.deepcopy(save(state)), optimizer.init(problem, seeds)
        restore(state, saved)
    for _ in range(2):
        optimizer.step(problem, state)
    return numbers(problem.blocks.export(state.theta, replica))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@each(DRAWING)
def test_each_visit_draws_anew(case: Network) -> None:
    case = of_one_sample(case)
    network, optimizer = case.make(), Backprop(2, SGD(), 1e-9, case.batch_size)
    for model in (network, without_draws(copy.deepcopy(network))):
        problem = problem_of(case, model)
        states = [torch.cat([p.flatten() for p in model.parameters()])]
        state = optimizer.init(problem, [SEED])
        for _ in range(2):
            exported = problem.blocks.export(optimizer.step(problem, state).theta)
            states.append(torch.cat([p.flatten() for p in exported.parameters()]))
        first, second = (after - before for before, after in pairwise(states))
        differ = torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(first)
        assert differ > 1e-2 if model is network else differ < 1e-4


# --- training


@pytest.mark.parametrize("method", [OnlineBlockADMM, BlockADMM, Gotmare])
@each(TRAINED)
def test_a_network_trains_with_the_defaults(case: Network, method: Any) -> None:
    problem = problem_of(case, case.build(), start=as_constructed(case.build))
    optimizer, seeds = method(2, 1e-3, batch_size=case.batch_size), (1, 2)
    before = [problem.blocks.export(problem.initial([seed])) for seed in seeds]
    together, *alone = (optimizer.init(problem, s) for s in (seeds, *([seed] for seed in seeds)))
    history = train(problem, optimizer, together, 2)
    assert not history.diverged
    assert [(row["iteration"], row["replica"]) for row in history.rows] == [(k, s) for k in range(3) for s in range(2)]
    assert all(math.isfinite(value) for row in history.rows for value in row.values())
    for replica, state in enumerate(alone):
        rows = [row for row in history.rows if row["replica"] == replica]
        first = case.mean_loss(evaluated(before[replica], case.inputs).float(), case.targets)
        assert rows[0]["train_loss"] == pytest.approx(float(first), rel=2e-2 if case.name in HALF else 1e-4)
        assert [row["train_loss"] for row in train(problem, optimizer, state, 2).rows] == [
            row["train_loss"] for row in rows
        ]
        ours = numbers(problem.blocks.export(together.theta, replica))
        of_one = numbers(problem.blocks.export(state.theta))
        if case.name in HALF:  # a sum of bfloat16 numbers is rounded otherwise at the end of a tensor
            assert_close(ours, of_one, 1e-2)
        else:
            assert same(ours, of_one)
        assert not same(ours, numbers(before[replica]))
