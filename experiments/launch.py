"""What Hydra knows of a job besides its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from experiments.rows import DEFAULT, Row


@dataclass(frozen=True)
class Launch:
    """The place of a job in its launch: which row of which experiment it makes, and by which means.

    method: the optimizer's name. row: None for the optimizer's own default values. overrides: of the command line, and
    the job's values in a sweep. output_dir: Hydra's folder of the job. conf: folders of configuration. is_grid: whether
    the job is one of a grid, which can go on without it. is_search: whether Optuna chooses its values. workers: jobs
    at a time on this machine, -1 for one per core; None if the launcher does not say.
    """

    experiment: str
    method: str
    row: Row | None
    overrides: tuple[str, ...]
    output_dir: Path
    conf: tuple[Path, ...]
    is_grid: bool
    is_search: bool
    workers: int | None

    @classmethod
    def current(cls) -> Launch:
        """Return the launch of the job that runs in this process."""
        return cls.of(HydraConfig.get())

    @classmethod
    def of(cls, hydra: Any) -> Launch:
        """Return the launch that the node `hydra` of a job's configuration describes."""
        choices, sweeper = hydra.runtime.choices, hydra.sweeper._target_
        return cls(
            experiment=choices["experiment"],
            method=choices["optimizer"],
            row=Row(choices["row"]) if choices.get("row") else None,
            overrides=tuple(hydra.overrides.task),
            output_dir=Path(hydra.runtime.output_dir),
            conf=conf_folders(hydra),
            is_grid=hydra.mode == RunMode.MULTIRUN and "BasicSweeper" in sweeper,
            is_search="optuna" in sweeper,
            workers=hydra.launcher.get("n_jobs"),
        )

    @classmethod
    def saved(cls, folder: Path) -> Launch:
        """Return the launch of a former job, read from the `hydra.yaml` that Hydra has written to a folder."""
        config = OmegaConf.create({"hydra": HydraConf})
        with open_dict(config.hydra):
            config.merge_with(OmegaConf.load(folder / "hydra.yaml"))
        return cls.of(config.hydra)

    @property
    def setting(self) -> str:
        """The name of the row's setting."""
        return self.row.setting if self.row else DEFAULT


def conf_folders(hydra: Any) -> tuple[Path, ...]:
    """The folders that Hydra has searched for configuration."""
    return tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file")
