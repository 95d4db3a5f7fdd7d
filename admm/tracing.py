"""Any network cut into blocks, by a trace of its forward (torch.fx)."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules import transformer

# Private functions of PyTorch's transformers whose control flow depends on tensors.
_HELPERS = (
    (functional, "_canonical_mask"),
    (transformer, "_get_seq_len"),
    (transformer, "_detect_is_causal_mask"),
)
_WAY_OUT = (
    "give the network's parts as a list of modules instead, split([first, second, …]), each of which gets what the one "
    "before returns"
)


class _Tracer(fx.Tracer):
    """Traces the forwards that contain a cut; all other modules are called as they are."""

    proxy_buffer_attributes = True  # or they would become constants

    def __init__(self, opened: set[str]) -> None:
        # A function that is called with a tensor of the network is a node of the graph: its control flow is not traced.
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]
        self._opened = opened

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call_") and not torch.is_grad_enabled():
            raise ValueError(f"{target} is called without gradients, as by torch.no_grad, which a trace does not show")
        return super().create_node(kind, target, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened


def traced_blocks(network: nn.Module, after: Sequence[str], inputs: Sequence[str] | None) -> list[fx.GraphModule]:
    """Return the blocks of a network that is cut after the last calls of the modules named `after`.

    Each gets what crosses the cut before it, the first one the network's inputs, and returns a tuple of all that
    crosses the cut after it, what it only passes on included; the last one returns what the network does. Their
    modules, parameters and buffers are the network's, with its names.

    Args:
        network: any module; it must be in training mode, except for modules that never are.
        after: names of modules.
        inputs: the names of the arguments of `forward` that are given; None means all that have no default.

    Raises:
        ValueError: for names or inputs that are not the network's, or not in the order of evaluation, and for a forward
            that cannot be traced.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    if unknown := [name for name in after if name not in modules or not name]:
        children = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"after: no module {unknown[0]!r}; the network's children are {children}")
    graph = _trace(network, {parent for name in after for parent in _parents(name)}, inputs)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    ends = [_end(nodes, name) for name in after]
    if ends != sorted(set(ends)):
        raise ValueError(f"after: {list(after)} must name different modules in the order of evaluation")
    if ends and ends[-1] == len(nodes):
        raise ValueError(f"after: {after[-1]!r} is the last module, nothing would follow it")
    return _cut(network, graph, _parts(nodes, ends))


def _parents(name: str) -> Iterator[str]:
    """Yield the names of the modules that contain a module, of which the network itself is ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _trace(network: nn.Module, opened: set[str], inputs: Sequence[str] | None) -> fx.Graph:
    """Return the graph of the network's forward, with the inputs alone as placeholders. Raises ValueError."""
    arguments = inspect.signature(network.forward).parameters
    if many := [str(a) for a in arguments.values() if a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]:
        raise ValueError(
            f"network: its forward takes {many[0]}, and needs a name for each input to be traced; {_WAY_OUT}"
        )
    if unknown := set(inputs or ()) - set(arguments):
        raise ValueError(f"inputs: {sorted(unknown)} are no arguments of forward, which are {', '.join(arguments)}")
    is_required = {name: a.default is inspect.Parameter.empty for name, a in arguments.items()}
    given = [name for name in arguments if (is_required[name] if inputs is None else name in inputs)]
    defaults = {name: arguments[name].default for name in arguments if name not in given}
    if missing := [name for name in defaults if is_required[name]]:
        raise ValueError(f"inputs: the network's forward needs {', '.join(missing)}, too")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for module, name in _HELPERS:
                stack.enter_context(mock.patch.object(module, name, _as_node(getattr(module, name))))
            graph = _Tracer(opened).trace(network, concrete_args=defaults)
    except Exception as error:  # of whatever type it is
        raise ValueError(
            f"network: its forward cannot be traced, {_place(error)}: {type(error).__name__}: {error}; cut where only "
            f"simpler forwards contain the cut, or {_WAY_OUT}"
        ) from error
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.name not in given and n.target not in given]:
        _erase(graph, node)
    for node in list(graph.nodes):
        node.meta.pop("is_wrapped", None)  # which would make PyTorch register the function by a name it cannot find
        _follow_mode(graph, node)
    return graph


