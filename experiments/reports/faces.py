"""§4.2, Tables 1 and 2, Figure 8: what probes find in representations of faces, drawn from the store."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional

from experiments.reports.report import COLOURS, Content, in_figure, paper
from experiments.store import Run

HEAT_MAPS = 6  # factors in a figure
MEASURES = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auc": "AUC"}


def report(experiment: str, runs: list[Run]) -> Content:
    """Table 1: means over the attributes that all runs have probed; bars of them, and heat maps of DeepFacto."""
    shown = sorted(runs, key=_order)
    kept = [run.table("probes") for run in shown]
    names = [set(probes["attribute"]) for probes in kept if len(probes)]  # none where all seeds have diverged
    common = set[str]().union(*names).intersection(*names)
    result = pd.DataFrame(
        [row(experiment, r, p[p["attribute"].isin(common)]) for r, p in zip(shown, kept, strict=True)],
        index=[run.name for run in shown],
    )
    result.insert(5, "above NMF", [_above_nmf(run, shown, result) for run in shown])
    figures = {experiment: bars(experiment, shown, result)}
    for run in shown:
        if (run.folder / "arrays.npz").exists():
            own = f"_{run.info['identity']}" if run.info["overrides"] else ""
            figures[f"{experiment}_{run.info['setting']}{own}_heat_maps"] = heat_maps(experiment, run)
    cited = paper()["experiments"].get(experiment, {}).get("cited", {})
    theirs = pd.DataFrame([{"method": name, "setting": "cited by the paper", "paper": v} for name, v in cited.items()])
    theirs.index = pd.Index([""] * len(theirs))  # of no run
    return pd.concat([result, theirs]).astype({"seeds": "Int64", "iterations": "Int64"}), figures


def row(experiment: str, run: Run, probes: pd.DataFrame) -> dict[str, Any]:
    """Mean over the attributes, mean and standard deviation over the seeds, percent."""
    info, history = run.info, run.history
    by_replica = probes.groupby("replica")[[*MEASURES, "majority"]].mean()
    line: dict[str, Any] = {
        "method": paper()["labels"].get(info["method"], info["method"]),
        "setting": setting(run),
        "paper": _known(experiment, run),
        "balanced accuracy": by_replica["balanced_accuracy"].mean(),
        "std": by_replica["balanced_accuracy"].std(),
        "accuracy": by_replica["accuracy"].mean(),
        "AUC": by_replica["auc"].mean(),
        "majority class": by_replica["majority"].mean(),
        "attributes": probes["attribute"].nunique(),
        "verification by scores": np.mean(info.get("scores_verification") or np.nan),
    }
    if "verification" in history:
        line |= verification(run, history)
    iterations = history["iteration"].max() if len(history) else np.nan
    return line | {"seeds": len(by_replica), "iterations": iterations or np.nan, "machine": info["machine"]}


def setting(run: Run) -> str:
    """Of a run, with the values of its own, what its labels are, and how many seeds have diverged."""
    info = run.info
    diverged, seeds = len(info.get("diverged", {})), len(info["seeds"])
    remark = [f"{diverged} of {seeds} seeds diverged"] if diverged else []
    return ", ".join([info["setting"], *info["overrides"], info["labels"], *remark])


def verification(run: Run, history: pd.DataFrame) -> dict[str, float]:
    """Percent of pairs: the last evaluation before backbone and factorisation move, and the end."""
    by_iteration = history.groupby("iteration")["verification"].mean()
    before = by_iteration.loc[: run.info.get("frozen", 0)]
    return {"verification before": float(before.iloc[-1]), "after": float(by_iteration.iloc[-1])}


def _above_nmf(run: Run, shown: Sequence[Run], result: pd.DataFrame) -> float:
    """By how much DeepFacto's balanced accuracy is above that of NMF of the same rank and labels, fitted afterwards."""
    keys = ("setting", "labels", "dataset")
    of_nmf = [
        r for r in shown if r.info["method"] == "nmf" and all(r.info.get(key) == run.info.get(key) for key in keys)
    ]
    if run.info["method"] != "deepfacto" or len(of_nmf) != 1:
        return float("nan")
    found = result["balanced accuracy"]
    return float(found[run.name] - found[of_nmf[0].name])


def attributes(experiment: str, runs: list[Run]) -> pd.DataFrame:
    """Table 2: by attribute, ours, named with what their labels are, beside the paper's and what it cites, which are of
    LFWA's own labels."""
    columns: dict[str, Any] = {}
    for run in sorted(runs, key=_order):
        name = f"{paper()['labels'].get(run.info['method'], run.info['method'])} {setting(run)}"
        by_attribute = run.table("probes").groupby("attribute")
        for key in ("positives", "majority"):
            mean = by_attribute[key].mean()
            columns[key] = columns.get(key, mean).combine_first(mean)
        for measure, label in MEASURES.items():
            columns[f"{name}: {label}"] = by_attribute[measure].mean()
    known = paper()["experiments"]["lfwa_deepfacto"]["attributes"]
    theirs = pd.DataFrame(known["values"], index=known["columns"]).T.add_prefix("paper, LFWA: ")
    return (
        pd.concat([pd.DataFrame(columns).reindex(theirs.index), theirs], axis=1).rename_axis("attribute").reset_index()
    )


