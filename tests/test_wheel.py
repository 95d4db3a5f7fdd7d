"""The wheel, installed into fresh environments: the library with PyTorch and NumPy alone, the suite in any folder."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("admm", "experiments", "hydra_plugins")
NETWORK = """from torch import nn
def small(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, classes))
"""
pytestmark = pytest.mark.long


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={"PATH": "/usr/bin:/bin"}
    )


def done(folder: Path, *command: str | Path) -> str:
    ended = run(folder, *command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy without git, in which there is nothing but what building needs."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done(copy, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", ".")
    (built,) = folder.glob("block_admm-*.whl")
    return built


def installed(wheel: Path, folder: Path, extra: str = "") -> Path:
    """The folder of commands of a new environment that has the wheel and what it requires, and nothing else.

    What it requires is linked to the packages of this environment, as PyTorch is too large to be downloaded or copied;
    pip then finds that all is there."""
    done(folder, sys.executable, "-m", "venv", "--without-pip", "env")
    (packages,) = folder.glob("env/lib/python3*/site-packages")
    for name in required("block-admm", extra):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(found.locate_file(top)))
    into = ("-m", "pip", "--python", str(folder / "env/bin/python"), "install", "--no-index")
    done(folder, sys.executable, *into, f"{wheel}[{extra}]" if extra else str(wheel))
    return folder / "env/bin"


def required(name: str, extra: str) -> set[str]:
    """The names of the distributions that one requires, and of those that these require."""
    found = [(name, {extra})]
    for one, extras in found:  # which grows
        for needed in map(Requirement, requires(one) or []):
            applies = not needed.marker or any(needed.marker.evaluate({"extra": of}) for of in extras | {""})
            if applies and (needed.name, needed.extras) not in found:
                found.append((needed.name, needed.extras))
    return {one for one, _ in found[1:]}


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Configuration, the paper's numbers, templates and markers of types among them."""
    paths = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in paths if path.suffix != ".pyc"}
    assert {"experiments/conf/config.yaml", "experiments/paper.yaml", "admm/py.typed"} <= names
    assert {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name} == names


def test_the_library_works_with_torch_and_numpy_alone(wheel: Path, tmp_path: Path) -> None:
    bin = installed(wheel, tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"{snippet}\nimport admm\nprint(admm.__version__, len(history.rows), admm.__file__)"
    version, rows, file = done(tmp_path, bin / "python", "-c", code).splitlines()[-1].split()
    assert version == wheel.name.split("-")[1] and rows == "42" and Path(file).is_relative_to(tmp_path)
    assert (Path(file).parent / "py.typed").exists()
    refused = run(tmp_path, bin / "block-admm", "--help")
    assert refused.returncode == 1
    assert refused.stderr.endswith("hydra is missing, which is installed by: pip install 'block-admm[suite]'\n")


def test_the_suite_works_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    bin, folder = installed(wheel, tmp_path, "suite"), tmp_path / "empty"
    folder.mkdir()
    printed = done(folder, bin / "block-admm", "experiment=digits_shallow", "optimizer=sgd")
    assert "digits_shallow: test accuracy in percent" in printed
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    runs = folder.glob("outputs/demo/runs/digits_shallow/sgd-tuned-*/run.json")
    (info,) = (json.loads(path.read_text()) for path in runs)
    assert info["commit"] is None and {"admm/blocks.py", "experiments/training.py"} <= set(info["sources"])
    (folder / "my_networks.py").write_text(NETWORK)
    own = ("model._target_=my_networks.small", "iterations=1", "seeds=[0]")
    done(folder, bin / "block-admm", "experiment=digits_shallow", "optimizer=sgd", *own)
    (info,) = (json.loads(path.read_text()) for path in folder.glob("outputs/runs/digits_shallow/sgd-*/run.json"))
    assert "my_networks.py" in info["sources"]
