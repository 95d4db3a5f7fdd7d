"""What README, docs/ and CONTRIBUTING say can be done, can be done: their code runs, and their commands are valid.

Code is run as it stands, block after block of a page in one folder. A block with a title is the file of that name. Jobs
that name a file of their page run, too, with `SHORT`; others, which may take hours or a network, are checked as far as
their arguments: a job's configuration is composed, a script parses its options.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from launches import Launch
from torch.distributed.run import get_args_parser as get_torchrun_parser

import admm
from admm import Problem, SquaredError, initialiser, split, train
from admm.models import mlp
from admm.parallel import ALONE
from experiments.implied import with_implied
from experiments.launching.rows import Rows, values
from experiments.rows import CONF

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}
SHORT = ("iterations=1", "seeds=[0]", "progress=false")
LANGUAGES = {"python", "yaml", "sh", "text", "bibtex"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Block(NamedTuple):
    """A block of code of a page. title: the name of the file that it is."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    fences = re.finditer(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(language, title or "", text) for language, title, text in (fence.groups() for fence in fences)]


def commands(text: str) -> list[str]:
    """The commands of a block, one of several on a line at a time, without their comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.replace("\\\n", " ").splitlines())
    return [command for line in lines if line.strip() for command in " ".join(line.split()).split(" && ")]


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


IN_BLOCKS = {c for page in PAGES for block in blocks(page) if block.language == "sh" for c in commands(block.text)}
IN_PROSE = {c for page in PAGES for c in re.findall(r"`((?:python|make|pip|block-admm) [^`]+)`", prose(page))}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_says_what_it_is(page: str) -> None:
    """So that none is left out here."""
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert not re.search(r"^```|\n\n {4}\S", prose(page).replace("\n\n    options:", ""), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_a_page_can_be_followed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python runs, block after block, and so do its jobs that name a file of it."""
    monkeypatch.chdir(tmp_path)
    module: Any = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        if block.language == "python":
            with monkeypatch.context() as patched:
                patched.setattr("admm.Parallel.join", lambda kind: ALONE)  # instead of a start by torchrun
                exec(compile(block.text, page, "exec"), vars(module))
        for command in commands(block.text) if block.language == "sh" else ():
            if names_a_file_of(page, command):
                start(command)
    AFTER.get(page, lambda module: None)(module)


def names_a_file_of(page: str, command: str) -> bool:
    files = {block.title.partition("/")[0].removesuffix(".py") for block in blocks(page)}
    return any(file and re.search(rf"\b{file}\b", command) for file in files)


def start(command: str) -> None:
    """Run a job, or see that a script, which has run, is there."""
    match shlex.split(command):
        case ["python", "run.py", *arguments]:
            ended = Launch(*arguments, *SHORT, folder=Path.cwd()).wait()
            assert ended.returncode == 0, ended.stderr
        case ["python", script] | ["torchrun", _, script]:
            assert Path(script).exists()
        case _:
            pytest.fail(f"not run: {command}")


def readme_trains(module: Any) -> None:
    assert module.trained(module.x).shape == (1000, 4) and len(module.history.rows) == 42
    assert module.history.rows[-1]["test_accuracy"] > 60  # chance is 25


def quick_start_learns(module: Any) -> None:
    assert all(row["test_accuracy"] > 85 for row in module.history.rows[-3:])
    assert Path("trained.pt").exists()
    assert list(Path("outputs/runs/own").iterdir()) and list(Path("outputs/logs").rglob("own.png"))


def optimizer_descends(module: Any) -> None:
    x, labels = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    problem = Problem(x, labels, split(mlp(5, [8], 3), per_layer=True), SquaredError(), initialiser("pytorch"))
    optimizer = module.GradientDescent(step_size=0.1)
    rows = train(problem, optimizer, optimizer.init(problem, (0, 1)), 5, (x, labels)).rows
    assert all(after["train_loss"] < before["train_loss"] for before, after in zip(rows[:2], rows[-2:], strict=True))


AFTER: dict[str, Callable[[Any], None]] = {
    "README.md": readme_trains,
    "quickstart.md": quick_start_learns,
    "extending.md": optimizer_descends,
}


@pytest.mark.parametrize("command", sorted(IN_BLOCKS | IN_PROSE))
def test_a_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match shlex.split(command):
        case ["python", "run.py", *arguments] | ["block-admm", *arguments]:
            check_job(arguments)
        case ["torchrun", *arguments]:
            started = get_torchrun_parser().parse_args(arguments)
            assert started.training_script in ("run.py", "on_two.py")
            check_job(started.training_script_args)
        case ["python", "-m", module, *arguments]:
            check_script(module, arguments, monkeypatch)
        case ["python", _]:
            pass  # a file of the page
        case ["make", *words]:
            assert {word for word in words if "=" not in word} <= TARGETS
        case ["pip", "install", *words]:
            (extras,) = re.findall(r"\.(?:\[(.+)\])?$", words[-1])
            assert not extras or set(extras.split(",")) <= EXTRAS.keys()
        case ["git" | "source" | "python3" | "outputs/jax/bin/pip", *_]:
            pass
        case _:
            pytest.fail("a kind of command that no test knows")


