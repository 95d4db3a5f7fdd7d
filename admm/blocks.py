"""Cut a network at named layers into blocks, and evaluate S stacked replicas of each block at once.

Shapes: S replicas, n samples, d features. A block maps `z_Snd` [S, n, d] to [S, n, d']; its parameters are
views into one flat tensor [S, P], so that an optimizer updates a whole network in one call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Views = dict[str, Tensor]  # a layer's parameters, each [S, *shape]


class Layer(Protocol):
    """A layer of S stacked replicas: its output, and the pull-back of a cotangent through it."""

    @property
    def name(self) -> str:
        """The layer's name in the network."""

    def forward(self, theta: Views, x: Tensor, overwrite: bool) -> Tensor:
        """Output for x [S, n, ...]; `overwrite` says that x may be overwritten."""

    def record(self, theta: Views, x: Tensor, overwrite: bool) -> tuple[Tensor, Any]:
        """As `forward`, together with what `pull_back` will need."""

    def pull_back(
        self, theta: Views, saved: Any, cotangent: Tensor, into: Views | None, to_input: bool
    ) -> Tensor | None:
        """Vector-Jacobian products: the parameters' is written to `into`, the input's is returned."""


@dataclass(frozen=True)
class LinearLayer:
    """`x Wᵀ + b` as one batched product over the replicas."""

    name: str

    def forward(self, theta: Views, x: Tensor, overwrite: bool) -> Tensor:
        weight, bias = theta["weight"], theta.get("bias")
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    def record(self, theta: Views, x: Tensor, overwrite: bool) -> tuple[Tensor, Any]:
        return self.forward(theta, x, overwrite), x

    def pull_back(
        self, theta: Views, saved: Any, cotangent: Tensor, into: Views | None, to_input: bool
    ) -> Tensor | None:
        if into is not None:
            torch.bmm(cotangent.mT, saved, out=into["weight"])
            if "bias" in into:
                torch.sum(cotangent, 1, out=into["bias"])
        return torch.bmm(cotangent, theta["weight"]) if to_input else None


@dataclass(frozen=True)
class ReLULayer:
    """`max(x, 0)`; the derivative at 0 is 0, as PyTorch's."""

    name: str

    def forward(self, theta: Views, x: Tensor, overwrite: bool) -> Tensor:
        return x.relu_() if overwrite else x.relu()

    def record(self, theta: Views, x: Tensor, overwrite: bool) -> tuple[Tensor, Any]:
        output = self.forward(theta, x, overwrite)
        return output, output

    def pull_back(
        self, theta: Views, saved: Any, cotangent: Tensor, into: Views | None, to_input: bool
    ) -> Tensor | None:
        return torch.ops.aten.threshold_backward(cotangent, saved, 0) if to_input else None


@dataclass(frozen=True)
class FlattenLayer:
    """Joins all axes of a sample into one."""

    name: str

    def forward(self, theta: Views, x: Tensor, overwrite: bool) -> Tensor:
        return x.flatten(2)

    def record(self, theta: Views, x: Tensor, overwrite: bool) -> tuple[Tensor, Any]:
        return x.flatten(2), x.shape

    def pull_back(
        self, theta: Views, saved: Any, cotangent: Tensor, into: Views | None, to_input: bool
    ) -> Tensor | None:
        return cotangent.reshape(saved) if to_input else None


@dataclass(frozen=True)
class ModuleLayer:
    """Any other `nn.Module` without buffers, through `torch.func` and autograd."""

    name: str
    module: nn.Module

    def forward(self, theta: Views, x: Tensor, overwrite: bool) -> Tensor:
        output: Tensor = vmap(lambda p, v: functional_call(self.module, p, (v,)), randomness="different")(theta, x)
        return output

    def record(self, theta: Views, x: Tensor, overwrite: bool) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
            x = x.detach().requires_grad_()
            output = self.forward(leaves, x, False)
        return output.detach(), (leaves, x, output)

    def pull_back(
        self, theta: Views, saved: Any, cotangent: Tensor, into: Views | None, to_input: bool
    ) -> Tensor | None:
        leaves, x, output = saved
        wanted = (list(leaves.values()) if into is not None else []) + ([x] if to_input else [])
        if not wanted:
            return None
        gradients = list(torch.autograd.grad(output, wanted, cotangent, retain_graph=True, materialize_grads=True))
        to_x = gradients.pop() if to_input else None
        for name, gradient in zip(leaves, gradients, strict=False):
            assert into is not None
            into[name].copy_(gradient)
        return to_x


