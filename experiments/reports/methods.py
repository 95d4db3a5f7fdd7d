"""The methods' names in tables, and their colours in figures, `method` of conf/optimizer/<method>.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path

from omegaconf import OmegaConf

from experiments.rows import CONF

# Okabe & Ito's colours, distinguishable with any common colour blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#882255", "#999933", "#000000", "#CC79A7")


@dataclass(frozen=True)
class Method:
    """An optimizer as reports show it. colour: None if it has no colour of its own. order: in legends and tables."""

    name: str
    label: str
    colour: str | None = None
    order: float = inf


def methods() -> Mapping[str, Method]:
    """Return the committed methods by name, in their order."""
    return _read(CONF / "optimizer")


def method_of(name: str) -> Method:
    """Return a method. One that is not committed, or has no entry `method`, is labelled by its name."""
    return methods().get(name, Method(name, name))


@cache
def _read(folder: Path) -> Mapping[str, Method]:
    files = ((path.stem, OmegaConf.load(path)) for path in folder.glob("*.yaml"))
    declared = [Method(name, **content.method) for name, content in files if "method" in content]
    return {method.name: method for method in sorted(declared, key=lambda method: method.order)}
