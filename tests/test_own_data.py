"""A user's own data and networks: what is read, what is refused, and what comes out of the command line."""

from __future__ import annotations

import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.errors import HydraException
from launches import multirun, places
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits, load_iris, make_multilabel_classification
from sklearn.preprocessing import LabelEncoder, MinMaxScaler, StandardScaler
from stores import run_json
from torch import nn

from admm.data import DatasetError, load, with_channels
from admm.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from admm.models import as_constructed
from experiments import jobs
from experiments.errors import BadInput, user_errors
from experiments.hints import hints, unknown_additions
from experiments.implied import as_given, with_implied
from experiments.launching import failures
from experiments.launching.rows import choices
from experiments.own_data import load_image_folder, load_npz, loss_of_task
from experiments.reports.base import report_of
from experiments.reports.curves import curves
from experiments.reports.html_page import interactive_plot
from experiments.reports.scores import mean_score
from experiments.rows import CONF, TableRows
from experiments.store import Run, Slot
from experiments.training import build_network, build_problem

RNG = np.random.RandomState(0)
X, Y = RNG.rand(12, 4), np.arange(12) % 3


@pytest.fixture
def npz(tmp_path: Path) -> Any:
    """Writes a file of twelve training samples and six of a test set; keywords replace arrays, None leaves one out."""

    def write(**arrays: Any) -> str:
        every = {"x_train": X, "y_train": Y, "x_test": X[:6], "y_test": Y[:6]} | arrays
        np.savez(tmp_path / "my.npz", **{key: array for key, array in every.items() if array is not None})
        return str(tmp_path / "my.npz")

    return write


# --- Arrays


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f8", "float16", "int16", "uint8", "uint64", "bool"])
@pytest.mark.parametrize(
    ("normalisation", "scaler"),
    [
        ("standard", StandardScaler()),
        ("unit", MinMaxScaler()),
        ("symmetric", MinMaxScaler((-1, 1))),
        ("none", None),
    ],
)
def test_vectors_of_any_type_are_scaled_entry_by_entry(npz: Any, dtype: str, normalisation: str, scaler: Any) -> None:
    """As scikit-learn does it, by the training samples alone."""
    x = (RNG.rand(12, 4) * [3, 10, 100, 0] + [0, 0, 0, 5]).astype(dtype)  # the last entry is constant
    test = (RNG.rand(6, 4) * 50).astype(dtype)
    data = load_npz(npz(x_train=x, x_test=test), normalisation=normalisation, dtype=torch.float64)
    plain = x.astype(np.float64), test.astype(np.float64)
    expected = (scaler.fit_transform(plain[0]), scaler.transform(plain[1])) if scaler else plain
    changing = np.ptp(plain[0], axis=0) > 0
    for found, right in zip((data.x_train, data.x_test), expected, strict=True):
        np.testing.assert_allclose(found[:, changing], right[:, changing], atol=1e-3 if dtype == "float16" else 1e-6)
    assert normalisation == "none" or data.x_train[:, 3].unique().numel() == 1


