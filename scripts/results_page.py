"""Write results/README.md, the paper's numbers beside ours: python -m scripts.results_page [results]"""

from __future__ import annotations

from experiments.launching.failures import failures_end_the_program
from experiments.reports.results_page import write_results_page
from experiments.store import failed_writes_in_words
from scripts.arguments import store_of_the_command


def main() -> None:
    root = store_of_the_command(__doc__)
    with failures_end_the_program(), failed_writes_in_words():
        print(f"written: {write_results_page(root)}")


if __name__ == "__main__":
    main()
