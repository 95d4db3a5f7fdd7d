"""Where an optimizer keeps the variables of all samples: on the device, in the host's memory, or in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from admm.files import writing

Place = Literal["device", "host", "disk"]
PLACES = ("device", "host", "disk")
GIB = 2**30


def allocate(place: Place, shapes: Sequence[Sequence[int]], like: Tensor) -> list[Tensor]:
    """Zeros of these shapes in the dtype of `like`: on its device, in the host's memory (page-locked for a GPU, where
    consecutive samples of one replica then move while it computes), or mapped into memory from files in the folder of
    temporary files (the variable TMPDIR; not one that is itself in memory), which take no room there once the process
    has ended, however it ends.

    Raises ValueError, with the bytes needed and what is free in each place, where they do not fit, and WriteError where
    the files cannot be made.
    """
    pinned = place == "host" and like.is_cuda
    sizes = [like.element_size() * int(np.prod(shape)) for shape in shapes]
    needed = sum(2 ** (size - 1).bit_length() if pinned else size for size in sizes)  # PyTorch rounds pinned memory up
    room = {name: free(name, like.device) for name in PLACES}  # type: ignore[arg-type]
    if needed > room[place]:
        others = ", ".join(f"{name} {room[name] / GIB:.1f} GiB" for name in PLACES)
        raise ValueError(
            f"optimizer.variables={place}: the variables of all samples take {needed / GIB:.1f} GiB ({needed} bytes), "
            f"more than there is room for (free: {others}); take a place with room, fewer seeds, or online_block_admm, "
            "which has none"
        )
    if place == "disk":
        with writing(Path(tempfile.gettempdir()), "the variables of all samples", needed):
            return [_mapped(shape, like.dtype) for shape in shapes]
    device = like.device if place == "device" else "cpu"
    return [torch.zeros(tuple(shape), dtype=like.dtype, device=device, pin_memory=pinned) for shape in shapes]


def free(place: Place, device: torch.device) -> int:
    """Bytes."""
    if place == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    if place == "device" and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file that has no name any more."""
    with tempfile.TemporaryFile() as file:
        size = dtype.itemsize * int(np.prod(shape))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # now, not when it is written to
        else:
            file.truncate(size)
        array = np.memmap(file, dtype=np.uint8, mode="r+")
    return torch.from_numpy(array).view(dtype).view(tuple(shape))
