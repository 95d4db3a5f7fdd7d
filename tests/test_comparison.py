"""What a network computes in PyTorch is what its blocks compute, or it is refused by name when a problem is made."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from admm import comparison
from admm.blocks import split
from admm.layers import check_modules
from admm.losses import CrossEntropy, SquaredError
from admm.models import as_given, initialiser
from admm.optimizers import SGD, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem
from admm.training import train

LABELS = torch.arange(6) % 2


def samples(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def problem(network: nn.Module, x: Tensor | None = None, **cut: object) -> Problem:
    cut = cut or {"after": []}
    return Problem(samples(4) if x is None else x, LABELS, split(network, **cut), CrossEntropy(), lambda module: None)


class Residual(nn.Sequential):
    """With a skip connection and a parameter of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * super().forward(x)


class Plain(nn.Sequential):
    """With nothing of its own."""


class Of(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def hooked(kind: str, layer: nn.Module) -> nn.Module:
    """A layer with a hook that halves its input, its output, or the gradient of either."""
    changes = {
        "register_forward_pre_hook": lambda _, inputs: (inputs[0] / 2,),
        "register_forward_hook": lambda _, inputs, output: output / 2,
        "register_full_backward_hook": lambda _, by_input, by_output: (by_input[0] / 2,),
        "register_full_backward_pre_hook": lambda _, by_output: (by_output[0] / 2,),
    }
    getattr(layer, kind)(changes[kind])
    return layer


HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


def bound(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: 2.0 * nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    return layer


# By what is special about it, a network whose blocks must follow it.
FOLLOWED: dict[str, Callable[[], nn.Sequential]] = {
    "a subclass with a forward": lambda: nn.Sequential(Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)),
    "such a subclass inside": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4))), nn.Linear(4, 2)
    ),
    "in place, on what is its own": lambda: nn.Sequential(
        Residual(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Linear(4, 2)
    ),
    "a subclass without one": lambda: nn.Sequential(Plain(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)),
} | {
    f"{kind} on {name}": lambda kind=kind, make=make: nn.Sequential(
        nn.Linear(4, 4), hooked(kind, make()), nn.Linear(4, 2)
    )
    for kind in HOOKS
    for name, make in {
        "a linear layer": lambda: nn.Linear(4, 4),
        "a ReLU": nn.ReLU,
        "a flatten": nn.Flatten,
        "a nested network": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("make", FOLLOWED.values(), ids=FOLLOWED)
def test_blocks_train_and_export_what_the_network_computes(make):
    network, step = make(), 0.3
    task, twin = problem(network, after=["0"]), make().double()
    twin.load_state_dict(network.state_dict())
    optimizer = Backprop(1, SGD(), step, batch_size=6)
    state = optimizer.init(task, [0])
    torch.testing.assert_close(task.blocks.forward(state.theta, task.x[None])[0], twin(task.x))
    optimizer.step(task, state)
    nn.functional.cross_entropy(twin(task.x), LABELS).backward()
    torch.optim.SGD(twin.parameters(), step).step()
    torch.testing.assert_close(task.blocks.forward(state.theta, task.x[None])[0], twin(task.x))
    torch.testing.assert_close(task.blocks.export(state.theta)(task.x), twin(task.x))


def with_gradient_hook() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 2))
    network[0].weight.register_hook(lambda gradient: 0 * gradient)
    return network


def with_accumulation_hook() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 2))
    network[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return network


def old_weight_norm() -> nn.Sequential:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))


def shared_statistics() -> nn.Sequential:
    norm = nn.BatchNorm1d(4, affine=False)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 2))


