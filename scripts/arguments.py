"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.paths import in_full


def store_of_the_command(description: str | None) -> Path:
    """Parse the command line of a command whose one argument is a results store, and return that store's folder. Ends
    the program if it is no store."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=in_full, nargs="?", default=Path("results"), help="a results store")
    root: Path = parser.parse_args().results
    if not (root / "runs").is_dir():
        sys.exit(f"error: {root} is no results store, which has a folder runs")
    return root
