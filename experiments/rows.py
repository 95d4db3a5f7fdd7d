"""The rows of an experiment's table. Each is a method in a setting, and has a file below conf/row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

CONF = Path(__file__).parent / "conf"
DEFAULT = "default"  # the setting of a run without a row: the optimizer's own default values


@dataclass(frozen=True)
class Row:
    """A row. Its name, <experiment>/<method>-<setting>, is that of its file conf/row/<name>.yaml. Other experiments may
    list it too."""

    name: str

    @property
    def method(self) -> str:
        """The name of its optimizer."""
        return self.name.rpartition("/")[2].rpartition("-")[0]

    @property
    def setting(self) -> str:
        """The name of its setting."""
        return self.name.rpartition("-")[2]


@dataclass(frozen=True)
class TableRows:
    """The rows of an experiment.

    listed: the rows of a launch that chooses none, in their order. others: the other rows of the experiment's folder.
    """

    experiment: str
    listed: list[Row]
    others: list[Row]

    @classmethod
    def of(cls, experiment: str, rows: Sequence[str] | None, conf: Iterable[Path] = (CONF,)) -> TableRows:
        """Return the rows of an experiment. rows: its key `rows`, of globs. conf: folders of configuration.

        Raises ValueError for an entry of `rows` that no file matches.
        """
        files = sorted({path for folder in conf for path in row_files(folder)})
        names = dict[str, None]()
        for pattern in (one for entry in rows or () for one in with_braces_expanded(entry)):
            found = matching(files, pattern)
            if not found:
                raise ValueError(f"rows: no file conf/row/{pattern}.yaml; there are {', '.join(files)}")
            names |= dict.fromkeys(found)
        own = matching(files, f"{experiment}/*")
        listed = own if rows is None else list(names)
        by_label = {(Row(name).method, Row(name).setting): name for name in listed}
        if twice := [name for name in listed if name not in by_label.values()]:
            raise ValueError(f"rows: {twice[0]} has the optimizer and the setting of another of these rows")
        return cls(experiment, [Row(name) for name in listed], [Row(name) for name in own if name not in listed])

    def chosen(self, method: str | None, setting: str | None) -> list[Row]:
        """Return the rows of a method and a setting; None stands for any. The list is empty where the optimizer's own
        default values are meant: for the setting `default`, or for a method without rows if no setting is asked for.

        Raises ValueError for any other setting that the experiment does not have.
        """
        for rows in (self.listed, self.others):
            found = [row for row in rows if method in (None, row.method) and setting in (None, row.setting)]
            if found:
                return found
        if setting in (None, DEFAULT):
            return []
        of_method = f" of optimizer={method}" if method else ""
        raise ValueError(
            f"setting: {setting!r} is no row{of_method} in experiment={self.experiment}; {self.in_words(method)}"
        )

    def check_baseline(self, report: Mapping[str, Any] | None) -> None:
        """Raises ValueError for a key `baseline` of the experiment's report that is neither a method of these rows nor
        a row, as <method>-<setting>."""
        rows = [*self.listed, *self.others]
        right = dict.fromkeys([*(row.method for row in rows), *(f"{row.method}-{row.setting}" for row in rows)])
        if report and (baseline := report.get("baseline")) and baseline not in right:
            raise ValueError(
                f"report.baseline: {baseline!r} is no method and no row of experiment={self.experiment}; there are "
                f"{', '.join(right)}"
            )

    def in_words(self, method: str | None = None) -> str:
        """Return in words which rows there are, those of a method if it has some, for messages."""
        rows = [*self.listed, *self.others]
        names = [f"{row.method}-{row.setting}" for row in [r for r in rows if r.method == method] or rows]
        there = f"there are {', '.join(names)}, and" if names else "there is"
        return f"{there} setting=default, an optimizer's own default values"


def row_files(conf: Path) -> list[str]:
    """Return the names of all rows that a folder of configuration has."""
    return [path.relative_to(conf / "row").with_suffix("").as_posix() for path in conf.glob("row/*/*.yaml")]


def with_braces_expanded(pattern: str) -> list[str]:
    """Expand braces as a shell does: a/{b,c}-d becomes a/b-d and a/c-d."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition("}")
    return [one for choice in choices.split(",") for one in with_braces_expanded(f"{head}{choice}{tail}")]
