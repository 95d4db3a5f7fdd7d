"""Data sets as whole tensors on a device, their content checked against a published SHA-256.

A data set is looked for under a folder `root`: first `<root>/<name>.npz`, then torchvision's own files, then
the network. `digits` comes with scikit-learn and needs no folder.
"""

import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from admm.checks import one_of, shown
from admm.files import WriteError, atomic_write
from admm.numbers import is_whole

KEYS = ("x_train", "y_train", "x_test", "y_test")
NORMALISATIONS = ("unit", "standard", "symmetric")
TASKS = ("classification", "regression", "multilabel")

Arrays = dict[str, NDArray[np.uint8]]
Samples = tuple[NDArray[Any], NDArray[Any]]  # inputs and targets


class DatasetError(RuntimeError):
    """A data set is missing, damaged or not the published one; the message says how to provide it."""


@dataclass(frozen=True)
class DatasetSpec:
    """The properties that the stored content of a data set must have."""

    image: tuple[int, ...]  # shape of one stored image, channels last
    sha256: str  # of x_train, y_train, x_test, y_test as contiguous uint8, one after the other
    maximum: int = 255  # the brightest pixel value
    classes: int = 10
    torchvision: str = ""  # torchvision's class for it
    files: str = ""  # where that class keeps its unpacked files, under root


