"""Pre-trained face networks as plain `nn.Sequential`s, which can be cut after each of their named children.

They take RGB images as floats in 0 … 255, [n, 3, size, size], and give embeddings [n, d]. Like every new module they
are in training mode and all their parameters require a gradient.
"""

import hashlib
import re
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

DLIB_FILE = "dlib_face_recognition_resnet_model_v1.dat"
DLIB_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
FACENET_WEIGHTS = ("vggface2", "casia-webface")

_PROVIDE_DLIB = f"Either pip install face-recognition-models, or give the path of {DLIB_FILE} as backbone.weights."


class BackboneError(RuntimeError):
    """Pre-trained weights, or the package of a network, are missing or damaged; the message says how to get them."""


class Standardise(nn.Module):
    """(x - mean) / scale for images x [n, C, H, W], with one fixed mean for each channel."""

    def __init__(self, mean: Sequence[float], scale: float) -> None:
        super().__init__()
        self.scale = scale
        # Not persistent, as a state dict holds what is learned.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.scale


# --- dlib's ResNet-29


class Affine(nn.Module):
    """weight · x + bias for images x [n, C, H, W], with one weight and one bias for each channel: dlib's `affine_`,
    which a trained batch normalisation has become."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer to the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a short cut without parameters, as dlib has them: images [n, before, H, W] to
    [n, after, H, W], or to [n, after, H // 2, W // 2] where `down`.

    A convolution with stride 2 is not padded, so that for even H it gives one row less than the pooled short cut. What
    is smaller in the sum, in rows, columns or channels, has zeros behind it; so before <= after.
    """

    def __init__(self, before: int, after: int, down: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=2) if down else nn.Conv2d(before, after, 3, padding=1)
        self.affine1 = Affine(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.affine2 = Affine(after)
        self.shortcut = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.affine1(self.conv1(x)))
        return functional.relu(_padded_sum(self.affine2(self.conv2(inner)), self.shortcut(x)))


