"""What tests/test_parallel.py runs on one process, and on several by `torchrun -m tests.parallel_cases`."""

import atexit
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from admm.augmentation import Augmentation, Chain, Mixup
from admm.blocks import split
from admm.losses import CrossEntropy
from admm.models import initialiser, mlp
from admm.optimizers import (
    BCD,
    DLADMM,
    SGD,
    Adam,
    AdaptivePenalty,
    Backprop,
    BlockADMM,
    Gotmare,
    OnlineBlockADMM,
    Optimizer,
    Problem,
    StandardADMM,
    Taylor,
    ZUpdate,
)
from admm.optimizers.rules import Averaged, Clipped, Group, Grouped
from admm.parallel import ALONE, Parallel
from admm.training import train

torch.set_num_threads(1)
N, ITERATIONS, SPLIT_AT = 31, 10, 5  # samples that 2 and 3 processes share unevenly; where training stops for a while


class Shifted(Augmentation):
    """Adds a random number to each sample."""

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randn(samples, 1, generator=generator, dtype=torch.float64)

    def apply(self, x: Tensor, changes: Tensor) -> Tensor:
        return x + 0.1 * changes


class Reshaped(nn.Module):
    """Fails for no samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)


class Centred(nn.Module):
    """Subtracts the running mean of former samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return centred


class Shared(nn.Linear):
    """Hands on, besides its output, a tensor that all samples share."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.bias.exp()


class Scaled(nn.Linear):
    """Scales its input by another one."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(inputs[0] * inputs[1])


def other_network() -> nn.Module:
    """Layers other than linear and ReLU."""
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 8), nn.Tanh(), Reshaped()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def normalised_network() -> nn.Module:
    """In evaluation, too, the samples depend on those that are evaluated with them."""
    normalisation = nn.BatchNorm1d(9, track_running_stats=False)
    return nn.Sequential(nn.Linear(6, 9), normalisation, nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3))


def problem(parallel: Parallel, network: nn.Module | None = None, **options: Any) -> Problem:
    """A small classification in float64."""
    x, y = samples(N, 0)
    cut: dict[str, Any] = {"after": ["1", "3"]} if network is not None else {"per_layer": True}
    blocks = split(network or mlp(6, hidden=[7, 5], classes=3), **cut)
    given = {"loss": CrossEntropy(), "initialise": initialiser("pytorch"), "parallel": parallel} | options
    return Problem(x, y, blocks, **given)


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=rng, dtype=torch.float64), torch.randint(0, 3, (count,), generator=rng)


SMALL = {"iterations": ITERATIONS, "theta_step": {"start": 0.02, "end": 0.001}, "batch_size": 4}
BATCH = SMALL | {"sweep": "batch", "batch_size": 8, "slice_size": 10, "primal_rounds": 2}
PRINTED = BATCH | {"dual_step": 1.0, "forward_mixing": 0.0, "dual_init": 0.1}
CLOSED: dict[str, Optimizer[Any]] = {
    "standard": StandardADMM(beta=1.0, gamma=1.0, weight_decay=0.01, start_from="forward"),
    "standard, uniform": StandardADMM(beta=1.0, gamma=1.0, weight_decay=0.1, spread=0.5),
    "taylor": Taylor(warm_start=2),
    "bcd": BCD(),
    "dladmm": DLADMM(rho=1e-2, theta=1e-3, tau=1e-3),
}
BY_SAMPLES: dict[str, Optimizer[Any]] = CLOSED | {
    "sgd": Backprop(iterations=ITERATIONS, theta_update=SGD(momentum=0.9), step_size=0.1, batch_size=4),
    "adam, clipped": Backprop(iterations=ITERATIONS, theta_update=Clipped(Adam(), 0.1), step_size=0.01, batch_size=2),
    "one at a time": BlockADMM(**SMALL | {"batch_size": 1}, dual_step=0.5),
    "gotmare": Gotmare(**SMALL, z_step=0.1),
    "online": OnlineBlockADMM(**SMALL),
    "online, as printed": OnlineBlockADMM(**SMALL, dual="paper", beta=1.0, z_update=ZUpdate("adam")),
    "block": BlockADMM(**SMALL, dual_step=0.5, forward_mixing=0.5, penalty=AdaptivePenalty(), z_update=ZUpdate("adam")),
}
SEPARABLE = Averaged(Adam(weight_decay=0.1), decay=0.5)
BY_BLOCKS: dict[str, Optimizer[Any]] = {
    "as printed": BlockADMM(**PRINTED, penalty=AdaptivePenalty(bound=0.1), z_update=ZUpdate("adam")),
    "majorised": BlockADMM(**PRINTED, z_update=ZUpdate("majorised", output_update="prox"), theta_update=SGD(0.9)),
    "clipped": BlockADMM(**PRINTED, z_step={"blocks": [0.3, 0.2, 0.1]}),
    "mixed": BlockADMM(**BATCH, z_step=0.01, dual_step=0.3, forward_mixing=0.5, z_update=ZUpdate("adam", steps=2)),
    "defaults": BlockADMM(**BATCH, theta_passes=0.5, z_step=0.1, theta_update=SEPARABLE),
}
BY_BLOCKS_ALONE: dict[str, Optimizer[Any]] = {"normalised": BlockADMM(**BATCH | {"slice_size": 16})}
NETWORKS = dict.fromkeys(("mixed", "defaults", "one at a time"), other_network) | {"normalised": normalised_network}
WORLDS: list[weakref.ref[Any]] = []  # the group that main has left behind in a cycle
INTERRUPTED = [  # one per form of a state
    *(("samples", name) for name in ("standard", "taylor", "bcd", "dladmm", "adam, clipped", "block")),
    *(("blocks", name) for name in ("as printed", "defaults")),
]


