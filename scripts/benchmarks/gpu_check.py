"""Whether a GPU computes what the CPU does, and how fast it is: make gpu-check

It writes results/bench_gpu.csv, from which `make figures` writes docs/gpu.md. Its parts are:

- correctness: a few iterations of every optimizer in float64, on the GPU and on the CPU;
- processes: two processes with a GPU each against one;
- speed: an epoch of stacks of the network and the optimizers of `scripts.benchmarks.races`, eager and compiled;
- resnet: the rows of experiment=cifar10_resnet18 in bf16, compiled. Without CIFAR-10 in the data folder the images are
  generated, and there is no accuracy.

Each part has a share of the time, and leaves what it does not need to those after it. What it cannot end is left out.
The exit code is 1 if anything has failed, or a comparison is not made for want of time.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from admm.blocks import split
from admm.checkpoints import save
from admm.data import KEYS, Dataset, DatasetError, load
from admm.files import MIB
from admm.losses import TripletLoss
from admm.models import initialiser
from admm.nmf import NMF
from admm.optimizers import DeepFacto, Optimizer, Problem
from admm.training import evaluate, synchronize, timed_step
from experiments.device import find_device
from experiments.jobs import options_of
from experiments.paths import in_full
from experiments.provenance import machine
from experiments.rows import CONF, Row, row_files
from experiments.store import Store, failed_writes_in_words
from experiments.training import build_problem
from scripts.benchmarks import bench, races
from scripts.benchmarks.bench import IMAGES, config_of, flops_of, generated_images, ratio, write
from scripts.benchmarks.contestants.ours import build
from scripts.benchmarks.races import ROOT, Contestant

TOLERANCE = 1e-9
ITERATIONS = 3  # that are compared
STACKED = {"online": "online_block_admm", "block": "block_admm", "sgd": "sgd", "adam": "adam"}
RESNET = {"online": "online_block_admm", "gotmare": "gotmare", "sgd": "sgd", "adam": "adam"}
SHARED_OUT = {
    "samples": ["experiment=digits_shallow", "optimizer=standard_admm"],
    "blocks": ["experiment=mnist_deep10", "optimizer=block_admm", "setting=faithful", "dataset=digits"],
}
DONE, TIME_IS_UP, FAILED = "done", "left out, the time is up", "FAILED"
Units = dict[str, Callable[[float], Iterator[bench.Row]]]
Case = Callable[[torch.device], tuple[Problem, Optimizer[Any]]]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        samples: of the fully connected network. They fill the mini-batches, as a smaller one would be compiled, too.
        stacks: their replicas.
        images: of ResNet-18, whole mini-batches as well.
        width: its channels.
        parts: the parts of an epoch of it, of which `turns` are timed.
        product: rows and columns of the product whose FLOP/s are the card's peak.
    """

    samples: int = 59_904
    stacks: tuple[int, ...] = (1, 5, 45, 450)
    images: int = 49_920
    width: int = 64
    parts: int = 10
    product: int = 8192
    turns: int = 3


TINY = Sizes(samples=1024, stacks=(1, 2), images=2 * IMAGES, width=2, parts=2, product=64, turns=1)


@dataclass(frozen=True)
class Task:
    device: torch.device
    sizes: Sizes


class Part(NamedTuple):
    """A part of the check.

    share: of the time. units: what it measures, by name; each gets the seconds that it should take, and yields rows.
    is_comparison: whether a unit that is not reached is a failure.
    """

    share: float
    units: Callable[[Task], Units]
    is_comparison: bool = False


class TimeIsUp(BaseException):
    """Not an Exception, which a compiler's errors would be taken for."""


