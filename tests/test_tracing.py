"""Networks that are no chain: where they are cut, what crosses the cuts, and what cannot be traced."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from admm.blocks import split
from admm.losses import CrossEntropy
from admm.models import as_given
from admm.optimizers import SGD, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Problem, ZUpdate
from admm.optimizers.coupling import AugmentedLagrangian
from admm.training import evaluate
from admm.visits import Visit

LABELS = torch.arange(6) % 3


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    """Layers a, b, c and d of width 4, and a last one for three classes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))
            self.last = nn.Linear(4, 3, dtype=torch.float64)


class Chain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


class Frozen(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)


class Skips(Base):
    """One skip connection over one cut and one over all."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).tanh()
        b = self.b(a).tanh() + a
        c = self.c(b).tanh()
        return self.last(self.d(c).tanh() + b + a)


class Shapes(Base):
    """Numbers that are taken from an activation before the cut and used after it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        n, d = h.shape
        h = self.b(h).view(n, 2, d // 2)
        return self.last(self.c(h.reshape(n, d)))


class Detached(Base):
    """A value that depends on parameters, but has no gradient, crosses the cut."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        largest = h.argmax(1)
        scale = h.detach().abs().sum(1, keepdim=True)
        return self.last(self.b(h).tanh() * scale + functional.one_hot(largest, 4).double())


class Masked(Base):
    """What depends on the inputs alone crosses both cuts."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        mask = (x > 0).double()
        h = self.b(self.a(x) * mask).tanh()
        return self.last(self.c(h) * mask * scale)


class Moved(Base):
    """Activations with the samples on the second axis, and joined with another one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.view(-1, 2, 4)).transpose(0, 1)  # [2, n, 4]
        h = self.b(h).tanh()
        flat = self.c(h.transpose(0, 1).reshape(-1, 4))  # [2n, 4]
        return self.last(self.d(flat).view(-1, 2, 4).sum(1))


class Table(Base):
    """A product of parameters alone crosses the cut: it has no axis of samples."""

    def forward(self, x: Tensor) -> Tensor:
        table = self.a.weight @ self.b.weight
        return self.last(self.c(self.d(x)).tanh() @ table)


class OfAll(Base):
    """A mean over the samples crosses the cuts."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        mean = self.b(h).mean(0)
        return self.last(self.d(self.c(h).tanh()) * mean)


class Pair(Base):
    """Two inputs per sample, joined on the samples' axis or not; the crossing activations are the same."""

    def __init__(self, is_joined: bool) -> None:
        super().__init__()
        self.is_joined = is_joined

    def forward(self, x: Tensor) -> Tensor:
        one, other = x[:, :4], x[:, 4:]
        h = self.a(torch.cat([one, other]) if self.is_joined else torch.stack([one, other], 1))
        return self.last(torch.stack(torch.tensor_split(h.tanh(), 2)).prod(0) if self.is_joined else h.tanh().prod(1))


@pytest.mark.parametrize("sweep", ["batch", "minibatch"])
def test_stored_variables_are_those_of_their_samples_wherever_these_are(sweep):
    """Rows of one sample that are far apart would be another's in the next mini-batch."""
    results = []
    for is_joined in (False, True):
        blocks = split(Pair(is_joined), ["a"])
        task = Problem(gaussian(6, 8), LABELS, blocks, CrossEntropy(), as_given)
        values = {"z_step": 0.1, "beta": 0.5, "theta_update": SGD()}
        optimizer = BlockADMM(3, 0.1, batch_size=2, sweep=sweep, forward_mixing=0.1, **values)
        state = optimizer.init(task, [0])
        for _ in range(3):
            optimizer.step(task, state)
        results.append(state.theta.flat())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lstm = nn.LSTM(2, 4, batch_first=True, dtype=torch.float64)
            self.last = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (h, _) = self.lstm(x.view(-1, 2, 2))
        return self.last(outputs[:, -1] + h[0])


class Cube(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * gradient


class OwnBackward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(Cube.apply(self.a(x))) + Cube.apply(x))


def passed_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapped(self: Base, *args: Tensor, **kwargs: Any) -> Tensor:
        assert kwargs.pop("return_dict", None) is None
        return forward(self, *args, **kwargs)

    return wrapped


class Decorated(Base):
    """As Hugging Face's networks are."""

    @passed_on
    def forward(self, x: Tensor, scale: float = 2.0, *others: Tensor, **options: Any) -> Tensor:
        return self.last(self.b(self.a(x).tanh() * scale, **options))


class Repeated(Base):
    """A module with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.a, self.a])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.last(x)


# A network, its cuts, and the width of its coupling variables.
NETWORKS: dict[str, tuple[type[nn.Module], list[str], list[int]]] = {
    "chain": (Chain, ["a", "b"], [4, 4]),
    "skips": (Skips, ["a", "c"], [4, 12]),
    "shapes": (Shapes, ["a", "b"], [4, 4]),
    "frozen between cuts": (Frozen, ["a", "b"], [4, 4]),
    "no gradient": (Detached, ["b"], [4]),
    "inputs alone": (Masked, ["a", "b"], [4, 4]),
    "samples elsewhere": (Moved, ["a", "c"], [8, 8]),
    "parameters alone": (Table, ["d", "c"], [20, 20]),
    "of all samples": (OfAll, ["c", "d"], [8, 8]),
    "tuples": (Tuples, ["lstm"], [8]),
    "a backward of its own": (OwnBackward, ["a"], [4]),
    "a decorated forward": (Decorated, ["a"], [4]),
    "another name": (Repeated, ["layers.1"], [4]),
}
each_network = pytest.mark.parametrize("make, after, widths", NETWORKS.values(), ids=NETWORKS)


def problem(make: type[nn.Module], after: list[str], **options) -> Problem:
    return Problem(
        gaussian(6, 8 if make is Moved else 4), LABELS, split(make(), after, **options), CrossEntropy(), as_given
    )


@each_network
def test_blocks_compute_what_the_network_does(make, after, widths):
    task = problem(make, after)
    assert len(task.blocks) == len(after) + 1
    theta = task.initial([0, 1])
    expected = make()(task.x)
    torch.testing.assert_close(
        task.blocks.forward(theta, task.x.expand(2, *task.x.shape))[1], expected, rtol=1e-12, atol=0
    )
    few = task.blocks.forward(theta, task.x[None, :3].expand(2, 3, -1))[0]
    torch.testing.assert_close(few, make()(task.x[:3]), rtol=1e-12, atol=1e-14)
    visit = task.visit((0, 1), slice(None))
    outputs = list(task.blocks.outputs(theta, visit.x, visit))
    assert [z.flatten(2).shape[2] for z in outputs[:-1]] == widths
    assert all(z.shape[:2] == (2, 6) for z in outputs)
    exported = task.blocks.export(theta)
    assert {k: v.tolist() for k, v in exported.state_dict().items()} == {
        k: v.tolist() for k, v in make().state_dict().items()
    }


@each_network
def test_the_step_of_back_propagation_is_pytorch_s(make, after, widths):
    task, twin = problem(make, after), make()
    optimizer = Backprop(1, SGD(momentum=0.9), 0.3, batch_size=6)
    state = optimizer.init(task, [0])
    rule = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], 0.3, momentum=0.9)
    for _ in range(3):
        optimizer.step(task, state)
        rule.zero_grad()
        functional.cross_entropy(twin(task.x), LABELS).backward()
        rule.step()
    trained = dict(task.blocks.export(state.theta).named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-10, atol=1e-12, msg=name)


@each_network
@pytest.mark.parametrize("method", ["online", "block-admm", "gotmare"])
def test_for_small_steps_each_block_moves_along_back_propagation(make, after, widths, method):
    """By a positive factor per block; the step is long, as the factors are small."""
    zeta, task = 3e-4, problem(make, after)
    options = {"z_step": zeta, "batch_size": 6}
    if method == "gotmare":
        optimizer = Gotmare(1, 1e9, rho=1.0, theta_update=SGD(), **options)
    else:
        kind = OnlineBlockADMM if method == "online" else BlockADMM
        optimizer = kind(1, 1e9, beta=1.0, z_update=ZUpdate("gradient"), theta_update=SGD(), **options)
    state, start = optimizer.init(task, [0]), task.initial([0])
    optimizer.step(task, state)
    moved = start.flat() - state.theta.flat()
    twin = make()
    functional.cross_entropy(twin(task.x), LABELS).backward()
    gradients, columns = dict(twin.named_parameters()), task.blocks.parameter_slices()
    for block, views in zip(task.blocks.modules, task.blocks.parameters(moved).blocks, strict=True):
        names = [name for name, p in block.named_parameters() if p.requires_grad]
        if not names:
            continue
        ours = torch.cat([moved[0, columns[name]] for name in names])
        true = torch.cat([gradients[name].grad.flatten() for name in names])
        assert 1.0 - functional.cosine_similarity(ours, true, dim=0) < 1e-5, names
        assert views


@each_network
def test_gradients_by_z_are_differences_of_the_lagrangian(make, after, widths):
    task = problem(make, after)
    theta, beta = task.initial([0, 1]), torch.tensor([[0.5, 2.0]], dtype=torch.float64).expand(len(after) + 1, 2)
    visit = task.visit((0, 1), slice(None))
    z = [output + 0.1 * gaussian(*output.shape) for output in task.blocks.outputs(theta, visit.x, visit)]
    visit.carried.clear()  # as where Z is stored, and no forward pass comes before
    lagrangian = AugmentedLagrangian(task, theta, beta, visit, z)
    for t in range(1, len(z) + 1):
        direction = gaussian(*z[t - 1].shape)
        slope = (lagrangian.z_gradient(t) * direction).flatten(1).sum(1)
        middle, values = lagrangian.z[t - 1], []
        for step in (1e-6, -1e-6):
            lagrangian.set_z(t, middle + step * direction)
            values.append(lagrangian.value())
        lagrangian.set_z(t, middle)
        torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def test_an_argument_with_a_default_is_left_out_unless_it_is_named():
    blocks = split(Masked(), ["b"])
    assert [node.name for node in blocks.modules[0].graph.nodes if node.op == "placeholder"] == ["x"]
    named = split(Masked(), ["b"], inputs=["x", "scale"])
    assert [node.name for node in named.modules[0].graph.nodes if node.op == "placeholder"] == ["x", "scale"]
    with pytest.raises(ValueError, match=r"inputs: \['y'\] are no arguments of forward, which are x, scale"):
        split(Masked(), ["b"], inputs=["x", "y"])
    with pytest.raises(ValueError, match="inputs: the network's forward needs x, too"):
        split(Masked(), ["b"], inputs=["scale"])


class Branching(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.sum() > 0:
            h = -h
        return self.last(h)


def test_what_cannot_be_traced_names_its_line_and_the_way_out():
    with pytest.raises(
        ValueError, match=r"test_tracing.py:\d+, 'if h.sum\(\) > 0:': TraceError: .*split\(\[first, second"
    ):
        split(Branching(), ["a"])
    assert len(split(Branching(), [])) == 1  # which needs no trace


def counts(self: Base) -> None:
    if self.training:
        self.calls += 1


def keeps(self: Base) -> None:
    self.kept.append(1)


def averages(self: Base) -> None:
    self.average = 0.9 * self.average


def moves(self: Base) -> None:
    if self.training:
        self.average.mul_(0.9)


def drops(self: Base) -> None:
    torch.rand(1)


def shuffles(self: Base) -> None:
    np.random.permutation(2)


def chooses(self: Base) -> None:
    random.random()


class Changing(Base):
    """Calls a function before its second layer, whose effects a trace would not repeat."""

    def __init__(self, function: Callable[[Base], None]) -> None:
        super().__init__()
        self.function, self.calls, self.kept = function, 0, []
        self.register_buffer("average", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.function(self)
        return self.last(self.b(h).tanh())


class Inside(Base):
    """Calls its second layer in a context that a trace would not show."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with self.context():
            h = self.b(h)
        return self.last(h.tanh())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Changing(counts), "'self.calls \\+= 1': ValueError: it sets 'calls' of a Changing, which a trace"),
        (lambda: Changing(keeps), "its forward changes kept, which a trace does not repeat"),
        (lambda: Changing(averages), "'self.average = 0.9 .*it sets 'average' of a Changing, .* module of their own"),
        (lambda: Changing(moves), "something else in evaluation mode, at .*'self.average.mul_.*module of their own"),
        (lambda: Changing(drops), "'return self.last.*random numbers have been drawn before this line, without"),
        (lambda: Changing(shuffles), "random numbers have been drawn before this line"),
        (lambda: Changing(chooses), "random numbers have been drawn before this line"),
        (lambda: Inside(torch.no_grad), "'h = self.b.*is called without gradients, as by torch.no_grad"),
        (lambda: Inside(partial(torch.autocast, "cpu", enabled=False)), "'with self.context.*by torch.autocast"),
    ],
    ids=["count", "list", "buffer", "in place", "torch", "numpy", "python", "no_grad", "autocast"],
)
def test_what_a_trace_would_not_repeat_is_refused_with_its_line(make, message):
    with pytest.raises(ValueError, match=message):
        split(make(), ["a"])
    assert len(split(make(), [])) == 1  # which needs no trace


