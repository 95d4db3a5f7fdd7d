"""A check, on a few samples, that the blocks of a network compute what the network itself computes."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from admm.blocks import Block, Blocks, Parameters
from admm.crossings import Crossing
from admm.layers import ModuleLayer, as_arguments, called_with, has_hooks, pinned_modules, seeded, set_mode, tensors_of
from admm.random_numbers import other_random_states
from admm.tracing import OF_ITS_OWN
from admm.visits import Visit

_FEW = 4  # samples, enough to be normalised in training
_NEARLY_ZERO = 1e-2  # below it, a parameter hides what it is multiplied by
_INPUTS = "; `inputs` of split names the arguments of a traced network that are given, if not those without a default"
_OF_EVERY_MODULE = set(vars(nn.Module()))


def suited(blocks: Blocks, x: Any) -> Blocks:
    """Return blocks that can be evaluated on inputs x [N, ...]: these, or if need be these in the type of x.

    Parameters keep their type, unless x is a tensor of a wider one which the network cannot take so. Raises ValueError
    for trained parameters that are complex.
    """
    blocks = blocks.given
    for name, parameter in blocks.network.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"network: parameter {name!r} is of {parameter.dtype}, and numbers of floating point are trained, such "
                "as those of torch.view_as_real"
            )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == blocks.dtype:
        return blocks
    if torch.promote_types(x.dtype, blocks.dtype) != x.dtype or _can_take(blocks, x[:_FEW]):
        return blocks
    return blocks.with_dtype(x.dtype)


def _can_take(blocks: Blocks, x: Tensor) -> bool:
    network = copy.deepcopy(blocks.network).to(x.device).eval()
    try:
        with torch.no_grad(), seeded(0, x.device):
            network(x.clone())
    except Exception:  # of whatever type it is
        return False
    return True


def outputs_of(blocks: Blocks, x: Any) -> Tensor:
    """Return an empty tensor with the shape [0, ...], type and device of the network's outputs for x [N, ...].

    The first time for samples of a shape, dtype and device, the blocks learn what crosses the cuts, and are compared
    with the network, in evaluation and in training mode, with the network's present parameters; only those that are
    nearly 0, behind which differences would be hidden, are others.

    Args:
        blocks: the network.
        x: its inputs, a tensor [N, ...], or a tuple or a dictionary of such tensors.

    Raises:
        ValueError: that names a layer which cannot be evaluated, or not twice with the same result, as it draws random
            numbers from another generator than PyTorch's global ones, or counts its calls; what a forward changes that
            is not kept for each replica; the first block whose outputs are not the network's, or which has gradients in
            one mode alone; or outputs that are not one row per sample.
    """
    few = pytree.tree_map_only(Tensor, lambda v: v[:_FEW], x)
    leaves, structure = pytree.tree_flatten(few)
    kind = (str(structure), *((v.shape[1:], v.dtype, v.device) for v in leaves))
    if kind not in blocks.compared:
        with seeded(0, leaves[0].device):
            network = _without_zeros(blocks.network)
            expected, trained = (_Evaluation(network, few, training) for training in (False, True))
            _check_outputs_alike(expected.outputs, trained.outputs)
            _check_changes(blocks, expected.changed | trained.changed)
            _learn(blocks, few, expected)
            outputs = _compared_in_a_format(blocks, few, expected)
            _compared_in_a_format(blocks, few, trained)
        blocks.compared[kind] = outputs[:0]
    return blocks.compared[kind]


def evaluate_one(blocks: Blocks, x: Any) -> None:
    """Evaluate the network on the first sample of x alone. Raises ValueError where it cannot be trained on one."""
    network = copy.deepcopy(blocks.network).to(pytree.tree_leaves(x)[0].device)
    set_mode(network, True, pinned_modules(network))
    with _watched(network) as calls:
        _called(network, pytree.tree_map_only(Tensor, lambda v: v[:1], x), calls)


def forward_costs(blocks: Blocks, x: Any) -> list[tuple[int, int]]:
    """Return for each block the floating-point operations of its products, by PyTorch's counter, and the entries of its
    output, both per sample; x are inputs [N, ...]."""
    from torch.utils.flop_counter import FlopCounterMode  # which takes long to import

    few, device = _few(x)
    flat, buffers = (blocks.flatten(blocks.network, kind)[None].to(device) for kind in ("parameters", "buffers"))
    # PyTorch 2.14.1 counts nothing for an LSTM by oneDNN, nor for a transformer's fast path in evaluation mode.
    with (
        warnings.catch_warnings(action="ignore"),
        torch.backends.mkldnn.flags(enabled=False),
        seeded(0, device),
        FlopCounterMode(display=False) as counter,
    ):
        outputs = blocks.outputs(blocks.parameters(flat, buffers), few, Visit([0], x=few))
        totals = [(0, 0), *((counter.get_total_flops(), z.numel()) for z in outputs)]
    n = pytree.tree_leaves(few)[0].shape[1]
    return [((after - before) // n, entries // n) for (before, _), (after, entries) in pairwise(totals)]


def samples_are_independent(blocks: Blocks, x: Any) -> bool:
    """Whether several processes can train on parts of a mini-batch: no block draws random numbers or hands on what all
    samples share, and the outputs for the first samples of x, and what training does to buffers, are the same when
    these are evaluated in two parts. `outputs_of` has been called before."""
    layers = [layer for block in blocks for layer in block.layers if isinstance(layer, ModuleLayer)]
    if any(layer.learned.is_random for layer in layers) or any(crossing.is_shared for crossing in blocks.crossings):
        return False
    few, device = _few(x)
    n, network = pytree.tree_leaves(few)[0].shape[1], _without_zeros(blocks.network)

    def trained(part: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs, and the parameters and buffers that are changed in training."""
        flat, buffers = (blocks.flatten(network, kind)[None].to(device) for kind in ("parameters", "buffers"))
        theta, inputs = blocks.parameters(flat, buffers), pytree.tree_map_only(Tensor, lambda v: v[:, part], few)
        z, outputs, gradient, visit = inputs, list[Tensor](), blocks.gradient(), Visit([0], x=inputs)
        for block, views, of_block in zip(blocks, theta.blocks, gradient, strict=True):
            z, record = block.linearize(views, z, visit)
            block.vjp(views, record, torch.ones_like(z), of_block, False)
            outputs.append(z)
        return outputs, [theta.flat(), theta.buffers]

    (whole, state), *parts = map(trained, (slice(0, n), slice(0, n // 2), slice(n // 2, n)))
    pairs = [(z, torch.cat(of_parts, 1)) for z, *of_parts in zip(whole, *(part for part, _ in parts), strict=True)]
    pairs += [pair for _, changed in parts for pair in zip(state, changed, strict=True)]
    return all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs)


def _few(x: Any) -> tuple[Any, torch.device]:
    """Return the first samples of x, for one replica, and their device."""
    few = pytree.tree_map_only(Tensor, lambda v: v[None, :_FEW], x)
    return few, pytree.tree_leaves(few)[0].device


def _without_zeros(network: nn.Module) -> nn.Module:
    """Return a copy of a network in which no trained parameter is nearly 0 throughout."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.numel() and parameter.detach().abs().max() < _NEARLY_ZERO:
            nn.init.normal_(parameter, std=0.1)
    return network


def _check_outputs_alike(evaluated: Any, trained: Any) -> None:
    """Raise ValueError where a network returns another structure of tensors in training than in evaluation."""
    kinds = [(type(v).__name__, len(pytree.tree_leaves(v))) for v in (trained, evaluated)]
    if kinds[0] != kinds[1]:
        (kind, size), (other, other_size) = kinds
        raise ValueError(
            f"network: it returns a {kind} of {size} tensors in training mode, and a {other} of {other_size} in "
            "evaluation mode, where a loss takes one of them; give a module that returns the same in both, such as one "
            "that is built without auxiliary outputs"
        )


def _check_changes(blocks: Blocks, changed: Mapping[str, Tensor]) -> None:
    """Raise ValueError where tensors that a forward in training changes cannot be kept for each replica."""
    kept = {name for _, name, _ in tensors_of(blocks.network)}
    for name, value in changed.items():
        if name not in kept:
            raise ValueError(
                f"network: its forward changes {name!r} ({value.dtype}, {list(value.shape)}), and of what changes each "
                "replica keeps trained parameters, buffers of floating point, and those of a single whole number or "
                "truth value; register it as such"
            )
        if name in blocks.shared_buffers | blocks.shared_parameters:
            raise ValueError(
                f"network: its forward changes {name!r}, which several blocks use; give each block a module of its "
                "own, or cut so that one block makes all calls that use it"
            )


class _Evaluation:
    """Two calls of a copy of a network, as no call has changed it, what its layers have returned, and the parameters
    and buffers that a call has changed.

    Raises ValueError that names the layer which cannot be evaluated, or returns something else in the second call; and
    an attribute that counts the calls, or a parameter that is replaced.
    """

    def __init__(self, network: nn.Module, x: Any, training: bool) -> None:
        self.network, self.training, self.device = network, training, pytree.tree_leaves(x)[0].device
        copied = copy.deepcopy(network).to(self.device)
        set_mode(copied, training, pinned_modules(copied))
        parameters = dict(copied.named_parameters())
        others = other_random_states()
        with _watched(copied) as calls:
            self.outputs = _called(copied, x, calls)
            self.layers, calls.returned = calls.returned, []
            self.changed = dict(_set_back(copied, network))
            former = _attributes(copied)
            again = _called(copied, x, calls)
        self._check_attributes(former, _attributes(copied))
        if replaced := [name for name, p in copied.named_parameters() if p is not parameters[name]]:
            raise ValueError(
                f"network: its forward replaces the parameter {replaced[0]!r}, of which each replica has its own; "
                "change it in place, by `.data.copy_`"
            )
        for (name, first), (_, second) in zip(self.layers, calls.returned, strict=False):
            if not _same(first, second):
                raise ValueError(
                    f"network: in {self.mode} mode {_named(network, name)} returns something else at a second call "
                    "with the same random numbers of PyTorch's global generators; it counts its calls, or draws random "
                    "numbers from another generator, such as one of its own or NumPy's, which a visit cannot repeat"
                )
        if others != other_random_states():
            raise ValueError(
                f"network: in {self.mode} mode its forward draws random numbers of NumPy's or Python's global "
                "generator, which a visit cannot repeat; draw them from PyTorch's"
            )
        if not _same(self.outputs, again):
            raise ValueError(f"network: in {self.mode} mode its outputs change from one call to the next")

    def _check_attributes(self, former: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise ValueError for an attribute that is no parameter nor buffer, and changes from call to call."""
        for name, value in now.items():
            if name not in former or not _same_value(former[name], value):
                path, _, attribute = name.rpartition(".")
                raise ValueError(
                    f"network: in {self.mode} mode {_named(self.network, path)} changes its attribute {attribute!r} at "
                    "each call, which all replicas and evaluations share; what is to last belongs into a buffer "
                    "(register_buffer, numbers as tensors), of which each replica has its own"
                )

    @property
    def mode(self) -> str:
        return "training" if self.training else "evaluation"


def _named(network: nn.Module, path: str) -> str:
    return f"layer {path!r} ({type(network.get_submodule(path)).__name__})"


def _attributes(network: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and tensors that a network's modules have as plain attributes, and the sizes of their
    containers."""
    found: dict[str, Any] = {}
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = value.clone()
            elif isinstance(value, int | float | complex | str):
                found[f"{path}.{name}"] = value
            elif isinstance(value, Sized) and name not in _OF_EVERY_MODULE:
                found[f"{path}.{name}"] = len(value)
    return found


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _set_back(network: nn.Module, former: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give parameters and buffers their former values, and yield the names and values of those that had others."""
    before = dict([*former.named_parameters(), *former.named_buffers()])
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        value = before[name].to(tensor)
        if tensor.layout == torch.strided and _differ(tensor, value):
            yield name, tensor.detach().clone()
            tensor.data.copy_(value)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape differ; NaN is NaN."""
    return not torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@dataclass
class _Calls:
    """The layers that a call is in, and what those it has left have returned."""

    open: list[str] = field(default_factory=list)
    returned: list[tuple[str, Any]] = field(default_factory=list)


@contextmanager
def _watched(network: nn.Module) -> Iterator[_Calls]:
    """Watch the calls of a network's modules."""
    calls, handles = _Calls(), []
    for name, module in network.named_modules():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            calls.open.append(name)

        def leave(module: nn.Module, inputs: Any, outputs: Any, name: str = name) -> None:
            calls.open.pop()
            # Of a call by torch.func, such as vmap, nothing is left when that returns.
            if not any(isinstance(v, Tensor) and is_functorch_wrapped_tensor(v) for v in pytree.tree_leaves(outputs)):
                calls.returned.append((name, pytree.tree_map_only(Tensor, torch.clone, outputs)))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    yield calls
    for handle in handles:
        handle.remove()


def _called(network: nn.Module, x: Any, calls: _Calls) -> Any:
    """Return a network's outputs. Raises ValueError that names the layer which cannot be evaluated."""
    positional, keyword = as_arguments(pytree.tree_map_only(Tensor, torch.clone, x))
    try:
        with torch.no_grad(), seeded(0, pytree.tree_leaves(x)[0].device):
            return network(*positional, **keyword)
    except Exception as error:  # of whatever type it is
        layer = _named(network, calls.open[-1] if calls.open else "")
        shapes = pytree.tree_map_only(Tensor, lambda v: list(v.shape[1:]), x)
        raise ValueError(
            f"network: cannot be evaluated on samples {shapes}: {layer}: {type(error).__name__}: {error}"
            f"{_type_hint(network, x)}"
        ) from error


def _type_hint(network: nn.Module, x: Any) -> str:
    """Say which parameter is of another type than x, if one is."""
    for name, parameter in network.named_parameters() if isinstance(x, Tensor) else ():
        if parameter.dtype != x.dtype:
            other = f" or network.to({x.dtype})" if x.is_floating_point() else ""
            return f"; parameter {name!r} is of {parameter.dtype}, x of {x.dtype}: take x.to({parameter.dtype}){other}"
    return ""


def _learn(blocks: Blocks, x: Any, expected: _Evaluation) -> None:
    """Let the blocks find out what crosses the cuts, and which blocks draw random numbers or overwrite their inputs."""
    samples = len(pytree.tree_leaves(x)[0])
    is_trained = False
    values = [x, pytree.tree_map_only(Tensor, lambda v: v[: samples - 1], x)] if samples > 1 else [x]
    for number, (block, module, crossing) in enumerate(zip(blocks, blocks.modules, blocks.crossings, strict=True), 1):
        layer = block.layers[0] if isinstance(block.layers[0], ModuleLayer) else None
        if layer is None and number > 1 and not blocks.crossings[number - 2].is_plain:
            names = list(blocks.names[number - 1])
            raise ValueError(
                f"network: block {number}, {names}, takes one tensor with the samples in front, and block {number - 1} "
                "returns something else"
            )
        if layer is not None:
            layer.learned.overwrites_inputs = False
        evaluated = _copied(module, layer, False, expected.device)
        returned = [_call(evaluated, value, layer, number) for value in values]
        is_trained = is_trained or any(p.requires_grad for p in module.parameters())
        by_gradient = number < len(blocks) and (not is_trained or _hands_on_arguments(block))
        is_variable = _has_gradient if by_gradient else _is_floating
        crossing.learn(returned[0], returned[-1], samples, number, is_variable)
        if number == len(blocks):
            _check_constants(returned[0], returned[-1])
        if number == len(blocks) and not crossing.has_samples:
            shapes = pytree.tree_map_only(Tensor, lambda v: list(v.shape), returned[0])
            raise ValueError(
                f"network: its outputs for {samples} samples are {shapes}; they must have an axis of samples, along "
                "which what all samples share can be expanded"
            )
        if layer is not None:
            before = _random_state(expected.device)
            trained = _trained(_copied(module, layer, True, expected.device), values[0], layer, number)
            layer.learned.is_random = not torch.equal(before, _random_state(expected.device))
            if number < len(blocks) and not crossing.fits(trained, is_variable):
                raise ValueError(
                    f"network: block {number} hands on other values in training mode than in evaluation mode, or some "
                    "with a gradient in one of the modes alone; let it return the same in both"
                )
        values = [_handed_on(crossing, value, samples - i) for i, value in enumerate(returned)]


def _copied(module: nn.Module, layer: ModuleLayer | None, training: bool, device: torch.device) -> nn.Module:
    """Return a copy of a block's module in a mode, on a device."""
    copied, pinned = copy.deepcopy((module, layer.pinned if layer else []))
    set_mode(copied, training, pinned)
    return copied.to(device)


def _call(module: Callable[..., Any], value: Any, layer: ModuleLayer | None, number: int) -> Any:
    """Return what a block returns, with a graph of autograd, and note whether it overwrites its inputs.

    Raises ValueError where it does not take what it gets.
    """
    with torch.enable_grad():
        inputs = pytree.tree_map_only(Tensor, torch.clone, value)
        tensors = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
        versions = [v._version for v in tensors]
        positional, keyword = as_arguments(inputs, number)
        try:
            returned = module(*positional, **keyword)
        except Exception as error:  # of whatever type it is; the network itself has been evaluated
            raise ValueError(
                f"network: block {number} cannot be evaluated on what it gets, {_described(positional, keyword)}: "
                f"{type(error).__name__}: {error}"
                f"{_INPUTS if number == 1 and isinstance(error, TypeError) else ''}"
            ) from error
    if layer is not None:
        layer.learned.overwrites_inputs |= [v._version for v in tensors] != versions
    return returned if layer is not None and layer.hands_on_arguments else (returned,)


def _trained(module: nn.Module, value: Any, layer: ModuleLayer, number: int) -> Any:
    """Return what a block's module returns in training, and note which parameters it changes itself, and whether its
    gradient evaluates parts of it once more, with the module's parameters where these are no longer the replica's.

    Raises ValueError where it has no gradient.
    """
    former = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    inputs = [*filter(_has_gradient, pytree.tree_leaves(value))]
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan if parameter.is_floating_point() else 0)
    learned = layer.learned
    for learned.recomputes in (False, True):
        own = {name: p.clone().requires_grad_(is_trained) for name, (p, is_trained) in former.items()}
        places = {name: p.data_ptr() for name, p in own.items()}
        returned = _call(partial(_functional, module, own), value, layer, number)
        trained = {name: p for name, p in own.items() if p.requires_grad}
        learned.rewritten |= {n for n, p in trained.items() if p.data_ptr() != places[n] or _differ(p, former[n][0])}
        variables = [*trained.values(), *inputs]
        if called_with(module, own if learned.recomputes else {}, partial(_has_numbers, returned, variables, number)):
            return returned
    raise ValueError(f"network: the gradient of block {number} is NaN, where its outputs are finite")


def _functional(module: nn.Module, parameters: dict[str, Tensor], *positional: Any, **keyword: Any) -> Any:
    return functional_call(module, parameters, positional, keyword)


def _has_numbers(returned: Any, trained: list[Tensor], number: int) -> bool:
    """Whether the gradient of what a block has returned is not NaN where that is finite. Raises ValueError without."""
    outputs = [*filter(_has_gradient, pytree.tree_leaves(returned))]
    if not outputs or not trained:
        return True
    try:
        found = torch.autograd.grad(outputs, trained, list(map(torch.ones_like, outputs)), allow_unused=True)
    except Exception as error:  # of whatever type it is
        raise ValueError(f"network: block {number} has no gradient: {type(error).__name__}: {error}") from error
    return not (all(v.isfinite().all() for v in outputs) and any(v.isnan().any() for v in found if v is not None))


def _check_constants(outputs: Any, of_fewer: Any) -> None:
    """Raise ValueError where what a network returns besides tensors of floating point depends on the samples."""
    for leaf, other in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(of_fewer), strict=True):
        if not _is_floating(leaf) and (isinstance(leaf, Tensor) or leaf != other):
            kind = f"tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"network: its outputs have a {kind} that depends on the samples, and a loss gets tensors of floating "
                "point alone; return these"
            )


