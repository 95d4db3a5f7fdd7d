"""A GPU for machines without one: tensors that say they are on it, with values, which are kept on the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, NAME, BYTES = torch.device("cuda", 0), "a simulated GPU", 2**30
MOVES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}  # what may have tensors on both


class OnGPU(Tensor):
    """A tensor on it; `held` has its values. To PyTorch's C++, which would ask a driver, its device is "meta"."""

    held: Tensor
    device = GPU
    is_cuda = True

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnGPU = Tensor._make_wrapper_subclass(cls, held.size(), device="meta", **layout)
        made.held = held
        return made

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        in_c = {device: torch.device("meta") for device in (GPU, torch.device("cuda"))}
        arguments, options = tree_map_only(torch.device, lambda d: in_c.get(d, d), (arguments, options))
        moved: Tensor = super().to(*arguments, **options)
        return moved

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:  # what is saved is loaded on the processor
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return SimulatedGPU().__torch_dispatch__(function, types, arguments, options)


class SimulatedGPU(TorchDispatchMode):
    """Computes on the processor; raises RuntimeError, as a GPU does, for operations with tensors of both."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        own = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim() > 0]
        if own and others and function.overloadpacket not in MOVES:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {GPU} and cpu")
        device = options.get("device")
        to_gpu = bool(own) if device is None else torch.device(device).type in ("cuda", "meta")
        if device is not None:
            options["device"] = torch.device("cpu")
        if function.overloadpacket is torch.ops.aten.copy_:
            to_gpu = isinstance(arguments[0], OnGPU)
        if options.get("pin_memory"):
            options["pin_memory"] = False
        arguments, options = tree_map_only(OnGPU, lambda tensor: tensor.held, (arguments, options))
        result = function(*arguments, **options)
        if not to_gpu:
            return result
        return tree_map_only(Tensor, lambda tensor: own[id(tensor)] if id(tensor) in own else OnGPU(tensor), result)


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `make`, which fills a tensor on the device past all modes."""
    return lambda data, device="cpu", **options: make(data, **options).to(device)


@contextmanager
def simulated_gpu() -> Iterator[torch.device]:
    """The GPU's device, `cuda:0`, while it is there; its memory is always empty."""
    if torch.cuda.is_available():
        torch.cuda.init()
    of_device = {
        "_lazy_init": lambda: None,
        "synchronize": lambda device: None,
        "get_device_name": lambda device: NAME,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: None,
        "mem_get_info": lambda device: (BYTES, BYTES),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
    }
    makers = {"tensor": _made(torch.tensor), "as_tensor": _made(torch.as_tensor)}
    with mock.patch.multiple("torch.cuda", **of_device), mock.patch.multiple("torch", **makers), SimulatedGPU():
        yield GPU