@pytest.mark.parametrize(
    ("shape", "expected", "told"),
    [
        ((12, 5, 6, 3), (3, 5, 6), False),
        ((12, 5, 6, 1), (1, 5, 6), False),
        ((12, 3, 5, 6), (3, 5, 6), False),
        ((12, 5, 6, 2), (5, 6, 2), False),
        ((12, 3, 4, 4), (3, 4, 4), True),
        ((12, 3, 8, 1), (3, 8, 1), True),
    ],
)
def test_the_axis_of_the_channels_is_known_by_its_length_and_told_where_two_may_be_it(
    npz: Any, shape: tuple[int, ...], expected: tuple[int, ...], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    x = RNG.rand(*shape)
    assert load_npz(npz(x_train=x, x_test=x[:6])).input_shape == expected
    message = f"x_train {list(shape)} may be [N, C, H, W] or [N, H, W, C]; it is taken as [N, C, H, W]"
    assert (message in caplog.text) == told == bool(caplog.text)


def test_large_numbers_keep_their_differences(npz: Any) -> None:
    x = 1.7e9 + np.arange(12.0)[:, None]  # seconds, which float32 does not tell apart
    data = load_npz(npz(x_train=x, x_test=x[:6]))
    np.testing.assert_allclose(data.x_train, StandardScaler().fit_transform(np.arange(12.0)[:, None]), rtol=1e-6)


def test_images_of_bytes_are_scaled_as_the_papers(npz: Any) -> None:
    x = RNG.randint(0, 200, (12, 5, 6, 3), dtype=np.uint8)
    data = load_npz(npz(x_train=x, x_test=x[:6]), normalisation="unit")
    np.testing.assert_allclose(data.x_train, x.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert data.input_shape == (3, 5, 6)
    standard = load_npz(npz(x_train=x, x_test=x[:6]), dtype=torch.float64).x_train
    np.testing.assert_allclose(standard.mean((0, 2, 3)), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(standard.std((0, 2, 3), correction=0), np.ones(3), atol=1e-6)


def test_channels_first_stay_and_gray_images_are_repeated(npz: Any) -> None:
    first = RNG.rand(12, 3, 5, 6)
    assert load_npz(npz(x_train=first, x_test=first[:6])).input_shape == (3, 5, 6)
    gray = npz(x_train=first[:, 0], x_test=first[:6, 0])
    assert load_npz(gray).input_shape == (5, 6)
    three, one = load_npz(gray, channels=3), load_npz(gray, channels=1)
    assert one.input_shape == (1, 5, 6)
    assert all(torch.equal(three.x_test[:, c], load_npz(gray).x_test) for c in range(3))
    with pytest.raises(ValueError, match=r"^channels: 1 cannot be made of samples \[3, 5, 6\]"):
        with_channels(torch.zeros(2, 3, 5, 6), 1)
    with pytest.raises(ValueError, match=r"^channels: 2 cannot be made of samples \[5, 6\]; gray .* get 1 or 3, "):
        load_npz(gray, channels=2)
    with pytest.raises(ValueError, match=r"^channels: 2 cannot be made of samples \[8, 8\]"):
        load("digits", "", channels=2)
    assert with_channels(torch.zeros(2, 2, 5, 6), 2).shape == (2, 2, 5, 6)


@pytest.mark.parametrize("labels", [[3, 7, 9], [-1.0, 1.0], ["cat", "dog", "eel"], [False, True]])
def test_classes_are_counted_whatever_they_are_called(npz: Any, labels: list[Any]) -> None:
    y = np.resize(labels, 12)
    data = load_npz(npz(y_train=y[:, None], y_test=y[:6]))
    assert data.y_train.tolist() == LabelEncoder().fit_transform(y).tolist() and data.y_train.dtype == torch.int64
    assert data.classes == data.outputs == len(labels)


def test_targets_of_a_regression_are_scaled_by_the_training_set(npz: Any) -> None:
    y = RNG.rand(12, 2) * [10, 1000]
    data = load_npz(npz(y_train=y, y_test=y[:6]), task="regression", dtype=torch.float64)
    np.testing.assert_allclose(data.y_train, StandardScaler().fit_transform(y), atol=1e-9)
    np.testing.assert_allclose(data.y_test, data.y_train[:6], atol=1e-9)
    assert (data.classes, data.outputs, data.y_train.shape[1]) == (0, 2, 2)
    plain = load_npz(npz(y_train=y[:, 0], y_test=y[:6, 0]), task="regression", targets="none")
    np.testing.assert_allclose(plain.y_train, y[:, :1], rtol=1e-6)


def test_several_labels_per_sample_stay_zeros_and_ones(npz: Any) -> None:
    y = RNG.randint(0, 2, (12, 3))
    data = load_npz(npz(y_train=y, y_test=y[:6].astype(bool)), task="multilabel")
    assert data.outputs == 3 and data.y_train.tolist() == y.tolist() and data.y_test.tolist() == y[:6].tolist()


def test_without_a_test_set_one_is_held_out(npz: Any) -> None:
    x, y = np.arange(60.0)[:, None], np.repeat([0, 1, 2], [30, 20, 10])
    data = load_npz(npz(x_train=x, y_train=y, x_test=None, y_test=None), holdout=12, normalisation="none")
    assert torch.bincount(data.y_test).tolist() == [6, 4, 2]  # a fifth of each class
    assert sorted(torch.cat([data.x_train, data.x_test]).flatten().tolist()) == x.flatten().tolist()
    numbers = load_npz(npz(x_train=x, y_train=x, x_test=None, y_test=None), task="regression", holdout=12)
    assert len(numbers.y_test) == 12 and len(numbers.y_train) == 48


def test_the_hash_is_of_the_content(npz: Any, tmp_path: Path) -> None:
    file = npz()
    sha = load_npz(file).sha256
    np.savez_compressed(tmp_path / "other.npz", **dict(np.load(file)))
    same = [load_npz(str(tmp_path / "other.npz")), load_npz(file, normalisation="unit"), load_npz(file, holdout=2)]
    assert {data.sha256 for data in same} == {sha}
    changed = [{"x_test": X[1:7]}, {"y_train": Y[::-1]}, {"x_train": X.astype("f4")}, {"x_train": X.reshape(12, 2, 2)}]
    changed[3] |= {"x_test": X[:6].reshape(6, 2, 2)}
    assert len({sha, *(load_npz(npz(**arrays)).sha256 for arrays in changed)}) == 5


NAN = np.where(np.arange(48).reshape(12, 4) == 6, np.nan, X)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"y_train": None}, {}, r"my.npz: has no y_train, only x_train, x_test, y_test; expected x_train, y_train"),
        ({"y_test": None}, {}, r"my.npz: has no y_test, only"),
        ({"x_test": None, "y_test": None}, {}, r"my.npz: has no test set; dataset.holdout=2 takes so many of the 12"),
        ({"x_train": NAN}, {}, r"my.npz: x_train has 1 values that are NaN or infinite, the first at \[1, 2\]"),
        ({"y_test": Y[:5]}, {}, r"my.npz: x_test has 6 samples, y_test 5; as many are needed"),
        ({"x_test": X[:6, :3]}, {}, r"x_train float64 \[12, 4\] and x_test float64 \[6, 3\] differ in more than"),
        ({"x_test": (9 * X[:6]).astype("u1")}, {}, r"x_train float64 \[12, 4\] and x_test uint8 \[6, 4\] differ in"),
        ({"x_train": X.astype(object)}, {}, r"my.npz: x_train is an array of objects, which is not read, as unpickl"),
        ({"x_train": X.astype(complex)}, {}, r"my.npz: x_train is of type complex128, expected numbers: integers"),
        ({"x_train": X[:0], "y_train": Y[:0]}, {}, r"my.npz: x_train is \[0, 4\], expected samples \[N, ...\]"),
        ({"y_train": Y + 0.5}, {}, r"my.npz: y_train has numbers such as 0.5, expected classes, .*task=regression"),
        ({"y_train": np.eye(3)[Y]}, {}, r"my.npz: y_train is \[12, 3\], expected classes \[N\], of one-hot rows"),
        ({"y_train": 0 * Y}, {}, r"my.npz: y_train has one class alone, 0; two or more"),
        ({"y_train": np.arange(12)}, {}, r"my.npz: y_train has 12 different values in 12 samples, too many .*regress"),
        ({"y_test": Y[:6] + 1}, {}, r"my.npz: y_test has the class 3, which y_train does not have"),
        ({"y_train": Y.astype(str)}, {}, r"my.npz: of y_train and y_test, one has texts and one numbers"),
        ({}, {"task": "multilabel"}, r"my.npz: y_train has numbers from 0 to 2, expected 0 and 1 for dataset.task="),
        ({"y_train": X[:, :, None]}, {"task": "regression"}, r"my.npz: y_train is \[12, 4, 1\], expected \[N\] or"),
        ({"y_train": NAN}, {"task": "regression"}, r"my.npz: y_train has 1 values that are NaN"),
        (
            {"y_train": X[:, :2], "y_test": X[[0] * 6, :2]},
            {"task": "regression"},
            r"^dataset.path: npz: all 6 targets to test on are equal; R² needs some that differ",
        ),
        ({}, {"task": "sorting"}, r"dataset.task: 'sorting' is not one of classification, regression, multilabel"),
        ({}, {"normalisation": "log"}, r"dataset.normalisation: 'log' is not one of unit, standard, symmetric, none"),
        ({}, {"targets": "log"}, r"dataset.targets: 'log' is not one of standard, none"),
        ({}, {"channels": 3}, r"channels: 3 cannot be made of samples \[4\]"),
        ({}, {"holdout": 12}, r"holdout: 12 is not a whole number of samples from 0 to 11"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(
    npz: Any, arrays: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((DatasetError, ValueError), match=message):
        load_npz(npz(**arrays), **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"dataset.path: there is no file .*mine"),
        (b"a,b\n1,2\n", r"mine: is no npz file as numpy.savez writes it, or is damaged \(pickles are not read"),
        (b"", r"mine: is no npz file"),
        (b"PK\x03\x04 cut off", r"mine: is no npz file"),
    ],
)
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_npz(str(tmp_path / "mine"))
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DatasetError, match=r"one.npy: is a single array, expected an npz file with x_train"):
        load_npz(str(tmp_path / "one.npy"))
    with pytest.raises(ValueError, match=r"^dataset.path: none is given; dataset=npz dataset.path=my.npz takes"):
        load_npz(None)


