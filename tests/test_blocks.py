"""Blocks: values and pull-backs against `nn.Module`s and autograd, cuts, initialisation, export."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from admm.blocks import Blocks, Parameters, flattened, split
from admm.comparison import outputs_of
from admm.losses import SquaredError
from admm.models import as_given, initialiser, mlp
from admm.optimizers import Problem
from admm.splitting import layer_names
from admm.visits import Visit

F64 = torch.zeros(0, dtype=torch.float64)
SEEDS = (4, 0, 9)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


# A network with its input's shape: (a function that makes it, shape of a sample)
NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5)), (6,)),
    "a subclass of a linear layer": (lambda: nn.Sequential(Twice(6, 5), nn.ReLU()), (6,)),
    "a parametrised linear layer": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU()),
        (6,),
    ),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False)), (6,)),
    "activation at the end": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (6,)),
    "activation at the start": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 5)), (6,)),
    "activation around": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 5), nn.ReLU()), (6,)),
    "only an activation": (lambda: nn.Sequential(nn.ReLU()), (6,)),
    "only flatten": (lambda: nn.Sequential(nn.Flatten()), (2, 3)),
    "flatten after relu": (
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6, 5), nn.ReLU()),
        (2, 3),
    ),
    "relu after flatten": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(6, 5)), (2, 3)),
    "two relus": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 4)), (6,)),
    "two linear layers": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU()), (6,)),
    "deep": (lambda: mlp(6, [5, 4], 3), (2, 3)),
    "rows": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False)), (2, 3)),
    "tanh": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 5), nn.Tanh()), (6,)),
    "relu after tanh": (lambda: nn.Sequential(nn.Tanh(), nn.ReLU()), (6,)),
    "flatten of some axes": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Flatten()),
        (1, 4, 4),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3)),
        (1, 4, 4),
    ),
    "convolution without bias": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Tanh()), (1, 4, 4)),
    "batch normalisation": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        (1, 4, 4),
    ),
    "activation in place among others": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten()),
        (1, 4, 4),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh())), nn.Linear(5, 4)),
        (6,),
    ),
}
each_network = pytest.mark.parametrize("make, shape", NETWORKS.values(), ids=NETWORKS)


def whole(network: nn.Module) -> Blocks:
    """The network as one block."""
    return split(network, after=[])


def stack(blocks: Blocks, seeds: tuple[int, ...] = SEEDS) -> Parameters:
    return blocks.initial(seeds, initialiser("pytorch"), like=F64)


def inputs(*shape: int) -> Tensor:
    """Inputs [S, n, ...] of which about half are negative."""
    return torch.randn(len(SEEDS), 7, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each_network
def test_forward_of_a_stack_is_each_replica_s_module(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta = stack(blocks)
    output = blocks.forward(theta, x)
    recorded, _ = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    for s in range(len(SEEDS)):
        network = blocks.export(theta, s)
        torch.testing.assert_close(output[s], network(x[s]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(recorded[s], network.train()(x[s]), rtol=1e-12, atol=1e-12)


@each_network
def test_pull_back_is_autograd_s(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta = stack(blocks)
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    grad_params = blocks.gradient()
    by_x = blocks[0].vjp(theta.blocks[0], record, grad_output, grad_params[0])
    for s in range(len(SEEDS)):
        network, leaf = blocks.export(theta, s).train(), x[s].clone().requires_grad_()
        (network(leaf.clone()) * grad_output[s]).sum().backward()
        torch.testing.assert_close(by_x[s], leaf.grad, rtol=1e-12, atol=1e-12)
        expected = [p.grad for p in network.parameters()]
        torch.testing.assert_close([g[s] for g in blocks.total(grad_params)], expected, rtol=1e-12, atol=1e-12)


@each_network
def test_pull_back_gives_each_part_alone_and_may_be_repeated(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta = stack(blocks)
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    both, alone = blocks.gradient(), blocks.gradient()
    by_x = blocks[0].vjp(theta.blocks[0], record, grad_output, both[0])
    assert blocks[0].vjp(theta.blocks[0], record, grad_output, alone[0], needs_input_grad=False) is None
    assert all(map(torch.equal, blocks.total(both), blocks.total(alone)))
    assert torch.equal(blocks[0].vjp(theta.blocks[0], record, grad_output), by_x)


@each_network
def test_forward_record_and_pull_back_leave_their_arguments_alone(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta, x_before = stack(blocks), x.clone()
    theta_before = theta.flat().clone()
    blocks[0].forward(theta.blocks[0], x, Visit(range(len(x))))
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    grad_output, output_before = torch.ones_like(output), output.clone()
    blocks[0].vjp(theta.blocks[0], record, grad_output, blocks.gradient()[0])
    assert torch.equal(x, x_before)
    assert torch.equal(theta.flat(), theta_before)
    assert torch.equal(output, output_before)
    assert torch.equal(grad_output, torch.ones_like(output))


def test_running_statistics_move_with_the_parameters_gradient_alone():
    blocks, x = whole(NETWORKS["batch normalisation"][0]()), inputs(1, 4, 4)
    theta = stack(blocks)
    before, gradient = theta.buffers.clone(), blocks.gradient()
    assert theta.buffers.shape == (3, 5)
    blocks[0].forward(theta.blocks[0], x, Visit(range(len(x))))
    for training in (False, True):
        output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x)), training=training))
        blocks[0].vjp(theta.blocks[0], record, output)
        assert torch.equal(theta.buffers, before)
        for _ in range(2):  # twice from the same record is once
            blocks[0].vjp(theta.blocks[0], record, output, gradient[0])
    for s in range(len(SEEDS)):
        network = blocks.export(theta, s)
        network[1].reset_running_stats()
        network.train()(x[s])
        torch.testing.assert_close(theta.buffers[s], blocks.flatten(network, "buffers"), rtol=1e-12, atol=1e-12)


def test_an_average_over_all_steps_is_pytorch_s():
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2, momentum=None)))
    blocks = whole(network)
    theta, twin = stack(blocks), blocks.export(stack(blocks), 1).train()
    for x in (inputs(1, 4, 4), inputs(1, 4, 4) + 1.0, inputs(1, 4, 4) * 2.0):
        output, record = blocks[0].linearize(theta.blocks[0], x, Visit(SEEDS))
        blocks[0].vjp(theta.blocks[0], record, output, blocks.gradient()[0], needs_input_grad=False)
        twin(x[1])
    assert theta.buffers[1, -1] == 3.0
    torch.testing.assert_close(theta.buffers[1], blocks.flatten(twin, "buffers"), rtol=1e-12, atol=1e-12)


def test_running_statistics_without_parameters_move_in_a_block_of_their_own():
    blocks = split(nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(16, 3)), after="0")
    theta, x = stack(blocks), inputs(1, 4, 4)
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    blocks[0].vjp(theta.blocks[0], record, output, blocks.gradient()[0], needs_input_grad=False)
    torch.testing.assert_close(theta.buffers[:, 0], 0.1 * x.flatten(1).mean(1))


RANDOM = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (4,)),
    "RReLU": (lambda: nn.Sequential(nn.RReLU(), nn.Linear(4, 4)), (4,)),
    "transformer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True)), (3, 4)),
    "a function": (lambda: nn.Sequential(nn.Linear(4, 4), Dropping()), (4,)),
}


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("make, shape", RANDOM.values(), ids=RANDOM)
def test_random_layers_draw_from_seed_visit_and_block(make, shape):
    blocks, x = split(nn.Sequential(make(), make()), after=["0"]), inputs(*shape)
    x = x[:1].expand_as(x)
    theta, state = stack(blocks, (0, 0, 0)), torch.get_rng_state()

    def evaluated(seeds, counter=(3, 1), t=0, inputs=x):
        return blocks[t].forward(theta.blocks[t], inputs, Visit(seeds, counter))

    first = evaluated((0, 1, 0))
    recorded, _ = blocks[0].linearize(theta.blocks[0], x, Visit((0, 1, 0), (3, 1)))
    assert torch.equal(first, evaluated((0, 1, 0)))
    torch.testing.assert_close(first, recorded, rtol=1e-12, atol=1e-12)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])  # by seed, not by replica
    assert not torch.equal(first, evaluated((0, 1, 0), counter=(3, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    outputs = [block.forward([dict(views)], x, Visit((0, 0, 0))) for block in blocks for views in theta.blocks[0]]
    assert not torch.equal(*outputs)  # of the same parameters in another block
    quiet = Visit((0, 1, 0), training=False)
    assert torch.equal(blocks[0].forward(theta.blocks[0], x, quiet)[0], blocks[0].forward(theta.blocks[0], x, quiet)[1])
    torch.testing.assert_close(blocks.forward(theta, x)[0], blocks.export(theta)(x[0]), rtol=1e-12, atol=1e-12)


def test_a_draw_is_pytorch_s_after_the_seed_of_the_visit():
    """Also where the vector-Jacobian product is of the outputs that were dropped."""
    blocks, x = whole(nn.Sequential(nn.Linear(4, 4), nn.Dropout())), inputs(4)
    theta, visit = stack(blocks), Visit(SEEDS, (7,))
    output, record = blocks[0].linearize(theta.blocks[0], x, visit)
    product = blocks[0].vjp(theta.blocks[0], record, torch.ones_like(output))
    for s in range(len(SEEDS)):
        network, leaf = blocks.export(theta, s).train(), x[s].clone().requires_grad_()
        torch.manual_seed(visit.draws(s, block=1))
        expected = network(leaf)
        expected.sum().backward()
        torch.testing.assert_close(output[s], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(product[s], leaf.grad, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_are_the_network_s_and_not_among_the_trained():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
    network(torch.randn(5, 3, dtype=torch.float64))  # which moves the running statistics
    network[:2].requires_grad_(False)
    for blocks in (split(network, after=["2"]), whole(network)):
        theta, x = stack(blocks), torch.randn(len(SEEDS), 7, 3, dtype=torch.float64)
        assert blocks.parameter_slices() == {"3.weight": slice(0, 6), "3.bias": slice(6, 8)}
        torch.testing.assert_close(theta.buffers[0, :3], network[1].running_mean, rtol=0.0, atol=0.0)
        exported = blocks.export(theta, 1)
        assert torch.equal(exported[0].weight, network[0].weight) and not torch.equal(
            exported[3].weight, network[3].weight
        )
        torch.testing.assert_close(blocks.forward(theta, x)[1], exported(x[1]), rtol=1e-12, atol=1e-12)
        assert len(blocks) == 1 or blocks.crossings[0].is_plain


def test_a_module_that_is_pinned_to_evaluation_stays_there():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    network[1].eval()
    blocks, x = whole(network), torch.randn(1, 7, 3, dtype=torch.float64)
    theta = stack(blocks, (0,))
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit([0]))
    torch.testing.assert_close(output[0], blocks.export(theta)(x[0]), rtol=1e-12, atol=1e-12)
    before = theta.buffers.clone()
    blocks[0].vjp(theta.blocks[0], record, output, blocks.gradient()[0])
    assert torch.equal(theta.buffers, before) and network.training


@pytest.mark.parametrize("activation", [nn.ELU(inplace=True), nn.SiLU(inplace=True), nn.ReLU(inplace=True)])
def test_an_in_place_activation_does_not_overwrite_the_coupling_variable(activation):
    blocks = split(nn.Sequential(nn.Tanh(), nn.Linear(6, 6), activation, nn.Linear(6, 5)), after=["1"])
    theta, z = stack(blocks), inputs(6)
    before = z.clone()
    for _ in range(2):  # before and after a problem has seen what the block does
        output, record = blocks[1].linearize(theta.blocks[1], z, Visit(SEEDS))
        blocks[1].vjp(theta.blocks[1], record, output)
        blocks[1].forward(theta.blocks[1], z, Visit(SEEDS))
        assert torch.equal(z, before)
        outputs_of(blocks, z[0].float())


def test_layers_that_share_a_parameter_have_the_sum_of_their_gradients():
    """Two linear layers, and such a pair among other modules, in one block and in two."""
    for middle, after in ((nn.ReLU, []), (nn.ReLU, ["0"]), (nn.Tanh, []), (nn.Tanh, ["1"])):
        network = nn.Sequential(nn.Linear(4, 4), middle(), nn.Linear(4, 4)).double()
        network[2].weight = network[0].weight
        blocks, x = split(network, after=after), inputs(4)
        theta = stack(blocks)
        assert theta.flat().shape == (3, 24) and list(blocks.parameter_slices()) == ["0.weight", "0.bias", "2.bias"]
        visit, z, records = Visit(SEEDS), x, []
        for block, views in zip(blocks, theta.blocks, strict=True):
            z, record = block.linearize(views, z, visit)
            records.append(record)
        gradient, grad = blocks.gradient(), torch.ones_like(z)
        for t in reversed(range(len(blocks))):
            grad = blocks[t].vjp(theta.blocks[t], records[t], grad, gradient[t])
        exported = blocks.export(theta, 1)
        assert exported[2].weight is exported[0].weight
        exported(x[1]).sum().backward()
        expected = torch.cat([p.grad.flatten() for p in exported.parameters()])
        torch.testing.assert_close(flattened(blocks.total(gradient))[1], expected, rtol=1e-12, atol=1e-12)


def test_parameters_of_several_types_keep_them():
    network = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), b=Wide(4, 2)))
    blocks, x = whole(network), inputs(4).float()
    assert blocks.dtype == torch.float64
    theta = blocks.initial(SEEDS, initialiser("pytorch"), like=torch.zeros(0, dtype=blocks.dtype))
    exported = blocks.export(theta, 1)
    assert exported.a.weight.dtype == torch.float32 and exported.b.weight.dtype == torch.float64
    torch.testing.assert_close(blocks.forward(theta, x)[1], exported(x[1]))
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(SEEDS))
    gradient = blocks.gradient()
    blocks[0].vjp(theta.blocks[0], record, torch.ones_like(output), gradient[0])
    exported.train()(x[1]).sum().backward()
    expected = torch.cat([p.grad.double().flatten() for p in exported.parameters()])
    torch.testing.assert_close(flattened(blocks.total(gradient))[1], expected, rtol=1e-5, atol=1e-6)


class Wide(nn.Linear):
    """In float64, whatever it is given."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def test_the_steps_of_batch_normalisation_in_bfloat16_are_counted():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    network[1].num_batches_tracked.fill_(1000)  # which bfloat16 could not count on from
    blocks = whole(network)
    theta = blocks.initial([0], lambda module: None, like=torch.zeros(0, dtype=torch.bfloat16))
    output, record = blocks[0].linearize(theta.blocks[0], torch.randn(1, 5, 3).bfloat16(), Visit([0]))
    blocks[0].vjp(theta.blocks[0], record, output, blocks.gradient()[0])
    exported = blocks.export(theta)
    assert exported[1].num_batches_tracked == 1001 and exported[0].weight.dtype == torch.bfloat16


