"""Everything in a results store as one page, in one file that needs neither server nor network:
python -m scripts.html_page [results]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from admm.files import atomic_write
from experiments.launching.failures import failures_end_the_program
from experiments.paths import in_full
from experiments.reports.html_page import html_page, read_store
from experiments.store import failed_writes_in_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=in_full, nargs="?", default=Path("results"), help="such as results or outputs")
    parser.add_argument("--out", type=in_full, help="what to write (default: outputs/report-<name of the store>.html)")
    options = parser.parse_args()
    if not options.store.is_dir():
        sys.exit(f"error: there is no folder {options.store}; it should be a results store, such as results or outputs")
    out = options.out or Path("outputs", f"report-{options.store.resolve().name}.html")
    with failures_end_the_program(), failed_writes_in_words():
        contents = read_store(options.store)
        text = html_page(contents)
        with atomic_write(out, "the page") as part:
            part.write_text(text, encoding="utf-8")
    for path, problem in contents.damaged.items():
        print(f"warning: {path} is damaged and left out: {problem}", file=sys.stderr)
    runs, size = f"{len(contents.runs)} runs of {len(contents.by_experiment)} experiments", out.stat().st_size
    print(f"written: {out}, {runs}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
