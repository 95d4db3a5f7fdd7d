"""The reproduction suite: what to run, where results are kept, figures and tables."""

import os
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before PyTorch is loaded; docs/performance.md has what it gains
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

try:
    from experiments.paths import expand_in_configurations
except ModuleNotFoundError as error:
    way = "which is installed by: pip install 'block-admm[suite]'"
    if (Path(__file__).parents[1] / "pyproject.toml").exists():  # in a clone
        way = "which `source .venv/bin/activate` finds after `make env`, or is installed by: pip install '.[suite]'"
    raise ModuleNotFoundError(f"{error.name} is missing, {way}", name=error.name) from error

expand_in_configurations()
