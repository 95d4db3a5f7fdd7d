"""Speed and memory, as ratios measured in one run: python -m scripts.benchmarks.bench [results/bench.csv]

The networks, the losses and the optimizers are those of experiment=mnist_shallow and, in the rows of CIFAR-10, of
experiment=cifar10_resnet18_narrow; the data are generated, 60,000 x 784 and 20 mini-batches of 128 images.
The contestants of a ratio take turns; a ratio is the median over the turns. Run it on an idle machine.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

from admm.data import Dataset
from admm.files import MIB, atomic_write
from admm.nmf import nmf_steps
from admm.optimizers import BlockADMM, Optimizer, Problem
from admm.training import evaluate
from experiments.launching.stacking import worthwhile_on_cpu
from experiments.paths import in_full
from experiments.provenance import machine
from experiments.rows import CONF
from experiments.store import failed_writes_in_words
from experiments.tasks.memory import in_fresh_process, variables
from experiments.training import build_problem
from scripts.benchmarks import bench_networks
from scripts.benchmarks.contestants import plain_torch
from scripts.benchmarks.contestants.product import LARGE

SAMPLES, FEATURES, CLASSES, BATCH, TURNS = 60_000, 784, 10, 64, 5
SEEDS = (0, 1, 2, 3, 4)
IMAGES = 128  # in a mini-batch
METHODS = {"online": "online_block_admm", "sgd": "sgd"}  # on CIFAR-10
NMF_RANK, NMF_ROUNDS = 32, 40
COLUMNS = ["name", "value", "unit", "machine"]
Row = tuple[str, float, str]
Task = Callable[[], object]


def main(path: Path) -> None:
    rows: list[Row] = []
    for measure in (stacks, grid, workers, rivals, share_of_peak, memory, nmf, cifar, networks):
        for row in measure():
            rows.append(row)
            print(f"{row[0]:40s} {row[1]:10.3f} {row[2]}", flush=True)
    write(path, rows)
    print(f"written: {path}")


def write(path: Path, rows: list[Row], here: str | None = None, replaced: Sequence[str] = ("name",)) -> None:
    """Replaces the rows that have the same `replaced`, keeps the others as they are; at once, or not at all.

    here: the machine; None is this CPU.
    """
    here = here or machine(torch.device("cpu"))
    table = pd.DataFrame([(name, f"{value:.5g}", unit, here) for name, value, unit in rows], columns=COLUMNS)
    if path.exists():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = pd.concat([old, table]).drop_duplicates([*replaced], keep="last")
    with atomic_write(path, "what was measured") as part:
        table.to_csv(part, index=False)


def stacks() -> list[Row]:
    """Five stacked seeds over one seed alone, batch size 64."""
    rows = []
    for name, optimizer in (("online", "online_block_admm"), ("sgd", "sgd")):
        config = config_of(optimizer, f"optimizer.batch_size={BATCH}")
        five, one = (_step(config, seeds) for seeds in (SEEDS, SEEDS[:1]))
        times = turns(five, one, sgd_products)
        rows.append((f"stack5_over_1_{name}", ratio(times, 0, 1), "ratio"))
        rows.append((f"seconds_1_{name}", median(times[1]), "s/epoch"))
        if name == "sgd":
            rows.append(("stack5_products_over_1_sgd", ratio(times, 2, 1), "ratio"))
    return rows


def grid() -> list[Row]:
    """Nine cells of online Block-ADMM times five seeds: 45 runs one after the other, and nine stacks of a cell's seeds,
    over the stacks that hydra/launcher=stacked makes of them; and 45 cells of one seed with mini-batches of 512, one
    after the other over its stacks. An epoch and an evaluation of each. What a stack can win is bounded by the FLOP/s
    that one run reaches alone, as a share of a large product's."""
    config, large = (config_of("online_block_admm", *batch) for batch in ((), ("optimizer.batch_size=512",)))
    paying = worthwhile_on_cpu(config.optimizer.batch_size)
    per_stack = min(45, paying // len(SEEDS) * len(SEEDS))
    one, five, stacked = (_epoch(config, [*SEEDS * 9][:n]) for n in (1, len(SEEDS), per_stack))
    needed = {"single": flops_of(one), "stacked": flops_of(stacked)}
    times = turns(one, five, stacked, _large_product())
    few = worthwhile_on_cpu(large.optimizer.batch_size)
    of_large = turns(_epoch(large, SEEDS[:1]), _epoch(large, [*SEEDS * 9][:few]))
    rows: list[Row] = [
        ("grid45_single_over_stacked", per_stack * ratio(times, 0, 2), "ratio"),
        ("grid45_stacks5_over_stacked", per_stack / len(SEEDS) * ratio(times, 1, 2), "ratio"),
        ("grid45_batch512_single_over_stacked", few * ratio(of_large, 0, 1), "ratio"),
    ]
    for (name, flops), seconds in zip(needed.items(), (times[0], times[2]), strict=True):
        rows.append((f"grid45_{name}_share_of_peak", share(flops, seconds, times[3]), "share"))
    return rows


def _epoch(config: DictConfig, seeds: Sequence[int]) -> Task:
    problem, dataset = _problem(config), _generated()
    optimizer: Optimizer[Any] = instantiate(config.optimizer, _convert_="all")
    state = optimizer.init(problem, seeds)

    def epoch() -> None:
        optimizer.step(problem, state)
        evaluate(problem, state.theta, (dataset.x_test, dataset.y_test))

    return epoch


def workers() -> list[Row]:
    """A sweep of four runs of a thread each by one process of hydra/launcher=joblib over the same by two, from the
    command line on."""
    sweep = [sys.executable, "run.py", "-m", "experiment=digits_shallow", "optimizer=online_block_admm", "threads=1"]
    sweep += ["optimizer.theta_step=1e-3,2e-3,3e-3,4e-3", "iterations=150", "evaluate_every=150"]

    def launch(jobs: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            places = [f"outputs={folder}", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
            subprocess.run([*sweep, *places], check=True, cwd=CONF.parents[1], stdout=subprocess.DEVNULL)

    return [
        ("joblib2_over_1", ratio(turns(lambda: launch(1), lambda: launch(2), counted=3, uncounted=0), 0, 1), "ratio")
    ]


def sgd_products() -> None:
    """The matrix products of an epoch of five stacked seeds of SGD, and nothing else: a stack cannot take less."""
    widths = [FEATURES, *config_of("sgd").model.hidden, CLASSES]
    x = [torch.rand(len(SEEDS), BATCH, width) for width in widths]
    weights = [torch.rand(len(SEEDS), after, before) for before, after in pairwise(widths)]
    for _ in range(SAMPLES // BATCH):
        for layer, weight in enumerate(weights):
            torch.bmm(x[layer], weight.mT)  # forward
            torch.bmm(x[layer + 1].mT, x[layer])  # gradient of the weight
            if layer:
                torch.bmm(x[layer + 1], weight)  # gradient of the input


def rivals() -> list[Row]:
    """Plain PyTorch loops over ours, one seed of SGD, batch size 64."""
    problem = _problem(config_of("sgd"))
    ours = _step(config_of("sgd", f"optimizer.batch_size={BATCH}"), SEEDS[:1])
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=BATCH, shuffle=True)

    def tensors() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(SAMPLES).split(BATCH):
            yield problem.x[indices], problem.y[indices]

    times = turns(_torch_epoch(tensors), _torch_epoch(lambda: loader), ours)
    return [
        ("torch_optim_over_ours_sgd", ratio(times, 0, 2), "ratio"),
        ("dataloader_loop_over_ours_sgd", ratio(times, 1, 2), "ratio"),
        ("torch_optim_over_stack5_sgd", *_five_torch_over_stack(tensors)),
    ]


def _five_torch_over_stack(batches: Callable[[], Any]) -> tuple[float, str]:
    """Five seeds one after the other with torch.optim, over the same five as one stack of ours."""
    times = turns(_torch_epoch(batches), _step(config_of("sgd", f"optimizer.batch_size={BATCH}"), SEEDS))
    return 5.0 * ratio(times, 0, 1), "ratio"


def share_of_peak() -> list[Row]:
    """FLOP/s of one Block-ADMM iteration, five seeds, as a share of a product of its own largest shape."""
    config = config_of("block_admm")
    optimizer: BlockADMM = instantiate(config.optimizer, _convert_="all")
    problem = _problem(config)
    needed = len(SEEDS) * block_admm_flops(optimizer, problem)
    x = torch.rand(len(SEEDS), optimizer.batch_size, FEATURES)
    weight = torch.rand(len(SEEDS), 128, FEATURES)

    def products() -> None:
        for _ in range(200):
            torch.bmm(x, weight.mT)

    product = 200 * 2.0 * x.numel() * 128
    iteration, peak = turns(_step(config, SEEDS), products)
    shares = [needed / i / (product / p) for i, p in zip(iteration, peak, strict=True)]
    return [
        ("block_admm_share_of_peak", median(shares), "share"),
        ("block_admm_flops", needed / 1e9, "GFLOP/iteration"),
        ("block_admm_seconds", median(iteration), "s/iteration"),
        ("peak_of_its_largest_product", product / min(peak) / 1e9, "GFLOP/s"),
    ]


def memory() -> list[Row]:
    """Training variables per seed, batch over online."""
    configs = [config_of(name) for name in ("block_admm", "online_block_admm")]
    batch, online = (sum(variables(config, _problem(config), SEEDS[0]).values()) for config in configs)
    return [
        ("memory_batch", batch / MIB, "MiB/seed"),
        ("memory_online", online / MIB, "MiB/seed"),
        ("memory_batch_over_online", batch / online, "ratio"),
    ]


def nmf() -> list[Row]:
    """scikit-learn's NMF over ours, seconds to the same objective: 256 channels, 20,000 places, rank 32."""
    random = np.random.default_rng(0)
    factors = [random.gamma(0.3, size=size) for size in ((256, 40), (40, 20_000))]
    z = np.maximum(factors[0] @ factors[1] + random.normal(-1.0, 0.5, (256, 20_000)), 0.0).astype(np.float32)
    basis, scores = (np.abs(random.normal(size=s)).astype(np.float32) for s in ((256, NMF_RANK), (NMF_RANK, 20_000)))
    found: list[float] = []

    def theirs() -> None:
        model = NMF(NMF_RANK, init="custom", solver="cd", max_iter=NMF_ROUNDS, tol=0.0)
        transposed = model.fit_transform(z.T, W=scores.T.copy(), H=basis.T.copy())
        found.append(_objective(z, model.components_.T, transposed.T))

    def ours() -> None:
        m, s = (torch.from_numpy(factor.copy())[None] for factor in (basis, scores))
        nmf_steps(torch.from_numpy(z)[None], m, s, NMF_ROUNDS)
        found.append(_objective(z, m[0].numpy(), s[0].numpy()))

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        times = turns(theirs, ours)
    return [
        ("sklearn_nmf_over_ours", ratio(times, 0, 1), "ratio"),
        ("nmf_objective_ours_over_sklearn", found[-1] / found[-2], "ratio"),
    ]


def _objective(z: NDArray[np.float32], basis: NDArray[np.float32], scores: NDArray[np.float32]) -> float:
    return float(np.square(z - basis @ scores, dtype=np.float64).sum())


def cifar() -> list[Row]:
    """ResNet-18, one seed: online Block-ADMM over SGD on the narrow one, their FLOP/s as a share of a large product's,
    which may exceed 1, as PyTorch's convolutions and products on a CPU come from different libraries, and what
    `cifar_flops` counts."""
    narrow = [
        _step(config_of(method, experiment="cifar10_resnet18_narrow"), SEEDS[:1], generated_images(20 * IMAGES))
        for method in METHODS.values()
    ]
    needed = [flops_of(task) for task in narrow]
    times = turns(*narrow, _large_product())
    rows: list[Row] = [("cifar_online_over_sgd", ratio(times, 0, 1), "ratio")]
    for name, flops, seconds in zip(METHODS, needed, times, strict=False):
        rows.append((f"cifar_{name}_share_of_peak", share(flops, seconds, times[2]), "share"))
    return rows + cifar_flops()


def networks() -> list[Row]:
    """torchvision's resnet18 and a small GPT in two blocks, over a plain PyTorch loop, and online Block-ADMM with steps
    of Z that are clipped over plain ones; and the peak of a mini-batch of online Block-ADMM with resnet18 in four
    blocks over that of the loop."""
    rows: list[Row] = []
    for name, of_gpt in (("resnet18", False), ("gpt", True)):
        epochs = bench_networks.epochs(of_gpt)
        times = dict(zip(epochs, turns(*epochs.values()), strict=True))
        for method in ("ours", "online"):
            pair = [times[method], times["torch"]]
            rows.append((f"{name}_{method}_over_torch", ratio(pair, 0, 1), "ratio"))
        rows.append((f"{name}_online_over_gradient", ratio([times["online"], times["gradient"]], 0, 1), "ratio"))
    plain, online = (in_fresh_process(bench_networks.peak, method) for method in ("torch", "online"))
    return [*rows, ("resnet18_online_peak_over_torch", online / plain, "ratio")]


def cifar_flops() -> list[Row]:
    """Count the FLOPs of an epoch of CIFAR-10 by ResNet-18 at full width, one seed, and of an evaluation on all 60,000
    images."""
    rows: list[Row] = []
    for name, method in METHODS.items():
        step = flops_of(_step(config_of(method, experiment="cifar10_resnet18"), SEEDS[:1], generated_images(IMAGES)))
        rows.append((f"cifar_{name}_flops", step / IMAGES * 50_000 / 1e12, "TFLOP/epoch"))
    images = generated_images(IMAGES)
    problem = build_problem(config_of("sgd", experiment="cifar10_resnet18"), images)
    theta = problem.initial(SEEDS[:1])
    forward = flops_of(lambda: evaluate(problem, theta, (images.x_train, images.y_train)))
    return [*rows, ("cifar_evaluation_flops", forward / (2 * IMAGES) * 60_000 / 1e12, "TFLOP/epoch")]


def generated_images(count: int) -> Dataset:
    """Generate images of the shape of CIFAR-10's."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 32, 32, generator=random)
    y = torch.randint(CLASSES, (len(x),), generator=random)
    return Dataset("generated", x, y, x[:1], y[:1], CLASSES, "")


class _Counter(TorchDispatchMode):
    """FLOPs of products and convolutions, forward and backward. PyTorch's `FlopCounterMode` tells them by module, too,
    for which its hooks do not bear gradients by a leaf."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output


def flops_of(task: Task) -> int:
    counter = _Counter()
    with counter:
        task()
    return counter.flops


def block_admm_flops(optimizer: BlockADMM, problem: Problem) -> float:
    """Matrix-product FLOPs that a replica's iteration needs; for sweep=minibatch, one primal round, majorised Z.

    With W_t of p_t = d_{t−1} d_t entries, a sample needs these products, each 2 FLOPs an entry: block_1(x) once before
    the Z steps and all other blocks for the mixing; in each round block_t and its transpose for t ≥ 2, and the
    inverse curvature of Z_1..Z_{T−1}; for Θ, block_t for t ≥ 2 and all p_t of the gradient; for the dual, every block.
    """
    assert (optimizer.sweep, optimizer.z_update.name, optimizer.primal_rounds) == ("minibatch", "majorised", 1)
    weights = [p for name, p in problem.blocks.network.named_parameters() if name.endswith("weight")]
    first, rest = weights[0].numel(), sum(w.numel() for w in weights[1:])
    curvature = sum(w.shape[1] ** 2 for w in weights[1:])
    forward = first + (rest if optimizer.forward_mixing else 0)
    rounds = optimizer.z_update.steps * (2 * rest + curvature)
    theta = rest + first + rest
    dual = first + rest
    inverses = sum(3 * w.shape[1] ** 3 for w in weights[1:]) / (optimizer.curvature_every * optimizer.batch_size)
    return problem.n_samples * 2.0 * (forward + rounds + theta + dual + inverses)


def turns(*tasks: Task, counted: int = TURNS, uncounted: int = 1) -> list[list[float]]:
    """Seconds of each task in `counted` turns, after `uncounted` ones."""
    times: list[list[float]] = [[] for _ in tasks]
    for turn in range(uncounted + counted):
        for own, task in zip(times, tasks, strict=True):
            start = time.perf_counter()
            task()
            if turn >= uncounted:
                own.append(time.perf_counter() - start)
    return times


def ratio(times: list[list[float]], above: int, below: int) -> float:
    return median(a / b for a, b in zip(times[above], times[below], strict=True))


def _large_product() -> Task:
    left, right = torch.rand(2, LARGE, LARGE)
    return lambda: left @ right


def share(flops: float, seconds: list[float], of_large_product: list[float]) -> float:
    """FLOP/s as a share of a large product's."""
    return median(flops / s / (2.0 * LARGE**3 / p) for s, p in zip(seconds, of_large_product, strict=True))


def config_of(optimizer: str, *overrides: str, experiment: str = "mnist_shallow") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={experiment}", f"row={experiment}/{optimizer}-tuned", *overrides])


def _generated() -> Dataset:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(SAMPLES, FEATURES, generator=random)
    y = torch.randint(CLASSES, (SAMPLES,), generator=random)
    return Dataset("generated", x, y, x[:1], y[:1], CLASSES, "")


def _problem(config: DictConfig) -> Problem:
    return build_problem(config, _generated())


def _step(config: DictConfig, seeds: Sequence[int], dataset: Dataset | None = None) -> Task:
    problem = build_problem(config, dataset or _generated())
    optimizer: Optimizer[Any] = instantiate(config.optimizer, _convert_="all")
    state = optimizer.init(problem, seeds)
    return lambda: optimizer.step(problem, state)


def _torch_epoch(batches: Callable[[], Any]) -> Task:
    """An epoch as most would write it."""
    network = instantiate(config_of("sgd").model, input_shape=FEATURES, classes=CLASSES, _convert_="all")
    rule = torch.optim.SGD(network.parameters(), lr=0.1)
    return lambda: plain_torch.train(network, rule, batches())


if __name__ == "__main__":
    with failed_writes_in_words():
        main(in_full(sys.argv[1] if len(sys.argv) > 1 else "results/bench.csv"))