@pytest.mark.parametrize(
    ("task", "loss"),
    [("classification", CrossEntropy), ("regression", SquaredError), ("multilabel", BinaryCrossEntropy)],
)
def test_a_task_has_its_loss(task: str, loss: Any) -> None:
    assert loss_of_task(task, scale=0.5) == loss(scale=0.5)


# --- Folders of images


def save(folder: Path, **images: NDArray[np.uint8]) -> str:
    """Write images, by `<class>_<name>` or `<part>_<class>_<name>`."""
    for name, image in images.items():
        path = folder / f"{name.replace('_', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(folder)


GRAY = RNG.randint(0, 256, (6, 8, 8), dtype=np.uint8)
COLOURS = RNG.randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def in_two_classes(images: NDArray[np.uint8], part: str) -> dict[str, NDArray[np.uint8]]:
    return {f"{part}_{'ab'[n % 2]}_{n}": image for n, image in enumerate(images)}


@pytest.mark.parametrize("images", [GRAY, COLOURS], ids=["gray", "colours"])
def test_images_of_a_folder_are_its_pixels(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    pytest.importorskip("torchvision")
    folder = save(tmp_path, **in_two_classes(images, "train"), **in_two_classes(images[:4], "test"))
    data = load_image_folder(folder, normalisation="unit")
    order = [0, 2, 4, 1, 3, 5]
    expected = images[order][:, None] if images.ndim == 3 else images[order].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(data.x_train, expected / 255, atol=1e-6)
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [0, 0, 1, 1]
    assert data.classes == 2 and load_image_folder(folder, channels=3).input_shape == (3, 8, 8)
    assert load_image_folder(folder, channels=1).input_shape == (1, 8, 8)
    sha = data.sha256
    save(tmp_path, train_a_0=images[1])
    assert load_image_folder(folder).sha256 != sha


def test_images_of_other_sizes_are_scaled_and_their_middle_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    wide = np.hstack([np.zeros((8, 4), np.uint8), GRAY[0], np.zeros((8, 4), np.uint8)])
    twice = np.kron(GRAY[1], np.ones((2, 2), np.uint8))
    folder = save(tmp_path, a_0=wide, a_1=GRAY[2], b_0=twice, b_1=GRAY[3])
    with pytest.raises(DatasetError, match=r"the images have 3 sizes, such as 16x8 pixels \(.*a/0.png\) and 8x8 "):
        load_image_folder(folder, holdout=2)
    data = load_image_folder(folder, size=(8, 8), holdout=1, normalisation="none")
    found = {tuple(image.flatten().tolist()) for image in torch.cat([data.x_train, data.x_test])}
    assert tuple(GRAY[0].flatten().tolist()) in found and tuple(GRAY[2].flatten().tolist()) in found
    assert data.input_shape == (1, 8, 8) and len(data.x_test) == 1


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DatasetError, match=r"^dataset.path: there is no folder .*nowhere$"):
        load_image_folder(str(tmp_path / "nowhere"))
    with pytest.raises(
        DatasetError,
        match=r"^dataset.path: .*Couldn't find any class .*; expected <class>/<image>, or train/",
    ):
        load_image_folder(str(tmp_path), holdout=1)
    (tmp_path / "a").mkdir()
    with pytest.raises(DatasetError, match=r"Found no valid file for the classes a"):
        load_image_folder(str(tmp_path), holdout=1)
    save(tmp_path, a_0=GRAY[0], a_1=GRAY[1])
    with pytest.raises(DatasetError, match=r"has one class alone, a; expected a folder for each of two or more"):
        load_image_folder(str(tmp_path), holdout=1)
    save(tmp_path, b_0=GRAY[2])
    with pytest.raises(DatasetError, match=r"has no test set; dataset.holdout=1 takes so many of the 3 samples"):
        load_image_folder(str(tmp_path))
    with pytest.raises(ValueError, match=r"dataset.size: 8 is not \[height, width\] in pixels"):
        load_image_folder(str(tmp_path), size=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dataset.channels: 2 is not 1, 3 or null"):
        load_image_folder(str(tmp_path), channels=2)
    (tmp_path / "b/1.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"b/1.png: expected an image, found a damaged or other file"):
        load_image_folder(str(tmp_path), holdout=1)
    other = save(tmp_path / "other", **in_two_classes(GRAY, "train"), test_c_0=GRAY[0])
    with pytest.raises(DatasetError, match=r"other/test: has the class c, which train does not have"):
        load_image_folder(other)


# --- Networks


class Drawn(nn.Sequential):
    """A network with a parameter of its own, which no initialiser draws."""

    def __init__(self, input_shape: Any, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), 5), nn.Tanh(), nn.Linear(5, classes))
        self[3].weight = nn.Parameter(torch.randn(classes, 5))


