"""What Hydra knows of a job besides its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from experiments.identity import NOT_IN_IDENTITY
from experiments.rows import CONF, DEFAULT, Row


@dataclass(frozen=True)
class Launch:
    """The place of a job in its launch: which row of which experiment it makes, and by which means.

    method: the optimizer's name. row: None for the optimizer's own default values. overrides: of the command line, and
    the job's values in a sweep. output_dir: Hydra's folder of the job. conf: folders of configuration. is_grid: whether
    the job is one of a grid, which can go on without it. is_search: whether Optuna chooses its values. workers: jobs
    at a time on this machine, -1 for one per core; None if the launcher does not say. choices: the option chosen in
    each group that may determine numbers.
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
    choices: Mapping[str, str] = field(default_factory=dict)

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
            choices={group: name for group, name in choices.items() if name and decides(group)},
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

    @property
    def experiment_file(self) -> Path:
        """The experiment's file; without a folder if a package has it."""
        file = f"experiment/{self.experiment}.yaml"
        return (folder_of(file, self.conf) or Path()) / file

    @property
    def is_committed(self) -> bool:
        """Whether the suite has all files that the job's numbers come from, and a folder of the user's has none."""
        row = {"row": self.row.name} if self.row else {}
        chosen = {**self.choices, "experiment": self.experiment, "optimizer": self.method, **row}
        files = ["config.yaml", *(f"{group.partition('@')[0]}/{name}.yaml" for group, name in chosen.items())]
        return all(folder_of(file, self.conf) == CONF for file in files)


def decides(group: str) -> bool:
    """Return whether a group of the configuration may determine a run's numbers."""
    return group not in NOT_IN_IDENTITY and not group.startswith("hydra/")


def folder_of(file: str, conf: Sequence[Path]) -> Path | None:
    """Return the folder from which Hydra has read a file: the first of `conf` that has it. None for a package's."""
    return next((folder for folder in conf if (folder / file).is_file()), None)


def conf_folders(hydra: Any) -> tuple[Path, ...]:
    """The folders that Hydra has searched for configuration."""
    return tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file")
