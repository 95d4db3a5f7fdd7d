"""Networks and initialisations."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from admm.blocks import split
from admm.models import as_constructed, initialiser, mlp, resnet18


def filled(name: str, seed: int = 0, **options: float) -> nn.Sequential:
    network = mlp(200, [100], 50)
    torch.manual_seed(seed)
    initialiser(name, **options)(network)
    return network


def test_mlp_is_the_composition_of_its_layers():
    network, x = mlp(12, [5, 4], 3), torch.randn(7, 3, 4)
    fc1, fc2, fc3 = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(network(x), fc3(fc2(fc1(x.flatten(1)).clamp(min=0)).clamp(min=0)))


def test_mlp_without_hidden_layers_is_linear():
    assert [name for name, _ in mlp(4, [], 3).named_parameters()] == ["fc1.linear.weight", "fc1.linear.bias"]


def test_the_paper_s_network_has_118282_parameters():
    assert sum(p.numel() for p in mlp(784, [128, 128], 10).parameters()) == 784 * 128 + 128 + 129 * 128 + 129 * 10


@pytest.mark.parametrize("widths", [(0, [2], 2), (2, [0], 2), (2, [2], 0)])
def test_a_width_below_one_is_refused(widths):
    with pytest.raises(ValueError, match="hidden: layer widths must be at least 1"):
        mlp(*widths)


@pytest.mark.parametrize(
    "name, options, mean, std, largest",
    [
        ("normal", {"mean": 0.5, "std": 0.1}, 0.5, 0.1, None),
        ("uniform", {"a": 0.0, "b": 1e-4}, 5e-5, 1e-4 / 12**0.5, 1e-4),
        ("kaiming_normal", {}, 0.0, (2 / 200) ** 0.5, None),
        ("kaiming_uniform", {}, 0.0, (2 / 200) ** 0.5, (6 / 200) ** 0.5),
        ("pytorch", {}, 0.0, (1 / 3 / 200) ** 0.5, (1 / 200) ** 0.5),
    ],
)
def test_weights_have_the_named_distribution(name, options, mean, std, largest):
    weight = filled(name, **options).fc1.linear.weight.detach()  # 20,000 entries
    assert weight.mean().item() == pytest.approx(mean, abs=4 * std / 20_000**0.5)
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    if largest is not None:
        assert 0.99 * largest < weight.max() <= largest


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_biases_are_constant(bias):
    network = filled("normal", bias=bias)
    assert torch.equal(network.fc1.linear.bias, torch.full((100,), bias))
    assert torch.equal(network.fc2.linear.bias, torch.full((50,), bias))


@pytest.mark.parametrize("name, options", [("normal", {"bias": None}), ("pytorch", {}), ("pytorch", {"bias": 0.3})])
def test_biases_may_keep_pytorch_s_default(name, options):
    bias = filled(name, **options).fc1.linear.bias
    assert bias.unique().numel() > 50 and bias.abs().max() <= 200**-0.5


def test_an_initialisation_does_not_depend_on_what_was_there():
    network = filled("normal", seed=1)
    torch.manual_seed(3)
    initialiser("pytorch")(network)
    again = filled("pytorch", seed=3)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))


def test_normalisation_weights_stay_one():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))
    initialiser("normal", std=5.0)(network)
    assert torch.equal(network[1].weight, torch.ones(2)) and torch.equal(network[1].bias, torch.zeros(2))


def test_an_unknown_initialisation_lists_the_names():
    with pytest.raises(
        ValueError,
        match=r"name: 'xavier' is not one of normal, uniform, kaiming_normal, kaiming_uniform, pytorch",
    ):
        initialiser("xavier")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("normal", "mean, std"),
        ("uniform", "a, b"),
        ("kaiming_normal", "a, mode, nonlinearity"),
        ("kaiming_uniform", "a, mode, nonlinearity"),
        ("pytorch", "no options"),
    ],
)
def test_an_unknown_option_is_refused_by_name(name, taken):
    with pytest.raises(ValueError, match=rf"^name: '{name}': .*'stdd'.*; it takes {taken}$"):
        initialiser(name, stdd=1.0)


class Positions(nn.Module):
    """Parameters of its own, of which a constructor draws one."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position + self.token