def test_an_in_place_relu_does_not_overwrite_the_input():
    blocks, x = whole(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5))), inputs(6)
    before, theta = x.clone(), stack(blocks)
    blocks[0].forward(theta.blocks[0], x, Visit(range(len(x))))
    assert torch.equal(x, before)
    blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    assert torch.equal(x, before)


def test_the_derivative_of_relu_at_zero_is_zero():
    blocks = whole(nn.Sequential(nn.ReLU()))
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    _, record = blocks[0].linearize([{}], x, Visit(range(len(x))))
    assert torch.equal(blocks[0].vjp([{}], record, torch.ones_like(x)), x)


@pytest.mark.parametrize("cut", [{"after": ["fc1"]}, {"per_layer": True}, {"n_blocks": 2, "activation": "start"}])
def test_a_cut_does_not_change_the_network(cut):
    network, x = mlp(6, [5, 4], 3), inputs(6)
    one, many = whole(network), split(network, **cut)
    theta = stack(one)
    assert torch.equal(stack(many).flat(), theta.flat())
    assert torch.equal(many.forward(many.parameters(theta.flat()), x), one.forward(theta, x))


def test_a_module_that_occurs_twice_is_evaluated_twice():
    relu = nn.ReLU()
    network = nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3))
    blocks, x = split(network, per_layer=True), inputs(6)
    theta = stack(blocks)
    torch.testing.assert_close(blocks.forward(theta, x)[1], blocks.export(theta, 1)(x[1]), rtol=1e-12, atol=1e-12)


