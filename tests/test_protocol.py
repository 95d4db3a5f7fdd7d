"""What every optimizer promises: independent replicas, exact resumption, and the same result each time."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from admm.blocks import flattened, split
from admm.checkpoints import restore, save
from admm.layers import Execution, Layer
from admm.losses import CrossEntropy, Loss, ProximalLoss, SquaredError
from admm.models import as_constructed, initialiser
from admm.optimizers import (
    BCD,
    DLADMM,
    SGD,
    Adam,
    AdaptivePenalty,
    Backprop,
    BlockADMM,
    Gotmare,
    OnlineBlockADMM,
    Optimizer,
    Problem,
    StandardADMM,
    Taylor,
    ZUpdate,
)
from admm.optimizers.protocol import spectral_norms
from admm.optimizers.rules import UpdateRule
from admm.parallel import Parallel

SEEDS = (5, 0, 11)
ADAM = {"theta_update": Adam(weight_decay=0.1), "theta_step": {"start": 0.02, "end": 0.001}, "batch_size": 7}
BATCH: dict[str, Any] = {
    **ADAM,
    "beta": 1.0,
    "sweep": "batch",
    "primal_rounds": 3,
    "dual_step": 1.0,
    "dual_init": 1e-4,
    "forward_mixing": 0.0,
}
MINIBATCH: dict[str, Any] = {
    **ADAM,
    "beta": 1.0,
    "sweep": "minibatch",
    "primal_rounds": 2,
    "dual_step": 0.3,
    "dual_init": 1e-4,
    "forward_mixing": 0.6,
}
PROX = ZUpdate("adam", output_update="prox")
PENALTY = AdaptivePenalty(c=0.8, bound=0.5)


@dataclass(frozen=True)
class Case:
    optimizer: Any
    grid: dict[str, Any]  # one value a replica
    problem: str = "mlp_problem"
    loss: Any = SquaredError(0.5)  # noqa: RUF009
    close: float = 1e-10  # what a few steps make of the rounding; more where there are many layers with normalisation


STEPS = {"theta_step": (0.02, 0.005, 0.01)}
MORE = {**STEPS, "z_step": (0.1, 0.05, 0.02), "dual_step": (1.0, 0.3, 0.0), "forward_mixing": (0.0, 0.5, 1.0)}
BETA = {"beta": {"blocks": [(1.0, 0.5, 2.0), 2.0, (0.3, 1.0, 1.0)]}}
CASES = {
    "sgd": Case(Backprop(8, SGD(momentum=0.9), 0.05, 7), {"step_size": (0.05, 0.02, 0.1)}),
    "adam": Case(Backprop(8, ADAM["theta_update"], ADAM["theta_step"], 7), {"step_size": (0.05, 0.02, 0.1)}),
    "adam, images": Case(
        Backprop(8, Adam(), 0.01, 4), {"step_size": (0.05, 0.02, 0.1)}, "conv_problem", CrossEntropy()
    ),
    "block-admm as in the paper": Case(
        BlockADMM(8, z_step=0.02, z_update=PROX, slice_size=10, **{**BATCH, "dual_init": 1e-2}), MORE | BETA
    ),
    "block-admm, gradient": Case(
        BlockADMM(
            8, z_step=0.1, z_update=ZUpdate("gradient", 2), **{**BATCH, "theta_step": 0.05, "theta_update": SGD(0.9)}
        ),
        MORE | BETA,
    ),
    "block-admm, majorised": Case(
        BlockADMM(8, z_update=ZUpdate("majorised", output_update="prox"), penalty=PENALTY, **BATCH), MORE | BETA
    ),
    "block-admm, lipschitz": Case(BlockADMM(8, z_update=ZUpdate("lipschitz", 2, "step"), z_step=0.5, **BATCH), MORE),
    "block-admm, mini-batches": Case(
        BlockADMM(
            8, z_update=ZUpdate("majorised", 3, output_update="prox"), curvature_every=2, penalty=PENALTY, **MINIBATCH
        ),
        MORE | BETA,
    ),
    "block-admm, mini-batches, adam": Case(BlockADMM(8, z_step=0.02, z_update=PROX, **MINIBATCH), MORE | BETA),
    "block-admm, mini-batches, lipschitz": Case(
        BlockADMM(8, z_update=ZUpdate("lipschitz", 3, output_update="prox"), **MINIBATCH), MORE
    ),
    "block-admm, cross-entropy": Case(
        BlockADMM(8, z_update=ZUpdate("majorised", 3, output_update="prox"), **MINIBATCH),
        MORE | BETA,
        loss=CrossEntropy(),
    ),
    "block-admm, images": Case(
        BlockADMM(
            8,
            z_step=0.02,
            z_update=ZUpdate("adam"),
            penalty=PENALTY,
            **{**BATCH, "batch_size": 4, "forward_mixing": 0.1},
        ),
        MORE | {"beta": {"blocks": [(1.0, 0.5, 2.0), 0.5]}},
        "conv_problem",
    ),
    "block-admm, images, mini-batches": Case(
        BlockADMM(8, z_step=0.1, z_update=ZUpdate("gradient", output_update="prox"), **{**MINIBATCH, "batch_size": 4}),
        MORE | {"beta": {"blocks": [(1.0, 0.5, 2.0), 0.5]}},
        "conv_problem",
        CrossEntropy(),
    ),
    "online": Case(
        OnlineBlockADMM(8, z_update=ZUpdate("lipschitz", 3, "prox"), dual="none", **ADAM),
        {**STEPS, "z_step": (1.0, 0.5, 0.7), "beta": (1.0, 0.5, 2.0)},
    ),
    "online, majorised": Case(
        OnlineBlockADMM(
            8, z_update=ZUpdate("majorised", 2, output_update="prox"), dual="none", curvature_every=3, **ADAM
        ),
        {**STEPS, "beta": (1.0, 0.5, 2.0)},
    ),
    "online, adam": Case(
        OnlineBlockADMM(8, z_step=0.1, z_update=ZUpdate("adam", 3, output_update="prox"), dual="none", **ADAM),
        {**STEPS, "z_step": (0.1, 0.05, 0.2)},
        loss=CrossEntropy(),
    ),
    **{
        f"online, {dual}": Case(
            OnlineBlockADMM(8, z_step=0.1, z_update=ZUpdate("gradient", 2, "step"), dual=dual, **ADAM),
            {**STEPS, "z_step": (0.1, 0.05, 0.2), "beta": (1.0, 0.5, 2.0)},
        )
        for dual in ("paper", "reset", "decay")
    },
    "online, images": Case(
        OnlineBlockADMM(
            8, z_step=0.1, z_update=ZUpdate("clipped", 2, "step"), dual="decay", **{**ADAM, "batch_size": 4}
        ),
        {**STEPS, "z_step": (0.1, 0.05, 0.2), "beta": (1.0, 0.5, 2.0)},
        "conv_problem",
    ),
    "gotmare": Case(
        Gotmare(8, z_step=0.5, z_rounds=2, **ADAM), {**STEPS, "z_step": (0.5, 0.2, 1.0), "rho": (1.0, 0.5, 2.0)}
    ),
    "gotmare, images": Case(
        Gotmare(8, z_step=0.5, z_update=Adam(), **{**ADAM, "batch_size": 4}),
        {**STEPS, "rho": (1.0, 0.5, 2.0)},
        "conv_problem",
        CrossEntropy(),
    ),
    "adam, resnet": Case(
        Backprop(8, Adam(), 0.01, 4), {"step_size": (0.05, 0.02, 0.1)}, "augmented_problem", CrossEntropy(), 1e-6
    ),
    "gotmare, resnet": Case(
        Gotmare(8, z_step=0.5, **{**ADAM, "batch_size": 4}),
        {**STEPS, "z_step": (0.5, 0.2, 1.0)},
        "augmented_problem",
        CrossEntropy(),
        1e-6,
    ),
    "online, resnet": Case(
        OnlineBlockADMM(
            8, z_step=0.5, z_update=ZUpdate("gradient", 1, "step"), dual="none", **{**ADAM, "batch_size": 4}
        ),
        {**STEPS, "z_step": (0.5, 0.2, 1.0)},
        "augmented_problem",
        CrossEntropy(),
        1e-6,
    ),
    "block-admm, resnet": Case(
        BlockADMM(8, z_step=0.02, z_update=ZUpdate("adam"), slice_size=5, **{**BATCH, "batch_size": 4}),
        MORE,
        "resnet_problem",
        CrossEntropy(),
        1e-6,
    ),
    "standard admm": Case(
        StandardADMM(start_from="forward", slice_size=10),
        {"beta": (10.0, 3.0, 20.0), "gamma": (10.0, 20.0, 5.0), "weight_decay": (1e-3, 0.0, 1e-2)},
    ),
    "taylor": Case(
        Taylor(warm_start=1, slice_size=10),
        {"beta": (1.0, 0.5, 2.0), "gamma": (10.0, 5.0, 20.0), "spread": (1.0, 0.5, 2.0)},
    ),
    "dladmm": Case(
        DLADMM(rho=1e-2), {"rho": (1e-2, 1e-1, 1.0), "theta": (1.0, 0.1, 3.0), "deviation": (0.1, 0.5, 1.0)}
    ),
    "bcd": Case(
        BCD(alpha=0.1),
        {"gamma": (1.0, 0.5, 2.0), "rho": (1.0, 3.0, 0.3), "alpha": (5.0, 1.0, 0.1)},
        loss=CrossEntropy(),
    ),
}
STEPPED = [name for name, case in CASES.items() if hasattr(case.optimizer, "iterations")]  # with a step size for Θ


PROBLEMS: dict[Any, Problem] = {}  # which no test changes


def problem_of(case: Case, request: pytest.FixtureRequest) -> Problem:
    """The problem of a case; to trace a network and to compare its blocks takes longer than most tests."""
    key = case.problem, case.loss
    if key not in PROBLEMS:
        PROBLEMS[key] = request.getfixturevalue(case.problem)(case.loss)
    return PROBLEMS[key]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def problem(case: Case, request: pytest.FixtureRequest) -> Problem:
    return problem_of(case, request)


def trained(optimizer: Optimizer, problem: Problem, seeds: tuple[int, ...], steps: int) -> Any:
    state = optimizer.init(problem, seeds)
    for _ in range(steps):
        optimizer.step(problem, state)
    return state


def tensors(saved: Any) -> list[Tensor]:
    """All tensors of a saved state, in order."""
    if isinstance(saved, dict):
        return tensors(list(saved.values()))
    if isinstance(saved, list):
        return [tensor for item in saved for tensor in tensors(item)]
    return [saved] if isinstance(saved, Tensor) else []


def replica(state: Any, s: int) -> list[Tensor]:
    """The state of one replica; its axis is the second one of `beta` and of the online duals. All share XᵀX."""
    saved = save(state)
    saved.pop("gram", None)
    by_block = [saved.pop(name) for name in ("beta", "u") if isinstance(saved.get(name), Tensor)]
    return [t[s] for t in tensors(saved)] + [t[:, s] for t in by_block]


def assert_replicas_equal(state: Any, s: int, other: Any, close: float | None) -> None:
    """That replica s of a state is the only one of another, to a tolerance, or without one replica s of it exactly."""
    for a, b in zip(replica(state, s), replica(other, s if close is None else 0), strict=True):
        if close is None:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=close, atol=close)


def step_key(optimizer: Any) -> str:
    return "step_size" if isinstance(optimizer, Backprop) else "theta_step"


def mean_loss(problem: Problem, optimizer: Optimizer, state: Any) -> Tensor:
    z = problem.blocks.forward(state.theta, problem.x.expand(len(state.seeds), *problem.x.shape))
    return problem.loss.value(z, problem.y).mean(1)


def test_a_stack_is_its_replicas_alone(case, problem):
    together = trained(case.optimizer, problem, SEEDS, 3)
    for s, seed in enumerate(SEEDS):
        assert_replicas_equal(together, s, trained(case.optimizer, problem, (seed,), 3), case.close)


def test_a_grid_of_hyperparameters_is_separate_runs(case, problem):
    seeds = (5, 5, 5)
    together = trained(replace(case.optimizer, **case.grid), problem, seeds, 3)
    for s in range(3):
        alone = {}
        for name, values in case.grid.items():
            if isinstance(values, dict):
                alone[name] = {"blocks": [v if isinstance(v, float) else v[s] for v in values["blocks"]]}
            else:
                alone[name] = values[s]
        assert_replicas_equal(together, s, trained(replace(case.optimizer, **alone), problem, seeds[:1], 3), case.close)
    assert not torch.allclose(together.theta.flat()[0], together.theta.flat()[1])


@pytest.mark.parametrize("case", STEPPED, indirect=True)
def test_a_grid_of_schedules_is_separate_runs(case, problem):
    key, ends = step_key(case.optimizer), (0.05, 0.01, 0.0)
    together = trained(replace(case.optimizer, **{key: {"start": 0.02, "end": ends}}), problem, SEEDS, 3)
    for s, end in enumerate(ends):
        alone = replace(case.optimizer, **{key: {"start": 0.02, "end": end}})
        assert_replicas_equal(together, s, trained(alone, problem, SEEDS[s : s + 1], 3), case.close)


def test_resuming_from_a_checkpoint_is_bit_identical(case, problem):
    through = trained(case.optimizer, problem, SEEDS, 4)
    buffer = io.BytesIO()
    torch.save(save(trained(case.optimizer, problem, SEEDS, 2)), buffer)
    buffer.seek(0)
    resumed = case.optimizer.init(problem, SEEDS)
    restore(resumed, torch.load(buffer, weights_only=True))
    for _ in range(2):
        case.optimizer.step(problem, resumed)
    assert resumed.iteration == through.iteration == 4 and resumed.seeds == SEEDS
    for s in range(len(SEEDS)):
        assert_replicas_equal(resumed, s, through, None)
    of_blocks = {id(v) for block in resumed.theta.blocks for views in block for v in views.values()}
    assert all(id(stack) in of_blocks for stack in resumed.theta.stacks.values())  # still shared


def test_a_checkpoint_of_a_former_version_has_moments_in_one_tensor_each(mlp_problem):
    problem, optimizer = mlp_problem(), CASES["adam"].optimizer
    expected, state = trained(optimizer, problem, SEEDS, 2), optimizer.init(problem, SEEDS)
    *moments, (count,) = expected.moments
    former = [*map(flattened, moments), count]  # [S, P], [S, P] and [S]
    restore(state, save(expected) | {"moments": former})
    pairs = zip(tensors(save(state)), tensors(save(expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="saved: moments has 1 entries, expected 6"):
        restore(state, save(expected) | {"moments": [v[:, 1:] for v in former[:2]] + [count]})


@pytest.mark.parametrize(
    "diverged, value",
    [
        (1, torch.inf),
        pytest.param(0, torch.nan, marks=pytest.mark.long),
        pytest.param(2, torch.nan, marks=pytest.mark.long),
    ],
)
def test_a_diverged_replica_leaves_the_others_bit_identical(case, problem, diverged, value):
    healthy, other = (trained(case.optimizer, problem, SEEDS, 1) for _ in range(2))
    for stack in other.theta.stacks.values():
        stack[diverged] = value
    for z in getattr(other, "z", getattr(other, "u", [])):  # some algorithms begin by replacing Θ
        z[diverged] = value
    for _ in range(3):
        case.optimizer.step(problem, healthy)
        case.optimizer.step(problem, other)
    assert not other.theta.flat()[diverged].isfinite().any()
    for s in set(range(3)) - {diverged}:
        assert_replicas_equal(other, s, healthy, None)
    values, expected = (case.optimizer.diagnostics(problem, state) for state in (other, healthy))
    for name in values:
        for s in set(range(3)) - {diverged}:
            assert torch.equal(values[name][s], expected[name][s])


PARTED = [
    name
    for name, case in CASES.items()
    if hasattr(case.optimizer, "epoch_parts") and getattr(case.optimizer, "sweep", "minibatch") == "minibatch"
]


@pytest.mark.parametrize("case", PARTED, indirect=True)
def test_the_parts_of_an_epoch_end_where_the_epoch_does(case, problem):
    """With constant steps: schedules and the adaptive penalty go by iterations."""
    constant = {step_key(case.optimizer): 0.01}
    for name, value in (("z_step", 0.01), ("penalty", None), ("curvature_every", 1)):
        if name in case.optimizer.__dict__:
            constant[name] = value
    whole = replace(case.optimizer, **constant)
    epochs = trained(whole, problem, SEEDS, 2)
    parts = trained(replace(whole, epoch_parts=3), problem, SEEDS, 6)
    assert torch.equal(epochs.theta.flat(), parts.theta.flat())


@pytest.mark.parametrize("case", STEPPED, indirect=True)
@pytest.mark.parametrize("zero", [pytest.param(0.0, marks=pytest.mark.long), (0.0, 0.0, 0.0)], ids=str)
def test_a_step_size_of_zero_leaves_theta_as_it_is(case, problem, zero):
    optimizer = replace(case.optimizer, **{step_key(case.optimizer): zero})
    before = optimizer.init(problem, SEEDS).theta.flat()
    assert torch.equal(trained(optimizer, problem, SEEDS, 2).theta.flat(), before)


@pytest.mark.parametrize("case", STEPPED, indirect=True)
def test_a_schedule_that_has_ended_at_zero_leaves_theta_as_it_is(case, problem):
    key = step_key(case.optimizer)
    optimizer = replace(case.optimizer, iterations=2, **{key: {"start": 0.02, "end": 0.0}})
    state = trained(optimizer, problem, SEEDS, 2)
    before = state.theta.flat().clone()
    assert not torch.equal(before, optimizer.init(problem, SEEDS).theta.flat())
    assert torch.equal(optimizer.step(problem, state).theta.flat(), before)


def test_the_loss_decreases(case, problem):
    before = mean_loss(problem, case.optimizer, case.optimizer.init(problem, SEEDS))
    after = mean_loss(problem, case.optimizer, trained(case.optimizer, problem, SEEDS, 8))
    assert (after < 0.9 * before).all()


def test_a_step_is_in_place_and_draws_no_global_random_numbers(case, problem):
    state = case.optimizer.init(problem, SEEDS)
    inputs = problem.x.clone(), problem.y.clone()
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    assert case.optimizer.step(problem, state) is state
    assert state.iteration == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(problem.x, inputs[0]) and torch.equal(problem.y, inputs[1])


def test_diagnostics_are_one_number_a_replica_and_change_nothing(case, problem):
    state = trained(case.optimizer, problem, SEEDS, 1)
    before = [t.clone() for t in tensors(save(state))]
    values = case.optimizer.diagnostics(problem, state)
    assert all(value.shape == (3,) and value.isfinite().all() for value in values.values())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(save(state)), strict=True))


def test_the_state_stays_in_the_problem_s_dtype(case, problem):
    problem = replace(problem, x=problem.x.float(), y=problem.y.float())
    saved = save(trained(case.optimizer, problem, SEEDS, 1))
    saved["moments"] = saved.get("moments", [])[:2]  # Adam's count of steps is PyTorch's own
    assert {t.dtype for t in tensors(saved)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, torch.inf, torch.nan])
def test_spectral_norms_are_right_whatever_the_size_of_one_replica(mlp_problem, dtype, value):
    problem = mlp_problem()
    problem = replace(problem, x=problem.x.to(dtype))
    theta = problem.initial(SEEDS)
    theta.fill(theta.flat() * torch.tensor([[1.0], [value], [1.0]], dtype=dtype))
    norms = spectral_norms(problem, theta)
    for t, block in enumerate(theta.blocks, start=1):
        weight = next(layer["weight"] for layer in block if layer)
        for s in range(3):
            if weight[s].isfinite().all():
                expected = torch.linalg.svdvals(weight[s].double() / (value if s == 1 and value else 1.0))[0]
                expected *= value if s == 1 else 1.0
                assert norms[f"sigma_{t}"][s].item() == pytest.approx(expected.item(), rel=1e-5)
            else:
                assert not norms[f"sigma_{t}"][s].isfinite()


def test_a_state_is_shown_without_its_numbers(case, problem):
    shown = repr(case.optimizer.init(problem, SEEDS))
    assert "tensor(" not in shown and "\n" not in shown and f"seeds={SEEDS}, iteration=0, theta=Parameters(" in shown


def test_a_state_shows_types_and_shapes_and_of_a_long_list_its_beginning(mlp_problem):
    optimizer = BlockADMM(8, 0.01, batch_size=7, theta_update=SGD(0.9))
    assert repr(optimizer.init(mlp_problem(), (3, 4))).partition("], ")[2] == (
        "fc1.linear.bias [2, 5], fc2.linear.weight [2, 4, 5], fc2.linear.bias [2, 4], fc3.linear.weight [2, 3, 4], "
        "fc3.linear.bias [2, 3]), moments=[[float64 [2, 5, 6], float64 [2, 5], float64 [2, 4, 5], … 3 more]], "
        "z=[float64 [2, 24, 5], float64 [2, 24, 4], float64 [2, 24, 3]], "
        "u=[float64 [2, 24, 5], float64 [2, 24, 4], float64 [2, 24, 3]], "
        "z_state=ZState(moments=[], count=0, power_vectors=[], inverse_curvature=[]), beta=float64 [3, 2], "
        "made_with={'theta_update': 'SGD() of 1 moment', 'z_update': 'a ZUpdate that keeps nothing'})"
    )


def test_another_seed_s_checkpoint_is_refused(case, problem):
    saved = save(case.optimizer.init(problem, SEEDS))
    with pytest.raises(ValueError, match=r"saved: seeds is \[5, 0, 11\], expected \[5, 0, 12\]"):
        restore(case.optimizer.init(problem, (5, 0, 12)), saved)


def test_another_optimizer_s_checkpoint_is_refused(mlp_problem):
    problem, states = mlp_problem(), {}
    for name in ("adam", "block-admm as in the paper", "online"):
        states[name] = CASES[name].optimizer.init(problem, SEEDS)
    with pytest.raises(ValueError, match="saved: has no 'z'"):
        restore(states["block-admm as in the paper"], save(states["adam"]))
    with pytest.raises(ValueError, match=r"saved: was made with theta_update=Adam\(\) of 3"):
        restore(CASES["sgd"].optimizer.init(problem, SEEDS), save(states["adam"]))


def test_another_network_s_checkpoint_is_refused(mlp_problem, conv_problem):
    optimizer = CASES["adam"].optimizer
    with pytest.raises(ValueError, match=r"saved: theta has shape \[3, 74\], expected \[3, 51\]"):
        restore(optimizer.init(conv_problem(), SEEDS), save(optimizer.init(mlp_problem(), SEEDS)))


def test_a_problem_whose_parts_do_not_fit_is_refused_in_words(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    with pytest.raises(ValueError, match="problem: 3 inputs x, but"):
        replace(problem, x=problem.x[:3])
    for y in (problem.y[:, :1], torch.cat([problem.y, problem.y], 1)):
        with pytest.raises(ValueError, match=rf"y: targets .* \[24, {y.shape[1]}\] do not fit .* outputs \[24, 3\]"):
            replace(problem, y=y)
    with pytest.raises(ValueError, match=r"network: cannot be evaluated on samples \[2\]: layer 'fc1.linear' "):
        replace(problem, x=problem.x.flatten(1)[:, :2])
    for seeds in ([], [-1], [0.5], [2**64], 5, "01", np.array([[0]])):
        with pytest.raises(ValueError, match=r"seeds: .* is not a sequence of whole numbers"):
            problem.initial(seeds)


@pytest.mark.parametrize("optimizer", [Backprop(0, SGD(), 0.1), OnlineBlockADMM(0, 0.1), BlockADMM(-3, 0.1)])
def test_a_horizon_that_is_none_is_refused(mlp_problem: Callable[..., Problem], optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"iterations: -?\d is not a whole number from 1 up"):
        replace(optimizer, batch_size=2).init(mlp_problem(), [0])


def test_what_numpy_holds_is_taken(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    labels = problem.y.argmax(1)
    given = Problem(problem.x.numpy(), labels.numpy(), problem.blocks, problem.loss, problem.initialise)
    assert torch.equal(given.x, problem.x) and torch.equal(given.y, problem.y)
    optimizer = replace(CASES["sgd"].optimizer, batch_size=np.int64(6))
    states = [
        optimizer.init(problem, seeds) for seeds in ([0, 2], np.array([0, 2]), torch.tensor([0, 2]), range(0, 3, 2))
    ]
    for state in states:
        optimizer.step(problem, state)
        assert torch.equal(state.theta.flat(), states[0].theta.flat())
        assert state.seeds == (0, 2) and all(type(seed) is int for seed in state.seeds)


class Mean(Loss):
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).flatten(1).mean(1)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda x: (255 * x).byte(), r"network: .*'fc1.linear"),
        (lambda x: x[:0], r"x: inputs \[0, 6\] have no samples"),
        (lambda x: torch.where(x > 1, torch.nan, x), "x: inputs must be finite numbers, found NaN or infinity"),
        (lambda x: "images", "x: a str is no tensor, nor an array or a list of numbers"),
        (lambda x: TensorDataset(x), "y: the items of TensorDataset are pairs of inputs and targets already; take y=N"),
    ],
)
def test_inputs_that_blocks_cannot_take_are_refused(mlp_problem: Callable[..., Problem], x: Any, message: str) -> None:
    problem = mlp_problem()
    with pytest.raises(ValueError, match=message):
        replace(problem, x=x(problem.x))


def test_targets_elsewhere_are_refused(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    with pytest.raises(ValueError, match="y: is on meta, x on cpu; both must be on one device"):
        replace(problem, y=problem.y.to("meta"))


def test_bf16_of_other_inputs_is_refused() -> None:
    blocks = split(nn.Sequential(nn.Tanh(), nn.Linear(6, 3)), after=[], execution=Execution("bf16"))
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    with pytest.raises(ValueError, match="precision: bf16 is for inputs x of float32, not torch"):
        Problem(x, y, blocks, SquaredError(), initialiser("pytorch"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (object(), "loss: object is neither an object of a subclass of admm.losses.Loss nor a function"),
        (CrossEntropy, "loss: CrossEntropy is neither an object"),
        (
            nn.functional.mse_loss,
            r'loss: .*mse_loss.* returns \[\] for 6 samples; .*="none", or admm.SquaredError\(\), which also ',
        ),
        (nn.CrossEntropyLoss(), r"returns \[\] .*, or admm.CrossEntropy\(\), which also measures accuracy$"),
        (nn.BCEWithLogitsLoss(), r"returns \[\] .*, or admm.BinaryCrossEntropy\(\), which also measures accuracy$"),
        (nn.L1Loss(), r'L1Loss\(\) returns \[\] .*, as with reduction="none"$'),
        (
            lambda z, y: z @ y,
            r"loss: cannot be evaluated on outputs \[3, 2, 3\] and .* \(3 seeds, 2 samples\): RuntimeError",
        ),
        (Mean(), r"loss: the value for .* is \[3\]; expected J of each sample, \[3, 2\]"),
    ],
    ids=["an object", "a class", "a mean", "of classes", "of labels", "of no loss", "an error", "a value of a replica"],
)
def test_a_loss_without_a_value_per_sample_is_refused(
    mlp_problem: Callable[..., Problem], loss: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mlp_problem(loss)


class OfAllSeeds(Loss):
    """A loss of one's own whose targets of all seeds meet."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z.flatten(0, 1) - y.flatten()).square().mean(1).view(z.shape[:2])

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z


