"""Everything in a results store as one page, in one file that needs neither server nor network:
python -m experiments.reports.html_page [results] [--out outputs/report.html]

The newest runs first, runs under way, searches; then for each experiment its curves, tables, figures and runs.
"""

from __future__ import annotations

import argparse
import sys
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from plotly.offline import get_plotlyjs

from admm.files import atomic_write
from experiments.paths import in_full
from experiments.reports.report import (
    COLOURS,
    Content,
    Curve,
    accuracy_range,
    cells,
    colours,
    content,
    curves,
    further_tables,
    lengths_differ,
    measure,
    paper,
    place,
    title,
)
from experiments.reports.results_page import falls_short, in_order, made, not_run, papers_numbers, search
from experiments.reports.searches import is_of_a_search, ranking, read
from experiments.store import Run, age, failed_writes_in_words
from scripts.store import interrupted, line_of_interrupted, written

DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")  # of the settings; the paper's numbers are dotted
MEASURED = {  # the column of an experiment's table that is a run's one number, and what it is
    "mean": "test accuracy, %",
    "balanced accuracy": "balanced test accuracy, %",
    "batch/this": "times less than batch",
}
NOT_MEASURED = ("iteration", "replica", "seed", "seconds")  # columns of a history


@dataclass(frozen=True)
class Store:
    """What is in a results store.

    found: sound runs by experiment, from the oldest to the newest. alone: by its name, what is made of a run alone.
    damaged: by folder or file, what is wrong with it. under_way: lines of a table, the newest checkpoint first.
    """

    root: Path
    found: dict[str, list[Run]]
    alone: dict[str, pd.DataFrame]
    damaged: dict[Path, str]
    under_way: list[dict[str, Any]]

    @property
    def runs(self) -> dict[str, Run]:
        return {run.name: run for runs in self.found.values() for run in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=in_full, nargs="?", default=Path("results"), help="such as results or outputs")
    parser.add_argument("--out", type=in_full, default=Path("outputs/report.html"), help="what to write")
    options = parser.parse_args()
    if not options.store.is_dir():
        sys.exit(f"error: there is no folder {options.store}; it should be a results store, such as results or outputs")
    store = examined(options.store)
    text = page(store)
    with failed_writes_in_words(), atomic_write(options.out, "the page") as part:
        part.write_text(text, encoding="utf-8")
    for path, problem in store.damaged.items():
        print(f"warning: {path} is damaged and left out: {problem}", file=sys.stderr)
    size = options.out.stat().st_size / 1e6
    print(f"written: {options.out}, {len(store.runs)} runs of {len(store.found)} experiments, {size:.1f} MB")


def examined(root: Path) -> Store:
    """Read a store, setting aside what cannot be reported."""
    under_way = sorted(interrupted(root, None), key=written, reverse=True)
    store = Store(root, {}, {}, {}, [line_of_interrupted(partial) for partial in under_way])
    for folder in sorted(root.glob("runs/[!.]*/*/")):
        run = Run(folder)
        try:
            store.alone[run.name] = checked(run)
            store.found.setdefault(folder.parent.name, []).append(run)
        except Exception as error:  # whatever a damaged file can raise anywhere in a report
            store.damaged[folder] = f"{type(error).__name__}: {error}"
    for runs in store.found.values():
        runs.sort(key=age)
    return store


def checked(run: Run) -> pd.DataFrame:
    """The table of a run alone. Raises where the run is not complete."""
    info, history = run.info, run.history
    described(run)
    if "test_accuracy" in history:
        ended = history.loc[history["iteration"] == info["iterations"], "test_accuracy"].notna().sum()
        if ended + len(info.get("diverged", {})) < len(info["seeds"]):
            raise ValueError(f"history.csv has the last iteration of {ended} of {len(info['seeds'])} seeds only")
    return content(run.folder.parent.name, [run])[0]


def page(store: Store) -> str:
    """The page's HTML."""
    made_of = {name: content(name, store.found[name]) for name in in_order(store.found)}
    of_curves = {name: curves(store.found[name]) for name in made_of}
    numbers = papers_numbers(store.found)
    legend = list(paper()["labels"])
    methods = sorted({run.info["method"] for run in store.runs.values()}, key=lambda name: place(name, legend))
    folder = Path(__file__).parent / "template"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html").render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        store=store,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        methods=[(name, label(name), COLOURS.get(name, "#888888")) for name in methods],
        newest=table("Finished runs, the newest first", newest(store, made_of, of_curves), store),
        under_way=table("Runs under way", pd.DataFrame(store.under_way), store),
        numbers=table("Each number of the paper beside ours", numbers, store),
        remarks=[falls_short(numbers), not_run(store.found)],
        has_numbers=bool(numbers["ours"].notna().any()),
        searches=searches(store),
        benchmarks=[
            table(path.name, pd.read_csv(path, dtype=str), store) for path in sorted(store.root.glob("bench*.csv"))
        ],
        sections=[section(name, store, of_curves[name], *made_of[name]) for name in made_of],
    )


