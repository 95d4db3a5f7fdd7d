"""Any network cut into blocks, by a trace of its forward (torch.fx)."""

from __future__ import annotations

import copy
import functools
import inspect
import linecache
import math
import operator
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn import functional
from torch.nn.modules import transformer

from admm.random_numbers import other_random_states

# Private functions of PyTorch's transformers whose control flow depends on tensors.
_HELPERS = (
    (functional, "_canonical_mask"),
    (functional, "_none_or_dtype"),
    (transformer, "_get_seq_len"),
    (transformer, "_detect_is_causal_mask"),
)
_WAY_OUT = (
    "give the network's parts as a list of modules instead, split([first, second, …]), each of which gets what the one "
    "before returns"
)
OF_ITS_OWN = f"put such lines into a module of their own, which is called as it is, or {_WAY_OUT}"
_OF_EVERY_MODULE = set(vars(nn.Module()))
_LINE = "line"  # of a node's metadata: the file and the number of the line that it comes from
_CONSTANT = "_tensor_constant"  # the beginning of the names that PyTorch's tracer gives to constants


class _Tracer(fx.Tracer):
    """Traces the forwards that contain a cut; all other modules are called as they are.

    Raises ValueError for what a graph would not repeat: a call without gradients, and random numbers drawn meanwhile.
    """

    proxy_buffer_attributes = True  # or they would become constants

    def __init__(self, opened: set[str], inputs: Sequence[str]) -> None:
        # A function that is called with a tensor of the network is a node of the graph: its control flow is not traced.
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]
        # Types among them, such as Tensor, would no longer be types.
        self._autowrap_function_ids -= {id(v) for v in vars(functional).values() if isinstance(v, type)}
        self._opened, self._inputs, self._random_states = opened, inputs, _random_states()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # PyTorch's own looks at the code beneath decorators, and makes a placeholder of each argument.
        inputs = {name: self.create_proxy("placeholder", name, (), {}) for name in self._inputs}
        call = inspect.BoundArguments(inspect.signature(self.root.forward), OrderedDict(inputs))
        return (lambda: self.root.forward(*call.args, **call.kwargs)), []

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call_") and not torch.is_grad_enabled():
            raise ValueError(f"{target} is called without gradients, as by torch.no_grad, which a trace does not show")
        if _random_states() != self._random_states:
            raise ValueError(
                "random numbers have been drawn before this line, without a tensor of the network; a trace keeps them"
            )
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta[_LINE] = _user_line(sys._getframe())
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):  # which would become a plain dictionary
            return self.create_node("call_function", type(a), (), {name: self.create_arg(v) for name, v in a.items()})
        return super().create_arg(a)

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
    if taken := [name for name in _own_names(network) if hasattr(fx.GraphModule, name)]:
        raise ValueError(f"network: torch.fx needs the name {taken[0]!r} for itself; take another, such as {taken[0]}_")
    first_names = {id(module): name for name, module in reversed(modules.items())}  # by which a trace calls them
    after = [first_names[id(modules[name])] for name in after]
    graph = _trace(network, {parent for name in after for parent in _parents(name)}, inputs)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    ends = [_end(nodes, name) for name in after]
    if ends != sorted(set(ends)):
        raise ValueError(f"after: {list(after)} must name different modules in the order of evaluation")
    if ends and ends[-1] == len(nodes):
        raise ValueError(f"after: {after[-1]!r} is the last module, nothing would follow it")
    return _cut(network, graph, _parts(nodes, ends))


def _own_names(network: nn.Module) -> Iterator[str]:
    """Yield the names of a module's children, and of the parameters and buffers of its own."""
    of_tensors = (*network.named_parameters(recurse=False), *network.named_buffers(recurse=False))
    yield from (name for name, _ in (*network.named_children(), *of_tensors))


