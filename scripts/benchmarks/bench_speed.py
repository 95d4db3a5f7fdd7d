"""What compiling gains, and what is possible: python -m scripts.benchmarks.bench_speed --against OLD

The contestants are the optimizers of experiment=mnist_shallow, as tuned: of this checkout, eager and compiled, and of
OLD, a checkout of an older commit (git worktree add OLD COMMIT). Beside them are plain loops in PyTorch and, with
--jax, in JAX; `floor`, an epoch's matrix products and fused updates alone; and a large product. Each is a process of
its own (see `scripts/benchmarks/worker.py`); those of a race take turns in parts of an epoch. The data are generated,
60,000 x 784, float32. Run it on an idle machine.

X_over_Y with the unit "times as fast" is the seconds of Y over those of X; with the unit "ratio of seconds" it is the
seconds of X over those of Y. Both are medians over the turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median

import torch

from experiments.paths import in_full
from experiments.provenance import commit
from experiments.store import failed_writes_in_words
from scripts.benchmarks.bench import Row, share, write
from scripts.benchmarks.races import ROOT, Contestant, Lane, Options, race, started, times_as_fast

STACKS = (1, 5, 10, 20, 45)  # replicas
WAITING: dict[str, dict[str, str | None]] = {
    "default": {"GOMP_SPINCOUNT": None},
    "passive": {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "passive"},
    "spincount30000": {"GOMP_SPINCOUNT": "30000"},
}
PROFILED = {
    "online1": Contestant("online_block_admm"),
    "online5": Contestant("online_block_admm", 5),
    "block1": Contestant("block_admm"),
    "sgd1": Contestant("sgd"),
}


def sides(method: str, replicas: int, options: Options, eager: bool = True) -> dict[str, Contestant]:
    """Return a method's contestants in our checkouts, its floor, and the large product."""
    ours = Contestant(method, replicas)
    contestants = {"compiled": replace(ours, compile=True), "floor": replace(ours, kind="floor")}
    if options.against:
        contestants["before"] = replace(ours, checkout=options.against)
    if eager:
        contestants["eager"] = ours
    return contestants | {"product": replace(ours, kind="product")}


def online1(options: Options) -> Iterator[Row]:
    contestants = sides("online_block_admm", 1, options)
    batch_size = contestants["compiled"].spec(options)["batch_size"]
    lanes = race(contestants | {"sgd": Contestant("sgd", 1, batch_size, compile=True)}, options)
    sgd = lanes.pop("sgd")
    yield from rows("online1", lanes, options)
    yield f"compiled_sgd1_batch{batch_size}_seconds", sgd.epoch, "s/epoch"
    yield "online_over_sgd", times_as_fast(sgd, lanes["compiled"]), "ratio of seconds"


def online5(options: Options) -> Iterator[Row]:
    yield from rows("online5", race(sides("online_block_admm", 5, options), options), options)


def online45(options: Options) -> Iterator[Row]:
    yield from rows("online45", race(sides("online_block_admm", 45, options, eager=False), options), options)


def block1(options: Options) -> Iterator[Row]:
    yield from rows("block1", race(sides("block_admm", 1, options), options), options)


def sgd1(options: Options) -> Iterator[Row]:
    rivals = {"torch": Contestant("sgd", kind="plain_torch")} | by_jax(1, options)
    yield from rows("sgd1", race(sides("sgd", 1, options) | rivals, options), options)


def sgd5(options: Options) -> Iterator[Row]:
    yield from rows("sgd5", race(sides("sgd", 5, options) | by_jax(5, options), options), options)


def adam1(options: Options) -> Iterator[Row]:
    rivals = {"torch": Contestant("adam", kind="plain_torch")}
    yield from rows("adam1", race(sides("adam", 1, options) | rivals, options), options)


def by_jax(replicas: int, options: Options) -> dict[str, Contestant]:
    if options.jax is None:
        return {}
    return {"jax": Contestant("sgd", replicas, kind="plain_jax", python=options.jax)}


