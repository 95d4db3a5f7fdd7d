"""A network cut into blocks, and S stacked replicas of each block evaluated at once.

Shapes: S replicas, n samples, d features. A block maps `z_Snd` [S, n, d] to [S, n, d']; its parameters are
views into one flat tensor [S, P], so that an optimizer updates a whole network in one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from admm.layers import (
    Execution,
    FlattenLayer,
    Layer,
    LinearLayer,
    ModuleLayer,
    ParamDict,
    ReLULayer,
    check_layer,
    group,
    layer_of,
    tensors_of,
)
from admm.splitting import modules_by_name, names_by_block


@dataclass(frozen=True)
class Block:
    """Consecutive layers of a network between two coupling variables (paper, Figure 1)."""

    layers: tuple[Layer, ...]

    def forward(self, theta: Sequence[ParamDict], z: Tensor, training: bool) -> Tensor:
        """Return block_Θ(z) [S, n, d'] for z [S, n, d], which is left as it is; `training` is as in `Layer`."""
        for position, (layer, views) in enumerate(zip(self.layers, theta, strict=True)):
            z = layer.forward(views, z, self._is_temporary(position), training)
        return z

    def linearize(self, theta: Sequence[ParamDict], z: Tensor, training: bool) -> tuple[Tensor, list[Any]]:
        """Return block_Θ(z), as `forward` does, and the record of this evaluation that `vjp` needs."""
        record = []
        for position, (layer, views) in enumerate(zip(self.layers, theta, strict=True)):
            z, saved = layer.linearize(views, z, self._is_temporary(position), training)
            record.append(saved)
        return z, record

    def vjp(
        self,
        theta: Sequence[ParamDict],
        record: Sequence[Any],
        grad_output: Tensor,
        grad_params: Sequence[ParamDict] | None = None,
        needs_input_grad: bool = True,
    ) -> Tensor | None:
        """Multiply the transposed Jacobians of an evaluation by `grad_output` [S, n, d'].

        Args:
            theta: the block's parameters by layer, those of the evaluation.
            record: what `linearize` has returned with the output.
            grad_output: the vector, often the derivative of a loss with respect to the output.
            grad_params: where the product with respect to the parameters, summed over the samples, is written to. If
                given, running statistics in `theta` take the values that the evaluation in training gave them.
            needs_input_grad: whether the product with respect to the input is needed.

        Returns:
            The product with respect to the input, [S, n, d], or None.
        """
        first = min((i for i, views in enumerate(theta) if views), default=len(self.layers))
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
            )
        return gradient

    @property
    def is_autograd(self) -> bool:
        """Whether the record of an evaluation holds an autograd graph, and with it all activations."""
        return any(isinstance(layer, ModuleLayer) for layer in self.layers)

    def linear_weight(self, theta: Sequence[ParamDict]) -> Tensor | None:
        """Return W [S, d', d] of a block of one linear layer, with or without ReLUs around it, or None."""
        linear = [views for layer, views in zip(self.layers, theta, strict=True) if isinstance(layer, LinearLayer)]
        plain = all(isinstance(layer, LinearLayer | ReLULayer | FlattenLayer) for layer in self.layers)
        return linear[0]["weight"] if plain and len(linear) == 1 else None

    def _is_temporary(self, position: int) -> bool:
        # Nothing else reads the output of a linear layer inside the block, so that the next layer may overwrite it.
        return position > 0 and isinstance(self.layers[position - 1], LinearLayer)


@dataclass(frozen=True)
class Parameters:
    """A network's parameters for S replicas, by block and layer, as views of one flat tensor.

    Args:
        flat: all parameters [S, P].
        buffers: all buffers of floating point, such as the running statistics of batch normalisation, [S, B].
        blocks: views of both, by block, layer and name.
    """

    flat: Tensor
    buffers: Tensor
    blocks: list[list[ParamDict]]


