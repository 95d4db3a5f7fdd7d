"""Files of an experiment's figures and tables."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from admm.files import whole
from experiments.reports.base import ExperimentReport
from experiments.store import Run


def write_report(report: ExperimentReport, runs: list[Run], figures: Path, tables: Path) -> pd.DataFrame:
    """Write the experiment's `<tables>/<experiment>.csv`, its further tables, and its figures, `<figures>/<name>.png`
    and `.pdf`, all of them or none.

    Returns the table. Raises WriteError.
    """
    table = report.table(runs)
    with ExitStack() as files:

        def new(path: Path) -> Path:
            return files.enter_context(whole(path, "the report"))

        for name, frame in ({report.experiment: table} | report.further_tables(runs)).items():
            frame.to_csv(new(tables / f"{name}.csv"), index=False)
        for name, figure in report.figures(runs).items():
            figure.savefig(new(figures / f"{name}.png"), dpi=150)
            # without its date, the same bytes each time
            figure.savefig(new(figures / f"{name}.pdf"), metadata={"CreationDate": None})
    return table
