"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]

The README's tables stand between `<!-- table: experiment -->` and `<!-- end -->`, and are written anew too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from experiments.report import content, markdown, report, show
from experiments.store import experiments_in, finished_runs

README = Path(__file__).parents[1] / "README.md"


def main(root: Path) -> None:
    for experiment in experiments_in(root):
        result = report(experiment, finished_runs(root, experiment), root / "figures", root / "tables")
        show(result, experiment)
    if root.resolve() == README.parent / "results":
        README.write_text(with_tables(README.read_text(), root))


def with_tables(page: str, root: Path) -> str:
    """A Markdown page with its experiments' tables as they are in the store."""

    def table(place: re.Match[str]) -> str:
        runs = finished_runs(root, place[2])
        return f"{place[1]}{markdown(content(place[2], runs)[0]) if runs else 'Not run.'}\n{place[3]}"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
