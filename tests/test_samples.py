"""Samples from the disk, data sets and loaders give the numbers of the same samples as tensors, and are read once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu import simulated_gpu
from test_deepfacto import BASE as DEEPFACTO
from test_deepfacto import problem as faces
from test_protocol import CASES, tensors, trained
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

import admm.losses
from admm.blocks import split
from admm.checkpoints import CheckpointError, save
from admm.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from admm.minibatches import minibatches
from admm.models import initialiser
from admm.optimizers import SGD, Backprop, Problem
from admm.samples import Stream, Tensors, as_samples
from admm.training import evaluate, train

SEEDS = (5, 0, 5)
STREAMING = [
    "adam",
    "gotmare",
    "online, decay",
    "block-admm as in the paper",
    "block-admm, mini-batches",
    "block-admm, mini-batches, adam",
]


def on_disk(x: Any, folder: Path, name: str = "x") -> Any:
    """A copy of a tensor in a file."""
    array = np.memmap(folder / name, mode="w+", dtype=x.numpy().dtype, shape=tuple(x.shape))
    array[:] = x.numpy()
    array.flush()
    return np.memmap(folder / name, mode="r", dtype=array.dtype, shape=array.shape)


def raw_targets(problem: Problem) -> Tensor:
    """Class indices, or what the problem has."""
    return problem.y.argmax(1) if problem.y.is_floating_point() else problem.y


class Pairs(Dataset):  # type: ignore[type-arg]
    """Items that are made one by one, and counted."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.read = x, y, Counter[int]()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read[index] += 1
        return self.x[index], int(self.y[index])


SOURCES = {
    "arrays on the disk": lambda x, y, folder: (on_disk(x, folder), on_disk(y, folder, "y")),
    "inputs on the disk": lambda x, y, folder: (on_disk(x, folder), y),
    "a data set": lambda x, y, folder: (Pairs(x, y), None),
    "a list": lambda x, y, folder: (list(zip(x.numpy(), y.tolist(), strict=True)), None),
    "a loader": lambda x, y, folder: (DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True), None),
    "workers": lambda x, y, folder: (DataLoader(Pairs(x, y), num_workers=2, prefetch_factor=1), None),
}


def streamed(problem: Problem, source: str, folder: Path) -> Problem:
    x, y = SOURCES[source](problem.x, raw_targets(problem), folder)
    return replace(problem, x=x, y=y)


def results(problem: Problem, optimizer: Any, steps: int = 2) -> list[Tensor]:
    """The state and what is measured of it."""
    state = trained(optimizer, problem, SEEDS, steps)
    values = optimizer.diagnostics(problem, state) | evaluate(problem, state.theta, None)
    return [*tensors(save(state)), *values.values()]


