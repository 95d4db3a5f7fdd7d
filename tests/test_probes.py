"""Verification and attribute probes, against other ways to compute them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from experiments.faces.probes import Probe, verification


def brute_force(distance, same, folds):
    """Every threshold between two distances, and outside of them, is tried."""
    right = 0
    for k in range(folds):
        test = np.arange(len(same)) % folds == k
        known = np.unique(distance[~test])
        tried = [-np.inf, *(known[:-1] + known[1:]) / 2, np.inf]
        best = max(tried, key=lambda t: ((distance[~test] < t) == same[~test]).sum())
        right += ((distance[test] < best) == same[test]).sum()
    return 100.0 * right / len(same)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([2, 5]))
def test_verification_is_that_of_all_thresholds(seed, folds):
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(15, 4, generator=random, dtype=torch.float64)
    pairs = torch.randint(15, (20, 2), generator=random)
    same = torch.rand(20, generator=random) < 0.5
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    distance = (unit[pairs[:, 0]] - unit[pairs[:, 1]]).norm(dim=1).numpy()
    assert verification(embeddings, pairs, same, folds) == pytest.approx(brute_force(distance, same.numpy(), folds))


def test_people_far_apart_are_verified_whatever_the_length_of_their_embeddings():
    embeddings = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 1.0], [0.1, 9.0]]).repeat(5, 1)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]] * 5)
    assert verification(embeddings, pairs, torch.tensor([True, True, False, False] * 5)) == 100.0


def data(samples=300, rare=0.3):
    random = np.random.RandomState(0)
    people = np.arange(samples) // 2
    y = (random.rand(samples // 2) < rare).astype(np.int8).repeat(2)
    x = (random.randn(samples, 10) * 7 + 3 + 5 * y[:, None] * random.randn(10)).astype(np.float32)
    return x[:200], y[:200], people[:200], x[200:], y[200:]


@pytest.mark.parametrize("balanced", [False, True])
def test_a_probe_is_a_linear_svm_on_standardised_features(balanced):
    train, y_train, _, test, y_test = parts = data()
    found = Probe(costs=(0.1,), balanced=balanced)(*parts)
    scaled = StandardScaler().fit(train)
    weight = "balanced" if balanced else None
    machine = LinearSVC(C=0.01, dual=False, class_weight=weight).fit(scaled.transform(train), y_train)
    distance = machine.decision_function(scaled.transform(test))
    right = (distance > 0) == (y_test == 1)
    assert found["accuracy"] == pytest.approx(100 * right.mean())
    assert found["balanced_accuracy"] == pytest.approx(50 * (right[y_test == 1].mean() + right[y_test == 0].mean()))
    assert found["auc"] == pytest.approx(100 * roc_auc_score(y_test, distance))
    assert found["cost"] == 0.1


@pytest.mark.parametrize("score", ["accuracy", "balanced_accuracy"])
def test_the_cost_is_the_best_for_people_that_were_held_out(score):
    train, y_train, people, *_ = parts = data()
    for seed in range(4):
        found = Probe(costs=(1e-4, 1e-2, 1.0), score=score, balanced=False, seed=seed)(*parts)
        split = list(GroupShuffleSplit(1, test_size=1 / 3, random_state=seed).split(train, groups=people))
        assert not set(people[split[0][0]]) & set(people[split[0][1]])
        machine = make_pipeline(StandardScaler(), LinearSVC(random_state=0))
        grid = GridSearchCV(machine, {"linearsvc__C": [1e-5, 1e-3, 1e-1]}, cv=split, scoring=score)
        assert found["cost"] / 10 == pytest.approx(grid.fit(train, y_train).best_params_["linearsvc__C"])


@pytest.mark.parametrize("seed", range(6))
def test_the_cost_is_chosen_on_the_first_split_with_both_classes_on_both_sides(seed):
    """Two people of a hundred have the attribute: in more than half of the splits both are on one side."""
    train, _, people, test, _ = data()
    y, y_test = (people % 60 == 0).astype(np.int8), (np.arange(len(test)) < 3).astype(np.int8)
    assert sorted({*people[y == 1]}) == [0, 60]
    found = Probe(costs=(1e-4, 1e-2, 1.0), balanced=False, seed=seed)(train, y, people, test, y_test)
    splits = GroupShuffleSplit(100, test_size=1 / 3, random_state=seed).split(train, groups=people)
    (split, *_) = (s for s in splits if {*y[s[0]]} == {*y[s[1]]} == {0, 1})
    machine = make_pipeline(StandardScaler(), LinearSVC(random_state=0))
    grid = GridSearchCV(machine, {"linearsvc__C": [1e-5, 1e-3, 1e-1]}, cv=[split], scoring="balanced_accuracy")
    assert found["cost"] / 10 == pytest.approx(grid.fit(train, y).best_params_["linearsvc__C"])


@pytest.mark.parametrize(
    ("positive", "people", "possible"),
    [
        ([1, 1, 0, 0, 0], [0, 0, 1, 2, 3], False),  # one person alone has it
        ([0, 0, 1, 1, 1], [0, 0, 1, 2, 3], False),  # one person alone has it not
        ([1, 0, 1, 0], [0, 0, 1, 1], True),
        ([1, 0, 1, 0], [0, 0, 0, 0], False),  # nobody can be held out
    ],
)
def test_people_cannot_be_held_out_where_a_class_is_one_person_s(positive, people, possible):
    y, people = np.array(positive, np.int8), np.array(people)
    assert Probe().can_choose(y, people) == possible
    assert Probe(costs=(0.1,)).can_choose(y, people)  # there is nothing to choose
    if not possible:
        x = np.random.RandomState(0).randn(len(y), 2).astype(np.float32)
        with pytest.raises(ValueError, match="probe: no third of the people has both classes"):
            Probe()(x, y, people, x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "f1"}, "probe.score: 'f1' is not one of accuracy, balanced_accuracy"),
        ({"costs": ()}, r"probe.costs: \[\] is not a list of positive numbers"),
        ({"costs": (0.1, 0.0)}, r"probe.costs: \[0.1, 0.0\] is not a list of positive numbers"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Probe(**options)
