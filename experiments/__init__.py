"""The reproduction suite: what to run, where results are kept, figures and tables."""

import os
from importlib.metadata import distributions
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before PyTorch is loaded; docs/performance.md has what it gains
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def install(extra: str) -> str:
    """Return the command that installs one of the project's extras; of a single package, messages name the package."""
    project = "block-admm"  # which pip finds where it is installed alone, as PyPI has none
    if not is_installed():
        clone = Path(__file__).parents[1]
        project = "." if clone == Path.cwd() else str(clone)
    return f"pip install '{project}[{extra}]'"


def is_installed() -> bool:
    """Return whether the project is installed, and not only imported from a clone, which may have an egg-info."""
    files = (path.name for found in distributions(name="block-admm") for path in found.files or ())
    return "INSTALLER" in files


try:
    from experiments.paths import expand_in_configurations
except ModuleNotFoundError as error:
    way = "" if is_installed() else "`source .venv/bin/activate` finds after `make env`, or "
    raise ModuleNotFoundError(
        f"{error.name} is missing, which {way}is installed by: {install('suite')}", name=error.name
    ) from error

expand_in_configurations()
