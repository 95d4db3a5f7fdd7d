"""Networks as plain `nn.Module`s with named layers, and their initialisations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Fully connected ReLU network: `flatten`, `fc1` (`linear`, `relu`), …, `fcL` (`linear`).

    The paper's shallow network is `mlp(784, [128, 128], 10)` (§4.1).
    """
    if not isinstance(hidden, Sequence) or not all(isinstance(width, int) for width in hidden):
        raise ValueError(f"model.hidden: {hidden!r} is not a list of widths, such as [128, 128]")
    widths = [in_features, *hidden, out_features]
    if min(widths) < 1:
        raise ValueError(f"model: layer widths must be at least 1, got {widths}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        layer: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(before, after))
        if number < len(widths) - 1:
            layer["relu"] = nn.ReLU()
        layers[f"fc{number}"] = nn.Sequential(layer)
    return nn.Sequential(layers)


_INITIALISATIONS: dict[str, Callable[..., Any]] = {
    "normal": nn.init.normal_,  # mean, std
    "uniform": nn.init.uniform_,  # a, b
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "pytorch": lambda weight: weight,
}


def initialiser(name: str, bias: float | None = 0.0, **options: float) -> Callable[[nn.Module], None]:
    """A function that initialises a module in place: weights by `name`, biases to the constant `bias`.

    `name` is one of normal (mean, std), uniform (a, b), kaiming_normal, kaiming_uniform or pytorch (each layer's
    own default, biases included). `bias=None` leaves the biases at PyTorch's default. Raises ValueError for
    another name or option.
    """
    if name not in _INITIALISATIONS:
        raise ValueError(f"init.name: {name!r} is not one of {', '.join(_INITIALISATIONS)}")
    fill = _INITIALISATIONS[name]

    def initialise(network: nn.Module) -> None:
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if name == "pytorch":
            return
        for path, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fill(parameter, **options)
            elif bias is not None and path.endswith("bias"):
                nn.init.constant_(parameter, bias)

    try:
        fill(torch.empty(1, 1), **options)
    except TypeError as error:
        raise ValueError(f"init: {error}") from None
    return initialise