@pytest.mark.parametrize("name", ["code", "graph"])
def test_a_name_that_a_trace_s_module_has_itself_is_refused(name):
    network = Chain()
    network.register_buffer(name, torch.zeros(1))
    with pytest.raises(ValueError, match=f"network: torch.fx needs the name '{name}' for itself; .* such as {name}_$"):
        split(network, ["a"])
    assert len(split(network, [])) == 1


def test_a_forward_that_cannot_be_traced_is_no_matter_inside_a_block():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4).double(), Branching()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x).tanh())

    task = problem(Outer, ["first"])
    torch.testing.assert_close(task.blocks.forward(task.initial([0]), task.x[None])[0], task.blocks.network(task.x))


@pytest.mark.parametrize(
    "after, message",
    [
        (["x"], "after: no module 'x'; the network's children are a, b, c, d, last"),
        (["b", "a"], r"after: \['b', 'a'\] must name different modules in the order of evaluation"),
        (["a", "a"], r"after: \['a', 'a'\] must name different modules"),
        (["d"], "after: the network's forward does not call 'd'"),
        (["last"], "after: 'last' is the last module, nothing would follow it"),
        ([1], r"after: \[1\] is neither a name of a module, which is text, nor a list of these"),
    ],
)
def test_a_cut_that_is_not_possible_is_refused(after, message):
    with pytest.raises(ValueError, match=message):
        split(Chain(), after)


