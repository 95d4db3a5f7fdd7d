"""Networks as PyTorch users have them: our time and memory over those of a plain PyTorch loop.

torchvision's resnet18 as it is, on mini-batches of 64 images of CIFAR-10's shape, and a small GPT with a tied head, on
mini-batches of 32 sequences of 64 characters; both are cut into two blocks, and for the memory into four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from admm.blocks import split
from admm.losses import CrossEntropy
from admm.models import as_given
from admm.optimizers import Adam, Backprop, OnlineBlockADMM, Optimizer, Problem, ZUpdate
from experiments.tasks.memory import reset_high_water_mark, resident

BATCHES, CHARACTERS, CONTEXT, WIDTH = 8, 65, 64, 128
QUARTERS = ["maxpool", "layer1", "layer2"]  # cuts into four blocks, of activations as even as whole stages allow
IMAGES = 128  # in a mini-batch, for the memory


class GPT(nn.Module):
    """A decoder of characters, int64 [n, L], with a causal mask and a head that shares the embedding's weight."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens) + self.place.weight
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        logits: Tensor = self.head(self.norm(h))
        return logits


def epochs(of_gpt: bool) -> dict[str, Callable[[], object]]:
    """Return an epoch by a plain PyTorch loop, by back-propagation through blocks, and by online Block-ADMM: with its
    defaults, and with steps of Z that are not clipped."""
    torch.manual_seed(0)
    if of_gpt:
        network: nn.Module = GPT()
        x, batch, after = torch.randint(CHARACTERS, (BATCHES * 32, CONTEXT + 1)), 32, ["layers.1"]
        x, y = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    else:
        network, batch, after = resnet18(num_classes=10), 64, ["layer2"]
        x, y = torch.rand(BATCHES * batch, 3, 32, 32), torch.randint(10, (BATCHES * batch,))
    problem = Problem(x, y, split(network, after), CrossEntropy(), as_given)
    ours: dict[str, Optimizer[Any]] = {
        "ours": Backprop(1, Adam(), 1e-3, batch_size=batch),
        "online": OnlineBlockADMM(1, 1e-3, batch_size=batch),
        "gradient": OnlineBlockADMM(1, 1e-3, batch_size=batch, z_update=ZUpdate("gradient")),
    }
    states = {name: optimizer.init(problem, [0]) for name, optimizer in ours.items()}
    rule = torch.optim.Adam(network.parameters())

    def plain() -> None:
        for indices in torch.randperm(len(x)).split(batch):
            rule.zero_grad()
            outputs = network(x[indices])
            functional.cross_entropy(outputs.flatten(0, -2), y[indices].flatten()).backward()
            rule.step()

    steps: dict[str, Callable[[], object]] = {"torch": plain}
    for name, optimizer in ours.items():
        steps[name] = partial(optimizer.step, problem, states[name])
    return steps


def peak(method: str) -> float:
    """Return the most bytes that a mini-batch of `IMAGES` images of 96×96 takes beyond the network, its moments and the
    data."""
    torch.manual_seed(0)
    network, x, y = resnet18(num_classes=10), torch.rand(IMAGES, 3, 96, 96), torch.randint(10, (IMAGES,))
    if method == "torch":
        rule = torch.optim.Adam(network.parameters())

        def step() -> None:
            rule.zero_grad()
            functional.cross_entropy(network(x), y).backward()
            rule.step()
    else:
        problem = Problem(x, y, split(network, QUARTERS), CrossEntropy(), as_given)
        optimizer = OnlineBlockADMM(2, 1e-3, batch_size=IMAGES)
        state = optimizer.init(problem, [0])

        def step() -> None:
            optimizer.step(problem, state)

    step()  # which makes what stays
    before = resident("VmRSS")
    reset_high_water_mark()
    step()
    return resident("VmHWM") - before
