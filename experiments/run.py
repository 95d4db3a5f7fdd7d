"""The command block-admm experiment=<name> [key=value ...], in a clone also python run.py; --help shows all keys."""

import os
import sys

import hydra
from omegaconf import DictConfig

from experiments.launch import Launch
from experiments.launching.failures import run_task
from experiments.progress import show_what_can_be_shown
from experiments.rows import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_job(config: DictConfig) -> float | None:
    """Run one job. Returns what a search maximises, or None."""
    return run_task(config, Launch.current())


def main() -> None:
    """Run the jobs that the command line asks for. Modules of the current folder can be named, such as in
    model._target_=my_networks.small."""
    sys.path.append(os.getcwd())
    show_what_can_be_shown()
    if any(a.split("=")[0] in ("--cfg", "-c") for a in sys.argv) and any(a.startswith("setting=") for a in sys.argv):
        sys.exit(
            "error: --cfg shows a single job, before rows are chosen: in place of optimizer=… setting=… give row=…"
        )
    try:
        run_job()
    except SystemExit as end:
        if end.code == 1:  # Hydra has printed what is wrong
            from experiments.hints import hints

            for line in hints(sys.argv[1:], end.__context__):
                print(line, file=sys.stderr)
        raise