def test_a_module_inside_another_one_can_end_a_block():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage, self.last = Chain(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.stage(x).tanh())

    blocks = split(Outer(), ["stage.a", "stage"])
    assert blocks.names == (("stage.a",), ("stage.b", "stage.c", "stage.last"), ("last",))
    task = Problem(gaussian(6, 4), LABELS, blocks, CrossEntropy(), as_given)
    torch.testing.assert_close(blocks.forward(task.initial([0]), task.x[None])[0], blocks.network(task.x))


class Dropping(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = functional.dropout(self.a(x), 0.5, self.training)
        return self.last(functional.dropout(self.b(h), p=0.5, training=self.training))


def test_functions_follow_the_mode_of_the_block():
    task = problem(Dropping, ["a"])
    theta = task.initial([0])
    torch.testing.assert_close(task.blocks.forward(theta, task.x[None])[0], task.blocks.network.eval()(task.x))
    outputs = [list(task.blocks.outputs(theta, task.x[None], Visit([0], (k,))))[-1] for k in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


class Differing(Base):
    """Numbers and modes that its functions get depend on its own mode."""

    def forward(self, x: Tensor) -> Tensor:
        h, rate = self.a(x), 0.5 if self.training else 0.0
        h = functional.dropout(self.b(h), rate) * (3.0 if self.training else 2.0)
        return self.last(functional.feature_alpha_dropout(h[:, :, None], 0.5, self.training)[:, :, 0])


def test_arguments_follow_the_mode_of_the_block():
    task = problem(Differing, ["a"])
    theta = task.initial([0])
    torch.testing.assert_close(task.blocks.forward(theta, task.x[None])[0], Differing().eval()(task.x))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = Differing()(task.x)
        torch.manual_seed(5)
        found = list(task.blocks.outputs(theta, task.x[None], Visit([None])))[-1][0]
    torch.testing.assert_close(found, expected)


class Stored(Base):
    """A function of PyTorch's as an attribute, and a question about the type of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = functional.relu

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.activation(self.a(x))
        return self.last(h * mask if isinstance(mask, Tensor) else self.b(h))


def test_functions_that_are_attributes_and_types_are_what_they_are():
    task = problem(Stored, ["b"])
    torch.testing.assert_close(task.blocks.forward(task.initial([0]), task.x[None])[0], Stored()(task.x))


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_is_cut_inside_its_layers(norm_first):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    network = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten())
    network.append(nn.Linear(8, 3, dtype=torch.float64))
    task = Problem(
        gaussian(6, 2, 4), LABELS, split(Wrapped(network), ["inner.0.layers.0.linear1"]), CrossEntropy(), as_given
    )
    expected = network.eval()(task.x)
    torch.testing.assert_close(task.blocks.forward(task.initial([0]), task.x[None])[0], expected)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TwoStreams(nn.Module):
    """A stage that cannot be traced, and hands on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.isnan().any():
            raise ValueError("NaN")
        return self.left(x).tanh(), self.right(x), x > 0


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.last = nn.Linear(6, 3).double()

    def forward(self, left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.cat([left * mask, right], 1))


def test_a_list_of_modules_is_cut_between_them():
    stages = [TwoStreams(), Joined()]
    task = Problem(gaussian(6, 4), LABELS, split(stages), CrossEntropy(), as_given)
    state = (optimizer := Backprop(1, SGD(), 0.1, batch_size=6)).init(task, [0])
    torch.testing.assert_close(task.blocks.forward(state.theta, task.x[None])[0], stages[1](*stages[0](task.x)))
    assert next(task.blocks.outputs(state.theta, task.x[None], Visit([0]))).shape == (1, 6, 6)
    optimizer.step(task, state)
    functional.cross_entropy(stages[1](*stages[0](task.x)), LABELS).backward()
    torch.optim.SGD([p for stage in stages for p in stage.parameters()], 0.1).step()
    torch.testing.assert_close(task.blocks.export(state.theta)(task.x), stages[1](*stages[0](task.x)))
    with pytest.raises(ValueError, match="split: a list of modules is cut between these; give no after"):
        split(stages, after=["0"])


def stages_for_evaluation() -> list[nn.Module]:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh()).double()
    nn.init.constant_(backbone[1].running_mean, 0.5)
    return [backbone, nn.Sequential(nn.Linear(4, 3)).double()]


def stepped(network: Any, **cut: Any) -> tuple[Tensor, Tensor]:
    """Θ and the buffers after a step."""
    task = Problem(gaussian(6, 4), LABELS, split(network, **cut), CrossEntropy(), as_given)
    state = (optimizer := Backprop(1, SGD(), 0.1, batch_size=6)).init(task, [0])
    optimizer.step(task, state)
    return state.theta.flat(), state.theta.buffers


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_stage_in_evaluation_mode_stays_there(is_frozen: bool):
    torch.manual_seed(0)
    backbone, head = stages_for_evaluation()
    backbone.requires_grad_(not is_frozen).eval()
    (theta, buffers), before = stepped([backbone, head]), backbone[1].running_mean.clone()
    assert torch.equal(buffers[0, :4], before) and not backbone.training
    network = nn.Sequential(backbone, head)
    assert all(map(torch.equal, (theta, buffers), stepped(network, after=["0"])))
    functional.cross_entropy(network(gaussian(6, 4)), LABELS).backward()
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1).step()
    expected = nn.utils.parameters_to_vector(p for p in network.parameters() if p.requires_grad)
    torch.testing.assert_close(theta[0], expected)


