"""The interface of optimizers: the problem, the state, and what an optimizer promises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map, tree_map_with_path

from admm.augmentation import Augmentation
from admm.blocks import Blocks, Parameters
from admm.checks import check_modes, has_type, shown
from admm.comparison import forward_costs, outputs_of, samples_are_independent, suited
from admm.crossings import Crossing
from admm.layers import ParamDict, seeded
from admm.losses import (
    CLASSES_LAST,
    CrossEntropy,
    FunctionLoss,
    Huber,
    Loss,
    SampleWeighted,
    SquaredError,
    have_classes_along_axis_1,
    is_one_hot,
    outputs_and_targets,
    unweighted,
)
from admm.minibatches import expand, minibatches, stateless_rng
from admm.models import as_constructed, initialiser
from admm.numbers import plain
from admm.parallel import ALONE, Kind, Parallel, balanced
from admm.random_numbers import all_seeded
from admm.samples import Arrays, Formed, Samples, Stream, Tensors, as_samples, take_rows
from admm.user_warnings import warn
from admm.visits import Visit

# What else is done with an entry of Z_t in an iteration, some twenty passes over memory, takes as long as so many
# floating-point operations of products (measured for ten layers of 128 on a Xeon).
_FLOPS_PER_ENTRY = 1000
_FEW = 3  # entries of a list in the text of a state
_KEPT = 4  # tensors of the samples that a problem keeps: of so many optimizers, or values of theirs, that take turns
_LOOKED_THROUGH = 1000  # samples among which the check of a loss finds other targets
_LARGE = 100.0  # of targets, or one divided by it small: a network would first have to learn their scale
_ITS_PARAMETERS = "split(problem.blocks.export(state.theta), …) and take initialise=admm.as_given"  # in a message
_MAKERS: tuple[Any, ...] = (initialiser, as_constructed)  # which make an `initialise`, and are none


class Compiled(dict[Any, Any]):
    """Compiled visits of mini-batches, see `admm.optimizers.running.Runner`.

    Attributes:
        seconds: the time that compiling has taken.
        runs: the iterations so far that were to compile their visits, or to run compiled ones.
    """

    seconds = 0.0
    runs = 0


@dataclass(frozen=True)
class Problem:
    """Training data, a network cut into blocks, and a loss.

    Inputs x and targets y are in one of these forms:

    - Tensors [N, ...] of any type, arrays, or lists of numbers. A tuple or list of them is the network's positional
      arguments, a dictionary its keyword arguments; the targets of a plain function may be nested, too.
    - `np.memmap`s, alone or among tensors: they stay on the disk, and what a mini-batch needs is read.
    - A map-style `torch.utils.data.Dataset`, or a list, as x, whose items are pairs of inputs and targets, with y=None;
      or a `DataLoader`, of which the data set, `collate_fn` and the workers' options are taken. (Its `shuffle`,
      `batch_size` and `drop_last` are not used: each sample comes once an epoch, in mini-batches of the optimizer's
      `batch_size`, in the order of the seed.) Collated items of several seeds must have one shape.

    What is not whole on the device is a stream. In an epoch the mini-batch methods read each sample once for each seed,
    and so do DeepFacto and Block-ADMM beside their variables of all samples (with sweep="batch", per sweep); workers
    read ahead. Algorithms that need all samples as tensors refuse it, see `whole`. The first 64 samples are looked at
    before training, to check them and to find out what the targets are.

    Random numbers that a data set draws for an item, from the global generators of PyTorch, NumPy and Python, follow
    from the seed, the epoch and the item's index in the mini-batches of `minibatches`, and from the index alone in an
    evaluation and where there are variables of each sample; so that runs are repeated and resumed exactly, with any
    number of workers and in any stack. Other random numbers, such as those of a generator of its own, are not fixed.

    Args:
        x: inputs [N, ...], or a data set or loader.
        y: targets [N, ...], as `loss.targets` takes them: for classes, class indices [N], which become one-hot, or
            distributions [N, C]. None for a data set.
        blocks: the network, cut by `admm.blocks.split`.
        loss: a `Loss`, or a plain function as `FunctionLoss` takes it.
        initialise: a function that fills a network's parameters in place from PyTorch's global random state, such as
            `admm.models.initialiser("pytorch")`.
        augmentation: random changes of mini-batches, for optimizers without variables of each sample.
        stream_to: the device to compute on, for samples that are elsewhere, such as tensors in the host's memory. None
            is the device of the tensors, and for other samples that on which PyTorch makes tensors.
        weights: numbers [N] ≥ 0 that J of each sample is multiplied by, see `admm.losses.SampleWeighted`.
        parallel: how the run is shared out to several processes, each of which gives all samples here, see
            `admm.parallel.Parallel`.

    Attributes:
        x, y: of samples on the device, tensors as the network and the loss take them; else as they were given.
        data: all samples, as they are read.
        part: which of them this process holds; all, unless samples are shared out.
        cut: with parallel="blocks" the numbers of the blocks, counted from 1, that each process holds, whose updates
            take about the same time; else all.
        compiled: what has been compiled for optimizers on this problem.

    Raises:
        ValueError: for an argument of another type, inputs or targets that the network or the loss cannot take, a loss
            that has no value per sample or no gradient in the shape of the outputs, and as
            `admm.comparison.outputs_of` does; if samples are shared out, for a network in which they depend on one
            another, a stream and `compile=True`.
        RuntimeError: within `torch.inference_mode` or `torch.autocast`.

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> blocks = split(mlp(input_shape=2, hidden=[3], classes=2), per_layer=True)
    >>> problem = Problem([[0.0, 1.0], [1.0, 0.0]], [1, 0], blocks, SquaredError(), initialiser("pytorch"))
    >>> problem.y
    tensor([[0., 1.],
            [1., 0.]])

    The same from a data set, of which each epoch reads what it needs:

    >>> dataset = torch.utils.data.TensorDataset(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    >>> problem = Problem(dataset, None, blocks, SquaredError(), initialiser("pytorch"))
    >>> _, visits = problem.minibatches(batch_size=1, seeds=[0, 1], iteration=0, parts=None)
    >>> [visit.y.shape for visit in visits]
    [torch.Size([2, 1, 2]), torch.Size([2, 1, 2])]
    """

    x: Any
    y: Any
    blocks: Blocks
    loss: Loss
    initialise: Callable[[nn.Module], None]
    augmentation: Augmentation | None = None
    stream_to: str | torch.device | None = None
    weights: Any = None
    parallel: Parallel = ALONE
    data: Samples = field(init=False, repr=False)
    part: slice = field(init=False, repr=False)
    cut: list[range] = field(init=False, repr=False)
    compiled: Compiled = field(init=False, repr=False, compare=False, default_factory=Compiled)
    _kept: dict[Any, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Blocks):
            raise ValueError(
                f"blocks: a {type(self.blocks).__name__}, where admm.blocks.split makes blocks of a network"
            )
        if not callable(self.initialise) or isinstance(self.initialise, nn.Module):
            raise ValueError(f'initialise: {shown(self.initialise)} is no function, such as initialiser("pytorch")')
        if self.initialise in _MAKERS:
            raise ValueError(
                f"initialise: {self.initialise.__name__} makes a function, which is what is needed; take "
                'initialiser("pytorch") or as_constructed(build)'
            )
        has_type("parallel", self.parallel, Parallel, 'admm.Parallel.join("samples")')
        object.__setattr__(self, "loss", _weighted(as_loss(self.loss), self.weights))
        if self.augmentation is not None:
            has_type("augmentation", self.augmentation, Augmentation, "admm.augmentation.CropAndFlip()")
        given = as_samples(self.x, self.y, self.weights, self.stream_to)
        object.__setattr__(self, "data", given)
        check_modes("Problem", self.device.type)
        self._check_precision()
        object.__setattr__(self, "blocks", suited(self.blocks, given.examples[0]))
        data = self._formed(given, lambda x: x)
        kept = given.source if isinstance(given, Stream) else data
        if isinstance(kept, Tensors | Arrays):
            object.__setattr__(self, "x", kept.x)
            object.__setattr__(self, "y", kept.y if self.weights is None else kept.y[0])
        object.__setattr__(self, "data", data)
        self._check_loss(data)
        self._warn_of_class_axis(given)
        self._warn_of_scale()
        is_shared = self.parallel.shares("samples")
        object.__setattr__(self, "part", self.parallel.share(data.n) if is_shared else slice(0, data.n))
        object.__setattr__(self, "cut", [range(1, len(self.blocks) + 1)] * self.parallel.size)
        if is_shared:
            self._check_shared_samples()
        elif self.parallel.shares("blocks"):
            self._share_blocks()

    def __repr__(self) -> str:
        x, (loss, y, weights) = self.data.examples[0], unweighted(self.loss, self.data.examples[1])
        weighted = "" if weights is None else "weighted "
        first = f"Problem of {self.n_samples} {weighted}samples on {self.device}, with {type(loss).__name__}:"
        return f"{first}\n  x: {_in_short(x)}\n  y: {_in_short(y)}\n{self.blocks}"

    def samples(self, x: Any, y: Any = None) -> Samples:
        """Return other samples, such as a test set, in the form of the training samples, and on their device.

        Args:
            x: inputs [M, ...] or a data set, in any form that `Problem` takes, whatever that of the training samples.
            y: targets, or None.

        Raises:
            ValueError: for samples of another shape or type, and for targets of another kind.
        """
        given = as_samples(x, y, device=self.device)
        data = self._formed(given, self._like_training)
        are_classes = self._are_classes(data.examples[1])
        if self.has_classes and not are_classes:
            raise ValueError("y: these targets are not one class per sample, as those of training are")
        if are_classes and not self.has_classes:
            before, after = (unweighted(self.loss, values.examples[1])[1] for values in (given, data))
            if before.shape != after.shape:
                raise ValueError("y: these targets are class indices, and those of training are not classes")
        self._check_loss(data)
        return data

    def targets(self, x: Any, y: Any) -> Any:
        """Return the targets of inputs x [M, ...] in the form that the loss takes. Raises ValueError."""
        outputs = outputs_of(self.blocks, x)
        self._check_outputs()
        return self.loss.targets(y, outputs.shape[1:], like=outputs)

    @cached_property
    def has_classes(self) -> bool:
        """Whether the targets are one class per sample, or per position of it, so that accuracy is defined."""
        return self._are_classes(self.data.examples[1])

    @cached_property
    def threshold(self) -> float | None:
        """The threshold of the loss, above which an output means yes, if all targets are 0 or 1; else None."""
        loss, y, _ = unweighted(self.loss, self.data.examples[1])
        return loss.threshold if isinstance(y, Tensor) and bool(((y == 0) | (y == 1)).all()) else None

    def _are_classes(self, targets: Any) -> bool:
        """Whether targets in the form that the loss takes are one class per sample, or per position of it."""
        loss, y, _ = unweighted(self.loss, targets)
        if isinstance(loss, CrossEntropy):
            return True
        outputs = outputs_of(self.blocks, self.data.examples[0])
        return isinstance(y, Tensor) and y.shape[1:] == outputs.shape[1:] and is_one_hot(y)

    def _formed(self, data: Samples, inputs: Callable[[Any], Any]) -> Samples:
        """Return samples with `inputs` in place of the inputs, and targets as the loss takes them."""

        def form(x: Any, y: Any) -> tuple[Any, Any]:
            x = inputs(x)
            return x, self.targets(x, y)

        return Tensors(*form(*data.examples)) if isinstance(data, Tensors) else Formed(data, form)

    def _like_training(self, x: Any) -> Any:
        """Return inputs of floating point in the type of training. Raises ValueError for inputs of another kind."""
        trained = self.data.examples[0]
        given = dict(tree_leaves_with_path(x))
        if given.keys() != dict(tree_leaves_with_path(trained)).keys():
            raise ValueError(f"x: inputs of the form {_described(x)}, where training has {_described(trained)}")

        def converted(path: Any, like: Tensor) -> Tensor:
            leaf: Tensor = given[path]
            is_same = leaf.dtype == like.dtype or (leaf.is_floating_point() and like.is_floating_point())
            if leaf.shape[1:] != like.shape[1:] or not is_same:
                raise ValueError(
                    f"x: samples {list(leaf.shape[1:])} of {leaf.dtype}, where training has {list(like.shape[1:])} of "
                    f"{like.dtype}"
                )
            return leaf.to(like.dtype)

        return tree_map_with_path(converted, trained)  # a dictionary's keys in the order of training

    def _warn_of_class_axis(self, given: Samples) -> None:
        """Warn of class indices, as they were given, that fit the outputs [n, ..., C] and, as PyTorch's losses would
        take them, [n, C, ...]."""
        x, y = given.examples
        loss, y, _ = unweighted(self.loss, y)
        outputs = outputs_of(self.blocks, x).shape[1:]
        takes_classes = not isinstance(loss, FunctionLoss) and self.has_classes
        if takes_classes and have_classes_along_axis_1(y, outputs) and outputs[1:] == outputs[:-1]:
            warn(
                f"y: class indices {_in_short(y)} fit outputs [{', '.join(['n', *map(str, outputs)])}] in two ways: "
                f"{CLASSES_LAST}; if the last axis is right, y[..., None] says so"
            )

    def _warn_of_scale(self) -> None:
        """Warn of numbers as targets that are far larger or smaller than the outputs of a new network."""
        loss, y, _ = unweighted(self.loss, self.data.examples[1])
        if not isinstance(loss, SquaredError | Huber) or self.has_classes:
            return
        y = y[:_LOOKED_THROUGH].double()
        mean, deviation = float(y.mean()), float(y.std(correction=0))
        if max(abs(mean), deviation) > _LARGE or 0.0 < deviation < 1.0 / _LARGE:
            warn(
                f"y: numbers with mean {mean:.3g} and standard deviation {deviation:.3g}, where the outputs of a new "
                "network are near 1; train on (y - mean) / deviation, and undo this in what is predicted"
            )

    def _check_precision(self) -> None:
        types = {leaf.dtype for leaf in tree_leaves(self.data.examples[0]) if leaf.is_floating_point()}
        if self.blocks.execution.precision == "bf16" and types - {torch.float32}:
            raise ValueError(f"precision: bf16 is for inputs x of float32, not {', '.join(map(str, types))}")

    def _check_outputs(self) -> None:
        """Let a plain function get the network's outputs as the network returns them, if that is no single tensor.

        Raises ValueError for other losses, if there are several outputs.
        """
        crossing, loss = self.blocks.crossings[-1], unweighted(self.loss, None)[0]
        is_one = len(crossing.shapes) == 1
        if crossing.is_tensor or (is_one and not isinstance(loss, FunctionLoss)):
            return
        if not isinstance(loss, FunctionLoss):
            raise ValueError(
                f"loss: {type(loss).__name__} takes one output, the network returns {len(crossing.shapes)}; take a "
                "plain function of what it returns and the targets"
            )
        if not isinstance(loss.function, partial):
            of_several = replace(loss, function=partial(_of_several, loss.function, crossing))
            object.__setattr__(self, "loss", _weighted(of_several, self.weights))

    def _check_loss(self, data: Samples) -> None:
        """Raise ValueError for a loss that has no value per sample (of a plain function: of this sample alone), or no
        gradient in the shape of the outputs."""
        x, targets = data.examples
        loss, plain_targets, _ = unweighted(self.loss, targets)
        is_function = isinstance(loss, FunctionLoss)
        other = _first_of_others(plain_targets)
        outputs = outputs_of(self.blocks, x)
        # The value of the first sample, or of the first seed, has to be the same beside others and beside its copies.
        z, y = _examples(outputs, targets, [[0, other], [other, other], [other, other]])
        copies = _examples(outputs, targets, [[0, 0 if is_function else other]] * 3)
        of_targets = tree_map(lambda leaf: list(leaf.shape), y)
        shapes = f"outputs {list(z.shape)} and targets {of_targets} (3 seeds, 2 samples)"
        try:
            gradient = self.loss.gradient(z, y)
            value, among_copies, again = map(self._repeatable_value, (z, copies[0], z), (y, copies[1], y))
        except Exception as error:  # whatever the caller's function raises
            raise ValueError(f"loss: cannot be evaluated on {shapes}: {type(error).__name__}: {error}") from error
        if value.shape[:2] != z.shape[:2]:
            raise ValueError(
                f"loss: the value for {shapes} is {list(value.shape)}; expected J of each sample, "
                f"{list(z.shape[:2])}, or of each of its parts"
            )
        if gradient.shape != z.shape:
            raise ValueError(f"loss: the gradient for {shapes} is {list(gradient.shape)}, expected the outputs'")
        first, what = ((0, 0), "sample") if is_function else ((0,), "seed")
        if torch.equal(value, again) and not _agree(value[first], among_copies[first]):
            raise ValueError(
                f"loss: J of a {what} depends on the other {what}s, for "
                f"{outputs_and_targets(z[0], unweighted(self.loss, tree_map(lambda leaf: leaf[0], y))[1])}"
            )

    def _repeatable_value(self, z: Tensor, y: Any) -> Tensor:
        """Return J with the same random numbers at each call."""
        with all_seeded(0), seeded(0, self.device):
            return self.loss.value(z, y)

    def _share_blocks(self) -> None:
        """Cut the blocks into one part per process. Raises ValueError where they depend on more than Z and Θ."""
        if self.blocks.shared_parameters:
            raise ValueError("parallel: 'blocks' needs blocks without shared parameters; take parallel='samples'")
        # Z takes a forward pass and the product with the Jacobian by Z_{t−1}, and Θ a forward pass and that by Θ.
        costs = [
            flops * (4 if t > 1 else 3) + _FLOPS_PER_ENTRY * entries
            for t, (flops, entries) in enumerate(forward_costs(self.blocks, self.data.examples[0]), start=1)
        ]
        places = balanced(costs, self.parallel.size)
        object.__setattr__(self, "cut", [range(part.start + 1, part.stop + 1) for part in places])
        for part in self.cut[1:]:
            if not self.blocks.crossings[part.start - 2].is_plain:
                raise ValueError(
                    f"parallel: 'blocks' needs one tensor between two processes, but more crosses the cut before block "
                    f"{part.start}, {list(self.blocks.names[part.start - 1])}; take parallel='samples'"
                )

    @property
    def held_blocks(self) -> range:
        """The numbers of the blocks, counted from 1, that this process holds."""
        return self.cut[self.parallel.rank]

    def held_stacks(self, theta: Parameters) -> list[Tensor]:
        """Return all parameters [S, *shape], with tensors [S, 0] for those of blocks that other processes hold."""
        if not self.parallel.shares("blocks"):
            return [*theta.stacks.values()]
        return [
            stack if name in self._held_parameters else stack.new_empty(len(stack), 0)
            for name, stack in theta.stacks.items()
        ]

    @cached_property
    def _held_parameters(self) -> set[str]:
        return {name for name, t in self.blocks.numbers_of_parameters().items() if t in self.held_blocks}

    def of_all_blocks(self, variables: list[Tensor], count: int) -> list[Tensor]:
        """Return variables of `count` samples with those that other processes hold, one [S, count, d_t] per block."""
        if not self.parallel.shares("blocks"):
            return variables
        whole = [v if len(v[0]) else v.new_empty(len(v), count, *v.shape[2:]) for v in variables]
        for owner, numbers in enumerate(self.cut):
            self.parallel.give(owner, *[whole[t - 1] for t in numbers])
        return whole

    def give_theta(self, theta: Parameters) -> None:
        """Overwrite the parameters and buffers of all blocks by those of the processes that hold them."""
        if self.parallel.shares("blocks"):
            for owner, numbers in enumerate(self.cut):
                self.parallel.give(owner, *self.blocks.tensors_of(theta, numbers))

    def _check_shared_samples(self) -> None:
        """Raise ValueError unless this process can evaluate its samples without those of the others."""
        if not isinstance(self.data, Tensors):
            raise ValueError("parallel: samples that are read as they are needed cannot be shared out; give tensors")
        if self.n_samples < self.parallel.size:
            raise ValueError(
                f"parallel: {self.parallel.size} processes, but there are {self.n_samples} samples to share out"
            )
        if self.blocks.execution.compile is True:
            raise ValueError("compile: True, but with parallel='samples' mini-batches have no fixed size; take False")
        if self.augmentation is not None and self.augmentation.mixes_samples:
            name = type(self.augmentation).__name__
            raise ValueError(
                f"augmentation: {name} may mix samples, of which other processes hold some; take another one"
            )
        if not self.blocks.are_known_layers and not samples_are_independent(self.blocks, self.data.examples[0]):
            raise ValueError(
                "parallel: 'samples' needs a network whose output for a sample does not depend on the others of its "
                "mini-batch, which is not so with batch normalisation, dropout, running statistics and the like; take "
                "parallel='blocks'"
            )

    @property
    def compile_seconds(self) -> float:
        """The time that compiling visits and blocks has taken."""
        return self.compiled.seconds + self.blocks.compile_seconds

    def kept(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns, a tensor that follows from the samples and the key, such as XᵀX.

        It is computed once; of more than `_KEPT` keys the oldest one is forgotten.
        """
        if key not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = compute()
        return self._kept[key]

    def initial(self, seeds: Sequence[int]) -> Parameters:
        """Return initial parameters, one replica per seed. Raises ValueError as `whole_seeds` does."""
        return self.blocks.initial(whole_seeds(seeds), self.initialise, like=self.like)

    @property
    def n_samples(self) -> int:
        """The number N of training samples."""
        return self.data.n

    @property
    def n_held(self) -> int:
        """The number of training samples that this process holds."""
        return len(range(self.n_samples)[self.part])

    @property
    def device(self) -> torch.device:
        """Where samples are read to, and all variables are."""
        return self.data.device

    @property
    def like(self) -> Tensor:
        """An empty tensor with the type and the device of the parameters."""
        return torch.empty(0, dtype=self.blocks.dtype, device=self.device)

    def whole(self, optimizer: str) -> tuple[Tensor, Any]:
        """Return all inputs [N, ...] that this process holds, and targets.

        Raises ValueError that names the optimizer, for a stream, with the bytes that it would need, and for several
        inputs.
        """
        if not isinstance(self.data, Tensors):
            size = self.data.nbytes
            raise ValueError(
                f"x: {optimizer} needs all samples as tensors on {self.device}, {size / 2**30:.1f} GiB ({size} bytes) "
                "besides its variables of each sample, and these are read as they are needed; Backprop, Gotmare, "
                "OnlineBlockADMM, BlockADMM and DeepFacto do with that"
            )
        if not isinstance(self.data.x, Tensor):
            raise ValueError(f"x: {optimizer} takes one tensor, not {_described(self.data.x)}")
        x, y = next(self.data.read([self.part]))
        return x, y

    def owned(self, batch: Tensor) -> Tensor:
        """Return which samples of a mini-batch this process holds.

        Args:
            batch: indices [S, B] among all samples.

        Returns:
            Their places [S, n] among the samples that are held here.
        """
        if not self.parallel.shares("samples"):
            return batch
        places: Tensor = self._held(batch) - self.part.start
        return places

    def _held(self, batch: Any) -> Any:
        """Return the indices among all samples of those of a batch that this process holds, see `visits`."""
        if not self.parallel.shares("samples"):
            return batch
        if isinstance(batch, slice):
            places = range(self.part.start, self.part.stop)[batch]
            return slice(places.start, places.stop)
        is_held = (batch >= self.part.start) & (batch < self.part.stop)
        return batch[is_held].view(len(batch), int(is_held[0].sum()))

    def visit(self, seeds: Sequence[int], batch: Tensor | slice, counter: tuple[int, ...] = ()) -> Visit:
        """Return a visit of some samples, in training mode; see `visits`."""
        return next(self.visits(seeds, [batch], [counter]))

    def total_gradient(self, gradient: Sequence[Sequence[ParamDict]]) -> list[Tensor]:
        """Return the gradient by parameter, in the order of `Parameters.stacks`, from that by block and layer.

        To it is added that of the samples which other processes hold.
        """
        total = self.blocks.total(gradient)
        self.parallel.add_up(*total, over="samples")
        return total

    def evenly_spaced(self, count: int, replicas: int) -> Tensor:
        """Return the indices [S, count] of samples from evenly spaced places, the same for all replicas."""
        return (torch.arange(count, device=self.device) * self.n_samples // count).expand(replicas, -1)

    def visits(
        self, seeds: Sequence[int], batches: Sequence[Tensor | slice], counters: Sequence[tuple[int, ...]]
    ) -> Iterator[Visit]:
        """Yield a visit, in training mode, of the samples of each batch.

        Args:
            seeds: S whole numbers.
            batches: indices [S, B] among all samples, of which those that are held here are visited; or a slice of the
                latter, the same for all replicas, for which x and y are views.
            counters: tell the visits of a run apart, see `Visit`.
        """
        held = map(self._held, batches)
        for batch, counter, pair in zip(batches, counters, self.data.read([*held]), strict=True):
            if isinstance(batch, slice):
                x, y = expand(pair, len(seeds))
                yield Visit(seeds, counter, True, x, y)
            else:
                yield Visit(seeds, counter, True, *pair, count=batch.shape[1])

    def minibatches(
        self, batch_size: int, seeds: Sequence[int], iteration: int, parts: int | None
    ) -> tuple[int, Iterator[Visit]]:
        """Return the mini-batches of an iteration, which is an epoch or one of its `parts`.

        These are their number, and a visit of each, with inputs [S, B, ...], augmented, and targets [S, B, ...]. Raises
        ValueError as `admm.minibatches.minibatches` does.
        """
        distinct = list(dict.fromkeys(seeds))  # replicas of one seed share their mini-batches, read once
        batches = minibatches(self.n_samples, batch_size, distinct, iteration, self.device, parts)
        return len(batches), self._visits_of(batches, seeds, distinct, iteration, parts)

    def _visits_of(
        self,
        batches: Sequence[Tensor],
        seeds: Sequence[int],
        distinct: Sequence[int],
        iteration: int,
        parts: int | None,
    ) -> Iterator[Visit]:
        """Yield a visit of each mini-batch [D, B] of the distinct seeds, for the replicas of all seeds."""
        place = torch.tensor([distinct.index(seed) for seed in seeds], device=self.device)
        epoch, augmentation = iteration // (parts or 1), self.augmentation
        if augmentation is not None:
            draws = self._draws(augmentation, distinct, epoch)
        held = [self._held(batch) for batch in batches]
        pairs = zip(batches, held, self.data.read(held, distinct, epoch), strict=True)
        for number, (whole, batch, pair) in enumerate(pairs):
            if augmentation is not None:
                at = batch.unsqueeze(2)
                pair = augmentation.change(*pair, tree_map(lambda drawn, at=at: drawn.take_along_dim(at, 1), draws))
            x, y = take_rows(pair, place) if len(distinct) < len(seeds) else pair
            yield Visit(seeds, (iteration, number), True, x, y, count=whole.shape[1])

    def _draws(self, augmentation: Augmentation, seeds: Sequence[int], epoch: int) -> Any:
        """Return what an augmentation draws for all samples in an epoch, [S, N, k]."""
        drawn = [augmentation.draw(self.n_samples, stateless_rng(seed, "augmentation", epoch)) for seed in seeds]
        return tree_map(lambda *replicas: torch.stack(replicas).to(self.device), *drawn)

    def refuse_augmentation(self, optimizer: str) -> None:
        """Raise ValueError if there is an augmentation: `optimizer` keeps variables of each sample."""
        if self.augmentation is not None:
            raise ValueError(
                f"augmentation: {optimizer} keeps variables of each sample as it is; take augmentation=None, or one of "
                "OnlineBlockADMM, Gotmare and Backprop"
            )


class State(Protocol):
    """The variables of an optimizer for S replicas: a dataclass with these fields, and whatever else it needs.

    Further fields are tensors, `Parameters`, numbers, text, None, and lists, tuples, dictionaries and dataclasses of
    these, which `admm.checkpoints.save` can store. Tensors have the replica axis S in front unless the state's
    docstring says otherwise.

    Attributes:
        seeds: one whole number per replica, from which all its random numbers follow.
        iteration: the number of finished iterations; `Optimizer.step` counts it.
        theta: the blocks' parameters [S, P], which `Optimizer.step` changes in place; `Blocks.export` makes a copy.

    A state of an optimizer with update rules has a field `made_with`, the `Optimizer.keeps` of that which has made it.

    A state of an optimizer with `parallel` has a tuple `of_samples` of the names of the fields, such as "z" or
    "z_state.moments", whose tensors [S, n, ...] are of the samples that a process holds; all others are the same in all
    processes.
    """

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters


class ShortRepr:
    """The base of a dataclass, declared with repr=False, that shows of a tensor its type and its shape alone."""

    def __repr__(self) -> str:
        values = (f"{f.name}={_shown_in_short(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(values)})"


def _shown_in_short(value: Any) -> str:
    """Return a value as text, of tensors the type and the shape, of a longer list the first `_FEW` entries."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list):
        more = [f"… {len(value) - _FEW} more"] if len(value) > _FEW else []
        return f"[{', '.join([*map(_shown_in_short, value[:_FEW]), *more])}]"
    return repr(value)


StateT = TypeVar("StateT", bound=State)


class Optimizer(ABC, Generic[StateT]):
    """An algorithm: an immutable object with hyperparameters, over an explicit state of tensors.

    Replica s of a state depends on seeds[s] alone, so that a stack of replicas equals runs of one seed each. An
    optimizer never prints, logs, evaluates or reads a clock.

    Attributes:
        parallel: in which ways a run can be shared out to several processes, see `admm.parallel.Parallel`. In `step`
            the samples are those that the process holds; sums over samples are to be added up over the processes.
    """

    parallel: ClassVar[tuple[Kind, ...]] = ()

    @property
    def keeps(self) -> dict[str, str]:
        """What a state keeps for rules among the arguments, as text by argument, such as `UpdateRule.keeps`.

        `init` puts it into the state's `made_with`. `train` and `restore` refuse a state that keeps something else.
        """
        return {}

    @abstractmethod
    def init(self, problem: Problem, seeds: Sequence[int]) -> StateT:
        """Return the state before the first iteration.

        Raises ValueError that names the hyperparameter, for one that is out of range, or what else of the problem the
        algorithm cannot take.
        """

    @abstractmethod
    def step(self, problem: Problem, state: StateT) -> StateT:
        """Do one iteration over all N samples (an epoch or a part of one, for mini-batch methods).

        The state is changed in place and returned, its `iteration` counted. The result depends on nothing but the
        problem and the state. Raises ValueError for a problem with other samples than the state was made for, if it
        keeps variables of them.
        """

    def diagnostics(self, problem: Problem, state: StateT) -> dict[str, Tensor]:
        """Return named quantities [S] for the history, such as constraint residuals; the state stays as it is."""
        return {}


def _of_several(function: Callable[[Any, Any], Tensor], crossing: Crossing, z: Tensor, y: Any) -> Tensor:
    """Return the value of a function of a network's outputs, which `crossing` has joined to z [n, d]."""
    return function(crossing.outputs(z)[0], y)


def check_state(problem: Problem, optimizer: Optimizer[Any], state: Any) -> None:
    """Raise TypeError for a state of another optimizer or without a field of `State`, and ValueError for one of
    another network or another update rule."""
    for name, kind in (("seeds", tuple), ("iteration", int), ("theta", Parameters)):
        if not isinstance(getattr(state, name, None), kind):
            raise TypeError(
                f"state: a {type(state).__name__}, the state of {type(optimizer).__name__}, has no field {name!r} that "
                f"is a {kind.__name__}; a state has seeds, iteration and theta, see admm.optimizers.protocol.State"
            )
    if not issubclass(type(state), expected := _state_class(type(optimizer))):
        raise TypeError(
            f"state: {type(optimizer).__name__} goes on with {expected.__name__}, not with {type(state).__name__}; to "
            f"begin with another optimizer's parameters, {_ITS_PARAMETERS}"
        )
    problem.blocks.check_parameters("state", state.theta)
    check_rules("state", getattr(state, "made_with", {}), optimizer.keeps)
    if not state.theta.stacks:
        raise ValueError("blocks: no parameter of the network is trained; all are frozen (requires_grad=False)")


def check_rules(what: str, made_with: Mapping[str, str], keeps: Mapping[str, str]) -> None:
    """Raise ValueError, which begins with `what`, where a state that was made with other rules keeps something else.

    Args:
        what: such as "state".
        made_with: that of the state; what it does not name is taken as it is, as in states of former versions.
        keeps: what a state of the optimizer that is given keeps.
    """
    for name, now in keeps.items():
        if (was := made_with.get(name, now)) != now:
            lines = zip_longest(was.splitlines(), now.splitlines(), fillvalue="nothing")
            was, now = next(pair for pair in lines if pair[0] != pair[1])
            raise ValueError(
                f"{what}: was made with {name}={was}, and {now} cannot go on with what it keeps; give the rule that it "
                f"was made with, or, to begin anew with its parameters, {_ITS_PARAMETERS}"
            )


def _state_class(optimizer: type) -> Any:
    """Return the class of states with which an optimizer is declared, as in Optimizer[BackpropState], or object."""
    bases = (base for cls in optimizer.__mro__ for base in cls.__dict__.get("__orig_bases__", ()))
    declared = (get_args(base)[0] for base in bases if get_origin(base) is Optimizer)
    return next((cls for cls in declared if is_dataclass(cls)), object)


def check_parallel(optimizer: Optimizer[Any], problem: Problem) -> None:
    """Raise ValueError if an optimizer's run cannot be shared out as the problem says."""
    if problem.parallel.size > 1 and (kind := problem.parallel.kind) not in optimizer.parallel:
        ways = f"parallel={' or '.join(map(repr, optimizer.parallel))}" if optimizer.parallel else "one process"
        raise ValueError(f"parallel: {type(optimizer).__name__} has no {kind!r}; it runs with {ways}")


def as_loss(loss: Any) -> Loss:
    """Return a loss as it is, or a plain function as a `FunctionLoss`. Raises ValueError for anything else."""
    if isinstance(loss, Loss):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return FunctionLoss(loss)
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    raise ValueError(f"loss: {name} is neither an object of a subclass of admm.losses.Loss nor a function")


def _weighted(loss: Loss, weights: Any) -> Loss:
    """Return the loss that takes pairs of targets and weights, or the loss itself where there are no weights."""
    return loss if weights is None or isinstance(loss, SampleWeighted) else SampleWeighted(loss)


def _first_of_others(targets: Any) -> int:
    """Return the number of the first sample, of some, whose targets are not those of sample 0; 0 if there is none."""
    leaves = [leaf[:_LOOKED_THROUGH] for leaf in tree_leaves(targets)]
    differ = [(leaf != leaf[:1]).reshape(len(leaf), math.prod(leaf.shape[1:])).any(1) for leaf in leaves]
    return int(torch.stack(differ).any(0).byte().argmax())


def _examples(outputs: Tensor, targets: Any, rows: list[list[int]]) -> tuple[Tensor, Any]:
    """Return outputs [S, n, ...] that are random in (0, 1), one for the first sample and one for all others, and
    targets, of samples by number."""
    batch = torch.tensor(rows, device=outputs.device)
    z = torch.rand(2, *outputs.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(outputs)
    return z[batch.clamp(max=1)], tree_map(lambda leaf: leaf[batch], targets)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two values of a loss are the same up to rounding."""
    tolerance = max(1e-4, torch.finfo(one.dtype).eps ** 0.5)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().amax()), equal_nan=True)


def _described(tree: Any) -> str:
    """Return what a tree of inputs is, such as ['image', 'mask'] for a dictionary."""
    if isinstance(tree, Tensor):
        return "a tensor"
    return str(list(tree)) if isinstance(tree, dict) else f"a {type(tree).__name__} of {len(tree)}"


def _in_short(tree: Any) -> str:
    """Return what samples are, of a tensor its type and shape, such as float32 [n, 8]."""
    if not isinstance(tree, Tensor):
        return _described(tree)
    return f"{str(tree.dtype).removeprefix('torch.')} [{', '.join(['n', *map(str, tree.shape[1:])])}]"


def whole_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds as a tuple of Python's integers.

    Raises ValueError unless they are a sequence of one or more whole numbers from 0 up to 2⁶⁴ − 1.
    """
    values = plain(seeds)
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not is_sequence or not all(isinstance(s, int) and 0 <= s < 2**64 for s in values):
        raise ValueError(
            f"seeds: {shown(seeds)} is not a sequence of whole numbers from 0 up to 2⁶⁴ − 1, such as [0, 1, 2]"
        )
    return tuple(map(int, values))


def spectral_norms(problem: Problem, theta: Parameters) -> dict[str, Tensor]:
    """Return `sigma_t` [S], the largest singular value of block t's weight, for each block of one linear layer."""
    weights = [block.linear_weight(views) for block, views in zip(problem.blocks, theta.blocks, strict=True)]
    return {
        f"sigma_{t}": largest_singular_value(weight) for t, weight in enumerate(weights, start=1) if weight is not None
    }


def largest_singular_value(weight: Tensor) -> Tensor:
    """Return the largest singular value [S] of a weight [S, d', d]; it is not finite where the weight is not.

    It is the root of the largest eigenvalue of the smaller of WWᵀ and WᵀW, which is faster than an SVD. W is divided by
    its largest entry before, so that the products cannot overflow.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()  # PyTorch has no eigenvalues of half precision
    largest = weight.abs().amax((1, 2))
    scale = torch.where(largest.isfinite() & (largest > 0), largest, torch.inf)  # then the quotient is 0
    short = (weight if weight.shape[1] <= weight.shape[2] else weight.mT).nan_to_num() / scale.view(-1, 1, 1)
    squares: Tensor = torch.linalg.eigvalsh(torch.bmm(short, short.mT))
    return squares[:, -1].clamp(min=0.0).sqrt() * largest
