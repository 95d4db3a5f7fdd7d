"""§4.2, Tables 1 and 2, Figure 8: what probes find in representations of faces, drawn from the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional

from experiments.reports.accuracy import shared
from experiments.reports.base import Comparison, ExperimentReport, score_by_seed
from experiments.reports.drawing import caption_below
from experiments.reports.methods import method_of
from experiments.reports.paired import Scored, insert_differences
from experiments.reports.text import in_figure
from experiments.store import Run

HEAT_MAPS = 6  # factors in a figure
MEASURES = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auc": "AUC"}


@dataclass(frozen=True)
class Faces(ExperimentReport):
    """Table 1 has means over the attributes that all runs have probed; the figures are bars of them, and DeepFacto's
    heat maps. The score is the mean balanced accuracy of the probes."""

    measure: ClassVar[str] = "balanced test accuracy, %"

    def score(self, run: Run) -> dict[int, float]:
        return score_by_seed(run.record, run.table("probes").groupby("replica")["balanced_accuracy"].mean())

    def headline(self, run: Run) -> tuple[float, str]:
        return float(run.table("probes")["balanced_accuracy"].mean()), "% balanced"

    def numbers(self, run: Run) -> dict[str, float]:
        means = run.table("probes").mean(numeric_only=True).drop(["replica", "seed"])
        return super().numbers(run) | {str(name): float(mean) for name, mean in means.items()}

    def compare(self, runs: list[Run]) -> list[Comparison]:
        table = self._of_runs(runs)
        return [
            Comparison(
                run.name,
                run.record.method,
                row["setting"],
                ours=row["balanced accuracy"],
                paper=row["paper"],
                std=row["std"],
                seeds=row["seeds"],
                iterations=row["iterations"],
            )
            for run, row in zip(in_order(runs), table.to_dict("records"), strict=True)
        ]

    def table(self, runs: list[Run]) -> pd.DataFrame:
        result = self._of_runs(runs)
        cited = [
            {"method": name, "setting": "cited by the paper", "paper": value}
            for name, value in self.paper.cited.items()
        ]
        others = pd.DataFrame(cited, index=[""] * len(cited))  # of no run
        return pd.concat([result, others]).astype({"seeds": "Int64", "iterations": "Int64"})

    def _of_runs(self, runs: list[Run]) -> pd.DataFrame:
        """A row for each run, of the attributes that all runs have probed."""
        probes = {run: run.table("probes") for run in in_order(runs)}
        names = [set(frame["attribute"]) for frame in probes.values() if len(frame)]  # none where all seeds diverged
        common = set[str]().union(*names).intersection(*names)
        shared = {run: frame[frame["attribute"].isin(common)] for run, frame in probes.items()}
        table = pd.DataFrame([self._row(*of_run) for of_run in shared.items()], index=[run.name for run in shared])
        by_seed = {run: frame.groupby("seed")["balanced_accuracy"].mean().to_dict() for run, frame in shared.items()}
        scored = [Scored(run.record, scores) for run, scores in by_seed.items()]  # type: ignore[arg-type]
        insert_differences(table, scored, self.baseline)
        return table

    def _row(self, run: Run, probes: pd.DataFrame) -> dict[str, Any]:
        """Mean over the attributes, mean and standard deviation over the seeds, percent."""
        record, history = run.record, run.history
        by_replica = probes.groupby("replica")[[*MEASURES, "majority"]].mean()
        row: dict[str, Any] = {
            "method": method_of(record.method).label,
            "setting": setting(run),
            "paper": self._reference(run),
            "balanced accuracy": by_replica["balanced_accuracy"].mean(),
            "std": by_replica["balanced_accuracy"].std(),
            "accuracy": by_replica["accuracy"].mean(),
            "AUC": by_replica["auc"].mean(),
            "majority class": by_replica["majority"].mean(),
            "attributes": probes["attribute"].nunique(),
            "verification by scores": np.mean(record.scores_verification or np.nan),
        }
        if "verification" in history:
            row |= verification(run, history)
        iterations = history["iteration"].max() if len(history) else np.nan
        return row | {"seeds": len(by_replica), "iterations": iterations or np.nan, "machine": record.machine}

    def _reference(self, run: Run) -> float | None:
        """The paper's number for DeepFacto of this rank, which is of LFWA's own labels."""
        record = run.record
        of_lfwa = record.method == "deepfacto" and record.labels == "LFWA" and not record.overrides
        return self.paper.ranks.get(record.setting) if of_lfwa else None

    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        figures = {self.experiment: self.bars(runs)}
        for run in in_order(runs):
            if run.has_arrays:
                own = f"_{run.record.identity}" if run.record.overrides else ""
                figures[f"{self.experiment}_{run.record.setting}{own}_heat_maps"] = self.heat_maps(run)
        return figures

    def further_tables(self, runs: list[Run]) -> dict[str, pd.DataFrame]:
        """Return Table 2: by attribute, our numbers beside the paper's and those that it cites. Ours are named with
        their labels; the others are of LFWA's own labels."""
        columns: dict[str, Any] = {}
        for run in in_order(runs):
            name = f"{method_of(run.record.method).label} {setting(run)}"
            by_attribute = run.table("probes").groupby("attribute")
            for key in ("positives", "majority"):
                mean = by_attribute[key].mean()
                columns[key] = columns.get(key, mean).combine_first(mean)
            for measure, label in MEASURES.items():
                columns[f"{name}: {label}"] = by_attribute[measure].mean()
        ours = pd.DataFrame(columns)
        if published := self.paper.attributes:
            theirs = pd.DataFrame(published.values, index=list(published.columns)).T.add_prefix("paper, LFWA: ")
            ours = pd.concat([ours.reindex(theirs.index), theirs], axis=1)
        return {f"{self.experiment}_attributes": ours.rename_axis("attribute").reset_index()}

    def bars(self, runs: list[Run]) -> Figure:
        """Draw mean balanced accuracy by method and rank."""
        runs, table = in_order(runs), self._of_runs(runs)
        figure = Figure(figsize=(7.5, 0.9 + 0.3 * len(runs)), layout="constrained")
        axes = figure.subplots()
        said = shared([run.record.overrides for run in runs])  # in the caption
        own = [[override for override in run.record.overrides if override not in said] for run in runs]
        labels = [
            ", ".join([method, run.record.setting, *overrides])
            for method, run, overrides in zip(table["method"], runs, own, strict=True)
        ]
        colours = [method_of(run.record.method).colour or "C0" for run in runs]
        values, places = table["balanced accuracy"], range(len(runs))  # two runs may have the same label
        spread = table["std"].fillna(0.0)
        axes.barh(places, values, xerr=spread, color=colours, height=0.7)
        for place, value, end in zip(places, values, values + spread, strict=True):
            axes.annotate(
                f"{value:.1f}", (max(50.0, end), place), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_yticks(places, map(in_figure, labels))
        axes.set(xlabel="balanced accuracy, mean over the attributes (%); chance: 50", xlim=(50, 100))
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        caption_below(figure, self._caption(runs, "Bars: mean over the seeds, ±1 standard deviation"))
        return figure

    def heat_maps(self, run: Run, factors: Sequence[int] | None = None) -> Figure:
        """Draw Figure 8: rows of S, up-sampled bilinearly, over faces of different people.

        factors: None for `chosen_factors`. Raises ValueError for a factor that is not there.
        """
        arrays = run.arrays
        if absent := [factor for factor in factors or () if not 0 <= factor < len(arrays["maps"])]:
            raise ValueError(f"factors: there is no {absent[0]}, only 0 to {len(arrays['maps']) - 1}")
        remark = "those asked for"
        if factors is None:
            factors = chosen_factors(arrays)
            remark = "the most consistent (the share of energy common to all test faces), one for each place of its "
            remark += "largest mean"
        faces, maps = arrays["faces"].transpose(0, 2, 3, 1), torch.from_numpy(arrays["maps"][list(factors)])
        large = functional.interpolate(maps, faces.shape[1:3], mode="bilinear", align_corners=False).numpy()
        figure = Figure(figsize=(1.1 * len(faces) + 0.6, 1.15 * (len(factors) + 1) + 0.22), layout="constrained")
        panels = figure.subplots(len(factors) + 1, len(faces), squeeze=False)
        for column, face in enumerate(faces):
            panels[0, column].imshow(face)
            for row, factor in enumerate(large, start=1):
                panels[row, column].imshow(face.mean(2), cmap="gray")
                panels[row, column].imshow(factor[column], cmap="inferno", alpha=0.55, vmin=0, vmax=float(factor.max()))
        for panel in panels.flat:
            panel.set(xticks=[], yticks=[])
        for row, factor in enumerate(factors, start=1):
            panels[row, 0].set_ylabel(f"factor {factor}\n{arrays['consistency'][factor]:.2f}", fontsize=8)
        of_run = f"Factors of {run.record.setting}, seed {arrays['seed']}"
        text = self._caption([run], f"{of_run}: {remark}; below its number, a factor's consistency")
        caption_below(figure, text)
        return figure

    def _caption(self, runs: list[Run], remark: str) -> str:
        labels = " and ".join(sorted({run.record.labels for run in runs}))
        machines = ", ".join(sorted({run.record.machine for run in runs}))
        shows = in_figure(", ".join([self.caption, *shared([run.record.overrides for run in runs])]))
        return f"{shows}; {labels}. {remark}. {machines}."


def in_order(runs: list[Run]) -> list[Run]:
    """Return the runs in the order of method and rank."""

    def rank(run: Run) -> tuple[float, int]:
        digits = "".join(filter(str.isdigit, run.record.setting))
        return method_of(run.record.method).order, int(digits or "0")

    return sorted(runs, key=rank)


def setting(run: Run) -> str:
    """Return a run's setting in words: with its overrides, its labels, and how many seeds have diverged."""
    record = run.record
    remark = [f"{len(record.diverged)} of {len(record.seeds)} seeds diverged"] if record.diverged else []
    return ", ".join([record.setting, *record.overrides, record.labels, *remark])


def verification(run: Run, history: pd.DataFrame) -> dict[str, float]:
    """Return the verification accuracy, percent, of the last evaluation before backbone and factorisation move, and at
    the end."""
    by_iteration = history.groupby("iteration")["verification"].mean()
    before = by_iteration.loc[: run.record.frozen]
    return {"verification before": float(before.iloc[-1]), "after": float(by_iteration.iloc[-1])}


def chosen_factors(arrays: dict[str, NDArray[Any]], number: int = HEAT_MAPS) -> list[int]:
    """Return the most consistent factors, no two of which have their largest mean at the same place."""
    peaks = arrays["mean"].reshape(len(arrays["mean"]), -1).argmax(1)
    chosen: dict[int, int] = {}
    for factor in np.argsort(-arrays["consistency"]):
        chosen.setdefault(int(peaks[factor]), int(factor))
    return list(chosen.values())[:number]
