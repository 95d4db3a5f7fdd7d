"""Several processes over one, as ratios measured in one run: python -m scripts.benchmarks.bench_parallel [bench.csv]

An iteration on all 60,000 digits of rows of experiment=parallel. The contestants take turns: two processes of one
thread, one process of one thread, one process of two threads. A ratio is that of the fastest iterations of all turns,
as on a virtual machine the same iteration takes half as long again a minute later. It needs MNIST and two idle cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from admm.files import MIB
from experiments.paths import in_full
from experiments.rows import CONF
from experiments.store import failed_writes_in_words
from experiments.tasks.scaling import race
from scripts.benchmarks.bench import Row, write

ROWS = {"blocks": "block_admm-blocks_deep", "samples_standard": "standard_admm-samples", "samples_bcd": "bcd-samples"}
CONTESTANTS = (2, 1), (1, 1), (1, 2)  # processes, and threads of each


def main(path: Path) -> None:
    for name, row in ROWS.items():
        rows = ratios(name, config_of(row))
        for measured in rows:
            print(f"{measured[0]:40s} {measured[1]:10.3f} {measured[2]}", flush=True)
        write(path, rows)
    print(f"written: {path}")


def config_of(row: str) -> DictConfig:
    """Return the configuration of a row of experiment=parallel."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["experiment=parallel", f"row=parallel/{row}", "steps=3", "turns=4"])


def ratios(name: str, config: DictConfig) -> list[Row]:
    """Return the ratios of a row."""
    two, one, threads = race(config, CONTESTANTS)
    return [
        (f"parallel_{name}_over_1", one["seconds"] / two["seconds"], "ratio"),
        (f"parallel_{name}_over_2_threads", threads["seconds"] / two["seconds"], "ratio"),
        (f"parallel_{name}_memory", one["variables"] / two["variables"], "ratio"),
        (f"parallel_{name}_told", (two["added"] + two["sent"]) / MIB, "MiB/iteration"),
        (f"seconds_parallel_{name}", two["seconds"], "s/iteration"),
    ]


if __name__ == "__main__":
    with failed_writes_in_words():
        main(in_full(sys.argv[1] if len(sys.argv) > 1 else "results/bench.csv"))