def test_a_part_of_a_stage_in_evaluation_mode_may_be_in_training_mode():
    torch.manual_seed(0)
    backbone, head = stages_for_evaluation()
    backbone.eval()[1].train()
    _, buffers = stepped([backbone, head])
    hidden = backbone[0](gaussian(6, 4)).detach()
    torch.testing.assert_close(buffers[0, :4], 0.9 * 0.5 + 0.1 * hidden.mean(0))


def test_what_is_in_evaluation_mode_as_a_whole_is_trained_as_in_training_mode():
    torch.manual_seed(0)
    stages = stages_for_evaluation()
    expected = stepped(stages)
    for stage in stages:
        stage.eval()
    assert all(map(torch.equal, stepped(stages), expected))
    assert all(map(torch.equal, stepped(nn.Sequential(*stages).eval(), after=["0"]), expected))


class Fourier(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(torch.fft.fft(self.a(x)).abs()))


class OfFourier(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.kept(torch.fft.fft(self.a(x))).abs())


def test_complex_numbers_cross_no_cut():
    task = problem(Fourier, ["a"])
    torch.testing.assert_close(task.blocks.forward(task.initial([0]), task.x[None])[0], Fourier()(task.x))
    with pytest.raises(ValueError, match=r"block 1 hands on a tensor of torch.complex128, .* torch.view_as_real"):
        problem(OfFourier, ["kept"])