def dlib_resnet29(weights: str | Path | None = None) -> nn.Sequential:
    """dlib's face recognition network, a ResNet with 29 convolutions (King 2017, dlib_face_recognition_resnet_model_v1,
    CC0): RGB images [n, 3, 150, 150] in 0 … 255 to embeddings [n, 128], less than 0.6 apart for one person.

    Children, with their output for an image: `normalise`; `conv1` (`conv`, `affine`, `relu`, `maxpool`) [32, 35, 35];
    the residual stages `stage32` [32, 35, 35], `stage64` [64, 17, 17], `stage128` [128, 8, 8], `stage256` [256, 4, 4]
    and `stage256b` [256, 2, 2], which are never negative; `pool`, `flatten`, `fc` [128].

    weights: the file dlib_face_recognition_resnet_model_v1.dat; None: the one in the installed PyPI package
        face-recognition-models.

    Raises BackboneError where there is no such file, or its content is not the published one.
    """
    stem = OrderedDict(
        conv=nn.Conv2d(3, 32, 7, stride=2), affine=Affine(32), relu=nn.ReLU(), maxpool=nn.MaxPool2d(3, 2)
    )
    network = nn.Sequential(
        OrderedDict(
            normalise=Standardise((122.782, 117.001, 104.298), 256),
            conv1=nn.Sequential(stem),
            stage32=nn.Sequential(*(ResidualBlock(32, 32, down=False) for _ in range(3))),
            stage64=_stage(32, 64, blocks=4),
            stage128=_stage(64, 128, blocks=3),
            stage256=_stage(128, 256, blocks=3),
            stage256b=_stage(256, 256, blocks=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(256, 128, bias=False),
        )
    )
    _fill(network, dlib_parameters(_read_dlib(weights)))
    return network


# dlib writes a number as how many bytes it takes, then these, and a tensor as the number 2, its four sizes and its
# floats. A layer's parameters follow its length-prefixed name; those of a linear layer, its outputs and inputs too.
_NUMBER = rb"(?:\x01.|\x02..|\x03...)"
_HEADER = re.compile(
    rb"(?:\x01\x05con_4|\x01\x07affine_|\x01\x04fc_2" + 2 * _NUMBER + rb")"
    rb"\x01\x02(" + _NUMBER + rb")(" + _NUMBER + rb")\x01\x01\x01\x01",
    re.DOTALL,
)


def dlib_parameters(data: bytes) -> list[NDArray[np.float32]]:
    """The parameters of each convolution, affine and linear layer [rows, columns] in a network saved by dlib, from the
    input on.

    They are [filters and then biases, 1], [weights and then biases, 1] and [inputs, outputs]. The layers' sizes, and
    the empty tensors of gradients and outputs, are passed over.
    """
    tensors, position = [], 0
    while header := _HEADER.search(data, position):
        rows, columns = (int.from_bytes(number[1:], "little") for number in header.groups())
        values = np.frombuffer(data, "<f4", rows * columns, header.end())
        tensors.append(values.astype(np.float32).reshape(rows, columns))
        position = header.end() + values.nbytes
    return tensors


def _stage(before: int, after: int, blocks: int) -> nn.Sequential:
    plain = (ResidualBlock(after, after, down=False) for _ in range(blocks - 1))
    return nn.Sequential(ResidualBlock(before, after, down=True), *plain)


def _padded_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y for images [n, C, H, W] of different C, H and W, each with zeros behind it up to the larger size."""
    channels, height, width = (max(sizes) for sizes in zip(x.shape[1:], y.shape[1:], strict=True))
    x, y = (
        functional.pad(z, (0, width - z.shape[3], 0, height - z.shape[2], 0, channels - z.shape[1])) for z in (x, y)
    )
    return x + y


def _read_dlib(weights: str | Path | None) -> bytes:
    """The published file's content."""
    path = _packaged() if weights is None else Path(weights).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read ({error.strerror}). {_PROVIDE_DLIB}") from error
    if (found := hashlib.sha256(data).hexdigest()) != DLIB_SHA256:
        raise BackboneError(
            f"{path}: is damaged or another file. The SHA-256 of its {len(data):,} bytes is\n  {found}, expected\n"
            f"  {DLIB_SHA256} ({DLIB_FILE}). {_PROVIDE_DLIB}"
        )
    return data


def _packaged() -> Path:
    """Where the package keeps the file; not imported, as that needs the `pkg_resources` of an old setuptools."""
    package = find_spec("face_recognition_models")
    if package is None or package.origin is None:
        raise BackboneError(f"{DLIB_FILE}: the package face-recognition-models is not installed. {_PROVIDE_DLIB}")
    return Path(package.origin).parent / "models" / DLIB_FILE


def _fill(network: nn.Sequential, tensors: list[NDArray[np.float32]]) -> None:
    """Set the parameters, from `dlib_parameters`."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | Affine | nn.Linear)]
    for layer, values in zip(layers, tensors, strict=True):
        ordered = values.T if isinstance(layer, nn.Linear) else values
        parameters = list(layer.parameters())  # weight, bias
        parts = torch.from_numpy(ordered.ravel()).split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))


# --- facenet-pytorch's Inception-ResNet-v1


class UnitLength(nn.Module):
    """x / |x| for each row of x [n, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1)


def inception_resnet_v1(weights: str | Path | None = "vggface2") -> nn.Sequential:
    """The Inception-ResNet-v1 of the package facenet-pytorch (Szegedy et al. 2017; weights of Sandberg's facenet): RGB
    images [n, 3, 160, 160] in 0 … 255 to embeddings [n, 512] of length 1.

    Children: `standardise`, which is (x - 127.5) / 128; the package's own `conv2d_1a`, …, `repeat_3` and `block8`, both
    [1792, 3, 3] for an image, `avgpool_1a`, `flatten`, `last_linear`, `last_bn`; and `unit_length`. The package's
    drop-out between pooling and linear layer, which evaluation leaves out, is not there, as blocks refuse it. So in
    evaluation the embedding is the package's own.

    The last convolution is that of `block8`. No ReLU follows it in the published network, nor here, and so its output
    has both signs: what needs it non-negative, as NMF does, takes its ReLU. The output of `repeat_3` is never negative.

    weights: "vggface2" (Cao et al. 2018) or "casia-webface" (Yi et al. 2014), which the package downloads and keeps;
        the path of a file with the state dict of the package's network or of this one; None: random.

    Raises BackboneError where the package is not installed, the download fails, or there is no such file.
    """
    published = weights if weights in FACENET_WEIGHTS else None
    layers: OrderedDict[str, nn.Module] = OrderedDict(standardise=Standardise((127.5,) * 3, 128))
    for name, child in _facenet(published).named_children():
        if name == "last_linear":
            layers["flatten"] = nn.Flatten()
        if name not in ("dropout", "logits"):
            layers[name] = child
    network = nn.Sequential(layers | {"unit_length": UnitLength()})
    if weights is not None and published is None:
        _load_state_dict(network, Path(weights).expanduser())
    return network


def _facenet(pretrained: str | Path | None) -> nn.Module:
    """The package's own network, with children in the order of evaluation."""
    try:
        package = import_module("facenet_pytorch")
    except ImportError as error:
        raise BackboneError(
            f"inception_resnet_v1 needs the package facenet-pytorch, which cannot be imported ({error}): "
            f"pip install facenet-pytorch==2.5.3"
        ) from error
    try:
        network: nn.Module = package.InceptionResnetV1(pretrained=pretrained)
    except Exception as error:  # broken connections and damaged files raise anything
        raise BackboneError(
            f"facenet-pytorch's download of {pretrained} failed ({_reason(error)}). Without a network, give the path "
            f"of a state dict as backbone.weights, such as of https://github.com/timesler/facenet-pytorch/releases/tag/v2.2.9."
        ) from error
    return network


def _load_state_dict(network: nn.Sequential, path: Path) -> None:
    """Fill the network from a file, leaving out the classifier `logits` that the package's own files hold."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith("logits.")})
    except Exception as error:  # damaged and other files raise anything
        raise BackboneError(
            f"{path}: expected the file of a state dict of facenet-pytorch's InceptionResnetV1, or one of the names "
            f"{', '.join(FACENET_WEIGHTS)} ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)  # hundreds of names, where none fits


# --- both


@dataclass(frozen=True)
class Backbone:
    """A face network and what is to be known before it is used."""

    build: Callable[..., nn.Sequential]
    size: int  # height and width of its images


BACKBONES = {
    "dlib_resnet29": Backbone(dlib_resnet29, size=150),
    "inception_resnet_v1": Backbone(inception_resnet_v1, size=160),
}
