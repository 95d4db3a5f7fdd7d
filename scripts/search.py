"""What a search has found: python -m scripts.search <folder of a launch> ... [--results results]

Writes <results>/searches/<experiment>_<optimizer>.csv, a line for each configuration tried, the best held-out score
first, and beside it a picture of the score against each hyperparameter; prints the lines. A search that was stopped and
went on has several launches. The best configuration goes to conf/settings/<setting>/<experiment>_<optimizer>.yaml.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from admm.files import whole
from experiments.store import Run, failed_writes_in_words, launched_runs

FIXED = ("dataset", "seeds=", "iterations=")  # overrides that are not what is searched for
FEW = 6  # values of a hyperparameter, which its axis names
WIDE = 4.0  # the quotient of a hyperparameter's largest and smallest value from which on its axis is logarithmic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch", type=Path, nargs="+", help="a launch's folder, such as outputs/logs/<day>/<time>")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    found = {run.folder: run for launch in options.launch for run in launched_runs(launch)}
    runs, places = list(found.values()), ", ".join(map(str, options.launch))
    if not runs:
        sys.exit(f"error: {places} has no finished run; it should be a folder such as outputs/logs/<day>/<time>")
    if not all(run.info["dataset"]["holdout"] for run in runs):
        sys.exit(f"error: {places}: a search needs dataset.holdout=10000 or so")
    name = f"{runs[0].info['experiment']}_{runs[0].info['method']}"
    table = pd.DataFrame([line(run) for run in runs]).sort_values("held-out", ascending=False)
    path = options.results / "searches" / f"{name}.csv"
    with whole(path, "what was found") as part:
        table.to_csv(part, index=False, float_format="%.7g")
    draw(path)
    print(table.to_string(index=False))
    print(f"written: {path} and .png, {len(table)} configurations")


def line(run: Run) -> dict[str, Any]:
    """A configuration: its setting, the values searched over, its score, and how many seeds have not diverged."""
    info = run.info
    searched = [override for override in info["overrides"] if not override.startswith(FIXED)]
    values: dict[str, Any] = {key: value for key, _, value in (override.partition("=") for override in searched)}
    found = {"held-out": run.score, "seeds": len(info["seeds"]) - len(info.get("diverged", ()))}
    found |= {"iterations": info["iterations"], "samples held out": info["dataset"]["holdout"]}
    return {"setting": info["setting"]} | values | found


def draw(path: Path) -> None:
    """The picture of a search beside its table, <results>/searches/<name>.csv. Raises WriteError."""
    found = pd.read_csv(path)
    searched = list(found.columns[1 : found.columns.get_loc("held-out")])
    width = max(4.5, 3.4 * len(searched))  # inches
    drawn = Figure(figsize=(width, 3.6), layout="constrained")
    panels = drawn.subplots(1, max(1, len(searched)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, searched, strict=False):
        for setting, tried in found.groupby("setting", sort=False):
            axes.scatter(tried[key], tried["held-out"], s=18, alpha=0.7, label=setting)
        values = found[key]
        is_number = pd.api.types.is_numeric_dtype(values)
        if is_number and values.min() > 0 and values.max() >= WIDE * values.min():
            axes.set_xscale("log")
        if is_number and values.nunique() <= FEW:
            axes.set_xticks(values.unique(), [f"{value:g}" for value in values.unique()])
            axes.minorticks_off()
        axes.set_xlabel(key.removeprefix("optimizer."))
        axes.tick_params("x", labelrotation=0 if is_number else 20)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out score (%)")
    if found["setting"].nunique() > 1:
        panels[0].legend(fontsize=7.5, title="setting")
    samples, seeds = (", ".join(map(str, sorted(found[key].unique()))) for key in ("samples held out", "seeds"))
    text = f"{path.stem}: {len(found)} configurations, {samples} training samples held out; seeds: {seeds}"
    drawn.supxlabel(textwrap.fill(text, int(13 * width)), fontsize=8)
    with whole(path.with_suffix(".png"), "the picture") as part:
        drawn.savefig(part, dpi=150)


if __name__ == "__main__":
    with failed_writes_in_words():
        main()
