"""What a search has found: its configurations, the best held-out score first, and their picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from decimal import Decimal
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from hydra.core.override_parser.types import RangeSweep
from matplotlib.figure import Figure
from omegaconf import DictConfig, read_write

from admm.files import whole
from experiments.errors import BadInput
from experiments.overrides import is_searched, parse
from experiments.reports.report import in_figure
from experiments.store import Run, scores

FOUND = ("held-out", "seeds", "iterations", "samples held out")  # columns after those that are
FEW = 6  # values of a hyperparameter, which its axis names
WIDE = 4.0  # the quotient of a hyperparameter's largest and smallest value from which on its axis is logarithmic


def as_in_a_grid(config: DictConfig) -> None:
    """Make the ranges of a study's space those of a grid, whose ends are excluded; Optuna's sweeper includes them.

    config: with its `hydra`.
    """
    sweeper, overrides = config.hydra.sweeper, config.hydra.overrides
    with read_write(config):
        overrides.task = [without_end(override) for override in overrides.task]
        for key, space in (sweeper.params or {}).items():
            sweeper.params[key] = without_end(f"{key}={space}").removeprefix(f"{key}=")


def without_end(override: str) -> str:
    """An override whose value is a range(…), up to the last of its values, in rising order; another one as it is.

    Raises BadInput for a range without values.
    """
    space = parse([override])[0].value()
    if not isinstance(space, RangeSweep) or space.shuffle:  # of a shuffled one the sweeper takes the values
        return override
    first, step = Decimal(str(space.start)), Decimal(str(space.step))
    last = first + (len(list(space.range())) - 1) * step
    low, high = (first, last) if step > 0 else (last, first)
    if low > high:
        raise BadInput(f"{override}: a range without a value, as its end is not part of it")
    return f"{override.partition('=')[0]}=range({low},{high},{abs(step)})"


def is_of_a_search(run: Run) -> bool:
    """Whether it has a score, of held-out data."""
    scored = "test_accuracy" in run.history or (run.folder / "probes.csv").exists()
    return scored and bool(run.info["dataset"]["holdout"])


def rankings(runs: Iterable[Run]) -> dict[str, pd.DataFrame]:
    """For each <experiment>_<method> of these runs, see `ranking`."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.info['experiment']}_{run.info['method']}", []).append(run)
    return {name: ranking(group) for name, group in groups.items()}


def ranking(runs: Iterable[Run]) -> pd.DataFrame:
    """A line for each configuration of a search, the best first, by the name of the last of its runs, which may differ
    in their seeds."""
    rows: dict[tuple[str, ...], dict[Path, Run]] = {}
    for run in runs:
        rows.setdefault((run.folder.parent.as_posix(), run.row), {})[run.folder] = run
    of_row = [list(row.values()) for row in rows.values()]
    lines = pd.DataFrame([line(row) for row in of_row], index=[row[-1].name for row in of_row])
    searched = [key for key in lines if key not in FOUND]  # one that only some runs have is last in `lines`
    return lines[[*searched, *FOUND]].sort_values("held-out", ascending=False)


def line(row: Sequence[Run]) -> dict[str, Any]:
    """A configuration: its setting, the values searched over, its score, and how many seeds have not diverged."""
    info, by_seed = row[-1].info, scores(row)
    searched = filter(is_searched, info["overrides"])
    values: dict[str, Any] = {key: value for key, _, value in (override.partition("=") for override in searched)}
    diverged = {run.info["seeds"][int(replica)] for run in row for replica in run.info.get("diverged", ())}
    seeds = len(by_seed.keys() - diverged)
    found = fmean(by_seed.values()), seeds, info["iterations"], info["dataset"]["holdout"]
    return {"setting": info["setting"]} | values | dict(zip(FOUND, found, strict=True))


def read(path: Path, dtype: type | None = None) -> pd.DataFrame:
    """A ranking that has been written; null, none and the like are values in it, only an empty cell is missing."""
    return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""])


def words_first(value: str) -> float:
    """To sort the numbers among the values of a hyperparameter, after its words, which stay in their order."""
    try:
        return float(value)
    except ValueError:
        return -inf


def write(name: str, ranked: pd.DataFrame, folder: Path) -> None:
    """Print a ranking, and write it and its picture to <folder>/searches/<name>.csv and .png. Raises WriteError."""
    path = folder / "searches" / f"{name}.csv"
    with whole(path, "what was found") as part:
        ranked.to_csv(part, index=False, float_format="%.7g")
    draw(path)
    print(ranked.to_string(index=False))
    print(f"written: {path} and .png, {len(ranked)} configurations")


def draw(path: Path) -> None:
    """The picture of a search beside its table, <folder>/searches/<name>.csv. Raises WriteError."""
    found = read(path)
    keys = list(found.columns[1 : found.columns.get_loc("held-out")])
    searched = [key for key in keys if found[key].nunique(dropna=False) > 1] or keys
    width = max(4.5, 3.4 * len(searched))  # inches
    drawn = Figure(figsize=(width, 3.6), layout="constrained")
    panels = drawn.subplots(1, max(1, len(searched)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, searched, strict=False):
        if not (is_number := pd.api.types.is_numeric_dtype(found[key])):
            found[key] = found[key].fillna("the setting's")
            axes.xaxis.update_units(sorted(found[key].unique(), key=words_first))
        for setting, tried in found.dropna(subset=[key]).groupby("setting", sort=False):
            axes.scatter(tried[key], tried["held-out"], s=18, alpha=0.7, label=in_figure(str(setting)))
        values = found[key].dropna()
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
    if found["setting"].nunique() > 1:
        panels[0].legend(fontsize=7.5, title="setting")
    samples, seeds = (", ".join(map(str, sorted(found[key].unique()))) for key in ("samples held out", "seeds"))
    text = f"{path.stem}: {len(found)} configurations, {samples} training samples held out; seeds: {seeds}"
    drawn.supxlabel(textwrap.fill(text, int(13 * width)), fontsize=8)
    with whole(path.with_suffix(".png"), "the picture") as part:
        drawn.savefig(part, dpi=150)
