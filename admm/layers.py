"""Layers of S stacked replicas: their outputs and vector-Jacobian products.

Shapes: S replicas, n samples, d features. A layer maps x [S, n, d] to [S, n, d']; of a parameter or buffer there is
one per replica, [S, *shape].
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from admm.checks import is_bool, one_of, shown
from admm.crossings import Crossing, Rest
from admm.user_warnings import warn
from admm.visits import Visit

# Parts of PyTorch's error messages without a compiler: for a CPU, and for a GPU (no Triton, no compiler for Triton).
_NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing", "Failed to find C compiler")
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
ParamDict = dict[str, Tensor]  # a layer's parameters and buffers, each [S, *shape]
ReturnT = TypeVar("ReturnT")


class Layer(ABC):
    """A layer of S stacked replicas: its output, and its vector-Jacobian products (VJP).

    `theta` holds the layer's parameters and buffers, each [S, *shape]. In training mode (`visit.training`)
    batch normalisation takes the statistics of the samples, not the running ones.
    """

    @abstractmethod
    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        """Return the output [S, n, ...] for x [S, n, ...]; `inplace` allows to overwrite x."""

    @abstractmethod
    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        """Return the output as `forward` does, and what `vjp` needs of this evaluation."""

    @abstractmethod
    def vjp(
        self,
        theta: ParamDict,
        saved: Any,
        grad_output: Tensor,
        grad_params: ParamDict | None,
        needs_input_grad: bool,
        retain_graph: bool,
    ) -> Tensor | None:
        """Multiply the transposed Jacobians at an evaluation by `grad_output`, which has the shape of the output.

        Args:
            theta: the parameters and buffers of the evaluation.
            saved: what `linearize` has returned with the output.
            grad_output: [S, n, ...].
            grad_params: where the product with respect to each parameter, summed over the samples, is put by name; None
                if it is not needed. If given, running statistics that `linearize` has updated in training are written
                to `theta`.
            needs_input_grad: whether the product with respect to x is needed.
            retain_graph: whether `saved` is needed again; else its activations are freed on the way.

        Returns:
            The product with respect to x, [S, n, ...], or None.
        """


@dataclass(frozen=True)
class LinearLayer(Layer):
    """`x Wᵀ + b` over the last axis of x [S, n, ..., d], as one batched product over the replicas."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        weight, bias, rows = theta["weight"], theta.get("bias"), x.flatten(1, -2)
        output = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        return output.view(*x.shape[:-1], output.shape[-1])

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        return self.forward(theta, x, inplace, visit), x

    def vjp(
        self,
        theta: ParamDict,
        saved: Any,
        grad_output: Tensor,
        grad_params: ParamDict | None,
        needs_input_grad: bool,
        retain_graph: bool,
    ) -> Tensor | None:
        rows = grad_output.flatten(1, -2)
        if grad_params is not None:
            grad_params["weight"] = torch.bmm(rows.mT, saved.flatten(1, -2))
            if "bias" in theta:
                grad_params["bias"] = rows.sum(1)
        return torch.bmm(rows, theta["weight"]).view(saved.shape) if needs_input_grad else None


@dataclass(frozen=True)
class ReLULayer(Layer):
    """`max(x, 0)`; the derivative at 0 is 0, as PyTorch's."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        return x.relu_() if inplace else x.relu()

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        output = self.forward(theta, x, inplace, visit)
        return output, output

    def vjp(
        self,
        theta: ParamDict,
        saved: Any,
        grad_output: Tensor,
        grad_params: ParamDict | None,
        needs_input_grad: bool,
        retain_graph: bool,
    ) -> Tensor | None:
        return torch.ops.aten.threshold_backward(grad_output, saved, 0) if needs_input_grad else None


@dataclass(frozen=True)
class FlattenLayer(Layer):
    """All axes of a sample joined into one: [S, n, ...] to [S, n, d]."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        return x.flatten(2)

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        return x.flatten(2), x.shape

    def vjp(
        self,
        theta: ParamDict,
        saved: Any,
        grad_output: Tensor,
        grad_params: ParamDict | None,
        needs_input_grad: bool,
        retain_graph: bool,
    ) -> Tensor | None:
        return grad_output.reshape(saved) if needs_input_grad else None


