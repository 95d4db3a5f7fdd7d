"""Storage for an optimizer's variables of all samples: on the device, in the host's memory, or in a file."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from admm.files import explain_write_errors

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
_GIB = 2**30


def allocate(place: Place, shapes: Sequence[Sequence[int]], likes: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of zeros.

    Args:
        place: "device", that of `likes`; "host", the host's memory, page-locked for a GPU, where consecutive samples of
            one replica then move while it computes; or "disk", mapped into memory from files in the folder of
            temporary files (the variable TMPDIR; not one that is itself in memory). These take no room there once the
            process has ended, however it ends.
        shapes: one per tensor.
        likes: tensors on one device, whose types these get.

    Raises:
        ValueError: with the bytes needed and free in each place, where they do not fit.
        WriteError: where the files cannot be made.
    """
    types, device = [like.dtype for like in likes], likes[0].device
    is_pinned = place == "host" and device.type == "cuda"
    sizes = [dtype.itemsize * int(np.prod(shape)) for shape, dtype in zip(shapes, types, strict=True)]
    needed = sum(2 ** (size - 1).bit_length() if is_pinned else size for size in sizes)  # PyTorch rounds them up
    room = {name: free_bytes(name, device) for name in PLACES}
    if needed > room[place]:
        free = ", ".join(f"{name} {room[name] / _GIB:.1f} GiB" for name in PLACES)
        raise ValueError(
            f"sample_storage: {place!r} has no room for the variables of all samples, {needed / _GIB:.1f} GiB "
            f"({needed} bytes); free are {free}; take a place with room, fewer seeds, or OnlineBlockADMM, which "
            "has none"
        )
    if place == "disk":
        with explain_write_errors(Path(tempfile.gettempdir()), "the variables of all samples", needed):
            return [_mapped(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
    where = device if place == "device" else "cpu"
    return [
        torch.zeros(tuple(shape), dtype=dtype, device=where, pin_memory=is_pinned)
        for shape, dtype in zip(shapes, types, strict=True)
    ]


def free_bytes(place: Place, device: torch.device) -> float:
    """Return how many bytes are free in a place, for tensors of the device.

    It is infinity where that is not known, for the host's memory without the package psutil.
    """
    if place == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    if place == "device" and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        import psutil
    except ImportError:
        return math.inf
    return int(psutil.virtual_memory().available)


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that are mapped from a file without a name."""
    if not np.prod(shape):
        return torch.zeros(tuple(shape), dtype=dtype)
    with tempfile.TemporaryFile() as file:
        size = dtype.itemsize * int(np.prod(shape))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # now, not when it is written to
        else:
            file.truncate(size)
        array = np.memmap(file, dtype=np.uint8, mode="r+")
    return torch.from_numpy(array).view(dtype).view(tuple(shape))
