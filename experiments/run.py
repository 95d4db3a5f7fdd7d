"""The command block-admm experiment=<name> [key=value ...], in a clone also python run.py; --help shows all keys."""

import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal import utils as hydra_utils
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from admm.training import GOES_ON
from experiments.command import INTERRUPTED
from experiments.implied import with_implied
from experiments.launch import Launch
from experiments.launching.failures import run_task
from experiments.overrides import not_key_value
from experiments.processes import follow, is_follower, leading
from experiments.progress import show_what_can_be_shown
from experiments.rows import CONF

USAGE = f"""Which experiment? Give one of these, or your own data:
  experiment={"|".join(sorted(path.stem for path in CONF.glob("experiment/*.yaml")))}
  experiment=digits_shallow          the smallest: nine optimizers on the embedded digits, a few minutes
  dataset=npz dataset.path=my.npz    your own arrays
--help shows what else can be given, and examples."""
WITHOUT_A_RUN = ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun", "config_name")  # flags


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_job(config: DictConfig) -> float | None:
    """Run one job. Returns what a search maximises, or None."""
    return run_task(config, Launch.current())


def main() -> None:
    """Run the jobs that the command line asks for. Modules of the current folder can be named, such as in
    model._target_=my_networks.small. Ctrl-C ends the program with one line and exit code 130."""
    sys.path.append(os.getcwd())
    try:
        if is_follower():
            follow()
            return
        with leading():
            launch()
    except KeyboardInterrupt as stop:
        if not is_follower():
            print(f"{str(stop).removesuffix(GOES_ON) or 'interrupted'}; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def launch() -> None:
    """Run the jobs, in the only process or in process 0 of several."""
    show_what_can_be_shown()
    options, others = get_args_parser().parse_known_args(sys.argv[1:])
    if refused := not_key_value(sys.argv[1:]):
        sys.exit(f"error: {refused}")
    if any("=" in argument for argument in others if not argument.startswith("-")):
        sys.exit(f"error: {' '.join(others)}: flags, such as --config-dir, go before all key=value or after them")
    overrides = with_implied(options.overrides)
    if not any(getattr(options, flag) for flag in WITHOUT_A_RUN) and not any(
        override.lstrip("+").startswith("experiment=") for override in overrides
    ):
        from experiments.hints import unknown_choices

        sys.exit("\n".join(unknown_choices(sys.argv[1:])) or USAGE)
    if any(a.split("=")[0] in ("--cfg", "-c") for a in sys.argv) and any(a.startswith("setting=") for a in sys.argv):
        sys.exit(
            "error: --cfg shows a single job, before rows are chosen: in place of optimizer=… setting=… give row=…"
        )
    if any(argument.startswith("+") for argument in sys.argv[1:]):
        from experiments.hints import unknown_additions

        if lines := unknown_additions(sys.argv[1:]):
            sys.exit("\n".join(lines))
    report = hydra_utils.run_and_report  # Hydra's, for which it has no hook
    hydra_utils.run_and_report = lambda func: report(lambda: told_by_hints(func))
    try:
        run_job()
    except SystemExit as end:
        if end.code == 1:  # Hydra has printed what is wrong
            from experiments.hints import hints

            for line in hints(sys.argv[1:], end.__context__):
                print(line, file=sys.stderr)
        raise


def told_by_hints(call: Callable[[], Any]) -> Any:
    """Return what a part of Hydra's start returns. Where it does not find a key or a choice, end the program with our
    lines alone, which say more than Hydra's; HYDRA_FULL_ERROR=1 shows the traceback instead."""
    try:
        return call()
    except ConfigCompositionException as error:
        of_names = isinstance(error, MissingConfigException) or isinstance(error.__cause__, OmegaConfBaseException)
        if of_names and os.environ.get("HYDRA_FULL_ERROR") != "1":
            from experiments.hints import hints

            if lines := hints(sys.argv[1:], error):
                sys.exit("\n".join(lines))
        raise
