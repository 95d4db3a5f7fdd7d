"""Run every experiment that has not been run, in the order that gives results early:
python -m scripts.reproduce [--full] [key=value ...]

Each is `run.py experiment=<name> key=value ...`, and the rows of it that its sweep does not have. The order is
`report.order` of conf/experiment/*.yaml; an experiment of whose data (`report.needs`) none are there is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.reports.base import declared_reports
from experiments.reports.results_page import further_rows

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("ADMM_DATA", "data"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run full-size experiments in place of reduced ones")
    options, overrides = parser.parse_known_args()
    for launch in launches(options.full):
        done = subprocess.run([sys.executable, str(ROOT / "run.py"), *launch, *overrides])
        if done.returncode:
            sys.exit(done.returncode)


def launches(full: bool = False) -> Iterator[Sequence[str]]:
    """Yield the arguments of each launch. full: replace a reduced experiment by the full-size one."""
    arguments: dict[str, Sequence[str]] = {}
    for report in declared_reports().values():
        there = [given for file, given in report.needs.items() if (DATA / file).exists()]
        if report.order is not None and (there or not report.needs):
            arguments[report.reduced if full and report.reduced else report.experiment] = there[0] if there else ()
    for name, given in arguments.items():
        yield f"experiment={name}", *given
        for optimizer, setting in further_rows(name):
            yield f"experiment={name}", f"optimizer={optimizer}", f"setting={setting}", *given


if __name__ == "__main__":
    main()
