"""Random changes of training images, for a whole mini-batch at once on its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from admm.numbers import Options, is_whole


class Augmentation(ABC):
    """Random changes of each training sample, new in every epoch."""

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw the changes [N, k] of all samples in an epoch, in numbers that `apply` understands."""

    @abstractmethod
    def apply(self, x: Tensor, changes: Tensor) -> Tensor:
        """Return samples x [n, ...], changed by `changes` [n, k] on the same device, in a new tensor."""


@dataclass(frozen=True)
class CropAndFlip(Options, Augmentation):
    """Images padded with zeros and cropped to their former size at a random place, half of them mirrored.

    Zero is the mean where the normalisation is `standard`.

    Args:
        padding: pixels on each side.
        flip: whether images are mirrored.

    Raises:
        ValueError: unless the padding is a whole number from 0 up, and `flip` True or False.

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, §4.2, https://arxiv.org/abs/1512.03385
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.padding):
            raise ValueError(f"padding: {self.padding!r} is not a whole number of pixels from 0 up")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip: {self.flip!r} is not True or False")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw the top row, the left column and whether the image is mirrored, [N, 3]."""
        corners = torch.randint(2 * self.padding + 1, (samples, 2), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (samples, 1), generator=generator)
        return torch.cat([corners, mirrored], 1)

    def apply(self, x: Tensor, changes: Tensor) -> Tensor:
        """Return images x [n, C, H, W] or [n, H, W], cropped and mirrored as `changes` [n, 3] says, in a new tensor."""
        images, height, width = x.view(len(x), -1, *x.shape[-2:]), *x.shape[-2:]
        top, left, mirrored = changes.unsqueeze(2).unbind(1)  # [n, 1] each
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        padded = functional.pad(images, [self.padding] * 4)
        first = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        cropped = padded[first, :, (top + rows).unsqueeze(2), columns.unsqueeze(1)]  # [n, H, W, C]
        return cropped.movedim(-1, 1).reshape(x.shape)
