"""The task of most experiments: train a classifier, keep what was measured in the store."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from joblib import cpu_count, effective_n_jobs
from omegaconf import DictConfig, OmegaConf

from admm.checkpoints import History, Row
from admm.data import Dataset, load
from admm.files import atomic_write
from admm.layers import Execution
from admm.losses import one_hot
from admm.optimizers import Optimizer, Problem
from admm.training import train
from experiments.checks import DTYPES, check, check_search
from experiments.identity import SCHEMA, identity
from experiments.launching.failures import TOLD, BadInput, in_words
from experiments.loggers import Guarded, Logger, NoLogger
from experiments.messages import with_key_path
from experiments.progress import RunProgress
from experiments.provenance import changed, changed_since, provenance
from experiments.records import kind_of
from experiments.reports.scores import mean_score
from experiments.rows import check_place, row_of
from experiments.store import LEFT, PROBES, Run, Slot, runs_of_row

log = logging.getLogger(__name__)
TASK = "experiments.classification.run"
load_once = lru_cache(maxsize=1)(load)  # the runs of a launch share their data
THREADS = torch.get_num_threads()  # of a job that does not say how many
NO_LOGGER = NoLogger()
NO_CONFIG = OmegaConf.create()
LISTED = 6  # sources that a message names


@dataclass(frozen=True)
class Job:
    """A run that was asked for: its data, its place in a store, and what its `run.json` says.

    joined: finished runs that differ in their seeds alone, with others of those that were asked for. again: the run
    is finished, and is to be made once more.
    """

    dataset: Any  # with its `sha256`
    slot: Slot
    info: dict[str, Any]
    config: dict[str, Any]
    joined: Sequence[Run] = ()
    again: bool = False


def run(config: DictConfig) -> float | None:
    """Train and evaluate, unless it has been done. Returns the score of the seeds asked for, for a search."""
    return mean_score(run_once(config, execute), config.seeds)


def run_once(
    config: DictConfig, make: Callable[[DictConfig, Job], Run], load: Callable[..., Any] = load_once
) -> list[Run]:
    """Find or `make` the run that one job of a launch asks for; `load` as in `find_job`. Returns it after those that
    join it.

    A run that another process is making is waited for. But in a grid there is none at first: the launch goes on with
    its other jobs, and comes back to it at the end (`experiments.reports.callback.Report`).

    Raises BadInput, or another error whose message is for the user (`experiments.launching.failures`).
    """
    with bad_input_in_words(config):
        job = find_job(config, HydraConfig.get().runtime.choices["optimizer"], load)
    left = Path(HydraConfig.get().runtime.output_dir) / LEFT
    of_a_grid = HydraConfig.get().mode == RunMode.MULTIRUN and "BasicSweeper" in HydraConfig.get().sweeper._target_
    with job.slot.lock(wait=left.exists() or not of_a_grid) as held:
        if not held:
            log.info("%s is being made by another process: left to it", job.slot.name)
            left.touch()
            return []
        finished = job.slot.finished()
        if finished is not None and not job.again:
            log.info("%s is there already, made by %s: %s", job.slot.name, finished.info["commit"], finished.folder)
        else:
            finished = make(config, job)
    runs = [*job.joined, finished]
    report_to_launch(runs)
    if not job.info["overrides"]:
        job.slot.supersede(Path(config.outputs) / "superseded" / job.slot.experiment)
    return runs


def report_to_launch(runs: Sequence[Run]) -> None:
    """Leave a note of finished runs in Hydra's folder, for the report at the end of the launch."""
    with atomic_write(Path(HydraConfig.get().runtime.output_dir) / "runs.txt", "the note of finished runs") as note:
        note.write_text("\n".join(str(run.folder.absolute()) for run in runs), encoding="utf-8")


