"""What crosses a cut: coupling variables, and what is carried along as it is.

What a block hands to the next one may be several tensors, or a structure of them: the activation, skip connections,
masks, the sizes of a tensor. Those that trained parameters have an influence on, by a derivative, are the coupling
variable: one tensor alone in its own shape, several of them flattened per sample and joined. All else, such as what
depends on the network's inputs alone, has no gradient: it is carried as it is.

The axis of the samples is the one that grows with their number. Where it holds several rows of each, those of a sample
are side by side, as in a batch of windows, or far apart, as in two batches joined. A tensor without such an axis, such
as a product of parameters or a mean over the samples, has a copy per sample in the coupling variable, and the next
block gets the mean of these copies; its gradient by Θ is along back-propagation's for small steps of Z, as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_LEAVES = (Tensor, int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.Size)
Rest = tuple[list[torch.Size], list[Any]]  # the variables' shapes, and the other leaves


class _Place(NamedTuple):
    """Where the samples are: their axis, None for none; and whether several rows of a sample are side by side in it."""

    axis: int | None
    is_outer: bool = True


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
        self._places: tuple[_Place, ...] = (_Place(0),)
        self.shapes: list[torch.Size] = []  # of the variables, those of the samples that were learned from
        self._others: list[Any] = []  # the other leaves of these samples
        self._samples = 1  # their number
        # The variables' shapes by that of the coupling variable, as the blocks may see samples of several shapes.
        self._shapes_of: dict[torch.Size, list[torch.Size]] = {}

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
        self._places = tuple(_place_of_samples(leaf, other, samples, number) for leaf, other in pairs)
        self.shapes = [leaf.shape for leaf, _ in pairs]
        self._others = [leaf for leaf in leaves if not is_variable(leaf)]
        is_one = len(leaves) == 1 and self._places == (_Place(0),) and leaves[0].shape[0] == samples
        self.is_known, self.is_plain, self._samples = True, is_one, samples
        self._shapes_of[self.pack(value, samples)[0].shape[1:]] = self.shapes

    def __str__(self) -> str:
        """Return the variables' shapes for n samples, and how many other values cross as they are."""
        shapes = [_for_n(shape, place, self._samples) for shape, place in zip(self.shapes, self._places, strict=True)]
        return ", ".join(shapes + [f"{len(self._others)} as it is"] * bool(self._others))

    @property
    def is_tensor(self) -> bool:
        """Whether it is one tensor, in no structure."""
        return self._spec in (None, pytree.tree_structure(0), pytree.tree_structure((0,)))

    def fits(self, value: Any, is_variable: Callable[[Any], bool]) -> bool:
        """Whether what a block returns has the structure and the variables that `learn` has seen."""
        leaves, spec = pytree.tree_flatten(value)
        return spec == self._spec and tuple(map(is_variable, leaves)) == self._is_variable

    @property
    def has_samples(self) -> bool:
        """Whether there are variables, and each has an axis of the samples."""
        return len(self._places) > 0 and all(place.axis is not None for place in self._places)

    @property
    def is_shared(self) -> bool:
        """Whether there are variables without an axis of the samples, which all samples share."""
        return any(place.axis is None for place in self._places)

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
        rows = [_samples_first(v, place, samples) for v, place in zip(variables, self._places, strict=True)]
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
        """Return the network's outputs for n samples, a structure of tensors, of what `pack` has made of them."""
        shapes = zip(self._shapes_of[z.shape[1:]], self._places, strict=True)
        return self.unpack(z, ([self._resized(shape, place.axis, len(z)) for shape, place in shapes], self._others))

    def _resized(self, shape: torch.Size, axis: int | None, samples: int) -> torch.Size:
        """Return the shape, for so many samples, of an output with an axis of samples."""
        assert axis is not None
        return torch.Size((*shape[:axis], shape[axis] // self._samples * samples, *shape[axis + 1 :]))

    def _sorted(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        pairs = list(zip(leaves, self._is_variable, strict=True))
        return [leaf for leaf, is_variable in pairs if is_variable], [leaf for leaf, is_one in pairs if not is_one]

    def _unjoined(self, z: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
        widths = [_width(shape, place, len(z)) for shape, place in zip(shapes, self._places, strict=True)]
        parts = [z] if len(shapes) == 1 else z.split(widths, 1)
        for part, shape, place in zip(parts, shapes, self._places, strict=True):
            yield _samples_back(part, shape, place)


def _place_of_samples(leaf: Tensor, other: Tensor, samples: int, number: int) -> _Place:
    """Return where the samples are, for a leaf and the same for one sample less."""
    axes = [axis for axis, (size, fewer) in enumerate(zip(leaf.shape, other.shape, strict=True)) if size != fewer]
    if samples == 1:
        axes = [0] if leaf.shape[:1] == (1,) else []
    if len(axes) > 1 or any(leaf.shape[axis] % samples for axis in axes):
        raise ValueError(
            f"network: block {number} hands on a tensor {list(leaf.shape)} for {samples} samples and "
            f"{list(other.shape)} for one less, in which no axis is that of the samples; cut elsewhere"
        )
    if not axes or leaf.shape[axes[0]] == samples:
        return _Place(axes[0] if axes else None)

    def error(place: _Place) -> float:
        """Return how far the first samples are from the same ones without the last."""
        rows = (_samples_first(v.detach(), place, n) for v, n in ((leaf, samples), (other, samples - 1)))
        return float((next(rows)[:-1] - next(rows)).abs().amax())

    return min((_Place(axes[0], is_outer) for is_outer in (True, False)), key=error)


def _for_n(shape: torch.Size, place: _Place, samples: int) -> str:
    """Return a shape as text with n for the number of samples, such as [n, 3]."""
    sizes = [str(size) for size in shape]
    if place.axis is not None:
        rows = shape[place.axis] // samples
        sizes[place.axis] = "n" if rows == 1 else f"{rows}n"
    return f"[{', '.join(sizes)}]"


def _samples_first(leaf: Tensor, place: _Place, samples: int) -> Tensor:
    """Return a leaf with the samples' axis in front; one that all samples share gets a copy per sample."""
    axis, is_outer = place
    if axis is None:
        return leaf.expand(samples, *leaf.shape)
    parted: Tensor = leaf.unflatten(axis, (samples, -1) if is_outer else (-1, samples))
    return parted.movedim(axis if is_outer else axis + 1, 0)


def _samples_back(row: Tensor, shape: torch.Size, place: _Place) -> Tensor:
    """Undo `_samples_first`, and the joining, for a leaf of this shape; of copies per sample the mean is taken."""
    samples, (axis, is_outer) = len(row), place
    if axis is None:
        return row.reshape(samples, *shape).mean(0)
    parted = (samples, *shape[:axis], shape[axis] // samples, *shape[axis + 1 :])
    return row.reshape(parted).movedim(0, axis if is_outer else axis + 1).reshape(shape)


def _width(shape: torch.Size, place: _Place, samples: int) -> int:
    return shape.numel() if place.axis is None else shape.numel() // samples
