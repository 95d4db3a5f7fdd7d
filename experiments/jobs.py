"""From a job of a launch to a run in the store: find the run's place, reuse what is there, make what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from admm.files import atomic_write
from experiments.checks import DTYPES, TASK, check, check_parallel, check_row, check_search, report_node
from experiments.device import denormals_flushed, ready_device
from experiments.errors import user_errors
from experiments.identity import SCHEMA, choices_of, identity
from experiments.implied import as_given
from experiments.launch import Launch
from experiments.overrides import changes_row, key_of
from experiments.provenance import changed_sources, first_few, own_code, provenance, sources_changed_since
from experiments.records import kind_of
from experiments.reports.base import note_report
from experiments.rows import CONF
from experiments.store import LEFT, Run, Slot, runs_of_row, warn_of_former_runs

log = logging.getLogger(__name__)


def load_dataset(_target_: str = "admm.data.load", **options: Any) -> Any:
    """Return the data set that a group `dataset` of a configuration describes, by the function that it names."""
    return get_method(_target_)(**options)


load_once = lru_cache(maxsize=1)(load_dataset)  # the runs of a launch share their data


def options_of(dataset: DictConfig) -> dict[str, Any]:
    """Return the keys of a group `dataset` as a cache can keep them: lists are tuples."""
    plain: dict[str, Any] = OmegaConf.to_container(dataset, resolve=True)  # type: ignore[assignment]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


@dataclass(frozen=True)
class Job:
    """A run that is to be made: its data, its place in a store, its configuration, and what its `run.json` says.

    reused: finished runs of the same row that have some of the seeds asked for. rerun: whether the run is finished and
    is made again.
    """

    dataset: Any  # with its `sha256`
    slot: Slot
    info: dict[str, Any]
    config: dict[str, Any]
    reused: Sequence[Run] = ()
    rerun: bool = False


@denormals_flushed()
def run_once(
    config: DictConfig,
    launch: Launch,
    make: Callable[[DictConfig, Job], Run],
    load: Callable[..., Any] = load_once,
) -> list[Run]:
    """Find or `make` the run that one job of a launch asks for. Returns the runs that are reused, then this run.

    If another process is making the run, the job waits for it. In a grid it does not wait, and returns no runs: the
    launch goes on with its other jobs, and comes back at its end (`experiments.launching.leftovers`).

    Args:
        make: Called with the configuration and the job; puts the run into the store and returns it.
        load: As in `find_job`.

    Raises BadInput, or another error whose message is for the user (`experiments.errors`).
    """
    with user_errors(config):
        job = find_job(config, launch, load)
    left = launch.output_dir / LEFT
    with job.slot.lock(wait=left.exists() or not launch.is_grid) as held:
        if not held:
            log.info("%s is being made by another process: left to it", job.slot.name)
            left.touch()
            return []
        finished = job.slot.finished()
        if finished is not None and not job.rerun:
            log.info("%s is there already, made by %s: %s", job.slot.name, finished.record.commit, finished.folder)
        else:
            if finished is None:
                log.info("%s: seeds %s are not in the store, and are made now", job.slot.name, job.info["seeds"])
            finished = make(config, job)
    runs = [*job.reused, finished]
    record_in_launch(runs, launch, config)
    supersede(job, config)
    return runs


def record_in_launch(runs: Sequence[Run], launch: Launch, config: DictConfig) -> None:
    """Note finished runs in Hydra's folder, for the report at the end of the launch, and beside them which report an
    experiment of the user's declares. Raises WriteError."""
    is_own = not launch.experiment_file.is_relative_to(CONF)
    note_report(runs[-1], report_node(config) if is_own else None)
    with atomic_write(launch.output_dir / "runs.txt", "the note of finished runs") as note:
        note.write_text("\n".join(str(run.folder.absolute()) for run in runs), encoding="utf-8")


def supersede(job: Job, config: DictConfig) -> None:
    """Move the runs that a committed row's run replaces out of the results store. Raises WriteError."""
    if job.slot.root == Path(config.results) and not job.info["overrides"]:
        job.slot.supersede(Path(config.outputs) / "superseded" / job.slot.experiment)


