"""Heat maps of any factors of a DeepFacto run: python -m scripts.heat_maps <run> <picture> --factors 3 17 30"""

from __future__ import annotations

import argparse
import sys

from admm.files import atomic_write
from experiments.paths import in_full
from experiments.reports.faces import heat_maps
from experiments.store import Run, failed_writes_in_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=in_full, help="such as results/runs/lfw_proxy/deepfacto-rank32-<identity>")
    parser.add_argument("picture", type=in_full, help="what to write: .png, .pdf, .svg")
    parser.add_argument(
        "--factors", type=int, nargs="+", help="their numbers, from 0; without them the most consistent"
    )
    options = parser.parse_args()
    if not (options.run / "arrays.npz").exists():
        sys.exit(f"error: {options.run} has no arrays.npz; it should be the folder of a finished run of DeepFacto")
    run = Run(options.run)
    try:
        figure = heat_maps(run.info["experiment"], run, options.factors)
        with failed_writes_in_words(), atomic_write(options.picture, "the picture") as part:
            figure.savefig(part, dpi=150)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"written: {options.picture}")


if __name__ == "__main__":
    main()
