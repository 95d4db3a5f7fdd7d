"""Everything in a results store as one page, in one file that needs neither server nor network.

The newest runs first, runs under way, searches; then for each experiment its curves, tables, figures and runs.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from plotly.offline import get_plotlyjs

from experiments.records import RunRecord
from experiments.reports.accuracy import lengths_differ, score_label, score_range, shared
from experiments.reports.base import Comparison, ExperimentReport, declared_reports, report_on
from experiments.reports.curves import Curve, curves
from experiments.reports.drawing import colours_of
from experiments.reports.interrupted import interrupted_row
from experiments.reports.methods import method_of, methods
from experiments.reports.results_page import (
    below_paper,
    best_of_search,
    in_order,
    missing_rows,
    papers_numbers,
    provenance_sentence,
)
from experiments.reports.scores import is_of_a_search
from experiments.reports.searches import ranking, read_ranking
from experiments.reports.text import cells, with_shared_in_title
from experiments.store import Run, Store, age

DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")  # of the settings; the paper's numbers are dotted
NOT_MEASURED = ("iteration", "replica", "seed", "seconds")  # columns of a history
GREY = "#888888"  # of a method without a colour of its own


@dataclass(frozen=True)
class Contents:
    """What is in a results store.

    by_experiment: sound runs, from the oldest to the newest. alone: by a run's name, its number without other runs of
    its row. damaged: by folder or file, what is wrong with it. under_way: rows of a table, the newest checkpoint first.
    """

    root: Path
    by_experiment: dict[str, list[Run]]
    alone: dict[str, Comparison]
    damaged: dict[Path, str]
    under_way: list[dict[str, str]]

    @property
    def runs(self) -> dict[str, Run]:
        """The sound runs by name."""
        return {run.name: run for runs in self.by_experiment.values() for run in runs}

    def report(self, experiment: str) -> ExperimentReport:
        """Return the report of an experiment."""
        return report_on(self.by_experiment[experiment][-1])


def read_store(root: Path) -> Contents:
    """Read a store, setting aside what cannot be reported. Raises BadInput for an experiment's wrong report."""
    declared_reports()  # before a wrong one is taken for a damaged run
    store = Store(root)
    under_way = sorted(store.interrupted(), key=lambda slot: slot.last_written(), reverse=True)
    contents = Contents(root, {}, {}, {}, [interrupted_row(slot) for slot in under_way])
    for folder in store.folders():
        run = Run(folder)
        try:
            contents.alone[run.name] = check_run(run)
            contents.by_experiment.setdefault(folder.parent.name, []).append(run)
        except Exception as error:  # whatever a damaged file can raise anywhere in a report
            contents.damaged[folder] = f"{type(error).__name__}: {error}"
    for runs in contents.by_experiment.values():
        runs.sort(key=age)
    return contents


def check_run(run: Run) -> Comparison:
    """Return the number of a run alone. Raises whatever its report raises, such as for an incomplete run."""
    report = report_on(run)
    run_summary(run), report.score(run), report.table([run]), report.figures([run]), report.further_tables([run])
    (comparison,) = report.compare([run])
    return comparison


def html_page(contents: Contents) -> str:
    """Return the page's HTML."""
    numbers, runs = papers_numbers(contents.by_experiment), contents.runs
    used = sorted({run.record.method for run in runs.values()}, key=lambda name: (method_of(name).order, name))
    folder = Path(__file__).parent / "template"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    benchmarks = {path.name: pd.read_csv(path, dtype=str) for path in sorted(contents.root.glob("bench*.csv"))}
    missing, below = missing_rows(contents.by_experiment), below_paper(numbers)
    return environment.get_template("page.html").render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        store=contents,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        methods=[(name, method_of(name).label, method_of(name).colour or GREY) for name in used],
        newest=html_table("Finished runs, the newest first", newest_runs(contents), runs),
        under_way=html_table("Runs under way", pd.DataFrame(contents.under_way), runs),
        numbers=html_table("Each number of the paper beside ours", numbers, runs),
        remarks=[html_table("Below the paper", below, runs), html_table("Not run", missing, runs)],
        has_numbers=bool(numbers["ours"].notna().any()),
        searches=search_tables(contents),
        benchmarks=[html_table(name, table, runs) for name, table in benchmarks.items()],
        sections=[section(name, contents) for name in in_order(contents.by_experiment)],
    )


