"""Variables of all samples on the device, in the host's memory or on the disk: same numbers, never too many bytes."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import Tensor

from admm import placement
from admm.optimizers import SGD, AdaptivePenalty, BlockADMM, ZUpdate
from admm.placement import PLACES, allocate

SEEDS = (3, 1)
BASE = BlockADMM(
    3,
    0.01,
    0.1,
    batch_size=5,
    primal_rounds=3,
    theta_update=SGD(),
    z_update=ZUpdate("adam", output_update="step"),
    dual_step=1.0,
    dual_init=1e-4,
    forward_mixing=0.0,
    slice_size=4,
)


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_every_place_gives_the_same_numbers(resnet_problem, place, sweep):
    problem = resnet_problem()
    options = [replace(BASE, sweep=sweep, sample_storage=name) for name in ("device", place)]
    states = [one.init(problem, SEEDS) for one in options]
    for _ in range(2):
        for one, state in zip(options, states, strict=True):
            one.step(problem, state)
    assert torch.equal(states[0].theta.flat(), states[1].theta.flat())
    kept = [[*state.z, *state.u, *state.z_state.tensors()] for state in states]
    assert len(kept[0]) == 8 and all(map(torch.equal, *kept))
    diagnostics = [one.diagnostics(problem, state) for one, state in zip(options, states, strict=True)]
    assert all(torch.equal(value, diagnostics[1][name]) for name, value in diagnostics[0].items())


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
def test_visits_that_are_copies_give_the_same_numbers(resnet_problem, monkeypatch, sweep):
    """As they are on a GPU where the variables are elsewhere."""
    problem, options = resnet_problem(), replace(BASE, sweep=sweep)
    plain, copied = (options.init(problem, SEEDS) for _ in range(2))
    for _ in range(2):
        options.step(problem, plain)
    move = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda *to, **how: move(*to, **how).clone())
    for _ in range(2):
        options.step(problem, copied)
    assert torch.equal(plain.theta.flat(), copied.theta.flat())
    kept = [[*state.z, *state.u, *state.z_state.tensors()] for state in (plain, copied)]
    assert all(map(torch.equal, *kept))


@pytest.fixture
def gpu():
    with simulated_gpu() as device:
        yield device


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_visits_are_on_the_gpu_wherever_the_variables_are(mlp_problem, gpu, place, sweep):
    plain = mlp_problem()
    problem = replace(plain, x=plain.x.to(gpu), y=plain.y.to(gpu))
    options = replace(BASE, sweep=sweep, sample_storage=place, forward_mixing=0.5, penalty=AdaptivePenalty())
    state = options.step(problem, options.init(problem, SEEDS))
    assert {v.device for v in (*state.z, *state.u)} == {gpu if place == "device" else torch.device("cpu")}
    assert {v.device for v in (state.theta.flat(), state.beta)} == {gpu}
    values = options.diagnostics(problem, state)
    assert values["kkt"].device == values["residual_1"].device == gpu


def test_the_host_s_memory_is_page_locked_for_a_gpu_and_counted_as_it_is_rounded_up(gpu, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "zeros", lambda shape, **options: made.append(options))
    for like in (torch.empty(0, device=gpu), torch.empty(0)):
        allocate("host", [(100,)], [like])
    assert [(options["device"], options["pin_memory"]) for options in made] == [("cpu", True), ("cpu", False)]
    monkeypatch.setattr(placement, "free_bytes", lambda name, device: 511)
    with pytest.raises(ValueError, match=r"\(512 bytes\)"):
        allocate("host", [(100,)], [torch.empty(0, device=gpu)])


@pytest.mark.parametrize("place", PLACES)
def test_they_are_zeros_that_can_be_written(place):
    first, second = allocate(place, [(2, 3), (2, 5, 1, 2)], [torch.zeros(0, dtype=torch.float64)] * 2)
    assert first.shape == (2, 3) and second.shape == (2, 5, 1, 2) and first.dtype == torch.float64
    assert not first.any() and not second.any()
    second[1] = 4.0
    assert second.sum() == 40.0 and not first.any()


def test_files_have_no_name_that_could_stay_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (kept,) = allocate("disk", [(1000,)], [torch.zeros(0)])
    assert kept.numel() == 1000 and not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("place", PLACES)
def test_what_does_not_fit_is_refused_with_the_bytes_it_needs(resnet_problem, monkeypatch, place):
    monkeypatch.setattr(placement, "free_bytes", lambda name, device: 10_000 if name == place else 5_000)
    problem = resnet_problem()
    # Z_1 [4, 4, 4] and Z_2 [3], each with a dual and two moments, 12 samples and 2 replicas in float64
    needed = 4 * 12 * 2 * 8 * (4 * 4 * 4 + 3)
    with pytest.raises(ValueError, match=rf"^sample_storage: '{place}' has no room .* \({needed} bytes\)"):
        replace(BASE, sample_storage=place).init(problem, SEEDS)


def test_an_unknown_place_is_refused_by_name(mlp_problem):
    with pytest.raises(ValueError, match=r"sample_storage: 'cloud' is not one of device, host, disk"):
        replace(BASE, sample_storage="cloud").init(mlp_problem(), SEEDS)
