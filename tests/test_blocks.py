"""Blocks: values and pull-backs against `nn.Module`s and autograd, cuts, initialisation, export."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from admm.blocks import Blocks, Parameters, split
from admm.models import initialiser, mlp
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
    grad_params = blocks.parameters(torch.full_like(theta.flat, torch.nan))
    by_x = blocks[0].vjp(theta.blocks[0], record, grad_output, grad_params.blocks[0])
    for s in range(len(SEEDS)):
        network, leaf = blocks.export(theta, s).train(), x[s].clone().requires_grad_()
        (network(leaf.clone()) * grad_output[s]).sum().backward()
        torch.testing.assert_close(by_x[s], leaf.grad, rtol=1e-12, atol=1e-12)
        gradients = [p.grad.flatten() for p in network.parameters()]
        if gradients:
            torch.testing.assert_close(grad_params.flat[s], torch.cat(gradients), rtol=1e-12, atol=1e-12)


@each_network
def test_pull_back_gives_each_part_alone_and_may_be_repeated(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta = stack(blocks)
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    both, alone = (blocks.parameters(torch.full_like(theta.flat, torch.nan)) for _ in range(2))
    by_x = blocks[0].vjp(theta.blocks[0], record, grad_output, both.blocks[0])
    assert blocks[0].vjp(theta.blocks[0], record, grad_output, alone.blocks[0], needs_input_grad=False) is None
    assert torch.equal(both.flat, alone.flat)
    assert torch.equal(blocks[0].vjp(theta.blocks[0], record, grad_output), by_x)


@each_network
def test_forward_record_and_pull_back_leave_their_arguments_alone(make, shape):
    blocks, x = whole(make()), inputs(*shape)
    theta, x_before = stack(blocks), x.clone()
    theta_before = theta.flat.clone()
    blocks[0].forward(theta.blocks[0], x, Visit(range(len(x))))
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    grad_output, output_before = torch.ones_like(output), output.clone()
    blocks[0].vjp(theta.blocks[0], record, grad_output, blocks.parameters(theta.flat.clone()).blocks[0])
    assert torch.equal(x, x_before)
    assert torch.equal(theta.flat, theta_before)
    assert torch.equal(output, output_before)
    assert torch.equal(grad_output, torch.ones_like(output))


def test_running_statistics_move_with_the_parameters_gradient_alone():
    blocks, x = whole(NETWORKS["batch normalisation"][0]()), inputs(1, 4, 4)
    theta = stack(blocks)
    before, gradient = theta.buffers.clone(), blocks.parameters(torch.empty_like(theta.flat))
    assert theta.buffers.shape == (3, 4) and gradient.buffers.shape == (3, 0)
    blocks[0].forward(theta.blocks[0], x, Visit(range(len(x))))
    for training in (False, True):
        output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x)), training=training))
        blocks[0].vjp(theta.blocks[0], record, output)
        assert torch.equal(theta.buffers, before)
        for _ in range(2):  # twice from the same record is once
            blocks[0].vjp(theta.blocks[0], record, output, gradient.blocks[0])
    for s in range(len(SEEDS)):
        network = blocks.export(theta, s)
        network[1].reset_running_stats()
        network.train()(x[s])
        torch.testing.assert_close(theta.buffers[s], blocks.flatten(network, "buffers"), rtol=1e-12, atol=1e-12)


def test_an_average_over_all_steps_is_refused_by_name():
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2, momentum=None)))
    with pytest.raises(ValueError, match=r"layer 'norm' \(BatchNorm2d\) averages over all steps; give it a momentum"):
        whole(network)


def test_running_statistics_without_parameters_move_in_a_block_of_their_own():
    blocks = split(nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(16, 3)), after="0")
    theta, x = stack(blocks), inputs(1, 4, 4)
    output, record = blocks[0].linearize(theta.blocks[0], x, Visit(range(len(x))))
    blocks[0].vjp(
        theta.blocks[0], record, output, blocks.parameters(theta.flat.clone()).blocks[0], needs_input_grad=False
    )
    torch.testing.assert_close(theta.buffers[:, 0], 0.1 * x.flatten(1).mean(1))


def test_dropout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer '0' \(Dropout\) draws random numbers in each evaluation"):
        whole(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.TransformerEncoderLayer(4, 2, 8, 0.1), nn.LSTM(4, 4, 2, dropout=0.1)])
def test_other_layers_that_draw_are_refused(layer):
    with pytest.raises(ValueError, match=r"layer '0' \(\w+\) draws random numbers in each evaluation"):
        whole(nn.Sequential(layer, nn.Linear(4, 2)))


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.0), nn.TransformerEncoderLayer(4, 2, 8, 0.0), nn.MultiheadAttention(4, 2)]
)
def test_without_a_probability_nothing_is_drawn(layer):
    whole(nn.Sequential(layer, nn.Linear(4, 2)))


def test_a_layer_that_is_not_to_be_trained_is_refused_by_name():
    network = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"layer '0' .Linear. has parameters with requires_grad=False"):
        whole(network)


@pytest.mark.parametrize("activation", [nn.ELU(inplace=True), nn.SiLU(inplace=True)])
def test_an_in_place_activation_is_refused(activation):
    with pytest.raises(ValueError, match=f"layer '0' .{type(activation).__name__}. overwrites its input"):
        whole(nn.Sequential(activation, nn.Linear(6, 5)))


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
    assert torch.equal(stack(many).flat, theta.flat)
    assert torch.equal(many.forward(many.parameters(theta.flat), x), one.forward(theta, x))


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
        ({"n_blocks": 0}, "n_blocks: 0 is not between 1 and 3"),
        ({"n_blocks": 4}, "n_blocks: 4 is not between 1 and 3"),
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


def test_only_a_sequential_can_be_cut():
    with pytest.raises(TypeError, match=r"only an nn\.Sequential of layers can be cut into blocks, got Linear"):
        split(nn.Linear(2, 2), per_layer=True)


# --- parameters


def test_a_replica_s_initial_parameters_depend_on_its_seed_alone():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    stacked = stack(blocks, (4, 0, 9)).flat
    torch.manual_seed(77)
    assert torch.equal(stacked[1], stack(blocks, (0,)).flat[0])
    assert torch.equal(stacked[[2, 0]], stack(blocks, (9, 4)).flat)
    assert not torch.equal(stacked[0], stacked[1])


def test_initial_is_what_the_seed_gives_to_the_module_itself():
    network = mlp(6, [5, 4], 3)
    blocks, initialise = split(network, per_layer=True), initialiser("kaiming_normal")
    torch.manual_seed(9)
    initialise(network)
    expected = torch.cat([p.detach().flatten() for p in network.parameters()]).double()
    assert torch.equal(blocks.initial([4, 9], initialise, like=F64).flat[1], expected)


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
        assert torch.equal(blocks.flatten(blocks.export(theta, s)), theta.flat[s])


def test_an_exported_network_is_a_copy():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    theta = stack(blocks)
    before = theta.flat.clone()
    nn.init.zeros_(blocks.export(theta, 1).fc1.linear.weight)
    assert torch.equal(theta.flat, before)


def test_the_views_share_the_flat_tensor():
    blocks = split(mlp(6, [5, 4], 3), per_layer=True)
    theta = stack(blocks)
    theta.flat.copy_(torch.arange(theta.flat.numel()).view_as(theta.flat))
    parts = [v.flatten(1) for block in theta.blocks for views in block for v in views.values()]
    assert torch.equal(torch.cat(parts, 1), theta.flat)
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
