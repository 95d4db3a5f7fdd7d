"""Schedules and hyperparameters by replica."""

import math

import pytest
import torch

from admm.schedules import block_values, broadcast, per_replica, schedule


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


@pytest.mark.parametrize("value", [{"blocks": [1.0]}, {"blocks": [1.0, 2.0], "start": 1.0}])
def test_a_wrong_value_by_block_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"beta: .* is not {'blocks': \[2 values, one per block\]}"):
        block_values("beta", value, 2)
