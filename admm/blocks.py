"""Cut a network at named layers into blocks, and evaluate S stacked replicas of each block at once.

Shapes: S replicas, n samples, d features. A block maps `z_Snd` [S, n, d] to [S, n, d']; its parameters are
views into one flat tensor [S, P], so that an optimizer updates a whole network in one call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Of PyTorch's errors without a compiler: for a processor, and for a GPU (no Triton, and no compiler for Triton).
NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing", "Failed to find C compiler")
ParamDict = dict[str, Tensor]  # a layer's parameters and buffers, each [S, *shape]


class Layer(Protocol):
    """A layer of S stacked replicas: its output, and its vector-Jacobian products (VJP)."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> Tensor:
        """Output for x [S, n, ...]; `inplace` says that x may be overwritten. `training` says what it says in
        PyTorch: batch normalisation takes the samples' own statistics, not the running ones."""

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> tuple[Tensor, Any]:
        """As `forward`, together with what `vjp` will need."""

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        """Vector-Jacobian products: the parameters' is written to `grad_params`, the input's is returned. With
        `grad_params`, running statistics that `linearize` has updated in training are written to `theta`."""


@dataclass(frozen=True)
class LinearLayer:
    """`x Wᵀ + b` over the last axis, as one batched product over the replicas."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> Tensor:
        weight, bias, rows = theta["weight"], theta.get("bias"), x.flatten(1, -2)
        output = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        return output.view(*x.shape[:-1], -1)

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> tuple[Tensor, Any]:
        return self.forward(theta, x, inplace, training), x

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        rows = grad_output.flatten(1, -2)
        if grad_params is not None:
            weight, inputs = grad_params["weight"], saved.flatten(1, -2)
            if weight.is_contiguous() or weight.device.type != "cpu":
                torch.bmm(rows.mT, inputs, out=weight)
            else:  # where each replica would be a product of its own, which is slower than this copy
                weight.copy_(torch.bmm(rows.mT, inputs))
            if "bias" in grad_params:
                torch.sum(rows, 1, out=grad_params["bias"])
        return torch.bmm(rows, theta["weight"]).view(saved.shape) if needs_input_grad else None


@dataclass(frozen=True)
class ReLULayer:
    """`max(x, 0)`; the derivative at 0 is 0, as PyTorch's."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> Tensor:
        return x.relu_() if inplace else x.relu()

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> tuple[Tensor, Any]:
        output = self.forward(theta, x, inplace, training)
        return output, output

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        return torch.ops.aten.threshold_backward(grad_output, saved, 0) if needs_input_grad else None


@dataclass(frozen=True)
class FlattenLayer:
    """Joins all axes of a sample into one."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> Tensor:
        return x.flatten(2)

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> tuple[Tensor, Any]:
        return x.flatten(2), x.shape

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        return grad_output.reshape(saved) if needs_input_grad else None


@dataclass(frozen=True)
class Execution:
    """How blocks are evaluated that have other layers than linear, ReLU and flatten; those are a product a layer.

    precision: "bf16" computes in bfloat16 what PyTorch's autocast deems safe; parameters, buffers, coupling variables
    and gradients keep their type. compile: by `torch.compile`. channels_last: images in that memory format, except on
    a processor in blocks with a strided 1×1 convolution. recompute: Block-ADMM, its online form and BlockProp evaluate
    a block once more for its parameters' gradient instead of keeping its activations while the others' are in use.

    Raises ValueError for another precision; `Blocks` does so for bf16 or compile without such a block.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = True
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: {self.precision!r} is not one of fp32, bf16")


