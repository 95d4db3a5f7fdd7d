"""Small networks of many kinds, with a few samples and places to cut them: what "any traced network" has to cover.

They are written as their users write them, and are not adapted to the library. The torchvision networks are those of
`torchvision.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from admm.blocks import Blocks, split
from admm.losses import CrossEntropy

models = pytest.importorskip("torchvision.models")
ops = pytest.importorskip("torchvision.ops")

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]  # what `Problem` takes as x
SAMPLES = 7


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean over samples of the cross-entropy, summed over the positions of each; classes come last."""
    return functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="sum") / len(y)


def pixel_cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """The same where classes come first, as in images [n, C, H, W]."""
    return functional.cross_entropy(outputs, y, reduction="sum") / len(y)


@dataclass(frozen=True, eq=False)
class Network:
    """A network, a few samples, and where it is cut.

    Args:
        name: what the tests call it.
        build: makes the network with parameters from PyTorch's global random state.
        inputs: x, with samples first.
        targets: y [N, ...].
        cuts: the names of the modules after which blocks end.
        step_size: of Θ, so small that rounding errors do not grow from step to step.
        loss: J, as `Problem` takes it.
        mean_loss: the mean of J over samples, by PyTorch's own function.
        tied: the names of parameters that several blocks share.
        options: further arguments of `split`.
        is_listed: whether it is cut as a list of its children, since it cannot be traced.
        batch_size: of mini-batches.
        size: "large" networks are evaluated only, "medium" ones train for few steps.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    targets: Tensor
    cuts: tuple[str, ...]
    step_size: float = 0.01
    loss: Any = field(default_factory=CrossEntropy)
    mean_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    tied: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    is_listed: bool = False
    batch_size: int = 4
    size: Literal["small", "medium", "large"] = "small"

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0) -> nn.Module:
        """Return the network from a seed, without parameters that are 0, which would hide what comes before them, and
        with running statistics that are not those of the start."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            network = self.build().train()
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
            call(network, self.inputs)
        return network

    def split(self, network: nn.Module, cuts: Sequence[str] | None = None) -> Blocks:
        """Return the network cut at its places, or at others."""
        if self.is_listed and cuts is None:
            return split(list(network.children()))
        return split(network, after=list(self.cuts if cuts is None else cuts), **self.options)

    def block_of(self, network: nn.Module) -> dict[str, int]:
        """Return the number of the block that each parameter is in, from 0; modules are in the order of their calls."""
        modules = [name for name, _ in network.named_modules()]
        ends = [max(k for k, name in enumerate(modules) if f"{name}.".startswith(f"{cut}.")) for cut in self.cuts]
        owners = {name: modules.index(name.rpartition(".")[0]) for name, _ in network.named_parameters()}
        return {name: sum(owner > end for end in ends) for name, owner in owners.items()}

    def double(self) -> Network:
        """Return the same in float64."""
        x = changed(self.inputs, lambda v: v.double() if v.is_floating_point() else v)
        return replace(self, build=lambda: self.build().double(), inputs=x)

    def without_draws(self) -> Network:
        """Return the same with probability 0 of whatever is dropped."""
        return replace(self, build=lambda: without_draws(self.build()))

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers in training."""
        return any(p > 0.0 for _, _, p in probabilities(self.build()))


def call(network: nn.Module, x: Inputs) -> Any:
    """Return what the network returns for inputs as `Problem` takes them."""
    if isinstance(x, dict):
        return network(**x)
    return network(*x) if isinstance(x, tuple) else network(x)


def changed(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs with each tensor changed."""
    if isinstance(x, dict):
        return {name: change(v) for name, v in x.items()}
    return tuple(map(change, x)) if isinstance(x, tuple) else change(x)