def _described(positional: tuple[Any, ...], keyword: dict[str, Any]) -> str:
    """Return what the arguments of a call are."""
    names = [*(f"{type(v).__name__}" for v in positional), *(f"{n}={type(v).__name__}" for n, v in keyword.items())]
    return f"({', '.join(names)})"


def _hands_on_arguments(block: Block) -> bool:
    """Whether a block is one of a traced network, or of a list of modules."""
    return isinstance(block.layers[0], ModuleLayer) and block.layers[0].hands_on_arguments


def _handed_on(crossing: Crossing, value: Any, samples: int) -> Any:
    """Return what the next block gets, where the coupling variable has no graph of autograd before it."""
    z, rest = crossing.pack(value, samples)
    return crossing.unpack(z.detach().requires_grad_(z.is_floating_point()), rest)


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _compared_in_a_format(blocks: Blocks, x: Any, expected: _Evaluation) -> Tensor:
    """Return what `_compared` does, with images in either memory format, as the network's may be in the other one than
    the blocks': random numbers are in the order of the memory, and rounding errors, which batch normalisation over few
    values magnifies, depend on it."""
    with suppress(ValueError):
        return _compared(blocks, x, expected)
    execution = replace(blocks.execution, channels_last=not blocks.execution.channels_last)
    return _compared(blocks.with_execution(execution), x, expected)


