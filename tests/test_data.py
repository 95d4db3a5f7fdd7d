"""Data sets: where they are found, what is refused, how they are split and scaled. No network needed."""

import dataclasses
import errno
import gzip
import hashlib
import inspect
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm import data
from admm.data import DatasetError, load

CONF = Path(__file__).parents[1] / "experiments/conf/dataset"
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def generate(name, train=50, test=20):
    """Random content of the right shape; each training image is different."""
    rng = np.random.RandomState(0)
    shape = data.DATASETS[name].image
    return {
        "x_train": rng.randint(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train, dtype=np.uint8) % 10,
        "x_test": rng.randint(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.uint8) % 10,
    }


@pytest.fixture
def content(monkeypatch):
    """Generates a data set's content and makes it the known one."""

    def known(name):
        arrays = generate(name)
        spec = dataclasses.replace(data.DATASETS[name], sha256=data.digest(arrays))
        monkeypatch.setitem(data.DATASETS, name, spec)
        return arrays

    return known


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises ImportError


@pytest.fixture
def fake_download(monkeypatch):
    """Replaces torchvision's class: it has nothing locally, and `arrays` (or an error) on its network."""
    datasets = pytest.importorskip("torchvision.datasets")

    def install(name, arrays):
        def build(root, train, download):
            if not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            Path(root, "half").write_text("what torchvision leaves behind")
            if isinstance(arrays, BaseException):
                raise arrays
            part = "train" if train else "test"
            return SimpleNamespace(data=arrays[f"x_{part}"], targets=arrays[f"y_{part}"].tolist())

        monkeypatch.setattr(datasets, TORCHVISION[name], build)

    return install


def test_digest_is_the_sha256_of_the_bytes_in_order():
    arrays = generate("cifar10")
    joined = b"".join(arrays[key].tobytes() for key in ("x_train", "y_train", "x_test", "y_test"))
    assert data.digest(arrays) == hashlib.sha256(joined).hexdigest()
    strided = arrays | {"x_train": np.asfortranarray(arrays["x_train"])}
    assert data.digest(strided) == data.digest(arrays)


# Where data are found


def test_npz_comes_first_and_needs_no_torchvision(content, no_torchvision, tmp_path):
    arrays = content("mnist")
    np.savez(tmp_path / "mnist.npz", **arrays)
    mnist = load("mnist", tmp_path)
    assert (mnist.name, mnist.classes, mnist.input_shape) == ("mnist", 10, (28, 28))
    assert mnist.sha256 == data.digest(arrays)
    assert mnist.x_train.dtype == torch.float32 and mnist.y_train.dtype == torch.int64
    for key in data.KEYS:
        expected = torch.from_numpy(arrays[key]) / (255 if key.startswith("x") else 1)
        torch.testing.assert_close(getattr(mnist, key), expected.to(getattr(mnist, key).dtype), rtol=0, atol=1e-7)


def test_cifar10_is_channels_first_and_its_labels_may_be_a_column(content, no_torchvision, tmp_path):
    arrays = content("cifar10")
    column = {key: arrays[key][:, None] for key in ("y_train", "y_test")}
    np.savez(tmp_path / "cifar10.npz", **(arrays | column))
    cifar10 = load("cifar10", tmp_path)
    assert cifar10.x_train.shape == (50, 3, 32, 32) and cifar10.x_test.shape == (20, 3, 32, 32)
    assert cifar10.x_train.is_contiguous() and cifar10.y_train.shape == (50,)
    green = torch.from_numpy(arrays["x_train"][7, :, :, 1].astype(np.float32)) / 255
    torch.testing.assert_close(cifar10.x_train[7, 1], green)


def test_home_is_expanded_and_dtype_is_kept(content, no_torchvision, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "mnist.npz", **content("mnist"))
    mnist = load("mnist", "~", dtype=torch.float64)
    assert mnist.x_train.dtype == mnist.x_test.dtype == torch.float64


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_torchvision_idx_files_are_read(name, content, tmp_path):
    pytest.importorskip("torchvision")
    arrays = content(name)
    raw = write_idx(tmp_path / TORCHVISION[name] / "raw", arrays)
    found = load(name, tmp_path, download=False)
    assert torch.equal((found.x_test * 255).round().to(torch.uint8), torch.from_numpy(arrays["x_test"]))
    assert torch.equal(found.y_train, torch.from_numpy(arrays["y_train"]).long())
    assert not (tmp_path / f"{name}.npz").exists()  # only a download is kept

    torn = raw / "t10k-images-idx3-ubyte"
    torn.write_bytes(b"\0\0\x08\x03")
    expected = (
        f"{torn}: does not begin as an IDX file of unsigned bytes with 3 axes (of 1 such files); no {name}.npz, and"
    )
    assert refusal(name, tmp_path, download=False).startswith(expected)


