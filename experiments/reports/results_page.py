"""Write results/README.md from the results store alone: python -m experiments.reports.results_page [results]

Every number of the paper with ours beside it; then, for each experiment, its figures, its table, the training time that
it took, and the command that reproduces it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from admm.files import whole
from experiments.paths import in_full
from experiments.reports.report import content, curves, further_tables, markdown, paper, place
from experiments.reports.searches import read
from experiments.rows import CONF, TableRows
from experiments.store import Run, experiments_in, failed_writes_in_words, finished_runs

COLUMNS = ["in the paper", "experiment", "method", "setting", "unit", "paper", "ours", "difference"]
COLUMNS += ["std", "seeds", "iterations"]
GPU_TFLOPS = 14.0  # assumed in `estimate`


def store_of_the_command(description: str | None) -> Path:
    """The results store that a command of one argument is for; ends the program where there is none."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=in_full, nargs="?", default=Path("results"), help="a results store")
    root: Path = parser.parse_args().results
    if not (root / "runs").is_dir():
        sys.exit(f"error: {root} is no results store, which has a folder runs")
    return root


def main(root: Path) -> None:
    page, text = root / "README.md", "\n\n".join(sections(root)) + "\n"
    with whole(page, "the page") as part:
        part.write_text(text, encoding="utf-8")
    print(f"written: {page}")


def sections(root: Path) -> Iterator[str]:
    """The page, part by part."""
    found = {name: finished_runs(root, name) for name in experiments_in(root)}
    numbers = papers_numbers(found)
    yield "# Results"
    yield (
        "Written by `make tables` from the runs in this folder. Accuracies are test accuracies in percent after the "
        "last iteration, mean and standard deviation over seeds. On settings, see the [README](../README.md): "
        "*reduced* is less than the paper's experiment, *default* has no file of settings, and `1 of 3 seeds` counts "
        "those run so far. A commit with + had uncommitted changes."
    )
    yield "## The paper's numbers"
    yield markdown(numbers)
    yield f"{falls_short(numbers)} {not_run(found)}"
    for name in in_order(found):
        yield from experiment(name, found[name])
    if (root / "bench.csv").exists():
        yield from estimate(found, pd.read_csv(root / "bench.csv").set_index("name")["value"])
    searches = sorted((root / "searches").glob("*.csv"))
    if searches:
        yield "## Searches"
        yield "Grids, scored on held-out training data; `searches/` has all of their configurations."
        yield markdown(pd.DataFrame([line for path in searches for line in search(path)]))
        yield "\n".join(f"![{path.stem}](searches/{path.stem}.png)" for path in searches)


def in_order(experiments: Iterable[str]) -> list[str]:
    """As `paper.yaml` has them, those that it does not have last."""
    order = list(paper()["experiments"])
    return sorted(experiments, key=lambda name: place(name, order))


def papers_numbers(found: dict[str, list[Run]]) -> pd.DataFrame:
    """Each number of the paper beside each of our settings; without one if it has not been run.

    The index has the names of the runs.
    """
    rows: list[dict[str, Any]] = []
    for name, known in paper()["experiments"].items():
        stated = known["accuracy"] or known.get("ratio", {})
        if not known["source"] or not stated:
            continue
        runs, unit = found.get(name, []), "%" if known["accuracy"] else "times less"
        ours = measured_accuracies(runs) if known["accuracy"] else measured_ratios(name, runs)
        for method, value in stated.items():
            stated_of = {
                "in the paper": known["source"],
                "experiment": name,
                "method": paper()["labels"][method],
                "unit": unit,
            }
            for line in [line for line in ours if line["method"] == stated_of["method"]] or [{"setting": "not run"}]:
                rows.append(stated_of | {"paper": float(value)} | line)
    result = pd.DataFrame(rows, columns=["run", *COLUMNS]).set_index("run")
    result["difference"] = result["ours"] - result["paper"]
    return result.astype({"seeds": "Int64", "iterations": "Int64"})


def measured_accuracies(runs: list[Run]) -> list[dict[str, Any]]:
    rows = [{"run": curve.run} | curve.row() for curve in curves(runs) if curve.reference is not None]
    kept = ("run", "method", "setting", "mean", "std", "seeds", "iterations")
    return [{"ours" if key == "mean" else key: row[key] for key in kept} for row in rows]


def measured_ratios(name: str, runs: list[Run]) -> list[dict[str, Any]]:
    """Of an experiment whose number in the paper is a ratio of memory."""
    if not runs:
        return []
    lines = content(name, runs)[0].iterrows()
    return [{"run": i, "method": r["method"], "setting": r["setting"], "ours": r["batch/this"]} for i, r in lines]


