"""Where samples come from: tensors, arrays that stay on the disk, and the data sets and loaders of PyTorch.

Inputs and targets are trees: a tensor, or tuples, lists and dictionaries of tensors, with the N samples first in each.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_map_with_path,
)
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import default_collate as join_items

from admm.minibatches import gather_shared
from admm.random_numbers import random_numbers_kept, seed_all

Pair = tuple[Any, Any]  # inputs and targets
_EXAMPLES = 64  # samples of a stream that are looked at before training
_LOADING = ("num_workers", "prefetch_factor", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")


class Samples(ABC):
    """N samples, their inputs and targets, which are read a few at a time."""

    @property
    @abstractmethod
    def n(self) -> int:
        """The number N."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are read to."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of all samples."""

    @property
    @abstractmethod
    def examples(self) -> Pair:
        """Inputs and targets [n, ...] that are known before training, of all samples or of the first ones."""

    @abstractmethod
    def read(
        self, batches: Sequence[Tensor | slice], seeds: Sequence[int] | None = None, epoch: int = 0
    ) -> Iterator[Pair]:
        """Yield inputs and targets on the device, batch by batch.

        Args:
            batches: indices [S, B], for which tensors are [S, B, ...], or slices of the samples, for which they are
                [n, ...].
            seeds: one per row of indices. With the epoch and a sample's index they fix the random numbers that a data
                set draws for the sample; without seeds the index alone does.
            epoch: counted from 0.
        """


@dataclass(frozen=True, eq=False)
class Tensors(Samples):
    """Inputs x and targets y that are tensors on one device."""

    x: Any
    y: Any

    @property
    def n(self) -> int:
        return len(tree_leaves(self.x)[0])

    @property
    def device(self) -> torch.device:
        device: torch.device = tree_leaves(self.x)[0].device
        return device

    @property
    def nbytes(self) -> int:
        return bytes_of((self.x, self.y))

    @property
    def examples(self) -> Pair:
        return self.x, self.y

    def read(
        self, batches: Sequence[Tensor | slice], seeds: Sequence[int] | None = None, epoch: int = 0
    ) -> Iterator[Pair]:
        """Yield gathered copies, or views for slices."""
        for batch in batches:
            yield take(self.x, batch), take(self.y, batch)


@dataclass(frozen=True, eq=False)
class Stream(Samples):
    """Samples that stay where they are; those that are needed are read, and moved to the device.

    Workers start anew with each call of `read` for more than one batch.

    Args:
        source: maps a `Request` to inputs and targets [S, B, ...].
        to: the device.
        loading: the options of a `DataLoader` whose workers read ahead.
    """

    source: Arrays | Items
    to: torch.device
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.source)

    @property
    def device(self) -> torch.device:
        return self.to

    @property
    def nbytes(self) -> int:
        """The bytes of N samples as large as the first ones."""
        return bytes_of(self.examples) * self.n // min(self.n, _EXAMPLES)

    @cached_property
    def examples(self) -> Pair:
        (pair,) = self.read([slice(0, min(self.n, _EXAMPLES))])
        return pair

    def read(
        self, batches: Sequence[Tensor | slice], seeds: Sequence[int] | None = None, epoch: int = 0
    ) -> Iterator[Pair]:
        """Yield what the source has; without seeds, equal rows of indices are read once.

        Raises ValueError for inputs that are not finite.
        """
        requests, places = [], list[Tensor | None]()
        for batch in batches:
            place = None
            if isinstance(batch, slice):
                rows = torch.arange(*batch.indices(self.n), device="cpu")[None]
            elif seeds is None:
                rows, place = batch.cpu().unique(dim=0, return_inverse=True)
            else:
                rows = batch.cpu()
            requests.append(Request(rows, [0] * len(rows) if seeds is None else seeds, epoch))
            places.append(place)
        for batch, place, pair in zip(batches, places, self._loaded(requests), strict=True):
            _check_finite(pair[0])
            pair = _map(pair, lambda leaf: leaf.to(self.to, non_blocking=True))
            if isinstance(batch, slice):
                yield _map(pair, lambda leaf: leaf[0])
            else:
                yield pair if place is None else take_rows(pair, place.to(self.to))

    def _loaded(self, requests: list[Request]) -> Iterator[Pair]:
        """Yield what the source has, read ahead by workers if there are any and more than one request."""
        if not self.loading.get("num_workers") or len(requests) < 2:
            return map(self.source.__getitem__, requests)
        options = {"batch_size": None, "collate_fn": _same, **self.loading}
        options["generator"] = torch.Generator()  # in place of the global one, which would move on
        return iter(DataLoader(self.source, sampler=requests, **options))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Formed(Samples):
    """Samples in another form.

    Args:
        samples: as they are.
        form: makes, of inputs and targets [n, ...], others.
    """

    samples: Samples
    form: Callable[[Any, Any], Pair]

    @property
    def n(self) -> int:
        return self.samples.n

    @property
    def device(self) -> torch.device:
        return self.samples.device

    @property
    def nbytes(self) -> int:
        """The bytes before."""
        return self.samples.nbytes

    @cached_property
    def examples(self) -> Pair:
        return self.form(*self.samples.examples)

    def read(
        self, batches: Sequence[Tensor | slice], seeds: Sequence[int] | None = None, epoch: int = 0
    ) -> Iterator[Pair]:
        for batch, pair in zip(batches, self.samples.read(batches, seeds, epoch), strict=True):
            if isinstance(batch, slice):
                yield self.form(*pair)
            else:
                formed = self.form(*_map(pair, lambda leaf: leaf.flatten(0, 1)))
                yield _map(formed, partial(Tensor.unflatten, dim=0, sizes=batch.shape))


@dataclass(frozen=True, eq=False)
class Request:
    """Samples to be read: indices [S, B] on the processor, and what fixes the random numbers drawn for them."""

    indices: Tensor
    seeds: Sequence[int]
    epoch: int = 0


@dataclass(frozen=True, eq=False)
class Arrays:
    """Trees x and y of tensors and of arrays on the disk."""

    x: Any
    y: Any

    def __len__(self) -> int:
        return len(tree_leaves(self.x)[0])

    def __getitem__(self, request: Request) -> Pair:
        at = request.indices

        def read(leaf: Any) -> Tensor:
            return take(leaf, at) if isinstance(leaf, Tensor) else torch.from_numpy(_plain_array(leaf[at.numpy()]))

        return _map((self.x, self.y), read)


@dataclass(frozen=True, eq=False)
class Items:
    """A map-style data set, whose items are pairs of inputs and targets.

    While an item is made, the global random numbers of PyTorch, NumPy and Python follow from seed, epoch and index.

    Args:
        dataset: has a length and items.
        join: makes a pair of trees [B, ...] of a list of items, such as `torch.utils.data.default_collate`.
        weights: of the samples [N], or None.
    """

    dataset: Any
    join: Callable[[list[Any]], Any] = join_items
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: Request) -> Pair:
        with random_numbers_kept():
            pairs = [
                self._joined(row, seed, request.epoch) for row, seed in zip(request.indices, request.seeds, strict=True)
            ]
        with self._explained("mini-batches of several seeds"):
            joined: Pair = tree_map(lambda *rows: torch.stack(rows), *pairs)
        return joined

    def _joined(self, row: Tensor, seed: int, epoch: int) -> Pair:
        items = []
        for index in row.tolist():
            _seed_item(seed, epoch, index)
            items.append(self.dataset[index])
        with self._explained(f"{len(items)} items"):
            pair = self.join(items)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            size = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
            raise ValueError(
                f"x: the items of {type(self.dataset).__name__} must be pairs of inputs and targets, and join to a "
                f"{type(pair).__name__}{size}"
            )
        x, y = pair
        for name, tree in (("x", x), ("y", y)):
            _check_read(name, tree, len(row))
        return x, y if self.weights is None else (y, self.weights[row])

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Raise ValueError where tensors cannot be made of several."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"x: {what} of {type(self.dataset).__name__} cannot be joined ({error}); make tensors of one shape of "
                "them, or give a DataLoader with a collate_fn that does"
            ) from error


def _stream_device(device: Any) -> torch.device:
    """Return a device; None is that on which PyTorch makes tensors. Raises ValueError for one that is not there."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:  # without CUDA, PyTorch fails an assertion
        raise ValueError(f"stream_to: {device!r} is no device of PyTorch's: {error}") from None


