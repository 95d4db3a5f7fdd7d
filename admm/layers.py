"""Layers of S stacked replicas: their outputs and vector-Jacobian products.

Shapes: S replicas, n samples, d features. A layer maps x [S, n, d] to [S, n, d']; of a parameter or buffer there is
one per replica, [S, *shape].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from admm.checks import one_of
from admm.visits import Visit

# Parts of PyTorch's error messages without a compiler: for a CPU, and for a GPU (no Triton, no compiler for Triton).
_NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing", "Failed to find C compiler")
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
ParamDict = dict[str, Tensor]  # a layer's parameters and buffers, each [S, *shape]


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
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        """Multiply the transposed Jacobians at an evaluation by `grad_output`, which has the shape of the output.

        Args:
            theta: the parameters and buffers of the evaluation.
            saved: what `linearize` has returned with the output.
            grad_output: [S, n, ...].
            grad_params: where the product with respect to the parameters, summed over the samples, is written to; None
                if it is not needed. If given, running statistics that `linearize` has updated in training are written
                to `theta`.
            needs_input_grad: whether the product with respect to x is needed.

        Returns:
            The product with respect to x, [S, n, ...], or None.
        """


@dataclass(frozen=True)
class LinearLayer(Layer):
    """`x Wᵀ + b` over the last axis of x [S, n, ..., d], as one batched product over the replicas."""

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        weight, bias, rows = theta["weight"], theta.get("bias"), x.flatten(1, -2)
        output = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        return output.view(*x.shape[:-1], -1)

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        return self.forward(theta, x, inplace, visit), x

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        rows = grad_output.flatten(1, -2)
        if grad_params is not None:
            weight, inputs = grad_params["weight"], saved.flatten(1, -2)
            if weight.is_contiguous() or weight.device.type != "cpu":
                torch.bmm(rows.mT, inputs, out=weight)
            else:  # bmm would compute one product per replica, which is slower than this copy
                weight.copy_(torch.bmm(rows.mT, inputs))
            if "bias" in grad_params:
                torch.sum(rows, 1, out=grad_params["bias"])
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
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
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
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        return grad_output.reshape(saved) if needs_input_grad else None


@dataclass(frozen=True)
class Execution:
    """Options for the evaluation of blocks that have other layers than linear, ReLU and flatten.

    Args:
        precision: "bf16" computes in bfloat16 what PyTorch's autocast deems safe; parameters, buffers, coupling
            variables and gradients keep their type.
        compile: whether blocks are evaluated by `torch.compile`.
        channels_last: whether images are in that memory format, except on a CPU in blocks with a strided 1×1
            convolution.
        recompute: whether Block-ADMM, its online form and BlockProp evaluate a block once more for its parameters'
            gradient, instead of storing its activations while those of the other blocks are in use.

    Raises:
        ValueError: for another precision. `Blocks` raises it for bf16 or compile without such a block.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = True
    recompute: bool = True

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("fp32", "bf16"))


