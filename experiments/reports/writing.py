"""Files of an experiment's figures and tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from admm.files import atomic_write
from experiments.reports.base import ExperimentReport
from experiments.reports.text import markdown
from experiments.store import Run


def write_report(report: ExperimentReport, runs: list[Run], figures: Path, tables: Path) -> pd.DataFrame:
    """Write the experiment's `<tables>/<experiment>.csv`, its further tables, and its figures, `<figures>/<name>.png`
    and `.pdf`, all of them or none.

    Returns the table. Raises WriteError.
    """
    table = report.table(runs)
    with ExitStack() as files:

        def new(path: Path) -> Path:
            return files.enter_context(atomic_write(path, "the report"))

        for name, frame in ({report.experiment: table} | report.further_tables(runs)).items():
            frame.to_csv(new(tables / f"{name}.csv"), index=False)
        for name, figure in report.figures(runs).items():
            figure.savefig(new(figures / f"{name}.png"), dpi=150)
            # without its date, the same bytes each time
            figure.savefig(new(figures / f"{name}.pdf"), metadata={"CreationDate": None})
    return table


def update_tables(page: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write the experiments' tables into a Markdown page, see `with_tables`. Raises WriteError."""
    text = with_tables(page.read_text(encoding="utf-8"), tables)
    with atomic_write(page, "the page") as part:
        part.write_text(text, encoding="utf-8")


def with_tables(text: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """Return Markdown with the experiments' tables in their places, `<!-- table: experiment -->` to `<!-- end -->`."""

    def filled(place: re.Match[str]) -> str:
        table = markdown(tables[place[2]]) if place[2] in tables else "Not run."
        return f"{place[1]}{table}\n{place[3]}"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", filled, text, flags=re.DOTALL)
