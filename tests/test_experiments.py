"""Experiments with a task or a report of their own, on the embedded digits, and the page of results."""

from __future__ import annotations

import csv
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from launches import Launch, multirun
from omegaconf import OmegaConf
from stores import add_run, run_json

from admm.data import load
from admm.training import train
from experiments.identity import identity
from experiments.integrity import problems
from experiments.reports import base
from experiments.reports import paper as papers
from experiments.reports.base import declared_reports, report_of, report_on
from experiments.reports.curves import curves
from experiments.reports.headlines import headlines
from experiments.reports.memory import VARIABLES
from experiments.reports.methods import method_of, methods
from experiments.reports.paper import entry_of, paper
from experiments.reports.results_page import (
    below_paper,
    best_of_search,
    command,
    missing_rows,
    papers_numbers,
    sections,
)
from experiments.reports.walltime import seconds_to
from experiments.reports.writing import with_tables
from experiments.store import Run, Slot, Store, seal
from experiments.training import build_problem
from scripts import reproduce
from scripts import search as collect
from scripts.arguments import store_of_the_command
from scripts.figures import PAGES, tables_of_pages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RACE = ["experiment=mnist_walltime", "optimizers=[sgd,bcd]", "iterations=4", "seeds=[0,1]"]


def on_digits(folder: Path, arguments: list[str]) -> list[str]:
    """Without a figure at the end."""
    return ["dataset=digits", "threads=1", f"outputs={folder}", "~hydra.callbacks.report", *arguments]


def launch(folder: Path, *arguments: str) -> str:
    """In this process; what is printed."""
    with redirect_stdout(StringIO()) as printed:
        multirun(*on_digits(folder, list(arguments)))
    return printed.getvalue()


def stored(folder: Path) -> dict[str, Run]:
    runs = [Run(path.parent) for path in folder.glob("runs/*/*/run.json")]
    return {f"{run.info['method']} {run.info['setting']}": run for run in runs}


# --- Figure 5


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    launch(folder, *RACE)
    return folder


@pytest.mark.parametrize("method", ["sgd", "bcd"])
def test_optimizers_that_take_turns_end_where_they_do_alone(race: Path, method: str) -> None:
    run, data = stored(race)[f"{method} tuned"], load("digits", ".")
    config = OmegaConf.load(run.folder / "config.yaml")
    problem, optimizer = build_problem(config, data), instantiate(config.optimizer, _convert_="all")  # type: ignore[arg-type]
    alone = train(problem, optimizer, optimizer.init(problem, (1,)), 4, (data.x_test, data.y_test)).rows
    raced = run.history[run.history["seed"] == 1]
    assert raced["iteration"].tolist() == [0, 1, 2, 3, 4]
    assert raced["test_accuracy"].tolist() == pytest.approx([r["test_accuracy"] for r in alone], abs=1e-4)


def test_a_race_times_each_seed_by_itself(race: Path) -> None:
    for run in stored(race).values():
        for _, rows in run.history.groupby("seed"):
            assert rows["seconds"].iloc[0] == 0.0 and rows["seconds"].is_monotonic_increasing
        assert run.info["seconds"] == pytest.approx(run.history.groupby("seed")["seconds"].max().sum(), abs=2e-3)


def test_a_race_is_not_run_again(race: Path) -> None:
    before = {name: run.info["finished"] for name, run in stored(race).items()}
    assert "mnist_walltime" in launch(race, *RACE)
    assert {name: run.info["finished"] for name, run in stored(race).items()} == before


def test_a_race_and_what_was_measured_check_clean(race: Path, measured: dict[str, Run]) -> None:
    for run in (*stored(race).values(), *measured.values()):
        assert list(problems(run.folder)) == []


def test_a_killed_race_goes_on_with_the_seed_that_it_was_at(tmp_path: Path) -> None:
    Launch(*on_digits(tmp_path, RACE)).kill_when_there(tmp_path, "runs/.partial/*/race.json")
    assert stored(tmp_path) == {}
    output = launch(tmp_path, *RACE)
    assert "seed 1: " in output and "seed 0: " not in output
    assert all(run.history["seed"].unique().tolist() == [0, 1] for run in stored(tmp_path).values())