def of_one_output(loss: Any, y: Tensor) -> Problem:
    blocks = split(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), after=["1"])
    return Problem(torch.randn(len(y), 6), y, blocks, loss, initialiser("pytorch"))


RARE = torch.tensor([0.0] * 30 + [1.0])  # sorted, as classes often are
OF_OTHERS = [
    (lambda z, y: (z - y).abs().sum(1), "sample"),
    (lambda z, y: (z - y).square().mean(1), "sample"),
    (OfAllSeeds(), "seed"),
]


@pytest.mark.parametrize(("loss", "what"), OF_OTHERS, ids=["sum", "mean", "class"])
@pytest.mark.parametrize("weights", [None, torch.ones(31)], ids=["plain", "weighted"])
def test_a_loss_that_pairs_each_sample_with_all_targets_is_refused(loss: Any, what: str, weights: Any) -> None:
    told = rf"loss: J of a {what} depends on the other {what}s, for .* \[n, 1\] and targets \[n\]: give y\[:, None\]$"
    with pytest.raises(ValueError, match=told):
        replace(of_one_output(SquaredError(), RARE), loss=loss, y=RARE, weights=weights)
    if what == "sample":
        problem = of_one_output(loss, RARE[:, None])
        with pytest.raises(ValueError, match=told):
            problem.samples(torch.randn(31, 6), RARE)  # a test set


