"""What a search has found: python -m scripts.search <folder of the launch> [results]

Writes <results>/searches/<experiment>_<optimizer>.csv, a line for each configuration tried, the best held-out accuracy
first, and prints the best one, which goes to conf/settings/tuned/<experiment>_<optimizer>.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.store import Run

FIXED = ("dataset", "seeds=", "iterations=")  # overrides that are not what is searched for


def main(launch: Path, root: Path) -> None:
    runs = [Run(Path(note.read_text().strip())) for note in sorted(launch.rglob("runs.txt"))]
    if not runs:
        sys.exit(
            f"error: {launch} has no finished run; it should be a launch's folder, such as outputs/logs/<day>/<time>"
        )
    info = runs[0].info
    found = pd.DataFrame([line(run) for run in runs]).sort_values("held-out", ascending=False)
    path = root / "searches" / f"{info['experiment']}_{info['method']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(path, index=False, float_format="%.7g")
    print(found.to_string(index=False))
    print(f"written: {path}, {len(found)} configurations")


def line(run: Run) -> dict[str, Any]:
    """A configuration: the values searched over, and the last held-out accuracy, percent, the mean over seeds."""
    info, history = run.info, run.history
    searched = [override for override in info["overrides"] if not override.startswith(FIXED)]
    last = history.loc[history["iteration"] == info["iterations"], "test_accuracy"]
    values: dict[str, Any] = dict(override.split("=", 1) for override in searched)
    return values | {
        "held-out": last.mean(),
        "seeds": len(info["seeds"]),
        "samples held out": info["dataset"]["holdout"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "results"))
