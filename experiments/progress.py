"""Progress of a run: a bar on a terminal, a line of the log elsewhere."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


def show_what_can_be_shown() -> None:
    """Make standard output print a question mark for a character that its encoding lacks, from now on."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class RunProgress:
    """Shows the iteration, the mean of a quantity in percent, such as the test accuracy, and the time left."""

    def __init__(self, name: str, iterations: int, enabled: bool, quantity: str = "test accuracy") -> None:
        console = Console(stderr=True)
        self.name, self.iterations, self.enabled, self.terminal = name, iterations, enabled, console.is_terminal
        self.quantity = quantity
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"iterations, {quantity} {{task.fields[accuracy]}}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not (enabled and self.terminal),
        )
        self._task = self._bar.add_task(name, total=iterations, accuracy="–")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, iteration: int, accuracy: float, seconds: float) -> None:
        """Show an iteration. accuracy: the quantity's mean over the replicas. seconds: of training so far."""
        self._bar.update(self._task, completed=iteration, accuracy=f"{accuracy:.2f} %")
        if self.enabled and not self.terminal:
            log.info(
                "%s: iteration %d/%d, %s %.2f %%, %.0f s",
                self.name,
                iteration,
                self.iterations,
                self.quantity,
                accuracy,
                seconds,
            )