def test_arguments_that_a_block_does_not_take_are_named():
    x = {"x": gaussian(6, 4), "scale": gaussian(6, 1)}
    with pytest.raises(ValueError, match=r"block 1 cannot be evaluated .*scale=Tensor\).*'scale'; `inputs` of split"):
        Problem(x, LABELS, split(Masked(), ["b"]), CrossEntropy(), as_given)
    task = Problem(x, LABELS, split(Masked(), ["b"], inputs=["x", "scale"]), CrossEntropy(), as_given)
    found = task.blocks.forward(task.initial([0]), {name: v[None] for name, v in x.items()})[0]
    torch.testing.assert_close(found, Masked()(**x))


def test_a_stage_may_come_twice():
    layer, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    task = Problem(gaussian(6, 4), LABELS, split([layer, layer, last]), CrossEntropy(), as_given)
    state = (optimizer := Backprop(1, SGD(), 0.1, batch_size=6)).init(task, [0])
    optimizer.step(task, state)
    functional.cross_entropy(last(layer(layer(task.x))), LABELS).backward()
    torch.optim.SGD([*layer.parameters(), *last.parameters()], 0.1).step()
    torch.testing.assert_close(task.blocks.export(state.theta)(task.x), last(layer(layer(task.x))))


class TwoOutputs(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).tanh()
        return {"classes": self.last(h), "rest": self.b(h)}


