"""Experiments with a task or a report of their own, on the embedded digits, and the page of results."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from launches import Launch
from omegaconf import OmegaConf

from admm.data import load
from admm.training import train
from experiments.reports.convergence import row
from experiments.reports.report import content, curves, paper
from experiments.reports.results_page import not_run, papers_numbers, search, sections, store_of_the_command
from experiments.store import Run, experiments_in, finished_runs, sealed
from experiments.tasks.memory import NAMES
from experiments.tasks.walltime import seconds_to
from experiments.training import build_problem
from scripts import search as collect
from scripts.figures import with_tables
from scripts.store import problems

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RACE = ["experiment=mnist_walltime", "optimizers=[sgd,bcd]", "iterations=4", "seeds=[0,1]"]


def on_digits(folder: Path, arguments: list[str]) -> list[str]:
    """Without a figure at the end."""
    return ["dataset=digits", "threads=1", f"outputs={folder}", "~hydra.callbacks.report", *arguments]


def launch(folder: Path, *arguments: str) -> str:
    done = Launch(*on_digits(folder, list(arguments))).wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_a_race_that_was_begun_otherwise_starts_anew(tmp_path: Path) -> None:
    launch(tmp_path, *RACE)
    (sgd,) = tmp_path.glob("runs/*/sgd-*/run.json")
    kept = tmp_path / "runs/.partial" / json.loads(sgd.read_text())["identity"] / "race.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(sealed({"conditions": {"sgd": {"commit": "another"}}, "histories": {"sgd": [[]], "bcd": [[]]}}))
    output = launch(tmp_path, *RACE, "force=true")
    assert "starts anew: it was begun with other settings, code or machine" in output and "seed 0: " in output
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=mnist_walltime", "optimizer=sgd"], r"optimizer: a race has several; optimizers=\[sgd,gotmare\]"),
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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("memory")
    launch(folder, "experiment=memory", "setting=tuned,faithful")
    return stored(folder)


def test_training_variables_are_counted_by_hand(measured: dict[str, Run]) -> None:
    """784 → 64 inputs of the digits, 1437 samples, 128 + 128 + 10 coupling variables each, float32."""
    parameters, coupling = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, 128 + 128 + 10
    expected = {
        "block_admm tuned": [parameters, 2 * parameters + 1, 1437 * coupling, 1437 * coupling, 0],
        "block_admm faithful": [parameters, 2 * parameters + 1, 1437 * coupling, 1437 * coupling, 2 * 1437 * coupling],
        "online_block_admm tuned": [parameters, 2 * parameters + 1, 128 * coupling, 3, 0],
    }
    for name, numbers in expected.items():
        found = measured[name].history.set_index("quantity")["bytes"]
        assert [found.get(key, 0) for key in NAMES] == [4 * count for count in numbers]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux alone")
def test_the_peak_holds_the_variables(measured: dict[str, Run]) -> None:
    """Within what an allocator takes in small pieces."""
    for name in ("block_admm tuned", "block_admm faithful"):
        found = measured[name].history.set_index("quantity")["bytes"]
        assert found["peak"] > 0.8 * found.drop("peak").sum()


# --- Convergence


def test_residuals_and_growing_rounds_are_drawn(tmp_path: Path) -> None:
    launch(tmp_path, "experiment=convergence", "iterations=12", "seeds=[0,1]", "evaluate_every=1")
    runs = stored(tmp_path)
    assert set(runs) == {"block_admm constant", "block_admm adaptive", "block_admm growing"}
    table, figures = content("convergence", list(runs.values()))
    assert set(figures) == {"convergence", "convergence_rounds"} and len(table) == 3
    growing = runs["block_admm growing"].history
    assert growing.groupby("iteration")["primal_rounds"].first().tolist() == [1] * 11 + [2] * 2
    last = growing[growing["iteration"] == 12]["kkt"]
    (curve,) = curves([runs["block_admm growing"]])
    assert row(curve)["kkt"] == f"{last.mean():.2e}"


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
    searched = ["optimizer.theta_step.start", "loss.scale", "optimizer.update.weight_decay"]
    assert len(found) == len(found.drop_duplicates(searched)) == 18
    assert found["held-out"].is_monotonic_decreasing and set(found["samples held out"]) == {200}
    assert set(found["iterations"]) == {1}
    (line,) = search(tmp_path / "searches/mnist_shallow_block_admm.csv")
    assert line["configurations"] == 18 and f"loss.scale={found['loss.scale'][0]}" in line["best"]
    accuracies = [Run(path.parent).history["test_accuracy"].iloc[-1] for path in tmp_path.glob("runs/*/*/run.json")]
    assert max(accuracies) == pytest.approx(found["held-out"][0], abs=1e-4)


# --- The page of results, against the committed runs


def raw(run: Run) -> list[dict[str, str]]:
    with (run.folder / "history.csv").open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", experiments_in(RESULTS))
def test_a_cell_of_every_table_from_the_raw_history(name: str) -> None:
    """Of the newest run, with those of other seeds, without the report's code."""
    runs = finished_runs(RESULTS, name)
    run, label = runs[-1], paper()["labels"][runs[-1].info["method"]]
    rows = [row for same in runs if same.row == run.row for row in raw(same)]
    table = pd.read_csv(RESULTS / "tables" / f"{name}.csv", dtype=str)
    line = table[table["method"] == label] if "method" in table else table
    settings = line["setting"].str.removeprefix("reduced ").str.split("[:,]", regex=True).str[0]
    line = line[settings == run.info["setting"]].iloc[0]
    if name == "memory":
        total = sum(float(r["bytes"]) for r in rows if r["quantity"] != "peak") / 2**20
        assert float(line["total"]) == pytest.approx(total, rel=1e-6)
    elif (run.folder / "probes.csv").exists():  # all runs have probed the same attributes
        probes = list(csv.DictReader((run.folder / "probes.csv").open()))
        found = mean(float(probe["balanced_accuracy"]) for probe in probes)
        assert float(line["balanced accuracy"]) == pytest.approx(found, rel=1e-6)
    else:
        last = [float(r["test_accuracy"]) for r in rows if int(r["iteration"]) == run.info["iterations"]]
        assert float(line["mean"]) == pytest.approx(mean(last), abs=0.006)


