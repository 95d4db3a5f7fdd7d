"""What a search has found: python -m scripts.search <folder of the launch> [--results results]

Writes <results>/searches/<experiment>_<optimizer>.csv, a line for each configuration tried, the best held-out accuracy
first, and prints them. The best one goes to conf/settings/<setting>/<experiment>_<optimizer>.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.store import Run, launched_runs

FIXED = ("dataset", "seeds=", "iterations=")  # overrides that are not what is searched for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch", type=Path, help="a launch's folder, such as outputs/logs/<day>/<time>")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    runs = launched_runs(options.launch)
    if not runs:
        sys.exit(
            f"error: {options.launch} has no finished run; it should be a folder such as outputs/logs/<day>/<time>"
        )
    info = runs[0].info
    if any(not run.info["dataset"]["holdout"] or run.info["points"] for run in runs):
        sys.exit(f"error: {options.launch}: a search needs dataset.holdout=10000 or so, and a sweep instead of grid=")
    found = pd.DataFrame([line(run) for run in runs]).sort_values("held-out", ascending=False)
    path = options.results / "searches" / f"{info['experiment']}_{info['method']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(path, index=False, float_format="%.7g")
    print(found.to_string(index=False))
    print(f"written: {path}, {len(found)} configurations")


def line(run: Run) -> dict[str, Any]:
    """A configuration: its setting, the values searched over, and the last held-out accuracy in percent, the mean over
    the seeds that have not diverged, with their number."""
    info, history = run.info, run.history
    searched = [override for override in info["overrides"] if not override.startswith(FIXED)]
    values: dict[str, Any] = dict(override.split("=", 1) for override in searched)
    last = history.loc[history["iteration"] == info["iterations"], "test_accuracy"]
    found = {"held-out": last.mean(), "seeds": len(last), "iterations": info["iterations"]}
    found["samples held out"] = info["dataset"]["holdout"]
    return {"setting": info["setting"]} | values | found


if __name__ == "__main__":
    main()