def cases() -> dict[tuple[str, str], Optimizer[Any]]:
    """The optimizers, by kind of parallel run and name."""
    return {("samples", name): optimizer for name, optimizer in (BY_SAMPLES | BY_BLOCKS).items()} | {
        ("blocks", name): optimizer for name, optimizer in (BY_BLOCKS | BY_BLOCKS_ALONE).items()
    }


def trained(
    case: tuple[str, str], parallel: Parallel, iterations: int = ITERATIONS, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train an optimizer; return Θ, the average of it if there is one, and the history without its seconds."""
    kind, name = case
    optimizer = cases()[case]
    network = NETWORKS[name]() if name in NETWORKS else None
    augmentation = Shifted() if name == "sgd" else None
    own = problem(parallel, network, augmentation=augmentation)
    state = optimizer.init(own, [3, 4] if name in CLOSED or case == ("blocks", "majorised") else [3])
    history = train(
        own,
        optimizer,
        state,
        iterations,
        {"test": samples(11, 1), "few": samples(2, 2)},
        evaluate_every=5,
        checkpoint=checkpoint,
        keep_last=iterations < ITERATIONS,
        angle_samples=7 if name in ("sgd", "majorised") else None,
    )
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]
    rule = getattr(optimizer, "theta_update", None)
    average = rule.average(own, state).flat() if isinstance(rule, Averaged) else state.theta.flat()
    parts = own.cut if kind == "blocks" else own.part
    return {"theta": state.theta.flat(), "average": average, "rows": rows, "state": parts}


def told(case: tuple[str, str], parallel: Parallel) -> tuple[int, int]:
    """Return the bytes that each process has added up, and all of them have sent, in an iteration."""
    own, optimizer = problem(parallel), cases()[case]
    state = optimizer.init(own, [3])
    added, sent = parallel.traffic.added, parallel.traffic.sent
    optimizer.step(own, state)
    of_all = parallel.all((parallel.traffic.added - added, parallel.traffic.sent - sent))
    return of_all[0][0], sum(sent for _, sent in of_all)


def message(run: Callable[[], Any]) -> str:
    """Return the message of the ValueError that a function raises."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(parallel: Parallel) -> dict[str, str]:
    """Return what is said where processes have different runs, or ones that cannot be shared out."""
    own, other = BY_SAMPLES["adam, clipped"], BY_SAMPLES["sgd"]
    different = replace(other, step_size=0.1 + 0.1 * parallel.rank)
    x, y = samples(N, parallel.rank)
    data = replace(problem(parallel), x=x, y=y)
    normalised = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    dependent = {
        "batch normalisation": normalised,
        "dropout": nn.Sequential(nn.Linear(6, 4), nn.Dropout(1e-6), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        "running statistics": nn.Sequential(nn.Linear(6, 4), Centred(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        "shared": nn.Sequential(nn.Linear(6, 4), Shared(4, 4), Scaled(4, 4), nn.Tanh(), nn.Linear(4, 3)),
    }
    by_blocks, plain = replace(parallel, kind="blocks"), problem(ALONE)
    grouped = Grouped(plain.blocks, [Group("*.bias", Clipped(Adam(), 0.1))], Adam())
    printed = BY_BLOCKS["as printed"]

    def run(at: Problem, optimizer: Optimizer[Any], seeds: list[int]) -> Callable[[], Any]:
        return lambda: train(at, optimizer, optimizer.init(at, seeds), 1)

    refused = {name: message(partial(problem, parallel, network)) for name, network in dependent.items()}
    return refused | {
        "fewer samples": message(lambda: replace(problem(parallel), x=x[:1], y=y[:1])),
        "optimizer": message(run(problem(parallel), different, [0])),
        "data": message(run(data, own, [0])),
        "seeds": message(run(problem(parallel), own, [0, 1])),
        "mixup": message(lambda: problem(parallel, augmentation=Chain([Shifted(), Mixup()]))),
        "kind": message(run(problem(by_blocks), own, [0])),
        "sweep": message(run(problem(by_blocks), BY_SAMPLES["block"], [0])),
        "rule": message(run(problem(by_blocks), replace(printed, theta_update=grouped), [0])),
        "too many": message(lambda: replace(problem(ALONE), parallel=replace(by_blocks, size=9))),
    }


def failures(parallel: Parallel, folder: Path) -> list[str]:
    """Return what is said where one process alone fails, in a callback and in writing a checkpoint."""
    optimizer, texts = BY_SAMPLES["adam, clipped"], list[str]()

    def fail(*_: Any) -> None:
        if parallel.rank == 1:
            raise RuntimeError("the callback has failed")

    (folder / "file").touch()
    for options in ({"callbacks": [fail]}, {"checkpoint": folder / "file" / "checkpoint", "keep_last": True}):
        own = problem(parallel)
        try:
            train(own, optimizer, optimizer.init(own, [0]), 1, **options)
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def main(folder: Path, checkpoints: Path) -> None:
    """Run all cases as one of several processes; process 0 writes what came out to `folder`.

    `checkpoints` are of another number of processes, of the first iterations: training goes on from each.
    """
    joined = {kind: Parallel.join(kind) for kind in ("samples", "blocks")}  # type: ignore[arg-type]
    found: dict[Any, Any] = {}
    for case in cases():
        parallel = joined[case[0]]
        found[case] = trained(case, parallel)
        if case in INTERRUPTED:
            trained(case, parallel, SPLIT_AT, folder / file_of(case))
            found["resumed", case] = trained(case, parallel, checkpoint=checkpoints / file_of(case))
        parts = parallel.all((found[case]["state"], torch.cat([found[case]["theta"], found[case]["average"]])))
        found[case]["parts"] = [part for part, _ in parts]
        found[case]["same"] = all(torch.equal(theta, parts[0][1]) for _, theta in parts)
    for name in ("standard", "taylor", "bcd", "gotmare"):
        found["told", name] = told(("samples", name), joined["samples"])
    for name in BY_BLOCKS:
        found["told", name] = told(("blocks", name), joined["blocks"])
    found["refused"] = joined["samples"].all(refusals(joined["samples"]))
    found["failed"] = joined["samples"].all(failures(joined["samples"], folder))
    if joined["samples"].is_first:
        torch.save(found, folder / "found.pt")
    cycle = [dist.group.WORLD]  # as an error's traceback may have it
    cycle.append(cycle)
    WORLDS.append(weakref.ref(cycle[0]))


def note_whether_joined(file: Path) -> None:
    file.write_text(str(dist.is_initialized() or WORLDS[0]() is not None))


def file_of(case: tuple[str, str]) -> str:
    return f"{case[0]} {case[1]}.pt"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atexit.register(note_whether_joined, Path(sys.argv[1], os.environ["RANK"]))  # runs last of all such functions
    main(Path(sys.argv[1]), Path(sys.argv[2]))