# --- split


NAMES = ["flatten", "fc1.linear", "fc1.relu", "fc2.linear", "fc2.relu", "fc3.linear"]


def layers(**options) -> list[list[str]]:
    return [list(names) for names in split(mlp(6, [5, 4], 3), **options).names]


def test_leaves_are_the_layers_inside_nested_sequentials():
    assert layer_names(mlp(6, [5, 4], 3)) == NAMES


@pytest.mark.parametrize(
    "options, ends",
    [
        ({"after": []}, [6]),
        ({"after": ["fc1"]}, [3, 6]),
        ({"after": ["fc1.linear"]}, [2, 6]),
        ({"after": ["flatten", "fc1.linear", "fc2"]}, [1, 2, 5, 6]),
        ({"per_layer": True}, [3, 5, 6]),
        ({"per_layer": True, "activation": "start"}, [2, 4, 6]),
        ({"n_blocks": 1}, [6]),
        ({"n_blocks": 2}, [5, 6]),
        ({"n_blocks": 2, "activation": "start"}, [4, 6]),
        ({"n_blocks": 3}, [3, 5, 6]),
    ],
)
def test_split_cuts_after_the_right_layers(options, ends):
    starts = [0, *ends[:-1]]
    assert layers(**options) == [NAMES[i:j] for i, j in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("n_blocks", range(1, 8))
def test_n_blocks_shares_out_the_layers_evenly(n_blocks):
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)))
    sizes = [len(names) for names in split(network, n_blocks=n_blocks).names]
    assert len(sizes) == n_blocks and sum(sizes) == 7
    assert max(sizes) - min(sizes) <= 1


