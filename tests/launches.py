"""Launches of the suite: in this process, and such that are cut short."""

import logging
import signal
import subprocess
import time
import warnings
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_method

from experiments import study
from experiments.classification import CONF


def multirun(*overrides: str) -> None:
    """`python run.py -m` with these overrides, without the start of a process; warnings of callbacks are errors."""
    handlers = logging.root.handlers[:]
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    hydra = Hydra.create_main_hydra2("run", create_config_search_path(str(CONF)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Callback")
            hydra.multirun("config", lambda config: get_method(config.task)(config), list(overrides))
    finally:  # as at the end of a process
        GlobalHydra.instance().clear()
        logging.root.handlers = handlers
        while study.held:
            study.held.pop().release()


def kill_when_there(command: list[str], folder: Path, pattern: str) -> None:
    """Start a command, and end it by SIGKILL as soon as a file of that pattern is in the folder."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