class Differs(Exception):
    """The GPU's numbers are not the CPU's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", nargs="?", type=in_full, help="results/bench_gpu.csv, with --tiny outputs/bench_gpu.csv"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all of it")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script with --device cpu")
    given = parser.parse_args()
    try:
        task = Task(find_device(given.device), TINY if given.tiny else Sizes())
    except ValueError as error:
        sys.exit(f"error: no GPU is found here. {error}")
    path = given.path or ROOT / ("outputs" if given.tiny else "results") / "bench_gpu.csv"
    failed = check(task, path, given.seconds)
    print(f"written: {path}; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


def check(task: Task, path: Path, seconds: float) -> list[str]:
    """Measure all parts, and write the rows of each unit as it ends. Returns the names of what has failed."""
    print(f"{machine(task.device)}, PyTorch {torch.__version__}, at most {seconds:.0f} s", flush=True)
    failed, end, shares = list[str](), time.monotonic() + seconds, sum(part.share for part in PARTS.values())
    for name, part in PARTS.items():
        start = time.monotonic()
        until = start + (end - start) * part.share / shares
        shares -= part.share
        units = part.units(task)
        for left, (unit, measure) in zip(range(len(units), 0, -1), units.items(), strict=True):
            start = time.monotonic()
            rows, outcome = measured(partial(measure, (until - start) / left), until - start)
            print(f"{name} {unit}: {outcome}, {time.monotonic() - start:.1f} s", flush=True)
            keep(rows, path, task)
            if outcome.startswith(FAILED) or (part.is_comparison and outcome != DONE):
                failed.append(f"{name} {unit}")
    return failed


def measured(unit: Callable[[], Iterator[bench.Row]], seconds: float) -> tuple[list[bench.Row], str]:
    """Return the rows that a unit yields in so many seconds, and in words what came of it."""
    rows, outcome = list[bench.Row](), DONE
    if seconds <= 0.0:
        return rows, TIME_IS_UP
    try:
        with at_most(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "compile:")  # what cannot be compiled would be measured without
            for row in unit():
                rows.append(row)
    except TimeIsUp:
        outcome = TIME_IS_UP
    except torch.OutOfMemoryError:
        outcome = "left out, it does not fit into the memory"
    except Exception as error:  # whatever fails, the rest is measured
        outcome = f"{FAILED}, {type(error).__name__}: {error}"
    if torch.cuda.is_available():
        gc.collect()  # a problem and what has been compiled for it name each other
        torch.cuda.empty_cache()
    return rows, outcome


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def keep(rows: list[bench.Row], path: Path, task: Task) -> None:
    """Print rows, and write them beside those of other cards."""
    for name, value, unit in rows:
        print(f"    {name:40s} {value:12.5g} {unit}", flush=True)
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, rows, machine(task.device), replaced=("name", "machine"))


# --- correctness


def comparisons(task: Task) -> Units:
    """Return those of each optimizer on a fully connected network and on ResNet-18, and the compiled ones."""
    digits, full = (load("digits", "", first=first, dtype=torch.float64) for first in (100, 128))
    images = generated_images(20)
    images = replace(images, x_train=images.x_train.double(), x_test=images.x_test.double())
    resnet = ["model.width=4", "optimizer.batch_size=8"]
    cases = {
        **{method: of_row("digits_shallow", method, digits) for method in methods("digits_shallow")},
        **{f"{m}_resnet": of_row("cifar10_resnet18_narrow", m, images, *resnet) for m in methods("cifar10_resnet18")},
        "deepfacto": deepfacto,
    }
    eager, compiled = (
        {method: of_row("digits_shallow", method, full, f"compile={compile}") for method in STACKED.values()}
        for compile in ("false", "true")
    )
    pairs = {name: (case, case) for name, case in cases.items()}
    pairs |= {f"{method}_compiled": (eager[method], compiled[method]) for method in compiled}
    return {name: partial(compared, name, *pair, task.device) for name, pair in pairs.items()}


def methods(experiment: str) -> list[str]:
    """Return the optimizers that an experiment has a tuned row of."""
    rows = [Row(name) for name in sorted(row_files(CONF)) if name.startswith(f"{experiment}/")]
    return [row.method for row in rows if row.setting == "tuned"]


def of_row(experiment: str, method: str, dataset: Dataset, *overrides: str) -> Case:
    def case(device: torch.device) -> tuple[Problem, Optimizer[Any]]:
        config = config_of(method, "dtype=float64", *overrides, experiment=experiment)
        return build_problem(config, moved(dataset, device)), instantiate(config.optimizer, _convert_="all")

    return case


def moved(dataset: Dataset, device: torch.device) -> Dataset:
    tensors: dict[str, Any] = {key: getattr(dataset, key).to(device) for key in KEYS}
    return replace(dataset, **tensors)


def deepfacto(device: torch.device) -> tuple[Problem, Optimizer[Any]]:
    x = torch.rand(24, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    backbone = nn.Sequential(nn.Conv2d(2, 5, 2), nn.ReLU())
    network = nn.Sequential(backbone, NMF(5, rank=3), nn.Sequential(nn.Flatten(), nn.Linear(27, 4)))
    blocks, y = split(network, after=["0", "1"]), torch.arange(24) // 3
    problem = Problem(x.to(device), y.to(device), blocks, TripletLoss(0.5), initialiser("kaiming_uniform"))
    return problem, DeepFacto(ITERATIONS, theta_step=1e-2, z_step=0.1, beta=1.0, batch_size=8)


def compared(name: str, on_cpu: Case, case: Case, device: torch.device, _: float) -> Iterator[bench.Row]:
    """Yield the largest difference between all variables and scores on both devices. Raises Differs."""
    yield from judged(name, largest_difference(numbers(*on_cpu(torch.device("cpu"))), numbers(*case(device))))


def judged(name: str, difference: float) -> Iterator[bench.Row]:
    yield f"difference_{name}", difference, "absolute, or relative to numbers above 1"
    if not difference <= TOLERANCE:
        raise Differs(f"the largest difference is {difference:.2g}, more than {TOLERANCE:g}")


def numbers(problem: Problem, optimizer: Optimizer[Any]) -> list[Tensor]:
    """Return the variables after some iterations of two replicas, and the scores, in the CPU's memory."""
    state = optimizer.init(problem, [0, 1])
    for _ in range(ITERATIONS):
        timed_step(problem, optimizer, state)
    leaves = tree_leaves((save(state), evaluate(problem, state.theta, None)))
    return [leaf.cpu().double() for leaf in leaves if isinstance(leaf, Tensor)]


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return max |a − b| / max(1, |b|); NaN if there is one."""
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([((a - b).abs() / b.abs().clamp(min=1.0)).max() for a, b in pairs if b.numel()]).max())


# --- processes


def on_two(task: Task) -> Units:
    if torch.cuda.device_count() < 2:
        print("processes: left out, as they need two GPUs", flush=True)
        return {}
    return {kind: partial(shared_out, kind, task.device) for kind in SHARED_OUT}


def shared_out(kind: str, device: torch.device, _: float) -> Iterator[bench.Row]:
    """Yield the largest difference between the histories of two processes and of one. Raises Differs."""
    one, two = (history(kind, device, processes) for processes in (1, 2))
    yield from judged(f"parallel_{kind}", largest_difference([one], [two]))


def history(kind: str, device: torch.device, processes: int) -> Tensor:
    """Return the losses and accuracies of a short run of the suite on so many processes."""
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    shared = [f"parallel={kind}"] if processes == 2 else []
    few = ["seeds=[0]", f"iterations={ITERATIONS}", "dtype=float64", "progress=false", "~hydra.callbacks.report"]
    with TemporaryDirectory() as folder:
        places = [f"device={device.type}", f"outputs={folder}"]
        command = [sys.executable, *started, "run.py", *SHARED_OUT[kind], *few, *places, *shared]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise RuntimeError(f"{processes} processes have failed:\n{done.stderr}")
        (experiment,) = Store(Path(folder)).experiments()
        (run,) = Store(Path(folder)).runs(experiment)
        return torch.from_numpy(run.history.drop(columns="seconds").to_numpy(np.float64))


# --- speed


def speeds(task: Task) -> Units:
    return {f"{name}{stack}": partial(race, name, stack, task) for stack in task.sizes.stacks for name in STACKED}


def race(name: str, replicas: int, task: Task, _: float) -> Iterator[bench.Row]:
    """Yield seconds of an epoch, eager and compiled, which take turns in parts of it."""
    options = races.Options(samples=task.sizes.samples, device=str(task.device))
    contestants = {
        label: Contestant(STACKED[name], replicas, compile=label == "compiled") for label in ("eager", "compiled")
    }
    lanes = {label: build(contestant.spec(options)) for label, contestant in contestants.items()}
    times: list[list[float]] = [[] for _ in lanes]
    for turn in range(1 + task.sizes.turns):
        for (optimizer, problem, state), seconds in zip(lanes.values(), times, strict=True):
            taken = timed_step(problem, optimizer, state)
            seconds += [taken] if turn else []
    for (label, contestant), seconds in zip(contestants.items(), times, strict=True):
        yield f"{label}_{name}{replicas}_seconds", contestant.parts * median(seconds), "s/epoch"
    yield f"compiled_{name}{replicas}_compile_seconds", lanes["compiled"][1].compile_seconds, "s"
    yield f"compiled_{name}{replicas}_over_eager", ratio(times, 0, 1), "times as fast"


# --- resnet


def resnets(task: Task) -> Units:
    return {name: partial(resnet, name, task) for name in RESNET}


def resnet(name: str, task: Task, seconds: float) -> Iterator[bench.Row]:
    """Yield speed and memory of ResNet-18, and its accuracy after the epochs that fit into so many seconds."""
    end, dataset = time.monotonic() + seconds, cifar10(task)
    config, eager = (resnet_config(name, task, f"compile={compile}") for compile in ("true", "false"))
    problem = build_problem(config, dataset)
    peak = peak_flops(task)
    epoch, memory = epoch_of(problem, config, task)
    few = build_problem(eager, moved(generated_images(IMAGES), task.device))
    needed = flops_of(partial(step_of, few, eager)) / IMAGES * problem.n_samples
    yield f"resnet_{name}_seconds", epoch, "s/epoch"
    yield f"resnet_{name}_images", problem.n_samples / epoch, "images/s"
    yield f"resnet_{name}_flops", needed / 1e12, "TFLOP/epoch"
    yield f"resnet_{name}_share_of_peak", needed / epoch / peak, "share"
    yield f"resnet_{name}_peak", peak / 1e12, "TFLOP/s"
    if memory is not None:
        yield f"resnet_{name}_memory", memory / MIB, "MiB"
    epochs = int((end - time.monotonic()) / epoch) - 1  # one for the evaluation
    if dataset.name == "cifar10" and epochs > 0:
        theta = trained(problem, config, epochs)
        test = dataset.x_test, dataset.y_test
        yield f"resnet_{name}_accuracy", evaluate(few, theta, test)["test_accuracy"].item(), "%"
        yield f"resnet_{name}_epochs", epochs, "epochs"


def resnet_config(name: str, task: Task, *overrides: str) -> DictConfig:
    width = f"model.width={task.sizes.width}"
    return config_of(RESNET[name], "precision=bf16", width, *overrides, experiment="cifar10_resnet18")


@cache
def cifar10(task: Task) -> Dataset:
    """Return CIFAR-10, or where it is missing, generated images."""
    options = options_of(config_of("sgd", experiment="cifar10_resnet18").dataset)
    try:
        return load(**options | {"first": task.sizes.images, "download": False}, device=task.device)
    except DatasetError:
        print(
            f"CIFAR-10 is not in {options['root']}: the images are generated, and no accuracy is measured", flush=True
        )
        return moved(generated_images(task.sizes.images), task.device)


def epoch_of(problem: Problem, config: DictConfig, task: Task) -> tuple[float, int | None]:
    """Return seconds of an epoch without compiling, and the largest memory on a GPU."""
    optimizer = replace(instantiate(config.optimizer, _convert_="all"), epoch_parts=task.sizes.parts)
    state, on_gpu = optimizer.init(problem, [0]), task.device.type == "cuda"
    timed_step(problem, optimizer, state)  # compiles
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    seconds = median(timed_step(problem, optimizer, state) for _ in range(task.sizes.turns))
    return task.sizes.parts * seconds, torch.cuda.max_memory_allocated(task.device) if on_gpu else None


def step_of(problem: Problem, config: DictConfig) -> None:
    optimizer: Optimizer[Any] = instantiate(config.optimizer, _convert_="all")
    optimizer.step(problem, optimizer.init(problem, [0]))


def trained(problem: Problem, config: DictConfig, epochs: int) -> Any:
    """Return Θ after so many epochs, with the schedules of so long a run."""
    optimizer: Optimizer[Any] = instantiate(config.optimizer, iterations=epochs, _convert_="all")
    state = optimizer.init(problem, [0])
    for _ in range(epochs):
        timed_step(problem, optimizer, state)
    return state.theta


def peak_flops(task: Task) -> float:
    """Return the FLOP/s of large products in bf16."""
    left, right = torch.rand(2, task.sizes.product, task.sizes.product, device=task.device).bfloat16()
    seconds = []
    for _ in range(10):
        synchronize(task.device)
        start = time.perf_counter()
        left @ right
        synchronize(task.device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * task.sizes.product**3 / median(seconds)


PARTS = {
    "correctness": Part(1.5, comparisons, is_comparison=True),
    "processes": Part(0.5, on_two, is_comparison=True),
    "speed": Part(2.5, speeds),
    "resnet": Part(2.5, resnets),
}

if __name__ == "__main__":
    with failed_writes_in_words():
        main()
