"""The library is light: with PyTorch and NumPy alone all of it can be imported, and the suite's packages are not. Its
public names are those that the examples use."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import admm

ROOT = Path(__file__).parents[1]
SLOW = {"torch._dynamo", "torch._inductor", "sympy"}  # PyTorch's compiler, which takes longer to import than the rest
SUITE = ("hydra", "omegaconf", "matplotlib", "rich", "pandas", "experiments")
OPTIONAL = ("sklearn", "scipy", "joblib", "psutil", "filelock", "yaml", "PIL", "h5py", "torchvision")
IN_A_CLONE = "`source .venv/bin/activate` finds after `make env`, or is installed by:"
WITHOUT_EXAMPLE = {  # public names that no example imports, and why they are public
    "BinaryCrossEntropy": "the loss of several labels per sample",
    "DeepFacto": "the paper's third algorithm",
    "Hinge": "Taylor's loss",
    "Optimizer": "what all of them are, for annotations and for one's own",
    "SGD": "the update rule beside Adam",
}
MODULES = [name for _, name, _ in pkgutil.walk_packages(admm.__path__, "admm.")]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_suite_and_its_packages_are_not_imported() -> None:
    code = f"import importlib, sys\nfor name in {MODULES}: importlib.import_module(name)\nprint(*sys.modules)"
    imported = run(code).split()
    assert not {name.partition(".")[0] for name in imported} & {*SUITE, "sklearn", "psutil", "joblib"}
    assert not SLOW & {*imported}


def test_without_the_optional_packages_an_optimizer_trains_and_the_digits_say_what_is_missing() -> None:
    code = f"""
import importlib, sys
sys.modules |= dict.fromkeys({SUITE + OPTIONAL})  # an import of one raises ImportError
for name in {MODULES}:
    importlib.import_module(name)
import torch
from admm.blocks import split
from admm.data import DatasetError, load
from admm.losses import SquaredError
from admm.models import initialiser, mlp
from admm.optimizers import BlockADMM, Problem
from admm.training import train
x = torch.rand(8, 2)
problem = Problem(x, x, split(mlp(2, [3], 2), per_layer=True), SquaredError(), initialiser("pytorch"))
optimizer = BlockADMM(1, 1e-3, batch_size=4)
print(len(train(problem, optimizer, optimizer.init(problem, [0]), 1).rows))
try:
    load("digits", ".")
except DatasetError as error:
    print(error)
"""
    rows, message = run(code).split("\n", 1)
    assert rows == "2" and message.endswith("; scikit-learn has them: pip install scikit-learn")


@pytest.mark.parametrize(
    ("installer", "folder", "way"),
    [
        ("pip", ROOT, "is installed by: pip install 'block-admm[suite]'"),
        (None, ROOT, f"{IN_A_CLONE} pip install '.[suite]'"),
        (None, ROOT / "docs", f"{IN_A_CLONE} pip install '{ROOT}[suite]'"),
    ],
)
def test_a_command_without_its_packages_says_how_the_project_installs_them(
    installer: str | None, folder: Path, way: str
) -> None:
    """None: the project's egg-info in a clone, which pip does not know."""
    code = f"""
import importlib.metadata, os, sys
from pathlib import Path
from types import SimpleNamespace
importlib.metadata.distributions = lambda name: [SimpleNamespace(files=[Path("INSTALLER")] if {installer!r} else [])]
sys.modules["omegaconf"] = None
sys.path.insert(0, {str(ROOT)!r})
os.chdir({str(folder)!r})
try:
    import experiments
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code) == f"omegaconf is missing, which {way}"


def test_messages_name_the_package_that_is_missing() -> None:
    """Or call `experiments.install` for an extra: no other form works in a clone and where a wheel is installed."""
    found = [
        line.strip()
        for folder in ("admm", "experiments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path != ROOT / "experiments/__init__.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install (?![a-z])", line)
    ]
    assert not found


def examples() -> Iterator[str]:
    """The code of README, docs and notebooks; that of docs/extending.md is for those who write an optimizer."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        if page.name != "extending.md":
            yield from re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        yield from ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_public_names_are_those_that_the_examples_import() -> None:
    nodes = [node for code in examples() for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    found = [(node.module, name.name) for node in nodes for name in node.names if "admm" in str(node.module).split(".")]
    assert {module for module, _ in found} == {"admm"}  # of its modules nothing
    imported = {name for _, name in found}
    assert not imported & WITHOUT_EXAMPLE.keys()
    assert sorted(admm.__all__) == sorted(imported | WITHOUT_EXAMPLE.keys())
    assert all(hasattr(admm, name) for name in admm.__all__)


def test_another_distribution_of_the_name_is_told_where_it_shares_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "admm-3.1.dist-info").mkdir()
    (tmp_path / "admm-3.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: admm\nVersion: 3.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(action="error"):  # this package is elsewhere, and is the one that is imported
        admm._warn_of_the_distribution_admm()
    monkeypatch.setattr(admm, "__file__", str(tmp_path / "admm/__init__.py"))
    with pytest.warns(UserWarning, match=f"^{tmp_path}/admm holds files of two distributions, block-admm and admm 3.1"):
        admm._warn_of_the_distribution_admm()