class ModuleLayer:
    """Any other modules, one replica after the other, with autograd for their derivatives.

    Their buffers, such as running statistics, change where the parameters' gradient is taken of what was recorded in
    training: once a step of Θ, as in back-propagation, however often the block is evaluated before.
    """

    def __init__(self, module: nn.Module, execution: Execution) -> None:
        self.module, self.execution = module, execution
        # An error instead of what is not compiled.
        self._call = torch.compile(self._evaluate, fullgraph=True) if execution.compile else self._evaluate
        self._settings = _compiler_settings if execution.compile else nullcontext
        self._trained = {name for name, _ in module.named_parameters()}
        self._others: dict[torch.device, ParamDict] = {}
        self._needs_contiguous = any(map(_is_strided_pointwise, module.modules()))

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> Tensor:
        self.module.train(training)
        with torch.no_grad(), self._settings():
            return _stack([self._call(self._replica(theta, s, x.device), v) for s, v in enumerate(x)])

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, training: bool) -> tuple[Tensor, Any]:
        self.module.train(training)
        saved = []
        for s in range(len(x)):
            views, leaf = self._replica(theta, s, x.device), x[s].detach().requires_grad_()
            for name in self._trained:
                views[name].requires_grad_()
            with torch.enable_grad(), self._settings():
                saved.append((views, leaf, self._call(views, leaf)))
        return _stack([output.detach() for _, _, output in saved]), saved

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        to_x = []
        for s, (views, x, output) in enumerate(saved):
            wanted = [views[name] for name in grad_params or ()] + ([x] if needs_input_grad else [])
            gradients: list[Tensor] = []
            if wanted:
                with self._settings():
                    pulled = torch.autograd.grad(
                        output, wanted, grad_output[s], retain_graph=True, materialize_grads=True
                    )
                gradients = list(pulled)
            if needs_input_grad:
                to_x.append(gradients.pop())
            if grad_params is not None:
                for name, gradient in zip(grad_params, gradients, strict=True):
                    grad_params[name][s].copy_(gradient)
                for name in theta.keys() - self._trained:
                    theta[name][s].copy_(views[name])
        return _stack(to_x) if needs_input_grad else None

    def _replica(self, theta: ParamDict, s: int, device: torch.device) -> ParamDict:
        """The parameters of one replica, detached; copies of its buffers, which modules change in place; and the other
        buffers, such as counters, which are no replica's own."""
        views = {name: v[s].detach() if name in self._trained else v[s].clone() for name, v in theta.items()}
        if device not in self._others:
            others = (item for item in self.module.named_buffers() if item[0] not in views)
            self._others[device] = {name: buffer.to(device, copy=True) for name, buffer in others}
        return views | self._others[device]

    def _evaluate(self, views: ParamDict, x: Tensor) -> Tensor:
        """The output of one replica for x [n, ...]; changes its buffers in `views` in training."""
        if x.ndim == 4:
            channels_last = self.execution.channels_last and not (self._needs_contiguous and x.is_cpu)
            x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.execution.precision == "bf16"):
            output: Tensor = functional_call(self.module, views, (x,))
        return output.to(x.dtype)


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """For all calls of what is compiled, forwards and back: blocks count as one function to be recompiled, and a record
    may be pulled back through more than once, whatever number of samples it is compiled for. Raises ValueError where
    PyTorch finds no compiler."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    try:
        with dynamo.patch(recompile_limit=1000), functorch.patch(donated_buffer=False):
            yield
    except Exception as error:
        if not any(sign in str(error) for sign in NO_COMPILER):
            raise
        raise ValueError(
            "compile: torch.compile finds no working compiler; install one, such as g++, or take compile=false"
        ) from None


def _is_strided_pointwise(module: nn.Module) -> bool:
    """Blocks with such a convolution are not evaluated in channels-last on a processor, where oneDNN corrupts memory
    for some of them (PyTorch 2.14.1)."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1


def _stack(replicas: list[Tensor]) -> Tensor:
    """[S, ...], without a copy where S = 1."""
    return replicas[0].unsqueeze(0) if len(replicas) == 1 else torch.stack(replicas)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_{kind}") for kind in kinds)


def _has_global_hooks() -> bool:
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)


def known_layer(module: nn.Module) -> Layer | None:
    """A layer without autograd for a module without hooks that is no subclass, which may have a `forward` or parameters
    of its own; None for any other."""
    if has_hooks(module):
        return None
    if type(module) is nn.Linear:
        return LinearLayer()
    if type(module) is nn.ReLU:
        return ReLULayer()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return FlattenLayer()
    return None


