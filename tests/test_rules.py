"""Update rules around others, against PyTorch's clipping, parameter groups and averaged models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepfacto import BASE
from test_deepfacto import problem as problem_of_deepfacto
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from admm.blocks import Blocks, flattened, split
from admm.checkpoints import restore, save
from admm.losses import SquaredError
from admm.models import initialiser, mlp
from admm.optimizers import (
    SGD,
    Adam,
    Averaged,
    Backprop,
    BlockADMM,
    Clipped,
    Gotmare,
    Group,
    Grouped,
    OnlineBlockADMM,
    Problem,
    UpdateRule,
)
from admm.optimizers.rules import Moments
from admm.training import train

STEPS = (0.1, 0.02, 0.5)  # of three replicas
NORM = nn.Sequential(  # with parameters of several shapes, in two blocks
    nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), nn.Flatten(), nn.Linear(8, 3), nn.PReLU()
)


@pytest.fixture
def blocks() -> Blocks:
    return split(NORM, after=["0"])


Networks = list[dict[str, Tensor]]  # parameters by name, of each replica


def compare(
    blocks: Blocks, rule: UpdateRule, oracle: Callable[[dict[str, Tensor], float], Callable[[], None]], close: float
) -> tuple[Networks, Moments]:
    """Follow a rule and PyTorch for six updates with other gradients; `oracle` makes the update of one network for a
    step size. Returns PyTorch's parameters, and the rule's moments."""
    rng = torch.Generator().manual_seed(0)
    theta = blocks.initial([0, 1, 2], initialiser("pytorch"), torch.zeros(0, dtype=torch.float64))
    expected = [{name: p[s].clone().requires_grad_() for name, p in theta.stacks.items()} for s in range(3)]
    updates = [oracle(network, step) for network, step in zip(expected, STEPS, strict=True)]
    stacks = [*theta.stacks.values()]
    moments = rule.init(stacks)
    for k in range(6):
        scale = 10.0 ** (2 - k)
        gradient = [torch.randn(p.shape, dtype=torch.float64, generator=rng) * scale for p in stacks]
        before = [g.clone() for g in gradient]
        rule.apply(stacks, gradient, moments, torch.tensor(STEPS, dtype=torch.float64))
        assert all(map(torch.equal, gradient, before))
        for s, (network, update) in enumerate(zip(expected, updates, strict=True)):
            for parameter, g in zip(network.values(), gradient, strict=True):
                parameter.grad = g[s].clone()
            update()
            for parameter, p in zip(network.values(), stacks, strict=True):
                torch.testing.assert_close(p[s], parameter.detach(), rtol=close, atol=close)
    assert all(len(tensor) == 3 for moment in moments for tensor in moment)
    return expected, moments


def clipped(optimizer: torch.optim.Optimizer, parameters: list[Tensor], max_norm: float) -> Callable[[], None]:
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return update


def test_parameters_are_found_by_their_names(blocks: Blocks) -> None:
    theta = blocks.initial([0, 1], initialiser("pytorch"), torch.zeros(0))
    for replica in (0, 1):
        named = dict(blocks.export(theta, replica).named_parameters())
        slices = blocks.parameter_slices()
        assert slices.keys() == named.keys() and len(named) == 7
        for name, part in slices.items():
            assert torch.equal(theta.flat()[replica, part], named[name].detach().flatten())


@pytest.mark.parametrize("max_norm", [0.1, 50.0])
def test_a_clipped_gradient_is_pytorch_s(blocks: Blocks, max_norm: float) -> None:
    def oracle(network: dict[str, Tensor], step: float) -> Callable[[], None]:
        parameters = list(network.values())
        return clipped(torch.optim.SGD(parameters, step, momentum=0.9), parameters, max_norm)

    compare(blocks, Clipped(SGD(momentum=0.9), max_norm), oracle, 1e-12)


def test_groups_are_torch_optim_s(blocks: Blocks) -> None:
    """By wildcards, a block and both; of neighbours and of parameters apart; with rules and step sizes of their own."""
    rule = Grouped(
        blocks,
        [
            Group("*.bias", Adam(beta1=0.8), factor=[2.0, 1.0, 0.5]),
            Group(["2.weight", "0.1.*"], SGD(momentum=0.9, weight_decay=0.1), 0.1),
            Group(1, Adam(weight_decay=0.3), 0.0),
        ],
        rest=SGD(),
    )

    def oracle(network: dict[str, Tensor], step: float) -> Callable[[], None]:
        biases = [network[name] for name in ("0.0.bias", "0.1.bias", "2.bias")]
        adam = torch.optim.Adam(biases, step * {0.1: 2.0, 0.02: 1.0, 0.5: 0.5}[step], (0.8, 0.999))
        sgd = torch.optim.SGD(
            [
                {"params": [network["2.weight"], network["0.1.weight"]], "lr": 0.1 * step, "momentum": 0.9}
                | {"weight_decay": 0.1},
                {"params": [network["3.weight"]], "lr": step},
            ]
        )
        return lambda: (adam.step(), sgd.step())  # type: ignore[func-returns-value, return-value]

    start = blocks.initial([0, 1, 2], initialiser("pytorch"), torch.zeros(0, dtype=torch.float64)).flat()
    expected, _ = compare(blocks, rule, oracle, 1e-12)
    part = blocks.parameter_slices()["0.0.weight"]  # with the factor 0
    assert torch.equal(torch.stack([network["0.0.weight"].detach().flatten() for network in expected]), start[:, part])


def test_a_clipped_group_is_clipped_alone(blocks: Blocks) -> None:
    rule = Grouped(blocks, [Group(2, Clipped(SGD(), 0.2))], Clipped(SGD(), 3.0))

    def oracle(network: dict[str, Tensor], step: float) -> Callable[[], None]:
        second = [network[name] for name in ("2.weight", "2.bias", "3.weight")]
        first = [network[name] for name in network if name.startswith("0.")]
        updates = [clipped(torch.optim.SGD(some, step), some, norm) for some, norm in ((second, 0.2), (first, 3.0))]
        return lambda: [update() for update in updates] and None

    compare(blocks, rule, oracle, 1e-12)


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_an_average_is_pytorch_s(blocks: Blocks, decay: float) -> None:
    models: list[AveragedModel] = []

    def oracle(network: dict[str, Tensor], step: float) -> Callable[[], None]:
        parameters = nn.ParameterList(network.values())
        model = AveragedModel(parameters, multi_avg_fn=get_ema_multi_avg_fn(decay))
        optimizer = torch.optim.Adam(network.values(), step)
        models.append(model)

        def update() -> None:
            optimizer.step()
            with torch.no_grad():
                for parameter, value in zip(parameters, network.values(), strict=True):
                    parameter.copy_(value)
            model.update_parameters(parameters)

        return update

    rule = Averaged(Adam(), decay)
    _, moments = compare(blocks, rule, oracle, 1e-12)
    expected = torch.stack([torch.cat([p.detach().flatten() for p in model.module]) for model in models])
    torch.testing.assert_close(flattened(moments[-2]), expected, rtol=1e-12, atol=1e-12)


def test_averaged_networks_are_exported(mlp_problem: Callable[..., Problem]) -> None:
    problem, rule = mlp_problem(), Averaged(SGD(), 0.5)
    optimizer = Backprop(2, rule, 0.1, batch_size=24)
    state = optimizer.init(problem, (0, 1))
    after = [optimizer.step(problem, state).theta.flat().clone() for _ in range(2)]
    network = problem.blocks.export(rule.average(problem, state), replica=1)
    expected = (after[0] + after[1])[1] / 2
    torch.testing.assert_close(problem.blocks.flatten(network), expected, rtol=1e-13, atol=1e-15)


# --- Together, and in the optimizers


def composed(blocks: Blocks) -> UpdateRule:
    groups = [Group("*.bias", Adam(), 0.5), Group(1, Clipped(SGD(momentum=0.9), 0.05), 2.0)]
    return Clipped(Averaged(Grouped(blocks, groups, Adam(weight_decay=0.1)), 0.9), 0.3)


def optimizers(rule: UpdateRule) -> Iterator[tuple[str, Any]]:
    yield "backprop", Backprop(4, rule, STEPS, batch_size=5)
    yield "block", BlockADMM(4, STEPS, 1e-3, batch_size=5, dual_step=0.5, forward_mixing=0.5, theta_update=rule)
    yield "online", OnlineBlockADMM(4, STEPS, batch_size=5, theta_update=rule)
    yield "gotmare", Gotmare(4, STEPS, batch_size=5, theta_update=rule)


NAMES = [name for name, _ in optimizers(SGD())]


def optimizer_of(name: str, problem: Problem) -> Any:
    return dict(optimizers(composed(problem.blocks)))[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_its_replicas_alone(name: str, mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    optimizer = optimizer_of(name, problem)
    stack = optimizer.init(problem, (3, 4, 5))
    train(problem, optimizer, stack)
    step_size = "step_size" if name == "backprop" else "theta_step"
    for replica, step in enumerate(STEPS):
        one = replace(optimizer, **{step_size: step})
        alone = one.init(problem, (3 + replica,))
        train(problem, one, alone)
        close = {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(stack.theta.flat()[replica], alone.theta.flat()[0], **close)
        for found, expected in zip(stack.moments, alone.moments, strict=True):
            torch.testing.assert_close([m[replica] for m in found], [m[0] for m in expected], **close)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_identical(name: str, mlp_problem: Callable[..., Problem], tmp_path: Path) -> None:
    problem, checkpoint = mlp_problem(), tmp_path / "c.pt"
    optimizer = optimizer_of(name, problem)
    whole = optimizer.init(problem, (3, 4, 5))
    train(problem, optimizer, whole)
    train(problem, optimizer, optimizer.init(problem, (3, 4, 5)), 2, checkpoint=checkpoint, keep_last=True)
    resumed = optimizer.init(problem, (3, 4, 5))
    train(problem, optimizer, resumed, checkpoint=checkpoint)
    assert resumed.iteration == 4
    assert torch.equal(resumed.theta.flat(), whole.theta.flat())
    torch.testing.assert_close(resumed.moments, whole.moments, rtol=0, atol=0)


def test_a_rule_of_other_groups_is_another_run(mlp_problem: Callable[..., Problem], tmp_path: Path) -> None:
    problem, checkpoint = mlp_problem(), tmp_path / "c.pt"
    rules = [Grouped(problem.blocks, [Group(which, SGD(), 0.5)], SGD()) for which in (1, 2)]
    for rule, error in zip(rules, (None, "theta_update was Grouped"), strict=True):
        optimizer = Backprop(2, rule, 0.1, batch_size=5)
        state = optimizer.init(problem, (0,))
        if error is None:
            train(problem, optimizer, state, checkpoint=checkpoint, keep_last=True)
        else:
            with pytest.raises(ValueError, match=error):
                train(problem, optimizer, state, checkpoint=checkpoint)


def test_rules_without_an_effect_change_no_bit() -> None:
    """No clipping, one group for all, an average beside."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    problem = Problem(x, x[:, :1].sin(), split(mlp(4, [5], 1), per_layer=True), SquaredError(), initialiser("pytorch"))

    def trained(rule: UpdateRule) -> Tensor:
        optimizer = Backprop(3, rule, 0.05, batch_size=4)
        state = optimizer.init(problem, (0, 1))
        train(problem, optimizer, state)
        return save(state)["theta"]  # type: ignore[no-any-return]

    wrapped = Clipped(Averaged(Grouped(problem.blocks, [Group("*", Adam())], SGD())), 1e6)
    assert torch.equal(trained(wrapped), trained(Adam()))


