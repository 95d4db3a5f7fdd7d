"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]

The README's tables stand between `<!-- table: experiment -->` and `<!-- end -->`, and are written anew too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

from experiments.report import markdown, report, show
from experiments.store import experiments_in, finished_runs

README = Path(__file__).parents[1] / "README.md"


def main(root: Path) -> None:
    for experiment in experiments_in(root):
        result = report(experiment, finished_runs(root, experiment), root / "figures", root / "tables")
        show(result, experiment)
        if root.resolve() == README.parent / "results":
            write_into(README, experiment, result)


def write_into(page: Path, experiment: str, result: pd.DataFrame) -> None:
    """Replace the experiment's table in a Markdown page, if it has a place for it."""
    place = re.compile(rf"(<!-- table: {experiment} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(place.sub(lambda match: f"{match[1]}{markdown(result)}\n{match[2]}", page.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
