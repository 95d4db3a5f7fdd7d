"""Write the tables of docs/performance.md, parallel.md and gpu.md: python -m scripts.benchmarks.performance_page

Those of measurements are from results/bench.csv and, on a GPU, results/bench_gpu.csv; that of docs/parallel.md's model
is from its formulas.

They stand between `<!-- table: name -->` and `<!-- end -->`. What has not been measured leaves its cell empty. An aim
stands in brackets beside what was reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.reports.methods import method_of, methods
from experiments.reports.writing import update_tables
from experiments.store import failed_writes_in_words
from scripts.benchmarks import parallel_model
from scripts.benchmarks.contestants.profiled import PARTS, REST
from scripts.benchmarks.gpu_check import RESNET, STACKED, Sizes
from scripts.benchmarks.races import ROOT

PAGES = [ROOT / "docs" / name for name in ("performance.md", "parallel.md", "gpu.md")]
BENCH, BENCH_GPU, PARALLEL = (ROOT / "results" / name for name in ("bench.csv", "bench_gpu.csv", "tables/parallel.csv"))
RACES = {
    "online1": "online Block-ADMM, 1 seed, B = 128",
    "online5": "the same, 5 seeds",
    "online45": "the same, 45",
    "block1": "Block-ADMM, 1 seed, B = 256",
    "sgd1": "SGD, 1 seed, B = 64",
    "sgd5": "the same, 5 seeds",
    "adam1": "Adam, 1 seed, B = 64",
}
WAITS = {
    f"{state}_{name}": f"{words}, {state}"
    for name, words in {"online1": "online, 1 seed", "online5": "online, 5 seeds", "product": "2048³ product"}.items()
    for state in ("idle", "busy")
}
PROFILED = {"online1": "online, 1", "online5": "online, 5", "block1": "Block-ADMM", "sgd1": "SGD"}
# By row of results/bench.csv: at least so many times as fast, and at most 1.3 times as long as SGD.
AIMS = dict.fromkeys((f"eager_{race}_over_before" for race in RACES), 1.0) | {
    "eager_online5_over_before": 1.05,
    "eager_sgd5_over_before": 1.05,
    "compiled_online1_over_before": 2.0,
    "compiled_online5_over_before": 1.6,
    "compiled_online45_over_before": 1.15,
    "compiled_block1_over_before": 2.0,
    "compiled_sgd1_over_before": 1.2,
    "compiled_sgd5_over_before": 1.2,
    "compiled_adam1_over_before": 1.2,
    "compiled_sgd1_over_torch": 1.9,
    "compiled_adam1_over_torch": 1.9,
    "compiled_sgd1_over_jax": 1.5,
    "compiled_sgd5_over_jax": 1.5,
    "online_over_sgd": 1.3,
}
# By name: corner, rows and columns. A cell is the benchmark's row that has the column's name, with the row's in it.
TABLES: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "networks": (
        "ratios of seconds",
        {
            "resnet18": "torchvision's resnet18, mini-batches of 64 images of 32×32",
            "gpt": "GPT of four layers, 32×64 characters",
        },
        {
            "Adam, through blocks, over PyTorch": "{}_ours_over_torch",
            "online Block-ADMM over PyTorch": "{}_online_over_torch",
            "clipped steps of Z over plain ones": "{}_online_over_gradient",
        },
    ),
    "seconds": (
        "seconds of an epoch",
        RACES,
        {
            "before": "before_{}_seconds",
            "eager": "eager_{}_seconds",
            "compiled": "compiled_{}_seconds",
            "PyTorch loop": "torch_{}_seconds",
            "JAX": "jax_{}_seconds",
            "floor": "floor_{}_seconds",
        },
    ),
    "gains": (
        "times as fast",
        RACES,
        {
            "eager over before": "eager_{}_over_before",
            "compiled over before": "compiled_{}_over_before",
            "compiled over PyTorch": "compiled_{}_over_torch",
            "compiled over JAX": "compiled_{}_over_jax",
        },
    ),
    "online_over_sgd": (
        "compiled, 1 seed, B = 128",
        {"online": "an epoch of online Block-ADMM over one of SGD, at most"},
        {"ratio of seconds": "{}_over_sgd"},
    ),
    "compiling": (
        "seconds that the first epoch takes longer",
        RACES,
        {
            "first time": "compiled_{}_compile_seconds",
            "from the cache": "compiled_{}_compile_seconds_cached",
            "mini-batches until it pays": "compiled_{}_pays_after",
            "the same from the cache": "compiled_{}_pays_after_cached",
        },
    ),
    "peak": (
        "of a mini-batch",
        RACES,
        {
            "MFLOP": "{}_flops",
            "share of peak, before": "before_{}_share_of_peak",
            "eager": "eager_{}_share_of_peak",
            "compiled": "compiled_{}_share_of_peak",
            "compiled over floor": "compiled_{}_over_floor",
        },
    ),
    "parts": (
        "µs of a mini-batch",
        {part: part.replace("_", " ") for part in [*PARTS, REST]},
        {
            f"{words}, {label}": f"{label}_{name}_part_{{}}"
            for name, words in PROFILED.items()
            for label in ("eager", "compiled")
        },
    ),
    "stacks": (
        "seeds in a stack",
        {f"online{n}": str(n) for n in (1, 5, 10, 20, 45)},
        {"seconds of an epoch, per seed": "compiled_{}_seconds_per_replica"},
    ),
    "processes": (
        "two processes of one thread",
        {
            "blocks": "Block-ADMM as printed, 784–128⁹–10, by blocks",
            "samples_standard": "Standard ADMM, 784–128–128–10, by samples",
            "samples_bcd": "BCD, 784–128–128–10, by samples",
        },
        {
            "s per iteration": "seconds_parallel_{}",
            "times as fast as one process": "parallel_{}_over_1",
            "as one process with two threads": "parallel_{}_over_2_threads",
            "variables of a process, times smaller": "parallel_{}_memory",
            "MiB exchanged per iteration": "parallel_{}_told",
        },
    ),
    "waiting": (
        "times as fast as by default",
        WAITS,
        {
            "seconds by default": "default_wait_{}_seconds",
            "OMP_WAIT_POLICY=passive": "passive_wait_{}",
            "GOMP_SPINCOUNT=30000": "spincount30000_wait_{}",
        },
    ),
}

LABELS = {name: method_of(method).label for name, method in (STACKED | RESNET).items()}
OPTIMIZERS = {name: method.label for name, method in methods().items() if name not in ("nmf", "pca", "raw")}
GPU_TABLES: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "gpu_correctness": (
        "largest difference",
        OPTIMIZERS,
        {
            "fully connected": "difference_{}",
            "the same, compiled": "difference_{}_compiled",
            "ResNet-18": "difference_{}_resnet",
        },
    ),
    "gpu_processes": (
        "two processes and one",
        {"samples": "parallel=samples", "blocks": "parallel=blocks"},
        {"largest difference": "difference_parallel_{}"},
    ),
    "gpu_speed": (
        "seconds of an epoch",
        {f"{name}{n}": f"{LABELS[name]}, {n} in a stack" for name in STACKED for n in Sizes.stacks},
        {
            "eager": "eager_{}_seconds",
            "compiled": "compiled_{}_seconds",
            "times as fast": "compiled_{}_over_eager",
            "seconds of compiling": "compiled_{}_compile_seconds",
        },
    ),
    "gpu_resnet": (
        "ResNet-18",
        {name: LABELS[name] for name in RESNET},
        {
            "seconds of an epoch": "resnet_{}_seconds",
            "images per second": "resnet_{}_images",
            "TFLOP of an epoch": "resnet_{}_flops",
            "share of peak": "resnet_{}_share_of_peak",
            "peak, TFLOP/s": "resnet_{}_peak",
            "memory, MiB": "resnet_{}_memory",
            "test accuracy, %": "resnet_{}_accuracy",
            "after epochs": "resnet_{}_epochs",
        },
    ),
}


def main() -> None:
    for page in PAGES:
        update_tables(page, all_tables())
        print(f"written: {page}")


def all_tables() -> dict[str, pd.DataFrame]:
    """Return the pages' tables by name: what has been measured, the model on paper, and that of experiment=parallel."""
    of_experiment = pd.read_csv(PARALLEL).drop(columns="machine")
    return tables(BENCH) | {"model": parallel_model.table(), "parallel": of_experiment} | gpu_tables(BENCH_GPU)


