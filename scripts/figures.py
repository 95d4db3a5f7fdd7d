"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]

The tables of README and docs/ stand between `<!-- table: experiment -->` and `<!-- end -->`, and are written again too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.launching.failures import failures_end_the_program
from experiments.reports.base import report_on
from experiments.reports.headlines import headlines
from experiments.reports.searches import best_of_each, plot_ranking
from experiments.reports.text import print_table
from experiments.reports.writing import update_tables, write_report
from experiments.store import Store, failed_writes_in_words
from scripts import defaults
from scripts.arguments import store_of_the_command
from scripts.benchmarks.performance_page import PAGES as MEASURED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/*.md")} - {*MEASURED})]


def main() -> None:
    root = store_of_the_command(__doc__)
    with failures_end_the_program(), failed_writes_in_words():
        redraw(root)


def redraw(root: Path) -> None:
    """Write the figures and tables of a store, and into the pages where it is the committed one. Raises WriteError."""
    store, tables = Store(root), {}
    for experiment in store.experiments():
        runs = store.runs(experiment)
        report = report_on(runs[-1])
        tables[experiment] = write_report(report, runs, root / "figures", root / "tables")
        print_table(tables[experiment], report.title(runs))
    for path in sorted(root.glob("searches/*.csv")):
        plot_ranking(path)
    if root.resolve() == ROOT / "results":
        for page in PAGES:
            update_tables(page, tables_of_pages(store, tables))


def tables_of_pages(store: Store, tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return what pages have of a store by name: the experiments' tables without their machines, the headlines, the
    best of Figure 7's equal search, and what `scripts.defaults` has found."""
    shown = {name: table.drop(columns="machine", errors="ignore") for name, table in tables.items()}
    equal = best_of_each(store.root / "searches", "cifar10_resnet18_narrow_equal")
    with_defaults = defaults.table(pd.read_csv(store.root / "defaults.csv"))
    return shown | {"headlines": headlines(store), "equal_search": equal, "defaults": with_defaults}


if __name__ == "__main__":
    main()
