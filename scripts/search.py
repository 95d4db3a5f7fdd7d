"""Rank the configurations of a search: python -m scripts.search <folder of a launch> ... [--results results]

Writes <results>/searches/<experiment>_<optimizer>.csv, a row for each configuration tried, the best held-out score
first, and beside it a figure of the score against each hyperparameter; prints the rows. The same is in the launch's
folder at its end; this collects several launches, and what is to be kept. The best configuration goes to
conf/row/<experiment>/<optimizer>-<setting>.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.paths import in_full
from experiments.reports.scores import is_of_a_search
from experiments.reports.searches import rankings, write_ranking
from experiments.store import failed_writes_in_words, launched_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch", type=in_full, nargs="+", help="a launch's folder, such as outputs/logs/<day>/<time>")
    parser.add_argument("--results", type=in_full, default=Path("results"))
    options = parser.parse_args()
    runs = [run for launch in options.launch for run in launched_runs(launch)]
    places = ", ".join(map(str, options.launch))
    if not runs:
        sys.exit(f"error: {places} has no finished run; it should be a folder such as outputs/logs/<day>/<time>")
    if not all(map(is_of_a_search, runs)):
        sys.exit(f"error: {places}: a search needs dataset.holdout=10000 or so")
    for name, ranked in rankings(runs).items():
        write_ranking(name, ranked, options.results)


if __name__ == "__main__":
    with failed_writes_in_words():
        main()
