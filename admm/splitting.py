"""The names of a network's layers, and the boundaries between its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from admm.checks import one_of
from admm.layers import has_global_hooks, has_hooks, tensors_of


def modules_by_name(network: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a network by name; one that occurs twice has two names."""
    return dict(network.named_modules(remove_duplicate=False))


def _is_chain(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other, and does nothing more."""
    is_sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_sequential and not has_hooks(module) and "forward" not in vars(module)


def layer_names(network: nn.Module) -> list[str]:
    """Return the names of a network's layers in the order of evaluation.

    Layers are the modules inside nested `nn.Sequential`s; one with hooks, or a `forward` of its own, is a layer itself.

    Raises:
        TypeError: for a network that is no `nn.Sequential`.
    """
    if not _is_chain(network):
        changed = " with hooks or a `forward` of its own" if isinstance(network, nn.Sequential) else ""
        raise TypeError(
            f"only an nn.Sequential of layers can be cut into blocks, got {type(network).__name__}{changed}; make one "
            "of its parts, nn.Sequential(first, second, …), modules that map a tensor to a tensor"
        )
    names = []
    for name, child in network._modules.items():  # named_children leaves out a module that occurs again
        assert child is not None
        names += [f"{name}.{inner}" for inner in layer_names(child)] if _is_chain(child) else [name]
    return names


def names_by_block(
    network: nn.Module,
    after: str | Sequence[str] | None,
    per_layer: bool,
    n_blocks: int | None,
    activation: Literal["end", "start"] | None,
) -> tuple[tuple[str, ...], ...]:
    """Return the names of each block's layers for the arguments of `admm.blocks.split`, which documents the errors."""
    names = layer_names(network)
    _check_network(network, names)
    if sum((after is not None, per_layer, n_blocks is not None)) != 1:
        raise ValueError("split: give exactly one of after=[layer names], per_layer=True, n_blocks=T")
    one_of("activation", "end" if activation is None else activation, ("end", "start"))
    if after is not None:
        if activation is not None:
            raise ValueError("activation: goes with per_layer or n_blocks; `after` says itself where to cut")
        ends = _named_boundaries(names, [after] if isinstance(after, str) else after)
    else:
        ends = _even_boundaries(network, names, n_blocks, activation or "end")
    return tuple(tuple(names[i:j]) for i, j in pairwise([0, *ends, len(names)]))


def _check_network(network: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError for hooks of all modules, and for layers that share parameters or running statistics."""
    if has_global_hooks():
        raise ValueError("network: hooks of all modules would be called for the blocks' own, too; remove them")
    modules = modules_by_name(network)
    tensors = [id(tensor) for name in names for _, _, tensor in tensors_of(modules[name])]
    if len(set(tensors)) < len(tensors):
        raise ValueError("network: layers that share parameters or running statistics are not supported yet")


def _named_boundaries(names: list[str], after: Sequence[str]) -> list[int]:
    """Return how many layers come before each cut, which is after the last layer of that name."""
    ends = []
    for boundary in after:
        inside = [i for i, name in enumerate(names) if name == boundary or name.startswith(f"{boundary}.")]
        if not inside:
            raise ValueError(f"after: no layer {boundary!r}; the layers are {', '.join(names)}")
        ends.append(inside[-1] + 1)
    if ends != sorted(set(ends)):
        raise ValueError(f"after: {list(after)} must name different layers in the network's order")
    if ends and ends[-1] == len(names):
        raise ValueError(f"after: {after[-1]!r} is the last layer, nothing would follow it")
    return ends


def _even_boundaries(network: nn.Module, names: list[str], n_blocks: int | None, activation: str) -> list[int]:
    """Return how many layers come before each cut, with the layers with parameters shared out evenly."""
    modules = modules_by_name(network)
    trainable = [i for i, name in enumerate(names) if next(modules[name].parameters(), None) is not None]
    n_blocks = len(trainable) if n_blocks is None else n_blocks
    if not 1 <= n_blocks <= len(trainable):
        raise ValueError(f"n_blocks: {n_blocks} is not between 1 and {len(trainable)}, the layers with parameters")
    firsts = [math.ceil(k * len(trainable) / n_blocks) for k in range(1, n_blocks)]
    return [trainable[k] if activation == "end" else trainable[k - 1] + 1 for k in firsts]