def convolutions(num_classes: int, width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Flatten(), nn.Linear(64 * width, num_classes))


def with_any_keyword(**options: Any) -> nn.Module:
    return convolutions(**options)


def a_number() -> int:
    return 3


def of_channels(input_shape: Any, classes: int) -> nn.Module:
    channels, height, width = input_shape
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.Linear(2 * (height - 2) * (width - 2), classes))


def of_entries(input_shape: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], classes))


def problem_of(npz: Any, network: str, gray: bool = False, **options: Any) -> Any:
    """The problem of a network of this module: of vectors, or of gray images."""
    x = RNG.rand(12, 8, 8) if gray else X
    data = load_npz(npz(x_train=x, x_test=x[:6]), channels=options.pop("channels", None))
    groups = {
        "model": {"_target_": f"{__name__}.{network}", **options.pop("model", {})},
        "split": {"_target_": "admm.blocks.split", "after": options.pop("after", [])},
        "loss": {"_target_": "experiments.own_data.loss_of_task", "task": "classification"},
        "init": {"_target_": "admm.models.as_constructed"},
    }
    config = OmegaConf.create(groups)
    with user_errors(config):
        return build_problem(config, data)


def test_a_network_of_ones_own_gets_what_it_takes_of_the_data(npz: Any) -> None:
    assert problem_of(npz, "Drawn").blocks.network[3].weight.shape == (3, 5)
    for network in ("convolutions", "with_any_keyword"):
        problem = problem_of(npz, network, gray=True, channels=3, model={"width": 4}, after=[1])
        assert [list(names) for names in problem.blocks.names] == [["0", "1"], ["2"]]
        assert problem.blocks.network[2].weight.shape == (3, 256)