def as_samples(x: Any, y: Any, weights: Any = None, device: str | torch.device | None = None) -> Tensors | Stream:
    """Return the samples of what a caller has.

    Args:
        x: inputs [N, ...]; a tree of tensors, arrays, or lists of numbers; or a data set or loader.
        y: targets [N, ...], a tree as well; None for a data set.
        weights: of the samples [N], which make the targets pairs (y, weights).
        device: where samples are read to. None is that of the first tensor in x, or else that on which PyTorch makes
            tensors. Tensors elsewhere make a stream; without this argument they are an error.

    Raises:
        ValueError: that names the argument or the entry, such as x[1] or x['mask'].
    """
    if isinstance(x, DataLoader | Dataset) and y is not None:
        raise ValueError(f"y: the items of {type(x).__name__} are pairs of inputs and targets already; take y=None")
    if y is None:
        return _of_items(x, weights, device)
    place = _device(x) if device is None else _stream_device(device)
    x, y = as_tree("x", x, place), as_tree("y", y, place)
    n = _length(x, y)
    elsewhere = [(name, leaf) for name, leaf in [*_named("x", x), *_named("y", y)] if _is_elsewhere(leaf, place)]
    for name, leaf in elsewhere:
        if device is None and isinstance(leaf, Tensor):
            raise ValueError(f"{name}: is on {leaf.device}, x on {place}; both must be on one device")
    if weights is not None:
        y = y, as_weights(weights, n).to(place)
    if not elsewhere:
        _check_finite(x)
        return Tensors(x, y)
    samples = Stream(Arrays(x, y), place)
    _ = samples.examples  # which are read, and so checked
    return samples


