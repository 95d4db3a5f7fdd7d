"""The reproduction suite: what to run, where results are kept, figures and tables."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # before PyTorch is loaded; docs/performance.md has what it gains
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

try:
    from experiments.paths import expand_in_configurations
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing, which is installed by: pip install 'block-admm[suite]'", name=error.name
    ) from error

expand_in_configurations()