class Counting(nn.Module):
    """Another function at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float(self.calls)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return x


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return x


class Averaging(nn.Module):
    """Statistics of the samples that change in training, in a buffer or in a plain attribute."""

    def __init__(self, dtype: torch.dtype, is_buffer: bool = True) -> None:
        super().__init__()
        self.statistics: Tensor
        if is_buffer:
            self.register_buffer("statistics", torch.zeros(2, dtype=dtype))
        else:
            self.statistics = torch.zeros(2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.statistics += (x > 0).sum(0).to(self.statistics)
        return x


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(nn.functional.normalize(self.weight.data))
        return super().forward(x)


class Checkpointed(nn.Linear):
    """Its backward pass evaluates `inner` once more, when the replica's parameters have gone."""

    def __init__(self, before: int, after: int, use_reentrant: bool = False) -> None:
        super().__init__(before, after)
        self.norm, self.use_reentrant = nn.BatchNorm1d(after), use_reentrant

    def inner(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return outputs


class Following(nn.Linear):
    """A frozen parameter follows the trained one."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.teacher = nn.Parameter(torch.zeros(after, before), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.teacher.data.lerp_(self.weight.data, 0.1)
        return super().forward(x) + x @ self.teacher.T


class Counted(nn.Module):
    """A count before the cut, and a use of it behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.calls: Tensor
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.last(self.first(x) * self.calls)


class CountedByData(Counted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.data += 1.0
        return self.last(self.first(x))


class ActNorm(nn.Module):
    """Parameters that the first samples in training set (Kingma & Dhariwal 2018, Glow)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.ones(features))
        self.is_set: Tensor
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.is_set:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.scale.copy_(1.0 / x.std(0))
                self.is_set.fill_(True)
        return (x + self.shift) * self.scale


class Bounded(nn.Linear):
    """Its weight is scaled down where it has grown beyond a bound, in place or to a new tensor."""

    def __init__(self, bound: float, in_place: bool) -> None:
        super().__init__(4, 4)
        self.bound, self.in_place = bound, in_place

    def forward(self, x: Tensor) -> Tensor:
        largest = self.weight.detach().abs().max()
        if largest > self.bound:
            if self.in_place:
                with torch.no_grad():
                    self.weight.mul_(self.bound / largest)
            else:
                self.weight.data = self.weight.data * (self.bound / largest)
        return super().forward(x)


def bounded(bound: float, in_place: bool = True) -> nn.Sequential:
    return nn.Sequential(Bounded(bound, in_place), nn.Tanh(), nn.Linear(4, 2))


class Differentiated(nn.Linear):
    """The gradient of a function by each sample."""

    def forward(self, x: Tensor) -> Tensor:
        linear = super().forward
        return torch.func.vmap(torch.func.grad(lambda v: linear(v).tanh().sum()))(x)


class Hashed(nn.Module):
    """A whole number that float32 does not hold, and a count of one entry."""

    def __init__(self) -> None:
        super().__init__()
        self.prime: Tensor
        self.calls: Tensor
        self.register_buffer("prime", torch.tensor(2_654_435_761))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * ((1 + (x > 0.0).long()) * self.prime % 7)


class Unset(nn.Module):
    """A buffer that is not a number, in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.tensor([torch.nan, torch.inf, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value.nan_to_num(posinf=2.0)


def unset() -> nn.Sequential:
    layer = Unset()
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), layer), layer, nn.Linear(4, 2))


class Scaled(nn.Module):
    """Parameters that are a single number, none, and not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(0, 4))
        self.unused = nn.Parameter(torch.tensor(torch.nan), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp() + self.empty.sum()


# By what is special about a layer, a network of it. The weights are at most 0.5 at the start.
TREATED: dict[str, Callable[[], nn.Sequential]] = {
    "starts from the data": lambda: nn.Sequential(nn.Linear(4, 4), ActNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "a bound in place": lambda: bounded(0.2),
    "a bound by a new tensor": lambda: bounded(0.2, in_place=False),
    "a bound that is met later": lambda: bounded(0.5),
    "activations that are computed once more": lambda: nn.Sequential(Checkpointed(4, 4), Checkpointed(4, 2)),
    "a derivative": lambda: nn.Sequential(nn.Linear(4, 4), Differentiated(4, 4), nn.Linear(4, 2)),
    "whole numbers": lambda: nn.Sequential(nn.Linear(4, 4), Hashed(), nn.Linear(4, 2)),
    "no number": unset,
    "a single number": lambda: nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Tanh(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("after", [[], ["0"]], ids=["one block", "two blocks"])
@pytest.mark.parametrize("make", TREATED.values(), ids=TREATED)
def test_special_layers_train_as_in_pytorch(make, after):
    """Stacked replicas, too, each of which has parameters of its own that change."""
    network = make().double()
    task, twin = problem(network, after=after), copy.deepcopy(network)
    task = replace(task, initialise=as_given)
    optimizer, reference = Backprop(10, SGD(), 1.0, batch_size=6), torch.optim.SGD(twin.parameters(), 1.0)
    state = optimizer.init(task, [0, 0])
    for _ in range(10):
        state = optimizer.step(task, state)
        reference.zero_grad()
        nn.functional.cross_entropy(twin(task.x), LABELS).backward()
        reference.step()
    for replica in range(2):
        exported = task.blocks.export(state.theta, replica).state_dict()
        torch.testing.assert_close(dict(exported), dict(twin.state_dict()), equal_nan=True)
    assert not isinstance(twin[0], Bounded) or twin[0].weight.abs().max() > 0.99 * twin[0].bound


@pytest.mark.parametrize("optimizer", [BlockADMM, OnlineBlockADMM, Gotmare])
@pytest.mark.parametrize("make", TREATED.values(), ids=TREATED)
def test_block_methods_train_such_layers(make, optimizer):
    torch.manual_seed(0)
    task, method = problem(make().double(), after=["0"]), optimizer(8, 0.1, batch_size=6)
    state = method.init(task, [0, 1])
    history = train(task, method, state, evaluate_every=8)
    first, last = (np.mean([row["train_loss"] for row in history.rows if row["iteration"] == k]) for k in (0, 8))
    assert last < 0.97 * first


@pytest.mark.parametrize(
    "name", ["starts from the data", "a bound in place", "activations that are computed once more"]
)
def test_diagnostics_leave_what_such_layers_change(name):
    task, method = problem(TREATED[name]().double(), after=["0"]), BlockADMM(8, 0.1, batch_size=6)
    state = method.step(task, method.init(task, [0, 1]))
    before = state.theta.flat(), state.theta.buffers.clone()
    method.diagnostics(task, state)
    assert all(map(torch.equal, before, (state.theta.flat(), state.theta.buffers)))


class OfTraining(nn.Module):
    """A function in training, and the identity in evaluation."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x) if self.training else x


class Two(nn.Module):
    """Two activations, the second of which has a gradient in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        other = self.other(x)
        return self.one(x), other if self.training else other.detach()


class Sum(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h) if self.training else self.last(2.0 * h)


def tied(of_first: Callable[[nn.Parameter], nn.Parameter] | None = None) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    if of_first is None:
        network[2].weight.data = network[0].weight.data.T
    else:
        network[2].weight = of_first(network[0].weight)
    return network


def with_buffer() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 2))
    network[0].register_buffer("diagonal", network[0].weight.data.diagonal())
    return network


def in_one_storage() -> nn.Sequential:
    """As an LSTM's weights on a GPU."""
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(network.parameters()), network.parameters())
    return network


