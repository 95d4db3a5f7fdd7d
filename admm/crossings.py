"""What crosses a cut: coupling variables, and what is carried along as it is.

What a block hands to the next one may be several tensors, or a structure of them: the activation, skip connections,
masks, the sizes of a tensor. Those that trained parameters have an influence on, by a derivative, are the coupling
variable: one tensor alone in its own shape, several of them flattened per sample and joined. All else, such as what
depends on the network's inputs alone, has no gradient: it is carried as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_LEAVES = (Tensor, int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.Size)
Rest = tuple[list[torch.Size], list[Any]]  # the variables' shapes, and the other leaves


class Crossing:
    """What crosses the cut after a block, or leaves the network after the last one.

    It is one tensor with the samples in front, until `learn` sees what it is.

    Attributes:
        is_known: whether `learn` has seen it.
        is_plain: whether it is one such tensor, and nothing else.
    """

    def __init__(self) -> None:
        self.is_known, self.is_plain = False, True
        self._spec: Any = None
        self._is_variable: tuple[bool, ...] = (True,)
        self._axes: tuple[int | None, ...] = (0,)
        self.shapes: list[torch.Size] = []  # of the variables, those of the samples that were learned from
        self._others: list[Any] = []  # the other leaves of these samples

    def learn(self, value: Any, fewer: Any, samples: int, number: int, is_variable: Callable[[Any], bool]) -> None:
        """Find out which leaves are variables, and which of their axes is that of the samples.

        Args:
            value: what block `number` has returned, with a graph of autograd.
            fewer: the same for one sample less, or `value` itself if there is only one.
            samples: n.
            number: counts the blocks from 1.
            is_variable: tells a variable among the leaves.

        Raises:
            ValueError: where the samples' axis cannot be told, and for an object in which tensors may hide.
        """
        leaves, self._spec = pytree.tree_flatten(value)
        others = pytree.tree_leaves(fewer)
        if strange := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _LEAVES)]:
            raise ValueError(
                f"network: block {number} hands on a {strange[0]}, in which no tensors are seen; take a tuple or a "
                "dictionary, or a dataclass that torch.utils._pytree.register_dataclass knows"
            )
        self._is_variable = tuple(map(is_variable, leaves))
        if of_complex := [leaf for leaf in leaves if is_variable(leaf) and leaf.is_complex()]:
            raise ValueError(
                f"network: block {number} hands on a tensor of {of_complex[0].dtype}, where coupling variables are of "
                "floating point; hand on torch.view_as_real of it, or cut elsewhere"
            )
        pairs = [pair for pair in zip(leaves, others, strict=True) if is_variable(pair[0])]
        self._axes = tuple(_samples_axis(leaf, other, samples, number) for leaf, other in pairs)
        self.shapes = [leaf.shape for leaf, _ in pairs]
        self._others = [leaf for leaf in leaves if not is_variable(leaf)]
        is_one = len(leaves) == 1 and self._axes == (0,) and leaves[0].shape[0] == samples
        self.is_known, self.is_plain = True, is_one

    def fits(self, value: Any, is_variable: Callable[[Any], bool]) -> bool:
        """Whether what a block returns has the structure and the variables that `learn` has seen."""
        leaves, spec = pytree.tree_flatten(value)
        return spec == self._spec and tuple(map(is_variable, leaves)) == self._is_variable

    @property
    def has_samples(self) -> bool:
        """Whether there are variables, and each has an axis of the samples."""
        return len(self._axes) > 0 and None not in self._axes

    def pack(self, value: Any, samples: int) -> tuple[Tensor, Rest]:
        """Return the coupling variable [n, ...] of what a block has returned for n samples, and the rest.

        Raises ValueError for several values that `learn` has not seen.
        """
        leaves = pytree.tree_leaves(value)
        if not self.is_known and len(leaves) > 1:
            raise ValueError(
                "network: a block returns several values; make a Problem first, which finds out what they are"
            )
        if self.is_plain:
            return leaves[0], ([], [])
        variables, others = self._sorted(leaves)
        rows = [_samples_first(v, axis, samples) for v, axis in zip(variables, self._axes, strict=True)]
        rest = [v.shape for v in variables], [v.detach() if isinstance(v, Tensor) else v for v in others]
        if len(rows) == 1:
            return rows[0], rest
        if not rows:
            return torch.empty(samples, 0, device=next((v.device for v in others if isinstance(v, Tensor)), None)), rest
        return torch.cat([row.reshape(samples, -1) for row in rows], 1), rest

    def unpack(self, z: Tensor, rest: Rest) -> Any:
        """Return what `pack` was given, with the coupling variable z [n, ...]."""
        if self.is_plain:
            return pytree.tree_unflatten([z], self._spec) if self._spec is not None else z
        shapes, others = rest
        variables = iter(self._unjoined(z, shapes))
        remaining = iter(others)
        leaves = [next(variables) if is_variable else next(remaining) for is_variable in self._is_variable]
        return pytree.tree_unflatten(leaves, self._spec)

    def outputs(self, z: Tensor) -> Any:
        """Return the network's outputs, a structure of tensors [n, ...], of what `pack` has made of them."""
        shapes = [torch.Size((len(z), *shape[1:])) for shape in self.shapes]
        return self.unpack(z, (shapes, self._others))

    def _sorted(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        pairs = list(zip(leaves, self._is_variable, strict=True))
        return [leaf for leaf, is_variable in pairs if is_variable], [leaf for leaf, is_one in pairs if not is_one]

    def _unjoined(self, z: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
        widths = [_width(shape, axis, len(z)) for shape, axis in zip(shapes, self._axes, strict=True)]
        parts = [z] if len(shapes) == 1 else z.split(widths, 1)
        for part, shape, axis in zip(parts, shapes, self._axes, strict=True):
            yield _samples_back(part, shape, axis)


def _samples_axis(leaf: Tensor, other: Tensor, samples: int, number: int) -> int | None:
    """Return the axis that grows with the number of samples, or None if there is none."""
    axes = [axis for axis, (size, fewer) in enumerate(zip(leaf.shape, other.shape, strict=True)) if size != fewer]
    if samples == 1:
        axes = [0] if leaf.shape[:1] == (1,) else []
    if len(axes) > 1 or any(leaf.shape[axis] % samples for axis in axes):
        raise ValueError(
            f"network: block {number} hands on a tensor {list(leaf.shape)} for {samples} samples and "
            f"{list(other.shape)} for one less, in which no axis is that of the samples; cut elsewhere"
        )
    return axes[0] if axes else None


def _samples_first(leaf: Tensor, axis: int | None, samples: int) -> Tensor:
    """Return a leaf with the samples' axis in front; one that all samples share gets a copy per sample."""
    if axis is None:
        return leaf.expand(samples, *leaf.shape)
    parted = leaf if leaf.shape[axis] == samples else leaf.unflatten(axis, (samples, -1))
    return parted.movedim(axis, 0)


def _samples_back(row: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """Undo `_samples_first`, and the joining, for a leaf of this shape; of copies per sample the mean is taken."""
    samples = len(row)
    if axis is None:
        return row.reshape(samples, *shape).mean(0)
    parted = shape
    if shape[axis] != samples:
        parted = torch.Size((*shape[:axis], samples, shape[axis] // samples, *shape[axis + 1 :]))
    first = (samples, *parted[:axis], *parted[axis + 1 :])
    return row.reshape(first).movedim(0, axis).reshape(shape)


def _width(shape: torch.Size, axis: int | None, samples: int) -> int:
    return shape.numel() if axis is None else shape.numel() // samples
