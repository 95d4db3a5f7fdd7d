"""The task of most experiments: train a classifier, keep what was measured in the store."""

from __future__ import annotations

import json
import logging
import math
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
from experiments.provenance import changed, changed_since, provenance
from experiments.store import (
    LEFT,
    NEUTRAL,
    Run,
    Slot,
    identity,
    mean_score,
    runs_of_row,
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
OTHER_CODE = ("keep", "rerun", "refuse")
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
    with whole(Path(HydraConfig.get().runtime.output_dir) / "runs.txt", "the note of finished runs") as note:
        note.write_text("\n".join(str(run.folder.absolute()) for run in runs), encoding="utf-8")


def find_job(config: DictConfig, method: str, load: Callable[..., Any] = load_once) -> Job:
    """Check the configuration of an optimizer, `method`, load the data set, and find the run's place.

    Of a classifier, the run is of those seeds alone that no finished run of the same row has; if there is none, it is
    the newest of these runs. load: of `config.dataset`, a device and a dtype, the data, with their `sha256`. Raises
    ValueError or DatasetError.
    """
    check_place()
    check(config)
    if "optuna" in HydraConfig.get().sweeper._target_ and not config.dataset.holdout:
        raise ValueError("dataset.holdout: with 0 a search would choose by the test set; take 10000 or so")
    choices = HydraConfig.get().runtime.choices
    experiment = choices["experiment"]
    settings = CONF / f"settings/{config.get('setting')}/{experiment}_{method}.yaml"
    check_names(experiment, method, choices.get("setting"), settings)
    setting, own = setting_of_row(config.setting, settings)
    overrides = [override for override in HydraConfig.get().overrides.task if not chooses_only(override)]
    by_seed, of_row = config.task == TASK, seeds_of_row(experiment, settings)
    if by_seed and set(config.seeds) <= set(of_row):
        overrides = [override for override in overrides if not override.startswith("seeds=")]
    if not settings.exists() and "defaults" in own:
        overrides.append(f"setting={config.setting}")  # it changes a group, as init=… of the command line does
    check_groups(overrides, settings)
    device = ready_device(config)
    dataset = load(**config.dataset, device=device, dtype=DTYPES[config.dtype])
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    root, origin = Path(config.outputs if overrides else config.results), provenance(device, plain)
    slot = Slot(root, experiment, f"{method}-{setting}", identity(plain, dataset.sha256))
    found = [Run(slot.folder)] if slot.folder.exists() else []
    if by_seed:
        found = runs_of_row(slot, plain, dataset.sha256)
    there = [] if config.force else [run for run in found if stands(run, origin, config.other_code)]
    if by_seed and not config.force:
        missing = [seed for seed in config.seeds if not any(seed in run.seeds for run in there)]
        plain["seeds"] = missing or there[-1].info["seeds"]
        slot = replace(slot, identity=identity(plain, dataset.sha256))
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
    joined = [run for run in there if run.folder != slot.folder]
    again = any(run.folder == slot.folder for run in found if run not in there)
    return Job(dataset, slot, info | origin, plain, joined, again)


def stands(run: Run, origin: dict[str, Any], other_code: str) -> bool:
    """Whether a finished run is kept, though the code may have changed since, which is told; but of a run from before
    sources were hashed only as far as git knows, and such a one is always kept.

    origin: the `provenance` of the run asked for. other_code: of the configuration. Raises ValueError where it is
    refuse.
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
    log.warning("%s; %s", told, "kept, force=true makes it again" if is_kept else "it is made again")
    return is_kept


def listed(files: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return f"{', '.join(files[:LISTED])}{more}"


def setting_of_row(setting: str, settings: Path) -> tuple[str, Any]:
    """The name of a run's setting, and the content of its file: default, if neither its file in conf/setting nor the
    row's own in conf/settings says anything."""
    file = CONF / f"setting/{setting}.yaml"
    own: Any = OmegaConf.load(file) if file.exists() else OmegaConf.create({"elsewhere": True})  # by --config-dir
    if settings.exists() or setting == "default" or set(own) - {"setting"}:
        return setting, own
    log.warning(
        "setting=%s changes nothing here, as there is no conf/%s: as setting=default", setting, in_conf(settings)
    )
    return "default", own


def in_conf(file: Path) -> str:
    return f"{file.parents[1].name}/{file.parent.name}/{file.name}"


def check_place() -> None:
    """Raises ValueError where this package is a copy without the configuration beside it."""
    if not CONF.is_dir():
        raise ValueError(
            f"{CONF}: there is no such folder, as `experiments` was installed as a copy, whose code may also be older "
            "than the clone's; do pip install -e . there"
        )


def check_names(experiment: str, method: str, setting: str | None, settings: Path) -> None:
    """Raises ValueError for names that would be taken for others'."""
    for key, name in (("experiment", experiment), ("optimizer", method), ("setting", setting)):
        if name is None or "/" in name:
            raise ValueError(f"{key}: {name} is not the name of a file directly in conf/{key}")
    file = CONF / f"setting/{setting}.yaml"
    content: Any = OmegaConf.load(file) if file.exists() else {"setting": setting}
    if (own := content.get("setting")) != setting:
        raise ValueError(f"setting: conf/setting/{setting}.yaml says `setting: {own}`, not its own name, {setting}")
    if settings.exists():
        for cut in re.finditer("_", settings.stem):
            other, of_other = settings.stem[: cut.start()], settings.stem[cut.end() :]
            is_pair = (CONF / f"experiment/{other}.yaml").exists() and (CONF / f"optimizer/{of_other}.yaml").exists()
            if is_pair and other != experiment:
                raise ValueError(
                    f"conf/{in_conf(settings)}: is of experiment={experiment} optimizer={method} and of "
                    f"experiment={other} optimizer={of_other}; rename one of them"
                )


def seeds_of_row(experiment: str, settings: Path) -> list[int]:
    """The seeds of an experiment as committed, with the settings of one of its rows."""
    files = (
        OmegaConf.load(CONF / "config.yaml"),
        inherited(CONF / f"experiment/{experiment}.yaml"),
        inherited(CONF / f"setting/{settings.parent.name}.yaml"),
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
        started = json.loads(note.read_text(encoding="utf-8"))
        for key in ("commit", "versions", "machine"):
            if started[key] != info[key]:
                log.warning("%s: begun with %s %s, resumed with %s", slot.name, key, started[key], info[key])
        if "sources" in started and (files := changed(started["sources"], info["sources"])):
            log.warning("%s: begun with other code, resumed with another %s", slot.name, listed(files))
    with whole(note, "the note of the run's start") as part:
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


Kind = tuple[str, Callable[[Any], bool]]  # what is right, in words, and whether a value is


def whole_number(least: int, most: float = math.inf) -> Kind:
    bound = "up" if most == math.inf else f"to {most}"
    return f"a whole number from {least} {bound}", lambda value: type(value) is int and least <= value <= most


def or_null(kind: Kind) -> Kind:
    words, is_right = kind
    return f"{words}, or null", lambda value: value is None or is_right(value)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


NUMBER: Kind = "a number", is_number
FROM_0: Kind = "a number from 0 up", lambda value: type(value) in (int, float) and value >= 0
YES_OR_NO: Kind = "true or false", lambda value: type(value) is bool
FOLDER: Kind = "a folder", lambda value: type(value) is str and value != ""
LARGEST_SEED = 2**64 - 1  # that PyTorch takes
KINDS: dict[str, Kind] = {  # of values that nothing else checks
    "iterations": whole_number(1),
    "evaluate_every": whole_number(1),
    "threads": or_null(whole_number(1, 1024)),  # far more end the process without a word
    "checkpoint_seconds": FROM_0,
    **dict.fromkeys(("compile", "channels_last", "recompute", "progress", "force"), YES_OR_NO),
    **dict.fromkeys(("results", "outputs", "dataset.root"), FOLDER),
    "other_code": (f"one of {', '.join(OTHER_CODE)}", OTHER_CODE.__contains__),
    "precision": (f"one of {', '.join(PRECISIONS)}", PRECISIONS.__contains__),
    "dtype": (f"one of {', '.join(DTYPES)}", DTYPES.__contains__),
    "dataset.first": or_null(whole_number(1)),
    "dataset.holdout": whole_number(0),
    "dataset.download": YES_OR_NO,
    **dict.fromkeys(("dataset.holdout_seed", "dataset.split_seed"), whole_number(0, 2**32 - 1)),  # that NumPy takes
    **dict.fromkeys(("init.mean", "init.a", "init.b"), NUMBER),
    "init.std": FROM_0,
    "init.bias": or_null(NUMBER),
    "split.n_blocks": whole_number(1),
    "split.per_layer": YES_OR_NO,
    "optimizer.theta_passes": FROM_0,
    "optimizer.penalty.c": NUMBER,
    "optimizer.penalty.largest": FROM_0,
    "fewest": whole_number(1),
    "verification.number": whole_number(1),
    "verification.seed": whole_number(0, 2**32 - 1),
    "model.embedding": whole_number(1),
    "probe.balanced": YES_OR_NO,
}


def check(config: DictConfig) -> None:
    """Raises ValueError that names the key of a value that no run can have."""
    for key, (right, is_right) in KINDS.items():
        group: Any = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        is_there = isinstance(group, DictConfig) and key.rpartition(".")[2] in group
        if (
            is_there
            and group.get("_target_", "admm.").startswith("admm.")
            and not is_right(OmegaConf.select(config, key))
        ):
            raise ValueError(f"{key}: {OmegaConf.select(config, key)!r} is not {right}")
    check_words(OmegaConf.to_container(config, resolve=True))
    seeds, (_, is_seed) = config.seeds, whole_number(0, LARGEST_SEED)
    if not isinstance(seeds, ListConfig) or not seeds or not all(map(is_seed, seeds)):
        raise ValueError(f"seeds: {seeds!r} is not a list of whole numbers from 0 to {LARGEST_SEED}, such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: {seeds!r} holds a seed twice")
    if config.precision == "bf16" and config.dtype != "float32":
        raise ValueError(f"precision: bf16 needs dtype=float32, not {config.dtype}")
    if missing := {"name", "holdout"} - set(config.dataset):
        raise ValueError(f"dataset: its file in conf/dataset has no {' and no '.join(sorted(missing))}; see mnist.yaml")


def check_words(node: Any, key: str = "") -> None:
    """Raises ValueError for infinity as the command line or YAML does not write it, and so takes for a word."""
    parts: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in parts:
        check_words(value, f"{key}.{name}".lstrip("."))
    if isinstance(node, str) and re.fullmatch(r"[-+]?\.?(inf|nan)", node, re.IGNORECASE) and key != "note":
        raise ValueError(f"{key}: {node!r} is a word here; infinity is inf on the command line, .inf in YAML")


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
