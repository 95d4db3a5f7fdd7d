"""One run on several processes: the iterates of one, checkpoints for any number of them, and what is refused."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from admm.blocks import split
from admm.comparison import forward_costs
from admm.losses import CrossEntropy
from admm.models import initialiser, mlp
from admm.optimizers import Problem
from admm.parallel import ALONE, Parallel, balanced
from scripts.benchmarks.parallel_model import Network
from tests.parallel_cases import BY_BLOCKS, CLOSED, INTERRUPTED, SPLIT_AT, N, cases, file_of, trained

CASES = list(cases())


def launched(processes: int, folder: Path, checkpoints: Path) -> dict[Any, Any]:
    """Return what the cases give on some processes; their checkpoints of the first iterations are in the folder."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "tests.parallel_cases", str(folder), str(checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[Any, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found | {"folder": folder}


PROCESSES = [2, pytest.param(3, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    """The cases on one process."""
    return {case: trained(case, ALONE) for case in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[Any, Any]]:
    """The cases on so many processes; 2 go on from checkpoints of 1, and 3 from those of 2."""
    folder = tmp_path_factory.mktemp("parallel")

    @cache
    def of(processes: int) -> dict[Any, Any]:
        if processes > 1:
            of(processes - 1)
            return launched(processes, folder / str(processes), folder / str(processes - 1))
        for case in INTERRUPTED:
            trained(case, ALONE, SPLIT_AT, folder / "1" / file_of(case))
        return {}

    return of


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that Θ, its average and all rows agree to 1e-10."""
    for name in ("theta", "average"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)
    assert [row.keys() for row in found["rows"]] == [row.keys() for row in expected["rows"]]
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-9, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("processes", PROCESSES)
def test_several_processes_have_the_iterates_of_one(processes: int, alone: dict[Any, Any], found: Any) -> None:
    for case in CASES:
        assert_close(found(processes)[case], alone[case])
        assert found(processes)[case]["same"], case


@pytest.mark.parametrize("processes", PROCESSES)
def test_training_goes_on_with_another_number_of_processes(processes: int, alone: dict[Any, Any], found: Any) -> None:
    for case in INTERRUPTED:
        assert_close(found(processes)["resumed", case], alone[case])
        path = found(processes)["folder"] / file_of(case)
        assert_close(trained(case, ALONE, checkpoint=path), alone[case])


@pytest.mark.parametrize("processes", PROCESSES)
def test_each_process_holds_its_share(processes: int, found: Any) -> None:
    parts = found(processes)["samples", "bcd"]["parts"]
    assert [parts[0].start, *(part.stop for part in parts)] == [N * r // processes for r in range(processes + 1)]
    for name in BY_BLOCKS:
        cuts = found(processes)["blocks", name]["parts"]
        assert all(cut == cuts[0] for cut in cuts)
        assert len(cuts[0]) == processes


def test_processes_leave_the_group_before_they_end(found: Any) -> None:
    assert [(found(2)["folder"] / rank).read_text() for rank in "01"] == ["False", "False"]


def test_blocks_are_shared_out_by_their_operations(found: Any) -> None:
    # The costs are 3 · 2 · 6 · 9, 4 · 2 · 9 · 4 and 4 · 2 · (4 · 8 + 8 · 3), and 1000 for each of 9, 4 and 3 entries.
    assert found(2)["blocks", "mixed"]["parts"][0] == [range(1, 2), range(2, 4)]
    deep = mlp(784, hidden=[128] * 9, classes=10)
    by_blocks = Parallel("blocks", 0, 2)
    x, y = torch.rand(4, 784), torch.tensor([0, 1, 2, 3])
    problem = Problem(x, y, split(deep, per_layer=True), CrossEntropy(), initialiser("pytorch"), parallel=by_blocks)
    assert problem.cut == [range(1, 5), range(5, 11)]  # 3 and 7 blocks, by products alone, take longer


def test_the_bytes_are_those_of_the_model(found: Any) -> None:
    network = Network([6, 7, 5, 3], samples=N, rounds=2, size=8)
    batches = {"gotmare": math.ceil(N / 4)}
    for name in ("standard", "taylor", "bcd", "gotmare"):
        method = "standard_admm" if name == "standard" else name
        assert found(2)["told", name] == (network.added(method, batches.get(name, 0)), 0)
    for name, optimizer in BY_BLOCKS.items():
        _, sent = found(2)["told", name]
        rounds = optimizer.primal_rounds * optimizer.z_update.steps
        products = replace(network, rounds=rounds)
        theta = network.size * sum(network.parameters) * (rounds - 2)  # Θ is given once in each primal update
        assert sent == products.sent([range(1), range(1, 3)], mixes=name in ("mixed", "defaults")) - theta


def test_the_model_s_operations_are_those_that_pytorch_counts() -> None:
    widths = [6, 7, 5, 3]
    blocks = split(mlp(6, hidden=widths[1:-1], classes=3), per_layer=True)
    counted = [flops for flops, _ in forward_costs(blocks, torch.rand(4, 6))]
    once = Network(widths, samples=1)
    assert [flops / (5 if t > 1 else 4) for t, flops in enumerate(once.flops, start=1)] == counted


def test_operations_are_counted_where_pytorch_takes_a_faster_way() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.lstm(x)[0]
            return output

    last = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    blocks = split([Recurrent(), nn.TransformerEncoderLayer(6, 2, 16, batch_first=True), last])
    # Per step an LSTM has 4 gates of 5 + 6 inputs to 6; an encoder 4 projections, 2 products of attention, 2 layers.
    expected = [3 * 2 * 4 * 6 * (5 + 6), 2 * 3 * (4 * 6 * 6 + 2 * 6 * 16) + 2 * 2 * 3 * 3 * 6, 2 * 18 * 3]
    assert [flops for flops, _ in forward_costs(blocks, torch.randn(4, 3, 5))] == expected


def test_what_differs_and_what_cannot_be_shared_out_is_refused_on_all_processes(
    found: Any,
) -> None:
    first, other = found(2)["refused"]
    assert first == other
    expected = {
        "optimizer": "process 1 has another optimizer.step_size than process 0, 0.2, not 0.1",
        "data": "process 1 has another x than process 0",
        "seeds": "with parallel='samples' a mini-batch method trains one seed at a time",
        **dict.fromkeys(
            ("batch normalisation", "dropout", "running statistics", "shared"), "does not depend on the others"
        ),
        "fewer samples": "2 processes, but there are 1 samples to share out",
        "mixup": "augmentation: Chain may mix samples",
        "kind": "Backprop has no 'blocks'; it runs with parallel='samples'",
        "sweep": "parallel='blocks' needs 'batch'",
        "rule": "theta_update: Grouped moves a block by the gradients of others too",
        "too many": "9 processes, but there are 3 blocks to share out",
    }
    assert first.keys() == expected.keys()
    for name, words in expected.items():
        assert words in first[name], name


def test_what_fails_in_one_process_ends_training_in_all(found: Any) -> None:
    first, other = found(2)["failed"]
    assert first[0] == "ProcessError: process 1: RuntimeError: the callback has failed"
    assert other[0] == "RuntimeError: the callback has failed"
    assert first[1].startswith("WriteError: ")
    assert other[1] == f"ProcessError: process 0: {first[1]}"


def test_a_process_that_torchrun_has_not_started_is_told_so() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=2"):
        Parallel.join("samples")
    with pytest.raises(ValueError, match="kind: 'rows'"):
        Parallel.join("rows")  # type: ignore[arg-type]


def test_closed_forms_take_several_seeds(found: Any) -> None:
    for name in CLOSED:
        assert {row["seed"] for row in found(2)["samples", name]["rows"]} == {3, 4}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_the_largest_part_of_a_balanced_cut_is_as_small_as_possible(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def best(start: int, left: int) -> int:
        if left == 1:
            return sum(costs[start:])
        stops = range(start + 1, len(costs) - left + 2)
        return min(max(sum(costs[start:stop]), best(stop, left - 1)) for stop in stops)

    cut = balanced(costs, parts)
    assert [part.start for part in cut] == [0, *(part.stop for part in cut[:-1])]
    assert cut[-1].stop == len(costs)
    assert all(map(len, cut))
    assert max(sum(costs[i] for i in part) for part in cut) == best(0, parts)