class ModuleLayer(Layer):
    """Any other module, one replica after the other, with autograd for its derivatives.

    Its buffers, such as running statistics, change where the gradient with respect to the parameters is taken of an
    evaluation in training: once per step of Θ, as in back-propagation, however often the block is evaluated before.
    """

    def __init__(self, module: nn.Module, execution: Execution) -> None:
        self.module, self.execution = module, execution
        # fullgraph: what cannot be compiled is an error.
        self._call = torch.compile(self._evaluate, fullgraph=True) if execution.compile else self._evaluate
        self._settings = _compiler_settings if execution.compile else nullcontext
        self._parameter_names = {name for name, _ in module.named_parameters()}
        self._shared_buffers: dict[torch.device, ParamDict] = {}
        self._needs_contiguous = any(map(_is_strided_pointwise, module.modules()))

    def forward(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> Tensor:
        self.module.train(visit.training)
        with torch.no_grad(), self._settings():
            return _stack([self._call(self._replica(theta, s, x.device), v) for s, v in enumerate(x)])

    def linearize(self, theta: ParamDict, x: Tensor, inplace: bool, visit: Visit) -> tuple[Tensor, Any]:
        self.module.train(visit.training)
        saved = []
        for s in range(len(x)):
            views, leaf = self._replica(theta, s, x.device), x[s].detach().requires_grad_()
            for name in self._parameter_names:
                views[name].requires_grad_()
            with torch.enable_grad(), self._settings():
                saved.append((views, leaf, self._call(views, leaf)))
        return _stack([output.detach() for _, _, output in saved]), saved

    def vjp(
        self, theta: ParamDict, saved: Any, grad_output: Tensor, grad_params: ParamDict | None, needs_input_grad: bool
    ) -> Tensor | None:
        grad_x = []
        for s, (views, x, output) in enumerate(saved):
            inputs = [views[name] for name in grad_params or ()] + ([x] if needs_input_grad else [])
            gradients: list[Tensor] = []
            if inputs:
                with self._settings():
                    gradients += torch.autograd.grad(
                        output, inputs, grad_output[s], retain_graph=True, materialize_grads=True
                    )
            if needs_input_grad:
                grad_x.append(gradients.pop())
            if grad_params is not None:
                for name, gradient in zip(grad_params, gradients, strict=True):
                    grad_params[name][s].copy_(gradient)
                for name in theta.keys() - self._parameter_names:
                    theta[name][s].copy_(views[name])
        return _stack(grad_x) if needs_input_grad else None

    def _replica(self, theta: ParamDict, s: int, device: torch.device) -> ParamDict:
        """Return the parameters of replica s, detached, copies of its buffers, which modules change in place, and the
        buffers that all replicas share, such as counters."""
        views = {name: v[s].detach() if name in self._parameter_names else v[s].clone() for name, v in theta.items()}
        if device not in self._shared_buffers:
            shared = (item for item in self.module.named_buffers() if item[0] not in views)
            self._shared_buffers[device] = {name: buffer.to(device, copy=True) for name, buffer in shared}
        return views | self._shared_buffers[device]

    def _evaluate(self, views: ParamDict, x: Tensor) -> Tensor:
        """Return the output of one replica for x [n, ...]; in training its buffers in `views` change."""
        if x.ndim == 4:
            channels_last = self.execution.channels_last and not (self._needs_contiguous and x.is_cpu)
            x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.execution.precision == "bf16"):
            output: Tensor = functional_call(self.module, views, (x,))
        return output.to(x.dtype)


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Set what all calls of a compiled function need, forwards and backwards: blocks count as one function to be
    recompiled, and an evaluation may be differentiated more than once, whatever number of samples it is compiled for.

    Raises ValueError where PyTorch finds no compiler.
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    try:
        with dynamo.patch(recompile_limit=1000), functorch.patch(donated_buffer=False):
            yield
    except Exception as error:
        if not any(sign in str(error) for sign in _NO_COMPILER):
            raise
        raise ValueError(
            "compile: torch.compile finds no working compiler; install one, such as g++, or take compile=False"
        ) from None


def _is_strided_pointwise(module: nn.Module) -> bool:
    """Whether a module is a strided 1×1 convolution: blocks with one are not evaluated in channels-last on a CPU, where
    oneDNN corrupts memory for some of them (PyTorch 2.14.1)."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1


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

    A module with hooks is another one, and so is one of a subclass, which may have its own `forward` or parameters.
    """
    if has_hooks(module):
        return None
    if type(module) is nn.Linear:
        return LinearLayer()
    if type(module) is nn.ReLU:
        return ReLULayer()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return FlattenLayer()
    return None


def group(modules: list[nn.Module]) -> list[nn.Module]:
    """Group a block's modules by layer: each alone where all are linear, ReLU or flatten, else all of them as one, in
    which no ReLU overwrites its input."""
    if all(known_layer(module) for module in modules):
        return modules
    return [nn.Sequential(*(nn.ReLU() if isinstance(known_layer(m), ReLULayer) else m for m in modules))]


def layer_of(module: nn.Module, execution: Execution) -> Layer:
    """Return the layer that evaluates a module."""
    return known_layer(module) or ModuleLayer(module, execution)


def _is_random(module: nn.Module) -> bool:
    """Whether a module of PyTorch's draws random numbers in training; `admm.comparison` finds other modules that do."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    return isinstance(module, nn.RReLU) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0)


def check_layer(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module that cannot be trained, copied, or evaluated again with the same result."""
    layer = f"layer {name!r} ({type(module).__name__})"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        raise ValueError(f"{layer} is lazy; evaluate the network once, on a sample, before it is cut")
    if any("forward" in vars(m) for m in module.modules()):
        raise ValueError(f"{layer} has its own `forward`, which its copies would share; make it a subclass")
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
    if any(map(_is_random, module.modules())):
        raise ValueError(f"{layer} draws random numbers in each evaluation, which is not supported")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None for m in module.modules()):
        raise ValueError(f"{layer} averages over all steps; give it a momentum")


def tensors_of(module: nn.Module) -> Iterator[tuple[Literal["parameters", "buffers"], str, Tensor]]:
    """Yield the kind, the name and the value of each tensor that every replica has a copy of."""
    yield from (("parameters", name, p) for name, p in module.named_parameters())
    yield from (("buffers", name, b) for name, b in module.named_buffers() if b.is_floating_point())
