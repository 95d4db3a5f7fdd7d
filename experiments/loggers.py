"""Loggers: where a run's rows go besides the results store."""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from admm.checkpoints import Row
from experiments.command import INTERRUPTED

log = logging.getLogger(__name__)


class Logger(ABC):
    """Receives a run's rows beside the store. What it raises becomes a warning, and the run goes on without it."""

    @abstractmethod
    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        """Begin a run, or resume one: all of its rows follow, those from before an interruption too.

        Args:
            info: what `run.json` says of the run, such as its `identity`, and `seeds`, one per replica.
            config: the run's configuration, resolved.
        """

    @abstractmethod
    def log(self, rows: list[Row]) -> None:
        """Take the rows of one evaluation or of several, one per replica and evaluation, as `history.csv` has them."""

    @abstractmethod
    def close(self, exit_code: int) -> None:
        """End the run. The exit code is 0 if its result is in the store, and 130 after Ctrl-C."""


class NoLogger(Logger):
    """A logger that does nothing."""

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None: ...

    def log(self, rows: list[Row]) -> None: ...

    def close(self, exit_code: int) -> None: ...


@dataclass
class Guarded(Logger):
    """A logger whose failures are warnings: after one it gets no more rows, and the run goes on without it.

    As a context it is closed at the end, with the exit code of what has happened in it.
    """

    logger: Logger
    is_open: bool = field(default=False, init=False)
    has_failed: bool = field(default=False, init=False)

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        self.is_open = True
        self._call(self.logger.open, info, config)

    def log(self, rows: list[Row]) -> None:
        if not self.has_failed:
            self._call(self.logger.log, rows)

    def close(self, exit_code: int) -> None:
        if self.is_open:
            self._call(self.logger.close, exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else INTERRUPTED if kind is KeyboardInterrupt else 1)

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except (Exception, SystemExit) as error:
            self.has_failed = True
            name = f"{type(self.logger).__name__}.{method.__name__}"
            log.warning("%s failed, the run goes on without it: %s: %s", name, type(error).__name__, error)


@dataclass
class WandbLogger(Logger):
    """Weights & Biases: one run per replica, grouped by experiment and optimizer. `mode` offline needs no account.

    A run is called by its identity and seed. When it is resumed, all of its rows are sent again, in the place of those
    that the interrupted run has left. Raises ImportError without the package.
    """

    project: str
    mode: str
    dir: str
    runs: dict[int, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ImportError("logger=wandb needs Weights & Biases: pip install wandb") from None

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        import wandb

        for replica, seed in enumerate(info["seeds"]):
            name = f"{info['identity']}-{seed}"
            for left in Path(self.dir).glob(f"wandb/offline-run-*-{name}"):
                shutil.rmtree(left)
            self.runs[replica] = wandb.init(
                id=name,
                project=self.project,
                mode=self.mode,  # type: ignore[arg-type]
                dir=self.dir,
                group=f"{info['experiment']}/{info['method']}",
                name=f"{info['method']}-{info['setting']}-seed{seed}",
                config=config | {"seed": seed, "identity": info["identity"]},
                reinit="create_new",
            )

    def log(self, rows: list[Row]) -> None:
        for row in rows:
            self.runs[int(row["replica"])].log(row, step=int(row["iteration"]))

    def close(self, exit_code: int) -> None:
        for run in self.runs.values():
            run.finish(exit_code)
