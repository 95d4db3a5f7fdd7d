"""What starts the command block-admm: Ctrl-C ends it with one line also while PyTorch is imported."""

import sys

INTERRUPTED = 130  # a program's exit code after Ctrl-C


def main() -> None:
    """Import the suite, and call `experiments.run.main`."""
    try:
        from experiments.run import main as run
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()