def find_job(config: DictConfig, method: str, load: Callable[..., Any] = load_once) -> Job:
    """Check the configuration of an optimizer, `method`, load the data set, and find the run's place.

    Of a classifier, the run is of those seeds alone that no finished run of the same row has; if there is none, it is
    the newest of these runs. load: of `config.dataset`, a device and a dtype, the data, with their `sha256`. Raises
    ValueError or DatasetError.
    """
    check_place()
    check(config)
    check_search(HydraConfig.get().sweeper, config.dataset.holdout)
    by_seed = config.task == TASK
    row = row_of(config, method, by_seed)
    device = ready_device(config)
    dataset = load(**config.dataset, device=device, dtype=DTYPES[config.dtype])
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    root, origin = Path(config.outputs if row.overrides else config.results), provenance(device, plain)
    choices = {"experiment": row.experiment, "method": method, "setting": row.setting}
    data = {key: config.dataset[key] for key in ("name", "holdout")} | {"sha256": dataset.sha256}
    slot = Slot(root, row.experiment, f"{method}-{row.setting}", identity(plain, choices, dataset.sha256))
    found = [Run(slot.folder)] if slot.folder.exists() else []
    if by_seed:
        found = runs_of_row(slot, plain, choices, dataset.sha256)
    there = [] if config.force else [run for run in found if stands(run, origin, config.other_code)]
    if by_seed and not config.force:
        missing = [seed for seed in config.seeds if not any(seed in run.seeds for run in there)]
        plain["seeds"] = missing or there[-1].info["seeds"]
        slot = replace(slot, identity=identity(plain, choices, dataset.sha256))
    info = {
        "schema": SCHEMA,
        **choices,
        "note": config.note,
        "overrides": row.overrides,
        "identity": slot.identity,
        "seeds": plain["seeds"],
        "of_seeds": len(row.seeds),
        "iterations": config.iterations,
        "kind": kind_of(plain),
        "dataset": data,
    }
    own = Run(slot.folder)
    joined = [run for run in there if run != own]
    return Job(dataset, slot, info | origin, plain, joined, again=own in found and own not in there)


def stands(run: Run, origin: dict[str, Any], other_code: str) -> bool:
    """Whether a finished run is kept, as `other_code` of the configuration says; logs which files have changed since.

    A run from before sources were hashed is always kept: its files are compared as far as git knows them. origin: the
    `provenance` of the run asked for. Raises ValueError for changed files where `other_code` is refuse.
    """
    made = run.info
    names, is_hashed = list(origin["sources"]), "sources" in made
    files = changed(made["sources"], origin["sources"]) if is_hashed else changed_since(made["commit"], names)
    if files is None:
        log.info("%s: the sources of %s, which made it, were not kept", run.folder.name, made["commit"])
    if not files:
        return True
    told = f"{run.folder.name}: made by other code, {made['commit']}, now {origin['commit']}: {listed(files)}"
    if is_hashed and other_code == "refuse":
        raise ValueError(f"other_code=refuse: {told}")
    is_kept = not (is_hashed and other_code == "rerun")
    level = logging.WARNING if is_hashed else logging.INFO  # the oldest can be told by git alone, and are always kept
    log.log(level, "%s; %s", told, "kept, force=true makes it again" if is_kept else "it is made again")
    return is_kept


