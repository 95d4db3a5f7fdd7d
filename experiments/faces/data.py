"""Faces with identities and CelebA's 40 binary attributes: LFWA, or any folder of faces with a table of attributes.

LFW: Huang, Ramesh, Berg & Learned-Miller, "Labeled Faces in the Wild", 2007. LFWA, its 40 attributes and their
split: Liu, Luo, Wang & Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015; it is given out by its authors.
Scores of 73 attributes of LFW's faces, which anybody can download: Kumar, Berg, Belhumeur & Nayar, "Attribute and
Simile Classifiers for Face Verification", ICCV 2009.
"""

import csv
import hashlib
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from admm.data import DatasetError, cached_npy
from admm.numbers import is_whole

ATTRIBUTES = tuple(  # in CelebA's order
    """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
    Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
    Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young""".split()  # noqa: SIM905
)
FOLDERS = ("faces", "lfw", "lfw-deepfunneled", "lfw_funneled")  # the last is where a download goes
SUFFIXES = (".jpg", ".jpeg", ".png")
LFWA, LFWA_SPLIT = "lfw_att_40.mat", "indices_train_test.mat"
SCORES = "http://www.cs.columbia.edu/CAVE/databases/pubfig/download/lfw_attributes.txt"
NOT_SCORED = ("Attractive", "Young")  # there are Attractive Man, Attractive Woman and Youth
DECODED = 2  # to be raised when another image is made of a file: the cache is then written again

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Answers = NDArray[np.int8]  # 1 yes, 0 no, -1 unknown
Box = Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Faces:
    """Faces, whole, in memory.

    images: uint8 [N, 3, size, size], RGB.
    people: int64 [N], whose face it is, an index into `persons`.
    names: of the images, "<person>/<file>", and persons: of the people, sorted; in Unicode's form NFC.
    attributes: int8 [N, 40], 1 yes, 0 no, -1 unknown, in the order of `attribute_names`.
    train, test: int64, ascending indices of images.
    labels: what `attributes` are: "LFWA", the `labels` of `load_faces`, or "none".
    sha256: of images, people, attributes, train and test, one after the other.
    """

    images: Tensor
    people: Tensor
    names: tuple[str, ...]
    persons: tuple[str, ...]
    attributes: Tensor
    train: Tensor
    test: Tensor
    labels: str
    sha256: str
    attribute_names: ClassVar[tuple[str, ...]] = ATTRIBUTES


def load_faces(
    root: str | Path,
    *,
    folder: str | Path | None = None,
    attributes: str | Path | None = None,
    labels: str = "proxy labels",
    box: Box = None,
    size: int = 150,
    split_seed: int = 0,
    train_fraction: float = 6263 / 13143,
    download: bool = True,
) -> Faces:
    """Load faces `<root>/<folder>/<person>/<image>` (.jpg, .jpeg or .png) and their attributes.

    Images are turned as their EXIF orientation says, 16 bits are scaled to 8, and what is transparent is white.

    folder: of the images; None: the first of faces, lfw, lfw-deepfunneled and lfw_funneled that is there, or else, if
        `download`, LFW's funnelled images of 250x250 pixels, brought by scikit-learn into `<root>/lfw_funneled`.
    attributes: table under root (.csv, .csv.gz), with the file (its person's folder before it or not) in column
        `image` and a column of 0/1, -1/1 or probabilities, which are yes from 0.5 on, for each of the 40 attributes.
        An empty value, or an image that is not listed, is unknown. A name is the same in Unicode's forms NFC and NFD.
        Or Kumar et al.'s lfw_attributes.txt, whose scores above 0 are yes; Attractive and Young are unknown there.
        None: LFWA, if root has its authors' lfw_att_40.mat and indices_train_test.mat (of MATLAB 5, or of 7.3 with
        h5py), whose images, labels and split are taken as they are; else all is unknown.
    labels: what the labels of the table are.
    box: left, top, right, bottom of the crop, in pixels from the stored image's centre, the first two negative: the
        same for LFW's images of 250x250 and what has been cut from their middle. None: all of it.
    size: side in pixels of the returned images, resized bilinearly (antialiased) after the crop.
    split_seed, train_fraction: without LFWA's split, people drawn at random are the training set, as many as bring
        its share of the images nearest to this (LFWA's own share); nobody is in both sets.

    Decoded images are kept as `<root>/cache/faces-*.npy`, to be deleted at will, for as long as the box, the size and
    the files' names, sizes and times stay; where that cannot be written, they are decoded again each time.

    Raises ValueError for an impossible argument, DatasetError if anything is absent, damaged or not as expected.
    """
    _check(box, size, train_fraction)
    root = Path(root).expanduser()
    faces = _find(root, folder, download)
    files = _listed(faces)
    names = list(files)
    official = attributes is None and (root / LFWA).exists()
    if official:
        labels, (names, answers) = "LFWA", _lfwa(root / LFWA, faces, names)
    elif attributes is None:
        labels, answers = "none", _unknown(names)
    else:
        answers = _table(root / attributes, names)
    persons, people = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    if official:
        train, test = _lfwa_split(root / LFWA_SPLIT, len(names))
    else:
        train, test = split_people(people, train_fraction, split_seed)
    images = _cached(root / "cache", [files[name] for name in names], box, size)
    content = (images, people.astype(np.int64), answers, train, test)
    sha = hashlib.sha256()
    for array in content:
        sha.update(array.data)
    x, y, known, first, second = map(torch.from_numpy, content)
    return Faces(x, y, tuple(names), tuple(persons.tolist()), known, first, second, labels, sha.hexdigest())