class Shuffled(Drawn):
    """The same with a frozen layer and an order of features, which all seeds share, drawn by PyTorch and NumPy."""

    def __init__(self, input_shape: Any, classes: int) -> None:
        super().__init__(input_shape, classes)
        self[1].requires_grad_(False)
        self.register_buffer("order", torch.from_numpy(np.random.permutation(5)))
        self[3].bias = nn.Parameter(torch.from_numpy(np.random.randn(classes)).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[3](self[2](self[1](self[0](x)))[:, self.order])


def test_what_no_seed_draws_depends_on_nothing_that_was_drawn_before(npz: Any) -> None:
    def drawn() -> list[torch.Tensor]:
        problem = problem_of(npz, "Shuffled")
        network = problem.blocks.network
        return [network[1].weight, network.order, problem.initial([3]).flat()]

    first = drawn()
    torch.rand(1), np.random.rand()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert all(map(torch.equal, first, drawn()))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_each_seed_has_the_weights_of_a_new_network(npz: Any) -> None:
    problem = problem_of(npz, "Drawn")
    start = problem.initial([3, 4])
    for replica, seed in enumerate([3, 4]):
        torch.manual_seed(seed)
        expected = nn.utils.parameters_to_vector(Drawn((4,), 3).parameters())
        assert torch.equal(start.flat()[replica].sort().values, expected.detach().sort().values)


def test_torchvision_s_networks_have_as_many_outputs_as_there_are_classes(npz: Any) -> None:
    pytest.importorskip("torchvision")
    model = OmegaConf.create({"_target_": "torchvision.models.resnet18", "weights": None})
    network: Any = build_network(model, load_npz(npz()))
    assert network.fc.out_features == 3
    as_constructed(lambda: build_network(model, load_npz(npz())))(network)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("a_number", {}, r"^model: .*a_number returns a int, expected an nn.Module"),
        ("convolutions", {"model": {"widht": 3}}, r"^model.widht: convolutions\(\) takes .*; did you mean width\?$"),
        ("convolutions", {"gray": True}, r"3 channels.*The images are gray, \[8, 8\]; dataset.channels=3, or 1, gives"),
        ("convolutions", {"gray": True, "channels": 1}, r"3 channels.*are gray, \[1, 8, 8\]; dataset.channels=3"),
        (
            "Drawn",
            {"model": {"classes": 7}},
            r"do not fit the network's outputs \[12, 7\].* The data need 3 outputs, wh",
        ),
        (
            "of_channels",
            {"gray": True},
            r"\.of_channels': ValueError: not enough .*, for input_shape \[8, 8\]; hydra.verbose=true shows where. The "
            r"images are gray, .*; dataset.channels=3, or 1, gives them channels, as images \[N, H, W, 1\] of an npz",
        ),
        ("of_entries", {"gray": True}, r"\.of_entries': IndexError: .*, for input_shape \[8, 8\];.* images are gray"),
        ("of_entries", {}, r"\.of_entries': IndexError: .*, for input_shape \[4\]; hydra.verbose=true shows where$"),
        ("Drawn", {"after": ["9"]}, r"^split.after: no layer '9'; the layers are 0, 1, 2, 3"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(npz: Any, network: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        problem_of(npz, network, **options)


# --- The command line


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["split.after=[layer2]"], ["split=after"]),
        (["split.n_blocks=3"], ["split=n_blocks"]),
        (["split.per_layer=true"], ["split=per_layer"]),
        (["split=after", "split.after=[a]"], []),
        (["split.activation=start"], []),
        (["dataset=npz", "dataset.path=a.npz"], ["experiment=own"]),
        (["dataset=image_folder", "experiment=mnist_shallow"], []),
        (["dataset=cifar10"], []),
        (["model=own"], ["init=as_constructed", "experiment=own"]),
        (["~model", "+model={_target_:a.b}"], []),
        (["model=resnet18", "model._target_=a.b"], []),
        (["~hydra.callbacks.report", "hydra.mode=RUN"], []),
    ],
)
def test_overrides_imply_others(given: list[str], added: list[str]) -> None:
    found = with_implied(given)
    assert sorted(found) == sorted([*added, *given])
    assert with_implied(found) == found
    assert as_given(found) == [override for override in given if override != "split=after"]