def in_columns() -> nn.Sequential:
    network, columns = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), torch.randn(3, 8)
    network[0].weight.data, network[1].weight.data = columns[:, :4], columns[:, 4:]
    return network


def expanded_and_empty() -> nn.Sequential:
    network, row = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), torch.randn(2, 4)
    network[0].weight.data, network[1].weight.data = row[0].expand(3, 4), row[1].expand(3, 4)
    for layer in network:
        layer.register_buffer("none", row[:, :0])
    return network


def frozen_and_tied() -> nn.Sequential:
    return tied().requires_grad_(False)


def the_same_parameter() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


SHARING_NO_MEMORY = [in_one_storage, in_columns, expanded_and_empty, frozen_and_tied, the_same_parameter]


class Holding(nn.Module):
    """A layer that holds something in an attribute."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.last, self.held = nn.Linear(4, 2), held

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def test_what_a_list_holds_besides_may_be_frozen_or_a_layer_of_the_network():
    network = Holding([nn.Linear(4, 4).requires_grad_(False), nn.ReLU, "a name"])
    network.same = {"last": network.last}
    check_modules(network)


@pytest.mark.parametrize("make", SHARING_NO_MEMORY)
def test_what_is_trained_as_pytorch_does_is_not_refused_for_its_memory(make):
    check_modules(make())


@pytest.mark.parametrize("seed", range(3))
def test_rounding_errors_that_batch_normalisation_magnifies_are_no_difference(seed):
    """At 1×1 it is over as many values as there are samples, and errors depend on the memory format of the images."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(seed)
    problem(models.shufflenet_v2_x0_5(num_classes=2), torch.rand(6, 3, 32, 32), after=["stage3"])