def as_tree(name: str, value: Any, device: torch.device) -> Any:
    """Return a tree of tensors, and of arrays on the disk as they are. Raises ValueError that names an entry."""

    def tensor(path: Any, leaf: Any) -> Any:
        entry = name + keystr(path)
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_nested):
            raise ValueError(f"{entry}: is a sparse or nested tensor, where samples are those of a dense one [N, ...]")
        return leaf if isinstance(leaf, np.memmap) else as_tensor(entry, leaf, device).detach()

    return tree_map_with_path(tensor, value, is_leaf=lambda part: not _is_nested(part))


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Return a tensor as it is, or one made of an array or a list of numbers, on the device.

    Raises ValueError that names the argument `name` for anything else.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        value = _plain_array(value)
    try:
        tensor: Tensor = torch.as_tensor(value, device=device)
    except Exception as error:  # of whatever type it is
        raise ValueError(
            f"{name}: a {type(value).__name__} is no tensor, nor an array or a list of numbers ({error})"
        ) from None
    return tensor


def _plain_array(array: Any) -> Any:
    """Return an array that PyTorch takes: of the machine's order of bytes, and without negative strides."""
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.copy() if any(stride < 0 for stride in array.strides) else array


def as_weights(weights: Any, n: int) -> Tensor:
    """Return weights [N]. Raises ValueError for others than finite numbers from 0 up, not all of them 0."""
    values = as_tensor("weights", weights).detach()
    if values.shape != (n,):
        raise ValueError(f"weights: {list(values.shape)}, expected one number for each sample, [{n}]")
    if not bool((values.isfinite() & (values >= 0)).all()) or not bool(values.any()):
        raise ValueError(
            f"weights: are {float(values.min()):.4g} to {float(values.max()):.4g}, expected finite numbers from 0 up, "
            "some of them above 0"
        )
    return values


def take(tree: Any, batch: Tensor | slice) -> Any:
    """Return the samples [S, B, ...] of a tree at indices [S, B], or for a slice views of its samples, [n, ...].

    >>> take({"a": torch.arange(4)}, torch.tensor([[3, 0]]))
    {'a': tensor([[3, 0]])}
    """
    return of_samples(tree, batch) if isinstance(tree, Tensor) else tree_map(lambda leaf: of_samples(leaf, batch), tree)


def of_samples(leaf: Tensor, batch: Tensor | slice) -> Tensor:
    """Return what `take` does, of one tensor."""
    return leaf[batch] if isinstance(batch, slice) else gather_shared(leaf, batch.to(leaf.device))


def take_rows(pair: Pair, rows: Tensor) -> Pair:
    """Return rows of a pair of trees."""
    return _map(pair, lambda leaf: leaf.index_select(0, rows))


