"""The report at the end of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from experiments.launching.failures import failures_end_the_program
from experiments.provenance import changed_files, first_few
from experiments.reports.base import report_on
from experiments.reports.text import print_table
from experiments.reports.writing import write_report
from experiments.store import Run, Store, failed_writes_in_words, launched_runs


class Report(Callback):
    """At the end of a launch: writes the experiment's figures and table, and prints the table.

    They show the results store, and are in `<results>/figures` and `<results>/tables`. But if some run is not of a
    committed row, they show only the launch's runs, and are in the launch's folder.
    """

    @failures_end_the_program()
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.run.dir))

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.sweep.dir))

    def _report(self, config: DictConfig, launch: Path) -> None:
        by_experiment: dict[str, list[Run]] = {}
        for run in launched_runs(launch):
            by_experiment.setdefault(run.record.experiment, []).append(run)
        for runs in by_experiment.values():
            self._report_of(config, launch, runs)

    def _report_of(self, config: DictConfig, launch: Path, runs: list[Run]) -> None:
        report, figures, tables = report_on(runs[-1]), launch, launch
        root = Path(config.results)
        if all(run.folder.is_relative_to(root.absolute() / "runs") and not run.record.overrides for run in runs):
            runs, figures, tables = Store(root).runs(report.experiment), root / "figures", root / "tables"
        with failed_writes_in_words("The runs are in the store; the same command draws them."):
            print_table(write_report(report, runs, figures, tables), report.title(runs))
        if note := note_of_other_code(runs):
            Console().print(note, soft_wrap=True, markup=False)
        place = tables / f"{report.experiment}.csv"
        Console().print(f"figures: {figures}, table: {place}", soft_wrap=True, markup=False)


def note_of_other_code(runs: Sequence[Run]) -> str:
    """Return a line that names the runs which other code of this project has made, and the files that have changed
    since; empty if there are none."""
    changed = {run.folder.name: files for run in runs if (files := changed_files(run.record.sources))}
    if not changed:
        return ""
    files = list(dict.fromkeys(name for of_run in changed.values() for name in of_run))
    return (
        f"kept and used, though made by other code (docs/troubleshooting.md): {first_few(list(changed))}; "
        f"changed since: {first_few(files)}; other_code=rerun trains again"
    )
