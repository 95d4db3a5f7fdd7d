"""What runs on a GPU has the numbers of a run on the processor, and its tensors stay there; on a simulated one."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from launches import multirun, places
from simulated_gpu import GPU, NAME, simulated_gpu
from test_deepfacto import BASE, problem
from test_protocol import CASES, problem_of, trained
from torch import Tensor
from torch.utils._pytree import tree_leaves

from admm.checkpoints import restore, save
from admm.optimizers import Problem
from admm.training import evaluate
from experiments.store import Store

SEEDS = (3, 1)


def measured(options: Any, task: Problem) -> list[Tensor]:
    """The state after two iterations, with a checkpoint between them, and what is measured of it."""
    checkpoint = BytesIO()
    torch.save(save(trained(options, task, SEEDS, 1)), checkpoint)
    checkpoint.seek(0)
    state = options.init(task, SEEDS)
    restore(state, torch.load(checkpoint, map_location="cpu"))
    options.step(task, state)
    values = options.diagnostics(task, state)
    if task.y.dim() == 2:
        values |= evaluate(task, state.theta, (task.x, task.y.argmax(1)))
    return [leaf for leaf in tree_leaves((save(state), values)) if isinstance(leaf, Tensor)]


def same(options: Any, task: Problem, close: float) -> None:
    expected = measured(options, task)
    with simulated_gpu() as gpu:
        found = measured(options, replace(task, x=task.x.to(gpu), y=task.y.to(gpu)))
        assert {tensor.device for tensor in found} == {gpu}
        torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=close, atol=close)


LARGEST = "block-admm, resnet"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if case == LARGEST else []) for case in CASES]
)
def test_an_optimizer_computes_where_the_samples_are(case: str, request: pytest.FixtureRequest) -> None:
    of = CASES[case]
    same(of.optimizer, problem_of(of, request), of.close)


def test_deepfacto_computes_where_the_samples_are() -> None:
    same(BASE, problem(), 1e-10)


@pytest.mark.parametrize("launcher", ["basic", "stacked"])
def test_the_suite_s_runs_on_a_gpu_have_the_numbers_of_the_processor(tmp_path: Path, launcher: str) -> None:
    grid = [
        "experiment=digits_shallow",
        "optimizer=block_admm",
        "optimizer.z_step=0.5,1",
        "seeds=[0,1]",
        "dataset.first=100",
        "iterations=2",
        "checkpoint_seconds=0",
        "~hydra.callbacks.report",
    ]

    def launch(device: str, folder: Path) -> dict[str, pd.DataFrame]:
        with redirect_stdout(StringIO()):
            multirun(*grid, *places(folder), f"device={device}", f"hydra/launcher={launcher}")
        runs = Store(folder / "outputs").runs("digits_shallow")
        assert all((run.info["machine"] == NAME) == (device != "cpu") for run in runs)
        return {run.name: run.history.drop(columns="seconds") for run in runs}

    own = launch("cpu", tmp_path / "cpu")
    with simulated_gpu():
        found = launch("cuda:0", tmp_path / "cuda")
    assert len(own) == 2 and own.keys() == found.keys()
    for name, history in own.items():
        pd.testing.assert_frame_equal(history, found[name])


def test_the_simulated_gpu_refuses_tensors_of_both_places() -> None:
    with simulated_gpu() as gpu:
        there, here = torch.ones(3, device=gpu), torch.arange(3)
        assert there.device == gpu == GPU and (there * 2.0).sum().item() == 6.0
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            here.add_(there)
        assert torch.equal(there.copy_(here).cpu(), torch.arange(3.0))
