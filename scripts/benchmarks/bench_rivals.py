"""The rivals as published over ours: python -m scripts.benchmarks.bench_rivals [results/bench.csv]

Seconds of an iteration of the literal transcription (`scripts.literal`) over ours, one replica: generated data, the
same starting variables, the contestants take turns. Then by how much their weights differ, the peak memory of each, and
how near our iteration comes to the machine's matrix products. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from admm.blocks import split
from admm.files import MIB
from admm.losses import CrossEntropy, Loss, SquaredError, one_hot
from admm.models import initialiser, mlp
from admm.optimizers import Optimizer, Problem
from admm.optimizers.bcd import BCD, BCDState
from admm.optimizers.dladmm import DLADMM, DLADMMState
from admm.optimizers.fully_connected import linear_layers
from admm.optimizers.standard_admm import StandardADMM, StandardADMMState
from admm.optimizers.taylor import Taylor, TaylorState
from experiments.tasks.memory import reset_high_water_mark, resident
from scripts.benchmarks.bench import CLASSES, FEATURES, Row, Task, ratio, turns, write
from scripts.literal import bcd, dladmm, standard_admm, taylor

DIFFERENCE_SAMPLES = 2_000  # where the differences are measured in float64
WARM_SAMPLES = 64  # of the iterations before the baseline of the peak memory
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contestant:
    """iterate: one iteration. weights: W_1..W_L as they are now, [d_l, d_{l−1}]."""

    iterate: Task
    weights: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Rival:
    """literal: the transcription's contestant, from copies of the variables in a state of ours."""

    optimizer: Optimizer[Any]
    literal: Callable[[Any, Problem, Any], Contestant]
    hidden: tuple[int, ...] = (128, 128)
    samples: int = 60_000
    loss: Loss = SquaredError()  # noqa: RUF009, it is immutable
    uncounted: int = 1  # turns before the counted ones
    counted: int = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="results/bench.csv, but with --samples none")
    parser.add_argument("--only", choices=RIVALS, metavar="NAME", help=f"one of {', '.join(RIVALS)}")
    parser.add_argument("--samples", type=int, help="fewer than the benchmark's, to try it out")
    options = parser.parse_args()
    path = options.path or (None if options.samples else ROOT / "results" / "bench.csv")
    for name in [options.only] if options.only else RIVALS:
        rows = []
        for row in measure(name, options.samples):
            rows.append(row)
            print(f"{row[0]:50s} {row[1]:12.5g} {row[2]}", flush=True)
        if path:
            write(path, rows)
            print(f"written: {path}", flush=True)


def measure(name: str, samples: int | None) -> Iterator[Row]:
    """The rows of one rival."""
    rival, row = RIVALS[name], f"{name}_literal_over_ours"
    samples = samples or rival.samples
    problem = generated(rival, min(samples, DIFFERENCE_SAMPLES), torch.float64)
    yield f"{row}_difference", compete(rival, problem)[1], "relative"
    speed, difference = compete(rival, generated(rival, samples))
    yield row, speed, "ratio"
    yield f"{row}_difference_float32", difference, "relative"
    yield from share_of_peak(name, generated(rival, samples))
    if Path("/proc/self/clear_refs").exists():
        for side in ("ours", "literal"):
            yield f"{row}_peak_{side}", _in_fresh_process(name, side, samples), "MiB"


def compete(rival: Rival, problem: Problem) -> tuple[float, float]:
    """Seconds of the literal transcription over ours, and the largest relative difference of a weight afterwards."""
    state = rival.optimizer.init(problem, (0,))
    theirs, mine = rival.literal(rival.optimizer, problem, state), ours(rival, problem, state)
    times = turns(theirs.iterate, mine.iterate, counted=rival.counted, uncounted=rival.uncounted)
    pairs = zip(mine.weights(), theirs.weights(), strict=True)
    return ratio(times, 0, 1), max(_relative(a.double(), b.double()) for a, b in pairs)


def share_of_peak(name: str, problem: Problem) -> Iterator[Row]:
    """FLOP/s of our iteration's matrix products as a share of those of the largest layer's product alone."""
    rival = RIVALS[name]
    state = rival.optimizer.init(problem, (0,))
    counter, aten = FlopCounterMode(display=False), torch.ops.aten
    counter.flop_registry[aten.baddbmm_] = counter.flop_registry[aten.baddbmm]  # PyTorch counts only the latter
    with counter:
        rival.optimizer.step(problem, state)
    needed = counter.get_total_flops()
    fan_in, fan_out = max(pairwise((FEATURES, *rival.hidden)), key=prod)
    x, weight, out = (torch.rand(shape) for shape in ((2000, fan_in), (fan_in, fan_out), (2000, fan_out)))
    product = 2.0 * x.numel() * fan_out
    count = max(1, round(needed / product))
    iteration, alone = turns(
        lambda: rival.optimizer.step(problem, state),
        lambda: [torch.mm(x, weight, out=out) for _ in range(count)],
        counted=rival.counted,
        uncounted=rival.uncounted,
    )
    shares = [needed / i / (count * product / p) for i, p in zip(iteration, alone, strict=True)]
    yield f"{name}_flops", needed / 1e9, "GFLOP/iteration"
    yield f"{name}_seconds", median(iteration), "s/iteration"
    yield f"{name}_share_of_peak", median(shares), "share"


