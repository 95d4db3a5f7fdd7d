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

FONT_TAG = re.compile(rb"/[A-Z]{6}\+(?=[A-Za-z]{2})")


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
            pdf = new(figures / f"{name}.pdf")  # the same bytes each time
            figure.savefig(pdf, metadata={"CreationDate": None})
            pdf.write_bytes(with_fixed_tags(pdf.read_bytes()))
    return table


def with_fixed_tags(pdf: bytes) -> bytes:
    """Return a PDF with the tags AAAAAA, AAAAAB, … before the names of its fonts. Those of Matplotlib are made of
    Python's hashes of texts, which are others in each process."""
    tags = {tag: b"/AAAAA%c+" % letter for letter, tag in enumerate(dict.fromkeys(FONT_TAG.findall(pdf)), ord("A"))}
    return FONT_TAG.sub(lambda found: tags[found[0]], pdf)


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
