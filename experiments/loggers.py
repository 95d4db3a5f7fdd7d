"""Where a run's rows go besides the store."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

log = logging.getLogger(__name__)
INTERRUPTED = 130  # a program's exit code after Ctrl-C


class Logger(Protocol):
    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        """A run starts, or is resumed: all of its rows will follow."""

    def log(self, rows: list[dict[str, float]]) -> None:
        """The rows of one evaluation or several."""

    def close(self, exit_code: int) -> None:
        """The run has ended: 0 if its result is in the store."""


class NoLogger:
    """The store alone."""

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None: ...

    def log(self, rows: list[dict[str, float]]) -> None: ...

    def close(self, exit_code: int) -> None: ...


@dataclass
class Guarded:
    """A logger whose failures are warnings: after one it gets no more rows, and the run goes on without it.

    As a context it is closed at the end, with the exit code of what has happened in it.
    """

    logger: Logger
    is_open: bool = field(default=False, init=False)
    has_failed: bool = field(default=False, init=False)

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        self.is_open = True
        self._call(self.logger.open, info, config)

    def log(self, rows: list[dict[str, float]]) -> None:
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
class WandbLogger:
    """Weights & Biases: one run per replica, grouped by experiment and optimizer. `mode` offline needs no account.

    A run is called by its identity and seed, and all of its rows are sent when it is resumed: they take the place of
    those that the interrupted run has left. Raises ImportError without the package.
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

    def log(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self.runs[int(row["replica"])].log(row, step=int(row["iteration"]))

    def close(self, exit_code: int) -> None:
        for run in self.runs.values():
            run.finish(exit_code)