def test_the_keywords_of_a_network_are_added() -> None:
    given = ["model._target_=a.b", "model.weights=null", "dataset.channels=3", "init=normal"]
    found = with_implied(given)
    assert found == [
        "model=own",
        "experiment=own",
        "++model._target_=a.b",
        "++model.weights=null",
        "++dataset.channels=3",
        "init=normal",
    ]
    assert with_implied(found) == found and as_given(found) == given


def launch(*overrides: str) -> str:
    """In this process; what is printed."""
    jobs.load_once.cache_clear()  # as in a new process
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):
        multirun(*overrides, "progress=false", "threads=1")
    return printed.getvalue()


def stored(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(folder.glob("outputs/runs/*/*/run.json"))]


def report_of_launch(folder: Path) -> pd.DataFrame:
    """The table of the last launch, beside its figures."""
    (table,) = folder.glob("outputs/logs/**/own.csv")
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert table.with_suffix(f".{kind}").read_bytes().startswith(start)
    return pd.read_csv(table)


DIABETES, IRIS = load_diabetes(return_X_y=True), load_iris(return_X_y=True)
LABELS = make_multilabel_classification(150, n_features=10, n_classes=4, random_state=0)
CASES = {
    "classification": (IRIS, "test_accuracy", 1.0, "test accuracy (%)", 85.0),
    "regression": (DIABETES, "test_r2", 100.0, "test R² (%)", 20.0),
    "multilabel": (LABELS, "test_label_accuracy", 1.0, "test label accuracy (%)", 55.0),
}


def test_block_admm_has_a_row_that_is_launched_by_name() -> None:
    table = TableRows.of("own", OmegaConf.load(CONF / "experiment/own.yaml").rows)
    four = "row=own/online_block_admm-usual,own/gotmare-usual,own/sgd-usual,own/adam-usual"
    assert choices(table, [None], [None]) == [four]
    assert choices(table, ["block_admm", "sgd"], [None]) == ["row=own/block_admm-usual,own/sgd-usual"]


@pytest.mark.parametrize("task", CASES)
def test_own_arrays_make_a_table_and_a_figure_of_what_fits_the_task(tmp_path: Path, task: str) -> None:
    (x, y), column, factor, label, least = CASES[task]
    test = np.arange(len(x)) % 4 == 0
    np.savez(tmp_path / "my.npz", x_train=x[~test], y_train=y[~test], x_test=x[test], y_test=y[test])
    own = ["dataset=npz", f"dataset.path={tmp_path}/my.npz", f"dataset.task={task}", "iterations=40", "seeds=[0,1]"]
    own += ["evaluate_every=40", "optimizer=block_admm,online_block_admm,gotmare,sgd,adam"]
    printed = launch(*own, "model.hidden=[32]", *places(tmp_path))
    table, runs = report_of_launch(tmp_path), stored(tmp_path)
    assert sorted(run.record.method for run in runs) == ["adam", "block_admm", "gotmare", "online_block_admm", "sgd"]
    assert {run.record.experiment for run in runs} == {"own"} and {run.record.setting for run in runs} == {"usual"}
    for run in runs:
        (curve,) = curves([run])
        history = run.history
        last = history[history["iteration"] == 40][column].mean() * factor
        row = table[table["method"] == curve.label].iloc[0]
        assert row["mean"] == pytest.approx(last, abs=0.006) and last > least
        assert f"dataset.path={tmp_path}/my.npz" in row["setting"] and "reduced" not in row["setting"]
        assert report_of("own").headline(run)[0] == row["mean"]
        assert report_of("own").score(run)[0] == pytest.approx(
            max(0.0, factor * history[history["iteration"] == 40][column].iloc[0]), abs=1e-4
        )
    assert ("score" in table) == (task != "classification")
    if "score" in table:
        assert set(table["score"]) == {label} and f"own: {label}" in printed
    figure = report_of("own").figures(runs)["own"]
    assert figure.axes[0].get_ylabel() == label
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == set(table["method"])  # the caption has the overrides of all
    plot = interactive_plot(curves(runs))
    assert next(iter(plot["quantities"])) == plot["score"] == column and plot["quantities"][column] == label
    drawn = plot["curves"][0]["measured"][column]["mean"]
    assert drawn[-1] == pytest.approx(table["mean"][0], abs=0.006)