def test_a_name_that_is_a_prefix_of_another_is_not_confused_with_it():
    network = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), ab=nn.Linear(2, 2), abc=nn.Linear(2, 2)))
    assert split(network, after=["a"]).names == (("a",), ("ab", "abc"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"after": ["fc9"]}, "after: no layer 'fc9'; the layers are " + ", ".join(NAMES)),
        ({"after": ["fc"]}, "no layer 'fc'"),
        ({"after": ["fc2", "fc1"]}, "network's order"),
        ({"after": ["fc1", "fc1.relu"]}, "different layers"),
        ({"after": ["fc3"]}, "'fc3' is the last layer"),
        ({"after": ["fc1"], "per_layer": True}, "exactly one"),
        ({"after": ["fc1"], "n_blocks": 2}, "exactly one"),
        ({"per_layer": True, "n_blocks": 2}, "exactly one"),
        ({}, "exactly one"),
        ({"n_blocks": 0}, "n_blocks: 0 is not a whole number from 1 up"),
        ({"n_blocks": 4}, "n_blocks: 4 is not between 1 and 3"),
        ({"n_blocks": "2"}, "n_blocks: '2' is not a whole number from 1 up"),
        ({"n_blocks": 2.0}, "n_blocks: 2.0 is not a whole number from 1 up"),
        ({"per_layer": "yes"}, "per_layer: 'yes' is neither True nor False"),
        ({"after": 1}, "after: 1 is neither a name of a module, which is text, nor a list of these"),
        ({"after": {"fc1"}}, "after: {'fc1'} is neither"),
        ({"after": "fc1", "execution": "bf16"}, "execution: 'bf16' is no Execution, such as"),
        (
            {"per_layer": True, "activation": "middle"},
            "activation: 'middle' is not one of end, start",
        ),
    ],
)
def test_a_wrong_cut_is_refused_by_name(options, message):
    with pytest.raises(ValueError) as error:
        layers(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("replica", [2, -1, 1.0])
def test_a_replica_that_there_is_not_is_not_exported(replica):
    blocks = split(mlp(4, [3], 2), per_layer=True)
    with pytest.raises(ValueError, match=f"^replica: {replica} is not a whole number from 0 to 1$"):
        blocks.export(blocks.initial([0, 1], as_given, torch.zeros(0)), replica)


def test_the_parameters_of_another_network_are_not_exported():
    blocks = split(mlp(4, [3], 2), per_layer=True)
    others = [split(mlp(4, hidden, 2), per_layer=True) for hidden in ([5], [3, 2])]
    shapes = (r"'fc1.linear.weight' is \[5, 4\], expected \[3, 4\]", r"'fc3.linear.weight' is \[2, 2\], expected none")
    for other, shape in zip(others, shapes, strict=True):
        with pytest.raises(ValueError, match=f"^theta: of another network: {shape}$"):
            blocks.export(other.initial([0], as_given, torch.zeros(0)))
    with pytest.raises(
        ValueError, match=r"^theta: an object of the class torch.*Sequential is no Parameters, such as state\.theta$"
    ):
        blocks.export(blocks.network)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"network: a str is no nn\.Module, nor a list of them"):
        split("resnet18", after=["layer1"])


