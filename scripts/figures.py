"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]

The README's tables stand between `<!-- table: experiment -->` and `<!-- end -->`, and are written anew too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from admm.files import atomic_write
from experiments.reports.report import markdown, report, show, title
from experiments.reports.results_page import store_of_the_command
from experiments.reports.searches import draw
from experiments.store import experiments_in, failed_writes_in_words, finished_runs

README = Path(__file__).parents[1] / "README.md"


def main(root: Path) -> None:
    tables = {}
    for experiment in experiments_in(root):
        runs = finished_runs(root, experiment)
        tables[experiment] = report(experiment, runs, root / "figures", root / "tables")
        show(tables[experiment], title(experiment, runs))
    for path in sorted(root.glob("searches/*.csv")):
        draw(path)
    if root.resolve() == README.parent / "results":
        with atomic_write(README, "the page") as part:
            part.write_text(with_tables(README.read_text(encoding="utf-8"), tables), encoding="utf-8")


def with_tables(page: str, tables: dict[str, pd.DataFrame]) -> str:
    """A Markdown page with the experiments' tables in their places."""

    def filled(place: re.Match[str]) -> str:
        table = markdown(tables[place[2]]) if place[2] in tables else "Not run."
        return f"{place[1]}{table}\n{place[3]}"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", filled, page, flags=re.DOTALL)


if __name__ == "__main__":
    with failed_writes_in_words():
        main(store_of_the_command(__doc__))
