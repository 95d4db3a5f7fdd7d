"""What the project says of itself outside its code agrees with the code."""

import re
import tomllib
from pathlib import Path

import yaml

import admm

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == admm.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2105.00339"
    assert [one["family-names"] for one in citation["preferred-citation"]["authors"]] == [
        "Khorram",
        "Fu",
        "Danesh",
        "Qi",
        "Li",
    ]


def test_the_image_is_made_and_used_by_the_makefile_with_a_python_that_is_supported() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if "make env" in line or 'make"' in line] == ["RUN make env", 'CMD ["make", "demo"]']
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", "\n".join(lines), re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {"admm", "experiments", "hydra_plugins", "run.py", "pyproject.toml", "constraints.txt"} & set(ignored)


def test_what_git_ignores_is_not_copied_into_the_image() -> None:
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {pattern.strip("/") for pattern in patterns} <= {line.removeprefix("**/") for line in left_out}


def test_what_runs_before_a_commit_and_in_ci_are_targets_of_the_makefile() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = [hook["entry"] for hook in repository["hooks"]]
    commands += re.findall(r"^make .*", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {"make lint", "make test"} <= set(commands)
    assert {target for command in commands for target in command.split()[1:]} <= TARGETS


def test_every_requirement_has_a_lowest_version() -> None:
    """As `make test-lowest` installs it."""
    requirements = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    assert [r for r in requirements if not re.search(">=|==|^block-admm", r)] == []


def test_the_classifiers_are_the_pythons_that_are_supported() -> None:
    lowest, beyond = (int(minor) for minor in re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert [c for c in PROJECT["classifiers"] if ":: 3." in c] == [
        f"Programming Language :: Python :: 3.{minor}" for minor in range(lowest, beyond)
    ]


def test_the_targets_of_the_makefile_are_described() -> None:
    described = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert described == TARGETS