def test_a_run_with_a_loss_of_its_own_is_judged_by_it(tmp_path: Path) -> None:
    """In figures and tables; nothing is scored."""
    rows = [{"iteration": i, "replica": 0, "seed": 0, "seconds": 1.0, "test_loss": 9.0 - i} for i in (0.0, 1.0, 2.0)]
    slot, info = (
        Slot(tmp_path, "own", "sgd-usual", "a"),
        run_json("sgd", "usual", "2001", experiment="own", iterations=2),
    )
    run = slot.complete({"seeds": [0]}, rows, info | {"seeds": [0]})
    report = report_of("own")
    assert report.headline(run) == (7.0, "loss") and report.score(run) == {} and mean_score([run], [0]) is None
    assert report.table([run])["score"].tolist() == ["test loss"] and report.title([run]) == "own: test loss"
    axes = report.figures([run])["own"].axes[0]
    assert axes.get_ylabel() == "test loss" and axes.get_lines()[0].get_ydata().tolist() == [9.0, 8.0, 7.0]
    assert interactive_plot(curves([run]))["range"] is None


def test_several_labels_have_their_exact_matches_beside(tmp_path: Path) -> None:
    x, y = LABELS
    np.savez(tmp_path / "my.npz", x_train=x, y_train=y)
    held_out = ["dataset.holdout=30", "optimizer=sgd", "seeds=[0]", "iterations=2", *places(tmp_path)]
    launch("experiment=own", f"dataset.path={tmp_path}/my.npz", "dataset.task=multilabel", *held_out)
    (run,), table = stored(tmp_path), report_of_launch(tmp_path)
    last = run.history[run.history["iteration"] == 2].iloc[0]
    assert table["exact match"][0] == pytest.approx(last["test_exact_match"], abs=1e-4)
    assert table["score"][0] == "held-out label accuracy (%)"
    assert table["mean"][0] == pytest.approx(last["test_label_accuracy"], abs=0.006)


def test_other_content_is_another_run_and_another_path_is_not(tmp_path: Path) -> None:
    x, y = IRIS

    def write(name: str, shift: float) -> str:
        np.savez(tmp_path / name, x_train=x + shift, y_train=y)
        return f"dataset.path={tmp_path / name}"

    own = ["dataset=npz", "dataset.holdout=30", "optimizer=sgd", "seeds=[0]", "iterations=1", *places(tmp_path)]
    own += ["~hydra.callbacks.report"]
    launch(*own, write("a.npz", 0.0))
    (first,) = stored(tmp_path)
    assert "is there already" in launch(*own, write("b.npz", 0.0)) and len(stored(tmp_path)) == 1
    launch(*own, write("a.npz", 1.0))
    assert len(stored(tmp_path)) == 2 and first in stored(tmp_path)
    assert "path" not in OmegaConf.load(first.folder / "config.yaml").dataset
    assert f"dataset.path={tmp_path}/a.npz" in first.record.overrides


