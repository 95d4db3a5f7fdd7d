"""The task of most experiments: train a classifier, keep what was measured in the store."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from joblib import cpu_count, effective_n_jobs
from omegaconf import DictConfig, ListConfig, OmegaConf

from admm.blocks import Execution
from admm.data import Dataset, load
from admm.files import whole
from admm.losses import one_hot
from admm.optimizers import Problem
from admm.training import History, Row, train
from experiments.failures import TOLD, BadInput, in_words
from experiments.loggers import Guarded, Logger, NoLogger
from experiments.progress import RunProgress
from experiments.provenance import provenance
from experiments.store import (
    LEFT,
    NEUTRAL,
    Run,
    Slot,
    identity,
    mean_score,
    row_identity,
    runs_named,
)

log = logging.getLogger(__name__)
CONF = Path(__file__).parents[1] / "conf"
TASK = "experiments.classification.run"
ROW_NAMES = ("experiment", "optimizer", "setting")  # overrides that choose a row of an experiment
load_once = lru_cache(maxsize=1)(load)  # the runs of a launch share their data
PRECISIONS = ("fp32", "tf32", "bf16")
THREADS = torch.get_num_threads()  # of a job that does not say how many
NO_LOGGER = NoLogger()
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Job:
    """A run that was asked for: its data, its place in a store, and what its `run.json` says.

    joined: finished runs that differ in their seeds alone, with others of those that were asked for.
    """

    dataset: Any  # with its `sha256`
    slot: Slot
    info: dict[str, Any]
    config: dict[str, Any]
    joined: Sequence[Run] = ()


def run(config: DictConfig) -> float | None:
    """Train and evaluate, unless it has been done. Returns the score of the seeds asked for, for a search."""
    return mean_score(run_once(config, execute), config.seeds)


def run_once(
    config: DictConfig, make: Callable[[DictConfig, Job], Run], load: Callable[..., Any] = load_once
) -> list[Run]:
    """Find or `make` the run that one job of a launch asks for; `load` as in `find_job`. Returns it after those that
    join it.

    A run that another process is making is waited for. But in a grid there is none at first: the launch goes on with
    its other jobs, and comes back to it at the end (`experiments.report.Report`).

    Raises BadInput, or another error whose message is for the user (`experiments.failures`).
    """
    with bad_input_in_words():
        job = find_job(config, HydraConfig.get().runtime.choices["optimizer"], load)
    left = Path(HydraConfig.get().runtime.output_dir) / LEFT
    of_a_grid = HydraConfig.get().mode == RunMode.MULTIRUN and "BasicSweeper" in HydraConfig.get().sweeper._target_
    with job.slot.lock(wait=left.exists() or not of_a_grid) as held:
        if not held:
            log.info("%s is being made by another process: left to it", job.slot.name)
            left.touch()
            return []
        finished = job.slot.finished()
        if finished is not None and not config.force:
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
    with whole(Path(HydraConfig.get().runtime.output_dir) / "runs.txt", "the note of finished runs") as note:
        note.write_text("\n".join(str(run.folder.absolute()) for run in runs))


def find_job(config: DictConfig, method: str, load: Callable[..., Any] = load_once) -> Job:
    """Check the configuration of an optimizer, `method`, load the data set, and find the run's place.

    Of a classifier, the run is of those seeds alone that no finished run of the same row has; if there is none, it is
    the newest of these runs. load: of `config.dataset`, a device and a dtype, the data, with their `sha256`. Raises
    ValueError or DatasetError.
    """
    check(config)
    if "optuna" in HydraConfig.get().sweeper._target_ and not config.dataset.holdout:
        raise ValueError("dataset.holdout: with 0 a search would choose by the test set; take 10000 or so")
    experiment = HydraConfig.get().runtime.choices["experiment"]
    overrides = [override for override in HydraConfig.get().overrides.task if not chooses_only(override)]
    settings = CONF / f"settings/{config.setting}/{experiment}_{method}.yaml"
    by_seed, of_row = config.task == TASK, seeds_of_row(experiment, settings)
    if by_seed and set(config.seeds) <= set(of_row):
        overrides = [override for override in overrides if not override.startswith("seeds=")]
    own: Any = OmegaConf.load(CONF / f"setting/{config.setting}.yaml")
    setting = config.setting if settings.exists() or "model" in own else "default"  # a rank is a row of its own
    if setting == "default" and "defaults" in own:
        overrides.append(f"setting={config.setting}")  # it changes a group, but is not a row of this experiment
    check_groups(overrides, settings)
    device = ready_device(config)
    dataset = load(**config.dataset, device=device, dtype=DTYPES[config.dtype])
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    root, name = Path(config.outputs if overrides else config.results), f"{method}-{setting}"
    there: list[Run] = []
    if by_seed and not config.force:
        row = row_identity(plain, dataset.sha256)
        same = runs_named(root / "runs" / experiment, name)
        there = [run for run in same if not run.seeds.isdisjoint(config.seeds) and run.row == row]
        missing = [seed for seed in config.seeds if not any(seed in run.seeds for run in there)]
        plain["seeds"] = missing or there[-1].info["seeds"]
    slot = Slot(root, experiment, name, identity(plain, dataset.sha256))
    info = {
        "experiment": experiment,
        "method": method,
        "setting": setting,
        "note": config.note,
        "overrides": overrides,
        "identity": slot.identity,
        "seeds": plain["seeds"],
        "of_seeds": len(of_row),
        "iterations": config.iterations,
        "dataset": {key: config.dataset[key] for key in ("name", "holdout")} | {"sha256": dataset.sha256},
    }
    return Job(dataset, slot, info | provenance(device), plain, [run for run in there if run.folder != slot.folder])


def seeds_of_row(experiment: str, settings: Path) -> list[int]:
    """The seeds of an experiment as committed, with the settings of one of its rows."""
    files = (
        OmegaConf.load(CONF / "config.yaml"),
        inherited(CONF / f"experiment/{experiment}.yaml"),
        inherited(settings),
    )
    return list(OmegaConf.merge(*files).seeds)


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
    with bad_input_in_words():
        problem = build_problem(config, job.dataset)
    with logger_of(config) as logger:  # closed when the result is in its place
        _, history = trained(config, job, problem, (job.dataset.x_test, job.dataset.y_test), logger=logger)
        return job.slot.complete(job.config, history.rows, job.info | ended(history))


def logger_of(config: DictConfig) -> Guarded:
    """The configuration's. Raises BadInput."""
    with bad_input_in_words():
        return Guarded(instantiate(config.logger))


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
    with bad_input_in_words(), one_sample_in_words():
        optimizer = instantiate(config.optimizer, _convert_="all")
        if not hasattr(optimizer, "init"):
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
    note = slot.partial / "started.json"
    if slot.checkpoint.exists():
        log.info("resuming from %s", slot.checkpoint)
    if slot.checkpoint.exists() or (slot.partial / "probes.jsonl").exists():
        started = json.loads(note.read_text())
        for key in ("commit", "versions", "machine"):
            if started[key] != info[key]:
                log.warning("%s: begun with %s %s, resumed with %s", slot.name, key, started[key], info[key])
    with whole(note, "the note of the run's start") as part:
        part.write_text(json.dumps(info))


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


