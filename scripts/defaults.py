"""The defaults on small networks of many kinds, beside Adam by back-propagation: python -m scripts.defaults

Each network learns scikit-learn's digits, cut into three to sixteen blocks, from five seeds, by online Block-ADMM and
Gotmare et al. with their defaults, and by Adam. (Block-ADMM has the iterates of its online form then.) All have the
same initial weights, mini-batches and epochs, and one step size of Θ, which is chosen for none of them: 3e-3 to 0 along
half a cosine, and for some a large one that stays.

It writes the accuracies on the last fifth of the digits to results/defaults.csv, of which `make figures` puts a table
into docs/gallery.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from admm.blocks import split
from admm.files import atomic_write
from admm.losses import CrossEntropy
from admm.models import as_constructed, mlp
from admm.optimizers import Adam, Backprop, Gotmare, OnlineBlockADMM, Optimizer, Problem
from admm.schedules import Value
from admm.training import train
from experiments.paths import in_full
from experiments.provenance import machine

SEEDS, TRAINING_SAMPLES, FALLING = range(5), 1437, {"start": 3e-3, "end": 0.0}
METHODS: dict[str, Callable[[int, Value], Optimizer[Any]]] = {
    "Adam": lambda epochs, step: Backprop(epochs, Adam(), step),
    "online Block-ADMM": OnlineBlockADMM,
    "Gotmare et al.": Gotmare,
}


class Residual(nn.Module):
    """A residual block and a further convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3, self.head = nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.bn3(self.conv3(max_pool2d(x, 2))))
        output: Tensor = self.head(x.mean((2, 3)))
        return output


class ResidualLayer(nn.Module):
    """A linear layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + torch.relu(self.linear(self.norm(x)))
        return output


class Separable(nn.Module):
    """Depthwise-separable convolutions, the second one with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU()
            )
            for _ in range(2)
        )
        self.gate = nn.Sequential(nn.Linear(16, 4), nn.SiLU(), nn.Linear(4, 16), nn.Sigmoid())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        x = x * self.gate(x.mean((2, 3)))[:, :, None, None]
        output: Tensor = self.head(x.mean((2, 3)))
        return output


class Transformer(nn.Module):
    """The rows of an image are its sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        self.layer1, self.layer2 = (nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer2(self.layer1(self.embedding(x.squeeze(1)))).mean(1))
        return output


class Mixer(nn.Module):
    """An MLP-Mixer of two layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        self.rows1, self.rows2 = (nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))
        self.columns1, self.columns2 = (
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.squeeze(1))
        x = x + self.rows1(x.mT).mT
        x = x + self.columns1(x)
        x = x + self.rows2(x.mT).mT
        x = x + self.columns2(x)
        output: Tensor = self.head(self.norm(x).mean(1))
        return output


