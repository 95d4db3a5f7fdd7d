"""The paper's numbers, `experiments/paper.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[1] / "paper.yaml"


@dataclass(frozen=True)
class AttributeTable:
    """Table 2: percent by attribute of a face, one value per column."""

    columns: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class PaperEntry:
    """The paper's numbers for an experiment.

    source: the figure, table or section; None for an experiment that is not the paper's. accuracy: final test accuracy
    by method, percent. ratio: by method, how many times less memory than the batch form. beyond: settings that the
    paper does not have. authors: percent, as a baseline's own authors publish it, by method. ranks, cited, attributes:
    Tables 1 and 2 on faces, percent by rank of DeepFacto, by cited work and by attribute.
    """

    source: str | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    ratio: Mapping[str, float] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    authors: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    cited: Mapping[str, float] = field(default_factory=dict)
    attributes: AttributeTable | None = None


def paper() -> Mapping[str, PaperEntry]:
    """Return the paper's numbers by experiment, in the order of the results page."""
    return _read(FILE)


def entry_of(experiment: str) -> PaperEntry:
    """Return the paper's numbers for an experiment; an empty entry if the file does not have it."""
    return paper().get(experiment, PaperEntry())


@cache
def _read(file: Path) -> Mapping[str, PaperEntry]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {experiment: _entry(**numbers) for experiment, numbers in content.items()}


def _entry(beyond: list[str] | None = None, attributes: dict[str, Any] | None = None, **numbers: Any) -> PaperEntry:
    table = AttributeTable(tuple(attributes["columns"]), attributes["values"]) if attributes else None
    return PaperEntry(beyond=tuple(beyond or ()), attributes=table, **numbers)