def html_table(caption: str, table: pd.DataFrame, runs: dict[str, Run], experiment: str = "") -> dict[str, Any]:
    """Return a table for the template. A row whose index is the name of a run links to that run; overrides that all
    rows share are in the caption.

    experiment: the experiment of rows that belong to no run and do not name one.
    """
    caption, table = with_shared_in_title(caption, table)
    names, rows = {method.label: method.name for method in methods().values()}, []
    for index, content, texts in zip(table.index, table.to_dict("records"), cells(table), strict=True):
        label, run = content.get("method", ""), runs.get(index)
        row = {"experiment": content.get("experiment", experiment), "method": names.get(label, label), "run": ""}
        if run:
            row = {"experiment": run.record.experiment, "method": run.record.method, "run": run.name}
        rows.append(row | {"cells": texts})
    numeric = [is_numeric_dtype(table[column]) for column in table.columns]
    return {
        "caption": caption,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": rows,
        "leads": any(row["run"] for row in rows),
    }


def newest_runs(contents: Contents) -> pd.DataFrame:
    """Return a table with a row for each run, the newest first, of the run's own seeds."""
    rows = {}
    for name, runs in contents.by_experiment.items():
        report = contents.report(name)
        of_rows = {comparison.run: comparison for comparison in report.compare(runs)}
        joined = {run for curve in curves(runs) if len(curve.runs) > 1 for run in curve.runs}
        for run in runs:
            alone = contents.alone[run.name]
            comparison = alone if run.name in joined else of_rows.get(run.name, alone)
            remark = "" if run.name in joined or run.name in of_rows else ", replaced by a newer run"
            rows[run] = _newest_row(report, run.record, comparison, remark)
    newest = sorted(rows, key=age, reverse=True)
    table = pd.DataFrame([rows[run] for run in newest], index=[run.name for run in newest])
    return table.astype({"seeds": "Int64"} if rows else {})


def _newest_row(report: ExperimentReport, record: RunRecord, comparison: Comparison, remark: str) -> dict[str, Any]:
    """A row of `newest_runs`: when the run was finished, what it was, its number and the paper's."""
    what = report.measure.replace("test", "held-out") if record.dataset.holdout else report.measure
    return {
        "finished": moment(record.finished),
        "experiment": record.experiment,
        "method": method_of(record.method).label,
        "setting": f"{comparison.setting}{remark}",
        "measured": comparison.ours,
        "std": comparison.std,
        "paper": comparison.paper,
        "what": comparison.measure or what,
        "seeds": comparison.seeds,
        "training": duration(record.seconds),
    }


def moment(finished: str) -> str:
    """Return a time of `run.json`, to the minute."""
    return finished[:16].replace("T", " ")


