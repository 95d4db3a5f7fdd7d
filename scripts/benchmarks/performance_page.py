"""Write the tables of docs/performance.md from results/bench.csv: python -m scripts.benchmarks.performance_page

They stand between `<!-- table: name -->` and `<!-- end -->`. What has not been measured leaves its cell empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.reports.writing import update_tables
from experiments.store import failed_writes_in_words
from scripts.benchmarks.contestants.profiled import PARTS, REST
from scripts.benchmarks.races import ROOT

PAGE, BENCH = ROOT / "docs" / "performance.md", ROOT / "results" / "bench.csv"
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
# By name: corner, rows and columns. A cell is the benchmark's row that has the column's name, with the row's in it.
TABLES: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
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
    "compiling": (
        "seconds that the first epoch takes longer",
        RACES,
        {"first time": "compiled_{}_compile_seconds", "from the cache": "compiled_{}_compile_seconds_cached"},
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
    "waiting": (
        "times as fast as by default",
        WAITS,
        {
            "seconds by default": "default_wait_{}_seconds",
            "OMP_WAIT_POLICY=passive": "passive_wait_{}",
            "GOMP_SPINCOUNT=0": "spincount0_wait_{}",
        },
    ),
}


def main() -> None:
    update_tables(PAGE, tables(BENCH))
    print(f"written: {PAGE}")


def tables(bench: Path) -> dict[str, pd.DataFrame]:
    """Return the page's tables by name."""
    rows = pd.read_csv(bench)
    values = dict(zip(rows["name"], rows["value"], strict=True))
    return {name: table(values, *parts) for name, parts in TABLES.items()}


def table(
    values: Mapping[str, float], corner: str, rows: Mapping[str, str], columns: Mapping[str, str]
) -> pd.DataFrame:
    """Return a table of the values whose names are a column's with a row's in it."""
    cells = {
        header: [f"{values[name]:.3g}" if (name := pattern.format(row)) in values else "" for row in rows]
        for header, pattern in columns.items()
    }
    return pd.DataFrame({corner: list(rows.values()), **cells})


if __name__ == "__main__":
    with failed_writes_in_words():
        main()