def test_an_own_network_is_given_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits as a folder of images, repeated in three channels."""
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    code = (
        "from torch import nn\n"
        "def network(num_classes, width=4):\n"
        "    first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())\n"
        "    return nn.Sequential(first, nn.Flatten(), nn.Linear(64 * width, num_classes))\n"
    )
    (tmp_path / "mynet.py").write_text(code)
    x, y = load_digits(n_class=4, return_X_y=True)
    parts = ["test" if n % 4 == 0 else "train" for n in range(320)]
    pixels = (16 * x.reshape(-1, 8, 8) - 1).clip(0).astype(np.uint8)
    save(tmp_path / "digits", **{f"{part}_{y[n]}_{n}": pixels[n] for n, part in enumerate(parts)})
    own = ["dataset=image_folder", f"dataset.path={tmp_path}/digits", "dataset.channels=3", "iterations=15"]
    own += ["model._target_=mynet.network", "model.width=6", "split.after=[0]", "optimizer=adam,gotmare", "seeds=[0,1]"]
    launch(*own, *places(tmp_path))
    runs, table = stored(tmp_path), report_of_launch(tmp_path)
    assert len(runs) == 2 and (table["mean"] > 90).all()
    assert not table["setting"].str.contains("seeds").any()  # two are asked for, and none is missing
    for run in runs:
        config: Any = OmegaConf.load(run.folder / "config.yaml")
        assert (config.model.width, list(config.split.after), config.split._target_) == (6, [0], "admm.blocks.split")
        assert config.init._target_ == "admm.models.as_constructed" and "mynet.py" in run.record.sources
        assert {"model.width=6", "split.after=[0]"} < set(run.record.overrides)
        assert not {"split=after", "model=own", "init=as_constructed"} & set(run.record.overrides)
        assert run.record.dataset.name == "image_folder" and run.record.dataset.sha256


def test_what_is_missing_is_told_with_the_way_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: dataset.path: none is given; dataset=npz dataset.path=my.npz"):
        launch("experiment=own", "optimizer=sgd", *places(tmp_path))
    with pytest.raises(SystemExit, match=f"error: dataset.path: there is no file nowhere.npz in {Path.cwd()}"):
        launch("dataset=npz", "dataset.path=nowhere.npz", "optimizer=sgd", *places(tmp_path))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("dataset=my.npz", "your own: dataset=npz dataset.path=my.npz"),
        ("model=torchvision.models.resnet18", "your own: model._target_=torchvision.models.resnet18"),
    ],
)
def test_a_file_or_a_function_in_the_place_of_a_choice_has_a_hint(override: str, hint: str) -> None:
    with pytest.raises(Exception) as error:
        multirun(override, "experiment=own")
    (line,) = hints([override], error.value)
    assert hint in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["optimizer=gotmare,sgd,adam", "optimizer.theta_step=0.1"],
            "sgd-tuned, adam-tuned: no key 'optimizer.theta_step': optimizer has _target_, batch_size, epoch_parts, "
            "iterations, step_size, theta_update; did you mean step_size?; it is there in gotmare-tuned. Give each "
            "optimizer its own values in a launch of its own, or in its row (docs/extending.md#a-row)",
        ),
        (
            ["optimizer=adam,sgd", "setting=default", "optimizer.theta_update.beta1=0.1"],
            "sgd: no key 'optimizer.theta_update.beta1': optimizer.theta_update has _target_, momentum, weight_decay; "
            "it is there in adam. ",
        ),
        (
            ["row=mnist_shallow/sgd-faithful,mnist_shallow/sgd-tuned", "optimizer.step_size.start=1"],
            "sgd-faithful: no key 'optimizer.step_size.start': optimizer.step_size is a value here, without keys; ",
        ),
        (
            ["optimizer=adam,sgd", "optimizer.step_siz=1"],
            "no key 'optimizer.step_siz': optimizer has _target_, batch_size, epoch_parts, iterations, step_size, the",
        ),
    ],
)
def test_a_key_that_some_methods_do_not_have_names_these_and_the_others(
    overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(failures, "unfinished_sweep", [])
    given = ["experiment=digits_shallow", *overrides, *places(tmp_path)]
    with pytest.raises(HydraException) as error:
        multirun(*given)
    (line,) = hints(given, error.value)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["+baseline=sgd", "experiment=digits_shallow"], "no key 'baseline': the keys are angle_samples, "),
        (["-m", "++seedz=1,2"], r"no key 'seedz': .*; did you mean seeds\?$"),
        (["experiment=own,angle", "+a.b=1"], "no key 'a': "),
        (["+dataset@other=mnist"], "no key 'other': "),
        (["+optimizer.eta=1", "++iterations=3", "~model", "+model={_target_: a.b}", "+augmentation=crop_flip"], None),
        (["++report.width=3", "experiment=mnist_shallow", "+hydra.sweeper.params={a: 1}"], None),
        (["+own=1", "experiment=mine"], None),
        (["+of_a_row=1", "experiment=mine"], None),
        (["+mine=one"], None),
        (["experiment=nowhere", "+x=1"], None),  # Hydra refuses it
    ],
)
def test_an_added_key_that_no_file_has_is_refused(tmp_path: Path, overrides: list[str], found: str | None) -> None:
    for name in ("experiment/mine", "row/mine/sgd-new", "mine/one"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nown: 0\n")
    (tmp_path / "row/mine/sgd-new.yaml").write_text("# @package _global_\nof_a_row: 0\n")
    first, *rest = [*unknown_additions([*overrides, f"hydra.searchpath=[file://{tmp_path}]"]), ""]
    assert re.search(found, first) if found else first == ""
    assert not found or rest[0].startswith("+ adds no such key; the file of an experiment or a row may have one")


def test_a_race_of_numbers_is_refused(tmp_path: Path) -> None:
    x, y = DIABETES
    np.savez(tmp_path / "my.npz", x_train=x, y_train=y)
    numbers = ["dataset=npz", f"dataset.path={tmp_path}/my.npz", "dataset.task=regression", "dataset.holdout=40"]
    race = ["experiment=mnist_walltime", "optimizers=[sgd]", "setting=default", "hydra.mode=MULTIRUN"]
    with pytest.raises(SystemExit, match=r"error: dataset.task: a race measures accuracy, which regression does not"):
        launch(*race, *numbers, *places(tmp_path))