# By what is wrong, a network and what is said.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a forward of an instance": (
        lambda: nn.Sequential(bound(nn.Linear(4, 2))),
        r"layer '0' \(Linear\) has its own `forward`, .*make it a subclass",
    ),
    "a forward of an instance inside": (
        lambda: nn.Sequential(Residual(bound(nn.Linear(4, 4)))),
        r"layer '0.0' \(Linear\) has its own `forward`",
    ),
    "a gradient hook": (with_gradient_hook, r"layer '0' \(Linear\) has parameters with gradient hooks"),
    "a hook of accumulation": (with_accumulation_hook, r"layer '0' \(Linear\) has parameters with gradient hooks"),
    "layers in a list": (
        lambda: nn.Sequential(Holding([nn.Linear(4, 4)])),
        r"layer '0' \(Holding\) has trained parameters in its list 'held', .* take nn.ModuleList",
    ),
    "layers in a nested dictionary": (
        lambda: Holding({"a": [nn.Linear(4, 4)]}),
        r"in its dict 'held', .*nn.ModuleDict",
    ),
    "parameters in a tuple": (lambda: Holding((nn.Parameter(torch.ones(2)),)), r"in its tuple .*nn.ParameterList"),
    "a lazy layer without parameters": (
        lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 2)),
        r"layer '0' \(LazyBatchNorm1d\) is lazy",
    ),
    "a weight tied by its data": (
        tied,
        r"network: '0.weight' and '2.weight' share memory, .*functional.linear",
    ),
    "a parameter that is a view of another": (
        lambda: tied(lambda p: nn.Parameter(p[:2, 1:])),
        r"network: '0.weight' and '2.weight' share memory",
    ),
    "a buffer that is a view of a parameter": (with_buffer, r"network: '0.weight' and '0.diagonal' share memory"),
    "what cannot be copied": (old_weight_norm, r"network: cannot be copied, as each seed needs it: "),
    "a failed assertion": (
        lambda: nn.Sequential(Of(lambda x: (_ for _ in ()).throw(AssertionError("even sizes only")))),
        r"cannot be evaluated on samples \[4\]: layer '0' \(Of\): AssertionError: even sizes only",
    ),
    "a sum over the samples": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: x.sum(0))),
        r"network: its outputs for 4 samples are .*\[2\].*; they must have an axis of samples",
    ),
    "NumPy's random numbers": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: x * np.random.random())),
        r"network: in evaluation mode layer '1' \(Of\) returns something else at a second call .* NumPy's",
    ),
    "Python's random numbers": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: x * random.random())),
        r"network: in evaluation mode layer '1' \(Of\) returns something else at a second call",
    ),
    "NumPy's random numbers without an effect on a few samples": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: x + (np.random.random() > 2.0))),
        r"network: in evaluation mode its forward draws random numbers of NumPy's or Python's global generator",
    ),
    "a generator of its own": (
        lambda: nn.Sequential(nn.Linear(4, 2), OwnGenerator()),
        r"network: in training mode layer '1' \(OwnGenerator\) returns something else at a second call",
    ),
    "a count of calls outside of its buffers": (
        lambda: nn.Sequential(nn.Linear(4, 2), Counting()),
        r"in evaluation mode layer '1' \(Counting\) changes its attribute 'calls' at each call, .* a buffer",
    ),
    "a count of training steps without an effect": (
        lambda: nn.Sequential(nn.Linear(4, 2), Steps()),
        r"in training mode layer '1' \(Steps\) changes its attribute 'steps' at each call",
    ),
    "a list that grows": (
        lambda: nn.Sequential(nn.Linear(4, 2), Keeping()),
        r"layer '1' \(Keeping\) changes its attribute 'kept'",
    ),
    "an average outside of its buffers": (
        lambda: nn.Sequential(nn.Linear(4, 2), Averaging(torch.float64, is_buffer=False)),
        r"layer '1' \(Averaging\) changes its attribute 'statistics'",
    ),
    "whole numbers as statistics": (
        lambda: nn.Sequential(nn.Linear(4, 2), Averaging(torch.int64)),
        r"changes '1.statistics' \(torch.int64, \[2\]\), and .* buffers of floating point, and those of a single whole",
    ),
    "a parameter that is replaced": (
        lambda: nn.Sequential(Normalised(4, 2)),
        r"its forward replaces the parameter '0.weight', .* by `.data.copy_`",
    ),
    "complex parameters": (
        lambda: nn.Sequential(nn.Linear(4, 2).to(torch.complex64)),
        r"parameter '0.weight' is of torch.complex64, and numbers of floating point are trained",
    ),
    "checkpoints that need all gradients at once": (
        lambda: nn.Sequential(nn.Linear(4, 4), Checkpointed(4, 2, use_reentrant=True)),
        r"network: block 1 has no gradient: RuntimeError: When use_reentrant=True, .*set use_reentrant=False",
    ),
    "a frozen parameter that changes": (
        lambda: nn.Sequential(Following(4, 2)),
        r"its forward changes '0.teacher' \(torch.float64, \[2, 4\]\), and .* trained parameters, buffers",
    ),
    "complex statistics": (
        lambda: nn.Sequential(nn.Linear(4, 2), Averaging(torch.complex64)),
        r"its forward changes '1.statistics' \(torch.complex128, \[2\]\)",
    ),
    "a buffer of several blocks": (lambda: Counted(), r"its forward changes 'calls', which several blocks use"),
    "a change that a trace loses": (
        lambda: CountedByData(),
        r"in training mode its forward leaves other values in 'calls' than the blocks do; where the line .* is traced",
    ),
    "no gradient": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: x.exp().add_(1.0).mul_(2.0)), nn.Sigmoid(), nn.ReLU(True)),
        r"network: block 1 has no gradient: RuntimeError: one of the variables .* modified by an inplace operation",
    ),
    "a number of samples among the outputs": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: {"z": x, "n": len(x)})),
        "its outputs have a int that depends on the samples",
    ),
    "classes among the outputs": (
        lambda: nn.Sequential(nn.Linear(4, 2), Of(lambda x: (x, x.argmax(1)))),
        r"its outputs have a tensor of torch.int64 that depends on the samples",
    ),
    "outputs of training alone": (
        lambda: nn.Sequential(nn.Linear(4, 2), OfTraining(lambda z: (z, z))),
        "it returns a tuple of 2 tensors in training mode, and a Tensor of 1 in evaluation mode",
    ),
    "a forward that asks for its mode": (
        lambda: Asking(),
        r"something else in evaluation mode, at .*test_comparison.py:\d+, 'return self.last\(h\) if self.training",
    ),
    "a lazy layer": (
        lambda: nn.Sequential(nn.LazyLinear(2)),
        r"layer '0' \(LazyLinear\) is lazy; evaluate the network",
    ),
    "statistics of two layers": (
        shared_statistics,
        r"its forward changes '1.\w+', which several blocks use; give each block a module of its own",
    ),
}


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.random = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(1, generator=self.random) if self.training else x


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_the_blocks_would_not_follow_is_refused_by_name(make, message):
    network = make()
    with pytest.raises((ValueError, TypeError), match=message):
        cut = ["first"] if isinstance(network, Asking | Counted) else ["1"] if "several" in message else []
        problem(network, after=cut)


