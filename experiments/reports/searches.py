"""Rankings: the configurations of a search, the best held-out score first, and their figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from admm.files import atomic_write
from experiments.overrides import is_searched
from experiments.reports.scores import scores
from experiments.reports.text import in_figure
from experiments.store import Run

RESULTS = ("held-out", "seeds", "iterations", "samples held out")  # columns after those of the hyperparameters
FEW = 6  # values of a hyperparameter, which its axis names
WIDE = 4.0  # the quotient of a hyperparameter's largest and smallest value from which on its axis is logarithmic


def rankings(runs: Iterable[Run]) -> dict[str, pd.DataFrame]:
    """Return a `ranking` for each <experiment>_<method> of these runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.record.experiment}_{run.record.method}", []).append(run)
    return {name: ranking(group) for name, group in groups.items()}


def ranking(runs: Iterable[Run]) -> pd.DataFrame:
    """Return a table with a row for each configuration of a search, the best first. The runs of a configuration may
    differ in their seeds; the index has the name of the last of them."""
    rows: dict[tuple[str, ...], dict[Path, Run]] = {}
    for run in runs:
        rows.setdefault((run.folder.parent.as_posix(), run.row), {})[run.folder] = run
    of_row = [list(row.values()) for row in rows.values()]
    table = pd.DataFrame([_ranked(row) for row in of_row], index=[row[-1].name for row in of_row])
    searched = [key for key in table if key not in RESULTS]  # one that only some runs have is last in `table`
    return table[[*searched, *RESULTS]].sort_values("held-out", ascending=False)


def _ranked(row: Sequence[Run]) -> dict[str, Any]:
    """A configuration: its setting, the values searched over, its score, and how many seeds have not diverged."""
    record, by_seed = row[-1].record, scores(row)
    searched = filter(is_searched, record.overrides)
    values: dict[str, Any] = {key: value for key, _, value in (override.partition("=") for override in searched)}
    diverged = {run.record.seeds[replica] for run in row for replica in run.record.diverged}
    seeds = len(by_seed.keys() - diverged)
    results = fmean(by_seed.values()), seeds, record.iterations, record.dataset.holdout
    return {"setting": record.setting} | values | dict(zip(RESULTS, results, strict=True))


def read_ranking(path: Path, dtype: type | None = None) -> pd.DataFrame:
    """Read a ranking from its file. null, none and the like are values in it; only an empty cell is missing."""
    return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""])


def words_first(value: str) -> float:
    """Return a key that sorts the values of a hyperparameter: words first, in their order, then numbers."""
    try:
        return float(value)
    except ValueError:
        return -inf


def write_ranking(name: str, ranked: pd.DataFrame, folder: Path) -> None:
    """Print a ranking, and write it and its figure to <folder>/searches/<name>.csv and .png. Raises WriteError."""
    path = folder / "searches" / f"{name}.csv"
    with atomic_write(path, "the ranking") as part:
        ranked.to_csv(part, index=False, float_format="%.7g")
    plot_ranking(path)
    print(ranked.to_string(index=False))
    print(f"written: {path} and .png, {len(ranked)} configurations")


def plot_ranking(path: Path) -> None:
    """Plot a search that has been written to <folder>/searches/<name>.csv, next to it as .png. Raises WriteError."""
    ranked = read_ranking(path)
    keys = list(ranked.columns[1 : ranked.columns.get_loc("held-out")])
    searched = [key for key in keys if ranked[key].nunique(dropna=False) > 1] or keys
    width = max(4.5, 3.4 * len(searched))  # inches
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(searched)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, searched, strict=False):
        if not (is_number := pd.api.types.is_numeric_dtype(ranked[key])):
            ranked[key] = ranked[key].fillna("the setting's")
            axes.xaxis.update_units(sorted(ranked[key].unique(), key=words_first))
        for setting, tried in ranked.dropna(subset=[key]).groupby("setting", sort=False):
            axes.scatter(tried[key], tried["held-out"], s=18, alpha=0.7, label=in_figure(str(setting)))
        values = ranked[key].dropna()
        if is_number and values.min() > 0 and values.max() >= WIDE * values.min():
            axes.set_xscale("log")
        if is_number and values.nunique() <= FEW:
            axes.set_xticks(values.unique(), [f"{value:g}" for value in values.unique()])
            axes.minorticks_off()
        axes.set_xlabel(key.removeprefix("optimizer."))
        if not is_number:
            for label in axes.get_xticklabels():
                label.set_parse_math(False)
                label.set(rotation=20, ha="right", rotation_mode="anchor", fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out score (%)")
    if ranked["setting"].nunique() > 1:
        panels[0].legend(fontsize=7.5, title="setting")
    samples, seeds = (", ".join(map(str, sorted(ranked[key].unique()))) for key in ("samples held out", "seeds"))
    text = f"{path.stem}: {len(ranked)} configurations, {samples} training samples held out; seeds: {seeds}"
    figure.supxlabel(textwrap.fill(text, int(13 * width)), fontsize=8)
    with atomic_write(path.with_suffix(".png"), "the figure") as part:
        figure.savefig(part, dpi=150)