def test_a_module_that_is_no_sequential_is_cut_by_name_alone():
    with pytest.raises(ValueError, match=r"a TransformerEncoderLayer is cut by after=.*, such as self_attn, linear1"):
        split(nn.TransformerEncoderLayer(4, 2), per_layer=True)


# --- parameters


def test_a_replica_s_initial_parameters_depend_on_its_seed_alone():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    stacked = stack(blocks, (4, 0, 9)).flat()
    torch.manual_seed(77)
    assert torch.equal(stacked[1], stack(blocks, (0,)).flat()[0])
    assert torch.equal(stacked[[2, 0]], stack(blocks, (9, 4)).flat())
    assert not torch.equal(stacked[0], stacked[1])


def test_initial_is_what_the_seed_gives_to_the_module_itself():
    network = mlp(6, [5, 4], 3)
    blocks, initialise = split(network, per_layer=True), initialiser("kaiming_normal")
    torch.manual_seed(9)
    initialise(network)
    expected = torch.cat([p.detach().flatten() for p in network.parameters()]).double()
    assert torch.equal(blocks.initial([4, 9], initialise, like=F64).flat()[1], expected)


def test_initial_leaves_the_global_random_state_and_the_network_alone():
    network = mlp(6, [5, 4], 3)
    blocks, before = split(network, per_layer=True), [p.detach().clone() for p in network.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    stack(blocks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("make, shape", [NETWORKS["deep"], NETWORKS["convolution"]])
def test_export_and_flatten_are_inverse(make, shape):
    blocks = whole(make())
    theta = stack(blocks)
    for s in range(len(SEEDS)):
        assert torch.equal(blocks.flatten(blocks.export(theta, s)), theta.flat()[s])


def test_an_exported_network_is_a_copy():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    theta = stack(blocks)
    before = theta.flat().clone()
    nn.init.zeros_(blocks.export(theta, 1).fc1.linear.weight)
    assert torch.equal(theta.flat(), before)


def test_blocks_share_the_stacks_which_are_contiguous():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    theta = stack(blocks)
    values = torch.arange(theta.flat().numel(), dtype=torch.float64).view_as(theta.flat())
    theta.fill(values)
    of_blocks = [v for block in theta.blocks for views in block for v in views.values()]
    assert all(a is b and a.is_contiguous() for a, b in zip(theta.stacks.values(), of_blocks, strict=True))
    assert torch.equal(flattened(of_blocks), values) and torch.equal(theta.flat(), values)
    assert theta.blocks[0][1]["weight"].shape == (3, 5, 6)


def test_linear_weight_is_the_weight_of_the_only_linear_layer():
    for cut in ({"per_layer": True}, {"per_layer": True, "activation": "start"}):
        blocks = split(mlp(6, [5, 4], 3), **cut)
        theta = stack(blocks)
        exported = blocks.export(theta, 2)
        for t, linear in enumerate((exported.fc1.linear, exported.fc2.linear, exported.fc3.linear)):
            assert torch.equal(blocks[t].linear_weight(theta.blocks[t])[2], linear.weight)


@pytest.mark.parametrize("name", ["two linear layers", "tanh", "only flatten", "convolution"])
def test_linear_weight_is_none_for_any_other_block(name):
    blocks = whole(NETWORKS[name][0]())
    assert blocks[0].linear_weight(stack(blocks).blocks[0]) is None


class Masked(nn.Module):
    """Over its cut go a variable, another one that is read later, and a mask of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask, h = x > 0, self.first(x)
        return self.last(h + self.second(h)) * mask[:, :2]


def test_blocks_show_their_modules_and_what_crosses_each_cut() -> None:
    blocks = split(Masked(), after="second")
    assert repr(blocks) == "2 blocks of Masked:\n  1: first, second → first, second, getitem\n  2: last"
    problem = Problem(torch.randn(7, 4), torch.zeros(7, 2), blocks, SquaredError(), as_given)
    shown = "2 blocks of Masked:\n  1: first, second → [n, 5], [n, 5], 1 as it is\n  2: last → [n, 2]"
    assert repr(problem.blocks) == shown
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    assert repr(split(deep, after="6")) == "2 blocks of Sequential:\n  1: 0, 1, 2, …, 6 (7 modules)\n  2: 7, 8"


def test_parameters_show_their_names_and_shapes() -> None:
    blocks = split(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, bias=False)), per_layer=True)
    theta = blocks.initial((0, 1, 2), as_given, torch.zeros(()))
    assert repr(theta) == "Parameters(0.weight [3, 5, 4], 0.bias [3, 5], 1.weight [3, 2, 5])"