# --- What is refused


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["*.gamma"],
            r"groups: '\*\.gamma' chooses none of 0\.0\.weight, .*3\.weight, which the groups before leave; ex",
        ),
        ([3], "groups: 3 chooses none of .*; expected a pattern of names, or a block from 1 to 2"),
        ([0], "groups: 0 chooses none of"),
        (["*.bias", ["*.weight", "2.bias"]], "groups: '2.bias' chooses none of 0.0.weight, "),
        (["*", 1], "groups: 1 chooses none of nothing, which"),
    ],
)
def test_a_group_of_nothing_is_refused(blocks: Blocks, groups: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grouped(blocks, [Group(which, SGD()) for which in groups], SGD())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipped(SGD(), 0.0), "max_norm: 0.0 is not a positive number"),
        (lambda: Clipped(torch.optim.SGD, 1.0), "rule: .* is no UpdateRule, such as admm.optimizers.Adam"),
        (lambda: Averaged(SGD(), 1.0), "decay: 1.0 is not a number from 0 up and below 1.0"),
        (lambda: Averaged(None), "rule: None is no UpdateRule"),  # type: ignore[arg-type]
        (lambda: Group("*", 0.1), "rule: 0.1 is no UpdateRule"),  # type: ignore[arg-type]
        (lambda: Grouped(split(NORM, after=["0"]), [], None), "rest: None is no UpdateRule"),  # type: ignore[arg-type]
        (lambda: Grouped(split(NORM, after=["0"]), ["*"], SGD()), "groups: '\\*' is no Group, such as "),  # type: ignore[list-item]
    ],
)
def test_a_wrong_option_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Rebinding(UpdateRule):
    """Which gives the new parameters to a name of its own, or the new moments."""

    def __init__(self, what: str) -> None:
        self.what = what

    def init(self, theta: list[Tensor]) -> Moments:
        return [[torch.zeros_like(p) for p in theta]]

    def apply(self, theta: list[Tensor], gradient: list[Tensor], moments: Moments, step: float | Tensor) -> None:
        for p, g, m in zip(theta, gradient, moments[0], strict=True):
            torch.rand(1)
            new_m = m + g if self.what == "moments" else m.add_(g)
            if self.what == "parameters":
                p = p - 0.1 * new_m
            elif self.what != "late" or m.abs().max() > 3:
                p.sub_(0.1 * new_m)


