"""The loop: a resumed run equals an uninterrupted one, diverged replicas stop alone, only steps are timed."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from admm.blocks import Parameters, split
from admm.checkpoints import CheckpointError, History, Row, read_checkpoint, restore, save
from admm.checks import check_positive, shown
from admm.losses import BinaryCrossEntropy, CrossEntropy, Hinge, Loss, SquaredError, one_hot
from admm.models import as_given, initialiser, mlp
from admm.optimizers import SGD, Adam, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.backprop import BackpropState
from admm.training import DivergenceWarning, accuracy, evaluate, train

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
        forward_mixing=0.0,
        slice_size=20,
    ),
    "gauss_seidel": BlockADMM(
        6,
        0.01,
        sweep="minibatch",
        batch_size=16,
        primal_rounds=1,
        forward_mixing=0.9,
        z_update=ZUpdate("lipschitz", 2, output_update="prox"),
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


LONG_RUNS = [pytest.param(*stop_and_every, marks=pytest.mark.long) for stop_and_every in ((4, 1), (6, 4))]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("stop", "every"), [(1, 1), (4, 2), *LONG_RUNS])
def test_a_resumed_run_is_bit_identical(problem: Problem, name: str, stop: int, every: int, tmp_path: Path) -> None:
    def kill(problem: Problem, state: Any, history: History, rows: list[Row]) -> None:
        if rows[-1]["iteration"] == stop:
            raise Killed

    optimizer, checkpoint = OPTIMIZERS[name], tmp_path / "new" / "checkpoint.pt"
    whole_state, whole = run(problem, optimizer, SEEDS, 6, test_of(problem), every)
    with pytest.raises(Killed):
        run(problem, optimizer, SEEDS, 6, test_of(problem), every, checkpoint, 0.0, [kill])
    assert checkpoint.exists() == (stop > 1)
    if checkpoint.exists():  # of the iteration before, whether it was evaluated or not
        assert read_checkpoint(checkpoint)["state"]["iteration"] == stop - 1
    observed: list[Row] = []
    callbacks = [lambda problem, state, history, rows: observed.extend(rows)]
    state, resumed = run(problem, optimizer, SEEDS, 6, test_of(problem), every, checkpoint, 0.0, callbacks)
    assert torch.equal(state.theta.flat(), whole_state.theta.flat())
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
    with pytest.raises(CheckpointError, match=r"c.*\.pt: .*optimizer was Backprop, is BlockADMM; delete"):
        run(problem, OPTIMIZERS["batch"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)


def test_a_checkpoint_of_an_optimizer_with_the_same_variables_is_refused(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)
    with pytest.raises(CheckpointError, match="optimizer was Backprop, is Gotmare; delete the file"):
        run(problem, Gotmare(2, 0.01, batch_size=16), (0,), 2, test_of(problem), 1, checkpoint, 0.0)


def test_a_checkpoint_of_another_type_of_numbers_is_refused(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, checkpoint, 0.0)
    other = replace(problem, x=problem.x.double(), y=problem.y.double())
    with pytest.raises(CheckpointError, match=r"x was torch\.float32 .*, is torch\.float64 .*; delete"):
        run(other, OPTIMIZERS["adam"], (0,), 2, test_of(other), 1, checkpoint, 0.0)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [1, 2]])
def test_a_file_that_is_no_checkpoint_is_told(problem: Problem, content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: is no checkpoint of `admm.training.train`; give another path"):
        run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, tmp_path / "c.pt", 0.0)


@pytest.mark.parametrize("content", [b"", b"a user's own notes", None], ids=["empty", "text", "folder"])
def test_a_file_that_may_be_the_user_s_is_not_called_damaged(
    problem: Problem, content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"notes: is (a folder; give the path of|no checkpoint, .*; give another path)"
    ):
        run(problem, OPTIMIZERS["adam"], (0,), 2, test_of(problem), 1, path, 0.0)


def test_a_history_shows_itself_in_a_few_lines(problem: Problem) -> None:
    assert repr(History()) == "History of 0 rows, 0 seconds"
    with pytest.warns(DivergenceWarning):
        _, history = run(problem, Backprop(5, SGD(), [0.1, 1e30], batch_size=16), (3, 4), 5)
    first, *others = repr(replace(history, seconds=0.25)).splitlines()
    assert first == "History of 7 rows, 0.25 seconds, iterations 0 to 5"
    assert others[0].startswith("  in each row: iteration, replica, seed, seconds, train_loss, train_accuracy, sigma_1")
    assert others[1:] == ["  diverged, as iterations by replica: {1: 1}"]


@pytest.mark.parametrize(("iterations", "evaluate_every"), [(0, 1), (1, 0)])
def test_nothing_to_do_is_an_error(problem: Problem, iterations: int, evaluate_every: int) -> None:
    with pytest.raises(ValueError, match=r"(iterations|evaluate_every): 0 is not a whole number from 1 up"):
        run(problem, OPTIMIZERS["sgd"], (0,), iterations, test_of(problem), evaluate_every)


def test_a_test_set_in_the_place_of_the_iterations_is_told_in_one_line(problem: Problem) -> None:
    optimizer = OPTIMIZERS["sgd"]
    told = r"^iterations: a tuple of a tensor \[300, 8\] and a tensor \[300\] is no number; .* test=\(x, y\)\)$"
    with pytest.raises(ValueError, match=told):
        train(problem, optimizer, optimizer.init(problem, [0]), (torch.rand(300, 8), torch.zeros(300)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.0, 2.0]), "tensor([1., 2.])"),
        (np.zeros((40, 30)), "an array [40, 30]"),
        ([torch.zeros(9, 9), 3], "a list of a tensor [9, 9] and 3"),
        (list(range(999)), "an object of the class builtins.list"),
        ("x" * 999, f"'{95 * 'x'}…"),
    ],
)
def test_a_value_in_a_message_is_short(value: Any, expected: str) -> None:
    assert shown(value) == expected
    with pytest.raises(ValueError, match=re.escape(f"step: {expected} is not a positive number")):
        check_positive("step", value)


def test_accuracy_counts_in_percent(problem: Problem) -> None:
    theta = problem.initial((0, 1))
    labels = problem.blocks.forward(theta, problem.x.expand(2, -1, -1))[0].argmax(1)
    found = accuracy(problem.blocks, theta, problem.x, labels)
    right = sum(
        int(o.argmax() == label) for o, label in zip(problem.blocks.export(theta, 1)(problem.x), labels, strict=True)
    )
    assert found.tolist() == pytest.approx([100.0, 100.0 * right / 50])


# --- What is measured


def task(loss: Any, y: Any, *shape: int, outputs: int, samples: int = 300) -> Problem:
    """Of one linear layer over the last of a sample's axes, with the network's own weights."""
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(shape[-1], outputs))
    nn.init.normal_(network[0].weight, generator=torch.Generator().manual_seed(1))
    return Problem(x, y(x) if callable(y) else y, split(network, after=[]), loss, lambda module: None)


def measured(problem: Problem, y: Any = None) -> tuple[dict[str, float], Tensor]:
    """What `evaluate` finds, with the training samples as the test set, and the outputs."""
    theta = problem.initial([0])
    found = evaluate(problem, theta, (problem.x, problem.y if y is None else y))
    return {name: value.item() for name, value in found.items()}, problem.blocks.forward(theta, problem.x[None])[0]


def classes(x: Tensor) -> Tensor:
    return x[..., :3].argmax(-1)


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy(), BinaryCrossEntropy(), Hinge()], ids=str)
@pytest.mark.parametrize("given", [lambda y: y, lambda y: one_hot(y, 3, torch.zeros(0))], ids=["indices", "one-hot"])
def test_of_classes_accuracy_is_measured(loss: Loss, given: Any) -> None:
    problem = task(loss, lambda x: given(classes(x)), 4, outputs=3)
    found, z = measured(problem, classes(problem.x))
    right = 100.0 * (z.argmax(1) == classes(problem.x)).float().mean().item()
    assert set(found) == {f"{part}_{name}" for part in ("train", "test") for name in ("loss", "accuracy")}
    assert found["train_accuracy"] == found["test_accuracy"] == pytest.approx(right)
    assert found["test_loss"] == pytest.approx(loss.value(z, problem.y).mean().item(), rel=1e-5)


def test_of_sequences_accuracy_is_of_the_positions() -> None:
    problem = task(CrossEntropy(), classes, 5, 4, outputs=3)
    found, z = measured(problem)
    assert problem.y.shape == (300, 5)
    assert found["test_accuracy"] == pytest.approx(100.0 * (z.argmax(2) == classes(problem.x)).float().mean().item())
    expected = 5 * nn.functional.cross_entropy(z.flatten(0, 1), classes(problem.x).flatten()).item()
    assert found["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_of_numbers_the_mean_square_error_and_r2_are_measured() -> None:
    problem = task(SquaredError(), lambda x: x[:, :2].sin() + 3.0, 4, outputs=2)
    found, z = measured(problem)
    assert set(found) == {f"{part}_{name}" for part in ("train", "test") for name in ("loss", "mse", "r2")}
    assert found["test_mse"] == pytest.approx((z - problem.y).square().mean().item(), rel=1e-5)
    assert found["train_r2"] == pytest.approx(r2_score(problem.y, z, multioutput="variance_weighted"), rel=1e-4)


def test_numbers_for_one_output_need_no_axis_in_training_and_test() -> None:
    problem = task(SquaredError(), lambda x: x[:, 0], 4, outputs=1)
    found, z = measured(problem, problem.x[:, 0])
    assert problem.y.shape == (300, 1)
    assert found["test_mse"] == pytest.approx((z[:, 0] - problem.x[:, 0]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("loss", "threshold"), [(BinaryCrossEntropy(), 0.0), (Hinge(), 0.5)], ids=["logits", "hinge"])
def test_of_several_labels_their_accuracy_and_the_exact_matches_are_measured(loss: Loss, threshold: float) -> None:
    problem = task(loss, lambda x: (x[:, :3] > 0).float(), 4, outputs=3)
    found, z = measured(problem)
    right = (z > threshold) == (problem.y == 1)
    assert found["test_label_accuracy"] == pytest.approx(100.0 * right.float().mean().item())
    assert found["test_exact_match"] == pytest.approx(100.0 * right.all(1).float().mean().item())
    assert "test_accuracy" not in found


def test_of_binary_targets_between_0_and_1_the_loss_alone_is_measured() -> None:
    found, _ = measured(task(BinaryCrossEntropy(), torch.full((300, 2), 0.3), 4, outputs=2))
    assert set(found) == {"train_loss", "test_loss"}


def test_r2_of_equal_targets_is_none() -> None:
    found, _ = measured(task(SquaredError(), torch.ones(300, 2), 4, outputs=2))
    assert math.isnan(found["test_r2"]) and found["test_mse"] > 0.0


@pytest.mark.parametrize(
    ("train_on", "test_on", "message"),
    [
        (lambda y: 2.0 * one_hot(y, 3, torch.zeros(0)) - 1.0, lambda y: y, "test: y: these targets are class indices"),
        (lambda y: y, lambda y: torch.rand(len(y), 3), "test: y: these targets are not one class per sample"),
    ],
)  # fmt: skip
def test_test_targets_of_another_kind_are_refused(train_on: Any, test_on: Any, message: str) -> None:
    problem = task(SquaredError(), lambda x: train_on(classes(x)), 4, outputs=3)
    with pytest.raises(ValueError, match=message):
        measured(problem, test_on(classes(problem.x)))


def test_a_test_set_takes_the_type_of_the_training_set(problem: Problem) -> None:
    theta, labels = problem.initial([0]), problem.y.argmax(1)
    pairs = [(problem.x, labels), (problem.x.double().numpy(), labels.numpy())]
    assert evaluate(problem, theta, pairs[0]) == evaluate(problem, theta, pairs[1])


def test_of_one_label_its_accuracy_is_measured() -> None:
    problem = task(BinaryCrossEntropy(), lambda x: x[:, 0] > 0, 4, outputs=1)
    found, z = measured(problem)
    assert found["test_accuracy"] == pytest.approx(100.0 * ((z > 0) == (problem.x[:, :1] > 0)).float().mean().item())


def test_of_a_plain_function_the_loss_alone_is_measured() -> None:
    problem = task(lambda z, y: (z - y).abs(), lambda x: x[:, :2], 4, outputs=2)
    found, z = measured(problem)
    assert set(found) == {"train_loss", "test_loss"}
    assert found["test_loss"] == pytest.approx((z - problem.y).abs().sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_plain_function_is_trained_as_the_loss_that_it_is(problem: Problem, optimizer: Any) -> None:
    if getattr(getattr(optimizer, "z_update", None), "output_update", "step") == "prox":
        optimizer = replace(optimizer, z_update=replace(optimizer.z_update, output_update="step"))
    plain = replace(problem, loss=lambda z, y: (z - y).square() / 2)
    states = [run(p, optimizer, (0, 1), 2, measure=loss_alone)[0] for p in (problem, plain)]
    torch.testing.assert_close(states[1].theta.flat(), states[0].theta.flat(), rtol=1e-4, atol=1e-6)


def loss_alone(problem: Problem, theta: Parameters, test: Any) -> dict[str, Tensor]:
    return {"train_loss": evaluate(problem, theta, None)["train_loss"]}


def test_a_single_sample_is_never_left_over_in_an_evaluation() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    x = torch.randn(2001, 4)
    problem = Problem(x, torch.arange(2001) % 2, split(network, after=[]), CrossEntropy(), lambda module: None)
    assert torch.isfinite(evaluate(problem, problem.initial([0]), None)["train_loss"]).all()


def test_without_a_test_set_nothing_of_it_is_measured(problem: Problem) -> None:
    _, history = run(problem, OPTIMIZERS["sgd"], (0,), 2)
    assert {name for name in history.rows[-1] if name.startswith(("train", "test"))} == {"train_loss", "train_accuracy"}


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (lambda x: (x[:4], torch.tensor([0, 1, 2, 3])), "test: y: class indices go from 0 to 3"),
        (lambda x: (x[:4], torch.tensor([0, 1])), "test: problem: 4 inputs x, but 2 targets y"),
        (lambda x: (x[:4, :3], torch.tensor([0, 1, 2, 0])), r"test: x: samples \[3\] of .*where training has \[6\]"),
        (lambda x: x, "test: a Tensor is no pair of inputs and targets"),
        (lambda x: (x[:4].long(), torch.tensor([0, 1, 2, 0])), r"test: x: samples \[6\] of torch.int64, where"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_before_training(problem: Problem, test: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(problem, OPTIMIZERS["sgd"], (0,), 2, test(problem.x))


# --- What a run is


def test_a_path_may_be_text(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run(problem, OPTIMIZERS["sgd"], (0,), 2, None, 1, "~/c.pt", 0.0)
    assert read_checkpoint(tmp_path / "c.pt")["state"]["iteration"] == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"optimizer": Backprop(6, SGD(momentum=0.9), 0.01, batch_size=16)}, "optimizer.step_size was 0.05, is 0.01"),
        ({"optimizer": Backprop(6, SGD(), 0.05, batch_size=16)}, r"optimizer.theta_update was SGD\(momentum=0.9"),
        ({"network": nn.Tanh}, r"network was \(relu\): ReLU\(\), is \(relu\): Tanh\(\)"),
        ({"cut": {"n_blocks": 2}}, "blocks was "),
        ({"loss": SquaredError(2.0)}, r"loss was SquaredError\(scale=1\), is SquaredError\(scale=2\)"),
        ({"shift": 1e-3}, r"x was torch.float32 \[50, 6\] \w+, is torch.float32 \[50, 6\] "),
        ({"initialise": initialiser("normal", std=0.3)}, "initialisation was "),
        ({"test": True}, r"test was None, is \(torch.float32"),
        ({"iterations": 1}, "it is after iteration 3, of 1 that are asked for"),
        ({"seeds": (1,)}, r"seeds was \(0\), is \(1\)"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(
    problem: Problem, other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c.pt"
    run(problem, OPTIMIZERS["sgd"], (0,), 3, None, 1, checkpoint, 0.0)
    before = checkpoint.read_bytes()
    network = mlp(6, [8, 7], 3)
    if "network" in other:
        network.fc1.relu = other["network"]()  # type: ignore[union-attr]
    blocks = split(network, **other.get("cut", {"per_layer": True}))
    named = {name: other[name] for name in ("loss", "initialise") if name in other}
    changed = replace(problem, blocks=blocks, x=problem.x + other.get("shift", 0), **named)
    test = test_of(problem) if "test" in other else None
    with pytest.raises(CheckpointError, match=rf"c\.pt: .*{message}.*; delete the file to start again, or give"):
        optimizer, iterations = other.get("optimizer", OPTIMIZERS["sgd"]), other.get("iterations", 3)
        run(changed, optimizer, other.get("seeds", (0,)), iterations, test, 1, checkpoint, 0.0)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_the_same_run_in_another_process_is_taken(problem: Problem, tmp_path: Path) -> None:
    """Whatever addresses functions have there."""
    checkpoint = tmp_path / "c.pt"
    plain = [replace(problem, loss=lambda z, y: (z - y).square() / 2) for _ in range(2)]
    assert repr(plain[0].loss) != repr(plain[1].loss)
    _, first = run(plain[0], OPTIMIZERS["sgd"], (0,), 3, None, 1, checkpoint, 0.0)
    _, second = run(plain[1], OPTIMIZERS["sgd"], (0,), 3, None, 1, checkpoint, 0.0)
    assert [row["train_loss"] for row in second.rows] == [row["train_loss"] for row in first.rows]


def weighted(weight: float) -> Any:
    return lambda z, y: weight * (z - y).square()


def test_a_checkpoint_of_another_function_is_refused(problem: Problem, tmp_path: Path) -> None:
    """Of the same code, with another number."""
    checkpoint = tmp_path / "c.pt"
    run(replace(problem, loss=weighted(1.0)), OPTIMIZERS["sgd"], (0,), 2, None, 1, checkpoint, 0.0)
    with pytest.raises(
        CheckpointError, match=r"c.pt: it is of another run: loss was FunctionLoss.*\(1\).*, is .*\(5\)"
    ):
        run(replace(problem, loss=weighted(5.0)), OPTIMIZERS["sgd"], (0,), 2, None, 1, checkpoint, 0.0)


def test_a_whole_number_is_the_same_hyperparameter_as_its_decimal(problem: Problem, tmp_path: Path) -> None:
    for size in (1, 1.0):
        run(problem, Backprop(6, SGD(), size, batch_size=16), (0,), 2, None, 1, tmp_path / "c.pt", 0.0)


def test_every_bit_of_a_checkpoint_s_numbers_counts(problem: Problem, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.pt"
    state, _ = run(problem, OPTIMIZERS["sgd"], (0,), 2, None, 1, checkpoint, 0.0, keep_last=True)
    content, theta = checkpoint.read_bytes(), state.theta.flat()[0]
    start = content.index(theta.numpy().tobytes())
    for found in range(start, start + theta.nbytes, 28):  # of every seventh number the first byte
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[found] ^= 1 << bit
            checkpoint.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"c\.pt: is damaged \(the checksum of .* is another\); delete"):
                read_checkpoint(checkpoint)
    checkpoint.write_bytes(content)
    assert read_checkpoint(checkpoint)["state"]["iteration"] == 2


class Own(Backprop):
    """With a state of its own, and another object at each step."""

    def init(self, problem: Problem, seeds: Any) -> Any:
        return OwnState(**vars(super().init(problem, seeds)), best=float("inf"), names={"a": (1, "b")}, notes=None)

    def step(self, problem: Problem, state: Any) -> Any:
        stepped = super().step(problem, replace(state))
        best, notes = np.float64(min(state.best, 1.0 / stepped.iteration)), [f"after {stepped.iteration}"]
        return replace(stepped, best=best, notes=notes)


@dataclass
class OwnState(BackpropState):
    best: float
    names: dict[str, Any]
    notes: Any


@pytest.mark.parametrize(
    ("mode", "name"), [(torch.inference_mode, "inference_mode"), (partial(torch.autocast, "cpu"), "autocast")]
)
def test_modes_that_change_all_tensors_are_refused(problem: Problem, mode: Any, name: str) -> None:
    optimizer = Backprop(1, SGD(), 0.1, len(problem.y))
    state = optimizer.init(problem, [0])
    with mode():
        with pytest.raises(RuntimeError, match=f"^train: called within torch.{name}.*outside"):
            train(problem, optimizer, state)
        with pytest.raises(RuntimeError, match=f"^Problem: called within torch.{name}.*outside"):
            replace(problem)
    with torch.no_grad():
        assert train(problem, optimizer, state).rows


def test_a_step_may_return_another_state_which_is_saved_and_resumed(problem: Problem, tmp_path: Path) -> None:
    optimizer, checkpoint = Own(4, SGD(momentum=0.9), 0.05, batch_size=16), tmp_path / "c.pt"
    expected, _ = run(problem, Backprop(4, SGD(momentum=0.9), 0.05, batch_size=16), (0,), 4)
    run(problem, optimizer, (0,), 2, None, 1, checkpoint, 0.0, keep_last=True)
    saved = read_checkpoint(checkpoint)["state"]
    assert (saved["best"], saved["notes"], saved["names"]) == (0.5, ["after 2"], {"a": [1, "b"]})
    state, _ = run(problem, optimizer, (0,), 4, None, 1, checkpoint, 0.0)
    assert torch.equal(state.theta.flat(), expected.theta.flat())
    assert (state.best, state.notes, state.names, state.iteration) == (0.25, ["after 4"], {"a": (1, "b")}, 4)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (
            lambda problem, state: None,
            TypeError,
            "the step of Backprop returns a NoneType, expected the state, a Backp",
        ),
        (lambda problem, state: state, ValueError, "after iteration 0 the step of Backprop leaves .* at 0, expected 1"),
    ],
)
def test_a_step_that_does_not_count_is_told_at_once(
    problem: Problem, step: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backprop, "step", lambda self, problem, state: step(problem, state))
    with pytest.raises(error, match=message):
        run(problem, OPTIMIZERS["sgd"], (0,), 3)


def test_a_state_that_cannot_be_saved_is_told_before_training(problem: Problem, tmp_path: Path) -> None:
    optimizer = Own(4, SGD(), 0.05, batch_size=16)
    state = replace(optimizer.init(problem, (0,)), notes={1, 2})
    with pytest.raises(TypeError, match="state: notes holds a set, which cannot be saved"):
        train(problem, optimizer, state, 2, checkpoint=tmp_path / "c.pt")
    assert state.iteration == 0


def test_the_best_is_kept_by_a_copy(problem: Problem) -> None:
    optimizer = OPTIMIZERS["adam"]
    state = optimizer.init(problem, (0, 1))
    view, best = save(state), copy.deepcopy(save(state))
    start = problem.blocks.export(state.theta, 1)
    optimizer.step(problem, state)
    mean = state.moments[0][0]
    assert torch.equal(view["moments"][0][0], mean) and not torch.equal(best["moments"][0][0], mean)
    restore(state, best)
    assert torch.equal(problem.blocks.flatten(start), state.theta.flat()[1]) and state.iteration == 0


@pytest.mark.parametrize("field", ["seeds", "iteration", "theta"])
def test_a_state_that_lacks_a_field_is_told_before_training(problem: Problem, field: str) -> None:
    optimizer = OPTIMIZERS["adam"]
    values = vars(optimizer.init(problem, (0,)))
    state = SimpleNamespace(**{name: value for name, value in values.items() if name != field})
    with pytest.raises(TypeError, match=f"state: a SimpleNamespace, the state of Backprop, has no field '{field}'"):
        train(problem, optimizer, state, 1)


def test_a_state_of_another_optimizer_is_refused_and_its_parameters_can_be_taken(problem: Problem) -> None:
    adam, online = OPTIMIZERS["adam"], OPTIMIZERS["online"]
    state = adam.init(problem, (0,))
    train(problem, adam, state, 1)
    with pytest.raises(TypeError, match=r"^state: OnlineBlockADMM goes on with OnlineBlockADMMState, not with B"):
        train(problem, online, state, 1)
    blocks = split(problem.blocks.export(state.theta), per_layer=True)
    goes_on = replace(problem, blocks=blocks, initialise=as_given)
    assert torch.equal(online.init(goes_on, (1,)).theta.flat(), state.theta.flat())


def test_a_subclass_goes_on_with_the_states_of_its_class(problem: Problem) -> None:
    class Own(Backprop):
        pass

    state = OPTIMIZERS["sgd"].init(problem, (0,))
    train(problem, Own(**vars(OPTIMIZERS["sgd"])), state, 1)
    assert state.iteration == 1


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"loss": torch.zeros(2)}, "it has returned {'loss': tensor.*, which is no dictionary with 'train_loss'"),
        (None, "it has returned None, which is no dictionary"),
        ({"train_loss": 0.5}, r"its 'train_loss' is 0.5; it must be a tensor \[2\], with a number per replica"),
        ({"train_loss": torch.zeros(2), "top2": torch.tensor(1.0)}, r"its 'top2' is a tensor \[\]; it must be"),
    ],
    ids=["no loss", "nothing", "a number", "one for all"],
)
def test_what_is_measured_is_a_number_per_replica_by_name(returned, said):
    network = split(nn.Linear(2, 2), after=[])
    problem = Problem(torch.zeros(4, 2), torch.zeros(4, 2), network, SquaredError(), initialiser("pytorch"))
    optimizer = Backprop(1, SGD(), 0.1, batch_size=4)
    with pytest.raises(ValueError, match=f"^measure: {said}"):
        train(problem, optimizer, optimizer.init(problem, [0, 1]), measure=lambda *given: returned)
