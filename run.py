"""Reproduce an experiment: python run.py experiment=<name> [key=value ...]; --help shows all keys."""

import sys

import hydra
from omegaconf import DictConfig

from experiments.launch import Launch
from experiments.launching.failures import run_task
from experiments.progress import show_what_can_be_shown


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Run one job. Returns what a search maximises, or None."""
    return run_task(config, Launch.current())


if __name__ == "__main__":
    show_what_can_be_shown()
    if any(a.split("=")[0] in ("--cfg", "-c") for a in sys.argv) and any(a.startswith("setting=") for a in sys.argv):
        sys.exit(
            "error: --cfg shows a single job, before rows are chosen: in place of optimizer=… setting=… give row=…"
        )
    try:
        main()
    except SystemExit as end:
        if end.code == 1:  # Hydra has printed what is wrong
            from experiments.hints import hints

            for line in hints(sys.argv[1:], end.__context__):
                print(line, file=sys.stderr)
        raise