@pytest.mark.parametrize("what", ["parameters", "moments", "late", "nothing"])
def test_a_rule_that_does_not_change_in_place_is_warned_of(what: str, mlp_problem: Callable[..., Problem]) -> None:
    optimizer, problem, before = Backprop(1, Rebinding(what), 0.1, batch_size=6), mlp_problem(), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as told:
        optimizer.init(problem, [0])
    message = f"theta_update: the `apply` of Rebinding leaves the {what} as they are; it must change them in place"
    assert [str(w.message)[: len(message)] for w in told] == [message] * (what in ("parameters", "moments"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factor_is_one_for_each_replica(blocks: Blocks) -> None:
    with pytest.raises(ValueError, match="factor: 2 values for 3 replicas"):
        Grouped(blocks, [Group(1, SGD(), [1.0, 2.0])], SGD()).init([torch.zeros(3, 4)] * 7)


def test_groups_of_a_network_are_not_for_a_block_alone() -> None:
    task = problem_of_deepfacto()
    rule = Grouped(task.blocks, [Group(1, SGD())], SGD())
    with pytest.raises(ValueError, match=r"theta_update: Grouped is for all \d+ parameters of its blocks, not for \d+"):
        replace(BASE, theta_update=rule).init(task, (0,))


def test_moments_that_a_former_version_has_kept_as_one_tensor_are_read(mlp_problem: Callable[..., Problem]) -> None:
    problem, optimizer = mlp_problem(), Backprop(4, Adam(), 0.1, batch_size=8)
    state = optimizer.step(problem, optimizer.init(problem, (3, 4, 5)))
    former = save(state)
    former["moments"] = [flattened(m) if m[0].ndim > 1 else m[0] for m in former["moments"]]
    assert [list(moment.shape) for moment in former["moments"]] == [[3, 74], [3, 74], [3]]
    fresh = optimizer.init(problem, (3, 4, 5))
    restore(fresh, former)
    torch.testing.assert_close(fresh.moments, state.moments, rtol=0, atol=0)
    assert torch.equal(fresh.theta.flat(), state.theta.flat()) and fresh.iteration == 1
    former["moments"][0] = former["moments"][0][:, 1:]
    with pytest.raises(ValueError, match="saved: moments has 1 entries, expected 6"):
        restore(fresh, former)


@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.5), Adam()])
@pytest.mark.parametrize("step", [0.1, torch.tensor([0.1, 0.2])])
def test_no_parameters_are_left_as_they_are(rule: UpdateRule, step: float | Tensor) -> None:
    theta: list[Tensor] = []
    rule.apply(theta, [], rule.init(theta), step)
    assert theta == []
