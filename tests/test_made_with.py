"""A state goes on with the update rules that it was made with, whose numbers alone may change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from test_deepfacto import BASE
from test_deepfacto import problem as problem_of_deepfacto
from torch import Tensor

import admm.optimizers
from admm.blocks import Blocks
from admm.checkpoints import restore, save
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
    Optimizer,
    Problem,
    UpdateRule,
    ZUpdate,
)
from admm.optimizers.rules import Moments, Stacks
from admm.training import train

SEEDS = (3, 4)


class Own(UpdateRule):
    """A rule of one's own, which knows nothing of what this file is about."""

    def __init__(self, momentum: float = 0.0, kind: str = "plain", inner: UpdateRule | None = None) -> None:
        self.momentum, self.kind, self.inner = momentum, kind, inner

    def init(self, theta: Stacks) -> Moments:
        moments = [] if self.inner is None else self.inner.init(theta)
        return [*moments, [torch.zeros_like(p) for p in theta]] if self.momentum else moments

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        for p, g in zip(theta, gradient, strict=True):
            p.sub_(g, alpha=float(step))
        for moment in moments:
            torch._foreach_add_(moment, 1.0)


@dataclass(frozen=True)
class OwnOfOneNetwork(UpdateRule):
    """With moments that need the parameters of a network."""

    power: float = 2.0

    def init(self, theta: Stacks) -> Moments:
        return [[torch.zeros_like(theta[3])]]

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None: ...


def groups(blocks: Blocks, which: str, rule: UpdateRule) -> Grouped:
    return Grouped(blocks, [Group(which, rule, 0.5)], Adam())


RULES: dict[str, Callable[[Blocks], UpdateRule]] = {
    "sgd": lambda blocks: SGD(),
    "momentum": lambda blocks: SGD(momentum=0.9),
    "adam": lambda blocks: Adam(),
    "clipped": lambda blocks: Clipped(Clipped(Averaged(Clipped(SGD(momentum=0.9), 1.0)), 2.0), 3.0),
    "average of sgd": lambda blocks: Averaged(SGD()),
    "average of adam": lambda blocks: Averaged(Adam()),
    "biases": lambda blocks: groups(blocks, "*.bias", Adam()),
    "weights": lambda blocks: groups(blocks, "*.weight", Adam()),
    "biases by momentum": lambda blocks: groups(blocks, "*.bias", SGD(momentum=0.9)),
    "biases by sgd": lambda blocks: groups(blocks, "*.bias", SGD()),
    "average of groups": lambda blocks: Averaged(groups(blocks, "*.bias", Adam())),
    "average of other groups": lambda blocks: Averaged(groups(blocks, "*.weight", Adam())),
    "own": lambda blocks: Own(momentum=0.9),
    "own, of another kind": lambda blocks: Own(momentum=0.9, kind="signs"),
    "own, around adam": lambda blocks: Own(momentum=0.9, inner=Adam()),
    "own, around an average": lambda blocks: Own(momentum=0.9, inner=Averaged(SGD(momentum=0.9))),
    "own, of one network": lambda blocks: OwnOfOneNetwork(),
}


def backprop(rule: UpdateRule) -> Backprop:
    return Backprop(4, rule, 0.1, batch_size=12)


def assert_refused(problem: Problem, made: Optimizer[Any], given: Optimizer[Any], what: str = "theta_update") -> None:
    """By `train` and by `restore`, which leave all as it was."""
    state, fresh = made.init(problem, SEEDS), given.init(problem, SEEDS)
    message = f"was made with {what}=.* cannot go on with what it keeps; give the rule that it was made with, or"
    with pytest.raises(ValueError, match=f"^state: {message}"):
        train(problem, given, state)
    state.theta.fill(state.theta.flat() + 1.0)
    with pytest.raises(ValueError, match=f"^saved: {message}"):
        restore(fresh, save(state))
    assert torch.equal(fresh.theta.flat() + 1.0, state.theta.flat()) and state.iteration == 0


