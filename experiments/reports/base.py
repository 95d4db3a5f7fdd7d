"""The base class of the reports, and which report an experiment has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import isclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
import yaml
from hydra.utils import get_object
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from admm.files import atomic_write
from experiments.errors import user_errors
from experiments.records import RunRecord
from experiments.reports.paper import PaperEntry, entry_of
from experiments.rows import CONF, TableRows
from experiments.store import Run

TEST_ACCURACY = "test accuracy in percent"


@dataclass(frozen=True)
class Comparison:
    """The number of a table's row beside the paper's. run: the name of the row's newest run. measure: what the number
    is, where it is not the report's `measure`."""

    run: str
    method: str
    setting: str
    ours: float
    paper: float | None
    std: float | None = None
    seeds: int | None = None
    iterations: int | None = None
    measure: str | None = None


@dataclass(frozen=True)
class ExperimentReport(ABC):
    """The figures and tables of an experiment, functions of its runs.

    caption: what the figures show. quantity: what the table holds. panels: titles of the settings, in their order.
    reduced: the full-size experiment that this one scales down, or None. needs: files in the data sets'
    folder, of which `make reproduce` takes the first that is there, each with the arguments of its launch; without any
    of them the experiment is left out. order: when `make reproduce` launches it; None: never.
    baseline: what the table's rows are compared with: a method in each row's own setting, such as sgd, or a row, such
    as sgd-tuned.
    """

    experiment: str
    caption: str
    quantity: str = TEST_ACCURACY
    panels: Mapping[str, str] = field(default_factory=dict)
    reduced: str | None = None
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    order: int | None = None
    baseline: str = "sgd"

    unit: ClassVar[str] = "%"  # of the paper's numbers and ours
    measure: ClassVar[str] = "test accuracy, %"  # what they are
    has_curves: ClassVar[bool] = True  # whether a run's history is by iteration

    @abstractmethod
    def score(self, run: Run) -> dict[int, float]:
        """Return what a search maximises, percent, by seed: 0 for a diverged seed; empty if nothing is scored."""

    @abstractmethod
    def headline(self, run: Run) -> tuple[float, str]:
        """Return the one number that describes a run, and its unit."""

    def numbers(self, run: Run) -> dict[str, float]:
        """Return all that was measured at the end of a run by name: means over the replicas that have not diverged."""
        history = run.history
        ended = history[~history["replica"].isin(run.record.diverged)]
        means = ended.groupby("replica").tail(1).mean(numeric_only=True).drop(["replica", "seed"])
        return {str(name): float(mean) for name, mean in means.items()}

    @abstractmethod
    def compare(self, runs: list[Run]) -> list[Comparison]:
        """Return the number of each row of the table, with the paper's if it has one for this row."""

    @abstractmethod
    def table(self, runs: list[Run]) -> pd.DataFrame:
        """Return the table; its index has the name of each row's newest run. runs: from the oldest to the newest."""

    @abstractmethod
    def figures(self, runs: list[Run]) -> dict[str, Figure]:
        """Return the figures by name."""

    def further_tables(self, runs: list[Run]) -> dict[str, pd.DataFrame]:
        """Return other tables by name."""
        return {}

    @property
    def kind(self) -> str:
        """The kind's name, as run.json has it."""
        return type(self).__name__.lower()

    @property
    def paper(self) -> PaperEntry:
        """The paper's numbers for the experiment."""
        return entry_of(self.experiment)

    @property
    def stated(self) -> Mapping[str, float]:
        """The paper's numbers that `compare` uses, by method."""
        return self.paper.accuracy

    @property
    def text(self) -> str:
        """Where the experiment is in the paper, and the caption."""
        return f"The paper's {self.paper.source}. {self.caption}." if self.paper.source else f"{self.caption}."

    def title(self, runs: Sequence[Run]) -> str:
        """Return the title of the table of these runs."""
        held_out = all(run.record.dataset.holdout for run in runs)
        quantity = self.quantity.replace("test accuracy", "held-out accuracy") if held_out else self.quantity
        return f"{self.experiment}: {quantity}"