class Recurrent(nn.Module):
    """Two GRUs or LSTMs over the rows of an image."""

    def __init__(self, layer: type[nn.GRU | nn.LSTM] = nn.GRU) -> None:
        super().__init__()
        self.layer1, self.layer2 = (layer(inputs, 32, batch_first=True) for inputs in (8, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.layer1(x.squeeze(1))
        sequence, _ = self.layer2(sequence)
        output: Tensor = self.head(sequence[:, -1])
        return output


def convolutions(layers: int) -> nn.Sequential:
    """Return convolutions with batch normalisation, `layers` of them."""
    channels = [1, *[16] * layers]
    each = [
        [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        for before, after in pairwise(channels)
    ]
    return nn.Sequential(
        *[module for layer in each for module in layer], nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )


def residual_layers(layers: int) -> nn.Sequential:
    """Return a perceptron of linear layers with residuals, `layers` of them between a first layer and a last one."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *(ResidualLayer() for _ in range(layers)), nn.Linear(16, 10))


@dataclass(frozen=True)
class Task:
    """A network, the modules after which it is cut, or None for each layer, the epochs, and η."""

    network: Callable[[], nn.Module]
    after: Sequence[str] | None
    epochs: int = 20
    step: Value = field(default_factory=lambda: FALLING)


TASKS = {
    "perceptron, 3 blocks": Task(lambda: mlp(64, [64, 64], 10), None),
    "perceptron, 6 blocks": Task(lambda: mlp(64, [64] * 5, 10), None),
    "perceptron, 10 blocks": Task(lambda: mlp(64, [64] * 9, 10), None),
    "perceptron with residuals, 16 blocks": Task(lambda: residual_layers(14), [str(n) for n in range(1, 16)]),
    "convolutions with batch normalisation, 3 blocks": Task(lambda: convolutions(2), ["2", "5"], 10),
    "convolutions with batch normalisation, 6 blocks": Task(lambda: convolutions(5), ["2", "5", "8", "11", "14"], 10),
    "residual network, 4 blocks, one cut in the residual": Task(Residual, ["stem", "bn1", "bn3"]),
    "separable convolutions with squeeze-and-excitation, 4 blocks": Task(Separable, ["stem", "first", "second"]),
    "transformer, 3 blocks": Task(Transformer, ["embedding", "layer1"]),
    "MLP-Mixer, 3 blocks": Task(Mixer, ["columns1", "columns2"]),
    "two GRUs, 3 blocks": Task(Recurrent, ["layer1", "layer2"]),
    "two LSTMs, 3 blocks": Task(lambda: Recurrent(nn.LSTM), ["layer1", "layer2"]),
    "perceptron, 6 blocks, η = 1e-2": Task(lambda: mlp(64, [64] * 5, 10), None, step=1e-2),
    "transformer, 3 blocks, η = 1e-2": Task(Transformer, ["embedding", "layer1"], step=1e-2),
    "MLP-Mixer, 3 blocks, η = 1e-2": Task(Mixer, ["columns1", "columns2"], step=1e-2),
    "two LSTMs, 3 blocks, η = 1e-2": Task(lambda: Recurrent(nn.LSTM), ["layer1", "layer2"], step=1e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=in_full, nargs="?", default=Path("results/defaults.csv"))
    path = parser.parse_args().path
    torch.set_num_threads(1)
    rows = list[dict[str, object]]()
    for name in TASKS:
        for method in METHODS:
            accuracies = trained(name, method)
            print(f"{name}: {method} {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}", flush=True)
            known = {"network": name, "method": method, "epochs": TASKS[name].epochs}
            rows += [known | {"seed": s, "accuracy": a} for s, a in zip(SEEDS, accuracies, strict=True)]
    with atomic_write(path, "the accuracies with the defaults") as part:
        pd.DataFrame(rows).assign(machine=machine(torch.device("cpu"))).to_csv(part, index=False)


def trained(name: str, method: str) -> list[float]:
    """Return the accuracies in percent after training, by seed."""
    task = TASKS[name]
    problem, test = digits(task)
    optimizer = METHODS[method](task.epochs, task.step)
    state = optimizer.init(problem, SEEDS)
    rows = train(problem, optimizer, state, test=test, evaluate_every=task.epochs).rows
    return [row["test_accuracy"] for row in rows[-len(SEEDS) :]]


def digits(task: Task) -> tuple[Problem, tuple[Tensor, Tensor]]:
    """Return a problem of four fifths of the shuffled digits, and the last fifth to test on."""
    x, labels = shuffled_digits()
    cut = {"per_layer": True} if task.after is None else {"after": task.after}
    n, blocks = TRAINING_SAMPLES, split(task.network(), **cut)
    problem = Problem(x[:n], labels[:n], blocks, CrossEntropy(), as_constructed(task.network))
    return problem, (x[n:], labels[n:])


def shuffled_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in a random order: images [N, 1, 8, 8] from 0 to 1, and their classes [N]."""
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    x = torch.as_tensor(data.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    return x, torch.as_tensor(data.target[order])


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over the seeds, a row per network and a column per method."""
    found = rows.groupby(["network", "method"], sort=False)["accuracy"].agg(["mean", "std"])
    cells = found["mean"].map("{:.1f}".format) + " ± " + found["std"].map("{:.1f}".format)
    return cells.unstack("method").reindex(index=rows["network"].unique(), columns=list(METHODS)).reset_index()


if __name__ == "__main__":
    main()
