"""How blocks are evaluated: the options give the same answer, and back-propagation stops at the cuts."""

import os
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from admm.blocks import split
from admm.checkpoints import save
from admm.layers import Execution
from admm.losses import CrossEntropy
from admm.models import initialiser
from admm.optimizers import SGD, Backprop, BlockADMM, Gotmare, OnlineBlockADMM, Optimizer, Problem, ZUpdate
from admm.training import train
from admm.visits import Visit
from experiments.training import execution

SEEDS = (3, 1)
OPTIMIZERS: dict[str, Optimizer[Any]] = {
    "backprop": Backprop(2, SGD(), 0.01, batch_size=5),
    "gotmare": Gotmare(2, 0.01, 0.1, batch_size=5, theta_update=SGD()),
    "online": OnlineBlockADMM(
        2, 0.01, 0.1, beta=1.0, batch_size=5, theta_update=SGD(), z_update=ZUpdate("gradient", 1, "step"), dual="none"
    ),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def two_equal_blocks(depth: int, dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    """`depth` convolutions in each."""
    halves = [
        nn.Sequential(
            *(
                layer
                for _ in range(depth)
                for layer in (nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Tanh())
            )
        )
        for _ in range(2)
    ]
    network = nn.Sequential(*halves, nn.Flatten(), nn.Linear(128, 3))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(10, 2, 8, 8, dtype=torch.float64, generator=random).to(dtype)
    y = torch.eye(3, dtype=dtype)[torch.arange(10) % 3]
    return Problem(
        x, y, split(network, after="0", execution=Execution(**options)), CrossEntropy(), initialiser("pytorch")
    )


def stepped(problem: Problem, optimizer: Optimizer[Any]) -> Any:
    """The state after an iteration."""
    return optimizer.step(problem, optimizer.init(problem, SEEDS))


def single(problem: Problem) -> Problem:
    return replace(problem, x=problem.x.float(), y=problem.y.float())


@each_optimizer
@pytest.mark.parametrize("option", [{"channels_last": False}, {"recompute": False}], ids=str)
def test_an_option_gives_the_same_answer(resnet_problem, optimizer, option):
    problems = [resnet_problem(execution=how, width=8) for how in (None, Execution(**option))]
    plain, with_option = (stepped(problem, optimizer) for problem in problems)
    torch.testing.assert_close(with_option.theta.flat(), plain.theta.flat(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(with_option.theta.buffers, plain.theta.buffers, rtol=1e-8, atol=1e-9)


@each_optimizer
def test_channels_last_gives_the_same_answer_in_single_precision(optimizer):
    problems = [two_equal_blocks(2, torch.float32, channels_last=how) for how in (True, False)]
    start = problems[0].initial(SEEDS).flat()
    last, first = (stepped(problem, optimizer).theta for problem in problems)
    difference = (last.flat() - first.flat()).norm() / (first.flat() - start).norm()
    assert difference < 1e-3, difference
    torch.testing.assert_close(last.buffers, first.buffers, rtol=1e-3, atol=1e-4)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what compiles the graphs that `torch.compile` finds, instead of its own compiler, which takes longer."""
    compile = torch.compile
    torch._dynamo.reset()
    yield lambda backend: monkeypatch.setattr(torch, "compile", partial(compile, backend=backend))
    torch._dynamo.reset()


def test_compiled_blocks_give_the_same_answer(compiler):
    compiler("aot_eager")
    torch._dynamo.utils.counters.clear()
    plain, compiled = (two_equal_blocks(1, compile=compile) for compile in (False, True))
    optimizer = replace(OPTIMIZERS["online"], batch_size=6)  # of ten: the last mini-batch is smaller
    states = [stepped(problem, optimizer) for problem in (plain, compiled)]
    torch.testing.assert_close(states[1].theta.flat(), states[0].theta.flat(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(states[1].theta.buffers, states[0].theta.buffers, rtol=1e-10, atol=1e-12)
    outputs = [p.blocks.forward(states[0].theta, p.x.expand(2, *p.x.shape)) for p in (plain, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    # Forward, recorded and evaluated, of block 1, and recorded and evaluated of block 2.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5


def test_a_compiled_block_has_the_same_output_and_gradient():
    torch._dynamo.reset()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    pulled = []
    for compile in (False, True):
        blocks = split(nn.Sequential(nn.Tanh()), after=[], execution=Execution(compile=compile))
        output, record = blocks[0].linearize([{}], x, Visit([0]))
        pulled.append((output, blocks[0].vjp([{}], record, torch.ones_like(output))))
    torch.testing.assert_close(pulled[1], pulled[0], rtol=1e-12, atol=1e-12)


def test_what_is_compiled_is_kept_apart_by_the_processor(compiler, monkeypatch):
    tags = []

    def graph_as_it_is(graph: Any, *_: Any, **__: Any) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return graph

    compiler(graph_as_it_is)
    stepped(of_tanh(compile=True), OPTIMIZERS["online"])
    of_blocks = len(tags)
    monkeypatch.setattr("torch._inductor.compile", graph_as_it_is)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    blocks = split(network, n_blocks=2, execution=Execution(compile=True))
    x = torch.ones(10, 4, dtype=torch.float64)
    stepped(Problem(x, torch.arange(10) % 3, blocks, CrossEntropy(), initialiser("pytorch")), OPTIMIZERS["online"])
    assert len(tags) > of_blocks > 0
    assert set(tags) == {f" {torch.backends.cpu.get_cpu_capability()}"}
    assert torch.compiler.config.cache_key_tag == ""


COMPILED_AND_NOT = """
import sys
import torch
from torch import nn
from admm import CrossEntropy, OnlineBlockADMM, Problem, initialiser, split
from admm.layers import Execution

for activation in (nn.ReLU, nn.Tanh):  # a visit is compiled, and blocks
    ends = []
    for compile in (False, True):
        network = nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 3), activation()).double()
        blocks = split(network, n_blocks=2, execution=Execution(compile=compile))
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(20, 4)
        problem = Problem(x, torch.arange(20) % 3, blocks, CrossEntropy(), initialiser("pytorch"))
        optimizer = OnlineBlockADMM(1, 1e-2, batch_size=10)
        ends.append(optimizer.step(problem, optimizer.init(problem, [0, 1])).theta.flat())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
"""


@pytest.mark.long
def test_a_processor_does_not_take_what_was_compiled_for_another_one(tmp_path):
    """These are one processor, and what PyTorch makes of it with narrower vectors."""
    for capability in ("", "avx2", "default"):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, "-c", COMPILED_AND_NOT], env=environment, check=True)


def of_tanh(*between: nn.Module, **options: Any) -> Problem:
    """Two blocks, with layers before the first Tanh."""
    network = nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = split(network, n_blocks=2, execution=Execution(**options))
    return Problem(x, torch.arange(10) % 3, blocks, CrossEntropy(), initialiser("pytorch"))


def test_the_time_of_compiling_blocks_is_told_apart(compiler):
    compiler("aot_eager")
    problems, optimizer = (
        [of_tanh(compile=compile) for compile in (True, False)],
        replace(OPTIMIZERS["online"], batch_size=10),
    )
    compiled, eager = (train(problem, optimizer, optimizer.init(problem, SEEDS)) for problem in problems)
    assert compiled.compile_seconds > compiled.seconds > 0.0 == eager.compile_seconds


def eager_in_spite_of_compile(*between: nn.Module) -> list[str]:
    """Assert that a run with compile=True is the eager one, and return its warnings."""
    problems, optimizer = [of_tanh(*between, compile=compile) for compile in (False, True)], OPTIMIZERS["online"]
    with warnings.catch_warnings(record=True) as caught:
        eager, other = (save(stepped(problem, optimizer)) for problem in problems)
    assert other.pop("made_with") == eager.pop("made_with")
    torch.testing.assert_close(other, eager, rtol=0, atol=0)
    return [str(warning.message) for warning in caught if "compile:" in str(warning.message)]


def test_blocks_are_evaluated_eagerly_where_there_is_no_compiler():
    from torch._inductor import config

    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True), config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        told = eager_in_spite_of_compile(nn.BatchNorm1d(5), nn.Dropout())
    torch._dynamo.reset()
    assert told == [
        f"compile: block {t} is evaluated eagerly; torch.compile finds no working compiler; install one, such as g++, "
        "or take compile=False"
        for t in (1, 2)
    ]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


def test_a_block_that_cannot_be_compiled_is_evaluated_eagerly(compiler):
    compiler("aot_eager")
    assert eager_in_spite_of_compile(Branch()) == [
        "compile: block 1 is evaluated eagerly; Unsupported: Data-dependent branching"
    ]


def test_a_block_whose_derivatives_cannot_be_compiled_is_evaluated_eagerly(compiler):
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    compiler(aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fails))
    told = eager_in_spite_of_compile()
    assert told == [
        f"compile: block {t} is evaluated eagerly; BackendCompilerFailed: backend='compiler_fn' raised:" for t in (2, 1)
    ]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_network_s_own_error_is_raised_when_it_is_compiled(place, compiler):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return refuse() if place == "forward" else x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return refuse()

    def refuse() -> Tensor:
        raise KeyError("the user's own")

    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x)

    compiler("aot_eager")
    blocks = split(nn.Sequential(Refusing()), after=[], execution=Execution(compile=True))
    with pytest.raises(KeyError, match="the user's own"), warnings.catch_warnings():
        warnings.simplefilter("ignore" if place == "backward" else "error")
        output, record = blocks[0].linearize([{}], torch.ones(1, 3, 4), Visit([0]))
        blocks[0].vjp([{}], record, output)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_memory_format(channels_last):
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    blocks = split(nn.Sequential(Probe(), nn.Flatten()), after=[], execution=Execution(channels_last=channels_last))
    theta = blocks.initial(SEEDS, initialiser("pytorch"), like=torch.zeros(0))
    blocks.forward(theta, torch.randn(2, 3, 4, 5, 6))
    assert seen == [channels_last] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_is_dropped_of_images_may_be_in_any_memory_format(channels_last, channels, layout):
    """Random numbers are drawn in the order of the memory, and blocks are still those of the network."""
    layers = [nn.Conv2d(channels, 4, 3), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)]
    network = nn.Sequential(*layers).to(memory_format=layout)
    x = torch.randn(6, channels, 6, 6).to(memory_format=layout)
    for after in ([], ["0"], ["1", "3"]):
        blocks = split(network, after=after, execution=Execution(channels_last=channels_last))
        Problem(x, torch.arange(6) % 3, blocks, CrossEntropy(), initialiser("pytorch"))


@pytest.mark.parametrize(
    ("convolution", "channels_last"),
    [
        (nn.Conv2d(16, 8, 1, 2), False),
        (nn.Conv2d(16, 8, 1), True),
        (nn.Conv2d(16, 8, 3, 2), True),
    ],
    ids=str,
)
def test_a_strided_pointwise_convolution_is_not_evaluated_in_channels_last(convolution, channels_last):
    """Whatever the format of the images, such as of a coupling variable that another block has made."""
    seen = []
    convolution.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    blocks = split(nn.Sequential(convolution, nn.Flatten()), after=[])
    theta = blocks.initial(SEEDS, initialiser("pytorch"), like=torch.zeros(0))
    x = torch.randn(2, 3, convolution.in_channels, 5, 6)
    blocks.forward(theta, x)
    blocks.forward(theta, x.movedim(2, -1).contiguous().movedim(-1, 2))
    assert seen == [channels_last] * 4


@each_optimizer
def test_bf16_gives_the_same_steps_to_its_precision_and_keeps_float32(optimizer):
    problems = [two_equal_blocks(2, torch.float32, precision=precision) for precision in ("fp32", "bf16")]
    start = problems[0].initial(SEEDS).flat()
    plain, half = (stepped(problem, optimizer).theta for problem in problems)
    assert plain.flat().dtype == half.flat().dtype == half.buffers.dtype == torch.float32
    assert not torch.equal(plain.flat(), half.flat())
    difference = (half.flat() - plain.flat()).norm() / (plain.flat() - start).norm()
    assert difference < 0.05, difference
    torch.testing.assert_close(half.buffers, plain.buffers, rtol=0.05, atol=0.05)


@pytest.fixture
def precision_of_products():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_tf32_is_pytorch_s_for_products_and_convolutions_until_the_next_run(resnet_problem, precision_of_products):
    thetas = []
    for precision, products in (("tf32", "high"), ("fp32", "highest")):
        how = execution(OmegaConf.create({"precision": precision}))
        assert how == Execution()
        assert torch.get_float32_matmul_precision() == products
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        thetas.append(stepped(single(resnet_problem(execution=how)), Backprop(2, SGD(), 0.01, batch_size=6)).theta)
    torch.testing.assert_close(*(theta.flat() for theta in thetas), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_wrong_precision_is_refused_by_name(precision):
    with pytest.raises(ValueError, match=f"precision: '{precision}' is not one of fp32, bf16"):
        Execution(precision)


def test_a_precision_without_effect_is_refused_by_name(mlp_problem):
    with pytest.raises(ValueError, match=r"precision: .* this network has none: take fp32"):
        mlp_problem(per_layer=True, execution=Execution(precision="bf16"))


def test_another_choice_of_compiling_is_refused_by_name():
    with pytest.raises(ValueError, match="compile: 'always' is not one of False, True, auto"):
        Execution(compile="always")


# --- Back-propagation stops at the cuts


def peak_of_saved_activations(problem: Problem, optimizer: Optimizer[Any]) -> int:
    """Most bytes that autograd graphs hold at a time during an iteration."""
    held, most = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output would hold its own node

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: Tensor) -> Held:
        nonlocal held, most
        size, kept = tensor.numel() * tensor.element_size(), Held(tensor)
        held += size
        most = max(most, held)
        weakref.finalize(kept, release, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        stepped(problem, optimizer)
    return most


BLOCKS_AT_A_TIME = OPTIMIZERS | {
    "online, dual": replace(OPTIMIZERS["online"], dual="decay"),
    "block-admm": BlockADMM(
        2,
        0.01,
        0.1,
        sweep="batch",
        batch_size=5,
        slice_size=5,
        z_update=ZUpdate("gradient", output_update="prox"),
        dual_step=1.0,
        forward_mixing=0.0,
    ),
    "block-admm, mini-batches": BlockADMM(
        2, 0.01, 0.1, batch_size=5, z_update=ZUpdate("gradient", output_update="prox")
    ),
}


@pytest.mark.parametrize("name", [name for name in BLOCKS_AT_A_TIME if name != "backprop"])
def test_activations_of_one_block_at_a_time_are_held(name):
    of_sgd = peak_of_saved_activations(two_equal_blocks(6), OPTIMIZERS["backprop"])
    assert peak_of_saved_activations(two_equal_blocks(6), BLOCKS_AT_A_TIME[name]) < 0.6 * of_sgd
    kept = peak_of_saved_activations(two_equal_blocks(6, recompute=False), BLOCKS_AT_A_TIME[name])
    assert 0.9 * of_sgd < kept < 1.1 * of_sgd


@pytest.mark.parametrize("name", [name for name in BLOCKS_AT_A_TIME if name not in ("backprop", "online, dual")])
def test_activations_of_one_of_four_blocks_are_held_in_all_rounds(name):
    deep = two_equal_blocks(6)
    halves = [half[k : k + 9] for half in list(deep.blocks.network)[:2] for k in (0, 9)]
    network = nn.Sequential(*halves, *list(deep.blocks.network)[2:])
    four = replace(deep, blocks=split(network, after=["0", "1", "2"]))
    rounds = {"z_rounds": 3} if name == "gotmare" else {"z_update": replace(BLOCKS_AT_A_TIME[name].z_update, steps=3)}
    of_sgd = peak_of_saved_activations(four, OPTIMIZERS["backprop"])
    assert peak_of_saved_activations(four, replace(BLOCKS_AT_A_TIME[name], **rounds)) < 0.35 * of_sgd


def test_a_block_is_evaluated_once_where_its_pull_back_comes_next(monkeypatch):
    problem, optimizer = two_equal_blocks(1), replace(BLOCKS_AT_A_TIME["block-admm"], slice_size=10, primal_rounds=1)
    state, calls = optimizer.init(problem, SEEDS), Counter()

    def counted(key: Any, method: Any) -> Any:
        return lambda *arguments: (calls.update([key]), method(*arguments))[1]

    for t, block in enumerate(problem.blocks, start=1):
        for name in ("forward", "linearize"):
            monkeypatch.setattr(block.layers[0], name, counted((t, name), getattr(block.layers[0], name)))
    optimizer.step(problem, state)
    # Of block 1 for Z and U, and in Θ's pass for each of two mini-batches; to block 2 the Z update pulls back too.
    assert calls == {(1, "forward"): 2, (1, "linearize"): 2, (2, "forward"): 1, (2, "linearize"): 3}
    calls.clear()
    optimizer.diagnostics(problem, state)
    # To see whether the label leaks: block 2 in a forward pass, for its pull-back, and where Z_1 has been moved.
    assert calls == {(1, "linearize"): 1, (2, "linearize"): 1 + 3, (1, "forward"): 2}


def test_no_activations_outlive_their_mini_batch():
    one_block = replace(two_equal_blocks(6), blocks=split(two_equal_blocks(6).blocks.network, after=[]))
    for optimizer in (OPTIMIZERS["backprop"], OPTIMIZERS["online"]):
        of_one = peak_of_saved_activations(one_block, replace(optimizer, epoch_parts=2))
        assert peak_of_saved_activations(one_block, optimizer) == of_one


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ["gotmare", "online"])
def test_no_graph_crosses_a_cut(resnet_problem, monkeypatch, name, recompute):
    problem = resnet_problem(execution=Execution(recompute=recompute), after=["conv1", "conv3_x"])
    state = OPTIMIZERS[name].init(problem, SEEDS)
    owner = {}
    for t, block in enumerate(state.theta.blocks):
        for parameter in (v for views in block for v in views.values()):
            owner |= {replica.data_ptr(): t for replica in parameter}
    gradient, graphs = torch.autograd.grad, []

    def watched(output: Tensor, *arguments: Any, **options: Any) -> Any:
        graphs.append({owner[leaf.data_ptr()] for leaf in leaves_of(output) if leaf.data_ptr() in owner})
        return gradient(output, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    OPTIMIZERS[name].step(problem, state)
    assert all(len(of_blocks) == 1 for of_blocks in graphs)
    assert set.union(*graphs) == {0, 1, 2}


def leaves_of(output: Tensor) -> list[Tensor]:
    """The tensors that the graph of an output ends in."""
    found, seen, ahead = [], set(), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found
