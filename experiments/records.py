"""What a finished run's `run.json` says, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class DatasetRecord:
    """The data of a run. holdout: how many training samples were its test set; 0 where it is the data set's own."""

    name: str = ""
    holdout: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class RunRecord:
    """What was run, where its code and numbers come from, and how it ended. Not every run has the keys with a default.

    overrides: of the command line, those that change the numbers. of_seeds: how many seeds the row has, 0 in old runs.
    seconds: of training; None where nothing was trained. diverged: for each replica that diverged, the iteration after
    which it was not finite. kind: of the report, see `kind_of`; empty in old runs: the experiment declares it.
    labels, scores_verification, frozen: only of runs on faces. stack: how many replicas were trained together.
    """

    experiment: str
    method: str
    setting: str
    note: str | None
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    iterations: int
    dataset: DatasetRecord
    machine: str
    finished: str
    identity: str = ""
    schema: int = 1
    of_seeds: int = 0
    kind: str = ""
    commit: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    diverged: Mapping[int, int] = field(default_factory=dict)
    stack: int | None = None
    labels: str = ""
    scores_verification: tuple[float, ...] = ()
    frozen: int = 0

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> RunRecord:
        """Return the record of a parsed `run.json`; other keys are ignored.

        Raises KeyError for a missing key, and ValueError for what is no mapping.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"a {type(content).__name__} is no record of a run")
        required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        for name in sorted(required - content.keys()):
            raise KeyError(name)
        values = {f.name: _frozen(content[f.name]) for f in fields(cls) if f.name in content}
        data = {f.name: content["dataset"][f.name] for f in fields(DatasetRecord) if f.name in content["dataset"]}
        diverged = {int(replica): iteration for replica, iteration in content.get("diverged", {}).items()}
        return cls(**values | {"dataset": DatasetRecord(**data), "diverged": diverged})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind of the report that a configuration declares, such as memory for `experiments.reports.memory.Memory`;
    accuracy where it declares none."""
    target = str((config.get("report") or {}).get("_target_", "accuracy"))
    return target.rpartition(".")[2].lower()