def label(method: str) -> str:
    return str(paper()["labels"].get(method, method))


def table(caption: str, result: pd.DataFrame, store: Store, experiment: str = "") -> dict[str, Any]:
    """A table for the template; a row whose index is the name of a run leads to it.

    experiment: of rows that are of no run and do not say it.
    """
    keys, runs, rows = {label(name): name for name in paper()["labels"]}, store.runs, []
    for index, record, texts in zip(result.index, result.to_dict("records"), cells(result), strict=True):
        method = record.get("method", "")
        of_none = {"experiment": record.get("experiment", experiment), "method": keys.get(method, method)}
        info = runs[index].info if index in runs else of_none
        key = {"experiment": info["experiment"], "method": info["method"], "run": index if index in runs else ""}
        rows.append(key | {"cells": texts})
    numeric = [is_numeric_dtype(result[column]) for column in result.columns]
    return {
        "caption": caption,
        "columns": list(zip(result.columns, numeric, strict=True)),
        "rows": rows,
        "leads": any(row["run"] for row in rows),
    }


def newest(store: Store, made_of: dict[str, Content], of_curves: dict[str, list[Curve]]) -> pd.DataFrame:
    """A line for each run, of its own seeds."""
    lines, names = [], []
    for run in sorted(store.runs.values(), key=age, reverse=True):
        name = run.folder.parent.name
        shown, is_part = made_of[name][0], any(run.name in c.runs and len(c.runs) > 1 for c in of_curves[name])
        is_shown = is_part or run.name in shown.index
        rows = shown if is_shown and not is_part else store.alone[run.name]
        for row in rows.loc[[run.name]].to_dict("records"):
            lines.append(summary(run, row, "" if is_shown else ", replaced by a newer run"))
            names.append(run.name)
    return pd.DataFrame(lines, index=names).astype({"seeds": "Int64"} if lines else {})


def summary(run: Run, row: dict[Any, Any], remark: str) -> dict[str, Any]:
    """When a run was finished, what it was, its number and the paper's; `row` of its experiment's table."""
    info = run.info
    column = next((name for name in MEASURED if name in row), "")
    what = MEASURED.get(column, "see its table")
    return {
        "finished": moment(info["finished"]),
        "experiment": info["experiment"],
        "method": label(info["method"]),
        "setting": f"{row['setting']}{remark}",
        "measured": row.get(column, np.nan),
        "std": row.get("std", np.nan),
        "paper": row.get("paper", np.nan),
        "what": what.replace("test", "held-out") if info["dataset"]["holdout"] else what,
        "seeds": row.get("seeds"),
        "training": duration(info.get("seconds")),
    }


def moment(finished: str) -> str:
    return finished[:16].replace("T", " ")


