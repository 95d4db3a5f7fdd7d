"""Networks as plain `nn.Module`s with named layers, and their initialisations."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from admm.checks import shown
from admm.layers import tensors_of
from admm.layout import frozen_statistics
from admm.random_numbers import random_numbers_kept
from admm.user_warnings import warn


def mlp(input_shape: int | Sequence[int], hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Return a fully connected ReLU network: `flatten`, `fc1` (`linear`, `relu`), …, `fcL` (`linear`).

    The paper's shallow network is `mlp(784, [128, 128], 10)` (§4.1).

    Args:
        input_shape: the shape of a sample, or its number of values.
        hidden: the widths of the hidden layers.
        classes: the number of outputs.

    Raises:
        ValueError: for widths that are not whole numbers from 1 up.

    >>> mlp(input_shape=[8, 8], hidden=[32], classes=10)(torch.zeros(5, 8, 8)).shape
    torch.Size([5, 10])
    """
    if not isinstance(hidden, Sequence) or not all(isinstance(width, int) for width in hidden):
        raise ValueError(f"hidden: {shown(hidden)} is not a list of widths, such as [128, 128]")
    features = input_shape if isinstance(input_shape, int) else math.prod(input_shape)
    widths = [features, *hidden, classes]
    if min(widths) < 1:
        raise ValueError(f"hidden: layer widths must be at least 1, got {widths}, inputs and outputs included")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        layer: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(before, after))
        if number < len(widths) - 1:
            layer["relu"] = nn.ReLU()
        layers[f"fc{number}"] = nn.Sequential(layer)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation next to a shortcut (He et al. 2016, Figure 5 left), which is a 1×1
    convolution where the shape changes: images [n, before, H, W] to [n, after, H/stride, W/stride]."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x), inplace=True)


def resnet18(input_shape: Sequence[int], classes: int, width: int = 64) -> nn.Sequential:
    """Return a ResNet-18 for small images.

    `conv1` is 3×3 and no pooling follows; `conv2_x` to `conv5_x` are two `BasicBlock`s each, with width, 2, 4 and 8
    times width channels; then come `pool`, `flatten` and `fc`.

    Args:
        input_shape: the shape of a sample, [C, H, W], or [H, W], to which the layer `channel` adds an axis.
        classes: the number of outputs.
        width: the channels of `conv1`.

    Raises:
        ValueError: for another shape, or a width that is not a whole number from 1 up.

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, https://arxiv.org/abs/1512.03385
    """
    if len(input_shape) not in (2, 3):
        raise ValueError(f"input_shape: ResNet-18 takes images [C, H, W] or [H, W], not samples of {list(input_shape)}")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width: {shown(width)} is not a whole number from 1 up")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = input_shape[0]
    if len(input_shape) == 2:
        layers["channel"], channels = nn.Unflatten(1, (1, input_shape[0])), 1
    stem = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), bn=nn.BatchNorm2d(width))
    layers["conv1"] = nn.Sequential(stem | {"relu": nn.ReLU()})
    before = width
    for stage, after in enumerate((width, 2 * width, 4 * width, 8 * width), start=2):
        first = BasicBlock(before, after, stride=1 if stage == 2 else 2)
        layers[f"conv{stage}_x"] = nn.Sequential(first, BasicBlock(after, after, stride=1))
        before = after
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(before, classes)}
    return nn.Sequential(layers)


_INITIALISATIONS: dict[str, Callable[..., Any]] = {
    "normal": nn.init.normal_,  # mean, std
    "uniform": nn.init.uniform_,  # a, b
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "pytorch": lambda weight: weight,
}


def initialiser(name: str, bias: float | None = 0.0, **options: float) -> Callable[[nn.Module], None]:
    """Return a function that initialises a module in place from PyTorch's global random state.

    Weights are the parameters with "weight" in their name and two or more axes, except those of embeddings, which keep
    PyTorch's default; a parametrised weight is drawn as a whole. Frozen parameters are drawn, too, but `Blocks.initial`
    takes no notice of it.

    Args:
        name: how weights are drawn: normal (mean, std), uniform (a, b), kaiming_normal, kaiming_uniform, or pytorch
            (each layer's own default, biases included).
        bias: the constant that biases get; None leaves them at PyTorch's default.
        options: the numbers that `name` takes.

    Raises:
        ValueError: for another name or option. The function that is returned raises it, and names the parameter, where
            only the network's constructor draws one, so that all seeds would share it; `as_constructed` is for these.

    >>> network = mlp(input_shape=2, hidden=[], classes=1)
    >>> initialiser("uniform", a=0.5, b=0.5)(network)
    >>> dict(network.named_parameters())["fc1.linear.weight"].tolist(), network.fc1.linear.bias.tolist()
    ([[0.5, 0.5]], [0.0])
    """
    if name not in _INITIALISATIONS:
        raise ValueError(f"name: {name!r} is not one of {', '.join(_INITIALISATIONS)}")
    fill = _INITIALISATIONS[name]

    def draw(network: nn.Module) -> None:
        for module in network.modules():
            _reset(module)
        for module in network.modules():
            if parametrize.is_parametrized(module):
                _draw_parametrised(module, fill, options)
            if name != "pytorch":
                _fill(module, fill, options, bias)

    def initialise(network: nn.Module) -> None:
        before = {path: parameter.detach().clone() for path, parameter in network.named_parameters()}
        draw(network)
        same = [path for path, parameter in network.named_parameters() if _is_drawn_and_same(parameter, before[path])]
        if same:
            _check_drawn(network, same, draw)

    try:
        fill(torch.empty(1, 1), **options)
    except TypeError as error:
        taken = [option for option in list(signature(fill).parameters)[1:] if option != "generator"]
        raise ValueError(f"name: {name!r}: {error}; it takes {', '.join(taken) or 'no options'}") from None
    return initialise


