"""Where a network's tensors are in its blocks, and in flat tensors with one row per replica."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from admm.layers import ParamDict, tensors_of

Kind = Literal["parameters", "buffers"]


class _Entry(NamedTuple):
    """A tensor of a layer: its kind, its name in the layer, its path in the network, and its type there."""

    kind: Kind
    name: str
    path: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """The tensors of all blocks.

    Attributes:
        shapes: by kind, the shape of each tensor by its path in the network, in the order of the blocks.
        shared: the paths of parameters that several layers have.
        shared_buffers: the paths of buffers that several layers have.
        dtype: the common type of the parameters.
        statistics_dtype: that of the buffers.
    """

    shapes: dict[Kind, dict[str, torch.Size]]
    shared: frozenset[str]
    shared_buffers: frozenset[str]
    dtype: torch.dtype
    statistics_dtype: torch.dtype
    _entries: list[list[list[_Entry]]]

    def columns(self, kind: Kind) -> dict[str, slice]:
        """Return the columns of each tensor in a flat tensor, by its path."""
        ends = accumulate((shape.numel() for shape in self.shapes[kind].values()), initial=0)
        return {path: slice(*pair) for path, pair in zip(self.shapes[kind], pairwise(ends), strict=True)}

    def views(self, kind: Kind, flat: Tensor) -> dict[str, Tensor]:
        """Return views [S, *shape] of a tensor [S, P] or [S, B], by path. Raises RuntimeError where it is short."""
        columns = self.columns(kind)
        return {path: flat[:, columns[path]].view(len(flat), *shape) for path, shape in self.shapes[kind].items()}

    def by_layer(self, tensors: Mapping[Kind, Mapping[str, Tensor]]) -> list[list[ParamDict]]:
        """Return tensors, given by kind and path, by block, layer and name in the layer."""
        return [
            [{e.name: tensors[e.kind][e.path] for e in layer if e.kind in tensors} for layer in block]
            for block in self._entries
        ]

    def by_path(self, gradient: Sequence[Sequence[ParamDict]], of: Sequence[int]) -> dict[str, Tensor]:
        """Return the sum over some blocks of a gradient that is given by block, layer and name, by path.

        Args:
            gradient: of each parameter in these blocks [S, *shape].
            of: the places of the blocks.
        """
        total: dict[str, Tensor] = {}
        for t in of:
            for entries, views in zip(self._entries[t], gradient[t], strict=True):
                for e in entries:
                    if e.kind == "parameters":
                        total[e.path] = total[e.path] + views[e.name] if e.path in total else views[e.name]
        return total

    def numbers(self, kind: Kind) -> dict[str, int]:
        """Return the number, counted from 1, of the first block of each tensor, by path."""
        numbered = [(e, t) for t, block in enumerate(self._entries, start=1) for layer in block for e in layer]
        return {e.path: t for e, t in reversed(numbered) if e.kind == kind}

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
    shapes: dict[Kind, dict[str, torch.Size]] = {"parameters": {}, "buffers": {}}
    for kind, path, tensor in tensors:
        shapes[kind][path] = tensor.shape
    found = Counter((kind, path) for kind, path, _ in tensors)
    shared, shared_buffers = (
        frozenset(path for (of, path), count in found.items() if of == kind and count > 1) for kind in shapes
    )
    entries = [
        [[_Entry(kind, name, paths[id(v)], v.dtype) for kind, name, v in layer] for layer in layers] for layers in owned
    ]
    dtype = common(v.dtype for kind, _, v in tensors if kind == "parameters") or torch.get_default_dtype()
    buffers = [v for kind, _, v in tensors if kind == "buffers"]
    statistics = wide(common(v.dtype for v in buffers) or dtype)
    if any(int(v) != int(v.to(statistics)) for v in buffers if not v.is_floating_point()):  # a large number
        statistics = torch.float64
    return Layout(shapes, shared, shared_buffers, dtype, statistics, entries)


def common(types: Iterable[torch.dtype]) -> torch.dtype | None:
    """Return a type of floating point that holds all of these that are of floating point, or None if there is none."""
    floats = [dtype for dtype in types if dtype.is_floating_point]
    return functools.reduce(torch.promote_types, floats) if floats else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return a type for statistics, which holds counters, too: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def converted(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a network's tensors of floating point a type, and complex ones its complex counterpart; return it.

    (`network.to(dtype)` would drop the imaginary part of complex ones.)
    """
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return network


def restore_frozen_statistics(network: nn.Module, former: nn.Module) -> None:
    """Give the buffers of modules whose parameters are all frozen their former values."""
    for name in frozen_statistics(network):
        network.get_buffer(name).copy_(former.get_buffer(name))


def frozen_statistics(network: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of modules whose parameters are all frozen."""
    for path, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not any(p.requires_grad for p in own.values()):
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False))
