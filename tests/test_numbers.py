"""Options given as NumPy's numbers, as arrays and as tensors."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from admm.augmentation import CropAndFlip
from admm.losses import CrossEntropy, Hinge, SquaredError
from admm.minibatches import minibatches
from admm.numbers import plain
from admm.optimizers import SGD, Adam, AdaptivePenalty, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Taylor, ZUpdate
from admm.schedules import block_schedules, schedule, warn_beyond_horizon

SEEDS = (3, 1)
GIVEN = BlockADMM(
    iterations=np.int64(3),
    theta_step={"start": np.float32(0.5), "end": torch.tensor(0.25)},
    z_step=np.array([0.25, 0.5]),
    beta={"blocks": [torch.tensor([1.0, 2.0]), np.float64(0.5), (np.int32(1), 2)]},
    batch_size=torch.tensor(7),
    primal_rounds=np.uint8(2),
    z_update=ZUpdate("adam", np.int64(2), beta1=np.float32(0.5)),
    theta_update=Adam(weight_decay=torch.tensor(0.25)),
    dual_init=np.float32(0.5),
    penalty=AdaptivePenalty(np.float32(0.5), largest=np.inf),
)
PYTHONS = BlockADMM(
    iterations=3,
    theta_step={"start": 0.5, "end": 0.25},
    z_step=[0.25, 0.5],
    beta={"blocks": [[1.0, 2.0], 0.5, (1, 2)]},
    batch_size=7,
    primal_rounds=2,
    z_update=ZUpdate("adam", 2, beta1=0.5),
    theta_update=Adam(weight_decay=0.25),
    dual_init=0.5,
    penalty=AdaptivePenalty(0.5),
)


def test_numpy_s_numbers_and_tensors_are_python_s(mlp_problem):
    assert GIVEN == PYTHONS and repr(GIVEN) == repr(PYTHONS)
    problem = mlp_problem(SquaredError(np.float32(0.5)))
    states = [options.step(problem, options.init(problem, SEEDS)) for options in (GIVEN, PYTHONS)]
    assert torch.equal(states[0].theta.flat(), states[1].theta.flat())
    assert repr(SquaredError(np.float32(0.5))) == repr(SquaredError(0.5))
    assert plain([np.bool_(True), np.arange(2), "x", None]) == [True, [0, 1], "x", None]


def test_functions_take_them_too():
    assert schedule("step", np.float32(0.5), 2)(0.3) == 0.5
    for values in (np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), [np.float64(0.5), torch.tensor(1.0)]):
        assert schedule("step", values, 2)(0.3).tolist() == [0.5, 1.0]
    assert [s(0.0) for s in block_schedules("step", {"blocks": np.array([0.5, 1.0])}, 2, 3)] == [0.5, 1.0]
    cpu = torch.device("cpu")
    batches = [minibatches(9, size, (0,), 0, cpu, parts) for size, parts in ((2, 3), (np.int64(2), torch.tensor(3)))]
    assert all(map(torch.equal, *batches)) and len(batches[0]) == len(batches[1]) == 1


WRONG = [True, math.nan, math.inf, np.float32("nan"), torch.tensor(torch.inf), np.bool_(True)]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "options, key",
    [
        (GIVEN, "iterations"),
        (GIVEN, "batch_size"),
        (GIVEN, "theta_step"),
        (GIVEN, "theta_passes"),
        (GIVEN, "beta"),
        (GIVEN, "dual_init"),
        (Gotmare(1, 0.1, batch_size=5), "rho"),
        (Gotmare(1, 0.1, batch_size=5), "epoch_parts"),
        (OnlineBlockADMM(1, 0.1, batch_size=5), "dual_decay"),
        (Backprop(1, SGD(), 0.1, batch_size=5), "step_size"),
        (Taylor(), "warm_start"),
        (Taylor(), "weight_decay"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_number_is_refused_by_name(mlp_problem, options, key, value):
    for given in (value, [0.5, value]) if key in ("theta_step", "beta", "rho", "step_size") else (value,):
        with pytest.raises(ValueError, match=rf"^{key}: "):
            optimizer = replace(options, **{key: given})
            optimizer.step(mlp_problem(), optimizer.init(mlp_problem(), SEEDS))


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "make, key",
    [
        (SquaredError, "scale"),
        (CrossEntropy, "scale"),
        (Hinge, "scale"),
        (Adam, "beta1"),
        (SGD, "momentum"),
        (AdaptivePenalty, "c"),
        (CropAndFlip, "padding"),
    ],
)
def test_no_number_is_refused_by_name_when_it_is_given(make, key, value):
    with pytest.raises(ValueError, match=f"^{key}: "):
        make(value)


@pytest.mark.parametrize("value", [True, math.nan, 0.0])
def test_a_largest_penalty_may_be_infinite_but_is_a_number(value):
    with pytest.raises(ValueError, match=r"^largest: "):
        AdaptivePenalty(largest=value)


def told(optimizer: Any, iterations: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_beyond_horizon(optimizer, iterations)
    return [str(warning.message) for warning in caught]


def test_training_on_after_the_end_of_the_schedules_is_told():
    falling = {"start": 0.1, "end": 0.0}
    (message,) = told(OnlineBlockADMM(5, falling, z_step={"blocks": [0.1, falling]}), 10)
    assert message.endswith("from 5 on the end of the schedule holds for theta_step, z_step. Give both the same number")
    assert not told(OnlineBlockADMM(5, falling), 5) and not told(OnlineBlockADMM(5, 0.1), 10) and not told(Taylor(), 10)
