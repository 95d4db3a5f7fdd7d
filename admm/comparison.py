"""Whether the blocks of a network compute what the network itself does, seen once on a few samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from admm.blocks import Blocks, known_layer

FEW = 4  # samples, enough to be normalised in training


def outputs_of(blocks: Blocks, x: Tensor) -> torch.Size:
    """The shape of the network's outputs per sample, [N, ...] being that of x. The first time for samples of this kind,
    the blocks are compared with the network, in evaluation and in training mode, from the network's own parameters.

    Raises ValueError, by its name, for a layer that cannot be evaluated, or not twice with the same result: it draws
    random numbers, overwrites its input or returns no tensor; for the first block whose outputs are not the network's;
    and for parameters that x is not precise enough for.
    """
    kind = (x.shape[1:], x.dtype, x.device)
    if kind not in blocks.compared:
        few = x[:FEW]
        _check_types(blocks.network, few)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            for training in (False, True) if len(few) > 1 else (False,):
                outputs = _compared(blocks, few, training)
        blocks.compared[kind] = outputs.shape[1:]
    return blocks.compared[kind]


def _check_types(network: nn.Module, x: Tensor) -> None:
    for name, parameter in network.named_parameters():
        if torch.promote_types(parameter.dtype, x.dtype) != x.dtype:
            raise ValueError(
                f"network: parameter {name!r} is of {parameter.dtype}, x of {x.dtype}, which all is computed in; take "
                f"x.to({parameter.dtype}) or network.to({x.dtype})"
            )


def _compared(blocks: Blocks, x: Tensor, training: bool) -> Tensor:
    """The network's outputs, if the blocks' are the same."""
    mode = "training" if training else "evaluation"
    layers = list(_layer_by_layer(blocks, _copied(blocks, x, training), x))
    network = _copied(blocks, x, training)
    whole: Tensor = network(x)
    if not _same(whole, layers[-1]):
        raise ValueError(
            f"network: in {mode} mode its outputs are not those of its layers one after the other; a layer draws "
            "random numbers, or a hook of all modules changes them"
        )
    if not training and not _same(whole, network(x)):
        raise ValueError("network: its outputs change from one evaluation to the next; a layer keeps something")
    # by functions that are not compiled, which would be for this number of samples
    eager = Blocks(blocks.network, blocks.names, replace(blocks.execution, compile=False, precision="fp32"))
    flat, buffers = (eager.flatten(eager.network, kind)[None].to(x) for kind in ("parameters", "buffers"))
    theta, before = eager.parameters(flat, buffers), x
    for t, end in enumerate(accumulate(map(len, blocks.names)), start=1):
        found = eager[t - 1].forward(theta.blocks[t - 1], before[None], training)[0]
        if not _same(layers[end - 1], found):
            raise ValueError(
                f"network: in {mode} mode block {t}, {list(blocks.names[t - 1])}, has other outputs than these layers "
                "of the network; a hook or a subclass changes what they do"
            )
        before = layers[end - 1]
    return whole


def _copied(blocks: Blocks, x: Tensor, training: bool) -> nn.Module:
    """A copy of the network with what a former call has not changed."""
    try:
        return copy.deepcopy(blocks.network).to(x).train(training)
    except RuntimeError as error:
        raise ValueError(f"network: cannot be copied, as each seed needs it: {error}") from None


def _layer_by_layer(blocks: Blocks, network: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The outputs of the network's layers, one after the other."""
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in (name for of_block in blocks.names for name in of_block):
        module = modules[name]
        layer, given, state = f"layer {name!r} ({type(module).__name__})", x.clone(), _random_state(x.device)
        version = given._version
        try:
            output = module(given)
        except Exception as error:
            raise ValueError(
                f"network: cannot be evaluated on samples {list(x.shape[1:])}: {layer}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(output, Tensor):
            raise ValueError(f"{layer} returns a {type(output).__name__}, where a block passes on one tensor")
        if not torch.equal(state, _random_state(x.device)):
            raise ValueError(f"{layer} draws random numbers, so that it cannot be evaluated twice with the same result")
        if given._version != version and known_layer(module) is None:
            raise ValueError(f"{layer} overwrites its input, which another block may have made; let it work on a copy")
        if output.shape[:1] != x.shape[:1]:
            raise ValueError(f"{layer} makes outputs {list(output.shape)} of {len(x)} samples, which come first")
        x = output
        yield x


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _same(expected: Tensor, found: Tensor) -> bool:
    """Whether outputs agree up to rounding, half the digits of their type."""
    if expected.shape != found.shape or not expected.isfinite().all():
        return expected.shape == found.shape
    digits = torch.finfo(torch.bfloat16 if torch.backends.cuda.matmul.allow_tf32 else expected.dtype).eps ** 0.5
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=digits * scale)