def check(config: DictConfig) -> None:
    """Raises ValueError that names the key of a value that no run can have."""
    for key in ("iterations", "evaluate_every", "threads"):
        if (key, config[key]) != ("threads", None) and not (isinstance(config[key], int) and config[key] > 0):
            raise ValueError(f"{key}: {config[key]!r} is not a whole number from 1 up")
    seeds = config.seeds
    if not isinstance(seeds, ListConfig) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"seeds: {seeds!r} is not a list of whole numbers from 0 up, such as [0, 1, 2, 3, 4]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: {seeds!r} holds a seed twice")
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision: {config.precision!r} is not one of {', '.join(PRECISIONS)}")
    if config.precision == "bf16" and config.dtype != "float32":
        raise ValueError(f"precision: bf16 needs dtype=float32, not {config.dtype}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: {config.dtype!r} is not one of {', '.join(DTYPES)}")
    if missing := {"name", "holdout"} - set(config.dataset):
        raise ValueError(f"dataset: its file in conf/dataset has no {' and no '.join(sorted(missing))}; see mnist.yaml")


def check_groups(overrides: Sequence[str], settings: Path) -> None:
    """Raises ValueError where a group of the command line (init=uniform) would be changed into another one by the
    experiment's settings, which are composed after it."""
    chosen = inherited(settings)
    for group, _, option in (override.partition("=") for override in overrides):
        own = CONF / group / f"{option}.yaml"
        if own.exists() and group in chosen:
            foreign = {key for key in chosen[group] if key not in OmegaConf.load(own) or key in ("name", "_target_")}
            if foreign:
                raise ValueError(
                    f"{group}={option}: conf/settings/{settings.parent.name}/{settings.name} sets {group}."
                    f"{f', {group}.'.join(sorted(foreign))}; override these, or take setting=default"
                )


def inherited(file: Path) -> Any:
    """The content of a file of settings or of an experiment, if it exists, on that of the files of its kind in its
    defaults list."""
    own: Any = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    names = [name for name in own.pop("defaults", []) if isinstance(name, str)]  # not the choices of other groups
    places = [CONF / name[1:] if name.startswith("/") else file.parent / name for name in names]
    return OmegaConf.merge(*(inherited(place.with_name(f"{place.name}.yaml")) for place in places), own)


def chooses_only(override: str) -> bool:
    """Whether an override of the command line leaves the numbers of an experiment's row as they are."""
    key = override.lstrip("+~").split("=")[0]
    return key in ROW_NAMES or any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


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
def bad_input_in_words() -> Iterator[None]:
    """Raises BadInput for an error that bad input raises, and for any of a class or function of the configuration."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(str(error) or repr(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, ImportError, *TOLD)) and str(cause):
            raise BadInput(str(cause)) from error
        place = str(error).splitlines()[0]  # "Error in call to target 'torch.nn.Linear':"
        raise BadInput(f"{place} {in_words(cause)}; hydra.verbose=true shows where") from error
