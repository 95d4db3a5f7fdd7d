"""Tables as text, for a page in Markdown and for a terminal.

Markdown is written here as `pandas.DataFrame.to_markdown` pads its cells, and neither escapes bars nor joins lines."""

from __future__ import annotations

import pandas as pd
from pandas.api.types import is_numeric_dtype
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def cells(table: pd.DataFrame) -> list[list[str]]:
    """Return a table's values as text, row by row, with two decimals, and a dash for a missing value."""

    def text(value: object) -> str:
        return "–" if pd.isna(value) else f"{value:.2f}" if isinstance(value, float) else str(value)  # type: ignore[call-overload]

    return [[text(value) for value in row] for row in table.itertuples(index=False)]


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    lines = [list(map(in_markdown, table.columns)), ["---"] * len(table.columns)]
    lines += [list(map(in_markdown, row)) for row in cells(table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_markdown(text: str) -> str:
    """Return a text as a cell of a table in Markdown: on one line, with escaped bars."""
    return " ".join(text.split()).replace("|", r"\|")


def in_figure(text: str) -> str:
    """Return a text for Matplotlib in which dollars do not begin formulas."""
    return text.replace("$", r"\$")


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table to the terminal, without empty columns; a machine that all rows share is in the title."""
    shown = table.dropna(axis="columns", how="all")
    if "machine" in shown and shown["machine"].nunique() == 1:
        title, shown = f"{title} ({shown['machine'].iloc[0]})", shown.drop(columns="machine")
    printed = Table(title=escape(title))
    for column in shown.columns:
        printed.add_column(
            escape(column), justify="right" if is_numeric_dtype(shown[column]) else "left", overflow="fold"
        )
    for row in cells(shown):
        printed.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 140).print(printed)