class Tagger(nn.Module):
    """Scores of each token, with the samples second, and one of each text."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.layer(self.embedding(x.T).tanh())
        return z, z.mean(0)


def test_several_outputs_have_the_shapes_of_the_samples_they_are_of():
    """The blocks see shorter texts, and then longer ones."""

    def loss(outputs, y):
        return outputs[0].square().sum((0, 2)) + functional.cross_entropy(outputs[1], y, reduction="none")

    blocks, tokens = split(Tagger(), ["embedding"]), torch.arange(48).view(6, 8) % 9
    tasks = [Problem(tokens[:, :length], LABELS, blocks, loss, as_given) for length in (5, 8)]
    for task in tasks:
        found = task.loss.value(task.blocks.forward(task.initial([0]), task.x[None]), LABELS[None])
        torch.testing.assert_close(found[0], loss(Tagger()(task.x), LABELS))


class WithConstants(TwoOutputs):
    def forward(self, x: Tensor) -> dict[str, Tensor | float | None]:  # type: ignore[override]
        return super().forward(x) | {"loss": None, "temperature": 2.0}


def test_constants_among_the_outputs_go_to_a_plain_function_too():
    def loss(outputs, y):
        assert outputs["loss"] is None
        return loss_of_two(outputs, y) / outputs["temperature"]

    task = Problem(gaussian(6, 4), LABELS, split(WithConstants(), ["a"]), loss, as_given)
    found = task.loss.value(task.blocks.forward(task.initial([0]), task.x[None]), LABELS[None])
    torch.testing.assert_close(found[0], loss(WithConstants()(task.x), LABELS))


class Output(OrderedDict[str, Tensor]):
    """A dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


pytree.register_pytree_node(
    Output,
    lambda value: (list(value.values()), list(value)),
    lambda values, names: Output(zip(names, values, strict=True)),
)


class Outputs(Base):
    def forward(self, x: Tensor) -> Output:
        h = self.b(self.a(x).tanh())
        return Output(logits=self.last(h), hidden=h)


