"""Heat maps of any factors of a DeepFacto run: python -m scripts.heat_maps <run> <figure> --factors 3 17 30"""

from __future__ import annotations

import argparse
import sys

from admm.files import atomic_write
from experiments.paths import in_full
from experiments.reports.base import report_on
from experiments.reports.faces import Faces
from experiments.store import Run, failed_writes_in_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=in_full, help="such as results/runs/lfw_proxy/deepfacto-rank32-<identity>")
    parser.add_argument("figure", type=in_full, help="what to write: .png, .pdf, .svg")
    parser.add_argument(
        "--factors", type=int, nargs="+", help="their numbers, from 0; without them the most consistent"
    )
    options = parser.parse_args()
    run = Run(options.run)
    if not run.has_arrays or not isinstance(report := report_on(run), Faces):
        sys.exit(f"error: {options.run} has no arrays.npz; it should be the folder of a finished run of DeepFacto")
    try:
        figure = report.heat_maps(run, options.factors)
        with failed_writes_in_words(), atomic_write(options.figure, "the figure") as part:
            figure.savefig(part, dpi=150)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"written: {options.figure}")


if __name__ == "__main__":
    main()