def test_a_race_that_was_begun_otherwise_starts_again(tmp_path: Path) -> None:
    launch(tmp_path, *RACE)
    (sgd,) = tmp_path.glob("runs/*/sgd-*/run.json")
    kept = tmp_path / "runs/.partial" / json.loads(sgd.read_text())["identity"] / "race.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(seal({"conditions": {"sgd": {"commit": "another"}}, "histories": {"sgd": [[]], "bcd": [[]]}}))
    output = launch(tmp_path, *RACE, "force=true")
    assert "starts again: it was begun with other settings, code or machine" in output and "seed 0: " in output
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=mnist_walltime", "optimizer=sgd"], r"optimizer: a race has several; optimizers=\[sgd,gotmare\]"),
        (
            ["experiment=mnist_walltime", "optimizers=[block_admm,bcd]", "optimizer.epoch_parts=5"],
            r"optimizer.epoch_parts: optimizer=bcd, which is in the race, has no such key; optimizers=\[…\] chooses",
        ),
        (["experiment=mnist_walltime", "optimizers=[]"], r"optimizers: \[\] is not a list of optimizers"),
        (["experiment=memory", "optimizer=sgd"], "optimizer: memory is measured of .*, not admm.optimizers.Backprop"),
    ],
)
def test_what_a_task_cannot_do_is_refused_by_name(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = Launch(*on_digits(tmp_path, arguments)).wait()
    assert done.returncode != 0 and re.search(f"error: {message}", done.stderr) and "Traceback" not in done.stderr
    assert stored(tmp_path) == {}


def test_a_target_counts_where_every_seed_reaches_it() -> None:
    history = pd.DataFrame(
        {
            "replica": [0, 0, 0, 1, 1],
            "seconds": [1.0, 2.0, 3.0, 3.0, 6.0],
            "test_accuracy": [89.0, 90.0, 96.0, 92.0, 93.0],
        }
    )
    assert seconds_to(history, 90) == 2.5
    assert pd.isna(seconds_to(history, 95))


# --- Memory


@pytest.fixture(scope="module", params=["one", pytest.param("all", marks=pytest.mark.long)])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each run takes a process of its own, which is started anew."""
    folder = tmp_path_factory.mktemp("memory")
    rows = {"one": ["optimizer=block_admm", "setting=faithful"], "all": ["setting=tuned,faithful"]}
    launch(folder, "experiment=memory", *rows[request.param])
    return stored(folder)


def test_training_variables_are_counted_by_hand(measured: dict[str, Run]) -> None:
    """784 → 64 inputs of the digits, 1437 samples, 128 + 128 + 10 coupling variables each, float32."""
    parameters, coupling = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, 128 + 128 + 10
    expected = {
        "block_admm tuned": [parameters, 2 * parameters + 1, 1437 * coupling, 1437 * coupling, 0],
        "block_admm faithful": [parameters, 2 * parameters + 1, 1437 * coupling, 1437 * coupling, 2 * 1437 * coupling],
        "online_block_admm tuned": [parameters, 2 * parameters + 1, 128 * coupling, 3, 0],
    }
    assert "block_admm faithful" in measured
    for name in expected.keys() & measured.keys():
        found = measured[name].history.set_index("quantity")["bytes"]
        assert [found.get(key, 0) for key in VARIABLES] == [4 * count for count in expected[name]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux alone")
def test_the_peak_holds_the_variables(measured: dict[str, Run]) -> None:
    """Within what an allocator takes in small pieces."""
    assert "block_admm faithful" in measured
    for name in {"block_admm tuned", "block_admm faithful"} & measured.keys():
        found = measured[name].history.set_index("quantity")["bytes"]
        assert found["peak"] > 0.8 * found.drop("peak").sum()


# --- Convergence


def test_residuals_and_growing_rounds_are_drawn(tmp_path: Path) -> None:
    launch(tmp_path, "experiment=convergence", "iterations=12", "seeds=[0]", "evaluate_every=1")
    runs = stored(tmp_path)
    assert set(runs) == {"block_admm constant", "block_admm adaptive", "block_admm growing"}
    report = report_of("convergence")
    table, figures = report.table(list(runs.values())), report.figures(list(runs.values()))
    assert set(figures) == {"convergence", "convergence_rounds"} and len(table) == 3
    growing = runs["block_admm growing"].history
    assert growing.groupby("iteration")["primal_rounds"].first().tolist() == [1] * 11 + [2] * 2
    last = growing[growing["iteration"] == 12]["kkt"]
    assert table.loc[runs["block_admm growing"].name, "kkt"] == f"{last.mean():.2e}"


# --- The angle to back-propagation


def test_cosines_are_drawn_by_block(tmp_path: Path) -> None:
    chosen = [
        "optimizer=sgd",
        "setting=shallow",
        "iterations=2",
        "seeds=[0,1]",
        "dataset.first=null",
        "angle_samples=100",
    ]
    launch(tmp_path, "experiment=angle", *chosen)
    (shallow,) = stored(tmp_path).values()
    cosines = {f"cosine_{t}": t / 10 for t in range(1, 11)}
    deep = finish(tmp_path, "angle adam deep10", [row | cosines for row in history(91.0, 92.0)])
    report = report_of("angle")
    table, figures = report.table([shallow, deep]), report.figures([shallow, deep])
    assert list(figures) == ["angle_shallow", "angle_deep10"]
    assert [len(figure.axes) for figure in figures.values()] == [3, 10]
    last = shallow.history[shallow.history["iteration"] == 2]  # the only rows after an update
    means = last[["cosine_1", "cosine_2", "cosine_3"]].mean()
    drawn = figures["angle_shallow"].axes[2].lines[1].get_xydata()
    assert drawn.tolist() == [[2, pytest.approx(means.iloc[2])]]  # type: ignore[union-attr]
    columns = ["cosine, block 1", "cosine, all blocks", "cosine, last block"]
    assert table.loc[shallow.name, columns].tolist() == [
        round(v, 3) for v in (means.iloc[0], means.mean(), means.iloc[2])
    ]
    assert table.loc[deep.name, columns].tolist() == [0.1, 0.55, 1.0]


# --- A search


def test_a_search_tries_its_whole_grid_and_puts_the_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = "search=mnist_shallow_block_admm"
    common = ["optimizer=block_admm", "setting=tuned", "dataset.first=600", "dataset.holdout=200", "iterations=1"]
    common += ["model.hidden=[16]"]
    launch(tmp_path, "experiment=mnist_shallow", space, *common)
    (folder,) = (note.parents[1] for note in tmp_path.glob("logs/*/*/0/runs.txt"))
    monkeypatch.setattr("sys.argv", ["search", str(folder), "--results", str(tmp_path)])
    collect.main()
    found = pd.read_csv(tmp_path / "searches/mnist_shallow_block_admm.csv")
    assert (tmp_path / "searches/mnist_shallow_block_admm.png").read_bytes().startswith(b"\x89PNG")
    searched = ["optimizer.theta_step.start", "loss.scale", "optimizer.theta_update.weight_decay"]
    assert len(found) == len(found.drop_duplicates(searched)) == 18
    assert found["held-out"].is_monotonic_decreasing and set(found["samples held out"]) == {200}
    assert set(found["iterations"]) == {1}
    (line,) = best_of_search(tmp_path / "searches/mnist_shallow_block_admm.csv")
    assert line["configurations"] == 18 and f"loss.scale={found['loss.scale'][0]}" in line["best"]
    accuracies = [Run(path.parent).history["test_accuracy"].iloc[-1] for path in tmp_path.glob("runs/*/*/run.json")]
    assert max(accuracies) == pytest.approx(found["held-out"][0], abs=1e-4)


# --- The page of results, against the committed runs


def raw(run: Run) -> list[dict[str, str]]:
    with (run.folder / "history.csv").open() as lines:
        return list(csv.DictReader(lines))


def by_hand(runs: list[Run]) -> dict[str, Any]:
    """The numbers of a row by column, of its runs' files, without the report's code. runs: they differ in their seeds
    alone."""
    info, rows = runs[-1].info, [row for run in runs for row in raw(run)]
    if info["experiment"] == "memory":
        total = sum(float(r["bytes"]) for r in rows if r["quantity"] != "peak") / 2**20
        return {"total": pytest.approx(total, rel=1e-6)}
    if (runs[-1].folder / "probes.csv").exists():  # all runs have probed the same attributes
        probes = [probe for run in runs for probe in csv.DictReader((run.folder / "probes.csv").open())]
        found = mean(float(probe["balanced_accuracy"]) for probe in probes)
        return {"balanced accuracy": pytest.approx(found, rel=1e-6)}
    last = [float(r["test_accuracy"]) for r in rows if int(r["iteration"]) == info["iterations"]]
    std = {"std": pytest.approx(stdev(last), abs=0.006)} if len(last) > 1 else {}
    return std | {"mean": pytest.approx(mean(last), abs=0.006), "seeds": len(last), "iterations": info["iterations"]}


@pytest.mark.parametrize("name", Store(RESULTS).experiments())
def test_every_row_of_every_table_from_the_raw_histories(name: str) -> None:
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in Store(RESULTS).runs(name):
        rows.setdefault((method_of(run.info["method"]).label, run.info["setting"]), []).append(run)
    table = pd.read_csv(RESULTS / "tables" / f"{name}.csv", dtype=str)
    if name == "parallel":
        table["setting"] = table["setting"].str.removeprefix("by ").str.replace(", ", "_")
        for (method, setting), (run,) in rows.items():
            seconds = [float(r["seconds"]) for r in raw(run)]
            lines = table[(table["method"] == method) & (table["setting"] == setting)]
            assert lines["s per iteration"].astype(float).tolist() == pytest.approx(seconds, rel=1e-6)
            assert lines["times faster"].astype(float).tolist() == pytest.approx([seconds[0] / s for s in seconds])
        assert len(table) == sum(len(raw(run)) for (run,) in rows.values())
        return
    assert len(table) == len(rows)
    for line in table.to_dict("records"):
        setting = re.split("[:,]", line["setting"].removeprefix("reduced "))[0]
        expected = by_hand(rows.pop((line.get("method", "Stochastic Block-ADMM"), setting)))
        assert {column: float(line[column]) for column in expected} == expected, line


def test_the_page_sets_every_number_of_the_paper_beside_ours() -> None:
    found = {name: Store(RESULTS).runs(name) for name in Store(RESULTS).experiments()}
    numbers = papers_numbers(found)
    for name, entry in paper().items():
        for method, value in entry.accuracy.items() if entry.source else ():
            lines = numbers[(numbers["experiment"] == name) & (numbers["method"] == method_of(method).label)]
            assert set(lines["paper"]) == {value}
    run = next(
        run for run in found["mnist_shallow"] if (run.info["method"], run.info["setting"]) == ("sgd", "faithful")
    )
    last = mean(float(r["test_accuracy"]) for r in raw(run) if int(r["iteration"]) == run.info["iterations"])
    line = numbers[(numbers["method"] == "SGD") & (numbers["setting"] == "faithful")].iloc[0]
    assert line["difference"] == pytest.approx(last - 95.29, abs=0.006)
    assert line[["machine", "commit"]].tolist() == [run.info["machine"], run.info["commit"]]
    narrow = numbers[(numbers["experiment"] == "cifar10_resnet18_narrow") & (numbers["method"] == "SGD")].iloc[0]
    commits = [run.info["commit"] for run in found["cifar10_resnet18_narrow"] if run.info["method"] == "sgd"]
    assert len(commits) > 1 and narrow["commit"] == ", ".join(commits)
    ratios = numbers[numbers["unit"] == "times less"]
    assert (ratios["ours"] > 10).all() and ratios["difference"].isna().all() and set(ratios["seeds"]) == {1}
    worse = numbers.assign(ours=numbers["paper"] / 2)
    assert {"memory", "mnist_shallow"} <= set(below_paper(worse)["experiment"])


def test_the_page_is_written_of_any_store(race: Path, measured: dict[str, Run], tmp_path: Path) -> None:
    assert "| mnist_shallow | SGD | tuned, faithful |" in "\n".join(sections(tmp_path))
    for run in [*stored(race).values(), *measured.values()]:
        experiment = run.info["experiment"]
        shutil.copytree(run.folder, tmp_path / "runs" / experiment / run.folder.name)
        assert f"## {experiment}" in list(sections(tmp_path))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("experiments/conf/row/[!l]*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_row_has_its_values_and_starts(path: Path) -> None:
    """Those of faces are in test_faces_experiment."""
    row = [f"experiment={path.parent.name}", f"row={path.parent.name}/{path.stem}"]
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose("config", overrides=[*row, "dataset=digits", "dataset.first=null"])
    own: Any = OmegaConf.load(path)
    del own["defaults"]
    assert OmegaConf.merge(config, own) == config  # every value has arrived
    if "width" in config.model:
        config.model.width = 2  # a small network starts as a large one does
    if "epoch_parts" in config.optimizer:
        config.optimizer.epoch_parts = None  # the digits have fewer mini-batches than parts
    problem = build_problem(config, load(**config.dataset))
    state = instantiate(config.optimizer, _convert_="all").init(problem, [0])
    assert state.theta.flat().isfinite().all()


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/conf/optimizer/*.yaml")), ids=lambda path: path.stem)
def test_an_optimizer_of_the_library_has_the_defaults_of_the_command_line(path: Path) -> None:
    config = OmegaConf.merge({"iterations": 20, "model": {"rank": 4}}, OmegaConf.load(path))
    optimizer = instantiate(config.optimizer, _convert_="all")
    given = {
        option.name: getattr(optimizer, option.name)
        for option in fields(optimizer)
        if option.name == "frozen" or (option.default is MISSING and option.default_factory is MISSING)
    }  # DeepFacto's `frozen` is below `iterations`, and so are the suite's ten only of an experiment of more
    assert type(optimizer)(**given) == optimizer


def test_a_row_chooses_the_initialisation_and_the_command_line_another_one() -> None:
    def init(setting: str, *overrides: str) -> str:
        row = ["experiment=mnist_deep10", f"row=mnist_deep10/sgd-{setting}"]
        with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
            name: str = compose("config", overrides=[*row, *overrides]).init.name
        return name

    assert init("normal") == "normal"
    assert init("kaiming") == "kaiming_normal"
    assert init("kaiming", "init=kaiming_uniform") == "kaiming_uniform"


def test_a_row_without_a_run_is_named() -> None:
    runs = Store(RESULTS).runs("mnist_deep10")
    without = [run for run in runs if (run.info["method"], run.info["setting"]) != ("sgd", "kaiming")]
    missing = ["mnist_deep10", "SGD", "kaiming"]
    assert missing in missing_rows({"mnist_deep10": without}).to_numpy().tolist()
    assert missing not in missing_rows({"mnist_deep10": runs}).to_numpy().tolist()


def test_a_setting_that_the_paper_does_not_have_is_not_set_beside_its_number() -> None:
    runs = Store(RESULTS).runs("mnist_deep10")
    stated = {c.record.setting: c.reference for c in curves(runs) if c.record.method == "sgd"}
    assert stated == {"normal": 10.28, "kaiming": None}
    report = report_of("mnist_deep10")
    panels = [axes.get_title() for axes in report.figures(runs)["mnist_deep10"].axes]
    assert panels == list(report.panels.values())


@pytest.mark.parametrize(("experiment", "scale"), [("mnist_shallow", "log"), ("fashion_mnist", "linear")])
def test_a_curve_on_a_logarithmic_axis_begins_with_its_first_iteration(experiment: str, scale: str) -> None:
    """Matplotlib would draw the way from iteration 0, at minus infinity, as a level line up to the first evaluation."""
    for axes in report_of(experiment).figures(Store(RESULTS).runs(experiment))[experiment].axes:
        starts = [line.get_xydata()[0, 0] for line in axes.lines if len(line.get_xydata()) > 2]  # type: ignore[index, arg-type]
        assert axes.get_xscale() == scale and starts
        assert min(starts) > 0 if scale == "log" else min(starts) == 0


def test_what_reproduces_everything_is_launched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "DATA", tmp_path)
    first, *rest = reproduce.launches()
    assert first == ("experiment=memory",) and ("experiment=lfw_proxy",) not in rest
    faithful = ("experiment=cifar10_resnet18_narrow", "optimizer=online_block_admm", "setting=faithful")
    assert rest[rest.index(faithful) - 1] == ("experiment=cifar10_resnet18_narrow",)
    names = [name for (name, *more) in (first, *rest) if not more]
    assert len(names) == 15 and rest[-1] == ("experiment=parallel",)
    (tmp_path / "lfwa").mkdir()
    (tmp_path / "lfwa/lfw_attributes.txt").touch()
    assert [*reproduce.launches()][-1] == ("experiment=lfw_proxy", "dataset.attributes=lfw_attributes.txt")
    (tmp_path / "lfwa/lfw_attributes_proxy.csv.gz").touch()
    full = (tuple(re.sub("_narrow(_30)?", "", argument) for argument in launch) for launch in reproduce.launches())
    found = list(reproduce.launches(full=True))
    assert found == list(dict.fromkeys(full)) and found[-1] == ("experiment=lfw_proxy",)
    started: list[list[str]] = []
    monkeypatch.setattr(reproduce, "launches", lambda full: [("experiment=memory",)] * (2 + full))
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr("subprocess.run", lambda command: (started.append(command[2:]), done)[1])
    monkeypatch.setattr("sys.argv", ["reproduce", "--full", "seeds=[0]", "device=cuda"])
    reproduce.main()
    assert started == [["experiment=memory", "seeds=[0]", "device=cuda"]] * 3
    done.returncode = 7
    with pytest.raises(SystemExit, match="7"):
        reproduce.main()
    assert len(started) == 4


# --- Reports by kind


def history(*finals: float | None) -> list[dict[str, float]]:
    """Two iterations of replicas that end at these accuracies; None: diverged in the second."""
    ends = enumerate(finals)
    return [
        {"iteration": i, "replica": r, "seed": 3 + r, "seconds": 10.0 * i, "test_accuracy": (end or 92.0) * i / 2}
        | {"kkt": 0.5 / i, "residual_1": 0.25 / i}
        for r, end in ends
        for i in ((1, 2) if end is not None else (1,))
    ]


def finish(root: Path, name: str, rows: list[dict[str, Any]], tables: Any = None, **said: Any) -> Run:
    experiment, method, setting = name.split()
    told = run_json(method, setting, "2001", experiment=experiment, seeds=[3, 4], iterations=2, **said)
    slot = Slot(root, experiment, f"{method}-{setting}", f"{len(list(root.glob('runs/*/*'))):012x}")
    return slot.complete({"optimizer": {}}, rows, told, tables)


@pytest.mark.parametrize(
    ("experiment", "setting", "columns", "row"),
    [
        ("mnist_shallow", "tuned", ["paper", "mean", "seeds"], [95.29, 91.0, 1]),
        ("convergence", "constant", ["kkt", "residual_1", "mean"], ["2.50e-01", "1.25e-01", 91.0]),
    ],
)
def test_accuracy_scores_the_last_iteration(
    tmp_path: Path, experiment: str, setting: str, columns: list[str], row: list[Any]
) -> None:
    report = report_of(experiment)
    run = finish(tmp_path, f"{experiment} sgd {setting}", history(91.0, None), diverged={"1": 1})
    assert report.kind == ("convergence" if experiment == "convergence" else "accuracy")
    assert report.score(run) == {3: 91.0, 4: 0.0} and report.headline(run) == (91.0, "%")
    assert report.table([run])[columns].to_numpy().tolist() == [row]
    (comparison,) = report.compare([run])
    assert (comparison.ours, comparison.paper) == (91.0, 95.29 if experiment == "mnist_shallow" else None)
    assert report.numbers(run)["test_accuracy"] == 91.0
    unfinished = finish(tmp_path, f"{experiment} adam {setting}", history(91.0, None))
    with pytest.raises(ValueError, match=r"history.csv has the last iteration of 1 of 2 seeds only"):
        report.score(unfinished)


def test_walltime_has_the_seconds_to_each_target(tmp_path: Path) -> None:
    run, report = finish(tmp_path, "mnist_walltime sgd tuned", history(91.0, 94.0)), report_of("mnist_walltime")
    assert report.score(run) == {3: 91.0, 4: 94.0} and report.headline(run) == (92.5, "%")
    row = report.table([run]).iloc[0]
    assert row["90 %"] == 20.0 and row["total s"] == 20.0 and pd.isna(row["93 %"])


def test_memory_is_compared_with_the_batch_form_of_its_setting(tmp_path: Path) -> None:
    report, runs = report_of("memory"), {}
    for method, size in (("block_admm", 30), ("online_block_admm", 3)):
        rows = [{"quantity": name, "bytes": size * 2**20} for name in ("theta", "z", "peak")]
        runs[method] = finish(tmp_path, f"memory {method} tuned", rows)
    assert report.score(runs["block_admm"]) == {} and report.headline(runs["online_block_admm"]) == (6.0, "MiB")
    table = report.table(list(runs.values()))
    assert table[["Θ", "Z", "U", "total", "peak of the process", "batch/this", "paper"]].to_numpy().tolist() == [
        [30, 30, 0, 60, 30, 1, 1],
        [3, 3, 0, 6, 3, 10, 10],
    ]
    assert pd.isna(report.compare([runs["online_block_admm"]])[0].ours)
    assert report.numbers(runs["block_admm"]) == {"theta (MiB)": 30, "z (MiB)": 30, "peak (MiB)": 30} | dict.fromkeys(
        ["moments (MiB)", "u (MiB)", "z_moments (MiB)"], 0
    )


def test_faces_are_scored_by_balanced_accuracy(tmp_path: Path) -> None:
    rows = [{"iteration": i, "replica": 0, "seed": 3, "verification": 86.0 + 2 * i} for i in (0, 2)]
    measured = {"positives": 3, "majority": 60.0, "accuracy": 70.0, "auc": 80.0}
    probes = [
        {"replica": 0, "seed": 3, "attribute": name, "balanced_accuracy": value} | measured
        for name, value in (("Male", 81.0), ("Young", 83.0))
    ]
    said = {"labels": "LFWA", "diverged": {"1": 2}, "scores_verification": [88.0]}
    tables, report = {"probes": pd.DataFrame(probes)}, report_of("lfwa_deepfacto")
    run = finish(tmp_path, "lfwa_deepfacto deepfacto rank32", rows, tables, **said)
    assert report.score(run) == {3: 82.0, 4: 0.0} and report.headline(run) == (82.0, "% balanced")
    columns = ["method", "setting", "paper", "balanced accuracy", "verification by scores"]
    columns += ["verification before", "after"]
    assert report.table([run]).iloc[0][columns].tolist() == [
        "DeepFacto",
        "rank32, LFWA, 1 of 2 seeds diverged",
        81.39,
        82.0,
        88.0,
        86.0,
        90.0,
    ]
    attributes = report.further_tables([run])["lfwa_deepfacto_attributes"].set_index("attribute")
    assert attributes.loc["Male", "paper, LFWA: rank 32"] == 76.6 and attributes.loc["Male", "positives"] == 3


def test_an_experiment_is_a_file_and_the_paper_s_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    node = (
        "report:\n  _target_: experiments.reports.accuracy.Accuracy\n  caption: A new one\n  panels: {mine: My own}\n"
    )
    (tmp_path / "experiment/new.yaml").write_text(f"# @package _global_\niterations: 2\n\n{node}")
    (tmp_path / "paper.yaml").write_text("new:\n  source: Figure 99\n  accuracy: {sgd: 93.0}\n")
    monkeypatch.setattr(base, "CONF", tmp_path)
    monkeypatch.setattr(papers, "FILE", tmp_path / "paper.yaml")
    run, report = finish(tmp_path, "new sgd mine", history(91.0, 92.0)), report_of("new")
    assert report.table([run])[["paper", "mean"]].to_numpy().tolist() == [[93.0, 91.5]]
    figure = report.figures([run])["new"]
    assert figure.axes[0].get_title() == "My own" and figure.get_supxlabel().startswith("Reproduction of Figure 99: A")
    monkeypatch.setattr("experiments.reports.results_page.rows_of", lambda _: [("sgd", "mine"), ("adam", "mine")])
    page = "\n".join(sections(tmp_path))
    assert "| Figure 99 | new | SGD | mine | % | 93.00 | 91.50 | -1.50 |" in page
    assert "| new | SGD | mine | 93.00 | 91.50 | -1.50 |" in page and "| new | Adam | mine |" in page


@pytest.mark.parametrize(
    ("experiment", "there", "expected"),
    [
        ("fashion_mnist", "block_admm-tuned dladmm-tuned block_admm-faithful", ""),
        ("fashion_mnist", "block_admm-tuned dladmm-tuned", " setting=tuned"),
        ("fashion_mnist", "block_admm-tuned", " optimizer=block_admm setting=tuned"),
        (
            "fashion_mnist",
            "block_admm-faithful dladmm-tuned",
            " row=fashion_mnist/block_admm-faithful,fashion_mnist/dladmm-tuned",
        ),
        ("mine", "sgd-tuned", ""),
    ],
)
def test_a_table_s_command_makes_its_rows_and_no_others(experiment: str, there: str, expected: str) -> None:
    rows = [dict(zip(("method", "setting"), row.split("-"), strict=True)) for row in there.split()]
    runs: Any = [SimpleNamespace(record=SimpleNamespace(**row)) for row in rows]
    assert command(experiment, runs) == f"python run.py experiment={experiment}{expected}"


def test_an_experiment_that_is_not_committed_has_a_report_of_its_runs_kind() -> None:
    assert (report_of("mine").kind, report_of("mine").caption) == ("accuracy", "mine")
    assert report_of("mine", "memory").kind == "memory" and report_of("memory", "accuracy").kind == "memory"
    kinds = {name: report.kind for name, report in declared_reports().items()}
    assert set(kinds) == {path.stem for path in ROOT.glob("experiments/conf/experiment/*.yaml")}
    for run in (Run(path.parent) for path in RESULTS.glob("runs/*/*/run.json")):
        assert report_on(run).kind == kinds[run.record.experiment]
    assert entry_of("mine").source is None


def test_a_new_run_says_its_kind(race: Path, measured: dict[str, Run]) -> None:
    assert {run.record.kind for run in stored(race).values()} == {"walltime"}
    assert {run.record.kind for run in measured.values()} == {"memory"}


def test_a_method_has_its_name_and_colour_beside_its_configuration(tmp_path: Path) -> None:
    committed = {path.stem for path in ROOT.glob("experiments/conf/optimizer/*.yaml")}
    assert methods().keys() == committed and list(methods())[:2] == ["block_admm", "online_block_admm"]
    assert (method_of("sgd").label, method_of("sgd").colour) == ("SGD", "#000000")
    assert (method_of("mine").label, method_of("mine").colour) == ("mine", None)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("_target_: admm.optimizers.Taylor\nbeta: 2.0\n")
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        mine = compose("config", [f"hydra.searchpath=[{tmp_path}]", "optimizer=mine"])
        sgd = compose("config", ["optimizer=sgd", "optimizer.step_size=0.5"])
    assert mine.optimizer == {"_target_": "admm.optimizers.Taylor", "beta": 2.0} and "method" not in mine
    assert sgd.optimizer.step_size == 0.5 and sgd.method.label == "SGD"
    plain: Any = OmegaConf.to_container(sgd, resolve=True)
    bare = {key: value for key, value in plain.items() if key not in ("method", "report")}
    assert identity(plain, {}, "") == identity(bare, {}, "")


# --- The committed pages


@pytest.mark.long
def test_the_committed_page_is_what_the_store_says() -> None:
    page = (RESULTS / "README.md").read_text()
    assert page == "\n\n".join(sections(RESULTS)) + "\n"
    for picture in re.findall(r"\((figures/.*?)\)", page):
        assert (RESULTS / picture).exists()


def test_the_tables_of_the_pages_are_what_the_store_says() -> None:
    store, found = Store(RESULTS), set[str]()
    tables = tables_of_pages(store, {name: report_of(name).table(store.runs(name)) for name in store.experiments()})
    for page in PAGES:
        text = page.read_text()
        assert text == with_tables(text, tables) and "Not run." not in text
        found |= set(re.findall("<!-- table: (.*) -->", text))
    assert found == tables.keys() - {"parallel"}  # on a page of what has been measured


def test_the_headlines_have_the_paper_s_numbers_and_ours(tmp_path: Path) -> None:
    add_run(tmp_path, "sgd-tuned", [90.0, 92.0], run_json("sgd", "tuned", "2001"))
    add_run(tmp_path, "sgd-faithful", [80.0], run_json("sgd", "faithful", "2001", seeds=[0]))
    (row,) = headlines(Store(tmp_path)).set_index("method").loc[["SGD"]].to_dict("records")
    assert row == {
        "in the paper": "Figure 3: MNIST, 3 layers",
        "paper": 95.29,
        "faithful": "80.00, one seed",
        "tuned": "91.00 ± 1.41",
    }


def test_a_folder_that_is_no_store_is_refused_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none is no results store"):
        store_of_the_command(None)
    monkeypatch.setattr("sys.argv", ["tables", str(ROOT / "results")])
    assert store_of_the_command(None) == ROOT / "results" and not (tmp_path / "none").exists()