def write_idx(raw, arrays):
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for array, kind in ((arrays[f"x_{part}"], "images-idx3"), (arrays[f"y_{part}"], "labels-idx1")):
            header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return raw


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "has 23 bytes, expected 28 by its header"),
        (lambda path: path.write_bytes(path.read_bytes() + b"ab"), "has 30 bytes, expected 28 by its header"),
        (
            lambda path: path.write_text("<html>404</html>"),
            "does not begin as an IDX file of unsigned bytes with 1 axes",
        ),
        (lambda path: path.unlink(), "is not there"),
        (lambda path: path.unlink() or path.mkdir(), "is not there"),
    ],
)
def test_a_damaged_file_is_named_when_its_download_fails(damage, problem, content, fake_download, tmp_path):
    fake_download("mnist", OSError("no network"))
    path = write_idx(tmp_path / "MNIST" / "raw", content("mnist")) / "t10k-labels-idx1-ubyte"
    damage(path)
    for download, reason in ((True, "OSError: no network"), (False, "RuntimeError: Dataset not found")):
        message = refusal("mnist", tmp_path, download=download)
        cause = f"no mnist.npz, and torchvision's MNIST failed: {reason}"
        assert message.startswith(f"{path}: {problem} (of 1 such files); {cause}")


def test_whole_files_are_not_blamed_for_torchvision_s_failure(content, fake_download, tmp_path):
    fake_download("mnist", OSError("no network"))
    write_idx(tmp_path / "MNIST" / "raw", content("mnist"))
    assert refusal("mnist", tmp_path).startswith("no mnist.npz, and torchvision's MNIST failed: OSError: no network")


def test_a_damaged_batch_of_cifar10_is_named_with_its_md5(tmp_path, monkeypatch):
    cifar10 = pytest.importorskip("torchvision.datasets").CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in ("a", "b", "c"):
        (folder / file).write_text(file)
    md5 = {file: hashlib.md5(file.encode()).hexdigest() for file in "abc"}
    monkeypatch.setattr(cifar10, "train_list", [["a", md5["a"]], ["b", md5["c"]]])
    monkeypatch.setattr(cifar10, "test_list", [["d", md5["a"]]])
    monkeypatch.setattr(cifar10, "meta", {"filename": "c", "md5": md5["c"], "key": "label_names"})
    expected = f"{folder / 'b'}: its MD5 is {md5['b']}, expected {md5['c']} (of 2 such files); no cifar10.npz, and"
    assert refusal("cifar10", tmp_path, download=False).startswith(expected)


def test_a_folder_that_cannot_be_searched_is_named(monkeypatch, tmp_path):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert refusal("mnist", tmp_path).startswith(f"[Errno 13] Permission denied: '{tmp_path / 'mnist.npz'}'")


def test_torchvision_cifar10_batches_are_read(content, monkeypatch, tmp_path):
    cifar10 = pytest.importorskip("torchvision.datasets").CIFAR10
    arrays = content("cifar10")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = {part: arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072) for part in ("train", "test")}
    batches = {f"data_batch_{i + 1}": ("train", slice(10 * i, 10 * i + 10)) for i in range(5)}
    for file, (part, rows_of) in (batches | {"test_batch": ("test", slice(None))}).items():
        batch = {"data": rows[part][rows_of], "labels": arrays[f"y_{part}"][rows_of].tolist()}
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(cifar10, "train_list", [[file, None] for file in batches])  # None: any MD5 will do
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": None})
    found = load("cifar10", tmp_path, download=False)
    expected = torch.from_numpy(arrays["x_train"]).movedim(-1, 1)
    assert torch.equal((found.x_train * 255).round().to(torch.uint8), expected)
    assert torch.equal(found.y_test, torch.from_numpy(arrays["y_test"]).long())


