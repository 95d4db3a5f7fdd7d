"""The parts of a network between two cuts: their names, and their modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import fx, nn

from admm.checks import at_least_one, is_bool, one_of, shown
from admm.layers import has_hooks, known_layer
from admm.tracing import traced_blocks


@dataclass(frozen=True)
class Part:
    """A network's part between two cuts.

    Attributes:
        names: its modules' names in the network, in the order of evaluation.
        module: computes it.
        layers: the modules that are evaluated one after the other without autograd; empty if `module` is evaluated.
        hands_on_arguments: whether a tuple that the module returns is the next part's arguments, not one of them.
    """

    names: tuple[str, ...]
    module: nn.Module
    layers: tuple[nn.Module, ...] = ()
    hands_on_arguments: bool = False


class Stages(nn.Sequential):
    """Modules one after the other, each of which gets what the one before it returns, a tuple as several arguments."""

    def forward(self, *inputs: Any) -> Any:
        value: Any = inputs
        for stage in self:
            value = stage(*value) if isinstance(value, tuple) else stage(value)
        return value


def modules_by_name(network: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a network by name; one that occurs twice has two names."""
    return dict(network.named_modules(remove_duplicate=False))


def is_chain(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other, and does nothing more."""
    is_sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_sequential and not has_hooks(module) and "forward" not in vars(module)


def layer_names(network: nn.Module) -> list[str]:
    """Return the names of a chain's layers in the order of evaluation.

    A chain is an `nn.Sequential`. Its layers are the modules inside nested ones; one with hooks, or a `forward` of its
    own, is a layer itself.
    """
    names = []
    for name, child in network._modules.items():  # named_children leaves out a module that occurs again
        assert child is not None
        names += [f"{name}.{inner}" for inner in layer_names(child)] if is_chain(child) else [name]
    return names


def parts_of(
    network: nn.Module,
    after: Sequence[str] | None,
    per_layer: bool,
    n_blocks: int | None,
    activation: Literal["end", "start"] | None,
    inputs: Sequence[str] | None,
) -> list[Part]:
    """Return the parts of a network for the arguments of `admm.blocks.split`, which documents the errors."""
    if isinstance(network, Stages):
        if after is not None or per_layer or n_blocks is not None:
            raise ValueError("split: a list of modules is cut between these; give no after, per_layer or n_blocks")
        last, stages = len(network) - 1, enumerate(network)  # named_children leaves out a module that occurs again
        return [Part((str(k),), stage, hands_on_arguments=k != last) for k, stage in stages]
    is_bool("per_layer", per_layer)
    if sum((after is not None, per_layer, n_blocks is not None)) != 1:
        raise ValueError("split: give exactly one of after=[layer names], per_layer=True, n_blocks=T")
    if after is not None and not (isinstance(after, Sequence) and all(isinstance(name, str) for name in after)):
        raise ValueError(f"after: {shown(after)} is neither a name of a module, which is text, nor a list of these")
    one_of("activation", "end" if activation is None else activation, ("end", "start"))
    if after is not None and activation is not None:
        raise ValueError("activation: goes with per_layer or n_blocks; `after` says itself where to cut")
    if is_chain(network):
        names = layer_names(network)
        if after is None:
            ends = _even_boundaries(network, names, n_blocks, activation or "end")
        else:
            ends = _named_boundaries(names, after)
        return _parts_of_chain(network, names, ends)
    if after is None:
        children = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"split: a {type(network).__name__} is cut by after=[names of its modules], such as {children}; per_layer "
            "and n_blocks are for an nn.Sequential"
        )
    if not after:
        return [Part(tuple(name for name, _ in network.named_children()), network)]
    blocks = traced_blocks(network, after, inputs)
    return [Part(_called(block), block, hands_on_arguments=block is not blocks[-1]) for block in blocks]


def _called(block: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the modules that a block calls."""
    return tuple(dict.fromkeys(str(node.target) for node in block.graph.nodes if node.op == "call_module"))


def _parts_of_chain(network: nn.Module, names: Sequence[str], ends: Sequence[int]) -> list[Part]:
    """Return the parts of a chain of modules, which end after so many of them."""
    modules, parts, is_trained = modules_by_name(network), list[Part](), False
    for i, j in pairwise([0, *ends, len(names)]):
        layers = tuple(modules[name] for name in names[i:j])
        module = nn.Sequential(*layers)
        module.training = network.training
        gets_variable = is_trained or i == 0
        is_trained = is_trained or any(p.requires_grad for p in module.parameters())
        # What nothing trained comes before crosses the cut as it is, which a `ModuleLayer` on both sides sees to.
        is_known = all(map(known_layer, layers)) and gets_variable and (is_trained or j == len(names))
        parts.append(Part(tuple(names[i:j]), module, layers if is_known else ()))
    return parts


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
    if n_blocks is not None:
        at_least_one("n_blocks", n_blocks)
    n_blocks = len(trainable) if n_blocks is None else n_blocks
    if not 1 <= n_blocks <= len(trainable):
        raise ValueError(f"n_blocks: {n_blocks!r} is not between 1 and {len(trainable)}, the layers with parameters")
    firsts = [math.ceil(k * len(trainable) / n_blocks) for k in range(1, n_blocks)]
    return [trainable[k] if activation == "end" else trainable[k - 1] + 1 for k in firsts]