def _compared(blocks: Blocks, x: Any, expected: _Evaluation) -> Tensor:
    """Return the outputs of the last block. Raises ValueError unless they are the network's, with one row per sample,
    and in training mode its parameters and buffers become the network's.

    Functions are not compiled, which would be for this number of samples.
    """
    eager = blocks
    if blocks.execution.compile or blocks.execution.precision != "fp32":
        eager = blocks.with_execution(replace(blocks.execution, compile=False, precision="fp32"))
    flat, buffers = (
        eager.flatten(expected.network, kind)[None].to(expected.device) for kind in ("parameters", "buffers")
    )
    theta, visit = eager.parameters(flat, buffers), Visit([None], training=expected.training)
    stacked = pytree.tree_map_only(Tensor, lambda v: v[None], x)
    calls = Counter(name for name, _ in expected.layers)
    returned = {name: outputs for name, outputs in expected.layers if calls[name] == 1}
    with seeded(0, expected.device):
        outputs = _steps(eager, theta, stacked, visit) if expected.training else eager.outputs(theta, stacked, visit)
        for number, z in enumerate(outputs, start=1):
            crossing, names = eager.crossings[number - 1], eager.names[number - 1]
            is_last = number == len(eager)
            is_chain = len(eager.names) > 1 and not _hands_on_arguments(eager[number - 1])
            wanted = (
                expected.outputs if is_last else returned.get(names[-1]) if is_chain and crossing.is_plain else None
            )
            found = crossing.outputs(z[0])[0] if is_last else z[0]
            if wanted is not None and not _same(wanted, found):
                raise ValueError(
                    f"network: in {expected.mode} mode block {number}, {list(names)}, has other outputs than these "
                    f"layers of the network; {_cause(eager)}"
                )
    layers = [layer for block in eager for layer in block.layers if isinstance(layer, ModuleLayer)]
    if expected.training and not any(layer.learned.recomputes for layer in layers):  # statistics may change once more
        _check_changed(eager.export(theta), expected)
    return z[0]