def _parents(name: str) -> Iterator[str]:
    """Yield the names of the modules that contain a module, of which the network itself is ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _trace(network: nn.Module, opened: set[str], inputs: Sequence[str] | None) -> fx.Graph:
    """Return the graph of the network's forward, with the inputs alone as placeholders. Raises ValueError."""
    parameters = inspect.signature(network.forward).parameters.values()
    arguments = {a.name: a for a in parameters if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)}
    if not arguments:
        raise ValueError(
            f"network: its forward takes {', '.join(map(str, parameters))}, and needs a name for each input to be "
            f"traced; {_WAY_OUT}"
        )
    if unknown := set(inputs or ()) - set(arguments):
        raise ValueError(f"inputs: {sorted(unknown)} are no arguments of forward, which are {', '.join(arguments)}")
    is_required = {name: a.default is inspect.Parameter.empty for name, a in arguments.items()}
    given = [name for name in arguments if (is_required[name] if inputs is None else name in inputs)]
    if missing := [name for name in arguments if is_required[name] and name not in given]:
        raise ValueError(f"inputs: the network's forward needs {', '.join(missing)}, too")
    other = _in_evaluation(network)
    graph = _graph_of(network, opened, given)
    _follow_mode(graph, network, _graph_of(other, opened, given), other)
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # which would make PyTorch register the function by a name it cannot find
    return graph


def _graph_of(network: nn.Module, opened: set[str], inputs: Sequence[str]) -> fx.Graph:
    """Return the graph of the network's forward in its mode, for some of its arguments. Raises ValueError."""
    containers = _containers(network, opened)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for owner, name in [*_HELPERS, *_stored_functions(network, opened)]:
                stack.enter_context(mock.patch.object(owner, name, _as_node(getattr(owner, name))))
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", _attribute_setter(network)))
            stack.enter_context(mock.patch.object(torch.autocast, "__enter__", _refuse_autocast))
            stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(_function_as_node)))
            # Without it, an encoder of PyTorch's asks for sizes and modes, to choose a path that has no gradients.
            stack.enter_context(mock.patch.object(torch.backends.mha, "get_fastpath_enabled", lambda: False))
            graph = _Tracer(opened, inputs).trace(network)
    except Exception as error:  # of whatever type it is
        raise ValueError(
            f"network: its forward cannot be traced, {_place(error)}: {type(error).__name__}: {error}; cut where only "
            f"simpler forwards contain the cut, {OF_ITS_OWN}"
        ) from error
    for name, before in containers.items():
        if _identities(before) != _identities(operator.attrgetter(name)(network)):
            raise ValueError(f"network: its forward changes {name}, which a trace does not repeat; {OF_ITS_OWN}")
    return graph