def test_a_random_or_stateful_loss_is_none_that_depends_on_others() -> None:
    calls: list[int] = []

    def stateful(z: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return len(calls) * (z - y).square()

    for loss in (stateful, lambda z, y: nn.functional.dropout(z - y).square(), lambda z, y: (z - y) * random.random()):
        of_one_output(loss, RARE[:, None])


KEEPING = ["block-admm, mini-batches", "block-admm as in the paper", "standard admm", "taylor", "dladmm", "bcd"]


@pytest.mark.parametrize("case", KEEPING, indirect=True)
def test_variables_of_other_samples_are_refused(case, problem):
    state = case.optimizer.init(problem, SEEDS)
    before = [t.clone() for t in tensors(save(state))]
    fewer = replace(problem, x=problem.x[:20], y=problem.y[:20])
    for method in (case.optimizer.diagnostics, case.optimizer.step):
        with pytest.raises(ValueError, match="problem: 20 samples, but the state has variables of 24"):
            method(fewer, state)
    assert all(map(torch.equal, before, tensors(save(state))))


@pytest.mark.parametrize("optimizer", [BlockADMM, OnlineBlockADMM])
def test_rows_of_a_sample_have_the_penalty_of_their_replica(optimizer):
    """As many samples in a mini-batch as replicas, two axes of outputs a sample, and Z_T by the exact step."""
    x = torch.randn(9, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    problem = Problem(x, x[:, :, :2].sign(), split(network, after=["1"]), SquaredError(), initialiser("pytorch"))
    for name in ("gradient", "lipschitz", "majorised"):
        options = optimizer(4, 0.01, 0.3, (1.0, 0.4, 3.0), batch_size=3, z_update=ZUpdate(name, output_update="prox"))
        together = trained(options, problem, (5, 5, 5), 2)
        for s, beta in enumerate(options.beta):
            assert_replicas_equal(together, s, trained(replace(options, beta=beta), problem, (5,), 2), 1e-10)
        assert not torch.allclose(together.theta.flat()[0], together.theta.flat()[2])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Backprop(1, "adam", 0.1), r"theta_update: 'adam' is no UpdateRule, such as admm.optimizers.Adam\(\)"),
        (BlockADMM(1, 0.1, theta_update=Adam), "theta_update: Adam is a class; give an object of it, such as admm"),
        (Gotmare(1, 0.1, z_update="sgd"), "z_update: 'sgd' is no UpdateRule, such as admm.*; or give \"clipped\""),
        (OnlineBlockADMM(1, 0.1, z_update="gradient"), "z_update: 'gradient' is no ZUpdate, such as .*ZUpdate"),
        (BlockADMM(1, 0.1, z_update=SGD()), "z_update: SGD.* is no ZUpdate, such as .*ZUpdate"),
    ],
    ids=str,
)
def test_a_rule_that_is_none_is_named(mlp_problem: Callable[..., Problem], optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(optimizer, batch_size=6).init(mlp_problem(), [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": nn.Linear(4, 2)}, "blocks: a Linear, where admm.blocks.split makes blocks of a network"),
        ({"initialise": "pytorch"}, r"initialise: 'pytorch' is no function, such as initialiser\(\"pytorch\"\)"),
        ({"initialise": nn.Linear(4, 2)}, r"initialise: Linear\(.*\) is no function, such as"),
        ({"initialise": initialiser}, r"initialise: initialiser makes a function, .*; take initialiser\(\"pytorch\"\)"),
        ({"initialise": as_constructed}, "initialise: as_constructed makes a function, which is what is needed; take"),
        ({"parallel": "samples"}, "parallel: 'samples' is no Parallel, such as admm.Parallel.join"),
        ({"parallel": Parallel}, "parallel: Parallel is a class; give an object of it, such as admm.Parallel.join"),
        ({"stream_to": "gpu"}, "stream_to: 'gpu' is no device of PyTorch's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_argument_of_a_problem_that_is_none_is_named(
    mlp_problem: Callable[..., Problem], change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(mlp_problem(), **change)


@pytest.mark.parametrize(
    ("contract", "method"),
    [(Optimizer, "step"), (UpdateRule, "apply"), (Loss, "gradient"), (ProximalLoss, "prox"), (Layer, "vjp")],
)
def test_a_subclass_that_lacks_a_method_cannot_be_made(contract: type, method: str) -> None:
    methods = {name: lambda *arguments: None for name in contract.__abstractmethods__ - {method}}
    with pytest.raises(TypeError, match=f"abstract class Lacking .*{method}"):
        type("Lacking", (contract,), methods)()


def test_a_rule_of_one_s_own_needs_no_more_than_its_two_methods(mlp_problem: Callable[..., Problem]) -> None:
    class Signs(UpdateRule):
        def init(self, theta: list[Tensor]) -> list[list[Tensor]]:
            return []

        def apply(self, theta: list[Tensor], gradient: list[Tensor], moments: list[list[Tensor]], step: Any) -> None:
            for p, g in zip(theta, gradient, strict=True):
                p.sub_(g.sign(), alpha=step)

    optimizer = Backprop(1, Signs(), 0.25, batch_size=24)
    state = optimizer.init(mlp_problem(), [0])
    start = state.theta.flat().clone()
    optimizer.step(mlp_problem(), state)
    assert set((state.theta.flat() - start).abs().unique().tolist()) <= {0.0, 0.25}


@pytest.mark.parametrize(
    ("x", "weights", "shown"),
    [
        (torch.zeros(5, 4), None, "5 samples on cpu, with CrossEntropy:\n  x: float32 [n, 4]"),
        ((torch.zeros(5, 4),), [1] * 5, "5 weighted samples on cpu, with CrossEntropy:\n  x: a tuple of 1"),
    ],
)
def test_a_problem_shows_itself_without_its_data(x: Any, weights: Any, shown: str) -> None:
    blocks = split(nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2)), after=["1"])
    problem = Problem(x, torch.arange(5) % 2, blocks, CrossEntropy(), initialiser("pytorch"), weights=weights)
    of_blocks = "2 blocks of Sequential:\n  1: 0, 1 → [n, 3]\n  2: 2 → [n, 2]"
    assert repr(problem) == f"Problem of {shown}\n  y: int64 [n]\n{of_blocks}"
