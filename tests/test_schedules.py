"""Schedules and hyperparameters by replica."""

import math
import warnings

import numpy as np
import pytest
import torch

from admm.optimizers import SGD, Backprop, BlockADMM, Gotmare, OnlineBlockADMM
from admm.schedules import block_schedules, block_values, broadcast, per_replica, schedule, warn_beyond_horizon
from admm.training import train


def test_a_cosine_schedule_is_pytorch_s():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.8)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    ours = schedule("step", {"start": 0.8, "end": 0.1}, 3)
    for k in range(11):
        assert ours(k / 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        oracle.step()


def test_after_the_run_a_schedule_stays_at_its_end():
    assert schedule("step", {"start": 1.0, "end": 0.25}, 1)(1.7) == 0.25


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0, 2.0])
def test_a_number_is_constant(progress):
    assert schedule("step", 0.1, 3)(progress) == 0.1
    assert isinstance(schedule("step", 1, 3)(progress), float)


def test_a_list_is_one_value_a_replica():
    values = schedule("step", [0.1, 1, 2.5], 3)(0.4)
    assert torch.equal(values, torch.tensor([0.1, 1.0, 2.5], dtype=torch.float64))


def test_ends_of_a_schedule_may_differ_by_replica():
    values = schedule("step", {"start": [1.0, 2.0], "end": 0.0}, 2)(0.5)
    torch.testing.assert_close(values, torch.tensor([0.5, 1.0], dtype=torch.float64), rtol=1e-12, atol=0.0)
    values = schedule("step", {"start": 1.0, "end": [0.0, 3.0]}, 2)(0.25)
    weight = (1 + math.cos(math.pi / 4)) / 2
    expected = torch.tensor([weight, weight + 3 * (1 - weight)], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "value, message",
    [
        ([1.0, 2.0], "zeta: 2 values for 3 replicas"),
        ({"start": [1.0], "end": 0.0}, "zeta.start: 1 values for 3 replicas"),
        ("0.1", "zeta: '0.1' is not a number"),
        ([1.0, None, 2.0], "zeta: None is not a number"),
        ({"start": 1.0}, "zeta: a schedule is"),
        ({"start": 1.0, "stop": 0.0}, "zeta: a schedule is"),
        (
            {"blocks": [1.0, 2.0]},
            r"zeta: takes no values per block, got \{'blocks': \[1.0, 2.0\]\}; z_step and beta do",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        schedule("zeta", value, 3)


def test_broadcast_multiplies_along_the_replica_axis():
    like = torch.ones(3, 2, 5, 4, dtype=torch.float32)
    values = per_replica("x", [1.0, 2.0, 3.0], 3)
    product = broadcast(values, like) * like
    assert product.dtype == torch.float32
    assert product.flatten(1).unique(dim=1).flatten().tolist() == [1.0, 2.0, 3.0]
    assert broadcast(0.5, like) == 0.5


def test_a_value_by_block_is_one_for_each_block():
    assert block_values("beta", {"blocks": [1.0, (2.0, 3.0)]}, 2) == [1.0, (2.0, 3.0)]
    assert block_values("beta", 0.5, 3) == [0.5, 0.5, 0.5]
    assert block_values("beta", {"start": 1.0, "end": 0.0}, 2) == [{"start": 1.0, "end": 0.0}] * 2


@pytest.mark.parametrize("value", [{"blocks": 1.0}, {"blocks": [1.0, 2.0], "start": 1.0}])
def test_a_wrong_value_by_block_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"beta: .* is not {'blocks': \[2 values, one per block\]}"):
        block_values("beta", value, 2)


def test_another_number_of_values_by_block_is_told():
    with pytest.raises(ValueError, match=r"^beta: has 3 values for blocks; 2 are needed$"):
        block_values("beta", {"blocks": [1.0, 2.0, 3.0]}, 2)


def test_what_is_no_number_is_offered_a_schedule_where_there_may_be_one():
    with pytest.raises(
        ValueError, match=r"^beta: 'x' .*; give one, a schedule {'start': …, 'end': …}, or a list, one per"
    ):
        schedule("beta", "x", 2)
    with pytest.raises(ValueError, match=r"^beta.end: -1 .*; give one, or a list, one per replica$"):
        schedule("beta", {"start": 1, "end": -1}, 2)


# --- Functions


def cosine(progress):
    """What {"start": 0.08, "end": 0.01} is."""
    return 0.01 + 0.07 * 0.5 * (1 + math.cos(math.pi * progress))


def test_a_function_is_a_schedule():
    ours = schedule("step", lambda progress: 0.1 * (1 - progress), 3)
    assert [ours(progress) for progress in (0.0, 0.25, 1.0, 1.7)] == [0.1, 0.1 * 0.75, 0.0, 0.0]
    assert isinstance(ours(0.5), float) and isinstance(schedule("step", lambda progress: 1, 3)(0.5), float)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float32)])