def peak(name: str, side: str, samples: int) -> float:
    """Most MiB resident in one iteration above what is with the data alone, variables included; for this process only.

    The high-water mark of ours includes the initialisation. The transcription's does not: it is a copy of ours.
    """
    rival = RIVALS[name]
    small = generated(rival, WARM_SAMPLES)  # the libraries' code and buffers are nobody's
    compete(rival, small)
    problem = generated(rival, samples)
    before = resident("VmRSS")
    reset_high_water_mark()
    state = rival.optimizer.init(problem, (0,))
    make = ours if side == "ours" else _theirs
    contestant = make(rival, problem, state)
    del problem, state
    if side == "literal":
        reset_high_water_mark()
    contestant.iterate()
    return (resident("VmHWM") - before) / MIB


def generated(rival: Rival, samples: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Uniform inputs and labels."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(samples, FEATURES, generator=random).to(dtype)
    y = one_hot(torch.randint(CLASSES, (samples,), generator=random), CLASSES, x)
    blocks = split(mlp(FEATURES, rival.hidden, CLASSES), per_layer=True)
    if isinstance(rival.optimizer, BCD):  # its authors' start
        return Problem(x, y, blocks, rival.loss, initialiser("normal", 0.1, mean=0.0, std=0.01))
    return Problem(x, y, blocks, rival.loss, initialiser("pytorch"))


def ours(rival: Rival, problem: Problem, state: Any) -> Contestant:
    def weights() -> list[Tensor]:
        return [layer["weight"][0] for layer in linear_layers(problem, state.theta, "")]

    return Contestant(lambda: rival.optimizer.step(problem, state), weights)


def literal_bcd(options: BCD, problem: Problem, state: BCDState) -> Contestant:
    weights, biases = _parameters(problem, state)
    variables = {"w": weights, "b": biases} | {name: [t[0].clone() for t in getattr(state, name)] for name in "uv"}
    penalties = {name: _number(getattr(options, name)) for name in ("gamma", "rho", "alpha")}
    return Contestant(lambda: bcd.iterate(variables, problem.x, problem.y, **penalties), lambda: variables["w"])


def literal_dladmm(options: DLADMM, problem: Problem, state: DLADMMState) -> Contestant:
    weights, biases = _parameters(problem, state)
    rho, theta, tau = (_number(value) for value in (options.rho, options.theta, options.tau))
    z, a, (u, x, y) = _columns(state.z), _columns(state.a), _columns([*state.u, problem.x[None], problem.y[None]])
    variables = dladmm.Variables(weights, [b[:, None] for b in biases], z, a, u, rho, theta, tau)
    return Contestant(lambda: dladmm.iterate(variables, x, y), lambda: variables.w)


def literal_standard_admm(options: StandardADMM, problem: Problem, state: StandardADMMState) -> Contestant:
    w = [torch.cat([weight, bias[:, None]], 1) for weight, bias in zip(*_parameters(problem, state), strict=True)]
    variables = {"w": w} | {name: [t[0].clone() for t in getattr(state, name)] for name in "zauv"}
    x, y = problem.x, problem.y
    penalties = [_number(value) for value in (options.beta, options.gamma, options.weight_decay)]
    return Contestant(
        lambda: standard_admm.iterate(variables, x, y, *penalties), lambda: [w[:, :-1] for w in variables["w"]]
    )


def literal_taylor(options: Taylor, problem: Problem, state: TaylorState) -> Contestant:
    """With the transpose reduction: the pseudo-inverse of the activations as printed takes longer."""
    variables = {name: [t[0].clone() for t in getattr(state, name)] for name in "za"}
    variables |= {"w": _parameters(problem, state)[0], "multiplier": [state.multiplier[0].clone()]}
    x, y, done = problem.x, problem.y, state.iteration
    beta, gamma = _number(options.beta), _number(options.gamma)

    def iterate() -> None:
        nonlocal done
        taylor.iterate(variables, x, y, beta, gamma, update_multiplier=done >= options.warm_start)
        done += 1

    return Contestant(iterate, lambda: variables["w"])


RIVALS = {
    "dladmm": Rival(DLADMM(), literal_dladmm, (1000, 1000), 20_000, CrossEntropy(), uncounted=0, counted=1),
    "bcd_wide": Rival(BCD(1.0, 1.0, 5.0), literal_bcd, (1500, 1500, 1500), uncounted=0, counted=1),
    "bcd": Rival(BCD(1.0, 1.0, 5.0), literal_bcd),
    "standard_admm": Rival(StandardADMM(), literal_standard_admm),
    "taylor": Rival(Taylor(), literal_taylor),
}


def _in_fresh_process(name: str, side: str, samples: int) -> float:
    """`peak` in a process of its own, whose allocator returns every tensor of 1 MiB or more to the system at once."""
    program = f"from scripts.benchmarks.bench_rivals import peak; print(peak({name!r}, {side!r}, {samples}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    arguments = [sys.executable, "-c", program]
    return float(subprocess.run(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _theirs(rival: Rival, problem: Problem, state: Any) -> Contestant:
    return rival.literal(rival.optimizer, problem, state)


def _parameters(problem: Problem, state: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of the weights and biases of the one replica."""
    layers = linear_layers(problem, state.theta, "")
    weights, biases = ([layer[name][0].clone() for layer in layers] for name in ("weight", "bias"))
    return weights, biases


def _columns(variables: list[Tensor]) -> list[Tensor]:
    """Copies of the one replica's, with samples as columns."""
    return [t[0].T.clone(memory_format=torch.contiguous_format) for t in variables]


def _number(value: Any) -> float:
    """A hyperparameter that is the same for all replicas."""
    return float(value)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main()
