"""Where a run's rows go besides the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


class Logger(Protocol):
    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        """A run starts, or is resumed: all of its rows will follow."""

    def log(self, rows: list[dict[str, float]]) -> None:
        """The rows of one evaluation or several."""

    def close(self) -> None:
        """The run has ended."""


class NoLogger:
    """The store alone."""

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None: ...

    def log(self, rows: list[dict[str, float]]) -> None: ...

    def close(self) -> None: ...


@dataclass
class WandbLogger:
    """Weights & Biases: one run a replica, grouped by experiment and optimizer. `mode` offline needs no account."""

    project: str
    mode: str
    dir: str
    runs: dict[int, Any] = field(default_factory=dict, init=False)

    def open(self, info: dict[str, Any], config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError("logger=wandb needs Weights & Biases: pip install wandb") from None

        for replica, seed in enumerate(info["seeds"]):
            self.runs[replica] = wandb.init(
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

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()
