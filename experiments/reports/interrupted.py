"""The rows of tables of unfinished runs."""

from __future__ import annotations

import time
from datetime import timedelta

from experiments.store import Slot


def interrupted_row(slot: Slot) -> dict[str, str]:
    """Return the row of an unfinished run: what it is, how far it got, and whether a process is working on it."""
    start = slot.started()
    return {
        "experiment": start.experiment if start else "–",
        "method": start.method if start else "–",
        "setting": start.setting if start else "–",
        "identity": slot.identity,
        "reached": slot.progress(),
        "last written": f"{timedelta(seconds=int(time.time() - slot.last_written()))} ago",
        "process": "at work" if slot.is_held() else "none",
        "overrides": " ".join(start.overrides) if start else "",
    }