def tables(bench: Path) -> dict[str, pd.DataFrame]:
    """Return the page's tables by name."""
    rows = pd.read_csv(bench)
    values = dict(zip(rows["name"], rows["value"], strict=True))
    return {name: table(values, *parts) for name, parts in TABLES.items()}


def gpu_tables(bench: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of docs/gpu.md by name, with the rows of one card after the other."""
    if not bench.exists():
        return {name: pd.DataFrame({corner: ["not measured yet"]}) for name, (corner, *_) in GPU_TABLES.items()}
    cards = {
        card: dict(zip(rows["name"], rows["value"], strict=True))
        for card, rows in pd.read_csv(bench).groupby("machine")
    }
    return {
        name: pd.concat({card: table(values, *parts) for card, values in cards.items()}, names=["card"])
        .reset_index("card")
        .reset_index(drop=True)
        for name, parts in GPU_TABLES.items()
    }


def table(
    values: Mapping[str, float], corner: str, rows: Mapping[str, str], columns: Mapping[str, str]
) -> pd.DataFrame:
    """Return a table of the values whose names are a column's with a row's in it."""
    cells = {
        header: [with_aim(name, values[name]) if (name := pattern.format(row)) in values else "" for row in rows]
        for header, pattern in columns.items()
    }
    return pd.DataFrame({corner: list(rows.values()), **cells})


def with_aim(name: str, value: float) -> str:
    """Return a value, with its aim in brackets if it has one."""
    return f"{number(value)} ({AIMS[name]:g})" if name in AIMS else number(value)


def number(value: float) -> str:
    """Return a value with three digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.3g}"


if __name__ == "__main__":
    with failed_writes_in_words():
        main()