@dataclass(frozen=True)
class Execution:
    """Options for the evaluation of blocks; all but `compile` are for other layers than linear, ReLU and flatten.

    Args:
        precision: "bf16" computes in bfloat16 what PyTorch's autocast deems safe; parameters, buffers, coupling
            variables and gradients keep their type.
        compile: whether PyTorch's compiler is used: for each visit of a mini-batch as a whole where all layers are
            linear, ReLU and flatten, for the evaluations of blocks where others are among them. What cannot be compiled
            is run eagerly, with a warning. "auto" compiles visits, never blocks, in runs of 100,000 mini-batches or
            more in all, however few are still to come. The compiler takes half a minute (docs/performance.md).
        channels_last: whether images are in that memory format, except on a CPU in blocks with a strided 1×1
            convolution.
        recompute: whether Block-ADMM, its online form and BlockProp evaluate a block once more for its parameters'
            gradient, instead of storing its activations while those of the other blocks are in use.

    Raises:
        ValueError: for another value of an option. `Blocks` raises it for bf16 or compile without such a block.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool | Literal["auto"] = False
    channels_last: bool = True
    recompute: bool = True

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("fp32", "bf16"))
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ValueError(f"compile: {shown(self.compile)} is not one of False, True, auto")
        is_bool("channels_last", self.channels_last)
        is_bool("recompute", self.recompute)


@dataclass
class Learned:
    """What a block's module does besides computing its output, when `admm.comparison` has seen it.

    Attributes:
        overwrites_inputs: whether it changes its arguments in place, so that it gets copies.
        is_random: whether it draws random numbers in training.
        rewritten: names of trained parameters that it changes itself in training, as layers do that start from their
            first samples, or bound a norm; these change as buffers do.
        recomputes: whether its backward pass evaluates parts once more, as with torch.utils.checkpoint.
    """

    overwrites_inputs: bool = True
    is_random: bool = True
    rewritten: frozenset[str] = frozenset()
    recomputes: bool = False


class ModuleLayer(Layer):
    """A block as any other module, one replica after the other, with autograd for its derivatives.

    Its buffers, such as running statistics, change where the gradient with respect to the parameters is taken of an
    evaluation in training: once per step of Θ, as in back-propagation, however often the block is evaluated before.

    Args:
        module: the block, of a network in training mode.
        execution: how it is evaluated.
        number: counts the blocks from 1.
        before, after: what crosses the cuts around the block.
        hands_on_arguments: whether a tuple that the module returns is the next module's arguments, not one of them.
        casts: types of parameters and buffers that are stored in another one, by name.

    Attributes:
        pinned: modules that are in evaluation mode while the network is in training mode, perhaps the block itself;
            they stay there.
        learned: what the module does besides computing its output.
        compile_seconds: the time that compiling has taken.
    """

    def __init__(
        self,
        module: nn.Module,
        execution: Execution,
        number: int = 1,
        before: Crossing | None = None,
        after: Crossing | None = None,
        hands_on_arguments: bool = False,
        casts: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.module, self.execution, self.number = module, execution, number
        self.before, self.after = before or Crossing(), after or Crossing()
        self.hands_on_arguments, self.casts = hands_on_arguments, casts or {}
        self.learned, self.compile_seconds = Learned(), 0.0
        self._call: Callable[..., Any] = self._evaluate
        self._settings: Callable[[], AbstractContextManager[None]] = nullcontext
        if execution.compile is True:
            # fullgraph: what cannot be compiled is an error.
            compiled = torch.compile(self._evaluate, fullgraph=True)
            self._call, self._settings = partial(self._compiled, compiled), self._compiler_settings
        self._parameter_names = {name for kind, name, _ in tensors_of(module) if kind == "parameters"}
        self._shared: dict[torch.device, ParamDict] = {}
        self.pinned = [inner for inner in module.modules() if not inner.training]
        self._needs_contiguous = any(map(_is_strided_pointwise, module.modules()))

    def forward(self, theta: ParamDict, x: Any, inplace: bool, visit: Visit) -> Tensor:
        self._set_mode(visit.training)
        with torch.no_grad(), self._settings():
            evaluations = [self._evaluation(theta, x, s, visit)[2:] for s in range(len(visit.seeds))]
        return self._joined(evaluations, visit)

    def linearize(self, theta: ParamDict, x: Any, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        self._set_mode(visit.training)
        with torch.enable_grad(), self._settings():
            evaluations = [self._evaluation(theta, x, s, visit) for s in range(len(visit.seeds))]
        output = self._joined([(z.detach(), rest) for _, _, z, rest in evaluations], visit)
        return output, [evaluation[:3] for evaluation in evaluations]

    def vjp(
        self,
        theta: ParamDict,
        saved: Any,
        grad_output: Tensor,
        grad_params: ParamDict | None,
        needs_input_grad: bool,
        retain_graph: bool,
    ) -> Tensor | None:
        grad_x, replicas = list[Tensor](), list[list[Tensor]]()
        names = [name for name in theta if name in self._parameter_names] if grad_params is not None else []
        for s, (views, x, output) in enumerate(saved):
            inputs = [views[name] for name in names] + ([x] if needs_input_grad else [])
            gradients = self._gradients(views, output, inputs, grad_output[s], retain_graph)
            if needs_input_grad:
                grad_x.append(gradients.pop() if len(output) else output.new_zeros(0, *x.shape[1:]))
            replicas.append([g.to_dense() if g.is_sparse else g for g in gradients])
            if grad_params is not None:
                for name in theta.keys() - self._parameter_names | self.learned.rewritten:
                    theta[name][s].copy_(views[name].detach())
        if grad_params is not None:
            for name, gradients in zip(names, map(list, zip(*replicas, strict=True)), strict=True):
                grad_params[name] = _stack(gradients).to(theta[name].dtype)
        return _stack(grad_x) if needs_input_grad else None

    def _gradients(
        self, views: ParamDict, output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor, retain_graph: bool
    ) -> list[Tensor]:
        if not inputs or not output.requires_grad or not len(output):  # no trained parameter before the output
            return [torch.zeros_like(v) for v in inputs]
        gradient = partial(
            torch.autograd.grad, output, inputs, grad_output, retain_graph=retain_graph, materialize_grads=True
        )
        with self._settings():
            return list(called_with(self.module, views, gradient) if self.learned.recomputes else gradient())

    def _evaluation(self, theta: ParamDict, x: Any, s: int, visit: Visit) -> tuple[ParamDict, Any, Tensor, Rest]:
        """Return the tensors of replica s and its input, both with derivatives where autograd is on, its output
        [n, ...], and the rest that crosses the cut.

        Many a module cannot be evaluated on no samples, which is what a process may hold of a mini-batch. It is given
        zeros in place of one, and its output for them is left out.
        """
        views, z, n = self._replica(theta, s, _device_of(x)), _of_replica(x, s), samples_of(x)
        if not n:
            z = pytree.tree_map_only(Tensor, lambda v: v.new_zeros(1, *v.shape[1:]), z)
        if torch.is_grad_enabled():
            for name in self._parameter_names:
                views[name].requires_grad_()
            if isinstance(z, Tensor) and z.is_floating_point():
                z.requires_grad_()
        arguments = self._arguments(z, s, visit)
        seed = visit.draws(s, self.number) if self.learned.is_random else None
        with nullcontext() if seed is None else seeded(seed, _device_of(x)):
            value = self._call(views, *arguments)
        if not self.hands_on_arguments:
            value = (value,)
        output, rest = self.after.pack(value, max(n, 1))
        return views, z, output if n else output[:0], rest

    def _arguments(self, z: Any, s: int, visit: Visit) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of the module."""
        if self.number > 1:
            no_rest: Rest = ([], [])
            z = self.before.unpack(z, no_rest if self.before.is_plain else visit.carried[self.number - 1][s])
        if self.learned.overwrites_inputs:
            z = pytree.tree_map_only(Tensor, torch.clone, z)
        return as_arguments(z, self.number)

    def _joined(self, evaluations: Sequence[tuple[Tensor, Rest]], visit: Visit) -> Tensor:
        """Return the outputs [S, n, ...] of all replicas, and note the rest for the next block."""
        if not self.after.is_plain:
            visit.carried[self.number] = [rest for _, rest in evaluations]
        return _stack([z for z, _ in evaluations])

    def _replica(self, theta: ParamDict, s: int, device: torch.device) -> ParamDict:
        """Return the parameters of replica s, detached, copies of its buffers, which modules change in place, and the
        tensors that all replicas share."""
        views = dict(self._shared_on(device, theta))
        for name, stack in theta.items():
            is_parameter, dtype = name in self._parameter_names, self.casts.get(name, stack.dtype)
            is_copied = not is_parameter or name in self.learned.rewritten
            # `detach` would share a count of changes with the other replicas, by which autograd finds those in place.
            views[name] = stack[s].data.to(dtype, copy=is_copied)
        return views

    def _set_mode(self, training: bool) -> None:
        set_mode(self.module, training, self.pinned)

    def _evaluate(self, views: ParamDict, positional: tuple[Any, ...], keyword: dict[str, Any]) -> Any:
        """Return what the module returns for one replica; in training its buffers in `views` change."""
        if self.execution.precision == "fp32":
            return functional_call(self.module, views, *self._laid_out(positional, keyword))
        with torch.autocast(_device_of(positional or keyword).type, torch.bfloat16):
            value = functional_call(self.module, views, *self._laid_out(positional, keyword))
        return pytree.tree_map_only(Tensor, lambda v: v.float() if v.dtype == torch.bfloat16 else v, value)

    def _compiled(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a compiled function does; if it cannot be compiled, warn, and evaluate eagerly from now on."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return function(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # while compiling, before any evaluation
            message = f"compile: block {self.number} is evaluated eagerly; {compiler_error(error)}"
        value = self._evaluate(*arguments)  # raises an error of the network's own
        warn(message)
        self._call = self._evaluate
        return value

    @contextmanager
    def _compiler_settings(self) -> Iterator[None]:
        """Set what all calls of a compiled function need, forwards and backwards, and measure the time of compiling.

        Blocks count as one function to be recompiled, an evaluation may be differentiated more than once, whatever
        number of samples it is compiled for, and its derivatives are compiled with it.
        """
        from torch._dynamo import config as dynamo
        from torch._dynamo.callback import callback_handler
        from torch._functorch import config as functorch

        callback_handler.register_start_callback(self._compiling_starts)
        callback_handler.register_end_callback(self._compiling_ends)
        try:
            with (
                cache_of_this_processor(),
                dynamo.patch(recompile_limit=1000),
                functorch.patch(donated_buffer=False, force_non_lazy_backward_lowering=True),
            ):
                yield
        finally:
            callback_handler.remove_start_callback(self._compiling_starts)
            callback_handler.remove_end_callback(self._compiling_ends)

    def _compiling_starts(self, _: Any) -> None:
        self.compile_seconds -= time.perf_counter()

    def _compiling_ends(self, _: Any) -> None:
        self.compile_seconds += time.perf_counter()

    def _laid_out(self, positional: tuple[Any, ...], keyword: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments whose images are in the memory format of `execution`."""
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, self._image_laid_out, (positional, keyword)
        )
        return arguments

    def _image_laid_out(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point():
            return x
        channels_last = self.execution.channels_last and not (self._needs_contiguous and x.is_cpu)
        return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _shared_on(self, device: torch.device, own: ParamDict) -> ParamDict:
        """Return the tensors that all replicas share: frozen parameters, and buffers that are no statistics."""
        if device not in self._shared:
            tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
            self._shared[device] = {name: v.detach().to(device) for name, v in tensors if name not in own}
        return self._shared[device]


@contextmanager
def cache_of_this_processor() -> Iterator[None]:
    """Keep what is compiled apart, on the disk, by the processor's vector instructions.

    PyTorch takes code of another vector width from its cache, and the results are wrong (PyTorch 2.14.1, see
    findings/inductor_cache_of_another_processor.sh).
    """
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"):
        yield


def compiler_error(error: Exception) -> str:
    """Return what an error of `torch.compile` says, in words where PyTorch has found no compiler."""
    if any(sign in str(error) for sign in _NO_COMPILER):
        return "torch.compile finds no working compiler; install one, such as g++, or take compile=False"
    first, *_ = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {first}"


def _is_strided_pointwise(module: nn.Module) -> bool:
    """Whether a module is a strided 1×1 convolution: blocks with one are not evaluated in channels-last on a CPU, where
    oneDNN corrupts memory for some of them (PyTorch 2.14.1)."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1


def set_mode(module: nn.Module, training: bool, pinned: Sequence[nn.Module]) -> None:
    """Set training or evaluation mode; the modules in `pinned` stay in evaluation mode."""
    module.train(training)
    for inner in pinned:
        inner.training = False


def pinned_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are in evaluation mode, if a network is in training mode."""
    return [inner for inner in module.modules() if module.training and not inner.training]


def called_with(module: nn.Module, tensors: ParamDict, function: Callable[[], ReturnT]) -> ReturnT:
    """Return what a function returns that is called while a module has other parameters and buffers."""
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    result: ReturnT = functional_call(_Holder(module), named, (function,))
    return result


class _Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], ReturnT]) -> ReturnT:
        return function()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global random numbers, on the CPU and the device, and put their state back at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def as_arguments(inputs: Any, number: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a tuple, a dictionary or one tensor stands for.

    After the first block, counted by `number`, a tuple alone stands for several.
    """
    if number > 1:
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def samples_of(x: Any) -> int:
    """Return n of inputs [S, n, ...], possibly a structure of tensors."""
    return int(_first_of(x).shape[1])


def _first_of(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else next(v for v in pytree.tree_leaves(x) if isinstance(v, Tensor))


def _device_of(x: Any) -> torch.device:
    return _first_of(x).device


def _of_replica(x: Any, s: int) -> Any:
    """Return the part of replica s of inputs [S, n, ...], detached."""
    return x[s].detach() if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, lambda v: v[s].detach(), x)


def _stack(replicas: list[Tensor]) -> Tensor:
    """Stack S tensors to [S, ...], without a copy where S = 1."""
    return replicas[0].unsqueeze(0) if len(replicas) == 1 else torch.stack(replicas)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return any(getattr(module, f"_{kind}") for kind in _HOOKS)


def has_global_hooks() -> bool:
    """Whether a call of any module does more than its `forward`."""
    return any(getattr(nn.modules.module, f"_global_{kind}") for kind in _HOOKS)


def known_layer(module: nn.Module) -> Layer | None:
    """Return the layer without autograd for a linear, ReLU or flatten module, or None for any other module.

    A module with hooks is another one, and so is one with frozen parameters, or of a subclass, which may have its own
    `forward` or parameters.
    """
    if has_hooks(module) or not all(p.requires_grad for p in module.parameters()):
        return None
    if type(module) is nn.Linear:
        return LinearLayer()
    if type(module) is nn.ReLU:
        return ReLULayer()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return FlattenLayer()
    return None


def check_modules(network: nn.Module) -> None:
    """Raise ValueError for a module that cannot be copied, or trained as PyTorch would train it."""
    if has_global_hooks():
        raise ValueError("network: hooks of all modules would be called for the blocks' own, too; remove them")
    known = {*map(id, network.modules()), *map(id, network.parameters())}
    for name, module in network.named_modules():
        layer = f"layer {name!r} ({type(module).__name__})"
        own = list(module.parameters(recurse=False))
        if any(map(nn.parameter.is_lazy, (*own, *module.buffers(recurse=False)))):
            raise ValueError(f"{layer} is lazy; evaluate the network once, on a sample, before it is cut")
        if "forward" in vars(module):
            raise ValueError(f"{layer} has its own `forward`, which its copies would share; make it a subclass")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in own):
            raise ValueError(f"{layer} has parameters with gradient hooks, which would not be called; remove them")
        for attribute, value in vars(module).items():
            leaves = pytree.tree_leaves(value) if isinstance(value, list | tuple | dict) else []
            if any(_is_left_out(leaf, known) for leaf in leaves):
                raise ValueError(
                    f"{layer} has trained parameters in its {type(value).__name__} {attribute!r}, where PyTorch does "
                    "not find them; take nn.ModuleList or nn.ModuleDict, or nn.ParameterList for parameters"
                )
    _check_memory(network)


def _is_left_out(value: Any, known: set[int]) -> bool:
    """Whether this is a trained module or parameter that is not among a network's, which are given by identity."""
    parameters = value.parameters() if isinstance(value, nn.Module) else [value]
    return id(value) not in known and any(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters)


class _Place(NamedTuple):
    """A tensor of a network, its name, and the addresses at which its memory starts and stops."""

    start: int
    stop: int
    name: str
    tensor: Tensor

    def bytes_in(self, memory: Tensor, start: int) -> Tensor:
        """Return the tensor's bytes as a view of a tensor with one entry per byte from an address on."""
        size, strides = self.tensor.element_size(), self.tensor.stride()
        return memory.as_strided((*self.tensor.shape, size), (*(size * s for s in strides), 1), self.start - start)


def _check_memory(network: nn.Module) -> None:
    """Raise ValueError where a trained parameter shares memory with another parameter, or with a buffer."""
    before = list[_Place]()
    for place in sorted(_places(network), key=lambda place: place.start):
        before = [other for other in before if other.stop > place.start]
        for other in before:
            if (place.tensor.requires_grad or other.tensor.requires_grad) and _overlap(place, other):
                raise ValueError(
                    f"network: {other.name!r} and {place.name!r} share memory, as by `.data`, which their copies for "
                    "the seeds would not; give both modules one parameter, `second.weight = first.weight`, or for its "
                    "transpose call torch.nn.functional.linear(x, first.weight.T)"
                )
        before.append(place)


def _places(network: nn.Module) -> Iterator[_Place]:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.layout == torch.strided and tensor.numel() and (start := tensor.data_ptr()):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield _Place(start, start + (last + 1) * tensor.element_size(), name, tensor)


def _overlap(one: _Place, other: _Place) -> bool:
    """Whether two tensors have a byte in common, which two columns of one matrix, for example, have not."""
    start, stop = min(one.start, other.start), max(one.stop, other.stop)
    memory = torch.zeros(stop - start, dtype=torch.bool)
    one.bytes_in(memory, start).fill_(True)
    return bool(other.bytes_in(memory, start).any())


def tensors_of(module: nn.Module) -> Iterator[tuple[Literal["parameters", "buffers"], str, Tensor]]:
    """Yield the kind, the name and the value of each tensor that every replica has a copy of.

    These are the trained parameters, and the buffers that may be statistics: those of floating point, and counters and
    marks, which are single whole numbers and truth values.
    """
    yield from (("parameters", name, p) for name, p in module.named_parameters() if p.requires_grad)
    yield from (("buffers", name, b) for name, b in module.named_buffers() if _may_be_statistics(b))


def _may_be_statistics(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and (
        buffer.is_floating_point() or (buffer.numel() == 1 and not buffer.is_complex())
    )
