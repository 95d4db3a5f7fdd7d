"""Random changes of training images, for a whole mini-batch at once on its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from admm.checks import at_least_one, check_positive, shown
from admm.losses import one_hot
from admm.numbers import Options, is_whole


class Augmentation(ABC):
    """Random changes of each training sample, new in every epoch.

    One of one's own draws numbers for all samples at once, by which `apply` changes those of a mini-batch:

    >>> class Noise(Augmentation):
    ...     def draw(self, samples, generator):
    ...         return 0.1 * torch.randn(samples, 1, generator=generator)
    ...     def apply(self, x, changes):  # x [n, C, H, W] brighter or darker, each image as a whole
    ...         return x + changes.view(-1, 1, 1, 1)
    >>> changes = Noise().draw(2, torch.Generator().manual_seed(0))
    >>> Noise().apply(torch.zeros(2, 3, 8, 8), changes)[:, 0, 0, 0]
    tensor([ 0.1541, -0.0293])

    One that changes targets, or mixes samples, overrides `change`, as `Mixup` does.
    """

    @property
    def mixes_samples(self) -> bool:
        """Whether a changed sample may depend on others of its mini-batch, as with any `change` of one's own."""
        return type(self).change is not Augmentation.change

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Any:
        """Draw the changes [N, k] of all samples in an epoch, in numbers that `apply` understands; or a tuple of such
        tensors."""

    @abstractmethod
    def apply(self, x: Any, changes: Any) -> Any:
        """Return samples x [n, ...], changed by `changes` [n, k] on the same device, in a new tensor.

        x is as the network takes it: a tensor, or a tuple, list or dictionary of tensors (see `OfInput`).
        """

    def change(self, x: Any, y: Any, changes: Any) -> tuple[Any, Any]:
        """Return changed inputs and targets of mini-batches, one of each seed.

        Args:
            x: inputs [S, B, ...].
            y: targets [S, B, ...], as the loss takes them: class indices or distributions over classes.
            changes: those of these samples, [S, B, k].
        """
        axes = tree_leaves(x)[0].shape[:2]
        flat = tree_map(lambda leaf: leaf.flatten(0, 1), (x, changes))
        return tree_map(lambda leaf: leaf.unflatten(0, axes), self.apply(*flat)), y


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
            raise ValueError(f"padding: {shown(self.padding)} is not a whole number of pixels from 0 up")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip: {shown(self.flip)} is not True or False")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw the top row, the left column and whether the image is mirrored, [N, 3]."""
        corners = torch.randint(2 * self.padding + 1, (samples, 2), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (samples, 1), generator=generator)
        return torch.cat([corners, mirrored], 1)

    def apply(self, x: Tensor, changes: Tensor) -> Tensor:
        """Return images x [n, C, H, W] or [n, H, W], cropped and mirrored as `changes` [n, 3] says, in a new tensor.

        Raises ValueError for other samples.
        """
        if not 3 <= x.ndim <= 4 or self.padding >= min(x.shape[-2:]):
            raise ValueError(
                f"augmentation: CropAndFlip takes images [C, H, W] or [H, W], larger than the padding {self.padding}, "
                f"not samples {list(x.shape[1:])}"
            )
        images, height, width = x.view(len(x), -1, *x.shape[-2:]), *x.shape[-2:]
        top, left, mirrored = changes.unsqueeze(2).unbind(1)  # [n, 1] each
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        padded = functional.pad(images, [self.padding] * 4)
        first = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        cropped = padded[first, :, (top + rows).unsqueeze(2), columns.unsqueeze(1)]  # [n, H, W, C]
        return cropped.movedim(-1, 1).reshape(x.shape)