def bytes_of(tree: Any) -> int:
    """Return the bytes of all tensors of a tree."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree))


def _of_items(x: Any, weights: Any, device: str | torch.device | None) -> Stream:
    """Return the samples of a data set or loader. Raises ValueError for one that cannot be read in any order."""
    dataset, join, loading = x, join_items, {}
    if isinstance(x, DataLoader):
        dataset, join = x.dataset, x.collate_fn
        loading = {name: getattr(x, name) for name in _LOADING}
    has_items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or (isinstance(dataset, Dataset) and not has_items):
        raise ValueError(
            f"x: {type(dataset).__name__} has no length, or is read from its beginning to its end alone, and samples "
            "are read in an order that follows from the seed; take a map-style data set, with __getitem__ and __len__"
        )
    if not has_items or isinstance(dataset, Tensor | np.ndarray | Mapping | str | tuple):
        raise ValueError(f"y: None, but a {type(x).__name__} x is no data set, and needs targets")
    if not len(dataset):
        raise ValueError(f"x: {type(dataset).__name__} has no samples")
    if isinstance(x, DataLoader):
        _check_sampling(x)
    if weights is not None:
        weights = as_weights(weights, len(dataset)).cpu()
    samples = Stream(Items(dataset, join, weights), _stream_device(device), loading=loading)
    _ = samples.examples  # which are read, and so checked
    return samples


def _check_sampling(loader: DataLoader[Any]) -> None:
    """Raise ValueError for a loader that does not draw each sample of its data set once an epoch."""
    used = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    is_plain = type(used) is SequentialSampler
    if type(used) is RandomSampler:
        is_plain = not used.replacement and used.num_samples == len(used.data_source)
    if not is_plain:
        raise ValueError(
            f"x: the loader's sampling ({type(used).__name__}) would not be used, as each sample comes once an epoch, "
            "in mini-batches of the optimizer's batch_size; for a part of a data set take torch.utils.data.Subset, for "
            "samples that count more the argument weights"
        )
    batches = loader.batch_sampler
    samples = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(batches, BatchSampler) and batches.drop_last and (left := samples % batches.batch_size):
        raise ValueError(
            f"x: the loader's drop_last=True would not be used, by which {left} samples would be left out of an epoch; "
            "take drop_last=False, or torch.utils.data.Subset for fewer samples"
        )


def _check_finite(x: Any) -> None:
    """Raise ValueError for inputs of floating point that are not finite."""
    for name, leaf in _named("x", x):
        if leaf.is_floating_point() and not math.isfinite(leaf.sum(dtype=torch.float64)):
            raise ValueError(f"{name}: inputs must be finite numbers, found NaN or infinity")


def _check_read(name: str, tree: Any, n: int) -> None:
    """Raise ValueError unless a tree that a data set has made is of tensors of n samples."""
    for entry, leaf in _named(name, tree):
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != (n,):
            found = list(leaf.shape) if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise ValueError(f"{entry}: of {n} items of the data set {found} was made, expected a tensor [{n}, ...]")


def _is_nested(value: Any) -> bool:
    """Whether a value is several inputs, and not one as a list of numbers."""
    if isinstance(value, list | tuple):
        return any((isinstance(v, Tensor | np.ndarray) and v.ndim > 0) or _is_nested(v) for v in value)
    return isinstance(value, dict)


def _named(name: str, tree: Any) -> list[tuple[str, Any]]:
    """Return the entries of a tree by name, such as x['mask']."""
    return [(name + keystr(path), leaf) for path, leaf in tree_leaves_with_path(tree)]


def _device(x: Any) -> torch.device:
    """Return the device of the first tensor in x, or that on which PyTorch makes tensors."""
    leaves = tree_leaves(x) if _is_nested(x) else [x]
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.empty(0).device)


def _is_elsewhere(leaf: Any, place: torch.device) -> bool:
    return not isinstance(leaf, Tensor) or leaf.device != place


def _length(x: Any, y: Any) -> int:
    """Return the number of samples. Raises ValueError unless all entries have as many, and at least one."""
    inputs, targets = _named("x", x), _named("y", y)
    if not inputs or not targets:
        raise ValueError(f"{'y' if inputs else 'x'}: is empty")
    first, leaf = inputs[0]
    if leaf.ndim < 1 or not len(leaf):
        raise ValueError(f"{first}: inputs {list(leaf.shape)} have no samples [N, ...]")
    for name, other in inputs[1:]:
        if other.shape[:1] != leaf.shape[:1]:
            raise ValueError(f"{name}: inputs {list(other.shape)}, but {first} has {len(leaf)} samples")
    for name, other in targets:
        if other.shape[:1] != leaf.shape[:1]:
            found = len(other) if other.ndim else "no"
            raise ValueError(f"problem: {len(leaf)} inputs {first}, but {found} targets {name}")
    return len(leaf)


def _map(pair: Pair, function: Callable[[Any], Tensor]) -> Pair:
    """Return a pair of trees, mapped leaf by leaf."""
    mapped: Pair = tree_map(function, pair)
    return mapped


def _same(value: Any) -> Any:
    return value


def _seed_item(seed: int, epoch: int, index: int) -> None:
    """Let the global random numbers follow from the seed, the epoch and the number of an item."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(b"items"), epoch, index))
    seed_all(int(entropy.generate_state(1, np.uint64)[0]))
