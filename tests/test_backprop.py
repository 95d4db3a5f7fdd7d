"""Update rules and back-propagation against `torch.optim` on plain modules."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm.losses import CrossEntropy, SquaredError
from admm.minibatches import minibatches
from admm.optimizers import SGD, Adam, Backprop

SEEDS = (3, 1, 7)
RULES: dict[str, tuple[Any, Callable[[Iterable[Tensor]], torch.optim.Optimizer]]] = {
    "adam": (Adam(), lambda p: torch.optim.Adam(p)),
    "adam options": (
        Adam(beta1=0.8, beta2=0.9, epsilon=1e-3),
        lambda p: torch.optim.Adam(p, betas=(0.8, 0.9), eps=1e-3),
    ),
    "adamw": (Adam(weight_decay=0.3), lambda p: torch.optim.AdamW(p, weight_decay=0.3)),
    "sgd": (SGD(), lambda p: torch.optim.SGD(p)),
    "momentum": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
    "momentum and decay": (
        SGD(momentum=0.7, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, momentum=0.7, weight_decay=0.2),
    ),
    "decay": (SGD(weight_decay=0.2), lambda p: torch.optim.SGD(p, weight_decay=0.2)),
}
each_rule = pytest.mark.parametrize("rule, oracle", RULES.values(), ids=RULES)


def set_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = step


@each_rule
@pytest.mark.parametrize("sizes", [0.1, (0.1, 0.02, 0.5)], ids=["one step size", "one a replica"])
def test_a_rule_is_torch_optim_s(rule, oracle, sizes):
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 8, dtype=torch.float64, generator=rng)
    expected = [row.clone().requires_grad_() for row in theta]
    optimizers, moments = [oracle([row]) for row in expected], rule.init([theta])
    for k in range(6):
        gradient = torch.randn(3, 8, dtype=torch.float64, generator=rng)
        before = gradient.clone()
        decay = 0.9**k  # step sizes change along the way
        step = sizes * decay if isinstance(sizes, float) else torch.tensor(sizes, dtype=torch.float64) * decay
        rule.apply([theta], [gradient], moments, step)
        assert torch.equal(gradient, before)
        for s, (row, optimizer) in enumerate(zip(expected, optimizers, strict=True)):
            set_step(optimizer, (sizes if isinstance(sizes, float) else sizes[s]) * decay)
            row.grad = before[s].clone()
            optimizer.step()
            torch.testing.assert_close(theta[s], row.detach(), rtol=1e-10, atol=1e-12)


def plain_training(optimizer: Backprop, problem: Any, seed: int, oracle: Any, loss: nn.Module, epochs: int) -> Tensor:
    """The same training as a plain PyTorch loop; the parameters and buffers after each epoch, [epochs, P + B]."""
    network = problem.blocks.export(problem.initial([seed])).train()
    torch_optimizer, history = oracle(network.parameters()), []
    torch_optimizer.param_groups[0]["lr"] = optimizer.step_size["start"]
    n_batches = -(-len(problem.x) // optimizer.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch_optimizer, optimizer.iterations * n_batches, eta_min=optimizer.step_size["end"]
    )
    scheduler.base_lrs = [optimizer.step_size["start"]]
    for epoch in range(epochs):
        for batch in minibatches(len(problem.x), optimizer.batch_size, [seed], epoch, problem.x.device):
            torch_optimizer.zero_grad()
            loss(network(problem.x[batch[0]]), problem.y[batch[0]]).backward()
            torch_optimizer.step()
            scheduler.step()
        history.append(torch.cat([problem.blocks.flatten(network, kind) for kind in ("parameters", "buffers")]))
    return torch.stack(history)


@each_rule
@pytest.mark.parametrize("kind", ["squared error", "cross-entropy"])
@pytest.mark.parametrize(
    "cut", [{"n_blocks": 1}, {"per_layer": True}, {"per_layer": True, "activation": "start"}], ids=str
)
def test_training_is_a_plain_pytorch_loop_however_the_network_is_cut(mlp_problem, rule, oracle, kind, cut):
    ours, theirs = (
        (SquaredError(2 / 3), nn.MSELoss()) if kind == "squared error" else (CrossEntropy(), nn.CrossEntropyLoss())
    )
    problem = mlp_problem(ours, **cut)
    optimizer = Backprop(3, rule, {"start": 0.05, "end": 0.01}, batch_size=7)  # the last batch has 3 samples
    expected = [plain_training(optimizer, problem, seed, oracle, theirs, 3) for seed in SEEDS]
    state = optimizer.init(problem, SEEDS)
    for epoch in range(3):
        optimizer.step(problem, state)
        for s in range(len(SEEDS)):
            torch.testing.assert_close(state.theta.flat()[s], expected[s][epoch], rtol=1e-8, atol=1e-9)


def test_training_of_a_convolutional_network_is_a_plain_pytorch_loop(conv_problem):
    problem, oracle = conv_problem(CrossEntropy()), RULES["adam"][1]
    optimizer = Backprop(2, Adam(), {"start": 0.01, "end": 0.0}, batch_size=4)
    state = optimizer.init(problem, SEEDS)
    for _ in range(2):
        optimizer.step(problem, state)
    for s, seed in enumerate(SEEDS):
        expected = plain_training(optimizer, problem, seed, oracle, nn.CrossEntropyLoss(), 2)[-1]
        torch.testing.assert_close(state.theta.flat()[s], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "cut", [{"after": []}, {"after": "conv3_x"}, {"after": ["conv1", "conv2_x.0", "conv4_x"]}], ids=str
)
def test_training_of_a_resnet_is_a_plain_pytorch_loop_running_statistics_included(resnet_problem, cut):
    problem, oracle = resnet_problem(**cut), RULES["momentum"][1]
    optimizer = Backprop(2, SGD(0.9), {"start": 0.01, "end": 0.0}, batch_size=6)
    state = optimizer.init(problem, SEEDS)
    for _ in range(2):
        optimizer.step(problem, state)
    for s, seed in enumerate(SEEDS):
        expected = plain_training(optimizer, problem, seed, oracle, nn.CrossEntropyLoss(), 2)[-1]
        trained = torch.cat([state.theta.flat()[s], state.theta.buffers[s]])
        torch.testing.assert_close(trained, expected, rtol=1e-7, atol=1e-8)


def test_diagnostics_are_the_spectral_norms(mlp_problem):
    problem = mlp_problem()
    optimizer = Backprop(1, SGD(), 0.1, batch_size=8)
    state = optimizer.init(problem, SEEDS)
    values = optimizer.diagnostics(problem, state)
    assert set(values) == {"sigma_1", "sigma_2", "sigma_3"}
    weight = problem.blocks.export(state.theta, 1).fc2.linear.weight.detach()
    torch.testing.assert_close(values["sigma_2"][1], torch.linalg.svdvals(weight)[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("batch_size", [0, 25])
def test_a_wrong_batch_size_is_refused_by_name(mlp_problem, batch_size):
    optimizer = Backprop(1, SGD(), 0.1, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"^batch_size"):
        optimizer.step(mlp_problem(), optimizer.init(mlp_problem(), SEEDS))


def test_a_wrong_number_of_step_sizes_is_refused_at_once(mlp_problem):
    with pytest.raises(ValueError, match=r"^step_size: 2 values for 3 replicas"):
        Backprop(1, SGD(), [0.1, 0.2], batch_size=8).init(mlp_problem(), SEEDS)