def test_the_first_block_that_differs_is_named(monkeypatch):
    """Of a layer that the blocks would evaluate wrongly, whatever it is."""
    monkeypatch.setattr("admm.layers.ReLULayer.forward", lambda self, theta, x, inplace, training: x)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(network[1].bias, -10.0)
    with pytest.raises(ValueError, match=r"network: in evaluation mode block 2, \['1', '2'\], has other outputs"):
        problem(network, per_layer=True)


def test_a_layer_that_occurs_twice_is_no_difference():
    relu = nn.ReLU()
    task = problem(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2)), after=["1", "3"])
    torch.testing.assert_close(task.blocks.forward(task.initial([0]), task.x[None])[0], task.blocks.network(task.x))


def test_later_changes_of_the_network_are_none_of_the_blocks():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    task = problem(network)
    before = task.initial([0]).flat().clone()
    hooked("register_forward_hook", network[1])
    nn.init.zeros_(network[0].weight)
    assert torch.equal(task.initial([0]).flat(), before)
    assert not task.blocks.export(task.initial([0]))[1]._forward_hooks


def test_hooks_of_a_network_that_is_cut_are_named():
    network = hooked("register_forward_hook", nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    problem(network, after=[])
    with pytest.raises(ValueError, match=r"block 2, .*; the hooks of the network itself are not called, as it is cut"):
        problem(network, after=["1"])


def test_a_block_that_changes_what_it_gets_in_place_is_named():
    blocks = split([Of(lambda x: (x, x)), Twice(4, 2), nn.Tanh()])
    with pytest.raises(ValueError, match=r"block 3, .*; block 2 changes in place what crosses the cut before it"):
        Problem(samples(4, dtype=torch.float32), LABELS, blocks, CrossEntropy(), as_given)


class Twice(nn.Linear):
    """Changes one of two arguments, and takes the other."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        one.add_(1.0)
        return super().forward(other)


def test_hooks_of_all_modules_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output * 2)
    try:
        with pytest.raises(ValueError, match="network: hooks of all modules would be called"):
            problem(nn.Sequential(nn.Linear(4, 2)))
    finally:
        handle.remove()


def test_a_state_that_changes_from_call_to_call_is_compared_from_the_same_start():
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    before = network[0].parametrizations.weight[0]._u.clone()
    task = problem(network)
    assert torch.equal(task.blocks.network[0].parametrizations.weight[0]._u, before)


def test_the_network_its_mode_and_the_random_state_are_left_alone():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    problem(network)
    assert torch.equal(torch.get_rng_state(), state) and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("first", [nn.Flatten(), nn.Linear(4, 4).requires_grad_(False)], ids=["flatten", "frozen"])
def test_a_chain_can_be_cut_after_layers_that_are_not_trained(first):
    network = nn.Sequential(first, nn.Linear(4, 2))
    task, twin = problem(network, after=["0"]), copy.deepcopy(network).double()
    optimizer = Backprop(1, SGD(), 0.3, batch_size=6)
    state = optimizer.step(task, optimizer.init(task, [0]))
    nn.functional.cross_entropy(twin(task.x), LABELS).backward()
    torch.optim.SGD(twin[1].parameters(), 0.3).step()
    torch.testing.assert_close(task.blocks.export(state.theta)(task.x), twin(task.x))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)], ids=str)
def test_networks_that_normalise_over_the_samples_train(norm):
    task = problem(nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 2)))
    optimizer = Backprop(1, SGD(), 0.1, batch_size=3)
    state = optimizer.step(task, optimizer.init(task, [0, 1]))
    exported = task.blocks.export(state.theta, 1)
    torch.testing.assert_close(task.blocks.forward(state.theta, task.x.expand(2, -1, -1))[1], exported(task.x))


def test_the_comparison_is_made_once_for_samples_of_a_kind(monkeypatch):
    calls = []
    compare = comparison._compared
    monkeypatch.setattr(
        comparison,
        "_compared",
        lambda blocks, x, expected: calls.append(expected.training) or compare(blocks, x, expected),
    )
    blocks, x = split(nn.Sequential(nn.Linear(4, 2)), after=[]), samples(4)
    for part in (x, x[:3]):
        Problem(part, LABELS[: len(part)], blocks, CrossEntropy(), initialiser("pytorch"))
    assert calls == [False, True]
    Problem(x.float(), LABELS, blocks, CrossEntropy(), initialiser("pytorch"))
    assert len(calls) == 4


def test_parameters_that_inputs_are_not_precise_enough_for_are_refused():
    network = nn.Sequential(nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"parameter '0.weight' is of torch.float64, x of torch.float32.*network.to\("):
        problem(network, samples(4, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"of torch.float64, x of torch.uint8: take x.to\(torch.float64\)$"):
        problem(network, samples(4).byte())


class Asked(nn.Module):
    """A trace finds another answer; the outputs are zeros and -inf."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        z = self.last(2.0 * h if isinstance(h, Tensor) else h)
        return z.masked_fill(torch.arange(2) == 1, -torch.inf)


@pytest.mark.parametrize("zero", [False, True])
def test_outputs_that_are_zero_or_not_finite_hide_no_difference(zero):
    with pytest.raises(ValueError, match=r"block 2, \['last'\], has other outputs than these layers"):
        problem(Asked(zero), after=["first"])


def test_a_gradient_that_training_alone_has_is_not_lost():
    """It would be, as what crosses a cut without a gradient is carried as it is."""
    with pytest.raises(ValueError, match="block 1 hands on other values in training mode than in evaluation mode"):
        Problem(samples(4), LABELS, split([Two(), Sum()]), CrossEntropy(), lambda module: None)


def test_parameters_of_less_precision_take_that_of_the_inputs():
    task = problem(nn.Sequential(nn.Linear(4, 2)), samples(4))
    assert task.initial([0]).flat().dtype == torch.float64


class Spectral(nn.Module):
    """A complex filter, in a buffer and in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter: Tensor
        self.register_buffer("filter", torch.randn(3, dtype=torch.complex64))
        self.other = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter * self.other, n=4)


def test_complex_tensors_of_a_network_keep_their_imaginary_part_in_the_type_of_the_inputs():
    network = nn.Sequential(nn.Linear(4, 4), Spectral(), nn.Linear(4, 2))
    task = replace(problem(network, after=["0"]), initialise=as_given)
    with torch.no_grad():
        expected = network(task.x.float())
    assert network[1].filter.imag.abs().min() > 0.0 and task.blocks.dtype == torch.float64
    for outputs in (
        task.blocks.forward(task.initial([0]), task.x[None])[0],
        task.blocks.export(task.initial([0]))(task.x),
    ):
        torch.testing.assert_close(outputs.float(), expected)


NORMS = {
    "batch normalisation": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "after an average over the image": nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()
    ),
}


@pytest.mark.parametrize("network", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", ["batch_size", "slice_size"])
@pytest.mark.parametrize("size", [1, 5])
def test_a_size_that_leaves_one_sample_to_be_normalised_is_refused_before_training(network, name, size):
    task, options = problem(network, after=["0"]), {"batch_size": 6} | {name: size}
    optimizer = BlockADMM if name == "slice_size" else Backprop
    arguments = (1, 0.1) if name == "slice_size" else (1, SGD(), 0.1)
    with pytest.raises(ValueError, match=rf"^{name}: {size} leaves one of the 6 samples alone, and .*BatchNorm\dd\)"):
        optimizer(*arguments, **options).init(task, [0])


def test_one_sample_alone_is_no_matter_where_it_has_several_values():
    """As the pixels of an image, or statistics that are not those of the samples."""
    images = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    pinned = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    for network in (images, pinned):
        task, optimizer = problem(network), Backprop(1, SGD(), 0.1, batch_size=5)
        assert optimizer.step(task, optimizer.init(task, [0])).iteration == 1


def test_outputs_of_several_axes_are_compared_too():
    x = samples(3, 4)
    task = Problem(
        x, samples(3, 2), split(nn.Sequential(nn.Linear(4, 2)), after=[]), SquaredError(), initialiser("pytorch")
    )
    assert task.y.shape == (6, 3, 2)