def check_job(arguments: list[str]) -> None:
    """Compose the first cell of a launch, and the rows that it chooses."""
    options = get_args_parser().parse_args(arguments)
    if options.config_dir:
        return  # files of the page, with which it is run
    given = with_implied([o for o in options.overrides if not o.startswith(("hydra/launcher=", "hydra.launcher."))])
    for launcher in (o.partition("=")[2] for o in options.overrides if o.startswith("hydra/launcher=")):
        plugins = [requirement for extra in EXTRAS.values() for requirement in extra]
        assert (CONF / f"hydra/launcher/{launcher}.yaml").exists() or any(f"-{launcher}-" in name for name in plugins)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cell = first_cell(given)
        of_optimizer = [o for o in cell if o.startswith("optimizer.")]  # which change what a row has set
        config = compose("config", [o for o in cell if o not in of_optimizer], return_hydra_config=True)
        Rows().on_multirun_start(config)
        chosen = OverridesParser.create().parse_overrides([*config.hydra.overrides.task, *of_optimizer])
        others = first_cell([o.input_line for o in chosen if o.key_or_group != "row"])
        rows = [f"row={row}" for o in chosen if o.key_or_group == "row" for row in values(o)]
        for row in ([[row] for row in rows] or [[]]) if of_optimizer else ():
            compose("config", [*others, *row])


def first_cell(overrides: list[str]) -> list[str]:
    """The first values of a sweep; a value from an interval is left out."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    cell = [o.input_line for o in parsed if not o.is_sweep_override()]
    return cell + [f"{o.key_or_group}={next(o.sweep_string_iterator())}" for o in parsed if o.is_choice_sweep()]


def check_script(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script that has options parse its arguments, and no more. Files of `results` that they name exist."""
    text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    if "parse" not in text and "store_of_the_command" not in text:
        assert not arguments
        return
    assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("results/"))
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser) -> None:
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse_alone)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


class Parsed(Exception):
    """Raised where a script would begin its work."""


def test_links_lead_to_files_and_headings() -> None:
    wrong = []
    for page, text in {**PAGES, "results": (ROOT / "results/README.md").read_text()}.items():
        folder = ROOT if (ROOT / page).is_file() else ROOT / ("results" if page == "results" else "docs")
        for target, heading in re.findall(r"\]\(([^)\s:#]*)#?([^)\s:]*)\)", text):
            path = folder / target if target else folder / page
            if not path.exists() or (heading and heading not in anchors(path.read_text())):
                wrong.append(f"{page}: {target}#{heading}")
    assert not wrong


def anchors(text: str) -> set[str]:
    """The headings' names in links, as GitHub and the site have them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_has_every_public_name() -> None:
    assert sorted(re.findall(r"^::: admm\.(\w+)$", PAGES["api.md"], re.MULTILINE)) == sorted(admm.__all__)


@pytest.mark.parametrize("experiment", sorted(folder.name for folder in (ROOT / "results/runs").glob("[!.]*")))
def test_the_results_page_is_of_the_committed_runs(experiment: str) -> None:
    """By their commits; `make results-page` writes it anew."""
    page = (ROOT / "results/README.md").read_text()
    section = page.split(f"\n## {experiment}\n")[1].split("\n## ")[0]
    runs = (ROOT / "results/runs" / experiment).glob("*/run.json")
    assert {json.loads(run.read_text())["commit"] for run in runs} <= set(re.findall(r"\b[0-9a-f]{12}\b\+?", section))
    assert (ROOT / f"results/tables/{experiment}.csv").exists()


def test_the_readme_is_one_page() -> None:
    assert PAGES["README.md"].count("\n") <= 120


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build.build(config)  # strict: raises Abort for a warning
    home = (tmp_path / "index.html").read_text()
    assert 'src="results/figures/mnist_shallow.png"' in home and 'href="quickstart.html"' in home
    assert (tmp_path / "results/figures/mnist_shallow.png").exists()
    assert "admm.Problem" in (tmp_path / "api.html").read_text()


def test_no_script_has_the_name_of_a_standard_module() -> None:
    """Griffe puts an extension into `sys.modules` by the bare name of its file."""
    assert not {path.stem for path in (ROOT / "scripts").rglob("*.py")} & sys.stdlib_module_names
