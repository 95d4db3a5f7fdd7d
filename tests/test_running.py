"""Visits of mini-batches as compiled functions."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

from admm.checkpoints import save
from admm.layers import Execution
from admm.losses import BinaryCrossEntropy, CrossEntropy, Loss, ProximalFunctionLoss
from admm.optimizers import (
    BCD,
    DLADMM,
    SGD,
    Adam,
    AdaptivePenalty,
    Averaged,
    Backprop,
    BlockADMM,
    Clipped,
    DeepFacto,
    Gotmare,
    Group,
    Grouped,
    OnlineBlockADMM,
    Optimizer,
    Problem,
    StandardADMM,
    Taylor,
    UpdateRule,
    ZUpdate,
    running,
)
from admm.training import train
from tests.test_deepfacto import BASE as DEEPFACTO
from tests.test_deepfacto import problem as problem_of_deepfacto

FALLS = {"start": 0.02, "end": 0.0}
KEPT = BlockADMM(  # Algorithm 1 in Gauss-Seidel order, with all of Z and U kept
    3,
    FALLS,
    batch_size=9,
    beta=1.0,
    z_step=1.0,
    z_update=ZUpdate("majorised", steps=2, output_update="prox"),
    primal_rounds=2,
    dual_step={"start": 1.0, "end": 0.5},
    dual_init=0.1,
    forward_mixing=0.9,
    curvature_every=2,
)
OPTIMIZERS = {
    "sgd": Backprop(3, SGD(momentum=0.9, weight_decay=0.01), FALLS, 9),
    "adam": Backprop(3, Adam(weight_decay=0.1), FALLS, 9),
    "clipped average": Backprop(3, Clipped(Averaged(Adam(), 0.9), 0.1), FALLS, 9),
    "online": OnlineBlockADMM(3, FALLS, batch_size=9),
    "online, lipschitz": OnlineBlockADMM(
        3, FALLS, 1.0, 1.0, 9, z_update=ZUpdate("lipschitz", steps=2, output_update="prox"), curvature_every=2
    ),
    "online, as printed": OnlineBlockADMM(3, FALLS, 0.05, 1.0, 9, z_update=ZUpdate("adam"), dual="paper"),
    "online, decaying dual": OnlineBlockADMM(3, FALLS, FALLS, 1.0, 9, dual="decay"),
    "block": KEPT,
    "block, adam for Z": replace(KEPT, z_step=0.1, z_update=ZUpdate("adam", steps=2), curvature_every=1),
    "block, penalty": replace(KEPT, penalty=AdaptivePenalty(bound=1e-3), epoch_parts=None),
    "gotmare": Gotmare(3, FALLS, batch_size=9),
    "gotmare, momentum": Gotmare(3, FALLS, batch_size=9, z_rounds=2, z_update=SGD(momentum=0.5)),
    "gotmare, Adam for Z": Gotmare(3, FALLS, FALLS, batch_size=9, z_rounds=2, z_update=Adam()),
    "deepfacto": DeepFacto(3, FALLS, batch_size=9, group_size=1, theta_update=SGD(0.9), dual_step=0.5),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Run the traced graphs as Inductor makes them functional, without the code that it would compile; and list
    them."""
    found: list[nn.Module] = []

    def uncompiled(graph: Callable[..., Any], _: Any, **options: Any) -> Callable[..., Any]:
        def run(arguments: list[Tensor]) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # as Inductor calls what it has compiled
        return run

    def compiled(graph: torch.fx.GraphModule, tensors: list[Tensor]) -> Callable[..., Any]:
        with torch.no_grad():
            function: Callable[..., Any] = compile_fx(graph, [*tensors], uncompiled, {"cpp_wrapper": True})  # type: ignore[assignment, arg-type]
        found.append(graph)
        return function

    monkeypatch.setattr(running, "inductor", compiled)
    return found


def compiling(problem: Problem, compile: Any = True) -> Problem:
    return replace(problem, blocks=problem.blocks.with_execution(Execution(compile=compile)))


def trained(problem: Problem, optimizer: Optimizer[Any], seeds: tuple[int, ...]) -> Any:
    state = optimizer.init(problem, seeds)
    for _ in range(2):
        optimizer.step(problem, state)
    return state


def numbers(state: Any) -> dict[str, Any]:
    return {name: value for name, value in save(state).items() if name != "made_with"}  # which is text


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=1e-12, atol=1e-12)


ALONE = [name if name in ("adam", "online") else pytest.param(name, marks=pytest.mark.long) for name in OPTIMIZERS]