def probabilities(network: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Yield the probabilities with which modules drop something: the module, the attribute and its value."""
    for module in network.modules():
        for name in ("p", "dropout"):
            if isinstance(value := vars(module).get(name), float):
                yield module, name, value


def without_draws(network: nn.Module) -> nn.Module:
    """Return the network with all these probabilities 0."""
    for module, name, _ in list(probabilities(network)):
        setattr(module, name, 0.0)
    return network


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class UNet(nn.Module):
    """A skip from `down1` to `up1` and one from `down2` to `up2`."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down1, self.down2 = self.stage(2, width), self.stage(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.bottom = self.stage(2 * width, 2 * width)
        self.up2, self.up1 = self.stage(4 * width, width), self.stage(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    @staticmethod
    def stage(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(self.pool(skip1))
        z = self.bottom(self.pool(skip2))
        z = functional.interpolate(z, scale_factor=2)
        z = self.up2(torch.cat([z, skip2], dim=1))
        z = functional.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.up1(torch.cat([z, skip1], 1)))


class TwoInputs(nn.Module):
    """An image, and numbers that only the last layers see."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6))
        self.middle = nn.Linear(6, 5)
        self.head = nn.Linear(5 + 3, 3)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        z = functional.gelu(self.middle(self.features(image)))
        return self.head(torch.cat([z, numbers], dim=1))


class Recurrent(nn.Module):
    """Two LSTMs, the last state of which is classified; a state is [1, n, 6], with samples second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.second = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        z, _ = self.lstm(self.embedding(tokens))
        _, (state, _) = self.second(z)
        return self.head(state[-1])


class Gated(nn.Module):
    """A bidirectional GRU in two layers, samples second, both of whose outputs are used."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 3, num_layers=2, bidirectional=True, dropout=0.2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.gru(x.transpose(0, 1))
        mean = self.norm(outputs.mean(0))
        return self.head(torch.cat([mean, states[-2], states[-1]], dim=-1))


class TextClassifier(nn.Module):
    """PyTorch's own encoder with a mask of padding, which is token 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 6, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        z = self.embedding(tokens) + self.position
        z = self.encoder(z, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return self.head((z * kept).sum(1) / kept.sum(1))


class TextClassifierTimeFirst(nn.Module):
    """The same with samples second between the layers; the mask may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = ids.eq(0) if mask is None else mask
        z = self.embedding(ids).transpose(0, 1)
        z = self.encoder(z, src_key_padding_mask=padding)
        return self.head(z.transpose(0, 1).mean(dim=1))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (width // self.heads) ** 0.5 + self.mask[:length, :length]
        z = self.drop(scores.softmax(-1)) @ v
        return self.project(z.transpose(1, 2).reshape(n, length, width))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, length, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model of characters, whose head is its embedding."""

    def __init__(self, characters: int = 9, width: int = 8, length: int = 6, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([GPTBlock(width, 2, length, dropout) for _ in range(3)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.size(1)
        position = torch.arange(0, length, dtype=torch.long, device=tokens.device)
        z = self.drop(self.tokens(tokens) + self.positions(position))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z))


class GraphConvolution(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)

    def forward(self, z: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.linear(z).squeeze(0)).unsqueeze(0)


class GraphNetwork(nn.Module):
    """Kipf & Welling's network; the whole graph is the one sample."""

    def __init__(self, nodes: int = 12) -> None:
        super().__init__()
        edges = (torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(3)) < 0.2).float()
        edges = ((edges + edges.T + torch.eye(nodes)) > 0).float()
        scale = edges.sum(1).rsqrt()
        self.register_buffer("adjacency", (scale[:, None] * edges * scale).to_sparse())
        self.conv1, self.conv2, self.conv3 = GraphConvolution(4, 6), GraphConvolution(6, 6), GraphConvolution(6, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        z = functional.relu(self.conv1(x, self.adjacency))
        z = functional.relu(self.conv2(self.drop(z), self.adjacency))
        return self.conv3(z, self.adjacency)


class FineTuned(nn.Module):
    """Pre-trained stages that are not to be trained, but for the last one, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2 = self.stage(1, 3), self.stage(3, 4), self.stage(4, 4)
        self.head = nn.Linear(4, 3)
        for module in (self.stem, self.stage1):
            module.requires_grad_(False)

    @staticmethod
    def stage(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        z = self.stage2(self.stage1(self.stem(x)))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(z, 1), 1))


class LowRank(nn.Module):
    """A frozen linear layer and a trained change of low rank, which is 0 at the start (Hu et al. 2021, LoRA)."""

    def __init__(self, before: int, after: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(before, after).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, before) * 0.3), nn.Parameter(torch.zeros(after, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Shapes(nn.Module):
    """Sizes that are taken before the cut and used after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).sigmoid()
        b, c, h, w = z.shape
        scale = c**-0.5
        z = self.mix(z.flatten(2).transpose(1, 2))
        z = z.transpose(1, 2).reshape(b, c, h, w) * scale
        return self.out(z).view(b, 3, h * w).sum(2)


class Drop(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.p, self.training)


class StochasticDepth(nn.Module):
    """Residual layers of which each sample skips some (Huang et al. 2016), and dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()) for _ in range(3)])
        self.depth = nn.ModuleList([ops.StochasticDepth(0.1 * (k + 1), "row") for k in range(3)])
        self.p, self.drop, self.head = 0.1, Drop(0.25), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        for layer, depth in zip(self.layers, self.depth, strict=True):
            z = z + depth(layer(z))
        return self.head(functional.dropout(self.drop(z), self.p, self.training))


class Refined(nn.Module):
    """Layers that are called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.refine, self.act = nn.Linear(5, 6), nn.Linear(6, 6), nn.Tanh()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.first(x))
        for _ in range(3):
            z = self.act(self.refine(z))
        return self.head(z)


class InPlace(nn.Module):
    """Operations that overwrite what has crossed a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.norm1(self.conv1(x)))
        z = self.norm2(self.conv2(identity))
        z += identity
        return self.head(self.relu(z).mean((2, 3)))


class OwnTensors(nn.Module):
    """Parameters, buffers and constants of the network itself, some of them used before and after the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.factors = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scale.softmax(0)
        z = self.first(x * self.shift.exp().mean()).tanh() - self.mean
        for factor in self.factors:
            z = torch.tanh(z @ factor) * self.mean.exp()
        return self.head(z * weights + self.shift) * torch.tensor([1.0, 2.0, 3.0]).to(z.dtype)


class Several(nn.Module):
    """A stage that returns a dictionary, of which one part is a mask."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gate = nn.Linear(5, 6), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"z": torch.tanh(self.linear(x)), "gates": [self.gate(x)], "positive": x[:, :1] > 0.0}

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = self.Encoder(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(x)
        z = torch.cat([found["z"], found["gates"][0].sigmoid()], dim=1)
        return self.head(torch.where(found["positive"], z, 0.5 * z))


class MixedTypes(nn.Module):
    """A trunk in bfloat16, and a head in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)).to(torch.bfloat16)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.trunk(x.bfloat16()).float()))