def duration(seconds: float | None) -> str:
    """Return a duration in a suitable unit."""
    if seconds is None:
        return "–"
    unit, name = next((u for u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{seconds / unit:.1f} {name}"


def search_tables(contents: Contents) -> list[dict[str, Any]]:
    """Return a table for each search: those that are kept as files, and those of this store's runs on held-out data."""
    tables, runs = [], contents.runs
    for path in sorted((contents.root / "searches").glob("*.csv")):
        method = max((name for name in methods() if path.stem.endswith(f"_{name}")), key=len, default="")
        key = {"experiment": path.stem.removesuffix(f"_{method}"), "method": method}
        table = html_table(f"{path.stem}: {best_in_words(path)}", read_ranking(path, dtype=str), runs)
        tables.append(table | key | {"rows": [row | key for row in table["rows"]]})

    def searched(run: Run) -> tuple[str, str]:
        return run.folder.parent.name, run.record.method

    held_out = sorted(filter(is_of_a_search, runs.values()), key=searched)
    for (experiment, method), group in groupby(held_out, searched):
        ranked = ranking(group)
        what = f"{experiment}, {method_of(method).label}: {len(ranked)} configurations of this store on held-out data"
        tables.append({"experiment": experiment, "method": method} | html_table(what, ranked, runs))
    return tables


def best_in_words(path: Path) -> str:
    """Return in words the best configuration of each setting that a search has tried."""
    best = best_of_search(path)
    return "; ".join(f"{b['setting']}: {b['best']}, {b['held-out']:.2f} % of {b['configurations']} tried" for b in best)


def section(name: str, contents: Contents) -> dict[str, Any]:
    """Return what the template shows of an experiment."""
    report, runs = contents.report(name), contents.by_experiment[name]
    by_row = curves(runs)
    of_row = {run: curve.runs for curve in by_row for run in curve.runs}
    tables = {report.title(runs): report.table(runs)}
    tables |= {f"{further}: of all runs below": table for further, table in report.further_tables(runs).items()}
    return {
        "name": name,
        "text": report.text,
        "provenance": provenance_sentence(runs),
        "plot": interactive_plot(by_row) if report.has_curves else None,
        "tables": [html_table(caption, table, contents.runs, name) for caption, table in tables.items()],
        "figures": {title: png(figure) for title, figure in report.figures(runs).items()},
        "runs": [run_summary(run, of_row.get(run.name, ())) for run in reversed(runs)],
    }


def png(figure: Figure) -> str:
    """Return a figure as a data URI."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"


def run_summary(run: Run, of_row: Sequence[str] = ()) -> dict[str, Any]:
    """Return where a run's numbers come from. of_row: names of the runs that make a row of the tables with it."""
    record = run.record
    others = [name for name in of_row if name != run.name]
    diverged = [f"seed {record.seeds[replica]} after iteration {i}" for replica, i in record.diverged.items()]
    facts = {
        "folder": str(run.folder),
        "identity": record.identity,
        "commit": record.commit,
        "seeds": ", ".join(map(str, record.seeds)),
        "diverged": "; ".join(diverged) or "none",
        "in one row with": ", ".join(others) or "–",
        "iterations": record.iterations,
        "training": "–" if record.seconds is None else f"{record.seconds} s",
        "finished": moment(record.finished),
        "machine": record.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "data": ", ".join(f"{key} {value}" for key, value in asdict(record.dataset).items()),
        "overrides": " ".join(record.overrides) or "none",
        "note": record.note or "–",
    }
    return {
        "name": run.name,
        "experiment": record.experiment,
        "method": record.method,
        "title": ", ".join([method_of(record.method).label, record.setting, *record.overrides]),
        "facts": facts,
        "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
    }


def interactive_plot(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return every measured quantity of the curves, for the page's script to plot."""
    settings = list(dict.fromkeys(curve.record.setting for curve in curves))
    groups = [[curve for curve in curves if curve.record.setting == name] for name in settings]
    colour_of = {
        id(curve): colour
        for group in groups
        for curve, colour in zip(group, colours_of([curve.record.method for curve in group]), strict=True)
    }
    common = shared([curve.record.overrides for curve in curves])
    plotted = [
        curve_data(curve, colour_of[id(curve)], DASHES[settings.index(curve.record.setting) % len(DASHES)], common)
        for curve in curves
    ]
    score = curves[0].metric.column
    quantities = sorted(
        {name for curve in plotted for name in curve["measured"]}, key=lambda name: quantity_order(name, score)
    )
    limits = score_range([curve for curve in curves if curve.metric.column == score])
    return {
        "curves": plotted,
        "shared": common,
        "quantities": {n: score_label(curves) if n == score else in_words(n) for n in quantities},
        "score": score,
        "log": lengths_differ(curves),
        "range": numbers(limits) if limits else None,
    }


def quantity_order(name: str, score: str) -> tuple[bool, bool, str, int]:
    """Return a key that sorts quantities: the score first, then accuracies, then by name and block."""
    stem, _, block = name.rpartition("_")
    is_of_block = block.isdigit()
    return (
        name != score,
        "accuracy" not in name,
        stem if is_of_block else name,
        int(block) if is_of_block else 0,
    )


def in_words(name: str) -> str:
    """Return the name of a history's column in words."""
    return name.replace("_", " ") + (" (%)" if name.endswith(("accuracy", "exact_match", "r2")) else "")


def curve_data(curve: Curve, colour: str, dash: str, common: Sequence[str]) -> dict[str, Any]:
    """Return a curve's means and standard deviations over the seeds, by iteration; its name leaves out the overrides
    that are common to all curves."""
    by_name = {name: curve.by_iteration(name) for name in curve.history.select_dtypes("number").columns}
    record = curve.record
    parts = [curve.label, record.setting, *(override for override in record.overrides if override not in common)]
    return {
        "run": curve.run,
        "experiment": record.experiment,
        "method": record.method,
        "name": "<br>".join(escape(text, quote=False) for text in wrap(", ".join(filter(None, parts)), 120)),
        "colour": colour,
        "dash": dash,
        "paper": curve.reference,
        "iteration": by_name["iteration"].index.tolist(),
        "seconds": numbers(by_name["seconds"]["mean"]) if "seconds" in by_name else None,
        "measured": {
            name: {key: numbers(statistics[key]) for key in ("mean", "std")}
            for name, statistics in by_name.items()
            if name not in NOT_MEASURED
        },
    }


def numbers(values: Iterable[float]) -> list[float | None]:
    """Return the numbers with six digits; None for those that JSON does not have."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