def _cause(blocks: Blocks) -> str:
    """Say what may make a difference between a network and its blocks."""
    if len(blocks) > 1 and has_hooks(blocks.network):
        return "the hooks of the network itself are not called, as it is cut; let modules inside the blocks have them"
    for number, (block, crossing) in enumerate(zip(blocks[1:], blocks.crossings, strict=False), start=2):
        layer = block.layers[0]
        if isinstance(layer, ModuleLayer) and layer.learned.overwrites_inputs and not crossing.is_plain:
            return (
                f"block {number} changes in place what crosses the cut before it, perhaps under two names; let it not"
            )
    return (
        "a hook, a subclass, a forward that asks for types or numbers of samples, or a change in place of what has two "
        "names, as by `+=`, makes a difference"
    )


def _steps(blocks: Blocks, theta: Parameters, z: Any, visit: Visit) -> Iterator[Tensor]:
    """Yield the output of each block, as `Blocks.outputs` does, after the changes of a step whose gradient is 0."""
    for block, views, gradient in zip(blocks, theta.blocks, blocks.gradient(), strict=True):
        z, record = block.linearize(views, z, visit)
        block.vjp(views, record, torch.zeros_like(z), gradient, needs_input_grad=False)
        yield z


def _check_changed(ours: nn.Module, expected: _Evaluation) -> None:
    """Raise ValueError unless a step has changed the blocks' tensors as a call in training has the network's."""
    found = dict([*ours.named_parameters(), *ours.named_buffers()])
    for name, former in [*expected.network.named_parameters(), *expected.network.named_buffers()]:
        wanted = expected.changed.get(name, former).detach()
        if wanted.layout == torch.strided and not _same(wanted, found[name].detach().to(wanted)):
            raise ValueError(
                f"network: in training mode its forward leaves other values in {name!r} than the blocks do; where the "
                f"line that changes it is traced, {OF_ITS_OWN}"
            )


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _same(expected: Any, outputs: Any) -> bool:
    """Whether two structures of tensors agree up to rounding, to half the digits of their type."""
    one, other = (pytree.tree_leaves(value) for value in (expected, outputs))
    return len(one) == len(other) and all(map(_same_leaf, one, other))


def _same_leaf(expected: Any, found: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or expected.is_nested or found.is_nested:
        return type(expected) is type(found)
    if expected.shape != found.shape or not expected.is_floating_point():
        return expected.shape == found.shape
    digits = torch.finfo(torch.bfloat16 if torch.backends.cuda.matmul.allow_tf32 else expected.dtype).eps ** 0.5
    finite = expected.isfinite()
    scale = float(expected[finite].abs().amax()) if finite.any() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=digits * scale, equal_nan=True)