@pytest.mark.parametrize("name", RULES)
def test_a_state_of_another_rule_is_refused(name: str, mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    made, *others = (backprop(RULES[key](problem.blocks)) for key in (name, *(key for key in RULES if key != name)))
    assert len({optimizer.keeps["theta_update"] for optimizer in (made, *others)}) == len(RULES)
    for given in others:
        assert_refused(problem, made, given)


def test_the_message_says_what_was_given_and_what_would_be_right(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    state = backprop(Adam()).init(problem, SEEDS)
    with pytest.raises(ValueError) as raised:
        train(problem, backprop(Averaged(SGD(momentum=0.9))), state)
    assert str(raised.value) == (
        "state: was made with theta_update=Adam() of 3 moments, and Averaged(rule=SGD() of 1 moment) of 3 moments "
        "cannot go on with what it keeps; give the rule that it was made with, or, to begin anew with its parameters, "
        "split(problem.blocks.export(state.theta), …) and take initialise=admm.as_given"
    )
    state = backprop(groups(problem.blocks, "*.bias", Adam())).init(problem, SEEDS)
    with pytest.raises(ValueError, match=r"with theta_update=group 1, fc1\.linear\.bias: Adam\(\) of 3 moments, and g"):
        train(problem, backprop(groups(problem.blocks, "*.weight", Adam())), state)


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (lambda blocks: SGD(momentum=0.9), lambda blocks: SGD(momentum=0.5, weight_decay=0.1)),
        (lambda blocks: Adam(), lambda blocks: Adam(0.8, 0.99, 1e-16, weight_decay=0.1)),
        (lambda blocks: Adam(), lambda blocks: Clipped(Adam(), 0.1)),
        (lambda blocks: Clipped(SGD(momentum=0.9), 0.1), lambda blocks: SGD(momentum=0.9)),
        (lambda blocks: Averaged(SGD()), lambda blocks: Averaged(SGD(weight_decay=0.1), 0.5)),
        (lambda blocks: Own(0.9), lambda blocks: Own(0.1)),
        (lambda blocks: SGD(), lambda blocks: Own()),
        (lambda blocks: SGD(), lambda blocks: Grouped(blocks, [Group(1, SGD())], SGD())),
        (lambda blocks: OwnOfOneNetwork(1.0), lambda blocks: OwnOfOneNetwork(3.0)),
        (
            lambda blocks: groups(blocks, "*.bias", Adam()),
            lambda blocks: Grouped(blocks, [Group("*.[b]ias", Adam(), 0.1), Group("*", Adam(0.8))], SGD()),
        ),
    ],
)
def test_numbers_and_what_keeps_the_same_may_change(
    made: Callable[[Blocks], UpdateRule], given: Callable[[Blocks], UpdateRule], mlp_problem: Callable[..., Problem]
) -> None:
    problem = mlp_problem()
    optimizer, other = backprop(made(problem.blocks)), replace(backprop(given(problem.blocks)), step_size=0.01)
    state, fresh = optimizer.init(problem, SEEDS), other.init(problem, SEEDS)
    train(problem, optimizer, state, 1)
    restore(fresh, save(state))
    for goes_on in (state, fresh):
        train(problem, other, goes_on, 2)
        assert goes_on.iteration == 2
    assert torch.equal(state.theta.flat(), fresh.theta.flat())


@pytest.mark.parametrize("optimizer", [Gotmare(4, 0.1), OnlineBlockADMM(4, 0.1), BlockADMM(4, 0.1), BASE])
def test_each_optimizer_refuses_it(optimizer: Any, mlp_problem: Callable[..., Problem]) -> None:
    problem = problem_of_deepfacto() if optimizer is BASE else mlp_problem()
    one, two = (replace(optimizer, theta_update=rule, batch_size=12) for rule in (Adam(), Averaged(SGD(momentum=0.9))))
    assert_refused(problem, one, two)
    assert_refused(problem, two, one)


def test_each_optimizer_says_what_it_keeps() -> None:
    classes = [getattr(admm.optimizers, name) for name in admm.optimizers.__all__]
    with_rule = [c for c in classes if issubclass(c, Optimizer) and c is not Optimizer]
    with_rule = [c for c in with_rule if "theta_update" in [f.name for f in fields(c)]]
    assert len(with_rule) == 5 and all(c.keeps is not Optimizer.keeps for c in with_rule)