def duration(seconds: float | None) -> str:
    """In a unit that suits it."""
    if seconds is None:
        return "–"
    unit, name = next((u for u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{seconds / unit:.1f} {name}"


def searches(store: Store) -> list[dict[str, Any]]:
    """A table for each search: those that are kept as files, and runs of this store on held-out data."""
    tables = []
    for path in sorted((store.root / "searches").glob("*.csv")):
        method = max((m for m in paper()["labels"] if path.stem.endswith(f"_{m}")), key=len, default="")
        key = {"experiment": path.stem.removesuffix(f"_{method}"), "method": method}
        kept = table(f"{path.stem}: {best(path)}", read(path, dtype=str), store)
        tables.append(kept | key | {"rows": [row | key for row in kept["rows"]]})
    held_out = [run for run in store.runs.values() if is_of_a_search(run)]

    def of(run: Run) -> tuple[str, str]:
        return run.folder.parent.name, run.info["method"]

    for (experiment, method), group in groupby(sorted(held_out, key=of), of):
        found = ranking(list(group))
        shown = table(
            f"{experiment}, {label(method)}: {len(found)} configurations of this store on held-out data", found, store
        )
        tables.append({"experiment": experiment, "method": method} | shown)
    return tables


def best(path: Path) -> str:
    """What a search has found, in words."""
    found = [f"{s['setting']}: {s['best']}, {s['held-out']:.2f} % of {s['configurations']} tried" for s in search(path)]
    return "; ".join(found)


def section(
    name: str, store: Store, shown: list[Curve], result: pd.DataFrame, figures: dict[str, Figure]
) -> dict[str, Any]:
    """What the template shows of an experiment."""
    known, runs = paper()["experiments"].get(name, {}), store.found[name]
    of_row = {run: curve.runs for curve in shown for run in curve.runs}
    source = f"The paper's {known['source']}. " if known.get("source") else ""
    tables = {title(name, runs): result}
    tables |= {f"{further}: of all runs below": frame for further, frame in further_tables(name, runs).items()}
    return {
        "name": name,
        "text": f"{source}{known.get('caption', name)}.",
        "made": made(runs),
        "plot": plot(shown),
        "tables": [table(caption, frame, store, name) for caption, frame in tables.items()],
        "figures": {figure: png(drawn) for figure, drawn in figures.items()},
        "runs": [described(run, of_row.get(run.name, ())) for run in reversed(runs)],
    }


def png(figure: Figure) -> str:
    """A figure as a data URI."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"


def described(run: Run, of_row: Sequence[str] = ()) -> dict[str, Any]:
    """Where a run's numbers come from. of_row: names of the runs that make a row of the tables with it."""
    info = run.info
    seeds = info["seeds"]
    others = [name for name in of_row if name != run.name]
    diverged = [f"seed {seeds[int(r)]} after iteration {i}" for r, i in info.get("diverged", {}).items()]
    facts = {
        "folder": str(run.folder),
        "identity": info["identity"],
        "commit": info["commit"],
        "seeds": ", ".join(map(str, seeds)),
        "diverged": "; ".join(diverged) or "none",
        "in one row with": ", ".join(others) or "–",
        "iterations": info["iterations"],
        "training": f"{info['seconds']} s" if "seconds" in info else "–",
        "finished": moment(info["finished"]),
        "machine": info["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "data": ", ".join(f"{key} {value}" for key, value in info["dataset"].items()),
        "overrides": " ".join(info["overrides"]) or "none",
        "note": info["note"] or "–",
    }
    title = ", ".join([label(info["method"]), info["setting"], *info["overrides"]])
    config = (run.folder / "config.yaml").read_text(encoding="utf-8")
    return {"name": run.name, "title": title, "facts": facts, "config": config} | {
        key: info[key] for key in ("experiment", "method")
    }


def plot(shown: list[Curve]) -> dict[str, Any] | None:
    """Every measured quantity of the curves, for the script to draw; None of runs without iterations."""
    shown = [curve for curve in shown if "iteration" in curve.history]
    if not shown:
        return None
    settings = list(dict.fromkeys(curve.info["setting"] for curve in shown))
    groups = {name: [curve for curve in shown if curve.info["setting"] == name] for name in settings}
    painted = {id(c): paint for group in groups.values() for c, paint in zip(group, colours(group), strict=True)}
    drawn = [
        drawable(curve, to_hex(painted[id(curve)]), DASHES[settings.index(curve.info["setting"]) % len(DASHES)])
        for curve in shown
    ]
    quantities = sorted({name for curve in drawn for name in curve["measured"]}, key=lambda name: quantity_order(name))
    has_accuracy = "test_accuracy" in quantities
    return {
        "curves": drawn,
        "quantities": {name: measure(shown) if name == "test_accuracy" else in_words(name) for name in quantities},
        "log": lengths_differ(shown),
        "range": numbers(accuracy_range(shown)) if has_accuracy else None,
    }


def quantity_order(name: str) -> tuple[bool, bool, str, int]:
    """Accuracies first, then by name and block."""
    stem, _, block = name.rpartition("_")
    is_of_block = block.isdigit()
    return (
        name != "test_accuracy",
        "accuracy" not in name,
        stem if is_of_block else name,
        int(block) if is_of_block else 0,
    )


def in_words(name: str) -> str:
    return name.replace("_", " ") + (" (%)" if name.endswith("accuracy") else "")


def drawable(curve: Curve, colour: str, dash: str) -> dict[str, Any]:
    """A curve's means and standard deviations over the seeds, by iteration."""
    by_name = {name: curve.by_iteration(name) for name in curve.history.select_dtypes("number").columns}
    parts = [curve.method, curve.info["setting"], *curve.info["overrides"]]
    return {
        "run": curve.run,
        "experiment": curve.info["experiment"],
        "method": curve.info["method"],
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
    """Six digits; null for what JSON does not have."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


if __name__ == "__main__":
    main()