DATASETS = {
    "mnist": DatasetSpec(
        image=(28, 28),
        sha256="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        torchvision="MNIST",
        files="MNIST/raw",
    ),
    "fashion_mnist": DatasetSpec(
        image=(28, 28),
        sha256="ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
        torchvision="FashionMNIST",
        files="FashionMNIST/raw",
    ),
    "cifar10": DatasetSpec(
        image=(32, 32, 3),
        sha256="80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660",
        torchvision="CIFAR10",
        files="cifar-10-batches-py",
    ),
    "digits": DatasetSpec(
        image=(8, 8), sha256="99acfbe547094100091160d63f2209391c42e7c4663c8a783fa596248d5382d6", maximum=16
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, whole, on one device.

    Attributes:
        name: the data set's.
        x_train, x_test: floats [N, ...], such as [N, 28, 28] (MNIST, Fashion-MNIST), [N, 3, 32, 32] (CIFAR-10) and
            [N, 8, 8] (digits).
        y_train, y_test: classes, int64 [N], in 0 … classes − 1; of a regression numbers, and of several labels per
            sample zeros and ones, floats [N, k].
        classes: how many there are, 0 in another task than classification.
        sha256: of the stored content, whatever the normalisation and the hold-out.
        task: "classification", "regression" or "multilabel".
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    sha256: str
    task: str = "classification"

    @property
    def outputs(self) -> int:
        """The number of outputs that a network for it has: one per class, number or label."""
        return self.classes or self.y_train.shape[1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, [H, W] or [C, H, W]."""
        return tuple(self.x_train.shape[1:])


def load(
    name: str,
    root: str | Path,
    *,
    normalisation: str = "unit",
    first: int | None = None,
    holdout: int = 0,
    holdout_seed: int = 0,
    channels: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    download: bool = True,
) -> Dataset:
    """Load a data set as whole tensors and check its content.

    Args:
        name: "mnist" (LeCun et al. 1998), "fashion_mnist" (Xiao et al. 2017), "cifar10" (Krizhevsky 2009) or "digits",
            scikit-learn's 1,797 handwritten digits of 8×8 pixels (Alpaydin & Kaynak 1998), of which a fixed stratified
            360 are the test set and 1,437 the training set.
        root: the folder of the data, unused by "digits", which takes any. The first of these is taken:
            `<root>/<name>.npz` (x_train, y_train, x_test, y_test, uint8, images [N, 28, 28] or [N, 32, 32, 3], as in
            Keras's mnist.npz); torchvision's unpacked files, in `<root>/MNIST/raw`, `<root>/FashionMNIST/raw` or
            `<root>/cifar-10-batches-py`; torchvision's download, if `download`, which is then kept as
            `<root>/<name>.npz`.
        normalisation: "unit", pixels in [0, 1]; "symmetric", in [−1, 1]; "standard", mean 0 and standard deviation 1 in
            each channel of x_train, of vectors in each entry (after the hold-out, so that samples that are held out
            have no influence); constant ones are shifted only.
        first: takes only so many of the first training samples; None takes all.
        holdout: the number of these training samples that are held out, stratified by class. If it is not 0, they are
            x_test and y_test, and the test set is not returned: what is tuned on them never sees it.
        holdout_seed: which samples are held out; the same seed always gives the same ones.
        channels: the channels that images get, see `with_channels`; None leaves gray images without an axis of
            channels.
        device: where the tensors are.
        dtype: of x_train and x_test.
        download: whether missing data may be downloaded.

    Returns:
        The data set: x_train and x_test, floats [N, 28, 28] (MNIST, Fashion-MNIST), [N, 8, 8] (digits) or
        [N, 3, 32, 32] (CIFAR-10) in the range of the normalisation, with `channels` [N, channels, H, W]; y_train and
        y_test, classes, int64 [N]; and `classes`, their number.

    Raises:
        ValueError: for an unknown name or normalisation, or a number of samples or channels that is not possible.
        DatasetError: if the data are absent, damaged or not the published ones, or a package for reading them is
            missing.

    >>> digits = load("digits", root="data", channels=1)
    >>> digits.x_train.shape, digits.x_train.dtype, digits.x_train.min().item(), digits.x_train.max().item()
    (torch.Size([1437, 1, 8, 8]), torch.float32, 0.0, 1.0)
    >>> digits.y_test.shape, digits.y_test.dtype, digits.classes
    (torch.Size([360]), torch.int64, 10)
    """
    one_of("name", name, tuple(DATASETS))
    one_of("normalisation", normalisation, NORMALISATIONS)
    spec = DATASETS[name]
    arrays = _digits() if name == "digits" else _find(name, Path(root).expanduser(), download)
    x_train, y_train, x_test, y_test = (arrays[key] for key in KEYS)
    x_train, y_train, x_test, y_test = divided((x_train, y_train), (x_test, y_test), first, holdout, holdout_seed)
    train, test = (_images(x, device, dtype) for x in (x_train, x_test))
    normalise(train, test, normalisation, spec.maximum)
    return Dataset(
        name=name,
        x_train=with_channels(train, channels),
        y_train=_labels(y_train, device),
        x_test=with_channels(test, channels),
        y_test=_labels(y_test, device),
        classes=spec.classes,
        sha256=spec.sha256,  # other content was refused
    )


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of x_train, y_train, x_test and y_test, each as contiguous uint8, one after the other."""
    sha = hashlib.sha256()
    for key in KEYS:
        sha.update(arrays[key].ravel().data)
    return sha.hexdigest()


def _find(name: str, root: Path, download: bool) -> Arrays:
    """Return the checked content of `name`, from the first of the three places that has it."""
    npz, unpacked = root / f"{name}.npz", root / DATASETS[name].files
    try:
        if npz.exists():
            return _checked(name, _read_npz(npz), npz)
        try:
            arrays = _read_torchvision(name, root, download=False)
        except DatasetError:
            try:
                if download:
                    return _download(name, npz)
                raise
            except DatasetError as error:
                raise DatasetError(f"{_damaged(name, unpacked)}{error}") from None
        return _checked(name, arrays, unpacked)
    except (DatasetError, OSError) as error:  # the latter where a folder cannot be searched
        ways = [f"put {npz} there, with {', '.join(KEYS)} as uint8"]
        if DATASETS[name].torchvision:
            ways.append(f"put torchvision's unpacked files into {unpacked}")
            needs = ["an internet connection"]
            if find_spec("torchvision") is None:
                needs.append("torchvision (pip install torchvision)")
            if not download:
                needs.append("download=True")
            ways.append(f"load with {' and '.join(needs)}")
        listed = ";\n".join(f"  {number}. {way}" for number, way in enumerate(ways, start=1))
        raise DatasetError(
            f"{error}\nWays to provide {name}, once any wrong or damaged file is deleted:\n{listed}."
        ) from None  # the message says it all


def _read_npz(npz: Path) -> Arrays:
    try:
        with np.load(npz) as archive:
            if missing := set(KEYS) - set(archive):
                raise DatasetError(
                    f"{npz}: has no {', '.join(sorted(missing))}, only {', '.join(archive) or 'nothing'}"
                )
            return {key: np.asarray(archive[key]) for key in KEYS}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{npz}: expected an npz file, found a damaged or other file ({error})") from error


def _read_torchvision(name: str, root: Path, *, download: bool) -> Arrays:
    spec = DATASETS[name]
    if not spec.torchvision:
        raise DatasetError(f"no {name}.npz")
    try:
        # imported here, so that npz files need no torchvision
        from torchvision import datasets

        build = getattr(datasets, spec.torchvision)
        train, test = (build(root, train=part, download=download) for part in (True, False))
    except Exception as error:  # damaged files and broken connections raise anything, even AssertionError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetError(f"no {name}.npz, and torchvision's {spec.torchvision} failed: {reason}") from error
    return {
        "x_train": np.asarray(train.data),
        "y_train": np.asarray(train.targets, dtype=np.uint8),
        "x_test": np.asarray(test.data),
        "y_test": np.asarray(test.targets, dtype=np.uint8),
    }


def _damaged(name: str, folder: Path) -> str:
    """Say what is wrong with the first damaged one of torchvision's unpacked files, and with how many."""
    if not DATASETS[name].torchvision or not folder.exists():
        return ""
    if name == "cifar10":
        faults = list(_cifar10_faults(folder))
    else:
        parts = [(part, kind) for part in ("train", "t10k") for kind in (("images", 3), ("labels", 1))]
        messages = (_idx_fault(folder / f"{part}-{kind}-idx{axes}-ubyte", axes) for part, (kind, axes) in parts)
        faults = [message for message in messages if message]
    return f"{faults[0]} (of {len(faults)} such files); " if faults else ""


def _idx_fault(path: Path, axes: int) -> str:
    """Say what is wrong with a file of MNIST's format: 0, 0, 8 for unsigned bytes, the number of axes, the length of
    each in four bytes, and the entries."""
    if not path.is_file():
        return f"{path}: is not there"
    with path.open("rb") as file:
        head = file.read(4 + 4 * axes)
    if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
        return f"{path}: does not begin as an IDX file of unsigned bytes with {axes} axes"
    expected = len(head) + math.prod(struct.unpack(f">{axes}I", head[4:]))
    size = path.stat().st_size
    return f"{path}: has {size} bytes, expected {expected} by its header" if size != expected else ""


def _cifar10_faults(folder: Path) -> Iterator[str]:
    with suppress(ImportError):
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import calculate_md5

        meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
        for file, expected in (*CIFAR10.train_list, *CIFAR10.test_list, meta):
            path = folder / file
            if not path.is_file():
                yield f"{path}: is not there"
            elif expected is not None and (md5 := calculate_md5(path)) != expected:
                yield f"{path}: its MD5 is {md5}, expected {expected}"


def _download(name: str, npz: Path) -> Arrays:
    """Download and check the data set, and keep it as `npz`, whole or not at all."""
    try:
        with atomic_write(npz, f"the data set {name}") as temporary:
            downloaded = _read_torchvision(name, temporary.parent, download=True)  # a folder that is deleted
            arrays = _checked(name, downloaded, "torchvision's download")
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
    except WriteError as error:
        raise DatasetError(str(error)) from error
    return arrays


def cached_npy(
    path: Path, make: Callable[[], NDArray[Any]], failed: Callable[[OSError], None] = lambda error: None
) -> NDArray[Any]:
    """Return an array from its .npy file, or make it and keep it there, whole or not at all.

    Args:
        path: the file, with the array's checksum at its end. It is mapped into memory; writes are private.
        make: makes the array where the file is absent or damaged.
        failed: is called with the error where the file cannot be written; the array is returned all the same.
    """
    with suppress(OSError, EOFError, ValueError):
        array = np.asarray(np.load(path, mmap_mode="c"))
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            if file.read() == _checksum(array):
                return array
    array = make()
    try:
        with atomic_write(path, "an array for the next time", array.nbytes) as temporary, temporary.open("wb") as file:
            np.save(file, array)
            file.write(_checksum(array))
    except WriteError as error:
        failed(error)
    return array


def _checksum(array: NDArray[Any]) -> bytes:
    """Return the CRC-32 of the array's values, four bytes."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data).to_bytes(4, "big")


def _digits() -> Arrays:
    """Return scikit-learn's digits, cut into a training and a test set. Raises DatasetError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(f"digits: {error}; scikit-learn has them: pip install scikit-learn") from None
    x, y = load_digits(return_X_y=True)
    x, y = x.reshape(-1, 8, 8).astype(np.uint8), y.astype(np.uint8)
    test = _stratified(y, 360, seed=0)
    arrays = {"x_train": x[~test], "y_train": y[~test], "x_test": x[test], "y_test": y[test]}
    return _checked("digits", arrays, "scikit-learn's digits")


def _checked(name: str, arrays: Arrays, origin: str | Path) -> Arrays:
    """Return `arrays` with labels [N]. Raises DatasetError unless shapes, types and content are the published ones."""
    spec = DATASETS[name]
    pixels = ", ".join(map(str, spec.image))
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.shape[1:] != spec.image:
            raise DatasetError(f"{origin}: x_{part} is {x.dtype} {list(x.shape)}, expected uint8 [N, {pixels}]")
        if y.dtype != np.uint8 or y.shape not in ((len(x),), (len(x), 1)):
            raise DatasetError(f"{origin}: y_{part} is {y.dtype} {list(y.shape)}, expected uint8 [{len(x)}]")
        if y.size and y.max() >= spec.classes:
            raise DatasetError(f"{origin}: y_{part} has a label {y.max()}, expected 0 to {spec.classes - 1}")
    sha256 = digest(arrays)
    if sha256 != spec.sha256:
        raise DatasetError(f"{origin}: the content's SHA-256 is\n  {sha256}, expected\n  {spec.sha256}.")
    return {key: array.ravel() if key.startswith("y") else array for key, array in arrays.items()}


def divided(
    train: Samples, test: Samples | None, first: int | None, holdout: int, holdout_seed: int, stratify: bool = True
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return x_train, y_train, x_test and y_test after `first` and `holdout`, as `load` describes them.

    Args:
        train, test: inputs [N, ...] and targets. Without a test set, `holdout` makes one.
        first, holdout, holdout_seed: as `load` takes them.
        stratify: whether the targets are classes.

    Raises:
        ValueError: for a number of samples that is not possible.
    """
    x, y = train
    if first is not None:
        if not is_whole(first, 1) or first > len(y):
            raise ValueError(f"first: {shown(first)} is not None or a whole number of samples from 1 to {len(y)}")
        x, y = x[:first], y[:first]
    if test is not None and holdout == 0:
        return x, y, *test
    held = _stratified(y if stratify else np.zeros(len(y)), holdout, holdout_seed)
    return x[~held], y[~held], x[held], y[held]


def _stratified(y: NDArray[Any], count: int, seed: int) -> NDArray[np.bool_]:
    """Return a random mask [N] of `count` samples, each class having its due share to within one sample.

    Samples are shuffled, sorted by class, then taken at even distances. RandomState's stream is frozen by NumPy's
    policy, so that a seed means the same samples in every version.
    """
    if not is_whole(count) or count >= len(y):
        raise ValueError(f"holdout: {shown(count)} is not a whole number of samples from 0 to {len(y) - 1}")
    order = np.random.RandomState(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    mask = np.zeros(len(y), dtype=np.bool_)
    mask[order[np.arange(count) * len(y) // count]] = True
    return mask


def _images(x: NDArray[np.uint8], device: str | torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return pixels as floats, channels first."""
    images = torch.from_numpy(x).to(device)
    if images.ndim == 4:
        images = images.movedim(-1, 1)
    return images.to(dtype, memory_format=torch.contiguous_format)


def _labels(y: NDArray[np.uint8], device: str | torch.device) -> torch.Tensor:
    return torch.from_numpy(y).to(device, torch.int64)


def normalise(train: torch.Tensor, test: torch.Tensor, normalisation: str, maximum: int | None = None) -> None:
    """Shift and scale both [N, ...] in place.

    Args:
        train, test: images [N, C, H, W] or [N, H, W], vectors [N, F], or other arrays [N, C, ...]. Their numbers are
            scaled together in each channel, of vectors in each entry.
        normalisation: "unit", to [0, 1]; "symmetric", to [−1, 1]; "standard", to mean 0 and standard deviation 1 of
            `train`; or "none". Constant numbers are shifted only.
        maximum: for "unit" and "symmetric", the largest number that there may be, 0 being the smallest; None takes the
            smallest and the largest number of `train`.

    >>> train, test = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 6.0]])
    >>> normalise(train, test, "unit")
    >>> train.tolist(), test.tolist()
    ([[0.0, 0.0], [1.0, 0.0]], [[0.5, 1.0]])
    """
    axes = [axis for axis in range(train.ndim) if axis != 1 or train.ndim == 3]
    shift: float | torch.Tensor
    scale: float | torch.Tensor
    if normalisation == "none":
        return
    if normalisation == "standard":
        scale, shift = torch.std_mean(train, dim=axes, correction=0, keepdim=True)
    elif maximum is not None:
        shift, scale = (0.0, maximum) if normalisation == "unit" else (maximum / 2, maximum / 2)
    else:
        low, high = train.amin(axes, keepdim=True), train.amax(axes, keepdim=True)
        shift, scale = (low, high - low) if normalisation == "unit" else ((low + high) / 2, (high - low) / 2)
    if isinstance(scale, torch.Tensor):
        rounding = 4 * torch.finfo(train.dtype).eps * torch.as_tensor(shift).abs()  # of a constant's deviation
        scale = torch.where(scale > rounding, scale, 1.0)
    for x in (train, test):
        x.sub_(shift).div_(scale)


def with_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Return images [N, channels, H, W] of images [N, H, W] or [N, C, H, W]; None returns them as they are.

    Gray images [N, H, W] or [N, 1, H, W] get 1 channel, or are repeated in 3. Raises ValueError for other channels than
    these, or than those that the images have.

    >>> with_channels(torch.zeros(5, 8, 8), channels=3).shape
    torch.Size([5, 3, 8, 8])
    """
    if channels is None:
        return images
    shape = list(images.shape[1:])
    stacked = images.unsqueeze(1) if len(shape) == 2 else images
    there = stacked.shape[1] if stacked.ndim == 4 else None
    if not is_whole(channels) or channels not in ((1, 3) if there == 1 else (there,)):
        raise ValueError(
            f"channels: {channels!r} cannot be made of samples {shape}; gray images [H, W] or [1, H, W] get 1 or 3, "
            "others keep theirs, and what is no image has none"
        )
    return stacked.expand(-1, channels, -1, -1).contiguous()
