"""A check, on a few samples, that the blocks of a network compute what the network itself computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from admm.blocks import Blocks
from admm.layers import known_layer
from admm.splitting import modules_by_name
from admm.visits import Visit

_FEW = 4  # samples, enough to be normalised in training


def outputs_of(blocks: Blocks, x: Tensor) -> torch.Size:
    """Return the shape of the network's outputs per sample of x [N, ...].

    The first time for samples of a shape, dtype and device, the blocks are compared with the network, in evaluation and
    in training mode, with the network's present parameters.

    Raises:
        ValueError: that names a layer which cannot be evaluated, or not twice with the same result, as it draws random
            numbers, overwrites its input or returns no tensor; the first block whose outputs are not the network's; or
            a parameter that x is not precise enough for.
    """
    kind = (x.shape[1:], x.dtype, x.device)
    if kind not in blocks.compared:
        few = x[:_FEW]
        _check_types(blocks.network, few)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            for training in (False, True) if len(few) > 1 else (False,):
                outputs = _outputs(blocks, few, training)
        blocks.compared[kind] = outputs.shape[1:]
    return blocks.compared[kind]


def _check_types(network: nn.Module, x: Tensor) -> None:
    """Raise ValueError for a parameter of a wider type than x."""
    for name, parameter in network.named_parameters():
        if torch.promote_types(parameter.dtype, x.dtype) != x.dtype:
            raise ValueError(
                f"network: parameter {name!r} is of {parameter.dtype}, x of {x.dtype}, the type of all computations; "
                f"take x.to({parameter.dtype}) or network.to({x.dtype})"
            )


def _outputs(blocks: Blocks, x: Tensor, training: bool) -> Tensor:
    """Return the network's outputs. Raises ValueError unless the blocks' outputs are the same."""
    mode = "training" if training else "evaluation"
    layers = dict(_layer_by_layer(blocks, _copied(blocks, x, training), x))
    network = _copied(blocks, x, training)
    outputs: Tensor = network(x)
    if not _same(outputs, layers[blocks.names[-1][-1]]):
        raise ValueError(
            f"network: in {mode} mode its outputs are not those of its layers one after the other; a layer draws "
            "random numbers, or a hook of all modules changes them"
        )
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():  # each replica has a copy
            buffer.copy_(blocks.network.get_buffer(name))
    if not _same(outputs, network(x)):
        raise ValueError(
            f"network: in {mode} mode its outputs change from one call to the next; a layer counts its calls, or draws "
            "random numbers"
        )
    for t, (names, z) in enumerate(zip(blocks.names, _block_by_block(blocks, layers, x, training), strict=True), 1):
        if not _same(layers[names[-1]], z):
            raise ValueError(
                f"network: in {mode} mode block {t}, {list(names)}, has other outputs than these layers of the "
                "network; a hook or a subclass changes what they do"
            )
    return outputs


def _block_by_block(blocks: Blocks, layers: dict[str, Tensor], x: Tensor, training: bool) -> Iterator[Tensor]:
    """Yield the outputs of each block for the outputs of the network's layers before it.

    The functions are not compiled, which would be for this number of samples.
    """
    eager = Blocks(blocks.network, blocks.names, replace(blocks.execution, compile=False, precision="fp32"))
    flat, buffers = (eager.flatten(eager.network, kind)[None].to(x) for kind in ("parameters", "buffers"))
    for block, views, names in zip(eager, eager.parameters(flat, buffers).blocks, blocks.names, strict=True):
        yield block.forward(views, x[None], Visit([0], training=training))[0]
        x = layers[names[-1]]


def _copied(blocks: Blocks, x: Tensor, training: bool) -> nn.Module:
    """Return a copy of the network, as no call has changed it, with the dtype and device of x. Raises ValueError."""
    try:
        return copy.deepcopy(blocks.network).to(x).train(training)
    except RuntimeError as error:
        raise ValueError(f"network: cannot be copied, as each seed needs it: {error}") from None


def _layer_by_layer(blocks: Blocks, network: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the names of the network's layers, one after the other, and their outputs."""
    modules = modules_by_name(network)
    for name in chain.from_iterable(blocks.names):
        module = modules[name]
        layer, inputs, state = f"layer {name!r} ({type(module).__name__})", x.clone(), _random_state(x.device)
        version = inputs._version
        try:
            output = module(inputs)
        except Exception as error:
            raise ValueError(
                f"network: cannot be evaluated on samples {list(x.shape[1:])}: {layer}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(output, Tensor):
            raise ValueError(f"{layer} returns a {type(output).__name__}, where a block passes on one tensor")
        if not torch.equal(state, _random_state(x.device)):
            raise ValueError(f"{layer} draws random numbers, so that it cannot be evaluated twice with the same result")
        if inputs._version != version and known_layer(module) is None:
            raise ValueError(f"{layer} overwrites its input, which another block may have made; let it work on a copy")
        if output.shape[:1] != x.shape[:1]:
            raise ValueError(f"{layer} makes outputs {list(output.shape)} of {len(x)} samples, which come first")
        x = output
        yield name, x


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _same(expected: Tensor, outputs: Tensor) -> bool:
    """Whether outputs agree up to rounding, to half the digits of their type."""
    if expected.shape != outputs.shape or not expected.isfinite().all():
        return expected.shape == outputs.shape
    digits = torch.finfo(torch.bfloat16 if torch.backends.cuda.matmul.allow_tf32 else expected.dtype).eps ** 0.5
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    return torch.allclose(outputs, expected, rtol=0.0, atol=digits * scale)