# --- Rules of Z

BLOCK = BlockADMM(4, 0.1, batch_size=12)
ONLINE = OnlineBlockADMM(4, 0.1, batch_size=12, dual="none")
CURVED = [ZUpdate("lipschitz"), ZUpdate("majorised")]
OF_SAMPLES = [ZUpdate("adam"), ZUpdate("adam", output_update="prox")]


@pytest.mark.parametrize(
    ("optimizer", "updates"),
    [(BLOCK, [ZUpdate("gradient"), *OF_SAMPLES, *CURVED]), (ONLINE, [ZUpdate("adam"), *CURVED])],
)
def test_a_state_of_another_update_of_z_is_refused(
    optimizer: Any, updates: list[ZUpdate], mlp_problem: Callable[..., Problem]
) -> None:
    problem = mlp_problem()
    for made in updates:
        for given in updates:
            if made != given:
                pair = [replace(optimizer, z_update=update) for update in (made, given)]
                assert_refused(problem, *pair, what="z_update")


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (replace(ONLINE, z_update=ZUpdate("adam")), ONLINE),
        (ONLINE, replace(ONLINE, z_update=ZUpdate("adam", 2, "prox"))),
        (replace(ONLINE, z_update=CURVED[0]), replace(ONLINE, z_update=ZUpdate("lipschitz", 2, "prox"))),
        (replace(BLOCK, z_update=OF_SAMPLES[0]), replace(BLOCK, z_update=ZUpdate("adam", 2, beta1=0.8))),
        (BLOCK, replace(BLOCK, sweep="batch", dual_step=1.0, forward_mixing=0.0, beta=1.0)),
        (Gotmare(4, 0.1, batch_size=12), Gotmare(4, 0.1, batch_size=12, z_update=Adam(), z_rounds=2)),
    ],
)
def test_an_update_of_z_that_keeps_the_same_may_change(
    made: Any, given: Any, mlp_problem: Callable[..., Problem]
) -> None:
    """Where nothing of it is kept, the numbers are those of a state that the update has made itself."""
    problem = mlp_problem()
    states = [optimizer.init(problem, SEEDS) for optimizer in (made, given)]
    for state in states:
        train(problem, given, state, 1)
    assert torch.equal(*(state.theta.flat() for state in states))


def test_duals_that_a_state_lacks_are_told() -> None:
    problem, optimizer = problem_of_deepfacto(), replace(BASE, dual_step=0.0)
    state = optimizer.init(problem, SEEDS)
    with pytest.raises(
        ValueError, match=r"dual_step: 0\.5, but the state was made with 0 and keeps no duals; take dual"
    ):
        train(problem, replace(optimizer, dual_step=0.5), state)
    train(problem, optimizer, state, 1)


# --- States of former versions, and averages


def test_a_saved_state_of_a_former_version_goes_on_to_the_same_numbers(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    for optimizer in (BLOCK, ONLINE, backprop(Averaged(Adam()))):
        state, fresh = optimizer.init(problem, SEEDS), optimizer.init(problem, SEEDS)
        train(problem, optimizer, state, 1)
        former = save(state)
        assert former.pop("made_with") == optimizer.keeps
        torch.save(former, file := io.BytesIO())
        file.seek(0)
        restore(fresh, torch.load(file, weights_only=True))
        assert fresh.made_with == optimizer.keeps
        goes_on = [state, fresh, replace(copy.deepcopy(fresh), made_with={})]
        for each in goes_on:
            train(problem, optimizer, each, 3)
            assert torch.equal(state.theta.flat(), each.theta.flat())


def test_a_state_of_another_rule_has_no_average(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    for rule in (Adam(), SGD(momentum=0.9)):
        with pytest.raises(ValueError, match=r"state: was made with theta_update=.*, and Averaged\(rule=Adam"):
            Averaged(Adam()).average(problem, backprop(rule).init(problem, SEEDS))
