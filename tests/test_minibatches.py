"""Mini-batches: every sample once an epoch, an order that depends on seed and epoch alone."""

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm.minibatches import gather_shared, minibatches, stateless_rng

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 40),
    batch_size=st.integers(1, 40),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**31),
)
def test_every_sample_comes_once_an_epoch(samples, batch_size, epoch, seed):
    batch_size = min(batch_size, samples)
    batches = minibatches(samples, batch_size, (seed, seed + 1), epoch, CPU)
    assert [b.shape[1] for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= batches[-1].shape[1] <= batch_size
    for order in torch.cat(batches, 1):
        assert order.sort().values.equal(torch.arange(samples))


def test_the_last_batch_is_smaller():
    assert [tuple(b.shape) for b in minibatches(10, 4, (0, 1, 2), 0, CPU)] == [(3, 4), (3, 4), (3, 2)]


def test_an_order_depends_on_seed_and_epoch():
    orders = [minibatches(30, 30, (s,), e, CPU)[0] for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o.flatten().tolist()) for o in orders}) == 4
    assert torch.equal(orders[0], minibatches(30, 30, (0,), 0, CPU)[0])


def test_an_order_does_not_depend_on_the_batch_size():
    orders = [torch.cat(minibatches(30, size, (3,), 2, CPU), 1) for size in (1, 7, 30)]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])


def test_an_order_does_not_depend_on_the_stack_or_on_global_random_numbers():
    stacked = minibatches(20, 6, (5, 8, 2), 3, CPU)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    alone = minibatches(20, 6, (8,), 3, CPU)
    assert all(torch.equal(many[1:2], one) for many, one in zip(stacked, alone, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_all_orders_of_three_samples_are_equally_frequent():
    orders = torch.cat([minibatches(3, 3, range(30), epoch, CPU)[0] for epoch in range(40)])
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 200).square() / 200).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("batch_size", "why"), [(0, "a whole"), (-1, "a whole"), (4.0, "a whole number"), (11, "between 1 and the 10")]
)
def test_a_wrong_batch_size_is_refused_by_name(batch_size, why):
    with pytest.raises(ValueError, match=f"^batch_size: {batch_size} is not {why}"):
        minibatches(10, batch_size, (0,), 0, CPU)


def test_a_generator_s_numbers_depend_on_seed_stream_and_counter():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    draws = [tuple(torch.rand(4, generator=stateless_rng(*key)).tolist()) for key in keys]
    assert len(set(draws)) == 4
    assert draws[0] == tuple(torch.rand(4, generator=stateless_rng(0, "a")).tolist())


def test_rows_picks_each_replica_s_samples():
    data = torch.arange(24).view(4, 2, 3)
    picked = gather_shared(data, torch.tensor([[3, 0], [1, 1], [2, 3]]))
    assert picked.shape == (3, 2, 2, 3)
    assert (
        torch.equal(picked[0, 0], data[3]) and torch.equal(picked[2, 1], data[3]) and torch.equal(picked[1, 0], data[1])
    )


def test_the_parts_of_an_epoch_are_the_epoch():
    whole = minibatches(23, 4, (0, 3), 1, CPU)
    parts = [minibatches(23, 4, (0, 3), 1 * 4 + part, CPU, parts=4) for part in range(4)]
    assert [len(part) for part in parts] == [1, 2, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole, [batch for part in parts for batch in part], strict=True))


@pytest.mark.parametrize("parts", [0, 7, "many", 1.5])
def test_more_parts_than_mini_batches_are_refused_by_name(parts):
    with pytest.raises(ValueError, match=r"^epoch_parts: .* an epoch's 6 batches"):
        minibatches(23, 4, (0,), 0, CPU, parts)


def test_groups_come_in_runs():
    groups = torch.tensor([5, 3, 5, 5, 7, 3, 5, 5, 9, 3])
    orders = [minibatches(10, 10, [seed], 0, CPU, groups=groups, group_size=2)[0][0] for seed in range(20)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(10))
        runs = [(group, len(list(run))) for group, run in groupby(groups[order].tolist())]
        for group, odd in ((5, 1), (3, 1), (7, 1), (9, 1)):  # 2 + 2 + 1, 2 + 1, 1 and 1
            assert sum(length % 2 for g, length in runs if g == group) == odd
    assert len({tuple(order.tolist()) for order in orders}) == 20
