"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]

The README's tables stand between `<!-- table: experiment -->` and `<!-- end -->`, and are written again too.
"""

from __future__ import annotations

from pathlib import Path

from experiments.launching.failures import failures_end_the_program
from experiments.reports.base import report_on
from experiments.reports.searches import plot_ranking
from experiments.reports.text import print_table
from experiments.reports.writing import update_tables, write_report
from experiments.store import Store, failed_writes_in_words
from scripts.arguments import store_of_the_command

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    root = store_of_the_command(__doc__)
    with failures_end_the_program(), failed_writes_in_words():
        redraw(root)


def redraw(root: Path) -> None:
    """Write the figures and tables of a store, and into the README where it is the committed one. Raises WriteError."""
    store, tables = Store(root), {}
    for experiment in store.experiments():
        runs = store.runs(experiment)
        report = report_on(runs[-1])
        tables[experiment] = write_report(report, runs, root / "figures", root / "tables")
        print_table(tables[experiment], report.title(runs))
    for path in sorted(root.glob("searches/*.csv")):
        plot_ranking(path)
    if root.resolve() == README.parent / "results":
        update_tables(README, tables)


if __name__ == "__main__":
    main()
