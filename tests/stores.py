"""Made-up runs in a store."""

from pathlib import Path

from experiments.identity import SCHEMA
from experiments.store import Run, Slot


def run_json(method: str, setting: str, finished: str, **more: object) -> dict[str, object]:
    """The content of a run's `run.json`; `more` replaces keys, or adds some."""
    return {
        "schema": SCHEMA,
        "experiment": "mnist_shallow",
        "method": method,
        "setting": setting,
        "overrides": [],
        "note": None,
        "dataset": {"holdout": 0},
        "seeds": [0, 1],
        "iterations": 1,
        "machine": "a machine",
        "finished": finished,
    } | more


def add_run(root: Path, name: str, accuracies: list[float], info: dict[str, object]) -> Run:
    """Put a run of one iteration into a store. accuracies: of the replicas at its end; 0 for one that has diverged."""
    rows = [
        {"iteration": i, "replica": r, "seed": r, "test_accuracy": a * i}
        for i in (0, 1)
        for r, a in enumerate(accuracies)
        if a or i == 0
    ]
    slot = Slot(root, "mnist_shallow", name, f"{name}{info['finished']}".replace("-", ""))
    slot.partial.mkdir(parents=True, exist_ok=True)
    return slot.complete({"a": 1, "overrides": info["overrides"]}, rows, info)
