"""Redraw every figure and table from the results store alone: python -m scripts.figures [results]"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.report import report, show
from experiments.store import experiments_in, finished_runs


def main(root: Path) -> None:
    for experiment in experiments_in(root):
        result = report(experiment, finished_runs(root, experiment), root / "figures", root / "tables")
        show(result, f"{experiment}: test accuracy in percent")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