@pytest.mark.parametrize("name", ["pytorch", "kaiming_normal", "normal"])
def test_what_a_constructor_alone_draws_is_refused_by_name(name):
    told = (
        r"^initialise: parameter '1.position' is set by .* or take admm.as_constructed\(build\), where build\(\) makes"
    )
    with pytest.raises(ValueError, match=told):
        initialiser(name)(nn.Sequential(nn.Linear(4, 4), Positions()))


class Reset(Positions):
    """It draws what it has itself, and has names as those of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.my_weight, self.my_bias = nn.Parameter(torch.full((2, 4), 5.0)), nn.Parameter(torch.full((4,), 5.0))
        self.scale = nn.Parameter(torch.randn(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position, std=0.02)


def test_a_module_s_own_parameters_are_what_its_reset_draws_or_what_is_constant():
    """As docs/networks.md has it."""
    module = Reset()
    scale, position = module.scale.item(), module.position.clone()
    initialiser("pytorch")(module)
    assert module.position.std() < 0.1 and not torch.equal(module.position, position)
    assert (module.token == 0).all() and module.scale.item() == scale
    assert (module.my_weight == 5).all() and (module.my_bias == 5).all()
    initialiser("normal", std=0.01)(module)
    assert module.my_weight.std() < 0.1 and (module.my_bias == 0).all() and module.scale.item() == scale


def test_what_the_same_seed_has_drawn_before_is_no_error():
    torch.manual_seed(3)
    network = mlp(6, [5], 3)
    before = network.fc1.linear.weight.clone()
    torch.manual_seed(3)
    initialiser("pytorch")(network)
    assert torch.equal(network.fc1.linear.weight, before)


def test_as_constructed_draws_every_parameter_and_buffer():
    def build() -> nn.Sequential:
        return nn.Sequential(Positions(), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))

    network = build()
    torch.manual_seed(7)
    as_constructed(build)(network)
    torch.manual_seed(7)
    expected = build().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


class Fixed(nn.Module):
    """Besides two layers, what is neither trained nor a statistic, and what a module that is frozen has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(40))
        self.register_buffer("mask", torch.rand(40) > 0.5)
        self.register_buffer("scale", torch.rand(40), persistent=False)
        self.register_buffer("offset", torch.rand(40))
        self.features, self.norm = nn.Linear(40, 8).requires_grad_(False), nn.BatchNorm1d(8).requires_grad_(False)
        nn.init.normal_(self.norm.running_mean)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.order] * self.mask * self.scale + self.offset
        return self.last(self.norm(self.features(x)))


def test_what_as_constructed_leaves_out_is_told_once_and_by_name():
    blocks, start = split(Fixed(), after=["features"]), as_constructed(Fixed)
    like = torch.zeros(0)
    with pytest.warns(
        UserWarning, match=r"other values of features.weight, features.bias, order and 3 more, but"
    ) as told:
        theta = blocks.initial([0, 1], start, like)
        blocks.initial([2], start, like)
    assert len(told) == 1 and told[0].filename == __file__
    ours = blocks.export(theta, 1).state_dict()
    torch.manual_seed(1)
    new = Fixed().state_dict()
    given = blocks.network.state_dict()
    taken = {name for name in ours if name.startswith("last.") or name == "offset"}
    assert all(torch.equal(value, (new if name in taken else given)[name]) for name, value in ours.items())


def test_as_constructed_says_nothing_where_all_seeds_are_to_have_the_same():
    given = Fixed()

    def build() -> nn.Module:
        new = copy.deepcopy(given)
        new.last.reset_parameters()
        new.offset.uniform_()
        new.get_buffer("scale").data = new.get_buffer("scale").double()  # a type alone makes no difference
        return new

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(given, after=[]).initial([0, 1], as_constructed(build), torch.zeros(0))


@pytest.mark.parametrize("build", [nn.Linear(2, 2), nn.Sequential(*[nn.ReLU()] * 9), "linear"], ids=type)
def test_as_constructed_takes_a_function_that_makes_a_network(build):
    with pytest.raises(
        ValueError, match=r"^build: .* is no function that makes a network, such as lambda: Network\(\)$"
    ):
        as_constructed(build)
    with pytest.raises(ValueError, match=r"^build: has returned None, where a new network is needed$"):
        as_constructed(lambda: None)(nn.Linear(2, 2))


PARAMETRISATIONS = [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]