def falls_short(numbers: pd.DataFrame) -> str:
    """In words, which of our numbers are below the paper's; not those of reduced experiments."""
    short = [
        f"{row['method']} in {row['experiment']}, {row['setting']}: {row['ours']:.2f} ({row['paper']:.2f})"
        for row in numbers[numbers["difference"] < 0].to_dict("records")
        if not row["setting"].startswith("reduced")
    ]
    return f"Below the paper (its number in brackets): {'; '.join(short)}." if short else "None is below the paper."


def not_run(found: dict[str, list[Run]]) -> str:
    """In words, which rows of the paper's experiments have no run."""
    labels, missing = paper()["labels"], []
    for name in [name for name, known in paper()["experiments"].items() if known["source"] or name in found]:
        there = {(run.info["method"], run.info["setting"]) for run in found.get(name, [])}
        missing += [f"{labels[m]} in {name}, {setting}" for m, setting in rows_of(name) if (m, setting) not in there]
    return f"Not run: {'; '.join(missing)}." if missing else "Everything has been run."


@cache
def rows_of(experiment: str) -> list[tuple[str, str]]:
    """(optimizer, setting) of the rows that an experiment lists, and of the others in its own folder."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        table = TableRows.of(experiment, compose("config", [f"experiment={experiment}"]).rows)
    return [(row.method, row.setting) for row in (*table.listed, *table.others)]


def experiment(name: str, runs: list[Run]) -> Iterator[str]:
    """The part of one experiment."""
    known = paper()["experiments"].get(name, {})
    result, figures = content(name, runs)
    yield f"## {name}"
    source = f"The paper's {known['source']}. " if known.get("source") else ""
    quantity = f" In the table: {known['quantity']}." if "quantity" in known else ""
    yield f"{source}{known.get('caption', name)}.{quantity}"
    yield "\n".join(f"![{name}](figures/{figure}.png)" for figure in figures)
    yield markdown(result)
    for table in further_tables(name, runs).values():
        yield markdown(table)
    yield f"    python run.py experiment={name}"
    yield made(runs)


def made(runs: list[Run]) -> str:
    """In words, how long runs have trained, where and by which code."""
    seconds = sum(run.info.get("seconds", 0.0) for run in runs)  # a run that does not train has none
    machines = " and ".join(sorted({run.info["machine"] for run in runs}))
    commits = ", ".join(sorted({str(run.info["commit"]) for run in runs}))
    took = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    time = f"Training time of these runs, evaluation not counted: {took}. " if seconds else ""
    return f"{time}Machine: {machines}. Commits: {commits}."


def estimate(found: dict[str, list[Run]], bench: pd.Series[float]) -> Iterator[str]:
    """What Figure 7 at full size would take on a GPU, from the FLOPs that `make bench` has counted, until it is run."""
    parts = ["cifar_sgd_flops", "cifar_online_flops", "cifar_evaluation_flops"]
    if "cifar10_resnet18" in found or not set(parts) <= set(bench.index):
        return
    config = OmegaConf.load(CONF / "experiment/cifar10_resnet18.yaml")
    epochs, seeds = config.iterations, len(OmegaConf.load(CONF / "config.yaml").committed_seeds)
    sgd, online, evaluation = (bench[part] for part in parts)
    each = [(flops + evaluation) * epochs * seeds / GPU_TFLOPS / 3600 for flops in (sgd, online)]
    yield "## Figure 7 at full size: an estimate"
    yield (
        f"Not measured: no GPU here. ResNet-18 at full width, {epochs} epochs and {seeds} seeds, at {GPU_TFLOPS:g} "
        "TFLOP/s, assumed for a card of the class of an RTX 3090 (about 40 % of its float32 peak), without "
        "setting=faithful: "
        f"{each[0]:.0f} h each for SGD and Adam, {each[1]:.0f} h each for online Block-ADMM and Gotmare et al., "
        f"{2 * sum(each):.0f} h for all of the command below, by the FLOPs of an epoch (`bench.csv`: {sgd:.0f} and "
        f"{online:.0f} TFLOP a seed, and {evaluation:.0f} for the evaluation after it)."
    )
    yield "    python run.py experiment=cifar10_resnet18 device=cuda"


def search(path: Path) -> list[dict[str, Any]]:
    """For each setting, how many configurations a search has tried, and the best one, which its file has first."""
    found = read(path, dtype=str)
    searched = found.columns[1 : found.columns.get_loc("held-out")]

    def best(setting: str, tried: pd.DataFrame) -> dict[str, Any]:
        first = tried.iloc[0]
        values = ", ".join(f"{key}={first[key]}" for key in searched if pd.notna(first[key]))
        kept = {"held-out": float(first["held-out"])} | dict(first["seeds":])
        return {"search": path.stem, "setting": setting, "configurations": len(tried), "best": values} | kept

    return [best(str(setting), tried) for setting, tried in found.groupby("setting", sort=False)]


if __name__ == "__main__":
    with failed_writes_in_words():
        main(store_of_the_command(__doc__))
