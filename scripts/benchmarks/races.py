"""Contestants in processes of their own, that take turns in parts of an epoch.

All rows of `scripts.benchmarks.bench_speed` come from such races.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from experiments.identity import FORMER_NAMES
from scripts.benchmarks.bench import CLASSES, FEATURES, SAMPLES, SEEDS, config_of, ratio

Chunk = Callable[[], float]  # returns its seconds
LARGEST = 1.0  # input: with it samples are no longer than those of MNIST, so that SGD does not diverge
ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """against: a checkout of an older commit. jax: an environment's Python that has JAX. turns: of each contestant."""

    against: Path | None = None
    jax: str | None = None
    turns: int = 15
    threads: int = 2
    samples: int = SAMPLES
    device: str = "cpu"


@dataclass(frozen=True)
class Contestant:
    """method: an optimizer as tuned for experiment=mnist_shallow. batch_size: None is the tuned one. kind: a file of
    `contestants/`. checkout: where `admm` is imported from. environment: variables beside this process's,
    None for one that it shall not have."""

    method: str
    replicas: int = 1
    batch_size: int | None = None
    kind: str = "ours"
    compile: bool = False
    checkout: Path = ROOT
    python: str = sys.executable
    environment: dict[str, str | None] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """The chunks that an epoch has."""
        return 4 if self.replicas < 10 else 8

    def spec(self, options: Options) -> dict[str, Any]:
        """Return what the worker is to prepare."""
        override = [f"optimizer.batch_size={self.batch_size}"] if self.batch_size else []
        config = OmegaConf.to_container(config_of(self.method, *override), resolve=True)
        assert isinstance(config, dict)
        split = {key: value for key, value in config["split"].items() if key != "_target_"}
        epochs = {"epoch_parts": self.parts, "iterations": 100 * self.parts}
        return {
            **{key: config[key] for key in ("model", "loss", "init")},
            **{"split": split, "optimizer": config["optimizer"] | epochs, "method": self.method},
            **{"samples": options.samples, "features": FEATURES, "classes": CLASSES, "threads": options.threads},
            **{"batch_size": config["optimizer"]["batch_size"], "seeds": [*islice(cycle(SEEDS), self.replicas)]},
            **{"parts": self.parts, "warm_up": self.parts, "compile": self.compile, "former": FORMER_NAMES},
            **{"largest": LARGEST, "device": options.device, "flush": self.checkout == ROOT},
        }


@dataclass
class Lane:
    """What is known of a contestant.

    Attributes:
        told: what its process has told at the start, among it the seconds `warm_up` of a first epoch's chunks.
        chunks: seconds of its chunks in the race.
        again: what it tells when it is started once more, with what it has compiled at hand.
    """

    contestant: Contestant
    told: dict[str, Any]
    chunks: list[float] = field(default_factory=list)
    again: dict[str, Any] | None = None

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.contestant.parts * median(self.chunks)

    @property
    def compiling(self) -> float:
        """Seconds that the first epoch takes longer."""
        return float(sum(self.told["warm_up"])) - self.epoch

    @property
    def loading(self) -> float:
        """The same where everything has been compiled by another process."""
        assert self.again
        return float(sum(self.again["warm_up"])) - self.epoch


@contextmanager
def started(contestant: Contestant, options: Options, cache: str) -> Iterator[tuple[Chunk, dict[str, Any]]]:
    """Start a contestant's process. Yields a function that lets it do a chunk, and what it has told.

    cache: the folder in which PyTorch keeps what it has compiled. Raises RuntimeError if the process ends, or has
    imported another checkout.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    places = {"PYTHONPATH": str(contestant.checkout), "TORCHINDUCTOR_CACHE_DIR": cache}
    variables = os.environ | threads | places | contestant.environment
    environment = {name: value for name, value in variables.items() if value is not None}
    file = str(HERE / "contestants" / f"{contestant.kind}.py")
    command = [contestant.python, str(HERE / "worker.py"), file, json.dumps(contestant.spec(options))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, encoding="utf-8", stdin=pipe, stdout=pipe) as process:
        assert process.stdin and process.stdout
        answers = process.stdout

        def answer() -> Any:
            if not (line := answers.readline()):
                raise RuntimeError(f"{contestant}: the process has ended, exit {process.wait()}")
            return json.loads(line)

        def chunk() -> float:
            print("chunk", file=process.stdin, flush=True)
            return float(answer())

        told = answer()
        if not Path(told.get("checkout", contestant.checkout)).resolve().is_relative_to(contestant.checkout.resolve()):
            raise RuntimeError(f"{contestant.checkout}: admm was imported from {told['checkout']}")
        yield chunk, told


def race(contestants: Mapping[str, Contestant], options: Options, is_busy: bool = False) -> dict[str, Lane]:
    """Start one contestant after the other, each with nothing compiled yet, and let them take turns.

    is_busy: whether other processes keep busy all cores but one fewer than the contestants' threads, meanwhile.
    """
    lanes, chunks, folders = dict[str, Lane](), {}, {}
    with ExitStack() as stack:
        for name in contestants:
            folders[name] = stack.enter_context(tempfile.TemporaryDirectory())
        with ExitStack() as running:
            for name, contestant in contestants.items():
                chunks[name], told = running.enter_context(started(contestant, options, folders[name]))
                lanes[name] = Lane(contestant, told)
            if is_busy:
                running.enter_context(busy((os.cpu_count() or 1) - options.threads + 1))
            for _ in range(options.turns):
                for name, chunk in chunks.items():
                    lanes[name].chunks.append(chunk())
        for name, lane in lanes.items():
            if lane.contestant.compile:
                with started(lane.contestant, options, folders[name]) as (_, lane.again):
                    pass
    return lanes


def times_as_fast(fast: Lane, slow: Lane) -> float:
    return ratio([slow.chunks, fast.chunks], 0, 1)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many cores busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