@pytest.mark.parametrize("name", ALONE)
def test_a_compiled_run_of_one_replica_is_the_eager_one(
    name: str, mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    assert_compiled_is_eager(name, (0,), mlp_problem(), graphs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_run_is_the_eager_one(
    name: str, mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    assert_compiled_is_eager(name, (0, 1, 2), mlp_problem(), graphs)


def assert_compiled_is_eager(name: str, seeds: tuple[int, ...], problem: Problem, graphs: list[nn.Module]) -> None:
    """With mini-batches of 9, 9 and 6 samples."""
    close(trained(compiling(problem), OPTIMIZERS[name], seeds), trained(problem, OPTIMIZERS[name], seeds))
    curved = 2 if "lipschitz" in name else 1  # the first and the third mini-batch, of two sizes; the second
    assert len(graphs) == 1 + curved


@pytest.mark.parametrize("name", ["adam", "online", "block"])
def test_each_replica_has_its_own_numbers(
    name: str, mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    steps = {"start": [0.02, 0.01], "end": 0.0}
    own = {"step_size": steps} if name == "adam" else {"theta_step": steps, "z_step": [0.5, 0.2], "beta": [1.0, 2.0]}
    optimizer = replace(OPTIMIZERS[name], **own)  # type: ignore[type-var]
    close(trained(compiling(mlp_problem()), optimizer, (0, 1)), trained(mlp_problem(), optimizer, (0, 1)))
    assert graphs


def test_groups_of_parameters_keep_their_rules(mlp_problem: Callable[..., Problem], graphs: list[nn.Module]) -> None:
    problem = mlp_problem()
    rule = Grouped(problem.blocks, [Group("*.bias", SGD(), [2.0, 1.0]), Group(1, Adam(), 0.1)], Adam(weight_decay=0.1))
    optimizer = Backprop(3, rule, FALLS, 9)
    close(trained(compiling(problem), optimizer, (0, 1)), trained(problem, optimizer, (0, 1)))
    assert graphs


def test_a_run_goes_on_with_another_state_and_other_numbers(
    mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    """No state, step size or sample of the visit that was traced stays in what was compiled."""
    problem, optimizer = mlp_problem(), OPTIMIZERS["block"]
    one, two = compiling(problem), problem
    for seeds in ((0, 1), (5, 6)):
        close(trained(one, optimizer, seeds), trained(two, optimizer, seeds))
    assert len(graphs) == 2


def test_two_optimizers_on_one_problem_do_not_share_what_is_compiled(
    mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    problem = compiling(mlp_problem())
    for decay in (0.0, 0.5):
        optimizer = Backprop(3, Adam(weight_decay=decay), FALLS, 9)
        close(trained(problem, optimizer, (0,)), trained(mlp_problem(), optimizer, (0,)))
    assert len(graphs) == 4


def test_diagnostics_leave_the_state(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem()
    for name in ("online, lipschitz", "block"):
        state = trained(problem, OPTIMIZERS[name], (0, 1))
        before = copy.deepcopy(numbers(state))
        OPTIMIZERS[name].diagnostics(problem, state)
        torch.testing.assert_close(numbers(state), before, rtol=0, atol=0)


def test_a_visit_that_depends_on_its_data_is_run_eagerly_with_a_warning(
    mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    """The proximal operator of a plain function halves its steps until all samples have converged."""
    problem = mlp_problem(ProximalFunctionLoss(lambda z, y: (z - y).cosh().sum(-1)))
    optimizer = replace(OPTIMIZERS["online, lipschitz"], curvature_every=1)  # type: ignore[type-var]
    with pytest.warns(UserWarning, match="compile: mini-batches are visited eagerly"):
        state = trained(compiling(problem), optimizer, (0, 1))
    close(state, trained(problem, optimizer, (0, 1)))
    assert not graphs


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(CrossEntropy(scale=0.3), marks=pytest.mark.long),
        CrossEntropy(weight=[1, 2, 3], label_smoothing=0.1),
        BinaryCrossEntropy(),
    ],
    ids=str,
)
def test_steps_of_newton_s_method_are_compiled(
    loss: Loss, mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    """As many as the samples of a mini-batch need, which is told by the data."""
    optimizer = replace(OPTIMIZERS["online, lipschitz"], beta=[0.1, 1.0])  # type: ignore[type-var]
    close(trained(compiling(mlp_problem(loss)), optimizer, (0, 1)), trained(mlp_problem(loss), optimizer, (0, 1)))
    assert graphs


def test_a_rule_of_one_s_own_is_compiled_if_it_takes_tensors(
    mlp_problem: Callable[..., Problem], graphs: list[nn.Module]
) -> None:
    class Descent(UpdateRule):
        def init(self, theta: list[Tensor]) -> list[list[Tensor]]:
            return []

        def apply(self, theta: list[Tensor], gradient: list[Tensor], moments: list[list[Tensor]], step: Any) -> None:
            for p, g in zip(theta, gradient, strict=True):
                p.sub_(torch.as_tensor(step, dtype=g.dtype).view(-1, *[1] * (p.ndim - 1)) * g)

    optimizer = Backprop(3, Descent(), FALLS, 9)
    close(trained(compiling(mlp_problem()), optimizer, (0, 1)), trained(mlp_problem(), optimizer, (0, 1)))
    assert graphs


def test_auto_compiles_long_runs_alone(
    mlp_problem: Callable[..., Problem], graphs: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, optimizer = compiling(mlp_problem(), "auto"), OPTIMIZERS["sgd"]  # 9 visits
    for steps, expected in ((10, 0), (9, 2)):
        monkeypatch.setattr(running, "AUTO_STEPS", steps)
        trained(problem, optimizer, (0,))
        assert len(graphs) == expected


def test_networks_with_other_layers_compile_their_blocks_instead(resnet_problem: Callable[..., Problem]) -> None:
    problem = resnet_problem()
    assert not problem.blocks.are_known_layers
    assert not running.Runner(problem, OPTIMIZERS["sgd"], (None,), None, 0).is_compiled  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize("name", ["sgd", "adam", "gotmare", "online", "block"])
def test_inductor_gives_the_eager_iterates(name: str, replicas: int, mlp_problem: Callable[..., Problem]) -> None:
    """On two thirds of an epoch, with a step size of Θ for each replica."""
    step = "step_size" if name in ("sgd", "adam") else "theta_step"
    steps = {"start": [0.02 / s for s in range(1, 1 + replicas)], "end": 0.0}
    optimizer = replace(OPTIMIZERS[name], epoch_parts=3, **{step: steps})  # type: ignore[type-var]
    problem, seeds = mlp_problem(), range(replicas)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = trained(compiling(problem), optimizer, tuple(seeds))
    close(compiled, trained(problem, optimizer, tuple(seeds)))


def test_the_compiler_gives_the_same_numbers_and_its_time_is_told_apart(mlp_problem: Callable[..., Problem]) -> None:
    problem = mlp_problem(CrossEntropy())
    optimizer = OnlineBlockADMM(2, FALLS, batch_size=8, z_update=ZUpdate("gradient", output_update="prox"))
    state, expected = (optimizer.init(problem, (0, 1)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = train(compiling(problem), optimizer, state)
    eager = train(problem, optimizer, expected)
    close(state, expected)
    assert history.compile_seconds > history.seconds and eager.compile_seconds == 0.0


def test_deepfacto_compiles_its_blocks_and_not_its_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an NMF is none of the layers whose visits are compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    problem = problem_of_deepfacto()
    compiled = compiling(problem)
    close(trained(compiled, DEEPFACTO, (0, 1)), trained(problem, DEEPFACTO, (0, 1)))
    assert compiled.blocks.compile_seconds and not compiled.compiled


BATCH = BlockADMM(3, 0.1, sweep="batch", batch_size=9)


@pytest.mark.parametrize(
    "optimizer", [BATCH, StandardADMM(), Taylor(), DLADMM(), BCD()], ids=lambda optimizer: type(optimizer).__name__
)
def test_compiling_without_effect_is_warned_of(optimizer: Optimizer[Any], mlp_problem: Callable[..., Problem]) -> None:
    problem = compiling(mlp_problem())
    told = f"compile: True has no effect on this {type(optimizer).__name__}; .* visits of mini-batches are compiled"
    with pytest.warns(UserWarning, match=told) as caught:
        train(problem, optimizer, optimizer.init(problem, (0, 1)), iterations=2)
    assert len(caught) == 1


def test_compiling_with_an_effect_is_not_warned_of(
    mlp_problem: Callable[..., Problem],
    conv_problem: Callable[..., Problem],
    graphs: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another optimizer has compiled on the same problem before does not count."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    known = compiling(mlp_problem())
    runs = [(known, OPTIMIZERS["sgd"]), (compiling(conv_problem()), BATCH), (compiling(mlp_problem(), "auto"), BATCH)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for problem, optimizer in runs:
            train(problem, optimizer, optimizer.init(problem, (0, 1)))
    with pytest.warns(UserWarning, match="no effect on this BlockADMM"):
        train(known, BATCH, BATCH.init(known, (0, 1)))