def _grouped(modules: list[nn.Module]) -> list[nn.Module]:
    """A block's modules by layer: each alone where all are linear, ReLU or flatten, else all of them as one, in which
    no ReLU overwrites its input."""
    if all(known_layer(module) for module in modules):
        return modules
    return [nn.Sequential(*(nn.ReLU() if isinstance(known_layer(m), ReLULayer) else m for m in modules))]


def _layer(module: nn.Module, execution: Execution) -> Layer:
    return known_layer(module) or ModuleLayer(module, execution)


def _draws(module: nn.Module) -> bool:
    """Whether a module of PyTorch's draws random numbers in training; `admm.comparison` finds others that do."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    return isinstance(module, nn.RReLU) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0)


def _check_layer(name: str, module: nn.Module) -> None:
    """Raises ValueError for what cannot be trained, copied, or evaluated anew with the same result."""
    layer = f"layer {name!r} ({type(module).__name__})"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        raise ValueError(f"{layer} is lazy; evaluate the network once, on a sample, before it is cut")
    if any("forward" in vars(m) for m in module.modules()):
        raise ValueError(f"{layer} has a `forward` of its own, which its copies would share; make it a subclass")
    if not all(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{layer} has parameters with requires_grad=False, which is not supported; of frozen first layers, take "
            "the outputs as x"
        )
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
        raise ValueError(f"{layer} has parameters with gradient hooks, which would not be called; remove them")
    if known_layer(module) is not None:
        return
    if getattr(module, "inplace", False):
        raise ValueError(f"{layer} overwrites its input; use inplace=False")
    if any(map(_draws, module.modules())):
        raise ValueError(f"{layer} draws anew in each evaluation, which is not supported")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None for m in module.modules()):
        raise ValueError(f"{layer} averages over all steps; give it a momentum")


@dataclass(frozen=True)
class Block:
    """Consecutive layers of a network between two coupling variables (paper, Figure 1)."""

    layers: tuple[Layer, ...]

    def forward(self, theta: Sequence[ParamDict], z: Tensor, training: bool) -> Tensor:
        """block_Θ(z), [S, n, d] -> [S, n, d']; `z` is left as it is. `training` is as in `Layer`."""
        for position, (layer, views) in enumerate(zip(self.layers, theta, strict=True)):
            z = layer.forward(views, z, self._is_temporary(position), training)
        return z

    def linearize(self, theta: Sequence[ParamDict], z: Tensor, training: bool) -> tuple[Tensor, list[Any]]:
        """block_Θ(z) and the record that `vjp` needs."""
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
        """Transposed Jacobian times `grad_output` [S, n, d']: with respect to the parameters, summed over the
        samples and written to `grad_params`, and, where `needs_input_grad`, with respect to the input, returned
        [S, n, d]. With `grad_params`, running statistics move as the record has it."""
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
        """Whether a record holds an autograd graph, and with it all activations."""
        return any(isinstance(layer, ModuleLayer) for layer in self.layers)

    def linear_weight(self, theta: Sequence[ParamDict]) -> Tensor | None:
        """W [S, d', d] where the block is one linear layer, with or without ReLUs around it; else None."""
        linear = [views for layer, views in zip(self.layers, theta, strict=True) if isinstance(layer, LinearLayer)]
        plain = all(isinstance(layer, LinearLayer | ReLULayer | FlattenLayer) for layer in self.layers)
        return linear[0]["weight"] if plain and len(linear) == 1 else None

    def _is_temporary(self, position: int) -> bool:
        # The output of a linear layer inside the block belongs to nobody else.
        return position > 0 and isinstance(self.layers[position - 1], LinearLayer)


@dataclass(frozen=True)
class Parameters:
    """A network's parameters for S replicas: one flat tensor, and views of it by block and layer. Its buffers of
    floating point, the running statistics of batch normalisation, are another one, with views in the same places."""

    flat: Tensor  # [S, P]
    buffers: Tensor  # [S, B]
    blocks: list[list[ParamDict]]


class Blocks(Sequence[Block]):
    """A network cut into T blocks; `T = 1` is the network as a whole."""

    def __init__(self, network: nn.Module, names: Sequence[Sequence[str]], execution: Execution | None = None) -> None:
        """names: of the network's layers, block by block, in the order of evaluation.

        Raises ValueError for a layer of PyTorch's that draws random numbers, for one that overwrites its input,
        averages over all steps, is not to be trained, or has gradient hooks or a `forward` that is not its class's, and
        for an option of `execution` without effect. What a module of one's own does in its `forward` is seen when a
        `Problem` is made (`admm.comparison`).
        """
        self.network, self.names, modules = network, names, modules_by_name(network)
        self.compared: dict[Any, torch.Size] = {}  # see `admm.comparison.outputs_of`
        for name in chain.from_iterable(names):
            _check_layer(name, modules[name])
        self.execution = execution or Execution()
        groups = self._groups(network)
        self._blocks = tuple(Block(tuple(_layer(module, self.execution) for module in group)) for group in groups)
        for option, value in (("precision", "bf16"), ("compile", True)):
            if getattr(self.execution, option) == value and not any(block.is_autograd for block in self._blocks):
                raise ValueError(f"{option}: {value} is for other layers than linear, ReLU and flatten; there are none")

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, t: Any) -> Any:
        return self._blocks[t]

    def parameters(self, flat: Tensor, buffers: Tensor | None = None) -> Parameters:
        """Views, by block and layer, of flat tensors [S, P] and [S, B], or of the former alone."""
        flats = {"parameters": flat} | ({} if buffers is None else {"buffers": buffers})
        offsets = dict.fromkeys(flats, 0)

        def views(module: nn.Module) -> ParamDict:
            found = {}
            for kind, name, tensor in _tensors(module):
                if kind in flats:
                    begin, offsets[kind] = offsets[kind], offsets[kind] + tensor.numel()
                    found[name] = flats[kind][:, begin : offsets[kind]].view(len(flat), *tensor.shape)
            return found

        blocks = [[views(module) for module in group] for group in self._groups(self.network)]
        return Parameters(flat, flat[:, :0] if buffers is None else buffers, blocks)

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
            replicas.append(network)
        flat, buffers = (
            torch.stack([self.flatten(network, kind) for network in replicas]).to(like)
            for kind in ("parameters", "buffers")
        )
        return self.parameters(flat, buffers)

    def flatten(self, network: nn.Module, kind: Literal["parameters", "buffers"] = "parameters") -> Tensor:
        """The parameters [P] or buffers [B] of a network of this architecture, in the blocks' order."""
        tensors = chain.from_iterable(map(_tensors, chain.from_iterable(self._groups(network))))
        return torch.cat([torch.empty(0), *(t.detach().flatten() for found, _, t in tensors if found == kind)])

    def outputs(self, theta: Parameters, x: Tensor, training: bool) -> Iterator[Tensor]:
        """Of block 1 for x [S, n, ...], of block 2 for that, and so on, [S, n, ...]. `training` is as in `Layer`."""
        for block, views in zip(self, theta.blocks, strict=True):
            x = block.forward(views, x, training)
            yield x

    def forward(self, theta: Parameters, x: Tensor) -> Tensor:
        """The plain forward pass of all replicas, for evaluation: x [S, n, ...] to outputs [S, n, C]."""
        for output in self.outputs(theta, x, training=False):
            x = output
        return x

    def export(self, theta: Parameters, replica: int = 0) -> nn.Module:
        """A copy of the network that carries the parameters and buffers of one replica, in evaluation mode."""
        network = copy.deepcopy(self.network).to(theta.flat.dtype).eval()
        for group, layers in zip(self._groups(network), theta.blocks, strict=True):
            for module, views in zip(group, layers, strict=True):
                for _, name, tensor in _tensors(module):
                    tensor.detach().copy_(views[name][replica])
        return network

    def _groups(self, network: nn.Module) -> list[list[nn.Module]]:
        """The modules of a network of this architecture, by block and layer. Raises ValueError where hooks have made
        others of its layers since."""
        modules = modules_by_name(network)
        groups = [_grouped([modules[name] for name in names]) for names in self.names]
        if hasattr(self, "_blocks") and [len(group) for group in groups] != [
            len(block.layers) for block in self._blocks
        ]:
            raise ValueError("network: a hook was registered or removed since it was cut into blocks; cut it again")
        return groups


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """What each replica has its own of: (parameters or buffers, name, tensor)."""
    yield from (("parameters", name, p) for name, p in module.named_parameters())
    yield from (("buffers", name, b) for name, b in module.named_buffers() if b.is_floating_point())