@pytest.mark.parametrize(
    ("name", "source"),  # two with workers, which take long to start
    [(name, source) for name in STREAMING for source in SOURCES if source != "workers" or name in STREAMING[2:4]],
)
def test_an_optimizer_has_the_numbers_of_tensors(
    name: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    problem = request.getfixturevalue(case.problem)(case.loss)
    found = results(streamed(problem, source, tmp_path), case.optimizer)
    assert all(map(torch.equal, found, results(problem, case.optimizer)))


@pytest.mark.parametrize("source", ["arrays on the disk", "a data set"])
def test_augmented_images_are_those_of_tensors(source: str, tmp_path: Path, augmented_problem: Any) -> None:
    case, problem = CASES["online, resnet"], augmented_problem(CrossEntropy())
    found = results(streamed(problem, source, tmp_path), case.optimizer, 1)
    assert all(map(torch.equal, found, results(problem, case.optimizer, 1)))


@pytest.mark.parametrize(
    ("source", "group_size"), [("inputs on the disk", 4), ("arrays on the disk", 4), ("a list", 1)]
)
def test_deepfacto_has_the_numbers_of_tensors(source: str, group_size: int, tmp_path: Path) -> None:
    problem, optimizer = faces(), replace(DEEPFACTO, group_size=group_size)
    found, expected = (trained(optimizer, task, SEEDS, 2) for task in (streamed(problem, source, tmp_path), problem))
    assert all(map(torch.equal, tensors(save(found)), tensors(save(expected))))


def test_deepfacto_needs_all_targets_for_groups(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="group_size: 4 needs the targets of all samples before training; take tensors"
    ):
        DEEPFACTO.init(streamed(faces(), "a data set", tmp_path), SEEDS)


def test_each_sample_is_read_once_an_epoch_for_each_seed(mlp_problem: Any) -> None:
    problem = mlp_problem()
    pairs = Pairs(problem.x, raw_targets(problem))
    streaming = replace(problem, x=pairs, y=None)
    for seeds in ([3, 3, 3], [3, 4], [3, 4, 3, 4, 4]):
        pairs.read.clear()
        visits = [visit for visit in streaming.minibatches(7, seeds, 2, None)[1]]
        assert set(pairs.read.values()) == {len(set(seeds))} and len(pairs.read) == 24
        for visit, expected in zip(visits, problem.minibatches(7, seeds, 2, None)[1], strict=True):
            assert torch.equal(visit.x, expected.x) and torch.equal(visit.y, expected.y)
    pairs.read.clear()
    batch = torch.tensor([[3, 8], [3, 8], [8, 3]])
    visit = streaming.visit([0, 1, 2], batch)
    assert torch.equal(visit.x, problem.x[batch]) and torch.equal(visit.y, problem.y[batch])
    assert set(pairs.read.values()) == {2}  # in two orders
    assert torch.equal(streaming.visit([0, 1], slice(None)).x, problem.x.expand(2, 24, 6))


@pytest.mark.parametrize("name", ["block-admm as in the paper", "block-admm, mini-batches"])
def test_each_visit_of_an_iteration_has_a_counter_of_its_own(
    name: str, mlp_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: list[Any] = []

    def visits(self: Problem, seeds: Any, batches: Any, numbers: Any) -> Any:
        counters.extend(numbers)
        return read(self, seeds, batches, numbers)

    problem, optimizer, read = mlp_problem(), CASES[name].optimizer, Problem.visits
    state = optimizer.init(problem, SEEDS)
    monkeypatch.setattr(Problem, "visits", visits)
    for _ in range(2):
        optimizer.step(problem, state)
    assert len(counters) == len(set(counters)) > 6


def test_what_is_not_needed_is_not_read(tmp_path: Path) -> None:
    """Sixteen GiB of zeros that a file system keeps without room."""
    x = np.memmap(tmp_path / "x", mode="w+", dtype=np.float32, shape=(2**20, 2**12))
    problem = Problem(
        x, torch.zeros(2**20, 1), split(nn.Sequential(nn.Linear(2**12, 1)), after=[]), SquaredError(), lambda m: None
    )
    optimizer = Backprop(1, SGD(), 0.1, batch_size=16, epoch_parts=2**16)
    state = optimizer.init(problem, [0])
    bias = state.theta.flat()[0, -1].item()
    optimizer.step(problem, state)
    assert state.theta.flat()[0, -1].item() == pytest.approx(0.9 * bias)  # the gradient of ½ b²
    with pytest.raises(ValueError, match=r"x: .* needs all samples as tensors on cpu, 16.0 GiB \(17184063488 bytes\)"):
        problem.whole("An optimizer")


@pytest.mark.parametrize("name", ["standard admm", "taylor", "dladmm", "bcd"])
def test_algorithms_for_whole_tensors_say_what_they_would_need(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    problem = request.getfixturevalue(case.problem)(case.loss)
    for source in ("arrays on the disk", "a data set"):
        size = problem.x.nbytes + 8 * len(problem.x)  # and class indices
        with pytest.raises(
            ValueError, match=rf"x: .* needs all samples as tensors on cpu, .* \({size} bytes\).*Gotmare"
        ):
            case.optimizer.init(streamed(problem, source, tmp_path), SEEDS)


# --- Random numbers of a data set


class Noisy(Pairs):
    """Items that draw from each of the global generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x + torch.rand(6, dtype=x.dtype) + np.random.rand() + random.random(), y


@pytest.fixture
def noisy(mlp_problem: Any) -> Problem:
    problem = mlp_problem(CrossEntropy())
    return replace(problem, x=Noisy(problem.x, raw_targets(problem)), y=None)


def states() -> tuple[Any, ...]:
    """The global random numbers to come."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


@pytest.mark.parametrize("name", ["adam", "online, decay", "gotmare"])
def test_random_items_follow_from_seed_epoch_and_index(name: str, noisy: Problem) -> None:
    optimizer = CASES[name].optimizer
    before = states()
    together = trained(optimizer, noisy, (4, 1), 2)
    assert states() == before
    for s, seed in enumerate((4, 1)):
        alone = trained(optimizer, noisy, (seed,), 2)
        torch.testing.assert_close(alone.theta.flat()[0], together.theta.flat()[s], rtol=1e-10, atol=1e-10)


def test_random_items_differ_between_epochs_and_seeds_and_not_with_workers(noisy: Problem) -> None:
    def epoch(problem: Problem, seed: int, number: int) -> Tensor:
        return torch.cat([visit.x[0] for visit in problem.minibatches(5, [seed], number, None)[1]])

    def added(seed: int, number: int) -> Tensor:
        order = torch.cat([visit.x[0] for visit in replace(noisy, x=plain).minibatches(5, [seed], number, None)[1]])
        return epoch(noisy, seed, number) - order

    plain = Pairs(noisy.x.x, noisy.x.y)
    draws = torch.stack([added(0, 0), added(0, 1), added(1, 0)])
    assert bool(((draws > 0) & (draws < 3)).all()) and len(draws.unique()) == draws.numel()
    before = states()
    workers = replace(noisy, x=DataLoader(noisy.x, num_workers=2))
    assert torch.equal(epoch(workers, 0, 1), epoch(noisy, 0, 1)) and states() == before
    batches = [torch.cat([visit.x[0] for visit in noisy.minibatches(5, [0], part, 5)[1]]) for part in range(5, 10)]
    assert torch.equal(torch.cat(batches), epoch(noisy, 0, 1))  # by parts of an epoch


def test_what_is_evaluated_and_has_variables_is_the_same_each_time(noisy: Problem) -> None:
    theta = noisy.initial((0, 1))
    assert all(map(torch.equal, evaluate(noisy, theta, noisy.x).values(), evaluate(noisy, theta, noisy.x).values()))
    first, second = (noisy.visit([0], batch).x[0] for batch in (torch.tensor([[2, 9]]), slice(2, 10)))
    assert torch.equal(first, second[[0, 7]])


@pytest.mark.parametrize("name", ["adam", "block-admm, mini-batches, lipschitz"])
def test_a_resumed_run_is_bit_identical(name: str, noisy: Problem, tmp_path: Path) -> None:
    optimizer = CASES[name].optimizer
    whole = optimizer.init(noisy, SEEDS)
    expected = train(noisy, optimizer, whole, 3, noisy.x)
    for iterations in (2, 3):
        state = optimizer.init(noisy, SEEDS)
        path = tmp_path / "c.pt"
        history = train(noisy, optimizer, state, iterations, noisy.x, checkpoint=path, keep_last=True)
    assert torch.equal(state.theta.flat(), whole.theta.flat())
    resumed, uninterrupted = ([{**row, "seconds": 0.0} for row in h.rows] for h in (history, expected))
    assert resumed == uninterrupted


def test_a_checkpoint_of_other_samples_is_refused(mlp_problem: Any, tmp_path: Path) -> None:
    problem, optimizer = mlp_problem(), CASES["adam"].optimizer
    x, y = problem.x, raw_targets(problem)

    def run(x: Tensor, y: Tensor) -> None:
        task = replace(problem, x=Pairs(x, y), y=None)
        train(task, optimizer, optimizer.init(task, [0]), 2, checkpoint=tmp_path / "c.pt", checkpoint_seconds=0.0)

    run(x, y)
    run(x, y)
    for others, message in (((x[:20], y[:20]), "samples was 24, is 20"), ((x + 1e-9, y), "x was .*, is ")):
        with pytest.raises(CheckpointError, match=message):
            run(*others)


# --- Nested inputs and targets


def trees(n: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(9, (n, 4), generator=generator),
        "mask": torch.rand(n, 4, generator=generator) < 0.5,
        "image": torch.randint(256, (n, 2, 3), generator=generator, dtype=torch.uint8),
        "more": (
            torch.rand(n, dtype=torch.float64, generator=generator),
            torch.rand(n, 2, generator=generator).bfloat16(),
        ),
    }


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("source", ["tensors", "disk", "items"])
def test_nested_samples_keep_their_form_and_types(source: str, tmp_path: Path) -> None:
    x, y = trees(), (torch.arange(5), {"a": torch.arange(5) * 0.5})
    given: Any = x, y
    if source == "disk":
        given = {**x, "tokens": on_disk(x["tokens"], tmp_path), "mask": on_disk(x["mask"], tmp_path, "mask")}, y
    if source == "items":
        items = [torch.utils._pytree.tree_map(lambda leaf, i=i: leaf[i], (x, y)) for i in range(5)]
        given = DataLoader(items, collate_fn=tuples), None
    samples = as_samples(*given)
    assert isinstance(samples, Tensors if source == "tensors" else Stream) and samples.n == 5
    batch = torch.tensor([[4, 0, 1], [2, 2, 3]])
    for found, at in zip(samples.read([batch, slice(1, 3)]), (batch, slice(1, 3)), strict=True):
        same(found, torch.utils._pytree.tree_map(lambda leaf, at=at: leaf[at], (x, y)))


def tuples(items: list[Any]) -> Any:
    """As `default_collate`, which makes lists of tuples."""
    return torch.utils._pytree.tree_map(lambda *leaves: default_collate(list(leaves)), *items)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(2, 1)), torch.zeros(3), r"x\[1\]: inputs \[2, 1\], but x\[0\] has 3 samples"),
        ({"a": torch.zeros(3), "mask": torch.tensor(1.0)}, torch.zeros(3), r"x\['mask'\]: inputs \[\], but x\['a'\]"),
        ({"a": [1.0, 2.0], "b": "text"}, [1, 2], r"x\['b'\]: a str is no tensor"),
        ({"a": torch.zeros(3), "b": None}, torch.zeros(3), r"x\['b'\]: a NoneType is no tensor"),
        (torch.zeros(3), {"a": torch.zeros(2)}, r"problem: 3 inputs x, but 2 targets y\['a'\]"),
        (([torch.tensor([0.0, torch.inf])], torch.zeros(2)), torch.zeros(2), r"x\[0\]\[0\]: inputs must be finite"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), torch.zeros(2), r"x\[1\]: is on meta, x on cpu; both must"),
        ({}, torch.zeros(2), "x: is empty"),
        (torch.zeros(2), None, "y: None, but a Tensor x is no data set, and needs targets"),
        ({"a": torch.zeros(2)}, None, "y: None, but a dict x is no data set, and needs targets"),
        ((torch.zeros(2), torch.zeros(2)), None, "y: None, but a tuple x is no data set"),
        (3.0, None, "y: None, but a float x is no data set, and needs targets"),
        (torch.eye(2).to_sparse(), torch.zeros(2), "x: is a sparse or nested tensor, where samples"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_samples(x, y)


@pytest.mark.parametrize("source", ["disk", "items"])
def test_inputs_that_are_not_finite_are_refused_wherever_they_are(source: str, tmp_path: Path) -> None:
    """The last one is none of the samples that are looked at before training."""
    x, y = torch.ones(100, 2), torch.zeros(100)
    x[-1, 1] = torch.nan
    samples = as_samples(on_disk(x, tmp_path), y) if source == "disk" else as_samples(TensorDataset(x, y), None)
    assert torch.equal(next(samples.read([slice(0, 99)]))[0], x[:99])
    with pytest.raises(ValueError, match="x: inputs must be finite numbers, found NaN"):
        list(samples.read([slice(90, 100)]))


def test_arrays_of_any_order_are_read(tmp_path: Path) -> None:
    """Of bytes, as of a file from elsewhere, and of samples."""
    expected = torch.arange(6.0).view(3, 2)
    swapped = expected.numpy().astype(">f4")
    for x in (swapped, on_disk(expected.flip(0), tmp_path).copy()[::-1], np.asfortranarray(expected.numpy())):
        assert torch.equal(as_samples(x, [0, 1, 2]).examples[0], expected)
    file = np.memmap(tmp_path / "swapped", mode="w+", dtype=">f4", shape=(3, 2))
    file[:] = swapped
    assert torch.equal(as_samples(file, [0, 1, 2]).examples[0], expected)
    assert torch.equal(as_samples(file[::-1], [0, 1, 2]).examples[0], expected.flip(0))


def test_lists_of_numbers_are_one_input() -> None:
    x, y = as_samples([[0.5, 1.0], [2.0, 3.0]], (1, 0)).examples
    assert torch.equal(x, torch.tensor([[0.5, 1.0], [2.0, 3.0]])) and torch.equal(y, torch.tensor([1, 0]))


class Reader(nn.Module):
    """A network of tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(9, 6),
            nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
            nn.Linear(8, 3),
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(self.embed.weight.dtype)
        mean = (self.embed(tokens) * weight).sum(1) / weight.sum(1).clamp(min=1)
        return self.head(self.body(mean))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["tuple", "dictionary", "data set", "loader", "disk"])
def test_a_network_of_several_inputs_learns_from_each_form(form: str, tmp_path: Path) -> None:
    try:
        blocks = split(Reader(), after=["body"])
    except TypeError:
        pytest.skip("blocks take one tensor")
    x, y = {"tokens": trees(40)["tokens"], "mask": trees(40)["mask"]}, trees(40)["tokens"][:, 0] % 3
    items = [({name: leaf[i] for name, leaf in x.items()}, int(y[i])) for i in range(40)]
    given = {
        "tuple": (tuple(x.values()), y),
        "dictionary": (x, y),
        "data set": (items, None),
        "loader": (DataLoader(items, num_workers=1), None),
        "disk": ({name: on_disk(leaf, tmp_path, name) for name, leaf in x.items()}, y),
    }[form]
    problem = Problem(*given, blocks, CrossEntropy(), initialiser("pytorch"))
    optimizer = Backprop(3, SGD(0.9), 0.3, batch_size=8)
    state = optimizer.init(problem, [0])
    network = problem.blocks.export(state.theta).train()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    rule = torch.optim.SGD(network.parameters(), 0.3, momentum=0.9)
    for epoch in range(3):
        optimizer.step(problem, state)
        for (batch,) in minibatches(40, 8, [0], epoch, torch.device("cpu")):
            rule.zero_grad()
            outputs = network(*(leaf[batch] for leaf in x.values()))
            nn.functional.cross_entropy(outputs, y[batch]).backward()
            rule.step()
    expected = problem.blocks.flatten(network)
    torch.testing.assert_close(state.theta.flat()[0], expected, rtol=1e-4, atol=1e-5)
    right = (network(*x.values()).argmax(1) == y).float().mean().item()
    found = evaluate(problem, state.theta, given)
    assert found["train_accuracy"] == found["test_accuracy"] == pytest.approx(100.0 * right)
    for name in ("online, decay", "gotmare", "block-admm, mini-batches, adam"):
        own = CASES[name].optimizer
        together, plain = (trained(own, p, SEEDS, 2) for p in (problem, replace(problem, x=tuple(x.values()), y=y)))
        assert torch.equal(together.theta.flat(), plain.theta.flat())


def test_a_plain_function_s_targets_may_be_nested(mlp_problem: Any) -> None:
    problem = mlp_problem()
    weights = torch.linspace(0.5, 2.0, 24, dtype=torch.float64)

    def loss(z: Tensor, y: dict[str, Tensor]) -> Tensor:
        return y["weight"].unsqueeze(1) * (z - y["target"]).square()

    nested = replace(problem, y={"target": problem.y, "weight": weights}, loss=loss)
    scaled = replace(
        problem, y=(problem.y, weights), loss=lambda z, y: (y[1].sqrt().unsqueeze(1) * (z - y[0])).square()
    )
    for name in ("adam", "online, decay", "block-admm, gradient"):
        found, expected = (trained(CASES[name].optimizer, task, SEEDS, 2) for task in (nested, scaled))
        torch.testing.assert_close(found.theta.flat(), expected.theta.flat(), rtol=1e-10, atol=1e-10)
        found, expected = (evaluate(task, found.theta, (task.x, task.y)) for task in (nested, scaled))
        assert set(found) == {"train_loss", "test_loss"}
        torch.testing.assert_close(found, expected)


# --- Data sets and loaders that cannot be taken


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter([])


class Unsized(Dataset):  # type: ignore[type-arg]
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1), 0


DATA = TensorDataset(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (Endless(), None, "x: Endless has no length, or is read from its beginning .*; take a map-style data set"),
        (DataLoader(Endless()), None, "x: Endless has no length"),
        (Unsized(), None, "x: Unsized has no length"),
        (DATA, torch.zeros(4), "y: the items of TensorDataset are pairs of inputs and targets already; take y=None"),
        (DataLoader(DATA), torch.zeros(4), "y: the items of DataLoader are pairs"),
        ([], None, "x: list has no samples"),
        (TensorDataset(torch.zeros(4, 1)), None, "x: the items of TensorDataset must be pairs .* list of 1"),
        ([torch.zeros(2)], None, "x: the items of list must be pairs of inputs and targets, and join to a Tensor"),
        ([(torch.zeros(2), "cat")], None, r"y\[0\]: of 1 items of the data set a str was made, expected a tensor \[1"),
        ([({"a": torch.zeros(1), "b": "cat"}, 0)], None, r"x\['b'\]\[0\]: of 1 items of the data set a str was made"),
        ([(torch.zeros(1), 0), (torch.zeros(2), 0)], None, "x: 2 items of list cannot be joined .*; make tensors of"),
        ([(object(), 0)], None, "x: 1 items of list cannot be joined .*default_collate.*; make tensors of one shape"),
        ([(torch.tensor([torch.nan]), 0)], None, "x: inputs must be finite numbers"),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1])), None, r"x: .* \(SubsetRandomSampler\) would not be used"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=2)), None, "RandomSampler.* would not be used"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), None, "RandomSampler.* would not be used"),
        (DataLoader(DATA, batch_sampler=[[0, 1]]), None, r"x: the loader's sampling \(list\) would not be used"),
        (DataLoader(DATA, batch_size=3, drop_last=True), None, "drop_last=True would not be .* by which 1 sample"),
        (DataLoader(DATA, batch_size=None), None, r"x: the loader's sampling \(NoneType\) would not be used"),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_be_read_in_any_order_is_refused(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_samples(x, y)


def test_a_part_of_a_data_set_is_one() -> None:
    samples = as_samples(Subset(TensorDataset(torch.arange(6.0), torch.arange(6)), [4, 2, 0]), None)
    ((x, y),) = samples.read([torch.tensor([[2, 1]])])
    assert x.tolist() == [[0.0, 2.0]] and y.tolist() == [[0, 2]]


def test_mini_batches_of_several_seeds_must_have_one_shape() -> None:
    def padded(items: list[Any]) -> Any:
        return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])

    samples = as_samples(DataLoader([(torch.ones(n), n) for n in range(1, 5)], collate_fn=padded), None)
    ((x, _),) = samples.read([torch.tensor([[0, 1]])], seeds=[0])
    assert x.tolist() == [[[1.0, 0.0], [1.0, 1.0]]]
    with pytest.raises(ValueError, match="x: mini-batches of several seeds of list cannot be joined"):
        list(samples.read([torch.tensor([[0, 1], [2, 3]])], seeds=[0, 1]))


class Workers(Pairs):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        worker = get_worker_info()
        return self.x[index], -1 if worker is None else worker.id


def test_a_loader_s_workers_take_turns() -> None:
    samples = as_samples(DataLoader(Workers(torch.zeros(8), torch.zeros(8)), num_workers=2), None)
    batches = [torch.tensor([[number, number + 1]]) for number in range(4)]
    assert [y.tolist() for _, y in samples.read(batches)] == [[[worker] * 2] for worker in (0, 1, 0, 1)]
    assert [y.tolist() for _, y in samples.read(batches[:1])] == [[[-1, -1]]]  # not worth their start


def test_a_loader_s_collate_function_is_used() -> None:
    def squared(items: list[Any]) -> Any:
        x, y = default_collate(items)
        return x.square(), y

    loader = DataLoader(TensorDataset(torch.arange(6.0), torch.arange(6)), collate_fn=squared)
    ((x, _),) = as_samples(loader, None).read([torch.tensor([[2, 1], [5, 0]])], seeds=[0, 1])
    assert x.tolist() == [[4.0, 1.0], [25.0, 0.0]]


# --- Test sets, weights and devices


@pytest.mark.parametrize("source", SOURCES)
def test_a_test_set_may_come_from_anywhere(source: str, tmp_path: Path, mlp_problem: Any) -> None:
    problem = mlp_problem(CrossEntropy())
    theta = problem.initial((0, 1))
    expected = evaluate(problem, theta, (problem.x, problem.y))
    x, y = SOURCES[source](problem.x, raw_targets(problem), tmp_path)
    for task in (problem, streamed(problem, source, tmp_path)):
        found = evaluate(task, theta, (x, y))
        if isinstance(x, Dataset | DataLoader):
            same(found, evaluate(task, theta, x))
        assert found.keys() == expected.keys() and all(map(torch.equal, found.values(), expected.values()))


def test_a_stream_s_scores_are_those_of_tensors(tmp_path: Path) -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    network = split(nn.Sequential(nn.Linear(4, 2)), after=[])
    for loss, y in ((SquaredError(), x[:, :2].sin() + 100.0), (BinaryCrossEntropy(), (x[:, :2] > 0).float())):
        problem = Problem(x, y, network, loss, lambda module: None)
        theta = problem.initial([0])
        found, expected = (
            evaluate(task, theta, None)
            for task in (replace(problem, x=on_disk(x, tmp_path), y=on_disk(y, tmp_path, "y")), problem)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items() if name != "train_r2")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def test_a_test_set_of_other_inputs_is_refused(mlp_problem: Any) -> None:
    problem = mlp_problem(CrossEntropy())
    others = TensorDataset(torch.zeros(2, 1, 6).long(), torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"test: x: samples \[1, 6\] of torch.int64, where training has \[6\] of torch.f"
    ):
        evaluate(problem, problem.initial([0]), others)
    with pytest.raises(ValueError, match="test: x: inputs of the form a tuple of 1, where training has a tensor"):
        evaluate(problem, problem.initial([0]), ((problem.x,), problem.y))
    for neither in (problem.x, [(x, 0) for x in problem.x], {"x": problem.x}):
        with pytest.raises(ValueError, match=r"test.*: a .* is no pair of inputs and targets, nor a data set"):
            evaluate(problem, problem.initial([0]), neither)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, *, u: Any, v: Tensor) -> Tensor:
        out: Tensor = self.fc(v - u["first"] + 2 * u["second"])
        return out


def test_the_order_of_keys_is_that_of_training() -> None:
    a, b, v = torch.randn(3, 8, 3).unbind()
    x, other = {"v": v, "u": {"first": a, "second": b}}, {"u": {"second": b, "first": a}, "v": v}
    y = torch.arange(8) % 2
    problem = Problem(x, y, split(Named(), after=[]), CrossEntropy(), initialiser("pytorch"))
    theta = problem.initial([0])
    assert evaluate(problem, theta, (other, y)) == evaluate(problem, theta, (x, y))
    with pytest.raises(ValueError, match=r"x: inputs of the form \['u'\], where training has \['v', 'u'\]"):
        problem.samples({"u": other["u"]}, y)


def test_weights_are_gathered_with_their_samples(mlp_problem: Any, tmp_path: Path) -> None:
    if not hasattr(admm.losses, "SampleWeighted"):
        pytest.skip("there is no admm.losses.SampleWeighted yet")
    problem = mlp_problem(SquaredError())
    weights = torch.linspace(0.0, 2.0, 24, dtype=torch.float64)
    scaled = replace(
        problem, y=(problem.y, weights.sqrt()), loss=lambda z, y: (y[1].unsqueeze(1) * (z - y[0])).square() / 2
    )
    x, y = problem.x, raw_targets(problem)
    for given in ((x, y), (on_disk(x, tmp_path), y), (Pairs(x, y), None)):
        weighted = Problem(*given, problem.blocks, SquaredError(), problem.initialise, weights=weights)
        for task in (weighted, replace(weighted, augmentation=None)):  # made again of its own fields
            for name in ("adam", "online, decay"):
                found, expected = (trained(CASES[name].optimizer, p, SEEDS, 2).theta for p in (task, scaled))
                torch.testing.assert_close(found.flat(), expected.flat(), rtol=1e-10, atol=1e-10)
            test = evaluate(task, found, (x, y))  # each counts once
            torch.testing.assert_close(test["test_loss"], evaluate(problem, found, None)["train_loss"])


def test_weights_that_are_none_are_refused() -> None:
    for weights, message in (
        ([1.0, 2.0], r"\[2\], expected one number for each sample, \[3\]"),
        ([[1.0], [1.0], [1.0]], r"\[3, 1\], expected one number"),
        ([1.0, -2.5, 0.0], "are -2.5 to 1, expected finite numbers from 0 up, some of them above 0"),
        ([1.0, torch.nan, 0.0], "are nan to nan, expected finite"),
        ([0.0, 0.0, 0.0], "are 0 to 0, expected finite numbers from 0 up, some of them above 0"),
    ):
        for given in ((torch.zeros(3, 1), torch.zeros(3)), (TensorDataset(torch.zeros(3, 1), torch.zeros(3)), None)):
            with pytest.raises(ValueError, match=f"^weights: {message}"):
                as_samples(*given, weights=weights)


@pytest.mark.parametrize("source", ["arrays on the disk", "a data set", "tensors"])
@pytest.mark.parametrize("name", ["adam", "block-admm, mini-batches"])
def test_samples_are_moved_to_the_device_as_they_are_read(
    name: str, source: str, tmp_path: Path, mlp_problem: Any
) -> None:
    case = CASES[name]
    problem = mlp_problem(case.loss)
    x, y = (problem.x, problem.y) if source == "tensors" else SOURCES[source](problem.x, raw_targets(problem), tmp_path)
    expected = results(problem, case.optimizer)
    with simulated_gpu() as gpu:
        task = replace(problem, x=x, y=y, stream_to=gpu)
        assert task.device == gpu and isinstance(task.x, type(x))
        found = results(task, case.optimizer)
        assert {tensor.device for tensor in found} == {gpu}
        torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=1e-10, atol=1e-10)
