"""Random changes of training images, for a whole mini-batch at once on its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from admm.numbers import Options, is_whole


class Augmentation(Protocol):
    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """What is random about each sample in an epoch, [N, k]."""

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Samples x [n, ...] as `drawn` [n, k] says, on the same device, in a new tensor."""


@dataclass(frozen=True)
class CropAndFlip(Options):
    """Images padded with zeros and cropped to their former size at a random place, half of them mirrored (He et al.
    2016, §4.2). Zero is the mean where the normalisation is `standard`."""

    padding: int = 4  # pixels on each side
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.padding):
            raise ValueError(f"augmentation.padding: {self.padding!r} is not a whole number of pixels from 0 up")
        if not isinstance(self.flip, bool):
            raise ValueError(f"augmentation.flip: {self.flip!r} is not true or false")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Top row, left column and whether mirrored, [N, 3]."""
        corners = torch.randint(2 * self.padding + 1, (samples, 2), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (samples, 1), generator=generator)
        return torch.cat([corners, mirrored], 1)

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        """x: images [n, C, H, W] or [n, H, W]."""
        images, height, width = x.view(len(x), -1, *x.shape[-2:]), *x.shape[-2:]
        top, left, mirrored = drawn.unsqueeze(2).unbind(1)  # [n, 1] each
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        padded = functional.pad(images, [self.padding] * 4)
        first = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        cropped = padded[first, :, (top + rows).unsqueeze(2), columns.unsqueeze(1)]  # [n, H, W, C]
        return cropped.movedim(-1, 1).reshape(x.shape)