def modules_by_name(network: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; one that occurs twice has two names."""
    return dict(network.named_modules(remove_duplicate=False))


def _is_chain(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other, and does nothing else."""
    is_sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_sequential and not has_hooks(module) and "forward" not in vars(module)


def leaves(network: nn.Module) -> list[str]:
    """Names of the layers in the order of evaluation: what lies inside nested `nn.Sequential`s. One that has hooks, or
    a `forward` of its own, is a layer. Raises TypeError for another network."""
    if not _is_chain(network):
        own = " with hooks or a `forward` of its own" if isinstance(network, nn.Sequential) else ""
        raise TypeError(
            f"only an nn.Sequential of layers can be cut into blocks, got {type(network).__name__}{own}; make one of "
            "its parts, nn.Sequential(first, second, …), modules that map a tensor to a tensor"
        )
    names = []
    for name, child in network._modules.items():  # named_children leaves out a module that occurs again
        assert child is not None
        names += [f"{name}.{leaf}" for leaf in leaves(child)] if _is_chain(child) else [name]
    return names


def split(
    network: nn.Module,
    after: str | Sequence[str] | None = None,
    per_layer: bool = False,
    n_blocks: int | None = None,
    activation: Literal["end", "start"] | None = None,
    execution: Execution | None = None,
) -> Blocks:
    """Cut a network into blocks (paper, §3.1: "an arbitrary number of blocks").

    Give exactly one of `after` (name or names of the layers that end a block, the last one excepted; the name of a
    nested `nn.Sequential` stands for its last layer), `per_layer` (one layer with parameters a block) or
    `n_blocks` (layers with parameters shared out as evenly as possible). For the latter two, `activation`
    puts what stands between two layers with parameters at the `end` of a block (default) or at the `start` of the next.
    `execution` says how the blocks are evaluated.
    """
    names = leaves(network)
    if _has_global_hooks():
        raise ValueError("split: hooks of all modules would be called for the blocks' own, too; remove them")
    modules = modules_by_name(network)
    shared = [tensor for name in names for _, _, tensor in _tensors(modules[name])]
    if len({id(tensor) for tensor in shared}) < len(shared):
        raise ValueError("split: layers that share parameters or running statistics are not supported yet")
    if sum((after is not None, per_layer, n_blocks is not None)) != 1:
        raise ValueError("split: give exactly one of after=[layer names], per_layer=true, n_blocks=T")
    if activation not in (None, "end", "start"):
        raise ValueError(f"split.activation: {activation!r} is not one of 'end', 'start'")
    if after is not None:
        if activation is not None:
            raise ValueError("split.activation: goes with per_layer or n_blocks; split.after says itself where to cut")
        ends = _named_boundaries(names, [after] if isinstance(after, str) else after)
    else:
        ends = _even_boundaries(network, names, n_blocks, activation or "end")
    edges = [0, *ends, len(names)]
    return Blocks(network, tuple(tuple(names[i:j]) for i, j in pairwise(edges)), execution)


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
    modules = modules_by_name(network)
    trainable = [i for i, name in enumerate(names) if next(modules[name].parameters(), None) is not None]
    n_blocks = len(trainable) if n_blocks is None else n_blocks
    if not 1 <= n_blocks <= len(trainable):
        raise ValueError(
            f"split.n_blocks: {n_blocks} is not between 1 and {len(trainable)}, the layers with parameters"
        )
    firsts = [math.ceil(k * len(trainable) / n_blocks) for k in range(1, n_blocks)]
    return [trainable[k] if activation == "end" else trainable[k - 1] + 1 for k in firsts]
