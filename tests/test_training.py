"""The loop: a resumed run equals an uninterrupted one, diverged replicas stop alone, only steps are timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from admm.blocks import split
from admm.losses import SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import SGD, Adam, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.training import CheckpointError, History, Row, accuracy, evaluate, read_checkpoint, train

OPTIMIZERS = {
    "sgd": Backprop(6, SGD(momentum=0.9), 0.05, batch_size=16),
    "adam": Backprop(6, Adam(), {"start": 0.01, "end": 0.0}, batch_size=16),
    "batch": BlockADMM(
        6,
        0.01,
        sweep="batch",
        batch_size=16,
        primal_rounds=3,
        z_update=ZUpdate("adam"),
        dual_step=1.0,
        dual_init=1e-3,
        refresh=0.0,
        slice_size=20,
    ),
    "gauss_seidel": BlockADMM(
        6,
        0.01,
        sweep="minibatch",
        batch_size=16,
        primal_rounds=1,
        refresh=0.9,
        z_update=ZUpdate("lipschitz", 2, last="prox"),
        dual_step=1.0,
    ),
    "online": OnlineBlockADMM(6, 0.01, batch_size=16, dual="paper"),
}
SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def problem() -> Problem:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=random)
    labels = (x @ torch.randn(6, 3, generator=random)).argmax(1)
    blocks = split(mlp(6, [8, 7], 3), per_layer=True)
    return Problem(x, one_hot(labels, 3, x), blocks, SquaredError(), initialiser("pytorch"))


def run(
    problem: Problem, optimizer: Any, seeds: tuple[int, ...], *arguments: Any, **options: Any
) -> tuple[Any, History]:
    state = optimizer.init(problem, seeds)
    return state, train(problem, optimizer, state, *arguments, **options)


def test_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.x[:20], problem.y[:20].argmax(1)


test_of.__test__ = False  # type: ignore[attr-defined]


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("stop", "every"), [(1, 1), (4, 1), (4, 2), (6, 4)])
def test_a_resumed_run_is_bit_identical(problem: Problem, name: str, stop: int, every: int, tmp_path: Path) -> None:
    def kill(rows: list[Row], history: History) -> None:
        if rows[-1]["iteration"] == stop:
            raise Killed

    optimizer, checkpoint = OPTIMIZERS[name], tmp_path / "new" / "checkpoint.pt"
    whole_state, whole = run(problem, optimizer, SEEDS, 6, test_of(problem), every)
    with pytest.raises(Killed):
        run(problem, optimizer, SEEDS, 6, test_of(problem), every, checkpoint, 0.0, kill)
    assert checkpoint.exists() == (stop > 1)
    if checkpoint.exists():  # of the iteration before, whether it was evaluated or not
        assert read_checkpoint(checkpoint)["state"]["iteration"] == stop - 1
    observed: list[Row] = []
    state, resumed = run(
        problem, optimizer, SEEDS, 6, test_of(problem), every, checkpoint, 0.0, lambda rows, _: observed.extend(rows)
    )
    assert torch.equal(state.theta.flat, whole_state.theta.flat)
    without_time = [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.rows]
    assert without_time == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.rows]
    assert observed == resumed.rows


def test_a_diverged_replica_stops_and_the_others_go_on(problem: Problem) -> None:
    alone = Backprop(5, SGD(), [0.1, 0.1], batch_size=16)
    mixed = Backprop(5, SGD(), [0.1, 1e30, 0.1], batch_size=16)
    _, expected = run(problem, alone, (3, 5), 5, test_of(problem))
    _, history = run(problem, mixed, (3, 4, 5), 5, test_of(problem))
    assert history.diverged == {1: 1}
    assert [row["iteration"] for row in history.rows if row["replica"] == 1] == [0]
    for seed in (3, 5):
        losses = [[row["train_loss"] for row in h.rows if row["seed"] == seed] for h in (history, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert len(losses[0]) == 6


def test_a_run_ends_when_every_replica_has_diverged(problem: Problem) -> None:
    state, history = run(problem, Backprop(50, SGD(), 1e30, batch_size=16), (0, 1), 50, test_of(problem))
    assert state.iteration == 1 and history.diverged == {0: 1, 1: 1}


def test_what_begins_beyond_the_numbers_has_its_first_row_alone(problem: Problem) -> None:
    far = replace(problem, initialise=initialiser("normal", std=1e30))
    state, history = run(far, Backprop(5, SGD(), 0.1, batch_size=16), (0, 1), 5, test_of(problem))
    assert state.iteration == 0 and history.diverged == {0: 0, 1: 0}
    assert [(row["iteration"], row["replica"]) for row in history.rows] == [(0, 0), (0, 1)]


def test_losses_are_of_the_problem_s_precision(problem: Problem) -> None:
    double = replace(problem, x=problem.x.double(), y=problem.y.double())
    x, labels = test_of(double)
    theta = double.initial((0,))
    expected = double.loss.value(double.blocks.export(theta)(double.x), double.y).mean()
    found = evaluate(double, theta, (x, labels))["train_loss"]
    torch.testing.assert_close(found, expected.detach().unsqueeze(0), rtol=1e-13, atol=0.0)


def test_rows_are_the_plain_forward_pass_of_the_exported_networks(problem: Problem) -> None:
    state, history = run(problem, OPTIMIZERS["adam"], SEEDS, 6, test_of(problem))
    x, labels = test_of(problem)
    for replica, row in enumerate(history.rows[-3:]):
        network = problem.blocks.export(state.theta, replica)
        right = (network(x).argmax(1) == labels).float().mean().item()
        loss = 0.5 * (network(problem.x) - problem.y).square().sum(1).mean().item()
        assert row["test_accuracy"] == pytest.approx(100 * right)
        assert row["train_loss"] == pytest.approx(loss, rel=1e-5)
        assert row["iteration"] == 6 and row["seed"] == SEEDS[replica]


def test_evaluations_are_at_the_start_every_few_and_at_the_end(problem: Problem) -> None:
    _, history = run(problem, OPTIMIZERS["sgd"], (0,), 5, test_of(problem), evaluate_every=2)
    assert [row["iteration"] for row in history.rows] == [0, 2, 4, 5]


def test_only_steps_are_timed(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("admm.training.time.perf_counter", lambda: float(next(clock)))
    _, history = run(problem, OPTIMIZERS["sgd"], (0,), 4, test_of(problem))
    assert [row["seconds"] for row in history.rows] == [0, 1, 2, 3, 4]


def test_a_checkpoint_of_another_optimizer_is_refused(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run(problem, OPTIMIZERS["sgd"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: checkpoint: .*delete the file"):
        run(problem, OPTIMIZERS["batch"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)


def test_a_checkpoint_of_an_optimizer_with_the_same_variables_is_refused(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)
    with pytest.raises(CheckpointError, match="of Backprop, expected Gotmare; delete the file"):
        run(problem, Gotmare(2, 0.01, batch_size=16), (0,), 2, test_of(problem), 1, checkpoint, 0.0)


def test_a_checkpoint_of_another_type_of_numbers_is_refused(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)
    other = replace(problem, x=problem.x.double(), y=problem.y.double())
    with pytest.raises(CheckpointError, match=r"theta is of torch\.float32, expected torch\.float64; delete"):
        run(other, OPTIMIZERS["adam"], (0,), 2, test_of(other), 1, checkpoint, 0.0)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [1, 2]])
def test_a_file_that_is_no_checkpoint_is_told(problem: Problem, content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: is no checkpoint of `admm.training.train`; give another path"):
        run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, tmp_path / "c.pt", 0.0)


@pytest.mark.parametrize(("iterations", "evaluate_every"), [(0, 1), (1, 0)])
def test_nothing_to_do_is_an_error(problem: Problem, iterations: int, evaluate_every: int) -> None:
    with pytest.raises(ValueError, match=f"iterations .{iterations}. and evaluate_every .{evaluate_every}."):
        run(problem, OPTIMIZERS["sgd"], (0,), iterations, test_of(problem), evaluate_every)


def test_accuracy_counts_in_percent(problem: Problem) -> None:
    theta = problem.initial((0, 1))
    labels = problem.blocks.forward(theta, problem.x.expand(2, -1, -1))[0].argmax(1)
    found = accuracy(problem.blocks, theta, problem.x, labels)
    right = sum(
        int(o.argmax() == label) for o, label in zip(problem.blocks.export(theta, 1)(problem.x), labels, strict=True)
    )
    assert found.tolist() == pytest.approx([100.0, 100.0 * right / 50])