def test_a_function_may_give_one_value_a_replica(kind):
    values = schedule("step", lambda progress: kind([progress, 2.0, 0.5]), 3)(0.25)
    assert values.dtype == torch.float64 and values.tolist() == [0.25, 2.0, 0.5]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, float])
def test_a_function_may_give_any_number(kind):
    assert schedule("step", lambda progress: kind(progress), 2)(0.5) == 0.5


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda p: 0.5 - p, r"zeta: at progress 1: -0.5 is not a number from 0 up"),
        (lambda p: [0.1, 0.1], "zeta: at progress 0: 2 values for 3 replicas"),
        (lambda p: [0.1, math.nan, 0.1], "zeta: at progress 0: nan is not a number from 0 up"),
        (lambda p: None, "zeta: at progress 0: None is not a number"),
    ],
)
def test_a_wrong_function_is_refused_at_once(function, message):
    with pytest.raises(ValueError, match=message):
        schedule("zeta", function, 3)


def test_a_wrong_value_on_the_way_is_refused_where_it_comes():
    ours = schedule("zeta", lambda progress: math.inf if 0.4 < progress < 0.5 else 1.0, 3)
    assert ours(0.4) == 1.0
    with pytest.raises(ValueError, match=r"zeta: at progress 0\.45: inf is not a number from 0 up"):
        ours(0.45)


def test_the_largest_value_of_a_function_is_found_on_the_way():
    bump = schedule("step", lambda progress: [math.sin(math.pi * progress), 0.3], 2)
    assert bump.largest == pytest.approx(1.0)
    assert schedule("step", {"start": [0.1, 0.3], "end": 0.2}, 2).largest == 0.3


def test_mixing_that_goes_beyond_the_whole_way_is_refused(mlp_problem):
    with pytest.raises(ValueError, match=r"forward_mixing: .* is more than the whole way"):
        BlockADMM(4, 0.1, batch_size=8, forward_mixing=lambda p: 4.1 * p * (1 - p)).init(mlp_problem(), (0,))


OPTIMIZERS = {
    "backprop": lambda value: Backprop(4, SGD(0.9), value, batch_size=8),
    "theta": lambda value: BlockADMM(4, value, 0.05, batch_size=8, theta_update=SGD()),
    "z": lambda value: BlockADMM(4, 0.1, value, batch_size=8, theta_update=SGD(), forward_mixing=0.5),
    "one block's z": lambda value: BlockADMM(4, 0.1, {"blocks": [0.1, value, 0.2]}, batch_size=8, theta_update=SGD()),
    "dual": lambda value: BlockADMM(4, 0.1, 0.05, batch_size=8, theta_update=SGD(), dual_step=value),
    "mixing": lambda value: BlockADMM(4, 0.1, 0.05, batch_size=8, theta_update=SGD(), forward_mixing=value),
    "batch": lambda value: BlockADMM(4, value, value, batch_size=8, theta_update=SGD(), sweep="batch"),
    "online": lambda value: OnlineBlockADMM(4, value, value, batch_size=8, theta_update=SGD()),
    "gotmare": lambda value: Gotmare(4, value, value, batch_size=8, theta_update=SGD()),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_scheduled_value_may_be_a_function(make, mlp_problem):
    """The cosine that is built in, written as a function."""
    problem, thetas = mlp_problem(), []
    for value in ({"start": 0.08, "end": 0.01}, cosine, 0.08):
        optimizer = make(value)
        state = optimizer.init(problem, (0, 1))
        train(problem, optimizer, state)
        thetas.append(state.theta.flat())
    torch.testing.assert_close(thetas[1], thetas[0], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(thetas[2], thetas[0], rtol=1e-9, atol=1e-12)


def test_functions_by_block_and_by_replica_are_those_of_runs_alone(mlp_problem):
    def steps(progress):
        return [0.1 * (1 - progress), 0.05]

    problem = mlp_problem()
    stack = Backprop(4, SGD(0.9), steps, batch_size=8)
    state = stack.init(problem, (0, 1))
    train(problem, stack, state)
    for replica in (0, 1):
        alone = Backprop(4, SGD(0.9), lambda p, replica=replica: steps(p)[replica], batch_size=8)
        one = alone.init(problem, (replica,))
        train(problem, alone, one)
        torch.testing.assert_close(one.theta.flat()[0], state.theta.flat()[replica], rtol=1e-10, atol=1e-12)
    first, second = block_schedules("z_step", {"blocks": [cosine, 0.3]}, 2, 1)
    assert (first(0.5), second(0.5)) == (cosine(0.5), 0.3)


def test_a_function_ends_with_the_optimizer_s_iterations():
    with pytest.warns(UserWarning, match="from 4 on the end of the schedule holds for theta_step"):
        warn_beyond_horizon(BlockADMM(4, cosine), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_beyond_horizon(BlockADMM(4, cosine), 4)
        warn_beyond_horizon(BlockADMM(4, 0.1), 5)