def test_a_download_is_kept_as_npz_and_not_repeated(content, fake_download, tmp_path):
    arrays = content("cifar10")
    fake_download("cifar10", arrays)
    root = tmp_path / "new" / "folder"
    first = load("cifar10", root)
    assert [path.name for path in root.iterdir()] == ["cifar10.npz"]
    with np.load(root / "cifar10.npz") as kept:
        assert all(np.array_equal(kept[key], arrays[key]) for key in data.KEYS)
    fake_download("cifar10", OSError("asked again"))
    assert torch.equal(load("cifar10", root).x_train, first.x_train)


@pytest.mark.parametrize("broken", ["savez", "replace"])
def test_a_failure_while_keeping_leaves_nothing(broken, content, fake_download, monkeypatch, tmp_path):
    fake_download("mnist", content("mnist"))

    def full(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"savez": (np, "savez"), "replace": (data.os, "replace")}[broken], full)
    with pytest.raises(DatasetError, match=r"mnist.npz: .* could not be written: .*No space left on device"):
        load("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(content, fake_download, tmp_path):
    content("mnist")
    fake_download("mnist", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_download_is_refused_and_not_kept(fake_download, tmp_path):
    fake_download("mnist", generate("mnist"))
    with pytest.raises(DatasetError, match="torchvision's download: the content's SHA-256"):
        load("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


# What is refused


def refusal(name, root, **kwargs):
    """The message of the refusal, which must always list the three ways."""
    with pytest.raises(DatasetError) as caught:
        load(name, root, **kwargs)
    message = str(caught.value)
    unpacked = root / data.DATASETS[name].files
    for way in (
        f"1. put {root / name}.npz",
        f"2. put torchvision's unpacked files into {unpacked}",
        "3. load with",
    ):
        assert way in message
    return message


def test_a_checksum_mismatch_says_both(content, tmp_path):
    arrays = content("mnist")
    arrays["y_train"][3] ^= 1
    np.savez(tmp_path / "mnist.npz", **arrays)
    message = refusal("mnist", tmp_path)
    assert message.startswith(f"{tmp_path / 'mnist.npz'}: the content's SHA-256")
    assert data.digest(arrays) in message and data.DATASETS["mnist"].sha256 in message


def bare_array(path, arrays):
    with path.open("wb") as file:
        np.save(file, arrays["x_train"])


def flipped_bytes(path, arrays):
    np.savez_compressed(path, **arrays)
    raw = bytearray(path.read_bytes())
    raw[2000:2100] = bytes(100)  # within x_train
    path.write_bytes(raw)


def garbled_stream(path, arrays):
    np.savez_compressed(path, **{key: np.zeros_like(array) for key, array in arrays.items()})
    raw = bytearray(path.read_bytes())
    raw[60:100] = b"\xff" * 40  # what zlib itself refuses
    path.write_bytes(raw)


DAMAGES = {
    "empty": lambda path, arrays: path.write_bytes(b""),
    "text": lambda path, arrays: path.write_text("<html>404</html>"),
    "gzip": lambda path, arrays: path.write_bytes(gzip.compress(arrays["x_train"].tobytes())),
    "truncated": lambda path, arrays: path.write_bytes(path.read_bytes()[:-1000]),
    "flipped": flipped_bytes,
    "garbled": garbled_stream,
    "npy": bare_array,
    "folder": lambda path, arrays: path.unlink() or path.mkdir(),
    "pickle": lambda path, arrays: np.savez(path, **(arrays | {"x_train": np.array([{}], dtype=object)})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_npz_is_named(damage, content, tmp_path):
    path = tmp_path / "mnist.npz"
    arrays = content("mnist")
    np.savez(path, **arrays)
    DAMAGES[damage](path, arrays)
    assert refusal("mnist", tmp_path).startswith(f"{path}: expected an npz file, found a damaged or other file")


def test_a_missing_key_is_named(content, tmp_path):
    arrays = content("mnist")
    del arrays["y_test"]
    np.savez(tmp_path / "mnist.npz", **arrays)
    expected = f"{tmp_path / 'mnist.npz'}: has no y_test, only x_train, y_train, x_test"
    assert refusal("mnist", tmp_path).startswith(expected)


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("x_train", lambda x: x[:, :27], "x_train is uint8 [50, 27, 28], expected uint8 [N, 28, 28]"),
        (
            "x_test",
            lambda x: x / np.float32(255),
            "x_test is float32 [20, 28, 28], expected uint8 [N, 28, 28]",
        ),
        ("x_test", lambda x: x[0, 0, 0], "x_test is uint8 [], expected uint8 [N, 28, 28]"),
        ("y_train", lambda y: y[1:], "y_train is uint8 [49], expected uint8 [50]"),
        ("y_test", lambda y: y.astype(np.int64) + 256, "y_test is int64 [20], expected uint8 [20]"),
        ("y_test", lambda y: y + 10, "y_test has a label 19, expected 0 to 9"),
        ("y_test", lambda y: np.eye(10, dtype=np.uint8)[y], "y_test is uint8 [20, 10], expected uint8 [20]"),
    ],
)
def test_a_wrong_shape_or_type_is_named(key, change, problem, content, tmp_path):
    arrays = content("mnist")
    np.savez(tmp_path / "mnist.npz", **(arrays | {key: change(arrays[key])}))
    assert refusal("mnist", tmp_path).startswith(f"{tmp_path / 'mnist.npz'}: {problem}")


def test_no_network_and_no_permission_to_use_it(fake_download, tmp_path):
    fake_download("mnist", OSError("<urlopen error [Errno -2]\nName or service not known>"))
    message = refusal("mnist", tmp_path)
    assert "no mnist.npz, and torchvision's MNIST failed: OSError: <urlopen error [Errno -2] Name or service" in message
    message = refusal("mnist", tmp_path / "absent", download=False)
    assert "Dataset not found" in message and message.endswith(" an internet connection and download=True.")
    assert list(tmp_path.iterdir()) == []


def test_no_torchvision(no_torchvision, tmp_path):
    message = refusal("cifar10", tmp_path)
    assert "import of torchvision" in message and "and torchvision (pip install torchvision)." in message


def test_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"^name: 'minst' is not one of mnist, fashion_mnist, cifar10, digits"):
        load("minst", tmp_path)
    with pytest.raises(ValueError, match=r"^normalisation: 'zscore' is not one of unit, standard, symmetric"):
        load("digits", tmp_path, normalisation="zscore")


# digits, hold-out, normalisation


@pytest.fixture
def digits(tmp_path):
    """`load` of the embedded digits, from a folder that has nothing."""
    pytest.importorskip("sklearn")
    return lambda **kwargs: load("digits", tmp_path, **kwargs)


def test_digits_are_split_as_documented(digits, no_torchvision):
    found = digits()
    assert found.x_train.shape == (1437, 8, 8) and found.x_test.shape == (360, 8, 8)
    assert found.sha256 == "99acfbe547094100091160d63f2209391c42e7c4663c8a783fa596248d5382d6"
    assert found.y_test.bincount().tolist() == [36, 37, 35, 37, 36, 36, 37, 36, 34, 36]
    from sklearn.datasets import load_digits

    def rows(x, y):  # a sorted list of (pixels, label), to compare as multisets
        return sorted((*map(int, pixels), int(label)) for pixels, label in zip(x, y, strict=True))

    images = torch.cat([found.x_train, found.x_test]).flatten(1) * 16
    assert rows(images, torch.cat([found.y_train, found.y_test])) == rows(*load_digits(return_X_y=True))


def test_other_digits_are_refused(digits, monkeypatch):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    x, y = sklearn_datasets.load_digits(return_X_y=True)
    monkeypatch.setattr(sklearn_datasets, "load_digits", lambda **_: (x, np.roll(y, 1)))
    with pytest.raises(DatasetError, match="scikit-learn's digits: the content's SHA-256"):
        digits()


def test_the_holdout_replaces_the_test_set_by_a_part_of_the_training_set(content, no_torchvision, tmp_path):
    arrays = content("mnist")
    np.savez(tmp_path / "mnist.npz", **arrays)
    whole, split = load("mnist", tmp_path), load("mnist", tmp_path, holdout=15)
    assert len(split.x_train) == 35 and len(split.x_test) == 15

    def images(x, y):
        return {(pixels.numpy().tobytes(), int(label)) for pixels, label in zip(x, y, strict=True)}

    train, held = images(split.x_train, split.y_train), images(split.x_test, split.y_test)
    assert not train & held
    assert train | held == images(whole.x_train, whole.y_train)
    assert not held & images(whole.x_test, whole.y_test)
    assert split.sha256 == whole.sha256


def test_the_holdout_is_seeded(digits):
    one, same, other = (digits(holdout=200, holdout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.x_test, same.x_test) and torch.equal(one.x_train, same.x_train)
    assert not torch.equal(one.x_test, other.x_test)
    held = torch.bincount(one.y_test).tolist()
    assert max(held) - min(held) <= 2 and sum(held) == 200


def test_the_holdout_is_the_same_in_every_version():
    y = np.arange(12, dtype=np.uint8) % 3
    assert np.flatnonzero(data._stratified(y, 4, seed=0)).tolist() == [0, 1, 2, 6]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_the_holdout_is_stratified(labels, draw):
    y = np.array(labels, dtype=np.uint8)
    count = draw.draw(st.integers(0, len(y) - 1))
    mask = data._stratified(y, count, draw.draw(st.integers(0, 2**32 - 1)))
    assert mask.sum() == count
    share = np.bincount(y, minlength=5) * count / len(y)
    assert (np.abs(np.bincount(y[mask], minlength=5) - share) < 1).all()


def test_the_first_training_samples_alone(digits):
    whole, part, split = digits(), digits(first=500), digits(first=500, holdout=100)
    assert torch.equal(part.x_train, whole.x_train[:500]) and torch.equal(part.y_train, whole.y_train[:500])
    assert torch.equal(part.x_test, whole.x_test) and part.sha256 == whole.sha256
    assert len(split.x_train) == 400 and len(split.x_test) == 100


@pytest.mark.parametrize("first", [0, -1, 1438, 0.5])
def test_an_impossible_number_of_first_samples_is_refused(first, digits):
    with pytest.raises(ValueError, match=f"^first: {first} is not None or a whole number of samples from 1 to 1437"):
        digits(first=first)


@pytest.mark.parametrize("holdout", [-1, 1437, 0.1])
def test_an_impossible_holdout_is_refused(holdout, digits):
    with pytest.raises(ValueError, match=f"^holdout: {holdout} is not a whole number of samples from 0 to 1436"):
        digits(holdout=holdout)


def test_normalisations(content, no_torchvision, tmp_path):
    arrays = content("cifar10")
    np.savez(tmp_path / "cifar10.npz", **arrays)
    unit, symmetric, standard = (
        load("cifar10", tmp_path, normalisation=way, holdout=10, dtype=torch.float64)
        for way in ("unit", "symmetric", "standard")
    )
    assert unit.x_train.min() == 0 and unit.x_train.max() == 1
    torch.testing.assert_close(symmetric.x_test, 2 * unit.x_test - 1)
    assert symmetric.x_train.min() == -1 and symmetric.x_train.max() == 1
    assert standard.x_train.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(standard.x_train.std(dim=(0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))
    mean = unit.x_train.mean(dim=(0, 2, 3), keepdim=True)  # of what is left to train on, not of what is held out
    std = unit.x_train.std(dim=(0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(standard.x_test, (unit.x_test - mean) / std)


def test_vectors_are_standardised_entry_by_entry(monkeypatch, no_torchvision, tmp_path):
    rng = np.random.RandomState(0)
    x, y = rng.randint(0, 256, (30, 5), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 2
    x[:, 2] = 7  # constant
    arrays = {"x_train": x[:20], "y_train": y[:20], "x_test": x[20:], "y_test": y[20:]}
    np.savez(tmp_path / "own.npz", **arrays)
    monkeypatch.setitem(data.DATASETS, "own", data.DatasetSpec(image=(5,), classes=2, sha256=data.digest(arrays)))
    found = load("own", tmp_path, normalisation="standard", dtype=torch.float64)
    std = x[:20].std(0)
    std[2] = 1.0
    for part, own in ((found.x_train, x[:20]), (found.x_test, x[20:])):
        np.testing.assert_allclose(part, (own - x[:20].mean(0)) / std, atol=1e-12)
    assert (found.x_train[:, 2] == 0.0).all()


def test_digits_are_scaled_by_their_own_maximum(digits):
    assert digits().x_train.max() == 1
    assert digits(normalisation="symmetric").x_train.max() == 1
    grey = digits(normalisation="standard").x_train
    assert abs(grey.mean()) < 1e-5 and abs(grey.std() - 1) < 1e-4


# conf/dataset


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_configuration_calls_load(name, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    monkeypatch.delenv("ADMM_DATA", raising=False)
    config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    assert config["name"] == name and config["root"] == "data"
    defaults = {key: p.default for key, p in inspect.signature(load).parameters.items()}
    for key in ("normalisation", "first", "holdout", "holdout_seed", "download"):
        assert config.pop(key) == defaults[key]
    assert config.keys() == {"name", "root"}
