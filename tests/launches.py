"""Launches of the suite: in this process, and as a process of its own, which can be cut short."""

import copy
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from experiments.launching import study
from experiments.rows import CONF
from experiments.run import run_job
from experiments.store import Slot

RUN = Path(__file__).parents[1] / "run.py"
SERVER = multiprocessing.get_context("forkserver")  # whose forks need not import PyTorch again
SERVER.set_forkserver_preload(
    ["experiments.run", "experiments.launching.stacking", "experiments.reports.searches", "sklearn.datasets"]
)


def places(folder: Path) -> list[str]:
    """Overrides that keep a launch's outputs and results in a folder."""
    return [f"outputs={folder}/outputs", f"results={folder}/results"]


def multirun(*overrides: str) -> None:
    """`python run.py -m` with these overrides, without the start of a process."""
    _launch("multirun", overrides)


def single(*overrides: str) -> None:
    """`python run.py hydra.mode=RUN` with these overrides, without the start of a process."""
    _launch("run", ("hydra.mode=RUN", *overrides))


def _launch(mode: str, overrides: Sequence[str]) -> None:
    """Warnings of callbacks are errors."""
    handlers, level = logging.root.handlers[:], logging.root.level
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    hydra = Hydra.create_main_hydra2("run", create_config_search_path(str(CONF)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Callback")
            getattr(hydra, mode)("config", run_job, list(overrides))
    finally:  # as at the end of a process
        GlobalHydra.instance().clear()
        logging.root.handlers = handlers
        logging.root.setLevel(level)
        while study.study_locks:
            study.study_locks.pop().release()


def _compose_once(self: Any, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
    """Hydra composes the configuration of each job to check it, and again to run it; here the second is a copy."""
    composed: dict[tuple[str, ...], DictConfig] = vars(self).setdefault("composed", {})
    if (key := tuple(sweep_overrides)) not in composed:
        composed[key] = _compose(self, master_config, sweep_overrides)
    return copy.deepcopy(composed[key])


_compose = ConfigLoaderImpl.load_sweep_config
ConfigLoaderImpl.load_sweep_config = _compose_once  # type: ignore[method-assign]


def _read_once(self: FileConfigSource, config_path: str) -> ConfigResult:
    """Hydra reads some thirty files of the suite's configuration for each job; here each is read once."""
    if not self.path.startswith(str(CONF)):
        return _read(self, config_path)
    if (key := (self.path, config_path)) not in _FILES:
        _FILES[key] = _read(self, config_path)
    return copy.deepcopy(_FILES[key])


_FILES: dict[tuple[str, str], ConfigResult] = {}
_read = FileConfigSource.load_config
FileConfigSource.load_config = _read_once  # type: ignore[method-assign]


def _main(command: Sequence[str], folder: Path, printed: str) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell's background job would ignore it
    os.environ.update(COLUMNS="300", WANDB_SILENT="true")
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{printed}/{name}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


def hold(slot: Slot, held: Event) -> None:
    """Hold a run's lock, in a process of its own, until that is killed."""
    with slot.lock():
        held.set()
        time.sleep(600)


class Launch:
    """`python run.py` with these arguments, in a folder."""

    def __init__(self, *arguments: str, script: Path = RUN, folder: Path = RUN.parent) -> None:
        self.command, self.printed = [str(script), *arguments], TemporaryDirectory()
        self.process = SERVER.Process(target=_main, args=(self.command, folder, self.printed.name))
        self.process.start()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its end, and what it printed."""
        self.process.join(300)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError("took more than five minutes")
        with self.printed as folder:
            output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(self.command, self.process.exitcode, output, errors)

    def kill_when_there(self, folder: Path, pattern: str) -> None:
        """End it by SIGKILL as soon as a file of that pattern is in the folder."""
        self.signal_when_there(signal.SIGKILL, folder, pattern)
        self.process.join()
        self.printed.cleanup()

    def signal_when_there(self, number: int, folder: Path, pattern: str) -> None:
        """Send it a signal as soon as a file of that pattern is in the folder."""
        deadline = time.monotonic() + 120
        while not list(folder.glob(pattern)) and time.monotonic() < deadline:
            assert self.process.exitcode is None, "ended before it could be killed"
            time.sleep(0.002)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