def listed(files: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return f"{', '.join(files[:LISTED])}{more}"


def ready_device(config: DictConfig) -> torch.device:
    """The device, with as many threads as the job is to have. Raises ValueError where it lacks the precision."""
    device = find_device(config.device)
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is for GPUs; this is {device}")
    if config.precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning("precision: this processor emulates bf16, which takes several times as long as fp32")
    torch.set_num_threads(config.threads or threads_of_a_worker() or THREADS)
    return device


def threads_of_a_worker() -> int | None:
    """With hydra/launcher=joblib its share of the processor; None elsewhere."""
    workers = HydraConfig.get().launcher.get("n_jobs")
    return None if workers is None else max(1, cpu_count() // effective_n_jobs(workers))


def execute(config: DictConfig, job: Job) -> Run:
    """Train, from the last checkpoint if there is one, and put the result into the store."""
    with bad_input_in_words(config):
        problem = build_problem(config, job.dataset)
    with logger_of(config) as logger:  # closed when the result is in its place
        _, history = trained(config, job, problem, (job.dataset.x_test, job.dataset.y_test), logger=logger)
        return job.slot.complete(job.config, history.rows, job.info | ended(history))


def logger_of(config: DictConfig) -> Guarded:
    """The configuration's; one that cannot be made, such as for want of a connection, is a warning. Raises BadInput for
    a wrong key or a missing package."""
    with bad_input_in_words(config):
        try:
            return Guarded(instantiate(config.logger))
        except InstantiationException as error:
            if error.__cause__ is None or isinstance(error.__cause__, ImportError | TypeError | ValueError):
                raise
            log.warning("%s failed, the run goes on without it: %r", config.logger._target_, error.__cause__)
            return Guarded(NO_LOGGER)


def trained(
    config: DictConfig,
    job: Job,
    problem: Problem,
    test: Any,
    shown: str = "test_accuracy",
    logger: Logger = NO_LOGGER,
    names: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Any, History]:
    """The optimizer's state at the end and the history, from the last checkpoint if there is one.

    shown: the quantity that the progress shows, in percent. logger: is opened, and left open. names: of the replicas,
    None for their seeds. test, options: as `admm.training.train` takes them. Raises BadInput, and what `train` does.
    """
    slot, info, seeds = job.slot, job.info, job.info["seeds"]
    names = names or [f"seed {seed}" for seed in seeds]
    with bad_input_in_words(config, "optimizer"), one_sample_in_words():
        optimizer = instantiate(config.optimizer, _convert_="all")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: {info['method']} trains nothing; it is for experiment=lfw_proxy")
        state = optimizer.init(problem, seeds)
    logger.open(info, job.config)
    note_start(slot, info)
    reported: set[int] = set()

    def observe(rows: list[Row], history: History) -> None:
        logger.log(rows)
        for replica in history.diverged.keys() - reported:
            iteration = history.diverged[replica]
            log.warning("%s: %s diverged (not finite after iteration %d)", slot.name, names[replica], iteration)
            reported.add(replica)
        if rows:
            last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
            mean = sum(row[shown] for row in last) / len(last)
            progress.update(int(last[0]["iteration"]), mean, history.seconds)

    shows = RunProgress(slot.name, config.iterations, config.progress, shown.replace("_", " "))
    with one_sample_in_words(), shows as progress:
        history = train(
            problem,
            optimizer,
            state,
            config.iterations,
            test,
            config.evaluate_every,
            slot.checkpoint,
            config.checkpoint_seconds,
            observe,
            **options,
        )
    return state, history


def ended(history: History) -> dict[str, Any]:
    """What `run.json` says of the end; `diverged` by replica."""
    return {"seconds": round(history.seconds, 3), "diverged": history.diverged}


def note_start(slot: Slot, info: dict[str, Any]) -> None:
    """Write down what begins a run; warn if a run is resumed by another version of the code or libraries."""
    note = slot.start_note
    if slot.checkpoint.exists():
        log.info("resuming from %s", slot.checkpoint)
    if slot.checkpoint.exists() or slot.journal(PROBES).exists():
        started = json.loads(note.read_text(encoding="utf-8"))
        for key in ("commit", "versions", "machine"):
            if started[key] != info[key]:
                log.warning("%s: begun with %s %s, resumed with %s", slot.name, key, started[key], info[key])
        if "sources" in started and (files := changed(started["sources"], info["sources"])):
            log.warning("%s: begun with other code, resumed with another %s", slot.name, listed(files))
    with atomic_write(note, "the note of the run's start") as part:
        part.write_text(json.dumps(info), encoding="utf-8")


def build_problem(config: DictConfig, dataset: Dataset) -> Problem:
    """The network, its blocks, the loss and the initialisation of a configuration, on a data set."""
    network = instantiate(config.model, input_shape=dataset.input_shape, classes=dataset.classes, _convert_="all")
    return Problem(
        x=dataset.x_train,
        y=one_hot(dataset.y_train, dataset.classes, dataset.x_train),
        blocks=instantiate(config.split, _partial_=True, _convert_="all")(network, execution=execution(config)),
        loss=instantiate(config.loss),
        initialise=instantiate(config.init),
        augmentation=instantiate(config.get("augmentation")),
    )


def execution(config: DictConfig) -> Execution:
    """How blocks are evaluated; sets PyTorch's precision of products on a GPU."""
    precision = config.get("precision")  # a stored configuration has neither the default nor the neutral keys
    how = {key: config[key] for key in ("compile", "channels_last", "recompute") if key in config}
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Execution("bf16" if precision == "bf16" else "fp32", **how)


def find_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({error}); auto, cpu, cuda, cuda:1, …") from None
    return torch.device(name)


@contextmanager
def one_sample_in_words() -> Iterator[None]:
    """Raises BadInput that names the keys where PyTorch cannot normalise a batch of one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BadInput(f"optimizer.batch_size, or slice_size, leaves one sample alone. {error}") from error


@contextmanager
def bad_input_in_words(config: DictConfig = NO_CONFIG, group: str = "") -> Iterator[None]:
    """Raises BadInput for an error that bad input raises, and for any of a class or function of the configuration.

    The message names the key of `config`, which is looked for in `group` first.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(with_key_path(str(error), config, group) or repr(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, ImportError, *TOLD)) and str(cause):
            target = re.search(r"^full_key: (.*)$", str(error), re.MULTILINE)
            raise BadInput(with_key_path(str(cause), config, target[1] if target else group)) from error
        place = str(error).splitlines()[0]  # "Error in call to target 'torch.nn.Linear':"
        raise BadInput(f"{place} {in_words(cause)}; hydra.verbose=true shows where") from error
