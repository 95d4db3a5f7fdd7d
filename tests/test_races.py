"""The races of the speed benchmark: their processes, what their contestants compute, and what a row says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from admm.schedules import schedule
from experiments.reports.writing import with_tables
from scripts.benchmarks.bench import config_of
from scripts.benchmarks.bench_speed import rows
from scripts.benchmarks.contestants import floor, ours, plain_jax, plain_torch, profiled
from scripts.benchmarks.performance_page import (
    AIMS,
    PAGES,
    TABLES,
    all_tables,
    table,
)
from scripts.benchmarks.races import ROOT, Contestant, Lane, Options, race, started

SMALL = Options(turns=3, threads=1, samples=1000)
COUNTING = """
def prepare(spec):
    print("what a library prints is no answer")
    count = [0]
    def chunk():
        count[0] += 1
        with open(spec["model"]["log"], "a") as log:
            print(spec["method"], count[0], file=log)
    return chunk, {"samples": spec["samples"]}
"""


@pytest.fixture(autouse=True)
def denormals_as_before() -> Iterator[None]:
    """What a contestant flushes in this process is not flushed in later tests."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contestant:
    """A contestant that writes what it does to a file, `log`."""
    (tmp_path / "counting.py").write_text(COUNTING)
    whole = Contestant.spec

    def spec(self: Contestant, options: Options) -> dict[str, Any]:
        return whole(self, options) | {"model": {"log": str(tmp_path / "log")}}

    monkeypatch.setattr(Contestant, "spec", spec)
    return Contestant("sgd", kind=str(tmp_path / "counting"))


def test_contestants_warm_up_one_by_one_and_then_take_turns(counting: Contestant, tmp_path: Path) -> None:
    lanes = race({"a": counting, "b": replace(counting, method="adam")}, SMALL)
    done = (tmp_path / "log").read_text().splitlines()
    warm_up = [f"{method} {count}" for method in ("sgd", "adam") for count in (1, 2, 3, 4)]
    assert done == warm_up + [f"{method} {count}" for count in (5, 6, 7) for method in ("sgd", "adam")]
    for lane in lanes.values():
        assert len(lane.told["warm_up"]) == counting.parts and len(lane.chunks) == SMALL.turns
        assert lane.told["samples"] == SMALL.samples and lane.again is None


def test_what_has_been_compiled_is_loaded_once_more(counting: Contestant, tmp_path: Path) -> None:
    lane = race({"a": replace(counting, compile=True)}, replace(SMALL, turns=1))["a"]
    assert lane.again and len(lane.again["warm_up"]) == counting.parts
    assert (tmp_path / "log").read_text().split()[1::2] == ["1", "2", "3", "4", "5", "1", "2", "3", "4"]


def test_a_process_that_fails_is_an_error(counting: Contestant, capfd: pytest.CaptureFixture[str]) -> None:
    (Path(counting.kind).with_suffix(".py")).write_text("def prepare(spec): raise ValueError('no such method')")
    with pytest.raises(RuntimeError, match="exit 1"):
        race({"a": counting}, SMALL)
    assert "no such method" in capfd.readouterr().err


def test_a_contestant_trains_the_code_of_its_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "admm", tmp_path / "old/admm")
    old = Contestant("sgd", checkout=tmp_path / "old")
    with started(old, SMALL, str(tmp_path)) as (chunk, told):
        assert Path(told["checkout"]) == tmp_path / "old/admm" and chunk() > 0.0


def test_code_of_another_checkout_is_refused(counting: Contestant) -> None:
    text = COUNTING.replace('"samples": spec["samples"]', '"checkout": "/elsewhere/admm"')
    Path(counting.kind).with_suffix(".py").write_text(text)
    with pytest.raises(RuntimeError, match="admm was imported from /elsewhere/admm"):
        race({"a": counting}, SMALL)


@pytest.mark.parametrize("method", ["online_block_admm", "block_admm", "sgd", "adam"])
def test_a_contestant_is_the_optimizer_of_the_experiment(method: str) -> None:
    contestant = Contestant(method, 5)
    optimizer, problem, state = ours.build(contestant.spec(SMALL))
    expected = instantiate(config_of(method).optimizer, _convert_="all")
    assert optimizer == replace(expected, iterations=optimizer.iterations, epoch_parts=contestant.parts)
    assert problem.loss == instantiate(config_of(method).loss) and len(problem.blocks) == 3
    assert state.seeds == (0, 1, 2, 3, 4) and problem.n_samples == SMALL.samples


class Old:
    def __init__(self, update: int, step_size: float) -> None:
        self.update, self.step_size = update, step_size


def test_a_key_goes_by_the_name_that_an_older_class_knows() -> None:
    node = {"_target_": f"{__name__}.Old", "theta_update": 3, "step_size": 0.5}
    made = ours.make(node, {"Old.theta_update": ["update"]})
    assert (made.update, made.step_size) == (3, 0.5)
    with pytest.raises(TypeError, match="momentum"):
        ours.make(node | {"momentum": 1}, {"Old.theta_update": ["update"]})


def test_the_floor_is_the_products_and_updates_of_an_epochs_part() -> None:
    spec = Contestant("adam").spec(SMALL)
    chunk, told = floor.prepare(spec)
    weights = [784 * 128, 128 * 128, 128 * 10]
    assert told["flops"] == 2 * 64 * (2 * sum(weights) + sum(weights[1:]))  # forward; gradients of W, and of the input
    assert told["batches"] == 4  # of 16
    with floor.Recorder() as recorder:
        chunk()
    assert recorder.flops == told["batches"] * told["flops"]
    names = [call.func.overloadpacket.__name__ for call in recorder.calls]  # type: ignore[attr-defined]
    assert sum(name.startswith("_fused_adam") for name in names) == 4