@pytest.mark.parametrize("name", ["pytorch", "kaiming_normal"])
def test_attention_is_drawn_whole_for_each_seed(name):
    blocks = split(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)), after=[])
    theta = blocks.initial([0, 1, 0], initialiser(name), like=torch.zeros(0))
    (views,) = theta.blocks[0]
    assert torch.equal(theta.flat()[0], theta.flat()[2])
    for parameter in (views[key] for key in views if "in_proj_weight" in key or ("linear" in key and "weight" in key)):
        assert not (parameter[0] == parameter[1]).any()


@pytest.mark.parametrize("name", ["pytorch", "kaiming_normal", "normal"])
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_a_parametrised_weight_is_its_plain_twin_s(name, parametrisation):
    def drawn(*, plain: bool) -> nn.Module:
        torch.manual_seed(1)
        layer = nn.Linear(5, 4) if plain else parametrisation(nn.Linear(5, 4))
        torch.manual_seed(2)
        initialise(layer)
        return layer

    initialise = initialiser(name)
    expected, found = drawn(plain=True), drawn(plain=False)
    assert torch.equal(found.bias, expected.bias)
    if parametrisation is nn.utils.parametrizations.weight_norm:
        assert (found.parametrizations.weight.original0 > 0).all()
    else:
        torch.testing.assert_close(found.weight @ found.weight.T, torch.eye(4), atol=1e-5, rtol=0.0)
    weights = [seeded(initialise, nn.Linear(5, 4), parametrisation, seed) for seed in (0, 1)]
    assert not (weights[0] == weights[1]).any()


def seeded(initialise, layer, parametrisation, seed):
    layer = parametrisation(layer)
    torch.manual_seed(seed)
    initialise(layer)
    return layer.weight


def test_weight_norm_s_weight_is_drawn_as_a_plain_one():
    """Its two parts are drawn as one weight, whose bound is that of its fan-in."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(100, 50))
    initialiser("kaiming_uniform")(layer)
    assert 0.9 * (6 / 100) ** 0.5 < layer.weight.abs().max() <= (6 / 100) ** 0.5 + 1e-6


def test_spectral_norm_s_vectors_are_each_seed_s_own():
    blocks = []
    for seed in (0, 1):  # that the program has drawn by before
        torch.manual_seed(seed)
        blocks.append(split(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))), after=[]))
    first, second = (b.initial([5, 6], initialiser("pytorch"), like=torch.zeros(0)) for b in blocks)
    assert torch.equal(first.buffers, second.buffers) and torch.equal(first.flat(), second.flat())
    assert not (first.buffers[0] == first.buffers[1]).any()


def test_embeddings_keep_pytorch_s_default():
    network = nn.Sequential(nn.Embedding(2000, 10), nn.Linear(10, 3))
    initialiser("normal", std=5.0)(network)
    assert 0.9 < network[0].weight.std() < 1.1


def test_a_parametrisation_without_an_inverse_is_refused():
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Squared())
    with pytest.raises(ValueError, match=r"^initialise: the parametrised 'weight' of a Linear cannot be drawn"):
        initialiser("pytorch")(layer)


# --- ResNet-18


def test_resnet18_is_torchvision_s_with_a_stem_for_small_images():
    theirs = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, x = resnet18((3, 16, 16), 10), torch.randn(4, 3, 16, 16)
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        mine.copy_(other)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_resnet18_has_the_published_number_of_parameters_and_named_stages():
    network = resnet18((3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == 11_173_962
    assert list(dict(network.named_children())) == [
        "conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "pool", "flatten", "fc"
    ]  # fmt: skip
    blocks = split(network, after="conv3_x")
    assert [names[-1] for names in blocks.names] == ["conv3_x.1", "fc"]


def test_resnet18_takes_grey_images():
    network, x = resnet18((8, 9), 5, width=4).eval(), torch.randn(2, 8, 9)
    torch.testing.assert_close(network(x), network[1:](x.unsqueeze(1)))


@pytest.mark.parametrize("shape, width, message", [((9,), 4, r"not samples of \[9\]"), ((8, 8), 0, r"width: 0 is")])
def test_resnet18_refuses_other_samples_and_widths(shape, width, message):
    with pytest.raises(ValueError, match=message):
        resnet18(shape, 10, width)
