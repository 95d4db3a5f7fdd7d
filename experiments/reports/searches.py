"""Rankings: the configurations of a search, the best held-out score first, and their figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from admm.files import atomic_write
from experiments.identity import todays_key
from experiments.overrides import is_searched, key_of
from experiments.reports.drawing import caption_below, legend_above, sequence
from experiments.reports.methods import method_of
from experiments.reports.scores import scores
from experiments.reports.text import in_figure
from experiments.store import Run

RESULTS = ("held-out", "seeds", "iterations", "samples held out")  # columns after those of the hyperparameters
NOTHING = object()
FEW = 6  # values of a hyperparameter, which its axis names
WIDE = 4.0  # the quotient of a hyperparameter's largest and smallest value from which on its axis is logarithmic


def rankings(runs: Iterable[Run]) -> dict[str, pd.DataFrame]:
    """Return a `ranking` for each <experiment>_<method> of these runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.record.experiment}_{run.record.method}", []).append(run)
    return {name: ranking(group) for name, group in groups.items()}


def ranking(runs: Iterable[Run]) -> pd.DataFrame:
    """Return a table with a row for each configuration of a search, the best first; equally good ones are in the order
    of their values. The runs of a configuration may differ in their seeds; the index has the name of the last of
    them."""
    rows: dict[tuple[str, ...], dict[Path, Run]] = {}
    for run in runs:
        rows.setdefault((run.folder.parent.as_posix(), run.row), {})[run.folder] = run
    of_row = [list(row.values()) for row in rows.values()]
    overrides = [override for row in of_row for run in row for override in run.record.overrides]
    keys = list(dict.fromkeys(key_of(override) for override in overrides if is_searched(override)))
    ranked = sorted((_ranked(row, keys) for row in of_row), key=_rank)
    return pd.DataFrame(ranked).set_index("run")[["setting", *keys, *RESULTS]].rename_axis(None)


def _ranked(row: Sequence[Run], keys: Sequence[str]) -> dict[str, Any]:
    """A configuration: its setting, the values of `keys`, its score, and how many seeds have not diverged."""
    run, by_seed = row[-1], scores(row)
    diverged = {run.record.seeds[replica] for run in row for replica in run.record.diverged}
    record, seeds = run.record, len(by_seed.keys() - diverged)
    results = fmean(by_seed.values()), seeds, record.iterations, record.dataset.holdout
    values = {"run": run.name, "setting": record.setting} | {key: value_of(run, key) for key in keys}
    return values | dict(zip(RESULTS, results, strict=True))


def _rank(row: dict[str, Any]) -> list[Any]:
    """A key that sorts configurations."""
    values = [value or "" for key, value in sorted(row.items()) if key not in ("run", *RESULTS)]
    return [-row["held-out"], *((words_first(value), value) for value in values), row["run"]]


def value_of(run: Run, key: str) -> str | None:
    """Return a value of a run's configuration as the command line would give it. For a key that the configuration does
    not have, and for a group, it is what the run's overrides say, or None."""
    node: Any = run.config
    for name in key.split("."):
        node = node.get(name, NOTHING) if isinstance(node, dict) else NOTHING
    if node is NOTHING or (isinstance(node, dict) and "_target_" in node):
        said = {key_of(override): override.partition("=")[2] for override in run.record.overrides}
        return said.get(key)
    return as_override(node)


def as_override(value: Any) -> str:
    """Return a value of a configuration as an override has it, without spaces."""
    match value:
        case dict():
            return f"{{{','.join(f'{key}:{as_override(part)}' for key, part in value.items())}}}"
        case list():
            return f"[{','.join(map(as_override, value))}]"
        case None | bool():
            return json.dumps(value)
    return str(value)


def read_ranking(path: Path, dtype: type | None = None) -> pd.DataFrame:
    """Read a ranking from its file, its keys with the names of today. null, none and the like are values in it; only an
    empty cell is missing."""
    return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""]).rename(columns=todays_key)


def hyperparameters_of(ranked: pd.DataFrame) -> list[str]:
    """Return the columns of a ranking between its setting and its results."""
    return list(ranked.columns[1 : ranked.columns.get_loc(RESULTS[0])])


def best_of_each(folder: Path, experiment: str) -> pd.DataFrame:
    """Return a table of the best configuration of each method, the best first, of the files <experiment>_<method>.csv
    in a folder."""
    paths = {path.stem.removeprefix(f"{experiment}_"): path for path in sorted(folder.glob(f"{experiment}_*.csv"))}
    rows = [{"method": method_of(name).label} | _best(read_ranking(path, dtype=str)) for name, path in paths.items()]
    return pd.DataFrame(rows).sort_values("best held-out accuracy", ascending=False, kind="stable")


def _best(ranked: pd.DataFrame) -> dict[str, Any]:
    """The first row of a ranking. A value that all of its configurations share is left out."""
    keys = (*hyperparameters_of(ranked), "iterations")
    values = [f"{key.removeprefix('optimizer.')}={ranked[key].iloc[0]}" for key in keys if ranked[key].nunique() > 1]
    score = float(ranked["held-out"].iloc[0])
    return {"configurations": len(ranked), "best held-out accuracy": score, "with": ", ".join(values)}


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
    keys = hyperparameters_of(ranked)
    searched = [key for key in (*keys, "iterations") if ranked[key].nunique(dropna=False) > 1] or keys
    settings = ranked["setting"].unique()
    colour_of = dict(zip(settings, sequence(len(settings)), strict=True))
    figure = Figure(figsize=(max(4.5, 3.4 * len(searched)), 3.0), layout="constrained")
    panels = figure.subplots(1, max(1, len(searched)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, searched, strict=False):
        if not (is_number := pd.api.types.is_numeric_dtype(ranked[key])):
            ranked[key] = ranked[key].fillna("the setting's")
            axes.xaxis.update_units(sorted(ranked[key].unique(), key=words_first))
        for setting, tried in ranked.dropna(subset=[key]).groupby("setting", sort=False):
            colour = colour_of[setting]
            axes.scatter(tried[key], tried["held-out"], s=24, alpha=0.7, color=colour, label=in_figure(str(setting)))
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
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out score (%)")
    figure.align_xlabels(panels)
    if len(settings) > 1:
        legend_above(figure, "setting")
    samples, seeds = (", ".join(map(str, sorted(ranked[key].unique()))) for key in ("samples held out", "seeds"))
    text = f"{path.stem}: {len(ranked)} configurations, {samples} training samples held out; seeds: {seeds}"
    caption_below(figure, text)
    with atomic_write(path.with_suffix(".png"), "the figure") as part:
        figure.savefig(part, dpi=150)
