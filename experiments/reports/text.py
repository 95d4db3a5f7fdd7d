"""Tables as text, for a page in Markdown and for a terminal.

Markdown is written here as `pandas.DataFrame.to_markdown` pads its cells, and neither escapes bars nor joins lines."""

from __future__ import annotations

import re

import pandas as pd
from pandas.api.types import is_numeric_dtype
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OVERRIDE = re.compile(r"[\w./@+~]+=")
BRACKETS = (("[", "]"), ("{", "}"), ("(", ")"))


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
    """Print a table to the terminal, without empty columns; a machine and overrides that all rows share are in the
    title."""
    title, shown = with_shared_in_title(title, table.dropna(axis="columns", how="all"))
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


def with_shared_in_title(title: str, table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return a table's title, with the overrides that all rows share, and the table without them."""
    if not (common := shared_overrides(table)):
        return title, table
    own = [[part for part in setting.split(", ") if part not in common] for setting in table["setting"]]
    return ", ".join([title, *common]), table.assign(setting=list(map(", ".join, own)))


def shared_overrides(table: pd.DataFrame) -> list[str]:
    """Return the overrides that the settings of several rows all have, as far as no comma divides them."""
    if "setting" not in table or len(table) < 2 or table["setting"].isna().any():
        return []
    first, *others = (setting.split(", ") for setting in table["setting"])
    whole = [part for part in first if OVERRIDE.match(part) and is_closed(part)]
    return [part for part in whole if all(part in parts for parts in others)]


def is_closed(text: str) -> bool:
    """Return whether a text has as many closing brackets as opening ones."""
    return all(text.count(opening) == text.count(closing) for opening, closing in BRACKETS)
