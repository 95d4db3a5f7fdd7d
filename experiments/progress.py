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
    """Shows the iteration, what was measured, such as the mean test accuracy, and the time left."""

    def __init__(self, name: str, iterations: int, enabled: bool) -> None:
        console = Console(stderr=True)
        self.name, self.iterations, self.enabled, self.terminal = name, iterations, enabled, console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("iterations, {task.fields[measured]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not (enabled and self.terminal),
        )
        self._task = self._bar.add_task(name, total=iterations, measured="–")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:  # Rich before 14.3 prints an empty line for a disabled bar
            self._bar.stop()

    def update(self, iteration: int, measured: str, seconds: float) -> None:
        """Show an iteration. measured: in words, such as `test accuracy 97.61 %`. seconds: of training so far."""
        self._bar.update(self._task, completed=iteration, measured=measured)
        if self.enabled and not self.terminal:
            log.info("%s: iteration %d/%d, %s, %.0f s", self.name, iteration, self.iterations, measured, seconds)
