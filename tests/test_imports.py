"""The library is light: with PyTorch and NumPy alone all of it can be imported, and the suite's packages are not."""

import pkgutil
import subprocess
import sys

import admm

SUITE = ("hydra", "omegaconf", "matplotlib", "rich", "pandas", "experiments")
OPTIONAL = ("sklearn", "scipy", "joblib", "psutil", "filelock", "yaml", "PIL", "h5py", "torchvision")
MODULES = [name for _, name, _ in pkgutil.walk_packages(admm.__path__, "admm.")]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_suite_and_its_packages_are_not_imported() -> None:
    code = f"import importlib, sys\nfor name in {MODULES}: importlib.import_module(name)\nprint(*sys.modules)"
    assert not {name.partition(".")[0] for name in run(code).split()} & {*SUITE, "sklearn", "psutil", "joblib"}


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
    assert rows == "2" and "scikit-learn" in message and "block-admm[suite]" in message
