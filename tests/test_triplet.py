"""The triplet loss against loops over all triplets, and autograd."""

import pytest
import torch
from torch.testing import assert_close

from admm.losses import TripletLoss


def by_loops(z, y, margin):
    """J of each anchor, and what mining chose."""
    unit = z / z.norm(dim=1, keepdim=True)
    values, kinds = [], set()
    for a in range(len(z)):
        terms = []
        for p in range(len(z)):
            if p == a or y[p] != y[a]:
                continue
            to = {n: (unit[a] - unit[n]).square().sum() for n in range(len(z)) if y[n] != y[a]}
            if not to:
                continue
            near = (unit[a] - unit[p]).square().sum()
            beyond = [d for d in to.values() if d > near]
            kinds.add("semi-hard" if beyond else "farthest")
            terms.append((near - (min(beyond) if beyond else max(to.values())) + margin).clamp(min=0))
        values.append(torch.stack(terms).mean() if terms else z.sum() * 0)
    return torch.stack(values), kinds


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
def test_value_and_gradient_are_those_of_all_triplets(labels):
    random, seen = torch.Generator().manual_seed(1), set()
    y = torch.tensor(labels)
    for _ in range(20):
        z = torch.randn(6, 3, dtype=torch.float64, generator=random, requires_grad=True)
        expected, kinds = by_loops(z, y, 0.7)
        (gradient,) = torch.autograd.grad(expected.sum(), z)
        loss = TripletLoss(scale=2.0, margin=0.7)
        assert_close(loss.value(z, y), 2 * expected)
        assert_close(loss.gradient(z, y), 2 * gradient)
        seen |= kinds
    assert seen == ({"semi-hard", "farthest"} if 1 < len(set(labels)) < 6 else set())


def test_replicas_have_their_own_triplets():
    z, y = torch.randn(2, 8, 3), torch.randint(3, (2, 8))
    loss = TripletLoss()
    assert_close(loss.value(z, y), torch.stack([loss.value(*pair) for pair in zip(z, y, strict=True)]))


def test_a_loss_of_separated_people_is_zero():
    z = torch.eye(3).repeat_interleave(2, 0)
    assert torch.equal(TripletLoss().value(z, torch.tensor([0, 0, 1, 1, 2, 2])), torch.zeros(6))


@pytest.mark.parametrize("key", ["scale", "margin"])
def test_what_is_not_positive_is_refused(key):
    with pytest.raises(ValueError, match=rf"^{key}: 0 is not a positive number"):
        TripletLoss(**{key: 0})
