"""Pre-trained face networks: their files, their maps and their embeddings. No network needed."""

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from admm.blocks import split
from admm.models import initialiser
from experiments.faces import backbones
from experiments.faces.backbones import (
    BACKBONES,
    Affine,
    BackboneError,
    ResidualBlock,
    dlib_parameters,
    dlib_resnet29,
    inception_resnet_v1,
)

# --- what dlib writes


def numbers(*values):
    return b"".join(bytes([size := (v.bit_length() + 7) // 8 or 1]) + v.to_bytes(size, "little") for v in values)


def tensor(values, *shape):
    return numbers(2, *shape) + np.asarray(values, "<f4").tobytes()


def layer(name, parameters=b"", after=b""):
    """With the empty tensors of a network that is not in training: gradient, output and the parameters' gradient."""
    return numbers(len(name)) + name.encode() + parameters + after + b"110" + 3 * tensor([], 0, 0, 0, 0)


def convolution(values, filters, channels, kernel):
    shape = numbers(filters, kernel, kernel, 1, 1, 0, 0, 1, filters, channels, kernel, kernel, 1, 1, filters, 1, 1)
    return layer("con_4", tensor(values, len(values), 1, 1, 1), shape)


def affine(values):
    channels = len(values) // 2
    return layer("affine_", tensor(values, len(values), 1, 1, 1), numbers(1, 1, channels, 1, 1, 1, 1, channels, 1, 1))


def linear(values):
    inputs, outputs = values.shape
    return layer("fc_2", numbers(outputs, inputs) + tensor(values, inputs, outputs, 1, 1), numbers(1, inputs, outputs))


HEADER = numbers(1, 1, 1, 13) + b"loss_metric_2" + numbers(2, 2, 1, 2, 2, 3, 21) + b"input_rgb_image_sized"


def test_parameters_are_found_between_the_other_content():
    rng = np.random.default_rng(0)
    long, short, matrix = (rng.normal(size=n).astype(np.float32) for n in (70_000, 4, (300, 2)))
    data = HEADER + convolution(long, 16, 486, 3) + affine(short) + layer("relu_") + linear(matrix)
    found = dlib_parameters(data)
    assert [values.dtype for values in found] == 3 * [np.float32]
    for values, expected in zip(found, (long[:, None], short[:, None], matrix), strict=True):
        np.testing.assert_array_equal(values, expected)


# --- dlib's ResNet-29

FILTERS = [(32, 3, 7)] + 6 * [(32, 32, 3)] + [(64, 32, 3)] + 7 * [(64, 64, 3)] + [(128, 64, 3)] + 5 * [(128, 128, 3)]
FILTERS += [(256, 128, 3)] + 7 * [(256, 256, 3)]


@pytest.fixture(scope="module")
def stored():
    """Random parameters in the order of dlib's file, and the file's content."""
    rng, data, parameters = np.random.default_rng(0), HEADER, []
    for filters, channels, kernel in FILTERS:
        weight = rng.normal(scale=(channels * kernel**2) ** -0.5, size=(filters, channels, kernel, kernel))
        bias, scale, shift = 0.1 * rng.normal(size=(3, filters))
        data += convolution(np.append(weight, bias), *weight.shape[:3]) + affine(np.append(1 + scale, shift))
        parameters += [weight, bias, 1 + scale, shift]
    matrix = rng.normal(size=(256, 128))
    return SimpleNamespace(data=data + linear(matrix), parameters=[*parameters, matrix.T])


@pytest.fixture
def dlib_file(stored, tmp_path, monkeypatch):
    """A file of random parameters that passes for the published one."""
    path = tmp_path / "random.dat"
    path.write_bytes(stored.data)
    monkeypatch.setattr(backbones, "DLIB_SHA256", hashlib.sha256(stored.data).hexdigest())
    return path


def test_a_file_s_tensors_become_the_parameters(stored, dlib_file):
    network = dlib_resnet29(str(dlib_file))
    for ours, expected in zip(network.parameters(), stored.parameters, strict=True):
        torch.testing.assert_close(ours, nn.Parameter(torch.tensor(expected, dtype=torch.float32)), rtol=0, atol=0)


def test_dlib_s_stages_and_their_maps(dlib_file):
    network, x, shapes = dlib_resnet29(dlib_file), 255 * torch.rand(2, 3, 150, 150), {}
    for name, stage in network.named_children():
        x = stage(x)
        shapes[name] = tuple(x.shape[1:])
        assert x.min() >= 0 or name in ("normalise", "fc")
    assert shapes == {
        "normalise": (3, 150, 150), "conv1": (32, 35, 35), "stage32": (32, 35, 35), "stage64": (64, 17, 17),
        "stage128": (128, 8, 8), "stage256": (256, 4, 4), "stage256b": (256, 2, 2), "pool": (256, 1, 1),
        "flatten": (256,), "fc": (128,),
    }  # fmt: skip


def test_dlib_s_network_can_be_cut_into_blocks(dlib_file):
    network, x = dlib_resnet29(dlib_file).double().eval(), 255 * torch.rand(2, 3, 150, 150, dtype=torch.float64)
    blocks = split(network, after=["stage128", "stage256"])
    theta = blocks.initial([0], initialise=lambda network: None, like=x)
    assert [names[-1] for names in blocks.names] == ["stage128.2", "stage256.2", "fc"]
    torch.testing.assert_close(blocks.forward(theta, x[None])[0], network(x))


def test_another_file_is_refused(stored, dlib_file):
    dlib_file.write_bytes(stored.data[:-1])
    with pytest.raises(BackboneError, match=r"random\.dat: is damaged or another file(.|\n)*pip install"):
        dlib_resnet29(dlib_file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"none\.dat: cannot be read \(No such file"):
        dlib_resnet29(tmp_path / "none.dat")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"face-recognition-models is not installed.*path.* as backbone\.weights"):
        dlib_resnet29()


def test_the_package_is_found_without_being_imported(dlib_file, tmp_path, monkeypatch):
    package = tmp_path / "face_recognition_models"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    dlib_file.rename(package / "models" / backbones.DLIB_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    dlib_resnet29()


@pytest.mark.skipif(find_spec("face_recognition_models") is None, reason="needs the package face-recognition-models")
def test_the_embedding_is_dlib_s_own():
    """dlib_resnet_check.npz holds an image [150, 150, 3] and the embedding that dlib computes for it."""
    check = Path(os.environ.get("ADMM_DATA", "data"), "dlib_resnet_check.npz")
    if not check.exists():
        pytest.skip(f"needs {check.name} in the folder ADMM_DATA")
    with np.load(check) as arrays:
        image, embedding = (torch.tensor(arrays[key]) for key in ("image", "embedding"))
    with torch.inference_mode():
        ours = dlib_resnet29().eval()(image.movedim(-1, 0)[None].float())
    torch.testing.assert_close(ours[0], embedding, rtol=0, atol=1e-5, check_dtype=False)


# --- dlib's residual block


def naive_convolution(x, convolution, stride, padding):
    weight, bias = (p.detach().numpy() for p in convolution.parameters())
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((size - 3) // stride + 1 for size in x.shape[1:])
    output = np.empty((len(weight), rows, columns))
    for i, j in np.ndindex(rows, columns):
        output[:, i, j] = np.tensordot(weight, x[:, stride * i :, stride * j :][:, :3, :3], 3) + bias
    return output


def naive_affine(x, affine):
    return np.stack(
        [w * image + b for w, image, b in zip(affine.weight.tolist(), x, affine.bias.tolist(), strict=True)]
    )


def naive_block(x, block, down):
    inner = naive_convolution(x, block.conv1, stride=1 + down, padding=1 - down)
    inner = naive_affine(inner, block.affine1).clip(min=0)
    inner = naive_affine(naive_convolution(inner, block.conv2, stride=1, padding=1), block.affine2)
    if down:
        rows, columns = (size // 2 for size in x.shape[1:])
        x = sum(x[:, i : 2 * rows : 2, j : 2 * columns : 2] for i in (0, 1) for j in (0, 1)) / 4
    total = np.zeros(np.maximum(inner.shape, x.shape))
    for part in (inner, x):
        channels, rows, columns = part.shape
        total[:channels, :rows, :columns] += part
    return total.clip(min=0)


@pytest.mark.parametrize(
    "channels, down, image, map_",
    [
        ((3, 3), False, (4, 5), (4, 5)),
        ((2, 5), True, (7, 9), (3, 4)),
        ((2, 5), True, (8, 6), (4, 3)),  # the convolution gives 3 by 2
        ((4, 4), True, (6, 7), (3, 3)),
    ],
)
def test_a_residual_block_s_sum_has_zeros_behind_what_is_smaller(channels, down, image, map_):
    torch.manual_seed(0)
    block, x = ResidualBlock(*channels, down).double(), torch.randn(2, channels[0], *image, dtype=torch.float64)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    expected = np.stack([naive_block(image.numpy(), block, down) for image in x])
    assert expected.shape == (2, channels[1], *map_)
    torch.testing.assert_close(block(x), torch.from_numpy(expected), check_dtype=True)


def test_an_initialisation_makes_affine_layers_the_identity():
    network = nn.Sequential(Affine(2))
    nn.init.normal_(network[0].weight)
    initialiser("kaiming_normal")(network)
    assert network[0].weight.tolist() == [1, 1] and network[0].bias.tolist() == [0, 0]


# --- facenet-pytorch's Inception-ResNet-v1


@pytest.fixture
def package():
    return pytest.importorskip("facenet_pytorch", reason="needs the package facenet-pytorch")


def assert_same_embedding(ours, theirs):
    images = 255 * torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs((images - 127.5) / 128), rtol=0, atol=1e-6)


def test_the_embedding_is_the_package_s_own(package):
    ours, theirs = inception_resnet_v1(None), package.InceptionResnetV1()
    theirs.load_state_dict(ours.state_dict())
    assert_same_embedding(ours.eval(), theirs.eval())


def test_a_file_with_the_package_s_state_dict(package, tmp_path):
    theirs = package.InceptionResnetV1(classify=True, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    theirs.classify = False
    ours = inception_resnet_v1(tmp_path / "theirs.pt")
    assert_same_embedding(ours.eval(), theirs.eval())
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    assert_same_embedding(inception_resnet_v1(str(tmp_path / "ours.pt")).eval(), theirs)


def test_inception_s_last_map_and_blocks(package):
    network = inception_resnet_v1(None)
    assert list(dict(network.named_children())) == [
        "standardise", "conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "conv2d_4b",
        "repeat_1", "mixed_6a", "repeat_2", "mixed_7a", "repeat_3", "block8", "avgpool_1a", "flatten", "last_linear",
        "last_bn", "unit_length",
    ]  # fmt: skip
    with torch.inference_mode():
        repeat_3 = network[:13](255 * torch.rand(2, 3, 160, 160))
        block8 = network.block8(repeat_3)
    assert repeat_3.shape == block8.shape == (2, 1792, 3, 3)
    assert repeat_3.min() == 0 and block8.min() < 0
    assert [names[-1] for names in split(network, after=["repeat_3.4", "block8"]).names][:2] == ["repeat_3.4", "block8"]


def test_published_weights_come_from_the_package(package, monkeypatch):
    asked = []
    monkeypatch.setattr(
        f"{package.__name__}.models.inception_resnet_v1.load_weights", lambda _, name: asked.append(name)
    )
    networks = [inception_resnet_v1(), inception_resnet_v1("casia-webface")]
    assert asked == ["vggface2", "casia-webface"]
    assert not any(hasattr(network, "logits") for network in networks)


def test_a_failed_download_says_what_else_to_give(package, monkeypatch):
    def fail(network, name):
        raise URLError("no network")

    monkeypatch.setattr(f"{package.__name__}.models.inception_resnet_v1.load_weights", fail)
    with pytest.raises(
        BackboneError,
        match=r"download of vggface2 failed \(URLError: .*no network.*as backbone\.weights",
    ):
        inception_resnet_v1()


@pytest.mark.parametrize("content", [None, b"damaged", {"other": torch.zeros(1)}, torch.zeros(1)])
def test_another_state_dict_is_refused(content, package, tmp_path):
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BackboneError, match=r"other\.pt: expected .*state dict.*vggface2, casia-webface") as caught:
        inception_resnet_v1(path)
    assert len(str(caught.value)) < 1000


def test_facenet_pytorch_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(BackboneError, match=r"pip install facenet-pytorch==2\.5\.3"):
        inception_resnet_v1(None)


# --- both


@pytest.mark.parametrize("name, channels, places", [("dlib_resnet29", 256, 4), ("inception_resnet_v1", 1792, 3)])
def test_the_size_and_the_cut_of_each_backbone(name, channels, places, dlib_file):
    if name == "inception_resnet_v1":
        pytest.importorskip("facenet_pytorch", reason="needs the package facenet-pytorch")
    backbone = BACKBONES[name]
    network = backbone.build(dlib_file if name == "dlib_resnet29" else None)
    x = torch.rand(1, 3, backbone.size, backbone.size)
    for child, stage in network.named_children():
        x = stage(x)
        if child == OmegaConf.load(Path(__file__).parents[1] / f"experiments/conf/backbone/{name}.yaml").cut:
            break
    assert x.shape == (1, channels, places, places)