@dataclass(frozen=True)
class Mixup(Options, Augmentation):
    """Each sample mixed with the one before it in its mini-batch, λ x_i + (1 − λ) x_{i−1}, and so are their targets.

    The first one is mixed with the last one. λ is drawn anew for each sample and epoch from Beta(α, α), as the paper's
    definition has it; its authors' program draws one per mini-batch. Class indices become distributions first, by
    `admm.losses.one_hot`; distributions and numbers are mixed as they are.

    Args:
        alpha: α > 0; the smaller, the less is mixed.
        classes: the number of classes C, for class indices; None refuses these.

    Raises:
        ValueError: unless α is positive and C a whole number from 1 up or None; in a mini-batch, for inputs that are
            not floating point, for class indices without C or beyond, and for other targets.

    References:
        Zhang, Cisse, Dauphin & Lopez-Paz (2018), "mixup: Beyond Empirical Risk Minimization",
        https://arxiv.org/abs/1710.09412
    """

    alpha: float = 0.2
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("alpha", self.alpha)
        if self.classes is not None:
            at_least_one("classes", self.classes)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw λ, [N, 1]."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        drawn = np.random.default_rng(seed).beta(self.alpha, self.alpha, (samples, 1))
        return torch.from_numpy(drawn).to(torch.get_default_dtype())

    def apply(self, x: Any, changes: Any) -> Any:
        """Return x [n, ...] mixed as one mini-batch."""
        return tree_map(lambda leaf: self._mixed(leaf[None], changes[None])[0], x)

    def change(self, x: Any, y: Any, changes: Any) -> tuple[Any, Any]:
        """Return both mixed within each mini-batch; targets become distributions [S, B, C]."""
        if not isinstance(y, Tensor):
            raise ValueError(
                f"augmentation: Mixup takes class indices or numbers as targets, not a {type(y).__name__}, nor samples "
                "with weights"
            )
        if not y.is_floating_point():
            if self.classes is None:
                raise ValueError(
                    "augmentation: Mixup needs the number of classes for class indices, such as classes=10"
                )
            if not 0 <= int(y.min()) <= int(y.max()) < self.classes:
                raise ValueError(
                    f"augmentation: Mixup has classes={self.classes}, and class indices go from {int(y.min())} to "
                    f"{int(y.max())}; labels that are ignored cannot be mixed"
                )
            y = one_hot(y, self.classes, like=tree_leaves(x)[0])
        return tree_map(lambda leaf: self._mixed(leaf, changes), x), self._mixed(y, changes)

    @staticmethod
    def _mixed(values: Tensor, changes: Tensor) -> Tensor:
        """Return values [S, B, ...] mixed by λ [S, B, 1]."""
        if not values.is_floating_point():
            raise ValueError(f"augmentation: Mixup mixes inputs of floating point, not of {values.dtype}")
        weight = changes.to(values.dtype).view(*changes.shape[:2], *[1] * (values.ndim - 2))
        return weight * values + (1.0 - weight) * values.roll(1, 1)


@dataclass(frozen=True)
class OfInput(Augmentation):
    """The changes of another augmentation, of one entry of nested inputs alone.

    Args:
        key: the entry's place in a tuple or list, or its name in a dictionary.
        augmentation: has the changes.

    Raises ValueError, in a mini-batch, for inputs without such an entry.

    >>> image = {"image": torch.ones(1, 2, 2), "mask": torch.ones(1, 2)}
    >>> changed = OfInput("image", CropAndFlip(padding=1)).apply(image, torch.tensor([[0, 1, 0]]))
    >>> changed["image"]
    tensor([[[0., 0.],
             [1., 1.]]])
    """

    key: int | str
    augmentation: Augmentation

    @property
    def mixes_samples(self) -> bool:
        return self.augmentation.mixes_samples

    def draw(self, samples: int, generator: torch.Generator) -> Any:
        return self.augmentation.draw(samples, generator)

    def apply(self, x: Any, changes: Any) -> Any:
        return self._replaced(x, self.augmentation.apply(self._entry(x), changes))

    def change(self, x: Any, y: Any, changes: Any) -> tuple[Any, Any]:
        changed, y = self.augmentation.change(self._entry(x), y, changes)
        return self._replaced(x, changed), y

    def _entry(self, x: Any) -> Any:
        keys = list(x) if isinstance(x, dict) else list(range(len(x))) if isinstance(x, tuple | list) else []
        if self.key not in keys:
            raise ValueError(f"key: {self.key!r} is no entry of the inputs, which are {keys or 'one tensor'}")
        return x[self.key]

    def _replaced(self, x: Any, entry: Any) -> Any:
        if isinstance(x, dict):
            return x | {self.key: entry}
        return type(x)(entry if place == self.key else other for place, other in enumerate(x))


@dataclass(frozen=True)
class Chain(Augmentation):
    """Several augmentations, one after the other, such as `Chain([CropAndFlip(), Mixup(0.2, classes=10)])`.

    Raises ValueError for anything else than a list of augmentations.
    """

    augmentations: Sequence[Augmentation]

    def __post_init__(self) -> None:
        given = self.augmentations
        if not isinstance(given, Sequence) or not all(isinstance(one, Augmentation) for one in given):
            raise ValueError(f"augmentations: {shown(given)} is no list of admm.augmentation.Augmentation")

    @property
    def mixes_samples(self) -> bool:
        return any(augmentation.mixes_samples for augmentation in self.augmentations)

    def draw(self, samples: int, generator: torch.Generator) -> Any:
        return tuple(augmentation.draw(samples, generator) for augmentation in self.augmentations)

    def apply(self, x: Any, changes: Any) -> Any:
        for augmentation, drawn in zip(self.augmentations, changes, strict=True):
            x = augmentation.apply(x, drawn)
        return x

    def change(self, x: Any, y: Any, changes: Any) -> tuple[Any, Any]:
        for augmentation, drawn in zip(self.augmentations, changes, strict=True):
            x, y = augmentation.change(x, y, drawn)
        return x, y