def pairs(people: Tensor, images: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs of images for face verification: half show one person, half two.

    As in LFW's protocol, people are drawn, then images of theirs: those with many images are not favoured.

    people: int64 [N], whose face each image is. images: int64, the indices that may be drawn, in any order.
    Returns pairs int64 [number, 2], none twice, and whether they show the same person, bool [number], True first.

    Raises ValueError if `number` is not an even number of pairs or there are too few of a kind.
    """
    if number < 2 or number % 2:
        raise ValueError(f"number must be an even number of pairs from 2 on, not {number!r}")
    chosen = images.unique()
    chosen = chosen[people[chosen].argsort(stable=True)]  # one person's after another's
    start, count = np.unique(people[chosen].numpy(), return_index=True, return_counts=True)[1:]
    equal = int((count * (count - 1) // 2).sum())
    for kind, available in (("same-person", equal), ("two-person", len(chosen) * (len(chosen) - 1) // 2 - equal)):
        if available < number // 2:
            raise ValueError(f"number={number} needs {number // 2} {kind} pairs, the images have only {available}")
    rng = np.random.RandomState(seed)  # its stream is frozen by NumPy's policy
    drawn = np.concatenate([_same(start, count, number // 2, rng), _different(start, count, number // 2, rng)])
    return chosen[torch.from_numpy(drawn)], torch.arange(number) < number // 2


def _same(start: Integers, count: Integers, number: int, rng: np.random.RandomState) -> Integers:
    """Positions [number, 2] of one person's images: of all such pairs, each weighted by one over its person's pairs.

    Weighted sampling without replacement by exponential keys (Efraimidis & Spirakis 2006).
    """
    before = np.arange(count.sum()) - np.repeat(start, count)  # images of the same person before each
    later = np.repeat(np.arange(len(before)), before)
    earlier = later - 1 - (np.arange(len(later)) - np.repeat(before.cumsum() - before, before))
    keys = rng.standard_exponential(len(later)) * np.repeat(count * (count - 1), count)[later]
    return np.stack([earlier, later], axis=1)[keys.argsort(kind="stable")[:number]]


def _different(start: Integers, count: Integers, number: int, rng: np.random.RandomState) -> Integers:
    """Positions [number, 2] of two people's images, drawn until there are so many."""
    images, codes = count.sum(), np.empty(0, dtype=np.int64)
    while len(codes) < number:
        who = rng.randint(0, len(count), (2, 2 * number))
        low, high = np.sort(start[who] + (rng.random_sample(who.shape) * count[who]).astype(np.int64), axis=0)
        codes = pd.unique(np.concatenate([codes, (low * images + high)[who[0] != who[1]]]))
    return np.stack(np.divmod(codes[:number], images), axis=1)


def _check(box: Box, size: int, train_fraction: float) -> None:
    if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box must be (left, top, right, bottom) in pixels from the image's centre, not {box!r}")
    if not is_whole(size, 1):
        raise ValueError(f"size must be a whole number of pixels from 1 on, not {size!r}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must be between 0 and 1, not {train_fraction!r}")


def _find(root: Path, folder: str | Path | None, download: bool) -> Path:
    """The folder of the faces, downloaded if need be."""
    places = [root / name for name in (FOLDERS if folder is None else (folder,))]
    for place in places:
        if place.is_dir():
            return place
    reason = "nothing is downloaded"
    if download and folder is None:
        try:
            return _download(places[-1])
        except Exception as error:  # broken connections raise anything
            reason = "scikit-learn's fetch_lfw_people failed: " + " ".join(f"{type(error).__name__}: {error}".split())
    raise DatasetError(
        f"no faces: looked for {', '.join(map(str, places))}; {reason}\nThree ways to provide them:\n"
        f"  1. put images as {places[0]}/<person>/<image>.jpg, and a table for `attributes` beside;\n"
        f"  2. ask the authors of LFWA for it and put {LFWA}, {LFWA_SPLIT} and lfw/ into {root};\n"
        f"  3. load with dataset.download=true, dataset.folder=null and a network: LFW's images, without attributes."
    )


def _download(folder: Path) -> Path:
    """LFW's funnelled images, which appear whole or not at all."""
    from sklearn.datasets import fetch_lfw_people

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lfw-") as home:
        # its arrays have no file names, so its files are read instead; 500: it decodes one person's only
        fetch_lfw_people(data_home=home, funneled=True, min_faces_per_person=500)
        return Path(home, "lfw_home", "lfw_funneled").rename(folder)


def _listed(folder: Path) -> dict[str, Path]:
    """All files of the folder by their "<person>/<file>", sorted."""
    files: dict[str, Path] = {}
    try:
        people = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        paths = [path for person in people for path in person.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DatasetError(f"{folder}: could not be searched ({error})") from error
    for path in paths:
        if path.suffix.lower() in SUFFIXES:
            name = composed(path.relative_to(folder).as_posix())
            if name in files:
                raise DatasetError(f"{folder}: two files are called {name}, one in another Unicode form; delete one")
            files[name] = path
    if not files:
        raise DatasetError(f"{folder}: has no images, expected <person>/<image>.jpg (or .jpeg, .png)")
    return dict(sorted(files.items()))


def composed(name: str) -> str:
    """A name of a file in Unicode's form NFC: a file system may have a letter and its accent apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def _lfwa(mat: Path, folder: Path, listed: list[str]) -> tuple[list[str], Answers]:
    """Names and attributes [N, 40] as LFWA's authors give them."""
    columns, label, files = _read_mat(mat, "AttrName", "label", "name")
    for key, strings in (("AttrName", columns), ("name", files)):
        if other := [x for x in strings.ravel() if not isinstance(x, str)]:
            raise DatasetError(f"{mat}: {key} holds {other[0]!r}, expected a cell of strings")
    names = [composed(file.strip().replace("\\", "/")) for file in files.ravel()]
    if label.shape != (len(names), columns.size):
        expected = f"[{len(names)}, {columns.size}] as there are so many in name and in AttrName"
        raise DatasetError(f"{mat}: label is {list(label.shape)}, expected {expected}")
    if twice := _twice(names):
        raise DatasetError(f"{mat}: name lists {twice[0]} twice, expected each image once")
    if missing := sorted(set(names) - set(listed)):
        number = f"{len(missing)} images that are absent, expected <person>\\<image>.jpg of this folder"
        raise DatasetError(f"{folder}: has no {missing[0]}; {mat}: name lists {number}")
    return names, _binary(pd.DataFrame(label, columns=columns.ravel()), f"{mat}: AttrName and label")


def _lfwa_split(mat: Path, images: int) -> tuple[Integers, Integers]:
    """Ascending indices of train and test as LFWA's authors give them, from 1."""
    keys = ("indices_img_train", "indices_img_test")
    train, test = (np.sort(indices, axis=None) for indices in _read_mat(mat, *keys))
    for key, indices in zip(keys, (train, test), strict=True):
        if len(other := indices[~np.isin(indices, np.arange(1, images + 1))]):
            right = f"whole numbers from 1 to {images}, the number of names in {LFWA}"
            raise DatasetError(f"{mat}: {key} holds {other[0]}, expected {right}")
        if twice := _twice(indices):
            raise DatasetError(f"{mat}: {key} holds {twice[0]} twice, expected each image once")
    if shared := len(np.intersect1d(train, test)):
        raise DatasetError(f"{mat}: {shared} images are in both indices_img_train and indices_img_test")
    return train.astype(np.int64) - 1, test.astype(np.int64) - 1


def _read_mat(path: Path, *keys: str) -> list[NDArray[Any]]:
    """Variables of a MATLAB file, matrices as in MATLAB and cells of strings as arrays of them."""
    try:
        with path.open("rb") as file:
            hdf5 = b"\x89HDF\r\n\x1a\n" in file.read(1024)  # MATLAB 7.3's own header comes before it
        content = _read_hdf5(path, keys) if hdf5 else scipy.io.loadmat(path, squeeze_me=True)
    except ImportError as error:
        raise DatasetError(f"{path}: is of MATLAB 7.3 (HDF5), which needs h5py: pip install h5py") from error
    except Exception as error:  # damaged files raise anything
        raise DatasetError(f"{path}: could not be read as a MATLAB file ({error})") from error
    if missing := [key for key in keys if key not in content]:
        found = ", ".join(key for key in content if not key.startswith("_"))
        raise DatasetError(f"{path}: has no {', '.join(missing)}, only {found or 'nothing'}")
    return [np.asarray(content[key]) for key in keys]


def _read_hdf5(path: Path, keys: Sequence[str]) -> dict[str, NDArray[Any] | None]:
    """The variables of a MATLAB 7.3 file, None for those that are not asked for. A cell is a matrix of references to
    its elements, a string is a column of UTF-16 code units, and axes are reversed."""
    import h5py

    def element(reference: Any) -> Any:
        units = file[reference][()]
        return units.astype("<u2").tobytes().decode("utf-16-le") if units.dtype.kind == "u" else units

    def variable(stored: NDArray[Any]) -> NDArray[Any]:
        return (np.vectorize(element, otypes=[object])(stored) if stored.dtype == object else stored).T

    with h5py.File(path) as file:
        datasets = {key: item for key, item in file.items() if isinstance(item, h5py.Dataset)}
        return {key: variable(item[()]) if key in keys else None for key, item in datasets.items()}


def _table(path: Path, names: list[str]) -> Answers:
    """Attributes [N, 40] of the named images from a file as `load_faces` takes it, -1 where it has none."""
    try:
        with path.open("rb") as file:
            begins_with_comment = file.read(1) == b"#"
        table = _scores(path) if begins_with_comment else pd.read_csv(path)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: there is no such table; for LFW, download {SCORES} and give its path") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DatasetError(f"{path}: could not be read as a table of attributes ({error})") from error
    if "image" not in table:
        raise DatasetError(f"{path}: has no column image, only {', '.join(map(str, table.columns))}")
    rows = {name: row for row, name in enumerate(names)}
    if len(files := {name.split("/")[1]: row for name, row in rows.items()}) == len(names):
        rows |= files  # no two people have a file of the same name: the person need not be given
    image = table["image"].astype(str).str.replace("\\", "/").map(composed)
    if len(strange := image[~image.isin(rows)]):
        raise DatasetError(f"{path}: no face is called {strange.iloc[0]} (of {len(strange)} such), one is {names[0]}")
    row = image.map(rows).astype(np.int64)
    if twice := _twice(row):
        raise DatasetError(f"{path}: image {names[twice[0]]} is listed twice, expected one row each")
    answers = _unknown(names)
    answers[row] = _binary(table, path)
    return answers


def _scores(path: Path) -> pd.DataFrame:
    """Kumar et al.'s lfw_attributes.txt as a table of images with 0 and 1: comments, of which the last is the header
    "# person imagenum Male ...", and rows such as "Aaron Eckhart 1 1.568 ...", all separated by tabs."""
    with path.open(encoding="utf-8") as file:
        *_, header = takewhile(lambda line: line.startswith("#"), file)
    columns = header.strip("#\t\n\r ").split("\t")
    if columns[:2] != ["person", "imagenum"]:
        right = "# person imagenum Male ..., separated by tabs"
        raise DatasetError(f"{path}: the last line of comment is {header[:50]!r}, expected the header {right}")
    table = pd.read_csv(path, sep="\t", comment="#", header=None, keep_default_na=False, quoting=csv.QUOTE_NONE)
    if table.shape[1] != len(columns):
        raise DatasetError(f"{path}: rows have {table.shape[1]} values, expected {len(columns)} as the header has")
    table.columns = pd.Index(columns)
    numbers = table.drop(columns="person").apply(pd.to_numeric, errors="coerce")
    for row, column in np.argwhere(numbers.isna())[:1]:
        name, value = table["person"][row], table[numbers.columns[column]][row]
        raise DatasetError(f"{path}: {numbers.columns[column]} of {name} is {value!r}, expected a number")
    person = table["person"].astype(str).str.replace(" ", "_")
    image = person + "/" + person + numbers["imagenum"].map("_{:04.0f}.jpg".format)
    answers: pd.DataFrame = (numbers > 0).astype(float)
    return answers.assign(image=image, **dict.fromkeys(NOT_SCORED, np.nan))


def _twice(values: Any) -> list[Any]:
    """The values that are there before."""
    series = pd.Series(values)
    return series[series.duplicated()].tolist()


def _unknown(names: list[str]) -> Answers:
    return np.full((len(names), len(ATTRIBUTES)), -1, dtype=np.int8)


def _binary(table: pd.DataFrame, path: Path | str) -> Answers:
    """The 40 attributes of a table, whatever its order, as 1, 0 or -1; "5 o'Clock Shadow" is 5_o_Clock_Shadow. path:
    of the table, for messages."""
    columns = {_letters(column): column for column in table}
    if missing := [name for name in ATTRIBUTES if _letters(name) not in columns]:
        raise DatasetError(f"{path}: has no attribute {', '.join(missing)}")
    try:
        values = table[[columns[_letters(name)] for name in ATTRIBUTES]].to_numpy(np.float64)
    except ValueError as error:
        raise DatasetError(f"{path}: attributes must be numbers, or empty where unknown ({error})") from error
    known = values[~np.isnan(values)]
    if not (((known >= 0) & (known <= 1)).all() or (np.abs(known) == 1).all()):
        found = f"from {known.min()} to {known.max()}"
        raise DatasetError(f"{path}: attributes are numbers {found}, expected 0/1, -1/1 or probabilities")
    return np.where(np.isnan(values), -1, values >= 0.5).astype(np.int8, order="C")


def _letters(column: object) -> str:
    return "".join(filter(str.isalnum, str(column))).lower()


def split_people(people: Integers, fraction: float, seed: int) -> tuple[Integers, Integers]:
    """Ascending indices of the images of people drawn at random, whose share is nearest to `fraction`, and of all
    others'. people: [N], whose each image is. Raises DatasetError where there is one person only."""
    count = np.bincount(people)
    if len(count) < 2:
        raise DatasetError("all faces are of one person, expected two or more to split")
    order = np.random.RandomState(seed).permutation(len(count))  # its stream is frozen by NumPy's policy
    last = np.abs(count[order].cumsum() - fraction * len(people))[:-1].argmin()  # the nearest with anyone left
    train = np.isin(people, order[: last + 1])
    return np.flatnonzero(train), np.flatnonzero(~train)


def _cached(cache: Path, files: list[Path], box: Box, size: int) -> Bytes:
    """The images, from the cache, or decoded and kept there."""
    try:
        states = [(*file.parts[-2:], stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    except OSError as error:
        raise DatasetError(f"expected an image, found a file that cannot be read ({error})") from error
    key = hashlib.sha256(repr((DECODED, box and tuple(box), size, states)).encode()).hexdigest()[:16]
    return cached_npy(cache / f"faces-{key}.npy", lambda: _decoded(files, box, size))


def _decoded(files: list[Path], box: Box, size: int) -> Bytes:
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)

    def decode(row: int) -> None:
        images[row] = _face(files[row], box, size)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(files))):
            pass  # raises the first error and drops what is still to do
    return images


def _face(file: Path, box: Box, size: int) -> Bytes:
    """One image [3, size, size]."""
    try:
        with Image.open(file) as stored:
            image = upright(stored)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file}: expected an image, found a damaged or other file ({error})") from error
    if box is not None:
        across, down = image.width // 2, image.height // 2
        left, top, right, bottom = across + box[0], down + box[1], across + box[2], down + box[3]
        if left < 0 or top < 0 or right > image.width or bottom > image.height:
            raise ValueError(f"box={tuple(box)} reaches beyond {file}, of {image.width}x{image.height} pixels")
        image = image.crop((left, top, right, bottom))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def upright(stored: Image.Image) -> Image.Image:
    """An image of any kind as RGB of 8 bits, upright. Raises ValueError for pixels whose range is not known."""
    stored.load()
    image = stored
    with suppress(SyntaxError, ValueError, OSError, struct.error):  # damaged EXIF data say nothing
        image = ImageOps.exif_transpose(stored)
    if image.mode.startswith("I;16") or (image.mode == "I" and stored.format == "PNG"):
        # `convert` would make white of all from 255 on
        image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, whose range is not known; save it with 8 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