def bars(experiment: str, shown: list[Run], result: pd.DataFrame) -> Figure:
    """Mean balanced accuracy by method and rank."""
    drawn = Figure(figsize=(7.5, 1.4 + 0.32 * len(shown)), layout="constrained")
    axes = drawn.subplots()
    labels = [
        ", ".join([method, r.info["setting"], *r.info["overrides"]])
        for method, r in zip(result["method"], shown, strict=True)
    ]
    palette = dict(zip(dict.fromkeys(result["method"]), COLOURS.values(), strict=False))
    colours = [palette[method] for method in result["method"]]
    values, places = result["balanced accuracy"], range(len(shown))  # two runs may have the same label
    axes.barh(places, values, xerr=result["std"].fillna(0.0), color=colours, height=0.7)
    for place, value in zip(places, values, strict=True):
        axes.text(max(50.0, value), place, f" {value:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, map(in_figure, labels))
    axes.set(xlabel="balanced accuracy, mean over the attributes (%)", xlim=(50, 100))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    drawn.supxlabel(_caption(experiment, shown, "Bars: mean over the seeds, ±1 standard deviation"), fontsize=8)
    return drawn


def chosen_factors(arrays: dict[str, NDArray[Any]], number: int = HEAT_MAPS) -> list[int]:
    """The most consistent factors, of which no two have their largest mean at the same place."""
    peaks = arrays["mean"].reshape(len(arrays["mean"]), -1).argmax(1)
    chosen: dict[int, int] = {}
    for factor in np.argsort(-arrays["consistency"]):
        chosen.setdefault(int(peaks[factor]), int(factor))
    return list(chosen.values())[:number]


def heat_maps(experiment: str, run: Run, factors: Sequence[int] | None = None) -> Figure:
    """Figure 8: rows of S, up-sampled bilinearly, over faces of different people; `chosen_factors` if None are given.

    Raises ValueError for a factor that is not there.
    """
    arrays = run.arrays
    if absent := [factor for factor in factors or () if not 0 <= factor < len(arrays["maps"])]:
        raise ValueError(f"factors: there is no {absent[0]}, only 0 to {len(arrays['maps']) - 1}")
    remark = "those asked for"
    if factors is None:
        factors = chosen_factors(arrays)
        remark = (
            "the most consistent (the share of energy common to all test faces), one for each place of its largest mean"
        )
    faces, maps = arrays["faces"].transpose(0, 2, 3, 1), torch.from_numpy(arrays["maps"][list(factors)])
    large = functional.interpolate(maps, faces.shape[1:3], mode="bilinear", align_corners=False).numpy()
    drawn = Figure(figsize=(1.1 * len(faces) + 0.6, 1.15 * (len(factors) + 1) + 0.7), layout="constrained")
    panels = drawn.subplots(len(factors) + 1, len(faces), squeeze=False)
    for column, face in enumerate(faces):
        panels[0, column].imshow(face)
        for row, factor in enumerate(large, start=1):
            panels[row, column].imshow(face.mean(2), cmap="gray")
            panels[row, column].imshow(factor[column], cmap="inferno", alpha=0.55, vmin=0, vmax=float(factor.max()))
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    for row, factor in enumerate(factors, start=1):
        panels[row, 0].set_ylabel(f"factor {factor}\n{arrays['consistency'][factor]:.2f}", fontsize=8)
    text = (
        f"Factors of {run.info['setting']}, seed {arrays['seed']}: {remark}; below its number, a factor's consistency"
    )
    drawn.supxlabel(_caption(experiment, [run], text), fontsize=8)
    return drawn


def _caption(experiment: str, shown: list[Run], remark: str) -> str:
    known = paper()["experiments"].get(experiment, {})
    labels = " and ".join(sorted({run.info["labels"] for run in shown}))
    machines = ", ".join(sorted({run.info["machine"] for run in shown}))
    return textwrap.fill(f"{known.get('caption', experiment)}; {labels}. {remark}. {machines}.", 120)


def _known(experiment: str, run: Run) -> float | None:
    """The paper's number for DeepFacto of this rank, which is of LFWA's own labels."""
    of_lfwa = run.info["method"] == "deepfacto" and run.info["labels"] == "LFWA" and not run.info["overrides"]
    ranks: dict[str, float] = paper()["experiments"].get(experiment, {}).get("ranks", {})
    return ranks.get(run.info["setting"]) if of_lfwa else None


def _order(run: Run) -> tuple[int, int]:
    methods = ["raw", "pca", "nmf", "deepfacto"]
    rank = "".join(filter(str.isdigit, run.info["setting"])) or "0"
    return methods.index(run.info["method"]), int(rank)