class Blocks(Sequence[Block]):
    """A network cut into T blocks, which `split` makes; for T = 1, the block is the network."""

    def __init__(self, network: nn.Module, names: Sequence[Sequence[str]], execution: Execution | None = None) -> None:
        """Cut a network at the layers that are named.

        What the `forward` of a caller's module does is checked when a `Problem` is made (`admm.comparison`).

        Args:
            network: an `nn.Sequential`, which is stored, and neither evaluated nor changed.
            names: names of the network's layers, block by block, in the order of evaluation.
            execution: how blocks are evaluated.

        Raises:
            ValueError: for a layer of PyTorch's that draws random numbers, overwrites its input, averages over all
                steps, is not to be trained, or has gradient hooks or a `forward` that is not its class's; and for an
                option of `execution` without effect.
        """
        self.network, self.names, modules = network, names, modules_by_name(network)
        self.compared: dict[Any, torch.Size] = {}  # see `admm.comparison.outputs_of`
        for name in chain.from_iterable(names):
            check_layer(name, modules[name])
        self.execution = execution or Execution()
        groups = self._groups(network)
        self._blocks = tuple(Block(tuple(layer_of(module, self.execution) for module in modules)) for modules in groups)
        for option, value in (("precision", "bf16"), ("compile", True)):
            if getattr(self.execution, option) == value and not any(block.is_autograd for block in self._blocks):
                raise ValueError(f"{option}: {value} is for other layers than linear, ReLU and flatten; there are none")

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, t: int) -> Block: ...

    @overload
    def __getitem__(self, t: slice) -> tuple[Block, ...]: ...

    def __getitem__(self, t: int | slice) -> Block | tuple[Block, ...]:
        return self._blocks[t]

    def parameters(self, flat: Tensor, buffers: Tensor | None = None) -> Parameters:
        """Return views, by block and layer, of flat tensors [S, P] and [S, B], or of the parameters alone.

        Raises RuntimeError where P or B is less than the network has, and ValueError as `export` does.
        """
        flats = {"parameters": flat} | ({} if buffers is None else {"buffers": buffers})
        offsets = dict.fromkeys(flats, 0)

        def views(module: nn.Module) -> ParamDict:
            params = {}
            for kind, name, tensor in tensors_of(module):
                if kind in flats:
                    begin, offsets[kind] = offsets[kind], offsets[kind] + tensor.numel()
                    params[name] = flats[kind][:, begin : offsets[kind]].view(len(flat), *tensor.shape)
            return params

        blocks = [[views(module) for module in modules] for modules in self._groups(self.network)]
        return Parameters(flat, flat[:, :0] if buffers is None else buffers, blocks)

    def initial(self, seeds: Sequence[int], initialise: Callable[[nn.Module], None], like: Tensor) -> Parameters:
        """Return the parameters [S, P] of one freshly initialised network per seed.

        Replica s depends on seeds[s] alone. PyTorch's global random state is left as it was.

        Args:
            seeds: S whole numbers.
            initialise: fills a network's parameters in place from PyTorch's global random state, such as
                `admm.models.initialiser("pytorch")`.
            like: a tensor whose dtype and device the parameters get.
        """
        replicas = []
        for seed in seeds:
            network = copy.deepcopy(self.network)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                initialise(network)
            replicas.append(network)
        flat, buffers = (
            torch.stack([self.flatten(network, kind) for network in replicas]).to(like)
            for kind in ("parameters", "buffers")
        )
        return self.parameters(flat, buffers)

    def flatten(self, network: nn.Module, kind: Literal["parameters", "buffers"] = "parameters") -> Tensor:
        """Return the parameters [P] or buffers [B] of a network of this architecture, in the blocks' order."""
        tensors = chain.from_iterable(map(tensors_of, chain.from_iterable(self._groups(network))))
        return torch.cat([torch.empty(0), *(t.detach().flatten() for k, _, t in tensors if k == kind)])

    def parameter_slices(self) -> dict[str, slice]:
        """Return the columns of flat parameters [S, P] that hold each parameter, by its name in the network."""
        modules, slices, end = modules_by_name(self.network), dict[str, slice](), 0
        for layer in chain.from_iterable(self.names):
            for name, parameter in modules[layer].named_parameters(prefix=layer):
                slices[name] = slice(end, end := end + parameter.numel())
        return slices

    def outputs(self, theta: Parameters, x: Tensor, training: bool) -> Iterator[Tensor]:
        """Yield block 1's output for x [S, n, ...], block 2's for that, and so on; `training` is as in `Layer`."""
        for block, views in zip(self, theta.blocks, strict=True):
            x = block.forward(views, x, training)
            yield x

    def forward(self, theta: Parameters, x: Tensor) -> Tensor:
        """Return the network's outputs [S, n, C] for x [S, n, ...], by a forward pass in evaluation mode."""
        for output in self.outputs(theta, x, training=False):
            x = output
        return x

    def export(self, theta: Parameters, replica: int = 0) -> nn.Module:
        """Return a copy of the network with the parameters and buffers of one replica, in evaluation mode.

        Raises ValueError where a hook was registered or removed since the network was cut.
        """
        network = copy.deepcopy(self.network).to(theta.flat.dtype).eval()
        for modules, layers in zip(self._groups(network), theta.blocks, strict=True):
            for module, views in zip(modules, layers, strict=True):
                for _, name, tensor in tensors_of(module):
                    tensor.detach().copy_(views[name][replica])
        return network

    def _groups(self, network: nn.Module) -> list[list[nn.Module]]:
        """Return the modules of a network of this architecture, by block and layer. Raises ValueError where the layers
        are others than those that were cut, by a hook."""
        modules = modules_by_name(network)
        groups = [group([modules[name] for name in names]) for names in self.names]
        if hasattr(self, "_blocks") and list(map(len, groups)) != [len(block.layers) for block in self._blocks]:
            raise ValueError("network: a hook was registered or removed since it was cut into blocks; cut it again")
        return groups


def split(
    network: nn.Module,
    after: str | Sequence[str] | None = None,
    per_layer: bool = False,
    n_blocks: int | None = None,
    activation: Literal["end", "start"] | None = None,
    execution: Execution | None = None,
) -> Blocks:
    """Cut a network into blocks ("an arbitrary number of blocks", paper, §3.1).

    Exactly one of `after`, `per_layer` and `n_blocks` says where.

    Args:
        network: an `nn.Sequential`, possibly nested, of modules that map a tensor to a tensor.
        after: the name or names of the layers that end a block, the last layer excepted. The name of a nested
            `nn.Sequential` stands for its last layer; an empty list leaves one block.
        per_layer: makes one block of each layer with parameters.
        n_blocks: the number of blocks that the layers with parameters are shared out to, as evenly as possible.
        activation: with `per_layer` or `n_blocks`, whether what is between two layers with parameters comes to the
            "end" of a block (None means this) or to the "start" of the next one.
        execution: how the blocks are evaluated.

    Raises:
        TypeError: for a network that is no `nn.Sequential`.
        ValueError: unless exactly one way to cut is given; for an unknown, repeated or last layer in `after`, a number
            of blocks that is not possible, another `activation`, layers that share parameters, hooks of all modules;
            and as `Blocks` does.

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
    >>> theta.flat.shape, blocks.forward(theta, x.expand(2, 5, 784)).shape
    (torch.Size([2, 118282]), torch.Size([2, 5, 10]))
    """
    return Blocks(network, names_by_block(network, after, per_layer, n_blocks, activation), execution)
