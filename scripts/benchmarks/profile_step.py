"""Where the time of a mini-batch goes: python -m scripts.benchmarks.profile_step online_block_admm

The optimizers are those of experiment=mnist_shallow, as tuned; the data are generated. Prints PyTorch's table of the
operations, then the time on the calling thread by part. The profiler itself takes a few microseconds per operation,
most of them in the last part, so that the sum is more than a mini-batch takes without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.benchmarks.contestants.profiled import profiled
from scripts.benchmarks.races import Contestant, Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("online_block_admm", "block_admm", "sgd", "adam"))
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--trace", type=Path, help="a file for chrome://tracing or https://ui.perfetto.dev")
    given = parser.parse_args()
    contestant = Contestant(given.method, given.replicas, compile=given.compile)
    options = Options(threads=given.threads, samples=given.samples)
    profiler, parts = profiled(contestant.spec(options))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    for part, seconds in parts.items():
        print(f"{part:20s} {1e6 * seconds:10.1f} us/mini-batch")
    if given.trace:
        profiler.export_chrome_trace(str(given.trace))


if __name__ == "__main__":
    main()
