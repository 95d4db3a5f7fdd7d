"""Data sets of a user's own: arrays in an npz file, and folders of images. What is wrong is said with file and key."""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from admm.checks import one_of
from admm.data import KEYS, NORMALISATIONS, TASKS, Dataset, DatasetError, divided, normalise, with_channels
from admm.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from admm.numbers import is_whole
from experiments.faces.data import upright

log = logging.getLogger(__name__)
Array = NDArray[Any]
LOSSES: dict[str, Callable[..., Loss]] = {
    "classification": CrossEntropy,
    "regression": SquaredError,
    "multilabel": BinaryCrossEntropy,
}
PARTS = ("train", "test")
CHANNELS = (1, 3, 4)  # numbers of channels by which images are known
FEWEST = 3  # samples of a class, on average: with fewer, numbers have been taken for classes
GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes


@contextmanager
def key_named() -> Iterator[None]:
    """Let what is wrong with a file begin with the key that names it."""
    try:
        yield
    except DatasetError as error:
        named = str(error) if str(error).startswith("dataset") else f"dataset.path: {error}"
        raise DatasetError(named) from error.__cause__


def here(place: Path) -> str:
    """Return a path in words that say where a relative one was looked for."""
    return f"{place}" if place.is_absolute() else f"{place} in {Path.cwd()}"


@key_named()
def load_npz(
    path: str | None,
    *,
    name: str = "npz",
    task: str = "classification",
    normalisation: str = "standard",
    targets: str = "standard",
    channels: int | None = None,
    first: int | None = None,
    holdout: int = 0,
    holdout_seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load `x_train`, `y_train`, `x_test` and `y_test` of an npz file, arrays of any numeric type.

    Args:
        path: the file. Without a test set in it, the samples of `holdout` are the test set.
        name: what records call the data set.
        task: what `y` are: "classification", classes [N], numbers or texts, which are counted in their order;
            "regression", numbers [N] or [N, k]; "multilabel", zeros and ones [N, k].
        normalisation: of the inputs [N, ...], as `admm.data.normalise` takes it. Images of uint8 have numbers up to
            255; the limits of others are those of the training samples. Images [N, H, W, C] of 1, 3 or 4 channels
            become [N, C, H, W], unless their second axis has such a length, too.
        targets: "standard" scales each of a regression's targets to mean 0 and standard deviation 1 in the training
            set, "none" leaves them.
        channels, first, holdout, holdout_seed, device, dtype: as `admm.data.load` takes them.

    Raises:
        ValueError: for an option that is not possible.
        DatasetError: for a file that is missing, damaged or not of this form.
    """
    file = place_of(path)
    one_of("dataset.task", task, TASKS)
    preparation = Preparation(normalisation, targets, channels, first, holdout, holdout_seed, device, dtype)
    stored, classes = read_npz(file), 0
    arrays = {key: inputs(f"{file}: {key}", array) for key, array in stored.items() if key.startswith("x")}
    y = {key: array for key, array in stored.items() if key.startswith("y")}
    if task == "classification":
        y, classes = class_indices(file, y)
    else:
        y = {key: numbers_of(f"{file}: {key}", array, task) for key, array in y.items()}
    arrays = {key: channels_first(f"{file}: {key}", array) for key, array in arrays.items()} | y
    check_parts(file, arrays, holdout)
    return preparation.dataset(arrays, name=name, classes=classes, sha256=sha256_of(stored), task=task)


@key_named()
def load_image_folder(
    path: str | None,
    *,
    name: str = "image_folder",
    task: str = "classification",
    size: Sequence[int] | None = None,
    channels: int | None = None,
    normalisation: str = "standard",
    holdout: int = 0,
    holdout_seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load images whose folder is their class, through `torchvision.datasets.ImageFolder`, as [N, channels, H, W].

    Args:
        path: the folder, with `train/<class>/<image>` and `test/<class>/<image>`, or with `<class>/<image>` alone, of
            which the samples of `holdout` are the test set.
        name: what records call the data set.
        task: "classification".
        size: height and width in pixels. Images are scaled to cover them (bilinear, antialiased) and their middle is
            kept. None takes images as they are, all of one size.
        channels: 1 makes gray images, 3 colours; None makes gray ones if all are.
        normalisation, holdout, holdout_seed, device, dtype: as `load_npz` takes them.

    Raises:
        ValueError: for an option that is not possible.
        DatasetError: for a folder that is missing or not of this form, a damaged image, images of different sizes.
    """
    folder = place_of(path)
    one_of("dataset.task", task, ("classification",))
    preparation = Preparation(normalisation, "none", channels, None, holdout, holdout_seed, device, dtype)
    if size is not None and not (isinstance(size, Sequence) and len(size) == 2 and all(is_whole(n, 1) for n in size)):
        raise ValueError(f"dataset.size: {size!r} is not [height, width] in pixels, such as [32, 32]")
    if channels not in (None, 1, 3):
        raise ValueError(f"dataset.channels: {channels!r} is not 1, 3 or null")
    files, labels, classes = listed_images(folder)
    decoded = decoded_images(folder, [file for part in files.values() for file in part], size, channels)
    cut = len(files["train"])
    arrays = {"x_train": decoded[:cut], "y_train": labels["train"]}
    if "test" in files:
        arrays |= {"x_test": decoded[cut:], "y_test": labels["test"]}
    check_parts(folder, arrays, holdout)
    return preparation.dataset(arrays, name=name, classes=classes, sha256=sha256_of(arrays), task=task)


def loss_of_task(task: str, scale: float = 1.0) -> Loss:
    """Return the usual loss of a data set's task. Raises ValueError for a scale that is not positive."""
    one_of("dataset.task", task, TASKS)
    return LOSSES[task](scale=scale)


@dataclass(frozen=True)
class Preparation:
    """How arrays become a data set: the options that both kinds have. Raises ValueError for an impossible one."""

    normalisation: str
    targets: str
    channels: int | None
    first: int | None
    holdout: int
    holdout_seed: int
    device: str | torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        one_of("dataset.normalisation", self.normalisation, (*NORMALISATIONS, "none"))
        one_of("dataset.targets", self.targets, ("standard", "none"))

    def dataset(self, arrays: Mapping[str, Array], *, name: str, classes: int, sha256: str, task: str) -> Dataset:
        """Return checked arrays, of `KEYS` or of the first two of these, as a data set."""
        train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) if f"x_{part}" in arrays else None for part in PARTS)
        assert train is not None
        is_classes = task == "classification"
        parts = divided(train, test, self.first, self.holdout, self.holdout_seed, stratify=is_classes)
        maximum = 255 if parts[0].dtype == np.uint8 and parts[0].ndim > 2 else None  # of images
        x_train, x_test = (floats(x, self.dtype) for x in parts[::2])
        normalise(x_train, x_test, self.normalisation, maximum)
        x_train, x_test = (with_channels(x.to(self.device, self.dtype), self.channels) for x in (x_train, x_test))
        y_train, y_test = map(torch.from_numpy, parts[1::2])
        if task == "regression":
            if bool((y_test == y_test[0]).all()):
                raise DatasetError(f"{name}: all {len(y_test)} targets to test on are equal; R² needs some that differ")
            normalise(y_train, y_test, self.targets)
        y_train, y_test = (y.to(self.device, None if is_classes else self.dtype) for y in (y_train, y_test))
        return Dataset(name, x_train, y_train, x_test, y_test, classes, sha256, task)


