"""The results page: every number of the paper with ours beside it; then, for each experiment, its figures, its table,
the training time that it took, and the command that reproduces it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from admm.files import atomic_write
from experiments.records import RunRecord
from experiments.reports.base import TEST_ACCURACY, ExperimentReport, report_of, report_on
from experiments.reports.curves import place
from experiments.reports.methods import method_of
from experiments.reports.paper import paper
from experiments.reports.searches import hyperparameters_of, read_ranking
from experiments.reports.text import markdown
from experiments.rows import CONF, Row, TableRows
from experiments.store import Run, Store

RunsByExperiment = Mapping[str, list[Run]]  # from the oldest to the newest
COLUMNS = ["in the paper", "experiment", "method", "setting", "unit", "paper", "ours", "difference"]
COLUMNS += ["std", "seeds", "iterations", "machine", "commit"]
BELOW = ["experiment", "method", "setting", "paper", "ours", "difference"]  # columns
GPU_TFLOPS = 14.0  # assumed in `estimate`


def write_results_page(root: Path) -> Path:
    """Write <root>/README.md from the results store alone. Returns its path; raises WriteError."""
    page, text = root / "README.md", "\n\n".join(sections(root)) + "\n"
    with atomic_write(page, "the page") as part:
        part.write_text(text, encoding="utf-8")
    return page


def sections(root: Path) -> Iterator[str]:
    """Yield the page, part by part."""
    store = Store(root)
    runs = {name: store.runs(name) for name in store.experiments()}
    numbers = papers_numbers(runs)
    yield "# Results"
    yield (
        "Written by `make results-page` from the runs in this folder. Accuracies are test accuracies in percent after "
        "the last iteration, mean and standard deviation over seeds. [docs/reproduction.md](../docs/reproduction.md) "
        "explains the settings: *reduced* is less than the paper's experiment, *default* has no row in `conf/row`, and "
        "`1 of 3 seeds` counts those run so far. The commit is that of the code which made a row's runs; one with + "
        "had uncommitted changes. Some commits are of a branch that was not kept, and are not in the repository."
    )
    yield (
        "[docs/fidelity.md](../docs/fidelity.md) lists where these experiments depart from the paper, what it leaves "
        "open, and where it contradicts itself: among others, Table 2 exchanges the headings of Liu et al. 2015 and "
        "2018, and its averages for ranks 32 and 4 are not the means of its rows."
    )
    yield (
        "*minus SGD [95 %]* is by how much a row is above SGD in the same setting, seed by seed: the mean difference "
        "and its 95 % confidence interval (Student's *t* of the paired differences). Some tables have another "
        "baseline, which they name."
    )
    yield "## The paper's numbers"
    yield markdown(numbers)
    for title, table in (("Below the paper", below_paper(numbers)), ("Not run", missing_rows(runs))):
        yield f"### {title}"
        yield markdown(table) if len(table) else "None."
    for name in in_order(runs):
        yield from experiment_section(report_on(runs[name][-1]), runs[name])
    if (root / "bench.csv").exists():
        yield from estimate(runs, pd.read_csv(root / "bench.csv").set_index("name")["value"])
    searches = sorted((root / "searches").glob("*.csv"))
    if searches:
        yield "## Searches"
        yield (
            "Grids, scored on held-out training data; `searches/` has all of their configurations. Machine and commit "
            "of a search are not stored."
        )
        yield markdown(pd.DataFrame([row for path in searches for row in best_of_search(path)]))
        yield "\n".join(f"![{path.stem}](searches/{path.stem}.png)" for path in searches)


def in_order(experiments: Iterable[str]) -> list[str]:
    """Return the experiments in the paper's order; those that it does not have come last."""
    order = list(paper())
    return sorted(experiments, key=lambda name: place(name, order))


def papers_numbers(runs: RunsByExperiment) -> pd.DataFrame:
    """Return a table of each number of the paper beside each of our settings, or beside `not run`.

    The index has the names of the runs.
    """
    rows: list[dict[str, Any]] = []
    for name, entry in paper().items():
        report, of_name = report_of(name), runs.get(name, [])
        if not (entry.source and report.stated):
            continue
        origins = origins_of(of_name)
        compared = [asdict(row) | origins[row.run] for row in report.compare(of_name) if row.paper is not None]
        for method, value in report.stated.items():
            stated = {"in the paper": entry.source, "experiment": name, "unit": report.unit, "paper": float(value)}
            ours = [row for row in compared if row["method"] == method] or [{"setting": "not run"}]
            rows += [row | stated | {"method": method_of(method).label} for row in ours]
    table = pd.DataFrame(rows, columns=["run", *COLUMNS]).set_index("run")
    table["difference"] = (table["ours"] - table["paper"]).where(table["unit"] == "%")
    return table.astype({"seeds": "Int64", "iterations": "Int64"})


def below_paper(numbers: pd.DataFrame) -> pd.DataFrame:
    """Return our numbers that are below the paper's, the largest difference first."""
    return numbers[numbers["ours"] < numbers["paper"]].sort_values("difference")[BELOW]


def missing_rows(runs: RunsByExperiment) -> pd.DataFrame:
    """Return a table of the settings without a run, by experiment of the paper and method."""
    settings: dict[tuple[str, str], list[str]] = {}
    for name in [name for name, entry in paper().items() if entry.source or name in runs]:
        there = {(run.record.method, run.record.setting) for run in runs.get(name, [])}
        for method, setting in rows_of(name):
            if (method, setting) not in there:
                settings.setdefault((name, method_of(method).label), []).append(setting)
    rows = [(name, method, ", ".join(missing)) for (name, method), missing in settings.items()]
    return pd.DataFrame(rows, columns=["experiment", "method", "settings"])