def rows(name: str, lanes: Mapping[str, Lane], options: Options) -> Iterator[Row]:
    """What the lanes of a race between a method's contestants tell."""
    compiled = lanes["compiled"]
    for label in ("compiled", "eager"):
        if {label, "before"} <= lanes.keys():
            assert options.against
            unit = f"times as fast as {commit(options.against)}"
            yield f"{label}_{name}_over_before", times_as_fast(lanes[label], lanes["before"]), unit
    for rival in ("torch", "jax"):
        if rival in lanes:
            yield f"compiled_{name}_over_{rival}", times_as_fast(compiled, lanes[rival]), "times as fast"
    yield f"compiled_{name}_over_floor", times_as_fast(lanes["floor"], compiled), "ratio of seconds"
    flops = lanes["floor"].told["flops"]
    yield f"{name}_flops", flops / 1e6, "MFLOP/mini-batch"
    for label, lane in lanes.items():
        if label != "product":
            yield f"{label}_{name}_seconds", lane.epoch, "s/epoch"
        if label in ("compiled", "eager", "before"):
            needed = flops * lanes["floor"].told["batches"]
            yield f"{label}_{name}_share_of_peak", share(needed, lane.chunks, lanes["product"].chunks), "share"
    yield f"compiled_{name}_compile_seconds", compiled.compiling, "s"
    yield f"compiled_{name}_compile_seconds_cached", compiled.loading, "s"
    if "eager" in lanes and lanes["eager"].epoch > compiled.epoch:
        minibatches = lanes["floor"].told["batches"] * compiled.contestant.parts
        gained = (lanes["eager"].epoch - compiled.epoch) / minibatches
        yield f"compiled_{name}_pays_after", compiled.compiling / gained, "mini-batches"
        yield f"compiled_{name}_pays_after_cached", compiled.loading / gained, "mini-batches"


def stacks(options: Options) -> Iterator[Row]:
    """Seconds of an epoch of online Block-ADMM for one of S replicas, compiled, for each S of `STACKS`; and 45 runs one
    after the other over the same in the best of these stacks, without what compiling takes."""
    contestants = {str(n): Contestant("online_block_admm", n, compile=True) for n in STACKS}
    lanes = race(contestants, options)
    per_replica = {n: lanes[str(n)].epoch / n for n in STACKS}
    for n, seconds in per_replica.items():
        yield f"compiled_online{n}_seconds_per_replica", seconds, "s/epoch"
    best = min(seconds for n, seconds in per_replica.items() if n > 1)
    yield "grid45_single_over_stacked_compiled", per_replica[1] / best, "ratio of seconds"


def waiting(options: Options) -> Iterator[Row]:
    """What passive waiting of OpenMP's threads gains, alone and beside a process that keeps a core busy."""
    tasks = {f"online{n}": Contestant("online_block_admm", n) for n in (1, 5)}
    tasks["product"] = Contestant("online_block_admm", kind="product")
    for name, task in tasks.items():
        contestants = {policy: replace(task, environment=variables) for policy, variables in WAITING.items()}
        for state, is_busy in (("idle", False), ("busy", True)):
            lanes = race(contestants, options, is_busy)
            chunks = task.parts if task.kind == "ours" else 1
            yield f"default_wait_{state}_{name}_seconds", chunks * median(lanes["default"].chunks), "s"
            for policy in ("passive", "spincount30000"):
                gain = times_as_fast(lanes[policy], lanes["default"])
                yield f"{policy}_wait_{state}_{name}", gain, "times as fast as default"


def parts(options: Options) -> Iterator[Row]:
    """Time of a mini-batch by part, under PyTorch's profiler; see `scripts.benchmarks.profile_step`."""
    for name, contestant in PROFILED.items():
        for label, compiled in (("eager", False), ("compiled", True)):
            profiled = replace(contestant, kind="profiled", compile=compiled)
            with tempfile.TemporaryDirectory() as folder, started(profiled, options, folder) as (_, told):
                for part, seconds in told["parts"].items():
                    yield f"{label}_{name}_part_{part}", 1e6 * seconds, "us/mini-batch"


MEASURES = (online1, online5, online45, block1, sgd1, sgd5, adam1, stacks, waiting, parts)


def main() -> None:
    names = [measure.__name__ for measure in MEASURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=in_full, default=ROOT / "results" / "bench.csv")
    parser.add_argument("--against", type=in_full, metavar="OLD", help="a checkout of an older commit")
    parser.add_argument("--jax", metavar="PYTHON", help="an environment's python that has JAX, see docs/performance.md")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--turns", type=int, default=Options.turns)
    parser.add_argument("--threads", type=int, default=Options.threads)
    given = parser.parse_args()
    options = Options(given.against, given.jax, given.turns, given.threads)
    if options.against is None:
        print("without --against there are no rows …_over_before")
    if options.jax is None:
        print("without --jax there are no rows …_over_jax")
    torch.set_num_threads(options.threads)  # which names the machine in the rows
    for measure in MEASURES:
        if measure.__name__ in given.only:
            found = []
            for row in measure(options):
                found.append(row)
                print(f"{row[0]:45s} {row[1]:12.5g} {row[2]}", flush=True)
            write(given.path, found)


if __name__ == "__main__":
    with failed_writes_in_words():
        main()
