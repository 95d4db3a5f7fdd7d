"""The README's table: some of the paper's numbers, each with ours beside it."""

from __future__ import annotations

import pandas as pd

from experiments.reports.curves import Curve, curves
from experiments.reports.methods import method_of
from experiments.reports.paper import entry_of
from experiments.store import Store

ROWS = (  # where the number is in the paper, the experiment, the method
    ("Figure 3: MNIST, 3 layers", "mnist_shallow", "block_admm"),
    ("Figure 3: MNIST, 3 layers", "mnist_shallow", "online_block_admm"),
    ("Figure 3: MNIST, 3 layers", "mnist_shallow", "sgd"),
    ("Figure 4: MNIST, 10 layers", "mnist_deep10", "block_admm"),
    ("Figure 6: Fashion-MNIST", "fashion_mnist", "block_admm"),
    ("Figure 7: CIFAR-10, reduced", "cifar10_resnet18_narrow", "online_block_admm"),
)
COLUMNS = {"faithful": ("faithful",), "tuned": ("tuned", "normal")}  # the settings of which a column has the first


def headlines(store: Store) -> pd.DataFrame:
    """Return the table. A row that has not been run has a missing value."""
    by_row = {
        (experiment, curve.record.method, curve.record.setting): curve
        for experiment in dict.fromkeys(experiment for _, experiment, _ in ROWS)
        for curve in curves(store.runs(experiment))
    }

    def ours(experiment: str, method: str, settings: tuple[str, ...]) -> str | None:
        found = [by_row[key] for setting in settings if (key := (experiment, method, setting)) in by_row]
        return _score(found[0]) if found else None

    return pd.DataFrame(
        {"in the paper": place, "method": method_of(method).label, "paper": entry_of(experiment).accuracy[method]}
        | {column: ours(experiment, method, settings) for column, settings in COLUMNS.items()}
        for place, experiment, method in ROWS
    )


def _score(curve: Curve) -> str:
    row = curve.row()
    return f"{row['mean']:.2f} ± {row['std']:.2f}" if row["seeds"] > 1 else f"{row['mean']:.2f}, one seed"