def find_job(config: DictConfig, launch: Launch, load: Callable[..., Any] = load_once) -> Job:
    """Check a job's configuration, load the data set, and find the run's place.

    A classifier's run has only the seeds that no finished run of the same row has. If all seeds are finished, the job
    is that of the newest such run.

    Args:
        load: Called with `**config.dataset`, a device and a dtype; returns the data with their `sha256`.

    Raises:
        ValueError: The configuration or the launch asks for what cannot be done.
        DatasetError: The data set cannot be loaded.
    """
    check_job(config, launch)
    device = ready_device(config, launch.workers)
    dataset = load(**options_of(config.dataset), device=device, dtype=DTYPES[config.dtype])
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    origin = provenance(device, plain)
    if code := own_code(origin["sources"]):
        plain["own_code"] = code  # part of the identity
    overrides, by_seed = changing_overrides(config, launch), config.task == TASK
    root = Path(config.results if launch.is_committed and not overrides else config.outputs)
    sha256, choices = dataset.sha256, choices_of(launch)
    slot = Slot(root, launch.experiment, f"{launch.method}-{launch.setting}", identity(plain, choices, sha256))
    warn_of_former_runs(slot.folder.parent)
    found = runs_of_row(slot, plain, choices, sha256) if by_seed else finished_in(slot)
    there = [] if config.force else [other for other in found if is_reusable(other, origin, config.other_code)]
    if by_seed and not config.force:
        plain["seeds"] = seeds_to_run(config.seeds, there)
        slot = replace(slot, identity=identity(plain, choices, sha256))
    run = Run(slot.folder)
    info = record(config, launch, overrides, plain["seeds"], slot, sha256) | origin
    reused = [other for other in there if other != run]
    return Job(dataset, slot, info, plain, reused, rerun=run in found and run not in there)


def finished_in(slot: Slot) -> list[Run]:
    """Return a list of the finished run of a place, empty if there is none."""
    return [Run(slot.folder)] if slot.folder.exists() else []


def check_job(config: DictConfig, launch: Launch) -> None:
    """Raises ValueError or BadInput for a configuration or a launch that no run can have."""
    check(config)
    check_row(config, launch)
    check_parallel(config, launch)
    check_search(launch.is_search, config.dataset.holdout)


def changing_overrides(config: DictConfig, launch: Launch) -> list[str]:
    """Return the overrides that change a run's numbers, so that it is not the committed row's. A classifier's `seeds`
    change nothing if they are among the committed ones."""
    changing = [override for override in as_given(launch.overrides) if changes_row(override)]
    if config.task == TASK and set(config.seeds) <= set(config.committed_seeds):
        return [override for override in changing if key_of(override) != "seeds"]
    return changing


def seeds_to_run(asked: Sequence[int], there: Sequence[Run]) -> list[int]:
    """Return the seeds that none of the runs has; if there are none, the last run's."""
    missing = [seed for seed in asked if not any(seed in run.seeds for run in there)]
    return missing or list(there[-1].record.seeds)


def record(
    config: DictConfig, launch: Launch, overrides: list[str], seeds: list[int], slot: Slot, sha256: str
) -> dict[str, Any]:
    """Return what `run.json` says of what is run."""
    return {
        "schema": SCHEMA,
        **choices_of(launch),
        "note": config.note,
        "overrides": overrides,
        "identity": slot.identity,
        "seeds": seeds,
        "of_seeds": len(config.committed_seeds),
        "iterations": config.iterations,
        "kind": kind_of(config),
        "dataset": {key: config.dataset[key] for key in ("name", "holdout")} | {"sha256": sha256},
    }


def is_reusable(run: Run, origin: dict[str, Any], other_code: str) -> bool:
    """Return whether a finished run is kept, as `other_code` of the configuration says. Logs which files have changed.

    A run from before sources were hashed is always kept: its files are compared as far as git knows them. origin: the
    `provenance` of the run to be made. Raises ValueError for changed files where `other_code` is refuse.
    """
    record, is_hashed = run.record, bool(run.record.sources)
    names: list[str] = list(origin["sources"])
    files = (
        changed_sources(record.sources, origin["sources"]) if is_hashed else sources_changed_since(record.commit, names)
    )
    if files is None:
        log.info("%s: the sources of %s, which made it, were not kept", run.folder.name, record.commit)
    if not files:
        return True
    commits = f", {record.commit}, now {origin['commit']}" if record.commit != origin["commit"] else ""
    made = f"made by other code{commits}: {first_few(files)}"
    if is_hashed and other_code == "refuse":
        raise ValueError(f"other_code=refuse: {run.folder.name}: {made}")
    is_kept = not (is_hashed and other_code == "rerun")
    what = f"kept and used, though {made}; force=true makes it again" if is_kept else f"{made}; it is made again"
    level = logging.WARNING if is_hashed else logging.INFO  # the oldest can be told by git alone, and are always kept
    log.log(level, "%s: %s", run.folder.name, what)
    return is_kept
