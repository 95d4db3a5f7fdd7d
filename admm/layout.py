"""The places of a network's tensors in flat tensors, one row per replica."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from admm.layers import ParamDict, tensors_of

Kind = Literal["parameters", "buffers"]


@dataclass(frozen=True)
class _Entry:
    """A tensor of a layer: its name in the layer, and its columns in each flat tensor."""

    name: str
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    columns: dict[str, slice]


@dataclass(frozen=True)
class Layout:
    """The columns of the tensors of all blocks.

    Attributes:
        columns: by kind, the columns of each tensor by its path in the network.
        shared: pairs of the columns, in a gradient, of a shared parameter in the first block and in a further one.
        shared_buffers: the paths of buffers that several layers have.
        gradient_size: the columns of a gradient, P and those of shared parameters in further blocks.
        dtype: the common type of the parameters.
        statistics_dtype: that of the buffers.
    """

    columns: dict[Kind, dict[str, slice]]
    shared: list[tuple[slice, slice]]
    shared_buffers: frozenset[str]
    gradient_size: int
    dtype: torch.dtype
    statistics_dtype: torch.dtype
    _entries: list[list[list[_Entry]]]

    def views(self, flats: Mapping[str, Tensor]) -> list[list[ParamDict]]:
        """Return views [S, *shape] of flat tensors, by block, layer and name.

        Args:
            flats: flat tensors by name: "parameters" [S, P], "buffers" [S, B], "gradient" [S, `gradient_size`].
        """

        def of_layer(entries: list[_Entry]) -> ParamDict:
            places = (
                (e, flats[flat], columns) for e in entries for flat, columns in e.columns.items() if flat in flats
            )
            return {e.name: flat[:, columns].view(len(flat), *e.shape) for e, flat, columns in places}

        return [[of_layer(entries) for entries in block] for block in self._entries]

    def casts(self, t: int) -> dict[str, torch.dtype]:
        """Return the types of the tensors of block t, one layer, that are stored in another type, by name."""
        (entries,) = self._entries[t - 1]
        stored = {"parameters": self.dtype, "buffers": self.statistics_dtype}
        return {e.name: e.dtype for e in entries if e.dtype != stored[e.kind]}

    @staticmethod
    def tensor(network: nn.Module, kind: Kind, path: str) -> Tensor:
        """Return a tensor of a network, detached."""
        return (network.get_parameter(path) if kind == "parameters" else network.get_buffer(path)).detach()


def layout(network: nn.Module, blocks: Sequence[Sequence[nn.Module]]) -> Layout:
    """Return the layout of a network for the modules of its layers, by block."""
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    paths = {id(tensor): path for path, tensor in reversed(named)}
    # A block has further tensors where a forward uses attributes that are neither parameters nor buffers: constants.
    owned = [[[(k, n, v) for k, n, v in tensors_of(layer) if id(v) in paths] for layer in layers] for layers in blocks]
    tensors = [(kind, paths[id(v)], v) for layers in owned for layer in layers for kind, _, v in layer]
    columns: dict[Kind, dict[str, slice]] = {"parameters": {}, "buffers": {}}
    ends: dict[Kind, int] = {"parameters": 0, "buffers": 0}
    again: dict[Kind, list[str]] = {"parameters": [], "buffers": []}
    for kind, path, tensor in tensors:
        if path not in columns[kind]:
            columns[kind][path] = slice(ends[kind], ends[kind] + tensor.numel())
            ends[kind] += tensor.numel()
        else:
            again[kind].append(path)
    shared, end = [], ends["parameters"]
    for path in again["parameters"]:
        first = columns["parameters"][path]
        shared.append((first, slice(end, end + first.stop - first.start)))
        end = shared[-1][1].stop
    further, seen = iter(shared), set[str]()

    def entry(kind: Kind, name: str, tensor: Tensor) -> _Entry:
        path = paths[id(tensor)]
        places: dict[str, slice] = {kind: columns[kind][path]}
        if kind == "parameters":
            places["gradient"] = next(further)[1] if path in seen else columns[kind][path]
            seen.add(path)
        return _Entry(name, kind, tensor.shape, tensor.dtype, places)

    entries = [[[entry(*tensor) for tensor in layer] for layer in layers] for layers in owned]
    dtype = common(v.dtype for kind, _, v in tensors if kind == "parameters") or torch.get_default_dtype()
    statistics = wide(common(v.dtype for kind, _, v in tensors if kind == "buffers") or dtype)
    return Layout(columns, shared, frozenset(again["buffers"]), end, dtype, statistics, entries)


def common(types: Iterable[torch.dtype]) -> torch.dtype | None:
    """Return a type of floating point that holds all of these that are of floating point, or None if there is none."""
    floats = [dtype for dtype in types if dtype.is_floating_point]
    return functools.reduce(torch.promote_types, floats) if floats else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return a type for statistics, which holds counters, too: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def restore_frozen_statistics(network: nn.Module, former: nn.Module) -> None:
    """Give the buffers of modules whose parameters are all frozen their former values."""
    for module, other in zip(network.modules(), former.modules(), strict=True):
        own = dict(module.named_parameters(recurse=False))
        is_frozen = bool(own) and not any(p.requires_grad for p in own.values())
        for name, buffer in module.named_buffers(recurse=False):
            if is_frozen:
                buffer.copy_(other.get_buffer(name))