def _stacked(name: str, module: nn.Module) -> Layer:
    if isinstance(module, nn.Linear):
        return LinearLayer(name)
    if isinstance(module, nn.ReLU):
        return ReLULayer(name)
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return FlattenLayer(name)
    if any(getattr(m, "inplace", False) for m in module.modules()):
        raise ValueError(f"layer {name!r} ({type(module).__name__}) overwrites its input; use inplace=False")
    if next(module.buffers(), None) is not None:
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}) has buffers (running statistics), which are not "
            "stacked yet; use a layer without them, such as GroupNorm"
        )
    return ModuleLayer(name, module)


@dataclass(frozen=True)
class Block:
    """Consecutive layers of a network between two coupling variables (paper, Figure 1)."""

    layers: tuple[Layer, ...]

    def forward(self, theta: Sequence[Views], z: Tensor) -> Tensor:
        """block_Θ(z), [S, n, d] -> [S, n, d']; `z` is left as it is."""
        for position, (layer, views) in enumerate(zip(self.layers, theta, strict=True)):
            z = layer.forward(views, z, self._is_temporary(position))
        return z

    def record(self, theta: Sequence[Views], z: Tensor) -> tuple[Tensor, list[Any]]:
        """block_Θ(z) and the record that `pull_back` needs."""
        record = []
        for position, (layer, views) in enumerate(zip(self.layers, theta, strict=True)):
            z, saved = layer.record(views, z, self._is_temporary(position))
            record.append(saved)
        return z, record

    def pull_back(
        self,
        theta: Sequence[Views],
        record: Sequence[Any],
        cotangent: Tensor,
        into: Sequence[Views] | None = None,
        to_input: bool = True,
    ) -> Tensor | None:
        """Transposed Jacobian times `cotangent` [S, n, d']: with respect to the parameters, summed over the
        samples and written to `into`, and, where `to_input`, with respect to the input, returned [S, n, d]."""
        first = min((i for i, views in enumerate(theta) if views), default=len(self.layers))
        gradient: Tensor | None = cotangent
        for position in reversed(range(len(self.layers))):
            if not to_input and (into is None or position < first):
                return None
            assert gradient is not None
            gradient = self.layers[position].pull_back(
                theta[position],
                record[position],
                gradient,
                None if into is None else into[position],
                to_input or position > first,
            )
        return gradient

    def linear_weight(self, theta: Sequence[Views]) -> Tensor | None:
        """W [S, d', d] where the block is one linear layer, with or without ReLUs around it; else None."""
        linear = [views for layer, views in zip(self.layers, theta, strict=True) if isinstance(layer, LinearLayer)]
        plain = all(isinstance(layer, LinearLayer | ReLULayer | FlattenLayer) for layer in self.layers)
        return linear[0]["weight"] if plain and len(linear) == 1 else None

    def _is_temporary(self, position: int) -> bool:
        # The output of a linear layer inside the block belongs to nobody else.
        return position > 0 and isinstance(self.layers[position - 1], LinearLayer)


@dataclass(frozen=True)
class Parameters:
    """A network's parameters for S replicas: one flat tensor, and views of it by block and layer."""

    flat: Tensor  # [S, P]
    blocks: list[list[Views]]


