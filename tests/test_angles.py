"""The cosine between an optimizer's update and back-propagation's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from admm.angles import cosines
from admm.blocks import split
from admm.checkpoints import History, Row
from admm.losses import SquaredError
from admm.models import initialiser
from admm.optimizers import BCD, SGD, Adam, Backprop, BlockADMM, Gotmare, Optimizer, Problem, ZUpdate
from admm.training import train

SEEDS = (5, 0, 11)
Making = Callable[..., Problem]


def run(problem: Problem, optimizer: Optimizer[Any], seeds: tuple[int, ...] = SEEDS, **options: Any) -> tuple[Any, Any]:
    state = optimizer.init(problem, seeds)
    return state, train(problem, optimizer, state, **{"iterations": 4} | options)


def found(history: History, replica: int = 0) -> list[dict[str, float]]:
    """The cosines of a replica's rows after the first, which has no update before it."""
    rows = [row for row in history.rows if row["replica"] == replica]
    return [{name: row[name] for name in row if name.startswith("cosine_")} for row in rows[1:]]


def without(rows: list[Row], *names: str) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith(names)} for row in rows]


def normalised_network() -> nn.Sequential:
    random = [nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(nn.Linear(6, 5), *random, nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture
def normalised(mlp_problem: Making) -> Problem:
    """With batch normalisation and dropout."""
    problem = mlp_problem()
    return Problem(
        problem.x, problem.y, split(normalised_network(), after=["3"]), SquaredError(), initialiser("pytorch")
    )


@pytest.mark.parametrize("batch", [24, 7])
def test_it_is_the_cosine_that_autograd_has(mlp_problem: Making, batch: int) -> None:
    problem = mlp_problem()
    before = problem.initial(SEEDS)
    random = torch.Generator().manual_seed(0)
    flat = before.flat() + torch.randn(before.flat().shape, generator=random, dtype=before.dtype)
    after = problem.blocks.parameters(flat)
    cosine = cosines(problem, SEEDS, before, after, batch)
    places = [k * 24 // batch for k in range(batch)]
    for replica in range(len(SEEDS)):
        old, new = (problem.blocks.export(theta, replica) for theta in (before, after))
        loss = problem.loss.value(old(problem.x[places])[None], problem.y[places][None]).sum() / batch
        parameters = list(old.parameters())  # weight and bias of each block
        gradients = torch.autograd.grad(loss, parameters)
        for t in range(3):
            g = torch.cat([gradients[i].flatten() for i in (2 * t, 2 * t + 1)])
            moved = [
                (a - b).flatten() for a, b in list(zip(parameters, new.parameters(), strict=True))[2 * t : 2 * t + 2]
            ]
            step = torch.cat(moved).detach()
            expected = float(step @ g / (step.norm() * g.norm()))
            assert float(cosine[f"cosine_{t + 1}"][replica]) == pytest.approx(expected, rel=1e-9)


def test_it_is_1_for_gradient_descent_on_the_batch(mlp_problem: Making, conv_problem: Making) -> None:
    for problem in (mlp_problem(), conv_problem()):
        descent = Backprop(4, SGD(), 0.01, batch_size=problem.n_samples)
        _, history = run(problem, descent, angle_samples=problem.n_samples)
        values = [value for replica in range(3) for row in found(history, replica) for value in row.values()]
        assert len(values) == 3 * 4 * len(problem.blocks) and values == pytest.approx([1.0] * len(values), abs=1e-9)


def test_batch_normalisation_takes_the_batch_s_statistics_as_in_training() -> None:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    problem = Problem(x, x[:, :3], split(network, after=["1"]), SquaredError(), initialiser("pytorch"))
    _, history = run(problem, Backprop(4, SGD(), 0.5, batch_size=24), angle_samples=24)
    for row in found(history):
        assert list(row.values()) == pytest.approx([1.0, 1.0], abs=1e-9)


@pytest.mark.parametrize(("step", "least"), [(1e-4, 1 - 1e-6), (1e-1, 0.9)])
def test_block_admm_tends_to_back_propagation_for_small_steps_of_z(
    mlp_problem: Making, step: float, least: float
) -> None:
    """A gradient step ζ of Z from the forward pass hands the label's signal on as back-propagation does, times ζ."""
    problem = mlp_problem()
    optimizer = BlockADMM(
        4, 1e-2, theta_update=SGD(), batch_size=24, z_step=step, beta=5.0, z_update=ZUpdate("gradient")
    )
    _, history = run(problem, optimizer, angle_samples=24)
    values = [value for row in found(history) for value in row.values()]
    assert len(values) == 12 and min(values) > least
    if step == 1e-1:
        assert min(values) < 1 - 1e-6  # the first test of a step shows what the limit is


@pytest.mark.parametrize(
    "optimizer",
    [
        Backprop(4, SGD(momentum=0.9), 0.05, 7),
        Backprop(4, Adam(), 0.01, 7, epoch_parts=2),
        BlockADMM(4, 0.01, sweep="batch", batch_size=7, dual_step=1.0, forward_mixing=0.0, z_update=ZUpdate("adam")),
        Gotmare(4, 0.01, batch_size=7),
    ],
)
def test_training_is_bit_for_bit_the_same_with_it(normalised: Problem, optimizer: Optimizer[Any]) -> None:
    (plain, before), (compared, after) = (run(normalised, optimizer, angle_samples=n) for n in (None, 10))
    assert torch.equal(plain.theta.flat(), compared.theta.flat())
    assert torch.equal(plain.theta.buffers, compared.theta.buffers)
    assert without(after.rows, "cosine_") == without(before.rows)
    assert {name for row in found(after) for name in row} == {"cosine_1", "cosine_2"} and not found(before)[0]


def test_a_stack_has_the_cosines_of_each_seed_alone(normalised: Problem) -> None:
    optimizer = Backprop(4, Adam(), 0.01, 7)
    _, stack = run(normalised, optimizer, angle_samples=10)
    for replica, seed in enumerate(SEEDS):
        _, alone = run(normalised, optimizer, (seed,), angle_samples=10)
        for ours, theirs in zip(found(stack, replica), found(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_it_is_of_the_last_iteration_before_an_evaluation(mlp_problem: Making, tmp_path: Path) -> None:
    """Also of a run that has been resumed between two of them."""
    problem, optimizer = mlp_problem(), Backprop(4, Adam(), 0.01, 7)
    _, often = run(problem, optimizer, angle_samples=10)
    _, seldom = run(problem, optimizer, angle_samples=10, evaluate_every=2)
    assert found(seldom) == found(often)[1::2]
    options: dict[str, Any] = {"angle_samples": 10, "evaluate_every": 2, "checkpoint": tmp_path / "it.pt"}

    class Killed(Exception):
        pass

    def kill(_: Problem, state: Any, *__: Any) -> None:
        if state.iteration == 4:
            raise Killed

    with pytest.raises(Killed):  # the checkpoint is after iteration 3
        run(problem, optimizer, **options, checkpoint_seconds=0.0, callbacks=[kill])
    _, resumed = run(problem, optimizer, **options)
    assert found(resumed) == found(seldom)
    with pytest.raises(ValueError, match="angle_samples was 10"):
        run(problem, optimizer, **options | {"angle_samples": 9})


class Tied(nn.Module):
    """Two layers of one weight, with a frozen one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(x)).relu())  # type: ignore[no-any-return]


def test_a_shared_parameter_counts_once_and_a_frozen_one_never(mlp_problem: Making) -> None:
    x = mlp_problem().x[:, :3]
    problem = Problem(x, x.flip(1), split(Tied(), after=["first", "frozen"]), SquaredError(), initialiser("pytorch"))
    _, history = run(problem, Backprop(4, SGD(), 0.1, batch_size=24), angle_samples=24)
    for row in found(history):
        assert row == pytest.approx({"cosine_1": 1.0, "cosine_3": 1.0}, abs=1e-9)


def test_full_batch_methods_have_it_too(mlp_problem: Making) -> None:
    _, history = run(mlp_problem(), BCD(), angle_samples=24)
    assert all(-1.0 <= value <= 1.0 for row in found(history) for value in row.values())


def test_without_an_update_it_is_not_a_number(mlp_problem: Making) -> None:
    problem = mlp_problem()
    _, history = run(problem, Backprop(4, SGD(), 0.0, batch_size=7), angle_samples=24)
    values = [row[f"cosine_{t}"] for row in history.rows for t in (1, 2, 3)]
    assert len(values) == 3 * 5 * 3 and all(value != value for value in values)
    small = replace(problem, loss=SquaredError(1e-100))  # gradients whose squares are no numbers of float32
    _, history = run(small, Backprop(4, SGD(), 1e98, batch_size=24), angle_samples=24)
    assert list(found(history)[0].values()) == pytest.approx([1.0] * 3, abs=1e-9)


@pytest.mark.parametrize("number", [0, 25, 2.5, True])
def test_an_impossible_number_of_samples_is_refused(mlp_problem: Making, number: Any) -> None:
    with pytest.raises(ValueError, match=f"angle_samples: {number} is neither None nor from 1 to the 24 training"):
        run(mlp_problem(), Backprop(4, SGD(), 0.1, batch_size=7), angle_samples=number)
