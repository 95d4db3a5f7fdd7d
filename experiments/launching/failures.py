"""Jobs that fail: the other jobs go on, and the launch lists at its end which jobs failed, and why."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from experiments.errors import FOR_USERS, in_words
from experiments.launch import Launch
from experiments.overrides import parse

log = logging.getLogger(__name__)
FAILED = "failed.txt"  # a note in Hydra's folder of a job: why it failed
unfinished_sweep: list[DictConfig] = []  # the configuration of a sweep that has begun and not ended


class JobError(Exception):
    """A job has failed; the message says why. Unlike the error that it stands for, any process can unpickle it."""


def run_task(config: DictConfig, launch: Launch) -> float | None:
    """Run a configuration's task, and return what it returns. Raises JobError where the task would end the program."""
    try:
        return get_method(config.task)(config, launch)  # type: ignore[no-any-return]
    except SystemExit as end:
        raise JobError(f"it ended the program by SystemExit({end.code!r})") from end


@contextmanager
def failures_end_the_program() -> Iterator[None]:
    """End the program with exit code 1 if a callback's method raises an Exception; Hydra would only warn of it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, FOR_USERS):
            traceback.print_exc()
        raise SystemExit(f"error: {in_words(error)}") from error


class Failures(Callback):
    """A job that fails on its own ends the program. In a sweep it leaves a note in its folder; the launch lists these
    notes at its end, after the report, and has exit code 1.

    Hydra's own sweeper, which an error would end, gets None for the job's value; other sweepers count failed jobs.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        unfinished_sweep[:] = [config]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        (folder / FAILED).unlink(missing_ok=True)
        if job_return.status != JobStatus.FAILED:
            return
        error = job_return._return_value  # the property would raise it
        if config.hydra.mode == RunMode.RUN:
            if config.hydra.verbose or not isinstance(error, FOR_USERS):
                traceback.print_exception(error)
            raise SystemExit(f"error: {in_words(error)}")
        note_failure(folder, error, config.hydra.verbose)
        job_return.return_value = JobError(in_words(error))
        if "BasicSweeper" in config.hydra.sweeper._target_:
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    @failures_end_the_program()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        unfinished_sweep.clear()
        if lines := causes_of_failures(config):
            raise SystemExit("\n".join(lines))


def note_failure(folder: Path, error: Exception, verbose: Any) -> None:
    """Log the failure of a sweep's job, and leave a note in the job's folder. Raises OSError."""
    if isinstance(error, FOR_USERS) and not verbose:
        log.error("%s failed; the cause is below, at the launch's end", folder)
    else:
        log.error("%s failed: %s", folder, in_words(error), exc_info=error)
    (folder / FAILED).write_text(in_words(error), encoding="utf-8")


def causes_of_failures(config: DictConfig) -> list[str]:
    """Lines that name the causes of a launch's failed jobs, and for each cause the jobs with their own overrides."""
    launch = Path(config.hydra.sweep.dir)
    fixed = [o for o in parse(config.hydra.overrides.task) if not o.is_sweep_override()]
    common = {f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in fixed}
    jobs: dict[str, list[str]] = {}
    for path in sorted(launch.rglob(FAILED)):
        known = path.parent / ".hydra/overrides.yaml"
        own = [str(o) for o in OmegaConf.load(known) if o not in common] if known.exists() else []
        place = f"    {path.parent}: {' '.join(own)}" if own else f"    {path.parent}"
        jobs.setdefault(path.read_text(encoding="utf-8"), []).append(place)
    if not jobs:
        return []
    number = sum(map(len, jobs.values()))
    lines = [line for cause, places in jobs.items() for line in (f"error: {cause}", *places)]
    total = f"{number} job{'s' if number > 1 else ''} failed, whose logs are in these folders"
    return [*lines, f"{total}. When the cause is mended, the same command makes what is missing."]
