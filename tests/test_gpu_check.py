"""make gpu-check, on the processor and on small sizes: what it compares, measures, writes and leaves out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from simulated_gpu import simulated_gpu

from admm.data import load
from admm.optimizers import running
from experiments.reports.text import markdown
from scripts.benchmarks import gpu_check
from scripts.benchmarks.bench import COLUMNS, IMAGES, generated_images
from scripts.benchmarks.gpu_check import DONE, TIME_IS_UP, TINY, Part, Sizes, Task
from scripts.benchmarks.performance_page import GPU_TABLES, gpu_tables

CPU = torch.device("cpu")
TASK = Task(CPU, replace(TINY, stacks=(5,)))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two optimizers for each purpose, traced and not compiled; and a folder without data."""
    monkeypatch.setattr(gpu_check, "methods", lambda experiment: ["sgd"])
    monkeypatch.setattr(gpu_check, "STACKED", {"sgd": "sgd"})
    monkeypatch.setattr(gpu_check, "RESNET", {"online": "online_block_admm"})
    monkeypatch.setattr(running, "inductor", lambda graph, tensors: graph)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("ADMM_DATA", str(tmp_path))
    gpu_check.cifar10.cache_clear()


def names_of_the_page() -> set[str]:
    columns = [(pattern, labels) for _, labels, columns in GPU_TABLES.values() for pattern in columns.values()]
    return {pattern.format(label) for pattern, labels in columns for label in labels}