def test_pytorchs_loop_sees_each_sample_once_an_epoch() -> None:
    parts = plain_torch.part_of_epochs(samples=1000, batch_size=64, parts=4)
    epoch = [batch for _ in range(4) for batch in next(parts)]
    assert [len(batch) for batch in epoch] == [64] * 15 + [40]
    assert torch.cat(epoch).sort().values.equal(torch.arange(1000))


def test_pytorchs_loop_learns() -> None:
    torch.manual_seed(0)
    x, network = torch.rand(500, 8), plain_torch.mlp([8, 16, 1])
    y = x.sum(1, keepdim=True)
    rule = torch.optim.SGD(network.parameters(), lr=0.1)
    plain_torch.train(network, rule, [(x, y)] * 300)
    assert (network(x) - y).square().mean() < 0.05 * y.var()


def test_jax_gets_each_sample_once_an_epoch_and_the_steps_of_the_schedule() -> None:
    spec = Contestant("sgd", 5).spec(SMALL)
    parts = plain_jax.part_of_epochs(spec)
    own = schedule("step_size", spec["optimizer"]["step_size"], 5)
    for epoch in range(2):
        batches = [batch for _ in range(4) for batch in next(parts)]
        indices = np.concatenate([indices.reshape(5, -1) for indices, _ in batches], axis=1)
        assert (np.sort(indices, axis=1) == np.arange(1000)).all()
        assert not (indices[0] == indices[1]).all()
        sizes = np.concatenate([sizes for _, sizes in batches])
        expected = [own((epoch + number / 16) / 100) for number in range(16)]
        np.testing.assert_allclose(sizes, expected, rtol=1e-6)
        assert [indices.shape[1:] for indices, _ in batches] == [(4, 64), (4, 64), (4, 64), (3, 64), (1, 40)]


def test_an_operation_belongs_to_a_part() -> None:
    operations = "aten::mm", "aten::bmm", "aten::_fused_adamw_", "aten::index_select", "aten::mul_", "ProfilerStep"
    expected = "products", "products", "updates", "gathering", "other_operations", "python"
    assert tuple(profiled.part_of(operation) for operation in operations) == expected


def test_the_parts_of_a_mini_batch_add_up_to_it() -> None:
    _, parts = profiled.profiled(Contestant("sgd").spec(replace(SMALL, samples=512)))
    assert all(seconds >= 0.0 for seconds in parts.values()) and parts["products"] > 0.0 and parts["updates"] > 0.0


def lane(chunk: float, **told: Any) -> Lane:
    return Lane(Contestant("sgd"), {"warm_up": [10.0, chunk, chunk, chunk], **told}, [chunk] * 3)


def test_a_row_says_how_many_times_as_fast_the_first_named_is() -> None:
    lanes = {"compiled": lane(0.5), "eager": lane(1.0), "before": lane(2.0), "torch": lane(1.5)}
    lanes |= {"floor": lane(0.4, flops=3e6, batches=2), "product": lane(0.1)}
    lanes["compiled"].again = {"warm_up": [3.5, 0.5, 0.5, 0.5]}
    values = {name: value for name, value, _ in rows("sgd1", lanes, replace(SMALL, against=ROOT))}
    assert values["compiled_sgd1_over_before"] == 4.0 and values["eager_sgd1_over_before"] == 2.0
    assert values["compiled_sgd1_over_torch"] == 3.0
    assert values["compiled_sgd1_over_floor"] == pytest.approx(1.25)
    assert values["compiled_sgd1_seconds"] == 2.0 and values["sgd1_flops"] == 3.0
    assert values["eager_sgd1_share_of_peak"] == pytest.approx(6e6 / 1.0 / (2 * 2048**3 / 0.1))
    assert values["compiled_sgd1_compile_seconds"] == pytest.approx(9.5)
    assert values["compiled_sgd1_compile_seconds_cached"] == pytest.approx(3.0)


def test_the_pages_tables_are_those_of_the_benchmark() -> None:
    own = all_tables()
    texts = [page.read_text() for page in PAGES]
    assert [with_tables(text, own) for text in texts] == texts
    assert set(re.findall(r"<!-- table: (\w+) -->", "".join(texts))) == own.keys()


def test_the_pages_tables_have_every_row_of_a_race() -> None:
    columns = [(pattern, labels) for _, labels, columns in TABLES.values() for pattern in columns.values()]
    names = {pattern.format(label) for pattern, labels in columns for label in labels}
    lanes = {label: lane(1.0) for label in ("compiled", "eager", "before", "torch", "jax")}
    lanes |= {"floor": lane(0.4, flops=3e6, batches=2), "product": lane(0.1)}
    lanes["compiled"].again = {"warm_up": [1.0] * 4}
    assert {name for name, _, _ in rows("sgd1", lanes, replace(SMALL, against=ROOT))} <= names


def test_each_aim_stands_beside_what_is_reached() -> None:
    reached = dict.fromkeys(AIMS, 1.25) | {"jax_sgd1_seconds": 0.5}
    shown = [cell for parts in TABLES.values() for cell in table(reached, *parts).to_numpy().ravel()]
    assert sorted(cell for cell in shown if "1.25" in cell) == sorted(f"1.25 ({aim:g})" for aim in AIMS.values())
    assert shown.count("0.5") == 1


def test_the_pages_example_profiles_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    exec(example, {})
    assert "aten::" in capsys.readouterr().out