def _in_evaluation(network: nn.Module) -> nn.Module:
    """Return the network in evaluation mode, with the same tensors."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()


def _containers(network: nn.Module, opened: set[str]) -> dict[str, Any]:
    """Return copies of the lists, dictionaries and sets that the traced modules have as attributes."""
    return {
        f"{path}.{name}".lstrip("."): copy.copy(value)
        for path in opened
        for name, value in vars(network.get_submodule(path)).items()
        if isinstance(value, list | dict | set) and name not in _OF_EVERY_MODULE
    }


def _identities(container: Any) -> list[int]:
    values = container.values() if isinstance(container, dict) else container
    return [*map(id, container), *map(id, values)]


def _attribute_setter(network: nn.Module) -> Callable[[nn.Module, str, Any], None]:
    """Return a `nn.Module.__setattr__` that raises ValueError for the modules of a network."""
    modules, usual = set(network.modules()), nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if module in modules and not name.startswith(_CONSTANT):
            raise ValueError(f"it sets {name!r} of a {type(module).__name__}, which a trace does not repeat")
        usual(module, name, value)

    return set_attribute


def _refuse_autocast(context: Any) -> None:
    raise ValueError("it computes in other types, by torch.autocast, which a trace does not show")


def _random_states() -> tuple[Any, ...]:
    """Return the states of the global generators of PyTorch, NumPy and Python, to be compared."""
    return torch.get_rng_state().numpy().tobytes(), *other_random_states()


def _user_line(frame: FrameType | None) -> tuple[str, int]:
    """Return the file and the line, outside of PyTorch and this module, that a call comes from; no file if none is."""
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _as_node(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that becomes a node of the graph where it is called with a tensor of the network."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        traced = next((v for v in (*args, *kwargs.values()) if isinstance(v, fx.Proxy)), None)
        if traced is None:
            return function(*args, **kwargs)
        return traced.tracer.create_proxy("call_function", function, args, kwargs)

    return called


_APPLY: Any = inspect.getattr_static(torch.autograd.Function, "apply")


def _function_as_node(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """Apply a function with a backward of its own, of which a trace would show the forward alone."""
    return _as_node(_application(function))(*args, **kwargs)


@functools.cache
def _application(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def apply(*args: Any, **kwargs: Any) -> Any:
        return _APPLY.__get__(None, function)(*args, **kwargs)

    return apply


def _stored_functions(network: nn.Module, opened: set[str]) -> list[tuple[nn.Module, str]]:
    """Return the traced modules' attributes that are functions of PyTorch's."""
    modules = [network.get_submodule(path) for path in opened]
    return [
        (module, name)
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == functional.__name__
    ]


def _is_library(file: str) -> bool:
    return file == __file__ or Path(torch.__file__).parent in Path(file).parents


def _place(error: Exception) -> str:
    """Return the line of the user's code at which tracing failed."""
    lines = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    own = [line for line in lines if not _is_library(line[0])]
    return _described(own[-1]) if own else "in PyTorch's own code"


def _described(line: tuple[str, int]) -> str:
    return f"at {line[0]}:{line[1]}, {linecache.getline(*line).strip()!r}"


def _follow_mode(graph: fx.Graph, network: nn.Module, other_graph: fx.Graph, other: nn.Module) -> None:
    """Let arguments that the trace of a network in evaluation mode has otherwise follow the mode of the block.

    Raises ValueError that names the first line of the forward which is evaluated in one mode alone.
    """
    twins: dict[Any, fx.Node] = {}
    for node, twin in zip_longest(list(graph.nodes), other_graph.nodes):
        if node is None or twin is None or not _are_twins(node, network, twin, other):
            lines = [n.meta[_LINE] for n in (node, twin) if n is not None and n.op != "output"]
            where = _described(min(lines)) if lines else "where it returns"
            raise ValueError(
                f"network: its forward does something else in evaluation mode, {where}, and a trace is of one mode; "
                f"{OF_ITS_OWN}"
            )
        twins[twin] = node
        leaves = iter([twins.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in _leaves(twin)])

        def of_mode(leaf: Any, node: fx.Node = node, leaves: Iterator[Any] = leaves) -> Any:
            in_evaluation = next(leaves)
            if leaf is in_evaluation or (type(leaf) is type(in_evaluation) and leaf == in_evaluation):
                return leaf
            with graph.inserting_before(node):
                return graph.call_function(_of_mode, (graph.get_attr("training"), leaf, in_evaluation))

        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), of_mode)


def _of_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    return in_training if training else in_evaluation


def _are_twins(node: fx.Node, network: nn.Module, twin: fx.Node, other: nn.Module) -> bool:
    """Whether nodes of two networks' graphs do the same, whatever numbers and nodes they get."""
    if (node.op, node.target, _structure(node)) != (twin.op, twin.target, _structure(twin)):
        return False
    is_constant = node.op == "get_attr" and str(node.target).startswith(_CONSTANT)
    return not is_constant or torch.equal(getattr(network, str(node.target)), getattr(other, str(twin.target)))


def _structure(node: fx.Node) -> Any:
    return fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: None)


def _leaves(node: fx.Node) -> list[Any]:
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


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