def _as_node(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that becomes a node of the graph where it is called with a tensor of the network."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        traced = next((v for v in (*args, *kwargs.values()) if isinstance(v, fx.Proxy)), None)
        if traced is None:
            return function(*args, **kwargs)
        return traced.tracer.create_proxy("call_function", function, args, kwargs)

    return called


def _place(error: Exception) -> str:
    """Return the line of the user's code at which tracing failed."""
    own = Path(torch.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if own not in Path(f.filename).parents]
    frame = frames[-1]
    return (
        f"at {frame.filename}:{frame.lineno}, {frame.line!r}" if frame.filename != __file__ else "in PyTorch's own code"
    )


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and all that follows from it, such as the check that an argument has its default."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _follow_mode(graph: fx.Graph, node: fx.Node) -> None:
    """Let a function's argument `training`, which the trace has found to be true, follow the mode of the block."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != functional.__name__:
        return
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    if bound.arguments.get("training") is True:
        with graph.inserting_before(node):
            bound.arguments["training"] = graph.get_attr("training")
        node.args, node.kwargs = bound.args, bound.kwargs


def _end(nodes: Sequence[fx.Node], name: str) -> int:
    """Return how many nodes come before the cut after a module. Raises ValueError if it is not called."""
    inside = [place for place, node in enumerate(nodes) if name in _scopes(node)]
    if not inside:
        raise ValueError(f"after: the network's forward does not call {name!r}")
    return inside[-1] + 1


def _scopes(node: fx.Node) -> set[str]:
    """Return the names of the modules during whose call a node was made."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()} | {str(node.target)}


def _parts(nodes: Sequence[fx.Node], ends: Sequence[int]) -> dict[fx.Node, int]:
    """Return the number of each node's block, from 0; an entry of a tuple is in the block of the tuple."""
    parts: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        whole = node.args[0] if node.target is operator.getitem else None
        parts[node] = parts[whole] if whole in parts else sum(end <= place for end in ends)  # type: ignore[index]
    return parts


# PyTorch's own split_module hands tensors past the blocks in between, and parameters in as arguments; here a block gets
# and returns all that crosses the cuts around it.
def _cut(network: nn.Module, graph: fx.Graph, parts: dict[fx.Node, int]) -> list[fx.GraphModule]:
    """Return a module for each block."""
    n_blocks = max(parts.values(), default=0) + 1
    last_use: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = max(last_use.get(used, 0), parts.get(node, n_blocks - 1))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = [*placeholders, *(node for node in graph.nodes if node in parts)]
    made_in = dict.fromkeys(placeholders, -1) | parts
    blocks, before = [], placeholders
    for t in range(n_blocks):
        after = [v for v in values if made_in[v] <= t < last_use.get(v, -1)]
        block, env = fx.Graph(), {}
        for node in before:
            env[node] = block.placeholder(node.name)

        def copied(node: fx.Node, block: fx.Graph = block, env: dict[fx.Node, fx.Node] = env) -> fx.Node:
            if node not in env:  # an attribute of the network, copied to each block that uses it
                env[node] = block.node_copy(node)
            return env[node]

        for node in graph.nodes:
            if parts.get(node) == t:
                for used in node.all_input_nodes:
                    copied(used)
                env[node] = block.node_copy(node, copied)
        output: Any = tuple(env[node] for node in after)
        if t == n_blocks - 1:
            output = fx.map_arg(next(n for n in graph.nodes if n.op == "output").args[0], copied)
        block.output(output)
        blocks.append(fx.GraphModule(network, block, class_name=f"Block{t + 1}"))
        before = after
    return blocks
