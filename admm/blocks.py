"""A network cut into blocks, and S stacked replicas of each block evaluated at once.

Shapes: S replicas, n samples, d features. A block maps `z_Snd` [S, n, d] to [S, n, d']; of each of its parameters there
is one per replica, [S, *shape].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx, nn

from admm.checks import has_type, shown
from admm.crossings import Crossing
from admm.layers import (
    Execution,
    FlattenLayer,
    Layer,
    LinearLayer,
    ModuleLayer,
    ParamDict,
    ReLULayer,
    check_modules,
    known_layer,
)
from admm.layout import Kind, common, converted, layout, restore_frozen_statistics, wide
from admm.numbers import is_whole
from admm.random_numbers import all_seeded
from admm.splitting import Part, Stages, parts_of
from admm.visits import Visit, evaluation


@dataclass(frozen=True)
class Block:
    """Consecutive layers of a network between two coupling variables (paper, Figure 1)."""

    layers: tuple[Layer, ...]

    def forward(self, theta: Sequence[ParamDict], z: Any, visit: Visit) -> Tensor:
        """Return block_Θ(z) [S, n, d'] for z [S, n, d], which is left as it is.

        z is the coupling variable before the block, or the inputs, which may be a structure of tensors. What else has
        crossed the cut before the block is taken from the visit, and what else crosses the next cut is noted there.
        """
        for layer, views, inplace in zip(self.layers, theta, self._inplace, strict=True):
            z = layer.forward(views, z, inplace, visit)
        return z  # type: ignore[no-any-return]

    def linearize(self, theta: Sequence[ParamDict], z: Any, visit: Visit) -> tuple[Tensor, list[Any]]:
        """Return block_Θ(z), as `forward` does, and the record of this evaluation that `vjp` needs."""
        record = []
        for layer, views, inplace in zip(self.layers, theta, self._inplace, strict=True):
            z, saved = layer.linearize(views, z, inplace, visit)
            record.append(saved)
        return z, record

    def vjp(
        self,
        theta: Sequence[ParamDict],
        record: Sequence[Any],
        grad_output: Tensor,
        grad_params: Sequence[ParamDict] | None = None,
        needs_input_grad: bool = True,
        retain_graph: bool = True,
    ) -> Tensor | None:
        """Multiply the transposed Jacobians of an evaluation by `grad_output` [S, n, d'].

        Args:
            theta: the block's parameters by layer, those of the evaluation.
            record: what `linearize` has returned with the output.
            grad_output: the vector, often the derivative of a loss with respect to the output.
            grad_params: where the product with respect to the parameters, summed over the samples, is put, by layer. If
                given, running statistics in `theta` take the values that the evaluation in training gave them.
            needs_input_grad: whether the product with respect to the input is needed.
            retain_graph: whether the record is needed again; else its activations are freed on the way.

        Returns:
            The product with respect to the input, [S, n, d], or None.
        """
        first = next((i for i, views in enumerate(theta) if views), len(self.layers))
        gradient: Tensor | None = grad_output
        for position in reversed(range(len(self.layers))):
            if not needs_input_grad and (grad_params is None or position < first):
                return None
            assert gradient is not None
            gradient = self.layers[position].vjp(
                theta[position],
                record[position],
                gradient,
                None if grad_params is None else grad_params[position],
                needs_input_grad or position > first,
                retain_graph,
            )
        return gradient

    def share_learned(self, other: Block) -> None:
        """Share what is known of the modules with another block of the same ones."""
        for layer, known in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, ModuleLayer) and isinstance(known, ModuleLayer):
                layer.learned = known.learned

    @cached_property
    def is_autograd(self) -> bool:
        """Whether the record of an evaluation holds an autograd graph, and with it all activations."""
        return any(isinstance(layer, ModuleLayer) for layer in self.layers)

    def linear_weight(self, theta: Sequence[ParamDict]) -> Tensor | None:
        """Return W [S, d', d] of a block of one linear layer, with or without ReLUs around it, or None."""
        linear = [views for layer, views in zip(self.layers, theta, strict=True) if isinstance(layer, LinearLayer)]
        plain = all(isinstance(layer, LinearLayer | ReLULayer | FlattenLayer) for layer in self.layers)
        return linear[0]["weight"] if plain and len(linear) == 1 else None

    @cached_property
    def _inplace(self) -> tuple[bool, ...]:
        """Whether each layer may overwrite its input: the output of a linear layer in the block, which nothing else
        reads."""
        return (False, *(isinstance(layer, LinearLayer) for layer in self.layers[:-1]))


@dataclass(frozen=True)
class Parameters:
    """A network's parameters for S replicas.

    Each is one contiguous tensor, so that products and updates of all replicas need no copy.

    Args:
        stacks: each trained parameter [S, *shape], by its name in the network, in the order of the blocks.
        buffers: all buffers that may be statistics, such as those of batch normalisation, [S, B].
        blocks: the same tensors, and views of the buffers, by block, layer and name in the layer. A parameter that
            several blocks share is in each of them.
    """

    stacks: dict[str, Tensor]
    buffers: Tensor
    blocks: list[list[ParamDict]]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(stack.shape)}" for name, stack in self.stacks.items())
        return f"Parameters({shapes or 'none is trained'})"

    @property
    def replicas(self) -> int:
        """The number S of replicas."""
        return len(self.buffers)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the trained parameters."""
        return next(iter(self.stacks.values()), self.buffers).dtype

    def flat(self) -> Tensor:
        """Return all trained parameters in one new tensor [S, P]."""
        return flattened(self.stacks.values()) if self.stacks else self.buffers.new_empty(self.replicas, 0)

    def fill(self, flat: Tensor) -> None:
        """Overwrite all trained parameters by those of a tensor [S, P], or [P] for all replicas.

        Raises RuntimeError for another P.
        """
        sizes = [stack[0].numel() for stack in self.stacks.values()]
        for stack, values in zip(self.stacks.values(), flat.split(sizes, -1), strict=True):
            stack.copy_(values.reshape(values.shape[:-1] + stack.shape[1:]))


def flattened(stacks: Iterable[Tensor]) -> Tensor:
    """Return tensors [S, *shape] of the same S joined to one, [S, P]."""
    return torch.cat([stack[:, None].flatten(1) for stack in stacks], 1)  # a parameter may be a single number


class Blocks(Sequence[Block]):
    """A network cut into T blocks, which `split` makes; for T = 1, the block is the network.

    Attributes:
        network: the network that was cut, which is neither evaluated nor changed.
        execution: how blocks are evaluated.
        names: the names of the network's modules, block by block, in the order of evaluation.
        modules: each block as a module.
        crossings: what crosses the cut after each block.
        given: the blocks of the network in its own type, where these are in another one.
        dtype: the type of the trained parameters; where they have several, one that holds them all.
    """

    def __init__(
        self,
        network: nn.Module,
        cut: Callable[[nn.Module], list[Part]],
        execution: Execution | None = None,
        crossings: Sequence[Crossing] = (),
    ) -> None:
        """Make the blocks of a network that nothing else will change.

        What the `forward` of a caller's module does is checked when a `Problem` is made (`admm.comparison`).

        Args:
            network: is stored.
            cut: returns the parts of a network, see `admm.splitting.parts_of`.
            execution: how blocks are evaluated.
            crossings: what is known of what crosses the cuts, by block.

        Raises:
            ValueError: for an option of `execution` without effect, and as `cut` does.
        """
        self.network, self.execution, self._cut = network, execution or Execution(), cut
        tensors = [*network.parameters(), *network.buffers()]
        own = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})  # whose modes may change
        parts = cut(own if own.training else own.train())
        self.names, self.modules = tuple(part.names for part in parts), tuple(part.module for part in parts)
        self.crossings = tuple(crossings) or tuple(Crossing() for _ in parts)
        self.given, self._in_other_types = self, dict[torch.dtype, Blocks]()
        self.compared: dict[Any, Tensor] = {}  # see `admm.comparison.outputs_of`
        self._layout = layout(network, [part.layers or (part.module,) for part in parts])
        self.dtype = self._layout.dtype
        self._blocks = tuple(self._block(t, part) for t, part in enumerate(parts, start=1))
        if self.execution.precision == "bf16" and self.are_known_layers:
            raise ValueError(
                "precision: bf16 is for other layers than linear, ReLU and flatten; this network has none: take fp32"
            )

    def _block(self, t: int, part: Part) -> Block:
        if part.layers:
            layers = (known_layer(module) for module in part.layers)
            return Block(tuple(layer for layer in layers if layer is not None))
        before, after = self.crossings[t - 2] if t > 1 else None, self.crossings[t - 1]
        casts = self._layout.casts(t)
        return Block((ModuleLayer(part.module, self.execution, t, before, after, part.hands_on_arguments, casts),))

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, t: int) -> Block: ...

    @overload
    def __getitem__(self, t: slice) -> tuple[Block, ...]: ...

    def __getitem__(self, t: int | slice) -> Block | tuple[Block, ...]:
        return self._blocks[t]

    def __repr__(self) -> str:
        lines = (
            f"  {t}: {_few(names)}{_arrow(module, crossing, is_last=t == len(self))}"
            for t, (names, module, crossing) in enumerate(zip(self.names, self.modules, self.crossings, strict=True), 1)
        )
        return "\n".join([f"{len(self)} blocks of {type(self.network).__name__}:", *lines])

    @property
    def are_known_layers(self) -> bool:
        """Whether all layers are linear, ReLU or flatten, so that none is evaluated by autograd."""
        return not any(block.is_autograd for block in self)

    @property
    def compile_seconds(self) -> float:
        """The time that compiling blocks has taken."""
        layers = (layer for block in self for layer in block.layers)
        return sum(layer.compile_seconds for layer in layers if isinstance(layer, ModuleLayer))

    def with_dtype(self, dtype: torch.dtype) -> Blocks:
        """Return the blocks of a copy of the network with all its tensors of floating point in this type, and complex
        ones in its complex counterpart."""
        if dtype not in self._in_other_types:
            blocks = Blocks(converted(copy.deepcopy(self.network), dtype), self._cut, self.execution)
            self._in_other_types[dtype], blocks.given = blocks, self
        return self._in_other_types[dtype]

    def with_execution(self, execution: Execution) -> Blocks:
        """Return the same blocks, evaluated in another way."""
        blocks = Blocks(self.network, self._cut, execution, self.crossings)
        for new, old in zip(blocks, self, strict=True):
            new.share_learned(old)
        if self.given is not self:
            blocks.given = self.given.with_execution(execution)
        return blocks

    def parameters(self, flat: Tensor, buffers: Tensor | None = None) -> Parameters:
        """Return copies of parameters [S, P], with the buffers [S, B], which are not copied, or without any.

        Raises RuntimeError where P or B is less than the network has.
        """
        views = self._layout.views("parameters", flat)
        stacks = {path: view.clone(memory_format=torch.contiguous_format) for path, view in views.items()}
        tensors: dict[Kind, dict[str, Tensor]] = {"parameters": stacks}
        if buffers is not None:
            tensors["buffers"] = self._layout.views("buffers", buffers)
        return Parameters(stacks, flat[:, :0] if buffers is None else buffers, self._layout.by_layer(tensors))

    def copied(self, theta: Parameters) -> Parameters:
        """Return a copy of parameters, with a copy of the buffers."""
        return self.parameters(theta.flat(), theta.buffers.clone())

    def gradient(self) -> list[list[ParamDict]]:
        """Return a place for the gradient by the parameters of each block and layer, which `Block.vjp` fills."""
        return [[{} for _ in block.layers] for block in self]

    def total(self, gradient: Sequence[Sequence[ParamDict]], blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Return a gradient by parameter, in the order of `Parameters.stacks`.

        It is the sum over the blocks for a shared parameter. `blocks` are the places of some blocks, for the parameters
        of these alone.
        """
        return list(self._layout.by_path(gradient, range(len(self)) if blocks is None else blocks).values())

    @property
    def shared_parameters(self) -> frozenset[str]:
        """The names, in the network, of parameters that several blocks or layers have."""
        return self._layout.shared

    def check_parameters(self, name: str, theta: Parameters) -> None:
        """Raise ValueError, which begins with `name`, unless parameters have the names and shapes of this network's."""
        expected, found = self._layout.shapes["parameters"], {path: v.shape[1:] for path, v in theta.stacks.items()}
        for path in [*expected, *found]:
            if found.get(path) != expected.get(path):
                shapes = (list(shape) if (shape := of.get(path)) is not None else "none" for of in (found, expected))
                raise ValueError("{}: of another network: {!r} is {}, expected {}".format(name, path, *shapes))

    def parameter_slices(self) -> dict[str, slice]:
        """Return the columns of [S, P] that each trained parameter has, by its name in the network."""
        return self._layout.columns("parameters")

    def numbers_of_parameters(self) -> dict[str, int]:
        """Return the number, counted from 1, of the first block that each trained parameter is in, by its name."""
        return self._layout.numbers("parameters")

    @property
    def shared_buffers(self) -> frozenset[str]:
        """The names, in the network, of buffers that several blocks have, such as a mask."""
        return self._layout.shared_buffers

    def tensors_of(self, theta: Parameters, numbers: Sequence[int]) -> list[Tensor]:
        """Return the parameters and views of the buffers [S, ...] of some blocks, by number, counted from 1."""
        tensors = {"parameters": theta.stacks, "buffers": self._layout.views("buffers", theta.buffers)}
        of = {kind: self._layout.numbers(kind) for kind in ("parameters", "buffers")}
        return [v for kind, by_path in tensors.items() for path, v in by_path.items() if of[kind][path] in numbers]

    def initial(self, seeds: Sequence[int], initialise: Callable[[nn.Module], None], like: Tensor) -> Parameters:
        """Return the parameters [S, P] of one freshly initialised network per seed.

        Replica s depends on seeds[s] alone. The global random numbers are left as they were. Frozen parameters, and the
        statistics of modules whose parameters are all frozen, stay those of the network.

        Args:
            seeds: S whole numbers.
            initialise: fills a network's parameters in place from the global random numbers of PyTorch, NumPy or
                Python, such as `admm.models.initialiser("pytorch")`.
            like: a tensor whose dtype and device the parameters get.
        """
        replicas = []
        for seed in seeds:
            network = copy.deepcopy(self.given.network)
            with all_seeded(seed):
                initialise(network)
            restore_frozen_statistics(network, self.given.network)
            replicas.append(network)
        flat, buffers = (
            torch.stack([self.flatten(network, kind) for network in replicas]) for kind in ("parameters", "buffers")
        )
        is_own_type = like.dtype == self.dtype
        statistics = buffers.to(like.device, self._layout.statistics_dtype if is_own_type else wide(like.dtype))
        return self.parameters(flat.to(like), statistics)

    def flatten(self, network: nn.Module, kind: Kind = "parameters") -> Tensor:
        """Return the parameters [P] or buffers [B] of a network of this architecture, in the blocks' order."""
        tensors = [self._layout.tensor(network, kind, path).flatten() for path in self._layout.shapes[kind]]
        dtype = common([tensor.dtype for tensor in tensors]) or self.dtype
        dtype = dtype if kind == "parameters" else torch.promote_types(wide(dtype), self._layout.statistics_dtype)
        return torch.cat([torch.empty(0, dtype=dtype), *(tensor.to(dtype) for tensor in tensors)])

    def outputs(self, theta: Parameters, x: Any, visit: Visit) -> Iterator[Tensor]:
        """Yield block 1's output for x [S, n, ...], block 2's for that, and so on."""
        for block, views in zip(self, theta.blocks, strict=True):
            x = block.forward(views, x, visit)
            yield x

    def forward(self, theta: Parameters, x: Any) -> Tensor:
        """Return the network's outputs [S, n, C] for x [S, n, ...], by a forward pass in evaluation mode.

        x may be a tuple or a dictionary of such tensors. Several outputs are joined, see `admm.crossings`; the network
        that `export` returns has them as they are.
        """
        for output in self.outputs(theta, x, evaluation(theta.replicas)):
            x = output
        return x  # type: ignore[no-any-return]

    def export(self, theta: Parameters, replica: int = 0) -> nn.Module:
        """Return a copy of the network with the parameters and buffers of one replica, in evaluation mode.

        Raises ValueError for parameters of another network, and for a replica that there is not.
        """
        has_type("theta", theta, Parameters, "state.theta")
        self.check_parameters("theta", theta)
        if not is_whole(replica) or replica >= theta.replicas:
            raise ValueError(f"replica: {shown(replica)} is not a whole number from 0 to {theta.replicas - 1}")
        network = copy.deepcopy(self.network).eval()
        if theta.dtype != self.dtype:
            converted(network, theta.dtype)
        tensors: dict[Kind, dict[str, Tensor]] = {
            "parameters": theta.stacks,
            "buffers": self._layout.views("buffers", theta.buffers),
        }
        for kind, stacks in tensors.items():
            for path, stack in stacks.items():
                self._layout.tensor(network, kind, path).copy_(stack[replica])
        return network


def _few(names: Sequence[str]) -> str:
    """Return names as text, the first and the last ones of many."""
    return ", ".join(names if len(names) <= 6 else (*names[:3], "…", f"{names[-1]} ({len(names)} modules)"))


def _arrow(module: nn.Module, crossing: Crossing, is_last: bool) -> str:
    """Return what leaves a block as text, as far as it is known: shapes, or the traced values that cross the cut."""
    if crossing.is_known:
        return f" → {crossing}"
    if isinstance(module, fx.GraphModule) and not is_last:
        (output,) = module.graph.find_nodes(op="output")
        return f" → {', '.join(map(str, output.all_input_nodes))}"
    return ""


def split(
    network: nn.Module | Sequence[nn.Module],
    after: str | Sequence[str] | None = None,
    per_layer: bool = False,
    n_blocks: int | None = None,
    activation: Literal["end", "start"] | None = None,
    execution: Execution | None = None,
    inputs: Sequence[str] | None = None,
) -> Blocks:
    """Cut a network into blocks ("an arbitrary number of blocks", paper, §3.1).

    Exactly one of `after`, `per_layer` and `n_blocks` says where; a list of modules is cut between them.

    A copy of the network is cut. Modules of it that are in evaluation mode, while the network is in training mode, stay
    in evaluation mode. A network that is in evaluation mode itself, or a list whose stages all are, is trained like one
    in training mode. Parameters with requires_grad=False stay as they are.

    A tensor without an axis of samples that trained parameters influence, such as a product of weights or the mean of a
    mini-batch, is part of each sample's coupling variable where it crosses a cut, and the next block gets the mean of
    it over the samples that are evaluated together (`admm.crossings`).

    Args:
        network: any module, of which the forwards that contain a cut are traced (torch.fx); or a list of modules, each
            of which gets what the one before returns, a tuple as several arguments.
        after: the name or names of the modules that end a block, the last one excepted; an empty list leaves one block.
            In an `nn.Sequential`, the name of a nested one stands for its last layer.
        per_layer: makes one block of each layer with parameters of an `nn.Sequential`.
        n_blocks: the number of blocks that the layers with parameters of an `nn.Sequential` are shared out to, as
            evenly as possible.
        activation: with `per_layer` or `n_blocks`, whether what is between two layers with parameters comes to the
            "end" of a block (None means this) or to the "start" of the next one.
        execution: how the blocks are evaluated.
        inputs: for a network that is traced, the names of the arguments of its forward that are given; by default all
            that have no default value.

    Raises:
        TypeError: for something else than a module or a list of modules.
        ValueError: unless exactly one way to cut is given; for an unknown, repeated or last module in `after`, a number
            of blocks that is not possible, another `activation`, hooks of all modules; for a forward that cannot be
            traced, a module that cannot be copied, and as `Blocks` does.

    >>> from admm.models import mlp
    >>> network = mlp(input_shape=784, hidden=[128, 128], classes=10)
    >>> [list(names) for names in split(network, after="fc2").names]
    [['flatten', 'fc1.linear', 'fc1.relu', 'fc2.linear', 'fc2.relu'], ['fc3.linear']]
    >>> blocks = split(network, per_layer=True)
    >>> len(blocks), blocks[1].layers
    (3, (LinearLayer(), ReLULayer()))

    Two replicas, from seeds 0 and 1, evaluated at once:

    >>> from admm.models import initialiser
    >>> x = torch.zeros(5, 784)
    >>> theta = blocks.initial([0, 1], initialiser("pytorch"), like=x)
    >>> theta.flat().shape, blocks.forward(theta, x.expand(2, 5, 784)).shape
    (torch.Size([2, 118282]), torch.Size([2, 5, 10]))

    A network that is no chain, with a skip connection over the cut:

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         h = self.first(x)
    ...         return self.last(h + self.second(h).relu())
    >>> split(Residual(), after=["second"])
    2 blocks of Residual:
      1: first, second → first, second
      2: last
    """
    if execution is not None:
        has_type("execution", execution, Execution, "admm.layers.Execution(compile=True)")
    own = _own_copy(network)
    names = [after] if isinstance(after, str) else after
    cut = partial(parts_of, after=names, per_layer=per_layer, n_blocks=n_blocks, activation=activation, inputs=inputs)
    return Blocks(own, cut, execution)


def _own_copy(network: Any) -> nn.Module:
    """Return a copy of a network, or of a list of modules as `Stages`. Raises TypeError, ValueError."""
    if isinstance(network, list | tuple) and network and all(isinstance(stage, nn.Module) for stage in network):
        network, is_trained = Stages(*network), any(stage.training for stage in network)
        network.training = is_trained
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: a {type(network).__name__} is no nn.Module, nor a list of them")
    check_modules(network)
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        raise ValueError(f"network: cannot be copied, as each seed needs it: {error}") from None