@cache
def rows_of(experiment: str) -> list[tuple[str, str]]:
    """Return (optimizer, setting) of the rows that an experiment lists, then those of `further_rows`."""
    return [*_pairs(_table(experiment).listed), *further_rows(experiment)]


def further_rows(experiment: str) -> list[tuple[str, str]]:
    """Return (optimizer, setting) of the other rows in an experiment's folder, which a launch has to name."""
    return _pairs(_table(experiment).others)


def _pairs(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return [(row.method, row.setting) for row in rows]


@cache
def _table(experiment: str) -> TableRows:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return TableRows.of(experiment, compose("config", [f"experiment={experiment}"]).rows)


def experiment_section(report: ExperimentReport, runs: list[Run]) -> Iterator[str]:
    """Yield the part of one experiment."""
    yield f"## {report.experiment}"
    yield report.text if report.quantity == TEST_ACCURACY else f"{report.text} In the table: {report.quantity}."
    yield "\n".join(f"![{report.experiment}](figures/{name}.png)" for name in report.figures(runs))
    yield markdown(with_commits(report.table(runs), runs))
    for name in report.further_tables(runs):
        yield f"Further table: [{name}.csv](tables/{name}.csv)."
    yield f"    {command(report.experiment, runs)}"
    yield provenance_sentence(runs)


def command(experiment: str, runs: list[Run]) -> str:
    """Return the command that makes the rows of an experiment's table, and none that it lists but that have no run."""
    whole = f"python run.py experiment={experiment}"
    table = _table(experiment) if (CONF / f"experiment/{experiment}.yaml").exists() else TableRows(experiment, [], [])
    there = {(run.record.method, run.record.setting) for run in runs}
    made = [row for row in table.listed if (row.method, row.setting) in there]
    if not made or made == table.listed:
        return whole
    methods, settings = dict.fromkeys(row.method for row in made), dict.fromkeys(row.setting for row in made)
    of_settings = [row for row in table.listed if row.setting in settings]
    if of_settings == made:
        return f"{whole} setting={','.join(settings)}"
    if [row for row in of_settings if row.method in methods] == made:
        return f"{whole} optimizer={','.join(methods)} setting={','.join(settings)}"
    return f"{whole} row={','.join(row.name for row in made)}"


def with_commits(table: pd.DataFrame, runs: list[Run]) -> pd.DataFrame:
    """Return a report's table with the commits that made each row's runs."""
    origins = origins_of(runs)
    return table.assign(commit=[origins[name]["commit"] if name in origins else "–" for name in table.index])


def origins_of(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Return the machines and the commits of all runs that make a row of a table, by the name of each of them."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    return {run.name: _origin([run.record for run in row]) for row in rows.values() for run in row}


def _origin(records: list[RunRecord]) -> dict[str, str]:
    return {key: ", ".join(dict.fromkeys(str(getattr(r, key)) for r in records)) for key in ("machine", "commit")}


def provenance_sentence(runs: list[Run]) -> str:
    """Return in words how long runs have trained, where and by which code."""
    records = [run.record for run in runs]
    seconds = sum(record.seconds or 0.0 for record in records)  # a run that does not train has none
    machines = " and ".join(sorted({record.machine for record in records}))
    commits = ", ".join(sorted({str(record.commit) for record in records}))
    took = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    time = f"Training time of these runs, evaluation not counted: {took}. " if seconds else ""
    return f"{time}Machine: {machines}. Commits: {commits}."


def estimate(runs: RunsByExperiment, bench: pd.Series[float]) -> Iterator[str]:
    """Yield an estimate of Figure 7's time at full size on a GPU, from the FLOPs of `make bench`, until it is run."""
    names = ["cifar_sgd_flops", "cifar_online_flops", "cifar_evaluation_flops"]
    if "cifar10_resnet18" in runs or not set(names) <= set(bench.index):
        return
    config = OmegaConf.load(CONF / "experiment/cifar10_resnet18.yaml")
    epochs, seeds = config.iterations, len(OmegaConf.load(CONF / "config.yaml").committed_seeds)
    sgd, online, evaluation = (bench[name] for name in names)
    each = [(flops + evaluation) * epochs * seeds / GPU_TFLOPS / 3600 for flops in (sgd, online)]
    yield "## Figure 7 at full size: an estimate"
    yield (
        f"Not measured: no GPU here. ResNet-18 at full width, {epochs} epochs and {seeds} seeds, at {GPU_TFLOPS:g} "
        "TFLOP/s, assumed for a card of the class of an RTX 3090 (about 40 % of its float32 peak), without "
        "setting=faithful: "
        f"{each[0]:.0f} h each for SGD and Adam, {each[1]:.0f} h each for online Block-ADMM and Gotmare et al., "
        f"{2 * sum(each):.0f} h for all of the command below, by the FLOPs of an epoch (`bench.csv`: {sgd:.0f} and "
        f"{online:.0f} TFLOP per seed, and {evaluation:.0f} for the evaluation after it)."
    )
    yield "    python run.py experiment=cifar10_resnet18 device=cuda"


def best_of_search(path: Path) -> list[dict[str, Any]]:
    """Return, for each setting, how many configurations a search has tried, and the best one, the first in its file."""
    ranking = read_ranking(path, dtype=str)
    searched = hyperparameters_of(ranking)

    def best(setting: str, tried: pd.DataFrame) -> dict[str, Any]:
        first = tried.iloc[0]
        values = ", ".join(f"{key}={first[key]}" for key in searched if pd.notna(first[key]))
        results = {"held-out": float(first["held-out"])} | dict(first["seeds":])
        return {"search": path.stem, "setting": setting, "configurations": len(tried), "best": values} | results

    return [best(str(setting), tried) for setting, tried in ranking.groupby("setting", sort=False)]