def test_the_page_sets_every_number_of_the_paper_beside_ours() -> None:
    found = {name: finished_runs(RESULTS, name) for name in experiments_in(RESULTS)}
    numbers = papers_numbers(found)
    for name, known in paper()["experiments"].items():
        for method, value in known["accuracy"].items() if known["source"] else ():
            lines = numbers[(numbers["experiment"] == name) & (numbers["method"] == paper()["labels"][method])]
            assert set(lines["paper"]) == {value}
    run = next(
        run for run in found["mnist_shallow"] if (run.info["method"], run.info["setting"]) == ("sgd", "faithful")
    )
    last = mean(float(r["test_accuracy"]) for r in raw(run) if int(r["iteration"]) == run.info["iterations"])
    line = numbers[(numbers["method"] == "SGD") & (numbers["setting"] == "faithful")].iloc[0]
    assert line["difference"] == pytest.approx(last - 95.29, abs=0.006)


def test_the_page_is_written_of_any_store(race: Path, measured: dict[str, Run], tmp_path: Path) -> None:
    assert "Not run: " in "".join(sections(tmp_path))
    for run in [*stored(race).values(), *measured.values()]:
        experiment = run.info["experiment"]
        shutil.copytree(run.folder, tmp_path / "runs" / experiment / run.folder.name)
        assert f"## {experiment}" in list(sections(tmp_path))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("conf/row/[!l]*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_row_has_its_values_and_starts(path: Path) -> None:
    """Those of faces are in test_faces_experiment."""
    row = [f"experiment={path.parent.name}", f"row={path.parent.name}/{path.stem}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*row, "dataset=digits", "dataset.first=null"])
    own: Any = OmegaConf.load(path)
    del own["defaults"]
    assert OmegaConf.merge(config, own) == config  # every value has arrived
    if "epoch_parts" in config.optimizer:
        config.optimizer.epoch_parts = None  # the digits have fewer mini-batches than parts
    problem = build_problem(config, load(**config.dataset))
    state = instantiate(config.optimizer, _convert_="all").init(problem, [0])
    assert state.theta.flat.isfinite().all()


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/optimizer/*.yaml")), ids=lambda path: path.stem)
def test_an_optimizer_of_the_library_has_the_defaults_of_the_command_line(path: Path) -> None:
    config = OmegaConf.merge({"iterations": 20, "model": {"rank": 4}}, {"optimizer": OmegaConf.load(path)})
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
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            name: str = compose("config", overrides=[*row, *overrides]).init.name
        return name

    assert init("normal") == "normal"
    assert init("kaiming") == "kaiming_normal"
    assert init("kaiming", "init=kaiming_uniform") == "kaiming_uniform"


def test_a_row_without_a_run_is_named() -> None:
    runs = finished_runs(RESULTS, "mnist_deep10")
    without = [run for run in runs if (run.info["method"], run.info["setting"]) != ("sgd", "kaiming")]
    missing = "SGD in mnist_deep10, kaiming"
    assert missing in not_run({"mnist_deep10": without}) and missing not in not_run({"mnist_deep10": runs})


def test_a_setting_that_the_paper_does_not_have_is_not_set_beside_its_number() -> None:
    runs = finished_runs(RESULTS, "mnist_deep10")
    stated = {curve.info["setting"]: curve.reference for curve in curves(runs) if curve.info["method"] == "sgd"}
    assert stated == {"normal": 10.28, "kaiming": None}
    _, figures = content("mnist_deep10", runs)
    panels = [axes.get_title() for axes in figures["mnist_deep10"].axes]
    assert panels == list(paper()["experiments"]["mnist_deep10"]["panels"].values())


def test_every_experiment_to_reproduce_is_there() -> None:
    text = (ROOT / "Makefile").read_text()
    (names,), (cifar10,) = (re.findall(rf"^{name} := (.*)$", text, re.MULTILINE) for name in ("EXPERIMENTS", "CIFAR10"))
    names = names.replace("$(CIFAR10)", cifar10)
    missing = [name for name in names.split() if not (ROOT / "conf/experiment" / f"{name}.yaml").exists()]
    assert names and not missing


def test_the_committed_page_is_what_the_store_says() -> None:
    page = (RESULTS / "README.md").read_text()
    assert page == "\n\n".join(sections(RESULTS)) + "\n"
    for picture in re.findall(r"\((figures/.*?)\)", page):
        assert (RESULTS / picture).exists()


def test_the_readme_s_tables_are_what_the_store_says() -> None:
    page = (ROOT / "README.md").read_text()
    tables = {name: content(name, finished_runs(RESULTS, name))[0] for name in experiments_in(RESULTS)}
    assert page == with_tables(page, tables) and "| Stochastic Block-ADMM | " in page
    assert "| Stochastic Block-ADMM | " not in with_tables(page, {})


def test_a_folder_that_is_no_store_is_refused_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none is no results store"):
        store_of_the_command(None)
    monkeypatch.setattr("sys.argv", ["tables", str(ROOT / "results")])
    assert store_of_the_command(None) == ROOT / "results" and not (tmp_path / "none").exists()
