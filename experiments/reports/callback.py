"""The figures and tables at the end of a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from experiments.launching.failures import failed, failures_end_the_program, run_task
from experiments.reports.base import report_on
from experiments.reports.text import print_table
from experiments.reports.writing import write_report
from experiments.store import LEFT, Run, Store, failed_writes_in_words, launched_runs


class Report(Callback):
    """At the end of a launch: runs that have been left to other processes, then the experiment's figure and table.

    They show the results store, in `<results>/figures` and `<results>/tables`; but where a run of the launch has
    values of its own from the command line, the launch's runs alone, in the launch's folder.
    """

    @failures_end_the_program()
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._report(config, Path(config.hydra.run.dir))

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        launch = Path(config.hydra.sweep.dir)
        for job in sorted(note.parent for note in launch.rglob(LEFT)):
            try:
                self._come_back_to(job)
            except Exception as error:
                failed(job, error, config.hydra.verbose)
        self._report(config, launch)

    def _come_back_to(self, job: Path) -> None:
        """Wait for the run of a job whose folder in the launch this is, or make it if its process has died."""
        folder, own = job / ".hydra", OmegaConf.create({"hydra": HydraConf})
        with open_dict(own.hydra):
            own.merge_with(OmegaConf.load(folder / "hydra.yaml"))
        HydraConfig.instance().set_config(own)
        config: Any = OmegaConf.load(folder / "config.yaml")
        run_task(config)

    def _report(self, config: DictConfig, launch: Path) -> None:
        by_experiment: dict[str, list[Run]] = {}
        for run in launched_runs(launch):
            by_experiment.setdefault(run.record.experiment, []).append(run)
        for runs in by_experiment.values():
            self._report_of(config, launch, runs)

    def _report_of(self, config: DictConfig, launch: Path, runs: list[Run]) -> None:
        report, figures, tables = report_on(runs[-1]), launch, launch
        if not any(run.record.overrides for run in runs):
            root = Path(config.results)
            runs, figures, tables = Store(root).runs(report.experiment), root / "figures", root / "tables"
        with failed_writes_in_words("The runs are in the store; the same command draws them."):
            print_table(write_report(report, runs, figures, tables), report.title(runs))
        place = tables / f"{report.experiment}.csv"
        Console().print(f"figures: {figures}, table: {place}", soft_wrap=True, markup=False)