class Branching(nn.Module):
    """A stage that depends on its values, and returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.skip = nn.Linear(5, 6), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.linear(x)
        return (z.tanh() if float(x.sum()) > 0.0 else z.sin()), self.skip(x)


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(8, 3)

    def forward(self, z: Tensor, skipped: Tensor) -> Tensor:
        for _ in range(int(skipped.detach().abs().max().ceil())):
            z = self.linear(z).sin()
        return self.head(torch.cat([z, skipped], dim=1))


class Untraceable(nn.Sequential):
    """Two stages, the second of which takes two tensors."""

    def __init__(self) -> None:
        super().__init__(Branching(), Repeating())

    def forward(self, x: Tensor) -> Tensor:
        return self[1](*self[0](x))


def perceptron() -> nn.Sequential:
    layers = [nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def adapted() -> nn.Sequential:
    return nn.Sequential(LowRank(5, 8), nn.GELU(), LowRank(8, 8), nn.GELU(), LowRank(8, 3))


def small_vit() -> nn.Module:
    options = {"dropout": 0.1, "attention_dropout": 0.1, "num_classes": 3}
    return models.VisionTransformer(16, 8, 3, 2, 8, 12, **options)  # of images, patches, layers, heads, widths


IMAGES = gaussian(4, 3, 48, 48)  # of 32 by 32, one pixel is left at last, too little to be normalised well
VECTORS, SEQUENCES, SENTENCES = gaussian(SAMPLES, 5), gaussian(SAMPLES, 6, 4), whole(13, SAMPLES, 6)
SENTENCES[:, 0] = 5  # a first word that is no padding
TEXT = whole(9, SAMPLES, 7)
LABELS = whole(3, SAMPLES, seed=1)
CLASSES = {"num_classes": 3, "weights": None}

NETWORKS = (
    Network("resnet18", partial(models.resnet18, **CLASSES), IMAGES, LABELS[:4], ("layer2",), 1e-4, size="medium"),
    Network(
        "mobilenet_v3_small",
        partial(models.mobilenet_v3_small, **CLASSES),
        IMAGES,
        LABELS[:4],
        ("features.4",),
        1e-4,
        size="medium",
    ),
    Network(
        "vgg11_bn",
        partial(models.vgg11_bn, init_weights=False, **CLASSES),
        IMAGES,
        LABELS[:4],
        ("features",),
        size="large",
    ),
    Network(
        "vit_b_16",
        partial(models.vit_b_16, image_size=48, **CLASSES),
        IMAGES,
        LABELS[:4],
        ("encoder.layers.encoder_layer_3", "encoder"),
        size="large",
    ),
    Network(
        "VisionTransformer",
        small_vit,
        gaussian(SAMPLES, 3, 16, 16),
        LABELS,
        ("encoder.layers.encoder_layer_0", "encoder"),
    ),
    Network(
        "U-Net",
        UNet,
        gaussian(SAMPLES, 2, 8, 8),
        whole(3, SAMPLES, 8, 8),
        ("down2", "up2"),  # a skip over the first cut, and one over both
        loss=partial(functional.cross_entropy, reduction="none"),
        mean_loss=pixel_cross_entropy,
    ),
    Network(
        "two inputs", TwoInputs, (gaussian(SAMPLES, 1, 6, 6), gaussian(SAMPLES, 3)), LABELS, ("features", "middle")
    ),
    Network("LSTM", Recurrent, whole(11, SAMPLES, 5), LABELS, ("lstm", "second")),
    Network("GRU", Gated, SEQUENCES, LABELS, ("gru", "norm")),
    Network("encoder", TextClassifier, SENTENCES, LABELS, ("encoder.layers.0", "encoder")),
    Network(
        "encoder, time first",
        TextClassifierTimeFirst,
        {"ids": SENTENCES, "mask": SENTENCES == 0},
        LABELS,
        ("encoder.layers.0", "encoder.layers.1"),
        options={"inputs": ["ids", "mask"]},
    ),
    Network("GPT", GPT, TEXT[:, :-1], TEXT[:, 1:], ("blocks.0", "blocks.1"), tied=("tokens.weight",)),
    Network("graph", GraphNetwork, gaussian(1, 12, 4), whole(3, 1, 12), ("conv1", "conv2"), batch_size=1),
    Network("fine-tuned", FineTuned, gaussian(SAMPLES, 1, 9, 9), LABELS, ("stage1", "stage2")),
    Network("adapters", adapted, VECTORS, LABELS, ("1", "2")),
    Network("shapes", Shapes, gaussian(SAMPLES, 2, 3, 4), LABELS, ("conv", "mix")),
    Network("stochastic depth", StochasticDepth, VECTORS, LABELS, ("layers.0", "layers.1")),
    Network("called thrice", Refined, VECTORS, LABELS, ("first", "act")),
    Network("in place", InPlace, gaussian(SAMPLES, 1, 5, 5), LABELS, ("norm1", "norm2")),
    Network("own tensors", OwnTensors, VECTORS, LABELS, ("first",), tied=("shift",)),
    Network("dictionary", Several, VECTORS, LABELS, ("encoder",)),
    Network("untraceable", Untraceable, VECTORS, LABELS, ("0",), is_listed=True),
    Network("bfloat16", lambda: perceptron().bfloat16(), VECTORS.bfloat16(), LABELS, ("2", "4")),
    Network("float64", lambda: perceptron().double(), VECTORS.double(), LABELS, ("2", "4")),
    Network("mixed types", MixedTypes, VECTORS, LABELS, ("trunk", "norm")),
)