class Blocks(Sequence[Block]):
    """A network cut into T blocks; `T = 1` is the network as a whole."""

    def __init__(self, network: nn.Module, names: Sequence[Sequence[str]]) -> None:
        """names: of the network's layers, block by block, in the order of evaluation."""
        modules = _modules(network)
        self.network, self.names = network, names
        self._blocks = tuple(Block(tuple(_stacked(n, modules[n]) for n in block)) for block in names)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, t: Any) -> Any:
        return self._blocks[t]

    def parameters(self, flat: Tensor) -> Parameters:
        """Views, by block and layer, of a flat tensor [S, P]."""
        modules, offset, blocks = _modules(self.network), 0, []
        for names in self.names:
            block = []
            for layer in names:
                views = {}
                for name, p in modules[layer].named_parameters():
                    views[name] = flat[:, offset : offset + p.numel()].view(len(flat), *p.shape)
                    offset += p.numel()
                block.append(views)
            blocks.append(block)
        return Parameters(flat, blocks)

    def initial(self, seeds: Sequence[int], initialise: Callable[[nn.Module], None], like: Tensor) -> Parameters:
        """Parameters [S, P] of one freshly initialised network a seed, in the dtype and on the device of `like`.

        Replica s depends on seeds[s] alone. PyTorch's global random state is left as it was.
        """
        replicas = []
        for seed in seeds:
            network = copy.deepcopy(self.network)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                initialise(network)
            replicas.append(self.flatten(network))
        return self.parameters(torch.stack(replicas).to(like))

    def flatten(self, network: nn.Module) -> Tensor:
        """The parameters [P] of a network of this architecture, in the blocks' order."""
        modules = _modules(network)
        tensors = [p for names in self.names for n in names for p in modules[n].parameters()]
        return torch.cat([p.detach().flatten() for p in tensors]) if tensors else torch.empty(0)

    def forward(self, theta: Parameters, x: Tensor) -> Tensor:
        """The plain forward pass of all replicas: x [S, n, ...] to outputs [S, n, C]."""
        for block, views in zip(self, theta.blocks, strict=True):
            x = block.forward(views, x)
        return x

    def export(self, theta: Parameters, replica: int = 0) -> nn.Module:
        """A copy of the network that carries the parameters of one replica."""
        network = copy.deepcopy(self.network).to(theta.flat.dtype)
        modules = _modules(network)
        for names, block in zip(self.names, theta.blocks, strict=True):
            for name, views in zip(names, block, strict=True):
                modules[name].load_state_dict({k: v[replica] for k, v in views.items()})
        return network


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; one that occurs twice has two names."""
    return dict(network.named_modules(remove_duplicate=False))


def leaves(network: nn.Module) -> list[str]:
    """Names of the layers in the order of evaluation: what lies inside nested `nn.Sequential`s."""
    if not isinstance(network, nn.Sequential):
        raise TypeError(f"only an nn.Sequential of layers can be cut into blocks, got {type(network).__name__}")
    names = []
    for name, child in network._modules.items():  # named_children leaves out a module that occurs again
        assert child is not None
        names += [f"{name}.{leaf}" for leaf in leaves(child)] if isinstance(child, nn.Sequential) else [name]
    return names


def split(
    network: nn.Module,
    after: Sequence[str] | None = None,
    per_layer: bool = False,
    n_blocks: int | None = None,
    activation: Literal["end", "start"] | None = None,
) -> Blocks:
    """Cut a network into blocks (paper, §3.1: "an arbitrary number of blocks").

    Give exactly one of `after` (names of the layers that end a block, the last one excepted; the name of a
    nested `nn.Sequential` stands for its last layer), `per_layer` (one layer with parameters a block) or
    `n_blocks` (layers with parameters shared out as evenly as possible). For the latter two, `activation`
    puts what stands between two layers with parameters at the `end` of a block (default) or at the `start` of the next.
    """
    names = leaves(network)
    parameters = [p for name in names for p in _modules(network)[name].parameters()]
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("split: layers that share parameters are not supported yet")
    if sum((after is not None, per_layer, n_blocks is not None)) != 1:
        raise ValueError("split: give exactly one of after=[layer names], per_layer=true, n_blocks=T")
    if activation not in (None, "end", "start"):
        raise ValueError(f"split.activation: {activation!r} is not one of 'end', 'start'")
    if after is not None:
        if activation is not None:
            raise ValueError("split.activation: goes with per_layer or n_blocks; split.after says itself where to cut")
        ends = _named_boundaries(names, after)
    else:
        ends = _even_boundaries(network, names, n_blocks, activation or "end")
    edges = [0, *ends, len(names)]
    return Blocks(network, tuple(tuple(names[i:j]) for i, j in pairwise(edges)))


def _named_boundaries(names: list[str], after: Sequence[str]) -> list[int]:
    ends = []
    for boundary in after:
        inside = [i for i, name in enumerate(names) if name == boundary or name.startswith(f"{boundary}.")]
        if not inside:
            raise ValueError(f"split.after: no layer {boundary!r}; the layers are {', '.join(names)}")
        ends.append(inside[-1] + 1)
    if ends != sorted(set(ends)):
        raise ValueError(f"split.after: {list(after)} must name different layers in the network's order")
    if ends and ends[-1] == len(names):
        raise ValueError(f"split.after: {after[-1]!r} is the last layer, nothing would follow it")
    return ends


def _even_boundaries(network: nn.Module, names: list[str], n_blocks: int | None, activation: str) -> list[int]:
    modules = _modules(network)
    trainable = [i for i, name in enumerate(names) if next(modules[name].parameters(), None) is not None]
    n_blocks = len(trainable) if n_blocks is None else n_blocks
    if not 1 <= n_blocks <= len(trainable):
        raise ValueError(
            f"split.n_blocks: {n_blocks} is not between 1 and {len(trainable)}, the layers with parameters"
        )
    firsts = [math.ceil(k * len(trainable) / n_blocks) for k in range(1, n_blocks)]
    return [trainable[k] if activation == "end" else trainable[k - 1] + 1 for k in firsts]