def test_a_dictionary_of_a_class_of_its_own_stays_one():
    task = Problem(
        gaussian(6, 4),
        LABELS,
        split(Outputs(), ["a"]),
        lambda outputs, y: functional.cross_entropy(outputs.logits, y, reduction="none") + outputs.hidden.sum(1),
        as_given,
    )
    outputs = Outputs()(task.x)
    expected = functional.cross_entropy(outputs.logits, LABELS, reduction="none") + outputs.hidden.sum(1)
    torch.testing.assert_close(
        task.loss.value(task.blocks.forward(task.initial([0]), task.x[None]), LABELS[None])[0], expected
    )


def loss_of_two(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["classes"], y, reduction="none") + outputs["rest"].square().sum(1)


def test_blocks_that_have_not_seen_an_input_refuse_several_values():
    for network, after in ((TwoOutputs(), ["a"]), (Skips(), ["a", "c"])):
        blocks = split(network, after)
        theta = blocks.initial([0], as_given, like=gaussian(0))
        with pytest.raises(ValueError, match="network: a block returns several values; make a Problem first"):
            blocks.forward(theta, gaussian(1, 6, 4))


def test_several_outputs_go_to_a_plain_function_as_they_are():
    task = Problem(gaussian(6, 4), LABELS, split(TwoOutputs(), ["a"]), loss_of_two, as_given)
    state = (optimizer := Backprop(1, SGD(), 0.1, batch_size=6)).init(task, [0])
    twin = TwoOutputs()
    optimizer.step(task, state)
    loss_of_two(twin(task.x), LABELS).mean().backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    torch.testing.assert_close(task.blocks.export(state.theta)(task.x), twin(task.x))
    with pytest.raises(ValueError, match="loss: CrossEntropy takes one output, the network returns 2;"):
        Problem(gaussian(6, 4), LABELS, split(TwoOutputs(), ["a"]), CrossEntropy(), as_given)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_noise_in_evaluation_is_one_draw_for_all_seeds_and_evaluations():
    network = nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 3)).double()
    task = Problem(gaussian(6, 4), LABELS, split(network, ["0"]), CrossEntropy(), as_given)
    theta = task.initial([0, 1])
    first, again = evaluate(task, theta, None), evaluate(task, theta, None)
    assert torch.equal(first["train_loss"], again["train_loss"]) and len(set(first["train_loss"].tolist())) == 1
    exported = task.blocks.export(theta, replica=1)
    assert not torch.equal(exported(task.x), exported(task.x))


class Named(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(x)}


def test_an_output_in_a_dictionary_goes_to_a_plain_function_in_it():
    def loss(outputs, y):
        return functional.cross_entropy(outputs["out"], y, reduction="none")

    for network in (Named(4, 3).double(), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Named(4, 3)).double()):
        after = [] if isinstance(network, Named) else ["0"]
        task = Problem(gaussian(6, 4), LABELS, split(network, after), loss, as_given)
        outputs = task.blocks.forward(task.initial([0]), task.x[None])
        found = task.loss.value(outputs, LABELS[None])
        torch.testing.assert_close(found[0], loss(network(task.x), LABELS))
        of_tensor = Problem(gaussian(6, 4), LABELS, split(network, after), CrossEntropy(), as_given)
        torch.testing.assert_close(of_tensor.loss.value(outputs, LABELS[None]), found)


class Listed(nn.Linear):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(x), x]


class OfList(nn.Linear):
    def forward(self, values: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(values[0] + values[1])


def test_a_list_that_a_stage_hands_on_is_one_argument():
    stages = [Listed(4, 4).double(), OfList(4, 3).double()]
    for network in (stages, nn.Sequential(*stages)):
        blocks = split(network, None if network is stages else ["0"])
        task = Problem(gaussian(6, 4), LABELS, blocks, CrossEntropy(), as_given)
        found = task.blocks.forward(task.initial([0]), task.x[None])[0]
        torch.testing.assert_close(found, stages[1](stages[0](task.x)))


def test_what_is_no_augmentation_is_refused_by_name():
    with pytest.raises(ValueError, match="augmentation: 'flip' is no Augmentation, such as"):
        Problem(gaussian(6, 4), LABELS, split(nn.Linear(4, 3), []), CrossEntropy(), as_given, augmentation="flip")