def test_all_parts_are_measured_and_written(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "bench_gpu.csv"
    assert gpu_check.check(TASK, path, 1e5) == []
    rows = pd.read_csv(path)
    assert [*rows] == COLUMNS and rows["name"].is_unique
    values = dict(zip(rows["name"], rows["value"], strict=True))
    compared = {f"difference_{name}" for name in ("sgd", "sgd_resnet", "deepfacto", "sgd_compiled")}
    raced = {"eager_sgd5_seconds", "compiled_sgd5_seconds", "compiled_sgd5_compile_seconds", "compiled_sgd5_over_eager"}
    resnet = {f"resnet_online_{quantity}" for quantity in ("seconds", "images", "flops", "share_of_peak", "peak")}
    assert values.keys() == compared | raced | resnet and values.keys() <= names_of_the_page()
    assert all(value > 0.0 for name, value in values.items() if name not in compared)
    assert values["resnet_online_images"] * values["resnet_online_seconds"] == pytest.approx(2 * IMAGES, rel=1e-3)
    told = capsys.readouterr().out
    assert "processes: left out, as they need two GPUs" in told
    assert f"CIFAR-10 is not in {tmp_path}: the images are generated" in told


def test_the_page_has_a_place_for_all_that_is_compared_and_measured() -> None:
    task = Task(CPU, Sizes())
    names = names_of_the_page()
    assert {f"difference_{name}" for name in gpu_check.comparisons(task)} <= names
    assert {f"compiled_{name}_seconds" for name in gpu_check.speeds(task)} <= names
    assert {f"resnet_{name}_seconds" for name in gpu_check.resnets(task)} <= names
    assert {f"difference_parallel_{kind}" for kind in gpu_check.SHARED_OUT} <= names


def test_mini_batches_are_whole() -> None:
    for method in gpu_check.STACKED.values():
        batch_size = gpu_check.config_of(method).optimizer.batch_size
        assert Sizes().samples % batch_size == TINY.samples % batch_size == 0
    assert Sizes().images % (IMAGES * Sizes().parts) == TINY.images % (IMAGES * TINY.parts) == 0


def test_a_device_with_other_numbers_fails_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load("digits", "", first=100, dtype=torch.float64)
    right, other = (
        gpu_check.of_row("digits_shallow", "sgd", digits, f"optimizer.step_size={size}") for size in (0.1, 0.1 + 1e-6)
    )
    units = {
        "wrong": partial(gpu_check.compared, "wrong", right, other, CPU),
        "right": partial(gpu_check.compared, "right", right, right, CPU),
        "broken": lambda seconds: iter([1 // 0]),
    }
    monkeypatch.setattr(gpu_check, "PARTS", {"correctness": Part(1.0, lambda task: units, is_comparison=True)})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--tiny", str(tmp_path / "bench.csv")])
    with pytest.raises(SystemExit) as exit:
        gpu_check.main()
    assert exit.value.code == 1
    rows = pd.read_csv(tmp_path / "bench.csv").set_index("name")["value"]
    assert 1e-9 < rows["difference_wrong"] < 1e-4 and rows["difference_right"] == 0.0
    told = capsys.readouterr().out
    assert "correctness wrong: FAILED, Differs: the largest difference is" in told
    assert "correctness broken: FAILED, ZeroDivisionError" in told
    assert "failed: correctness wrong, correctness broken" in told


def test_a_comparison_computes_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ITERATIONS", 1)
    case = gpu_check.of_row("digits_shallow", "adam", load("digits", "", first=100, dtype=torch.float64))
    with simulated_gpu() as gpu:
        ((_, difference, _),) = gpu_check.compared("adam", case, case, gpu, 1.0)
        assert case(gpu)[0].x.device == gpu_check.deepfacto(gpu)[0].x.device == gpu
    assert difference < 1e-12


def test_differences_are_relative_to_large_numbers_and_a_nan_is_none_of_the_small_ones() -> None:
    expected = [torch.tensor([1000.0, 0.5]).double(), torch.tensor([]), torch.tensor(2.0)]
    found = [torch.tensor([1001.0, 0.502]).double(), torch.tensor([]), torch.tensor(2.0)]
    assert gpu_check.largest_difference(expected, found) == pytest.approx(2e-3, rel=1e-4)
    with pytest.raises(gpu_check.Differs):
        [*gpu_check.judged("nan", gpu_check.largest_difference(expected, [*found[:2], torch.tensor(torch.nan)]))]


def slow(_: float) -> Iterator[tuple[str, float, str]]:
    yield "before", 1.0, "s"
    time.sleep(60.0)


def test_what_takes_too_long_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []
    quick = {"quick": lambda seconds: iter([asked.append(seconds) or ("quick", 2.0, "s")])}  # type: ignore[func-returns-value]
    parts = {
        "compared": Part(1.0, lambda task: {"slow": slow, "never": slow}, is_comparison=True),
        "speed": Part(1.0, lambda task: {"slow": slow}),
        "last": Part(2.0, lambda task: quick),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    start = time.monotonic()
    assert gpu_check.check(TASK, tmp_path / "bench.csv", 2.0) == ["compared slow", "compared never"]
    assert 1.0 <= time.monotonic() - start < 30.0
    assert 0.0 < asked[0] <= 1.0
    assert [*pd.read_csv(tmp_path / "bench.csv")["name"]] == ["before", "quick"]
    told = capsys.readouterr().out
    assert f"compared never: {TIME_IS_UP}" in told and f"last quick: {DONE}" in told


def test_what_does_not_fit_into_the_memory_is_left_out() -> None:
    def unit() -> Iterator[tuple[str, float, str]]:
        yield "before", 1.0, "s"
        raise torch.OutOfMemoryError

    assert gpu_check.measured(unit, 9.0) == ([("before", 1.0, "s")], "left out, it does not fit into the memory")


def test_a_visit_that_cannot_be_compiled_is_not_measured_without(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, tensors: object) -> None:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(running, "inductor", broken)
    rows, outcome = gpu_check.measured(lambda: gpu_check.race("sgd", 1, TASK, 1.0), 60.0)
    assert not rows and outcome.startswith("FAILED, UserWarning: compile: ") and "no Triton" in outcome


def test_accuracy_is_that_after_the_epochs_that_fit(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    images = replace(generated_images(2 * IMAGES), name="cifar10")
    monkeypatch.setattr(
        gpu_check, "cifar10", lambda task: replace(images, x_test=images.x_train, y_test=images.y_train)
    )
    monkeypatch.setattr(gpu_check, "epoch_of", lambda problem, config, task: (1000.0, None))
    rows = {name: value for name, value, _ in gpu_check.resnet("online", TASK, 3900.0)}
    assert rows["resnet_online_epochs"] == 2 and 0.0 <= rows["resnet_online_accuracy"] <= 100.0


def test_the_rows_of_other_cards_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "bench_gpu.csv"
    for card, value in (("A", 1.0), ("B", 2.0), ("A", 3.0)):
        monkeypatch.setattr(gpu_check, "machine", lambda device, card=card: card)
        gpu_check.keep([("resnet_sgd_seconds", value, "s/epoch")], path, TASK)
    table = gpu_tables(path)["gpu_resnet"].set_index(["card", "ResNet-18"])["seconds of an epoch"]
    assert table["A", "SGD"] == "3" and table["B", "SGD"] == "2" and table["A", "Adam"] == ""
    assert "| A |" in markdown(gpu_tables(path)["gpu_resnet"])


def test_without_measurements_the_page_says_so(tmp_path: Path) -> None:
    tables = gpu_tables(tmp_path / "none.csv")
    assert tables.keys() == GPU_TABLES.keys() and all(
        table.to_numpy() == [["not measured yet"]] for table in tables.values()
    )


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cuda:99"])
    with pytest.raises(SystemExit, match="error: no GPU is found here"):
        gpu_check.main()


@pytest.mark.long
@pytest.mark.parametrize("kind", gpu_check.SHARED_OUT)
def test_two_processes_have_the_history_of_one(kind: str) -> None:
    (row,) = gpu_check.shared_out(kind, CPU, 60.0)
    assert row[0] == f"difference_parallel_{kind}" and row[1] <= gpu_check.TOLERANCE