def _is_drawn_and_same(parameter: Tensor, before: Tensor) -> bool:
    return (
        parameter.requires_grad and torch.equal(parameter, before) and not bool((before == before.flatten()[:1]).all())
    )


def _check_drawn(network: nn.Module, same: Sequence[str], draw: Callable[[nn.Module], None]) -> None:
    """Raise ValueError if `draw` leaves one of these parameters as it was.

    Parameters that it does set may be the same by chance, such as by the seed that the network was constructed with.
    """
    twin = copy.deepcopy(network)
    with random_numbers_kept(), torch.no_grad():
        shifted = {path: twin.get_parameter(path).add_(1.0).clone() for path in same}
        draw(twin)
    for path, value in shifted.items():
        # A factor of a parametrised weight may stay as it was, such as one that is the identity.
        if torch.equal(twin.get_parameter(path), value) and ".parametrizations." not in f".{path}":
            raise ValueError(
                f"initialise: parameter {path!r} is set by the network's constructor alone, and if it is drawn there, "
                "all seeds would share it; give its module a method reset_parameters, or take "
                "admm.as_constructed(build), where build() makes a new network"
            )


def as_constructed(build: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    """Return a function that gives a module the parameters and buffers of a new one, which `build` makes.

    Of these `Blocks.initial` takes trained parameters and statistics. All else stays that of the network that was
    split, and is the same for all seeds: frozen parameters, the buffers of modules whose parameters are all frozen, and
    those of whole numbers or truth values, except for single ones. So do buffers with persistent=False. The function
    warns where the new module has others, once of each name.

    Raises:
        ValueError: for a network in place of a function. The function that is returned raises it if `build` makes no
            network.
    """
    told = set[str]()
    if not callable(build) or isinstance(build, nn.Module):
        raise ValueError(f"build: {shown(build)} is no function that makes a network, such as lambda: Network()")

    def initialise(network: nn.Module) -> None:
        new = build()
        if not isinstance(new, nn.Module):
            raise ValueError(f"build: has returned {shown(new)}, where a new network is needed")
        names = [name for name in _left_out(network, new) if name not in told]
        network.load_state_dict(new.state_dict())
        told.update(names)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warn(
                f"as_constructed: build() has made other values of {', '.join(names[:3])}{more}, but all seeds have "
                "those of the network that was split, as of all that is neither trained nor a statistic; split a "
                "network that has the values which all seeds are to have"
            )

    return initialise


def _left_out(network: nn.Module, new: nn.Module) -> Iterator[str]:
    """Yield the names of tensors which all replicas of a network have, where those of a new network are others."""
    statistics = new.state_dict().keys() - {*frozen_statistics(network)}
    taken = {name for kind, name, _ in tensors_of(network) if kind == "parameters" or name in statistics}
    former = dict((*network.named_parameters(), *network.named_buffers()))
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        if name in former and name not in taken:
            one, other = former[name].to_dense(), tensor.to_dense()
            if not torch.equal(one, other.to(one)):
                yield name


def as_given(network: nn.Module) -> None:
    """Leave a network as it is, so that all seeds start from its present parameters, such as those of a pretrained one.

    A function of one's own can draw a part: `lambda network: network.fc.reset_parameters()`.
    """


def _reset(module: nn.Module) -> None:
    """Set a module's parameters to its own default, which `nn.MultiheadAttention` calls by an underscore."""
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, method, None)):
            reset()
            return


def _fill(module: nn.Module, fill: Callable[..., Any], options: dict[str, float], bias: float | None) -> None:
    """Fill the parameters of a module itself, without those of its children."""
    for name, parameter in module.named_parameters(recurse=False):
        if "weight" in name and parameter.ndim > 1:
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                fill(parameter, **options)
        elif bias is not None and name.endswith("bias") and parameter.ndim == 1:
            nn.init.constant_(parameter, bias)


def _draw_parametrised(module: nn.Module, fill: Callable[..., Any], options: dict[str, float]) -> None:
    """Draw a module's parametrised weights (`torch.nn.utils.parametrizations`) as those of its plain twin.

    PyTorch's own `remove_parametrizations` would change the class, which the module and its twin share.
    """
    kind = parametrize.type_before_parametrizations(module)
    plain: nn.Module = object.__new__(kind)
    names = list(module.parametrizations)  # type: ignore[arg-type]
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
    values |= {name: getattr(module, name).detach().clone() for name in names}
    parameters = {name: nn.Parameter(value) for name, value in values.items()}
    plain.__dict__.update(vars(module) | {"_parameters": parameters, "_modules": {}})
    _reset(plain)
    _fill(plain, fill, options, None)
    try:
        with torch.no_grad():
            for name in names:
                setattr(module, name, parameters[name].detach())
                for part in module.get_submodule(f"parametrizations.{name}").children():
                    if isinstance(part, parametrizations._SpectralNorm):  # whose vectors its constructor draws
                        fresh = type(part)(parameters[name].detach(), part.n_power_iterations, part.dim, part.eps)
                        part.load_state_dict(fresh.state_dict())
    except (RuntimeError, NotImplementedError) as error:  # there is no inverse
        raise ValueError(
            f"initialise: the parametrised {name!r} of a {kind.__name__} cannot be drawn ({error}); take "
            "admm.as_constructed(build), where build() makes a new network"
        ) from None