def place_of(path: str | None) -> Path:
    """Return the path of a file or a folder. Raises ValueError where none is given."""
    if not path:
        raise ValueError(
            "dataset.path: none is given; dataset=npz dataset.path=my.npz takes arrays x_train, y_train, x_test and "
            "y_test, dataset=image_folder dataset.path=my_images a folder of images per class"
        )
    return Path(str(path)).expanduser()


def check_parts(place: Path, arrays: Mapping[str, Array], holdout: int) -> None:
    """Raises DatasetError unless inputs and targets belong together, and there is something to test on."""
    for part in PARTS:
        x, y = arrays.get(f"x_{part}"), arrays.get(f"y_{part}")
        if x is not None and y is not None and len(x) != len(y):
            raise DatasetError(f"{place}: x_{part} has {len(x)} samples, y_{part} {len(y)}; as many are needed")
    if "x_test" in arrays:
        for letter in "xy":
            train, test = arrays[f"{letter}_train"], arrays[f"{letter}_test"]
            if train.shape[1:] != test.shape[1:] or (train.dtype == np.uint8) != (test.dtype == np.uint8):
                described = [
                    f"{letter}_{part} {a.dtype} {list(a.shape)}" for part, a in zip(PARTS, (train, test), strict=True)
                ]
                raise DatasetError(f"{place}: {' and '.join(described)} differ in more than the number of samples")
    elif holdout == 0:
        number = max(1, len(arrays["x_train"]) // 5)
        raise DatasetError(
            f"{place}: has no test set; dataset.holdout={number} takes so many of the {len(arrays['x_train'])} samples "
            "as one"
        )


def floats(x: Array, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy of numbers as floats, in double precision where they may have more than seven digits."""
    if x.dtype in (np.uint8, np.float16, np.float32):
        return torch.tensor(np.ascontiguousarray(x, dtype=np.float32)).to(dtype)
    return torch.tensor(np.ascontiguousarray(x, dtype=np.float64))


def channels_first(what: str, x: Array) -> Array:
    """Return images [N, H, W, C] of 1, 3 or 4 channels as [N, C, H, W], and other inputs as they are: also images whose
    second axis may be that of the channels. Logs, beginning with `what`, where both may be."""
    if x.ndim != 4 or x.shape[-1] not in CHANNELS:
        return x
    if x.shape[1] in CHANNELS:
        log.info("%s %s may be [N, C, H, W] or [N, H, W, C]; it is taken as [N, C, H, W]", what, list(x.shape))
        return x
    return np.moveaxis(x, -1, 1)


def sha256_of(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 of arrays: of their keys, types, shapes and numbers, in the order of `KEYS`."""
    sha = hashlib.sha256()
    for key in (key for key in KEYS if key in arrays):
        array = np.ascontiguousarray(arrays[key])
        sha.update(f"{key} {array.dtype.str} {array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


# --- npz


def read_npz(file: Path) -> dict[str, Array]:
    """Return the arrays of `KEYS` that a file has, those of the training set for certain. Raises DatasetError."""
    try:
        content = np.load(file, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise DatasetError(f"{file}: is a single array, expected an npz file with {', '.join(KEYS)}")
        with content as archive:
            there = [key for key in KEYS if key in archive]
            needed = KEYS if {"x_test", "y_test"} & set(there) else KEYS[:2]
            if missing := [key for key in needed if key not in there]:
                raise DatasetError(
                    f"{file}: has no {' and no '.join(missing)}, only {', '.join(archive) or 'nothing'}; expected "
                    "x_train, y_train, x_test, y_test, or the first two alone with dataset.holdout"
                )
            return {key: read_array(file, key, archive) for key in there}
    except FileNotFoundError:
        raise DatasetError(f"dataset.path: there is no file {here(file)}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        cause = "pickles are not read, as that can run code" if "pickle" in str(error) else str(error)
        raise DatasetError(f"{file}: is no npz file as numpy.savez writes it, or is damaged ({cause})") from error


def read_array(file: Path, key: str, archive: Any) -> Array:
    """Return one array. Raises DatasetError for objects, which NumPy would unpickle, and for no samples."""
    try:
        array: Array = archive[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DatasetError(
            f"{file}: {key} is an array of objects, which is not read, as unpickling can run code; save one of "
            "numbers, such as numpy.asarray(x, dtype=float)"
        ) from None
    if array.ndim == 0 or array.size == 0:
        raise DatasetError(f"{file}: {key} is {list(array.shape)}, expected samples [N, ...]")
    return array


def inputs(what: str, x: Array) -> Array:
    """Return inputs [N, ...], numbers [N] as [N, 1]. Raises DatasetError, which begins with `what`, for others."""
    check_numbers(what, x)
    return x[:, None] if x.ndim == 1 else x


def check_numbers(what: str, array: Array) -> None:
    """Raises DatasetError, which begins with `what`, unless all are finite numbers."""
    if array.dtype.kind not in "biuf":
        raise DatasetError(f"{what} is of type {array.dtype}, expected numbers: integers, floats or booleans")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = np.argwhere(~np.isfinite(array))
        raise DatasetError(
            f"{what} has {len(wrong)} values that are NaN or infinite, the first at {wrong[0].tolist()}; leave these "
            "samples out, or fill the values in"
        )


def numbers_of(what: str, y: Array, task: str) -> Array:
    """Return targets [N, k] of a regression or of several labels per sample, as float64. Raises DatasetError."""
    check_numbers(what, y)
    if y.ndim not in (1, 2):
        raise DatasetError(f"{what} is {list(y.shape)}, expected [N] or [N, k] for dataset.task={task}")
    if task == "multilabel" and not ((y == 0) | (y == 1)).all():
        raise DatasetError(
            f"{what} has numbers from {y.min():g} to {y.max():g}, expected 0 and 1 for dataset.task=multilabel; one "
            "class per sample is dataset.task=classification"
        )
    return y.reshape(len(y), -1).astype(np.float64)


def class_indices(file: Path, arrays: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Return y_train, and y_test if there is one, as int64 indices into the sorted classes of y_train, and how many
    classes there are. Raises DatasetError."""
    y = {key: class_labels(f"{file}: {key}", array) for key, array in arrays.items()}
    if len({array.dtype.kind in "US" for array in y.values()}) > 1:
        raise DatasetError(f"{file}: of y_train and y_test, one has texts and one numbers; both must have the same")
    classes = np.unique(y["y_train"])
    if len(classes) == 1:
        raise DatasetError(f"{file}: y_train has one class alone, {classes[0]}; two or more are needed")
    if len(classes) * FEWEST > len(y["y_train"]) and len(classes) > 2:
        raise DatasetError(
            f"{file}: y_train has {len(classes)} different values in {len(y['y_train'])} samples, too many for "
            "classes; numbers are dataset.task=regression"
        )
    for key, labels in y.items():
        if len(unknown := np.setdiff1d(labels, classes)):
            raise DatasetError(f"{file}: {key} has the class {unknown[0]}, which y_train does not have")
    return {key: np.searchsorted(classes, labels).astype(np.int64) for key, labels in y.items()}, len(classes)


def class_labels(what: str, y: Array) -> Array:
    """Return classes [N] as they are. Raises DatasetError for what is none."""
    if y.dtype.kind not in "US":
        check_numbers(what, y)
        if y.dtype.kind == "f" and (y != np.round(y)).any():
            raise DatasetError(
                f"{what} has numbers such as {y[y != np.round(y)].flat[0]:g}, expected classes, whole numbers or "
                "texts; numbers are dataset.task=regression"
            )
    if y.shape not in ((len(y),), (len(y), 1)):
        raise DatasetError(
            f"{what} is {list(y.shape)}, expected classes [N], of one-hot rows y.argmax(1); several labels per sample "
            "are dataset.task=multilabel, several numbers dataset.task=regression"
        )
    return y.reshape(-1)


# --- Folders of images


def listed_images(folder: Path) -> tuple[dict[str, list[str]], dict[str, Array], int]:
    """Return the files and the class indices of "train" and, if there is such a folder, "test"; and how many classes
    there are. Raises DatasetError."""
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise DatasetError(f"dataset=image_folder needs torchvision ({error}): pip install torchvision") from None
    if not folder.is_dir():
        raise DatasetError(f"dataset.path: there is no folder {here(folder)}")
    is_divided = (folder / "train").is_dir()
    places = {part: folder / part for part in PARTS if (folder / part).is_dir()} if is_divided else {}
    try:
        found = {part: ImageFolder(str(place)) for part, place in (places or {"train": folder}).items()}
    except OSError as error:
        raise DatasetError(
            f"{folder}: {error}; expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
        ) from None
    classes = found["train"].class_to_idx
    if len(classes) == 1:
        raise DatasetError(
            f"{folder}: has one class alone, {next(iter(classes))}; expected a folder for each of two or more"
        )
    for part, images in found.items():
        if unknown := sorted(set(images.classes) - set(classes)):
            raise DatasetError(f"{folder}/{part}: has the class {unknown[0]}, which train does not have")
    files = {part: [file for file, _ in images.samples] for part, images in found.items()}
    labels = {
        part: np.array([classes[images.classes[label]] for _, label in images.samples], dtype=np.int64)
        for part, images in found.items()
    }
    return files, labels, len(classes)


def decoded_images(folder: Path, files: Sequence[str], size: Sequence[int] | None, channels: int | None) -> Array:
    """Return images uint8 [N, 1, H, W], or [N, 3, H, W] if they have colours. Raises DatasetError."""
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda file: decoded_image(file, size), files))
    sizes = {image.shape[:2]: file for (image, _), file in zip(decoded, files, strict=True)}
    if len(sizes) > 1:
        examples = " and ".join(
            f"{width}x{height} pixels ({file})" for (height, width), file in list(sizes.items())[:2]
        )
        raise DatasetError(
            f"{folder}: the images have {len(sizes)} sizes, such as {examples}; dataset.size=[height,width] scales and "
            "crops all to one"
        )
    is_gray = channels == 1 or (channels is None and all(gray for _, gray in decoded))
    return np.stack([gray_of(image)[None] if is_gray else image.transpose(2, 0, 1) for image, _ in decoded])


def decoded_image(file: str, size: Sequence[int] | None) -> tuple[NDArray[np.uint8], bool]:
    """Return an image [H, W, 3], and whether it is stored without colours. Raises DatasetError for a damaged file."""
    try:
        with Image.open(file) as stored:
            is_gray = stored.mode in GRAY
            image = upright(stored)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file}: expected an image, found a damaged or other file ({error})") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image), is_gray


def gray_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the luminance [H, W] of an image [H, W, 3]."""
    return np.asarray(Image.fromarray(image).convert("L"))