def score_by_seed(record: RunRecord, by_replica: pd.Series[float]) -> dict[int, float]:
    """Return the scores of a run's seeds, 0 for a diverged one. by_replica: the scores of the others, percent."""
    scores = dict(zip(by_replica.index.tolist(), by_replica.tolist(), strict=True))
    scores |= dict.fromkeys(record.diverged, 0.0)
    return {record.seeds[replica]: score for replica, score in scores.items()}


def report_of(experiment: str, kind: str = "") -> ExperimentReport:
    """Return the report that conf/experiment/<experiment>.yaml declares. An experiment that is not in conf gets a
    report of this kind, accuracy by default, with its name as the caption."""
    return declared_reports().get(experiment) or make_report(experiment, {"_target_": _target(kind or "accuracy")})


def report_on(run: Run) -> ExperimentReport:
    """Return the report of a run's experiment: the one that `note_report` has noted, or the committed one.

    Raises BadInput for a wrong note."""
    note, record = note_of(run), run.record
    if not note.exists():
        return report_of(record.experiment, record.kind)
    with user_errors():
        try:
            return make_report(record.experiment, yaml.safe_load(note.read_text(encoding="utf-8")))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{note}: {error}; a launch of {record.experiment} writes it again") from error


def note_report(run: Run, report: Mapping[str, Any] | None) -> None:
    """Note beside the runs of an experiment of the user's which report it declares, for figures and tables that are
    drawn without its file. None removes the note. Raises WriteError."""
    note = note_of(run)
    if report is None:
        with suppress(FileNotFoundError):
            note.unlink()
        return
    with atomic_write(note, "the note of the experiment's report") as part:
        part.write_text(yaml.safe_dump(dict(report), sort_keys=False, allow_unicode=True), encoding="utf-8")


def note_of(run: Run) -> Path:
    """Return the file of a store that has the report of a run's experiment, if the experiment is the user's."""
    return run.folder.parent / "report.yaml"


def declared_reports() -> Mapping[str, ExperimentReport]:
    """Return the reports of the committed experiments by name, in the order of `make reproduce`.

    Raises BadInput for a baseline that an experiment does not have."""
    return _read(CONF / "experiment")


@cache
def _read(folder: Path) -> Mapping[str, ExperimentReport]:
    contents = {path.stem: cast(DictConfig, OmegaConf.load(path)) for path in sorted(folder.glob("*.yaml"))}
    with user_errors():
        for experiment, content in contents.items():
            TableRows.of(experiment, content.get("rows"), [folder.parent]).check_baseline(content.get("report"))
        declared = [(name, content.report) for name, content in contents.items() if "report" in content]
        reports = [make_report(name, OmegaConf.to_container(node)) for name, node in declared]
    return {report.experiment: report for report in sorted(reports, key=lambda report: report.order or inf)}


def make_report(experiment: str, node: Any) -> ExperimentReport:
    """Return the report that a key `report` of an experiment describes; without a class it is one of accuracies.

    Raises ValueError for what is no mapping, for a class that is not there or is no report, and for wrong keys."""
    if not isinstance(node, Mapping):
        raise ValueError(f"report: {node!r} is no mapping, such as {{caption: Mine}}")
    values = {"_target_": _target("accuracy"), "caption": experiment, **node}
    target = values.pop("_target_")
    try:
        found = get_object(target)
    except ImportError as error:
        raise ValueError(f"report._target_: {error}") from error
    if not (isclass(found) and issubclass(found, ExperimentReport)):
        raise ValueError(f"report._target_: {target} is no subclass of experiments.reports.base.ExperimentReport")
    keys = [key.name for key in fields(found) if key.name != "experiment"]
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"report: no key {unknown[0]!r}; the keys are {', '.join(keys)}")
    return found(experiment, **values)


def _target(kind: str) -> str:
    return f"experiments.reports.{kind}.{kind.capitalize()}"
