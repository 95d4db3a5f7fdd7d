"""Made-up runs in a store."""

from pathlib import Path

from experiments.store import Run, Slot


def info(method: str, setting: str, finished: str, **more: object) -> dict[str, object]:
    return {
        "experiment": "mnist_shallow",
        "method": method,
        "setting": setting,
        "overrides": [],
        "points": [],
        "note": None,
        "dataset": {"holdout": 0},
        "seeds": [0, 1],
        "iterations": 1,
        "machine": "a machine",
        "finished": finished,
    } | more


def put(root: Path, name: str, accuracies: list[float], description: dict[str, object]) -> Run:
    rows = [
        {"iteration": i, "replica": r, "seed": r, "test_accuracy": a * i}
        for i in (0, 1)
        for r, a in enumerate(accuracies)
        if a or i == 0
    ]
    slot = Slot(root, "mnist_shallow", name, f"{name}{description['finished']}".replace("-", ""))
    slot.partial.mkdir(parents=True, exist_ok=True)
    return slot.complete({"a": 1, "overrides": description["overrides"]}, rows, description)
