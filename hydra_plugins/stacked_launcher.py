"""hydra/launcher=stacked: cells of a sweep that differ in numbers alone are trained as one stacked run."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, configure_log, setup_globals
from omegaconf import DictConfig, open_dict

from experiments.launching.stacking import train_stack, train_stacks


class StackedLauncher(BasicLauncher):
    """Hydra's own launcher, after all that can be stacked has been: it finds those runs finished."""

    def __init__(self, replicas: int | None, memory: float | None) -> None:
        """replicas, memory: as `experiments.launching.stacking.train_stacks` takes them."""
        super().__init__()
        self.replicas, self.memory = replicas, memory

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        cells = [self._cell(overrides, number) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        unfinished = train_stacks(cells, self.replicas, self.memory)
        jobs = super().launch(job_overrides, initial_job_idx)
        for stack in unfinished:  # other processes are at them, which may die and leave the stack's checkpoint
            train_stack(stack, wait=True)
        return jobs

    def _cell(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The configuration of a job of the sweep."""
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.runtime.output_dir = f"{config.hydra.sweep.dir}/{config.hydra.sweep.subdir}"
        return config
