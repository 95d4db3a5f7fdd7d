"""A researcher's run: stopped, interrupted and resumed, validated on other sets, and taken elsewhere."""

from __future__ import annotations

import copy
import io
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from admm.augmentation import Augmentation
from admm.blocks import Parameters, split
from admm.callbacks import EarlyStopping, StopTraining
from admm.checkpoints import CheckpointError, History, Row, read_checkpoint, restore, save
from admm.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError, one_hot
from admm.models import as_given, initialiser, mlp, resnet18
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
    ZUpdate,
)
from admm.training import DivergenceWarning, evaluate, train

OPTIMIZERS = {
    "backprop": Backprop(6, Adam(), lambda progress: 0.05 * (1 - progress), batch_size=16),
    "block": BlockADMM(6, 0.01, 1e-3, batch_size=16, dual_step=0.5, forward_mixing=0.9, z_update=ZUpdate("adam")),
    "online": OnlineBlockADMM(6, 0.01, batch_size=16, dual="paper"),
    "gotmare": Gotmare(6, {"start": 0.01, "end": 0.0}, batch_size=16),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
SGD6 = Backprop(6, SGD(momentum=0.9), 0.05, batch_size=16)
SEEDS = (3, 4)


def samples(seed: int, count: int = 50) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(*samples(0), split(mlp(6, [8, 7], 3), per_layer=True), CrossEntropy(), initialiser("pytorch"))


def run(problem: Problem, optimizer: Any, seeds: Sequence[int] = SEEDS, **options: Any) -> tuple[Any, History]:
    state = optimizer.init(problem, seeds)
    return state, train(problem, optimizer, state, **options)


def without_time(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(found: tuple[Any, History], expected: tuple[Any, History]) -> None:
    """Bit by bit, but for the seconds."""
    leaves = [torch.utils._pytree.tree_leaves(save(state)) for state, _ in (found, expected)]
    for one, other in zip(*leaves, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert without_time(found[1].rows) == without_time(expected[1].rows)


class StopAt:
    """Ends training at an iteration; remembers the rows that it has seen."""

    def __init__(self, iteration: int, error: type[BaseException] = StopTraining) -> None:
        self.iteration, self.error, self.seen = iteration, error, list[Row]()

    def __call__(self, problem: Problem, state: Any, history: History, rows: list[Row]) -> None:
        self.seen += rows
        assert rows == history.rows[-len(rows) :] and rows[-1]["iteration"] <= state.iteration
        if state.iteration == self.iteration:
            raise self.error


# --- Stopped


@each_optimizer
@pytest.mark.parametrize("at", [0, 3])
def test_a_stopped_run_returns_its_history_and_goes_on(
    problem: Problem, optimizer: Any, at: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"test": samples(1), "checkpoint": tmp_path / "c.pt"}
    whole = run(problem, optimizer, test=samples(1))
    first, last = StopAt(at), StopAt(99)
    state, history = run(problem, optimizer, **options, callbacks=[first, last])
    assert state.iteration == at and {row["iteration"] for row in history.rows} == set(range(at + 1))
    assert first.seen == last.seen == history.rows
    assert read_checkpoint(tmp_path / "c.pt")["state"]["iteration"] == at
    same(run(problem, optimizer, **options), whole)


def test_a_stopped_run_stops_again_until_the_callback_is_left_out(problem: Problem, tmp_path: Path) -> None:
    for _ in range(2):
        again = StopAt(2)
        state, _ = run(problem, SGD6, checkpoint=tmp_path / "c.pt", callbacks=[again])
        assert state.iteration == 2 and [row["iteration"] for row in again.seen] == [0, 0, 1, 1, 2, 2]
    assert run(problem, SGD6, checkpoint=tmp_path / "c.pt")[0].iteration == 6


def test_any_other_error_of_a_callback_is_the_caller_s(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(problem, SGD6, checkpoint=tmp_path / "c.pt", callbacks=[StopAt(2, ZeroDivisionError)])
    assert not (tmp_path / "c.pt").exists()


# --- Continued on the same state


@each_optimizer
def test_training_goes_on_with_a_state_as_if_it_had_not_ended(problem: Problem, optimizer: Any) -> None:
    """In the same state, in one that was saved and restored, and after steps by hand, with a history of its own."""
    whole_state, whole = run(problem, optimizer, test=samples(1))
    state, _ = run(problem, optimizer, iterations=2)
    file = io.BytesIO()
    torch.save(save(state), file)
    file.seek(0)
    restored, stepped = (optimizer.init(problem, SEEDS) for _ in range(2))
    restore(restored, torch.load(file))
    for _ in range(2):
        optimizer.step(problem, stepped)
    for later in (state, restored, stepped):
        history = train(problem, optimizer, later, test=samples(1))
        same((later, history), (whole_state, History([row for row in whole.rows if row["iteration"] >= 2])))
        with pytest.warns(UserWarning, match=r"^state: is after iteration 6 of 6, so nothing is trained; ") as told:
            again = train(problem, optimizer, later, test=samples(1))
        assert without_time(again.rows) == without_time(history.rows[-2:])
        assert [warning.filename for warning in told] == [__file__]


def test_a_resume_at_the_end_is_not_warned_of(problem: Problem, tmp_path: Path) -> None:
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state, _ = run(problem, SGD6, checkpoint=tmp_path / "c.pt", keep_last=True)
        assert state.iteration == 6


# --- Interrupted


@dataclass(frozen=True)
class Interrupted(Backprop):
    """Whose step `at` gets Ctrl-C in its middle, once or several times. (A checkpoint does not know these options.)"""

    at: int = field(default=0, compare=False)
    times: int = field(default=1, compare=False)

    def step(self, problem: Problem, state: Any) -> Any:
        for _ in range(self.times if state.iteration == self.at else 0):
            whole = state.theta.flat()
            state.theta.fill(torch.zeros_like(whole))  # as if half done
            signal.raise_signal(signal.SIGINT)
            state.theta.fill(whole)
        return super().step(problem, state)


def interrupted(at: int, times: int = 1) -> Interrupted:
    return Interrupted(**vars(SGD6), at=at, times=times)


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Of Python, whatever the tests run in."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, former) is signal.default_int_handler


@pytest.mark.parametrize(("at", "every"), [(0, 1), (2, 1), (2, 4), (5, 1)])
@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_loses_nothing(problem: Problem, at: int, every: int, tmp_path: Path) -> None:
    """It is raised after the iteration that it has come in, which the checkpoint has."""
    options: dict[str, Any] = {"evaluate_every": every, "checkpoint": tmp_path / "c.pt"}
    whole = run(problem, interrupted(at, times=0), evaluate_every=every)
    told = f"^stopped after iteration {at + 1} of 6; the checkpoint {tmp_path}/c.pt is written; the same call goes on$"
    with (
        pytest.raises(KeyboardInterrupt, match=told),
        pytest.warns(UserWarning, match="^interrupted: this iteration will"),
    ):
        run(problem, interrupted(at), **options)
    assert read_checkpoint(tmp_path / "c.pt")["state"]["iteration"] == at + 1
    same(run(problem, interrupted(at, times=0), **options), whole)


def test_a_checkpoint_of_train_is_no_saved_state(problem: Problem, tmp_path: Path) -> None:
    state = SGD6.init(problem, SEEDS)
    with pytest.raises(ZeroDivisionError):
        run(problem, SGD6, checkpoint=tmp_path / "c.pt", checkpoint_seconds=0, callbacks=[StopAt(2, ZeroDivisionError)])
    told = r"saved: is a checkpoint of train\(…, checkpoint=…\); give the path of its file to train"
    with pytest.raises(ValueError, match=told):
        restore(state, torch.load(tmp_path / "c.pt"))


def test_restore_names_the_argument_that_is_wrong(problem: Problem, tmp_path: Path) -> None:
    state = SGD6.init(problem, SEEDS)
    for wrong, shown in (("s.pt", "'s.pt'"), (state, "an object of the class admm.opt.*State")):
        with pytest.raises(
            TypeError, match=rf"^saved: {shown} is not what admm.save returns; give save\(…\) of a state"
        ):
            restore(state, wrong)
    with pytest.raises(TypeError, match=r"^state: .* is no state, as optimizer.init returns it$"):
        restore(save(state), state)
    state, _ = run(problem, SGD6, checkpoint=tmp_path / "c.pt", keep_last=True)
    content = torch.load(tmp_path / "c.pt")
    del content["state"]["moments"]
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/c.pt: has no 'moments'; it was made by another optimizer"):
        run(problem, SGD6, checkpoint=tmp_path / "c.pt")


@pytest.mark.usefixtures("default_handler")
def test_a_second_interrupt_ends_at_once(problem: Problem, tmp_path: Path) -> None:
    state = SGD6.init(problem, SEEDS)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="Interrupt again to end at once"):
        train(problem, interrupted(2, times=2), state, checkpoint=tmp_path / "c.pt", checkpoint_seconds=0.0)
    assert state.iteration == 2 and read_checkpoint(tmp_path / "c.pt")["state"]["iteration"] == 2


@pytest.mark.usefixtures("default_handler")
def test_without_a_checkpoint_an_interrupt_ends_at_once(problem: Problem) -> None:
    state = SGD6.init(problem, SEEDS)
    with pytest.raises(KeyboardInterrupt):
        train(problem, interrupted(2), state)
    assert state.iteration == 2


def test_a_caller_s_own_handler_of_interrupts_stays(problem: Problem, tmp_path: Path) -> None:
    came: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        state, _ = run(problem, interrupted(2), checkpoint=tmp_path / "c.pt")
    finally:
        signal.signal(signal.SIGINT, former)
    assert came == [signal.SIGINT] and state.iteration == 6


@pytest.mark.parametrize("at", [1, 3])
@each_optimizer
def test_the_same_call_goes_on_with_the_state_that_it_has_trained(
    problem: Problem, optimizer: Any, at: int, tmp_path: Path
) -> None:
    """As when a cell of a notebook is run again: after an interrupt, and after an error that the file is behind."""
    state = optimizer.init(problem, SEEDS)
    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_seconds": 0.0}
    for stop, error in ((at, KeyboardInterrupt), (at + 1, ZeroDivisionError), (at + 2, ZeroDivisionError)):
        with pytest.raises(error):
            train(problem, optimizer, state, callbacks=[StopAt(stop, error)], **options)
        assert state.iteration == stop
    same((state, train(problem, optimizer, state, **options)), run(problem, optimizer))


def test_a_state_of_another_start_is_refused(problem: Problem, tmp_path: Path) -> None:
    """Also in place of one that the checkpoint is of; it stays as it is."""
    state, other = SGD6.init(problem, SEEDS), SGD6.init(replace(problem, initialise=initialiser("normal")), SEEDS)
    train(problem, SGD6, other, 3)
    train(problem, SGD6, state, 3, checkpoint=tmp_path / "c.pt", keep_last=True)
    restore(state, save(other))
    for trained in (state, other):
        with pytest.raises(CheckpointError, match=r"initialisation was .*, is .* after training; give the state"):
            train(problem, SGD6, trained, checkpoint=tmp_path / "c.pt")
        assert torch.equal(trained.theta.flat(), other.theta.flat())


def test_an_interrupt_from_a_callback_loses_nothing(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(problem, SGD6, checkpoint=tmp_path / "c.pt", callbacks=[StopAt(3, KeyboardInterrupt)])
    same(run(problem, SGD6, checkpoint=tmp_path / "c.pt"), run(problem, SGD6))
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after iteration 3 of 6$"):
        run(problem, SGD6, callbacks=[StopAt(3, KeyboardInterrupt)])


def test_training_in_a_thread_leaves_interrupts_alone(problem: Problem, tmp_path: Path) -> None:
    found: list[tuple[Any, History]] = []
    thread = threading.Thread(target=lambda: found.append(run(problem, SGD6, checkpoint=tmp_path / "c.pt")))
    thread.start()
    thread.join()
    same(found[0], run(problem, SGD6))


# --- Early stopping


@dataclass(frozen=True)
class Told:
    """A measure of told values, one list of each replica's by iteration; the state's iteration is in the parameters."""

    values: tuple[tuple[float, ...], ...]

    def __call__(self, problem: Problem, theta: Parameters, test: Any) -> dict[str, Tensor]:
        iteration = round(theta.buffers[0, 0].item())
        return {"train_loss": torch.zeros(len(self.values)), "told": torch.tensor([v[iteration] for v in self.values])}


@dataclass(frozen=True)
class Counting(Backprop):
    """Moves the parameters, and has the iteration for a buffer."""

    def step(self, problem: Problem, state: Any) -> Any:
        state.iteration += 1
        state.theta.fill(state.theta.flat() + torch.tensor([[1.0], [10.0], [100.0]])[: len(state.seeds)])
        state.theta.buffers[:, 0] = state.iteration
        return state


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0 * self.count  # type: ignore[operator]


def told(values: Sequence[Sequence[float]], **options: Any) -> tuple[Problem, Any, History]:
    blocks = split(nn.Sequential(nn.Linear(6, 3), Counted()), after=[])
    task = Problem(*samples(0), blocks, CrossEntropy(), initialiser("uniform", a=0.0, b=0.0))
    optimizer = Counting(len(values[0]) - 1, SGD(), 0.1, batch_size=16)
    state = optimizer.init(task, range(len(values)))
    return task, state, train(task, optimizer, state, measure=Told(tuple(map(tuple, values))), **options)


UP_AND_DOWN = (5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.0, 3.2, 1.0, 0.0)


@pytest.mark.parametrize(
    ("values", "patience", "mode", "ends", "best"),
    [
        (UP_AND_DOWN, 3, "min", 7, 4),
        (UP_AND_DOWN, 2, "min", 3, 1),
        (UP_AND_DOWN, 4, "min", 9, 9),
        (UP_AND_DOWN, 1, "min", 2, 1),
        (UP_AND_DOWN, None, "min", 9, 9),
        (UP_AND_DOWN, 3, "max", 3, 0),
        ([-v for v in UP_AND_DOWN], 3, "max", 7, 4),
        ([math.nan, math.nan, 1.0, math.nan, 2.0, math.nan], 3, "min", 5, 2),
        ([math.nan] * 6, 2, "min", 2, 0),
    ],
)
def test_training_ends_when_nothing_has_improved_for_some_evaluations(
    values: Sequence[float], patience: int | None, mode: Any, ends: int, best: int
) -> None:
    stopping = EarlyStopping("told", patience, mode)
    task, state, history = told([values], callbacks=[stopping])
    assert state.iteration == ends == history.rows[-1]["iteration"]
    assert stopping.rows == {0: history.rows[best]}
    kept = stopping.best(task)
    assert kept.flat().unique().tolist() == [best] and kept.buffers.tolist() == [[best]]
    assert task.blocks.export(kept)[1].count.item() == best  # type: ignore[index]


STACK = (UP_AND_DOWN, UP_AND_DOWN[::-1], (3.0, 2.0, *[2.5] * 8))  # which end at 7, 3 and 4 with a patience of 3


def test_each_replica_of_a_stack_is_judged_alone() -> None:
    stopping = EarlyStopping("told", 3, "min")
    task, state, _ = told(STACK, callbacks=[stopping])
    alone = []
    for values in STACK:
        one = EarlyStopping("told", 3, "min")
        told([values], callbacks=[one])
        alone.append(one.rows[0]["iteration"])
    assert state.iteration == 7 and alone == [4, 0, 1]
    assert [stopping.rows[replica]["iteration"] for replica in range(3)] == alone
    assert stopping.best(task).flat()[:, 0].tolist() == [4.0, 0.0, 100.0]


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_stops_where_the_whole_one_does(at: int, every: int, tmp_path: Path) -> None:
    def stopped(more: Sequence[Any] = (), **options: Any) -> tuple[tuple[Any, History], Parameters]:
        stopping = EarlyStopping("told", 3, "min")
        task, state, history = told(STACK, callbacks=[stopping, *more], evaluate_every=every, **options)
        return (state, history), stopping.best(task)

    def kill(problem: Problem, state: Any, history: History, rows: list[Row]) -> None:
        if state.iteration > at:
            raise ZeroDivisionError

    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_seconds": 0.0}
    with pytest.raises(ZeroDivisionError):
        stopped(more=[kill], **options)
    assert read_checkpoint(tmp_path / "c.pt")["state"]["iteration"] >= at
    (resumed, best), (whole, expected) = stopped(**options), stopped()
    same(resumed, whole)
    assert torch.equal(best.flat(), expected.flat()) and torch.equal(best.buffers, expected.buffers)


def test_with_more_patience_a_stopped_run_goes_on(tmp_path: Path) -> None:
    for patience, ends in ((2, 3), (3, 7), (4, 9)):
        stopping = EarlyStopping("told", patience, "min")
        task, state, _ = told([UP_AND_DOWN], callbacks=[stopping], checkpoint=tmp_path / "c.pt")
        assert state.iteration == ends
        assert stopping.best(task).flat()[0, 0].item() == stopping.rows[0]["iteration"]


def test_a_callback_that_is_new_at_a_resume_begins_there(tmp_path: Path) -> None:
    """What it has not seen it cannot keep."""
    told([UP_AND_DOWN], callbacks=[StopAt(5)], checkpoint=tmp_path / "c.pt")
    stopping = EarlyStopping("told", 2, "max")
    task, state, _ = told([UP_AND_DOWN], callbacks=[stopping], checkpoint=tmp_path / "c.pt")
    assert state.iteration == 7 and stopping.rows[0]["iteration"] == 5
    assert stopping.best(task).flat().unique().tolist() == [5.0]


def test_what_is_best_by_another_quantity_is_not_taken(tmp_path: Path) -> None:
    told([UP_AND_DOWN], callbacks=[EarlyStopping("told", 2, "min")], checkpoint=tmp_path / "c.pt")
    stopping = EarlyStopping("told", None, "max")
    told([UP_AND_DOWN], callbacks=[stopping], checkpoint=tmp_path / "c.pt")
    assert stopping.rows[0]["iteration"] == 3  # the highest since the resume there


def test_one_more_callback_leaves_each_its_own_state(tmp_path: Path) -> None:
    told([UP_AND_DOWN], callbacks=[EarlyStopping("told", 2, "max")], checkpoint=tmp_path / "c.pt")
    stopping, other = EarlyStopping("told", None, "max"), EarlyStopping("train_loss", None)
    task, _, _ = told([UP_AND_DOWN], callbacks=[other, stopping], checkpoint=tmp_path / "c.pt")
    assert stopping.rows[0]["iteration"] == 0 == stopping.best(task).flat()[0, 0].item()
    assert other.rows[0]["iteration"] == 2  # the first that it has seen


def test_states_that_may_be_of_several_callbacks_are_refused(tmp_path: Path) -> None:
    told([UP_AND_DOWN], callbacks=[EarlyStopping("told", 2, "min")], checkpoint=tmp_path / "c.pt")
    message = r"callbacks: 2 of EarlyStopping of \['told', 'min'\], where it has the states of 1; give as many, or none"
    with pytest.raises(CheckpointError, match=message):
        callbacks = [EarlyStopping("told", patience, "min") for patience in (3, 4)]
        told([UP_AND_DOWN], callbacks=callbacks, checkpoint=tmp_path / "c.pt")


def test_a_diverged_replica_is_not_waited_for(problem: Problem) -> None:
    optimizer = Backprop(50, SGD(), [1e30, 0.0], batch_size=16)
    with pytest.warns(DivergenceWarning):
        state, history = run(problem, optimizer, callbacks=[EarlyStopping("train_loss", 3)])
    assert history.diverged == {0: 1} and state.iteration == 3


def test_of_each_diverged_replica_one_warning_tells_at_the_user_s_line(problem: Problem, tmp_path: Path) -> None:
    optimizer = Backprop(3, SGD(), [1e30, 0.0, 1e30], batch_size=16)
    for iterations in (2, 3):  # the second call goes on
        state = optimizer.init(problem, [5, 6, 7])
        options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "keep_last": True}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(problem, optimizer, state, iterations, **options)
        told = [str(warning.message).partition(":")[0] for warning in caught]
        assert told == ["seed 5 has diverged", "seed 7 has diverged"]
        assert all("not finite after iteration 1, " in str(warning.message) for warning in caught)
        assert {(warning.category, warning.filename) for warning in caught} == {(DivergenceWarning, __file__)}


@pytest.mark.parametrize("quantity", ["train_loss", "train_accuracy"])
def test_the_better_direction_of_a_score_is_known(problem: Problem, quantity: str) -> None:
    """As `evaluate` measures it, in a run in which the first network is the worst, and the last one the best."""
    stopping = EarlyStopping(quantity)
    _, history = run(problem, OPTIMIZERS["backprop"], seeds=[3], callbacks=[stopping])
    values = [row[quantity] for row in history.rows]
    expected = max(values) if quantity == "train_accuracy" else min(values)
    assert stopping.rows[0][quantity] == expected != values[0]


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (CrossEntropy(), torch.arange(50) % 3),
        (SquaredError(), torch.rand(50, 3)),
        (BinaryCrossEntropy(), torch.arange(150).view(50, 3) % 2),
    ],
    ids=["classes", "numbers", "labels"],
)
def test_the_better_direction_of_each_score_is_known(problem: Problem, loss: Any, y: Tensor) -> None:
    task = replace(problem, y=y, loss=loss)
    highest = {name for name in evaluate(task, task.initial([0]), None) if EarlyStopping(name).mode == "max"}
    assert highest <= {"train_accuracy", "train_r2", "train_label_accuracy", "train_exact_match"}
    assert len(highest) == (2 if isinstance(loss, BinaryCrossEntropy) else 1)


FORMS = {
    "tuple": lambda x, y: ((x,), y),
    "dictionary": lambda x, y: ({"input": x}, y),
    "loader": lambda x, y: (DataLoader(TensorDataset(x, y)), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_best_is_kept_whatever_the_form_of_the_inputs(problem: Problem, form: str) -> None:
    x, y = samples(0)
    network = nn.Sequential(nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3))
    task = Problem(*FORMS[form](x, y), split(network, after="1"), CrossEntropy(), problem.initialise)
    stopping = EarlyStopping("train_loss")
    state, _ = run(task, SGD6, callbacks=[stopping])
    assert torch.equal(stopping.best(task).flat(), state.theta.flat())  # the loss has fallen to the end


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStopping("kkt"), "mode: None, but 'kkt' does not end in loss, mse, accuracy, exact_match, r2"),
        (lambda: EarlyStopping("told", 0, "min"), "patience: 0 is not a whole number from 1 up"),
        (lambda: EarlyStopping("told", 2, "lowest"), "mode: 'lowest' is not one of min, max"),  # type: ignore[arg-type]
        (
            lambda: told([UP_AND_DOWN], callbacks=[EarlyStopping("valid_loss")]),
            "quantity: 'valid_loss' is not measured",
        ),
        (lambda: EarlyStopping("told", mode="min").best(None), "best: there has been no evaluation yet"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_option_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_has_grown_a_thousandfold_is_warned_of_once(problem: Problem) -> None:
    """As finite as it is; the history goes on."""
    optimizer = Backprop(4, SGD(), [0.05, 1.5], batch_size=16)
    squared = replace(problem, y=one_hot(problem.y, 3, like=problem.like), loss=SquaredError())
    linear = replace(squared, blocks=split(nn.Sequential(nn.Linear(6, 3)), n_blocks=1))
    with pytest.warns(
        DivergenceWarning, match=r"^seed 4: train_loss is .* after iteration \d, and was .*; try"
    ) as caught:
        _, history = run(linear, optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not history.diverged and len(history.rows) == 10
    losses = {row["iteration"]: row["train_loss"] for row in history.rows if row["seed"] == 4}
    first = next(iteration for iteration, loss in losses.items() if loss > 1000 * losses[0])
    assert first > 1 and f"is {losses[first]:.3g} after iteration {first}, " in str(caught[0].message)


def test_a_callback_whose_state_cannot_be_saved_is_told_before_training(problem: Problem, tmp_path: Path) -> None:
    class Wrong(StopAt):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {1, 2}}

    wrong = Wrong(99)
    with pytest.raises(TypeError, match="Wrong 0 holds a set, which cannot be saved"):
        run(problem, SGD6, checkpoint=tmp_path / "c.pt", callbacks=[wrong])
    assert not wrong.seen


def test_the_best_is_kept_and_resumed_where_the_samples_are(problem: Problem, tmp_path: Path) -> None:
    """With rules around others, on a GPU as on the processor."""

    def best(task: Problem, path: Path) -> Tensor:
        groups = [Group("*.bias", SGD(momentum=0.9), [0.5, 2.0]), Group(1, Adam())]
        rule = Clipped(Averaged(Grouped(task.blocks, groups, SGD()), 0.9), 0.5)
        optimizer = Backprop(6, rule, lambda progress: [0.05, 0.1 * progress], batch_size=16)
        x, y = (tensor.to(task.x.device) for tensor in samples(1))
        for iterations in (3, 6):
            stopping = EarlyStopping("valid_loss")
            options: dict[str, Any] = {"test": {"valid": (x, y)}, "checkpoint": path, "keep_last": True}
            run(task, optimizer, iterations=iterations, callbacks=[stopping], **options)
        return stopping.best(task).flat()

    expected = best(problem, tmp_path / "cpu.pt")
    with simulated_gpu() as gpu:
        found = best(replace(problem, x=problem.x.to(gpu), y=problem.y.to(gpu)), tmp_path / "gpu.pt")
        assert found.device == gpu
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


# --- What cannot be trained

OTHER = Problem(samples(0)[0], samples(0)[1], split(mlp(6, [8, 5], 3), per_layer=True), CrossEntropy(), as_given)
FEWER = Problem(*samples(0, 40), split(mlp(6, [8, 7], 3), per_layer=True), CrossEntropy(), as_given)
FROZEN = Problem(
    *samples(0), split(mlp(6, [8, 7], 3).requires_grad_(False), per_layer=True), CrossEntropy(), initialiser("pytorch")
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": nn.Linear(6, 3)}, r"problem: Linear\(.*\) is no Problem, such as admm\.Problem"),
        ({"optimizer": torch.optim.SGD}, "optimizer: the class torch.* is no Optimizer, such as admm.OnlineBlockADMM"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
            "optimizer: an object of the class torch.*SGD is no Optimizer, such as admm.OnlineBlockADMM",
        ),
        ({"optimizer": BlockADMM}, "optimizer: BlockADMM is a class; give an object of it, such as admm.Online"),
        ({"callbacks": EarlyStopping("train_loss")}, r"callbacks: EarlyStopping\(.*\) is no list of functions; take"),
        (
            {"callbacks": [EarlyStopping]},
            "callbacks: the class admm.callbacks.EarlyStopping is no function, and no object such as",
        ),
        ({"callbacks": ["stop"]}, "callbacks: 'stop' is no function"),
        ({"measure": "accuracy"}, "measure: 'accuracy' is no function"),
        ({"problem": FROZEN, "of": FROZEN}, "blocks: no parameter of the network is trained; all are frozen"),
        ({"of": OTHER}, r"state: of another network: 'fc2\.linear\.weight' is \[5, 8\], expected \[7, 8\]"),
        ({"of": FEWER, "optimizer": OPTIMIZERS["block"]}, "problem: 50 samples, but the state has variables of 40"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_named_before_the_first_step(
    problem: Problem, change: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"problem": problem, "optimizer": SGD6} | change
    made_by = given["optimizer"] if isinstance(given["optimizer"], Optimizer) else SGD6
    state = made_by.init(given.pop("of", problem), SEEDS)
    with pytest.raises(ValueError, match=f"^{message}"):
        train(given.pop("problem"), given.pop("optimizer"), state, iterations=2, **given)
    assert state.iteration == 0


# --- Other sets


def test_each_named_set_is_measured_as_a_test_set_of_its_own(problem: Problem) -> None:
    sets = {"valid": samples(1, 20), "test": samples(2, 30), "shifted": (samples(2, 30)[0] + 1.0, samples(2, 30)[1])}
    _, history = run(problem, SGD6, test=sets)
    for name, pair in sets.items():
        _, alone = run(problem, SGD6, test=pair)
        for row, expected in zip(history.rows, alone.rows, strict=True):
            for quantity in ("loss", "accuracy"):
                assert row[f"{name}_{quantity}"] == expected[f"test_{quantity}"]
                assert row[f"train_{quantity}"] == expected[f"train_{quantity}"]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            {"train": samples(1)},
            r"test\['train'\]: the name of a set must be text, and 'train' is that of the training",
        ),
        ({1: samples(1)}, r"test\[1\]: the name of a set must be text"),
        ({"valid": samples(1)[0]}, r"test\['valid'\]: a Tensor is no pair of inputs and targets"),
        ({"test": samples(1), "valid": (samples(1)[0][:, :2], samples(1)[1])}, r"test\['valid'\]: x: samples \[2\]"),
    ],
)
def test_a_named_set_that_does_not_fit_is_refused_by_its_name(problem: Problem, test: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(problem, SGD6, test=test)


def test_a_checkpoint_knows_its_sets(problem: Problem, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "keep_last": True}
    run(problem, SGD6, test={"valid": samples(1)}, **options)
    run(problem, SGD6, test={"valid": samples(1)}, **options)
    for other in ({"valid": samples(2)}, {"test": samples(1)}, samples(1)):
        with pytest.raises(CheckpointError, match=r"it is of another run: test was \{valid: "):
            run(problem, SGD6, test=other, **options)


# --- How long


@each_optimizer
def test_training_takes_as_long_as_the_optimizer_says(problem: Problem, optimizer: Any) -> None:
    same(run(problem, optimizer), run(problem, optimizer, iterations=6))


def test_an_optimizer_without_a_number_of_iterations_is_given_one(problem: Problem) -> None:
    class Endless(Backprop):
        iterations = None  # type: ignore[assignment]

    optimizer = Endless(6, SGD(), 0.05, batch_size=16)
    object.__delattr__(optimizer, "iterations")
    with pytest.raises(ValueError, match=r"^iterations: None, but Endless has no number .*train\(…, iterations=50\)"):
        train(problem, optimizer, SGD6.init(problem, SEEDS))


# --- Checkpoints and copies


def activation(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A module that is shown alike, whatever it computes."""
    made: nn.Module = type("Activation", (nn.Module,), {"forward": lambda self, x: function(x)})()
    return made


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ((nn.Tanh(), nn.Sigmoid()), r"network was \(1\): Tanh\(\), is \(1\): Sigmoid\(\)"),
        ((activation(torch.tanh), activation(torch.sigmoid)), "it is of another run: outputs was"),
    ],
)
def test_networks_of_the_same_shapes_are_told_apart(activations: Any, message: str, tmp_path: Path) -> None:
    first, second = (
        Problem(
            *samples(0),
            split(nn.Sequential(nn.Linear(6, 4), activation, nn.Linear(4, 3)), after=["1"]),
            CrossEntropy(),
            initialiser("pytorch"),
        )
        for activation in activations
    )
    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "keep_last": True}
    run(first, SGD6, **options)
    run(first, SGD6, **options)
    with pytest.raises(CheckpointError, match=message):
        run(second, SGD6, **options)


def test_functions_that_differ_within_are_told_apart(problem: Problem, tmp_path: Path) -> None:
    problem = replace(problem, y=one_hot(problem.y, 3, like=problem.like), loss=SquaredError())
    first = replace(problem, loss=lambda z, y: (lambda r: r.square())(z - y))
    second = replace(problem, loss=lambda z, y: (lambda r: r.abs())(z - y))
    run(first, SGD6, checkpoint=tmp_path / "c.pt", keep_last=True)
    with pytest.raises(CheckpointError, match="it is of another run: loss was "):
        run(second, SGD6, checkpoint=tmp_path / "c.pt")


def test_schedules_that_differ_are_told_apart(problem: Problem, tmp_path: Path) -> None:
    for rate in (0.1, 0.1, 0.2):
        optimizer = Backprop(6, SGD(), lambda progress, *, rate=rate: rate * (1 - progress), batch_size=16)
        if rate == 0.1:
            run(problem, optimizer, checkpoint=tmp_path / "c.pt", keep_last=True)
        else:
            with pytest.raises(CheckpointError, match=r"optimizer\.step_size was .*0\.1.*, is .*0\.2"):
                run(problem, optimizer, checkpoint=tmp_path / "c.pt")


class Constant:
    """A schedule."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        return self.value

    def at(self, progress: float) -> float:
        return self.value


class Scaled(Loss):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def value(self, z: Tensor, y: Any) -> Tensor:
        return self.scale * CrossEntropy().value(z, y)

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        return self.scale * CrossEntropy().gradient(z, y)

    def targets(self, y: Any, outputs: Any, like: Tensor) -> Any:
        return CrossEntropy().targets(y, outputs, like)


class Dropped(nn.Module):
    """With a list of its own parameters, as PyTorch's recurrent networks have it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.weight = p, nn.Parameter(torch.randn(1))
        self.parts = [self.weight]

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.dropout(x, self.p, self.training)


class Rule(SGD):
    def __init__(self, factor: float) -> None:
        super().__init__()
        object.__setattr__(self, "factor", factor)

    def apply(self, theta: Any, gradient: Any, moments: Any, step: Any) -> None:
        super().apply(theta, [self.factor * g for g in gradient], moments, step)  # type: ignore[attr-defined]


class Noise(Augmentation):
    def __init__(self, size: float) -> None:
        self.size = size

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randn(samples, 6, generator=generator)

    def apply(self, x: Tensor, changes: Tensor) -> Tensor:
        return x + self.size * changes


RATE = 0.1


def by_global(value: float) -> Any:
    global RATE
    RATE = value
    return lambda progress: RATE


def sgd(step_size: Any = 0.05, rule: Any = None) -> Any:
    return Backprop(6, rule or SGD(), step_size, batch_size=16)


def network(*layers: nn.Module) -> Any:
    return split(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), *layers, nn.Linear(4, 3)), after=["1"])


def large(value: float) -> Any:
    """Arrays that are shown alike."""
    x = np.zeros((1000, 6), np.float32)
    x[500] = value
    return x, np.arange(1000) % 3


OBJECTS: dict[str, tuple[Callable[[float], dict[str, Any]], str]] = {
    "a schedule": (
        lambda v: {"optimizer": sgd(Constant(v))},
        r"optimizer.step_size was .*{value: 0.1}, is .*{value: 1}",
    ),
    "a method": (
        lambda v: {"optimizer": sgd(Constant(v).at)},
        r"optimizer.step_size was .*{value: 0.1}, is .*{value: 1}",
    ),
    "a global": (lambda v: {"optimizer": sgd(by_global(v))}, r"optimizer.step_size was .*{RATE: 0.1}, is .*{RATE: 1}"),
    "a rule": (
        lambda v: {"optimizer": sgd(rule=Rule(v))},
        r"optimizer.theta_update was .*factor=0.1\), is .*factor=1\)",
    ),
    "a loss": (lambda v: {"loss": Scaled(v)}, r"loss was .*{scale: 0.1}, is .*{scale: 1}"),
    "a layer": (lambda v: {"blocks": network(Dropped(v / 2))}, r"network was 2.p = 0.05, is 2.p = 0.5"),
    "an augmentation": (lambda v: {"augmentation": Noise(v)}, r"augmentation was .*{size: 0.1}, is .*{size: 1}"),
    "a test set": (lambda v: {"test": large(v)}, r"test was \(float32 \[1000, 6\] \w+, .*, is .*"),
}


@pytest.mark.parametrize(("make", "message"), OBJECTS.values(), ids=OBJECTS)
def test_what_is_inside_of_objects_makes_another_run(
    problem: Problem, make: Callable[[float], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    def again(value: float) -> None:
        options = make(value)
        optimizer, test = options.pop("optimizer", sgd()), options.pop("test", None)
        run(replace(problem, **options), optimizer, test=test, checkpoint=tmp_path / "c.pt", keep_last=True)

    again(0.1)
    again(0.1)
    with pytest.raises(CheckpointError, match=f"it is of another run: {message};"):
        again(1.0)


def test_what_was_saved_stays_when_a_restored_state_goes_on() -> None:
    @dataclass
    class State:
        kept: list[Tensor]
        best: Tensor | None
        theta: Tensor

    saved = copy.deepcopy(save(State([torch.ones(2)], torch.ones(2), torch.ones(2))))
    state = State([], None, torch.zeros(2))
    theta = state.theta
    restore(state, saved)
    assert state.theta is theta and theta.tolist() == [1.0, 1.0]
    for tensor in (state.kept[0], state.best, state.theta):
        assert tensor is not None
        tensor.add_(1.0)
    assert [t.tolist() for t in (saved["kept"][0], saved["best"], saved["theta"])] == [[1.0, 1.0]] * 3


# --- What is taken elsewhere


def convolutional() -> nn.Sequential:
    """With batch normalisation, a module within another, and names."""
    network = nn.Sequential()
    network.add_module("stem", nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    network.add_module("pool", nn.MaxPool2d(2))
    network.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    return network


NETWORKS = {"convolutional": (convolutional, "pool"), "resnet18": (lambda: resnet18((1, 8, 8), 3, 2), "conv3_x")}
EXPORTED = ["convolutional", pytest.param("resnet18", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], nn.Module, Tensor]:
    """A constructor, a trained network of it by another way, and inputs."""
    build, after = NETWORKS[request.param]
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = Problem(x, torch.arange(24) % 3, split(build(), after=after), CrossEntropy(), initialiser("pytorch"))
    optimizer = OnlineBlockADMM(2, 0.01, batch_size=8)
    state, _ = run(task, optimizer)
    network = task.blocks.export(state.theta, replica=1)
    torch.testing.assert_close(network(x), task.blocks.forward(state.theta, x.expand(2, *x.shape))[1])
    assert not torch.allclose(
        network.state_dict()[next(n for n in network.state_dict() if "running_mean" in n)], torch.zeros(1)
    )
    return build, network, x


def test_the_parameters_load_into_a_model_of_one_s_own(trained: Any) -> None:
    build, network, x = trained
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    own = build()
    own.load_state_dict(torch.load(file))
    own.eval()
    with torch.no_grad():
        assert torch.equal(own(x), network(x))
    assert own.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("trained", EXPORTED, indirect=True)
def test_an_exported_network_goes_through_torch_export(trained: Any) -> None:
    _, network, x = trained
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        for some in (x, x[:5]):
            torch.testing.assert_close(torch.export.load(file).module()(some), network(some))
            file.seek(0)


@pytest.mark.parametrize("trained", EXPORTED, indirect=True)
def test_an_exported_network_goes_through_onnx(trained: Any, tmp_path: Path) -> None:
    """The oracle is ONNX's own reference evaluator."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    _, network, x = trained
    program = torch.onnx.export(
        network, (x,), input_names=["x"], dynamic_shapes=({0: "n"},), dynamo=True, verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "network.onnx"))
    session = reference.ReferenceEvaluator(str(tmp_path / "network.onnx"))
    for some in (x, x[:5]):
        (found,) = session.run(None, {"x": some.numpy()})
        np.testing.assert_allclose(found, network(some).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_exported_network_is_a_copy(problem: Problem) -> None:
    state = SGD6.init(problem, SEEDS)
    network = problem.blocks.export(state.theta)
    before = network(problem.x).detach().clone()
    train(problem, SGD6, state)
    assert torch.equal(network(problem.x), before)
    for parameter in network.parameters():
        parameter.data.zero_()
    found = evaluate(replace(problem, loss=SquaredError()), state.theta, None)["train_loss"]
    assert (found > 0).all() and state.theta.flat().abs().max() > 0
