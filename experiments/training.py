"""From a configuration to a trained network: the problem, the optimizer, and the loop with its logger and progress."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from admm.angles import check_angle_samples
from admm.blocks import Blocks
from admm.callbacks import Callback
from admm.checkpoints import History, Row
from admm.data import Dataset
from admm.files import atomic_write
from admm.layers import Execution
from admm.losses import one_hot
from admm.optimizers import Optimizer, Problem, State
from admm.optimizers.protocol import check_parallel
from admm.parallel import ALONE, Parallel
from admm.random_numbers import all_seeded
from admm.training import DivergenceWarning, train
from experiments.errors import in_words, user_errors
from experiments.jobs import Job
from experiments.loggers import Guarded, Logger, NoLogger
from experiments.messages import warnings_in_log
from experiments.progress import RunProgress
from experiments.provenance import changed_sources, first_few
from experiments.reports.metrics import metric_of
from experiments.store import PROBES, Slot

log = logging.getLogger(__name__)
NO_LOGGER = NoLogger()


class Prepared(NamedTuple):
    """What training begins with."""

    problem: Problem
    optimizer: Optimizer[Any]
    state: Any


def prepared(config: DictConfig, dataset: Dataset, seeds: Sequence[int], parallel: Parallel = ALONE) -> Prepared:
    """Return what a configuration's training begins with. Raises BadInput."""
    with user_errors(config):
        problem = build_problem(config, dataset, parallel)
    return with_optimizer(config, problem, seeds)


def with_optimizer(config: DictConfig, problem: Problem, seeds: Sequence[int]) -> Prepared:
    """Return what training on a problem begins with. Raises BadInput."""
    with user_errors(config, "optimizer"), warnings_in_log(config):
        optimizer = instantiate(config.optimizer, _convert_="all")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: {type(optimizer).__name__} trains nothing; it is for experiment=lfw_proxy")
        check_parallel(optimizer, problem)
        check_angle_samples(config.angle_samples, problem.n_samples)
        return Prepared(problem, optimizer, optimizer.init(problem, seeds))


def train_or_resume(
    config: DictConfig, job: Job, start: Prepared, test: Any, observer: Observer, **options: Any
) -> History:
    """Train, from the last checkpoint if there is one, and return the history; `start.state` is trained in place.

    test, options: as `admm.training.train` takes them. Raises what `train` does.
    """
    with ExitStack() as stack:
        callback = start.problem.parallel.together(lambda: stack.enter_context(observer.watch(config, job)))
        return trained(config, start, test, job.slot.checkpoint, callbacks=[callback], **options)


def trained(config: DictConfig, start: Prepared, test: Any, checkpoint: Path, **options: Any) -> History:
    """Train as the configuration says. Arguments as of `admm.training.train`; raises what it does."""
    return train(
        *start,
        iterations=config.iterations,
        test=test,
        evaluate_every=config.evaluate_every,
        checkpoint=checkpoint,
        checkpoint_seconds=config.checkpoint_seconds,
        angle_samples=config.angle_samples,
        **options,
    )


@dataclass(frozen=True)
class Observer:
    """Sees a run's rows as they come: sends them to the logger, shows progress, warns of replicas that diverge.

    logger: is opened, and left open. quantity: what the progress shows, in percent; None is what the rows are judged
    by (`experiments.reports.metrics`). names: of the replicas; None names them by their seeds.
    """

    logger: Logger = NO_LOGGER
    quantity: str | None = None
    names: Sequence[str] | None = None

    @contextmanager
    def watch(self, config: DictConfig, job: Job) -> Iterator[Callback]:
        """Open the logger and the progress for a run. Yields a callback for `admm.training.train`."""
        self.logger.open(job.info, job.config)
        write_start_record(job.slot, job.info)
        names = self.names or [f"seed {seed}" for seed in job.info["seeds"]]
        part = "held-out" if config.dataset.holdout else "test"
        reported: set[int] = set()
        bar = RunProgress(job.slot.name, config.iterations, config.progress)

        def observe(problem: Problem, state: State, history: History, rows: list[Row]) -> None:
            self.logger.log(rows)
            for replica in history.diverged.keys() - reported:
                iteration = history.diverged[replica]
                log.warning("%s: %s diverged (not finite after iteration %d)", job.slot.name, names[replica], iteration)
                reported.add(replica)
            if rows:
                last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
                progress.update(int(last[0]["iteration"]), self.measured(last, part), history.seconds)

        with bar as progress, warnings_in_log(config):
            # Of a replica that has diverged the callback tells, by its name.
            warnings.filterwarnings("ignore", "seed .* has diverged", DivergenceWarning)
            try:
                yield observe
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(f"{job.slot.name}: {str(stop) or 'stopped'}") from None

    def measured(self, rows: Sequence[Row], part: str) -> str:
        """Return in words the mean of the quantity over the replicas' rows of an iteration. part: test or held-out."""
        metric = metric_of(rows[0])
        column, words, unit = metric.column, f"{part} {metric.words}", metric.unit
        if self.quantity:
            column, words, unit = self.quantity, self.quantity.replace("_", " "), "%"
        factor = 1.0 if self.quantity else metric.factor
        return f"{words} {factor * sum(row[column] for row in rows) / len(rows):.2f} {unit}".rstrip()


def write_start_record(slot: Slot, info: dict[str, Any]) -> None:
    """Note how a run starts. Logs a warning if it is resumed by other code, libraries or machine. Raises WriteError."""
    record = slot.start_note
    if slot.checkpoint.exists():
        log.info("resuming from %s", slot.checkpoint)
    if slot.checkpoint.exists() or slot.journal(PROBES).exists():
        started = json.loads(record.read_text(encoding="utf-8"))
        for key in ("commit", "versions", "machine"):
            if started[key] != info[key]:
                log.warning("%s: begun with %s %s, resumed with %s", slot.name, key, started[key], info[key])
        if "sources" in started and (files := changed_sources(started["sources"], info["sources"])):
            log.warning("%s: begun with other code, resumed with another %s", slot.name, first_few(files))
    with atomic_write(record, "the record of the run's start") as part:
        part.write_text(json.dumps(info), encoding="utf-8")


def end_record(history: History, parallel: Parallel = ALONE) -> dict[str, Any]:
    """Return what `run.json` says of the end of a run."""
    seconds = {"seconds": history.seconds, "compile_seconds": history.compile_seconds}
    record: dict[str, Any] = {k: round(v, 3) for k, v in seconds.items() if k == "seconds" or v}
    if parallel.size > 1:
        record |= {"processes": parallel.size, "parallel": parallel.kind}
    return record | {"diverged": history.diverged}


def logger_of(config: DictConfig) -> Guarded:
    """Return the configuration's logger. If it cannot be made, such as for want of a connection, log a warning and
    return one that does nothing. Raises BadInput for a wrong key or a missing package."""
    with user_errors(config):
        try:
            logger = instantiate(config.logger)
        except InstantiationException as error:
            if error.__cause__ is None or isinstance(error.__cause__, ImportError | TypeError | ValueError):
                raise
            log.warning("%s failed, the run goes on without it: %r", config.logger._target_, error.__cause__)
            return Guarded(NO_LOGGER)
        if not isinstance(logger, Logger):
            raise ValueError(f"logger: {config.logger._target_} is no subclass of experiments.loggers.Logger")
        return Guarded(logger)


def build_problem(config: DictConfig, dataset: Dataset, parallel: Parallel = ALONE) -> Problem:
    """Return the problem of a configuration: its network in blocks, loss, initialisation and data.

    Raises ValueError, or an error of Hydra's, for what does not fit together.
    """
    y = dataset.y_train
    build = partial(build_network, config.model, dataset)
    with remedies(dataset):
        with all_seeded(0):  # for what the seeds of a run do not draw anew, such as frozen parameters
            network = build()
        return Problem(
            x=dataset.x_train,
            y=one_hot(y, dataset.classes, dataset.x_train) if dataset.task == "classification" else y,
            blocks=blocks_of(config, network),
            loss=instantiate(config.loss),
            initialise=initialise_of(config.init, build),
            augmentation=instantiate(config.get("augmentation")),
            parallel=parallel,
        )


def build_network(model: DictConfig, dataset: Dataset) -> nn.Module:
    """Return a new network: what the group's function makes of its keys, and of those of `data_arguments` that it
    takes. Raises an error of Hydra's, and ValueError where it makes no module, or fails at the shape of the samples."""
    given = data_arguments(model, dataset)
    try:
        network = instantiate(model, **given, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        is_of_shape = isinstance(cause, LookupError | RuntimeError) or "values to unpack" in str(cause)
        if cause is None or not (is_of_shape and "input_shape" in given):
            raise
        place, shape = str(error).splitlines()[0], list(dataset.input_shape)  # "Error in call to target 'a.b':"
        raise ValueError(
            f"{place} {in_words(cause)}, for input_shape {shape}; hydra.verbose=true shows where"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model: {model._target_} returns a {type(network).__name__}, expected an nn.Module")
    return network


def data_arguments(model: DictConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what a network's function takes of `input_shape` and the number of outputs, `classes` or `num_classes`,
    and the configuration does not give. A function of any keywords, as torchvision's, gets `num_classes`."""
    offered = {"input_shape": dataset.input_shape, "classes": dataset.outputs, "num_classes": dataset.outputs}
    try:
        parameters = signature(get_object(model._target_)).parameters
    except (HydraException, ImportError, TypeError, ValueError):  # what is wrong is told where it is called
        return {}
    taken = offered.keys() & parameters.keys()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not {"classes", "num_classes"} & {*taken, *model}:
        taken |= {"num_classes"}
    return {name: value for name, value in offered.items() if name in taken and name not in model}


def blocks_of(config: DictConfig, network: nn.Module) -> Blocks:
    """Return a network in the blocks of a configuration. Raises ValueError where it cannot be cut.

    On the command line the name of a layer may be a number, as in `split.after=[1]`."""
    after = OmegaConf.to_container(config.split).get("after")  # type: ignore[union-attr]
    named = {} if after is None else {"after": [str(name) for name in (after if isinstance(after, list) else [after])]}
    cut = instantiate(config.split, **named, _partial_=True, _convert_="all")
    try:
        return cut(network, execution=execution(config))  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"model: {error}") from error


def initialise_of(init: DictConfig, build: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    """Return the initialisation of a configuration; `build` goes to one that takes it, as `as_constructed` does."""
    takes_build = "build" in signature(get_object(init._target_)).parameters
    made: Callable[[nn.Module], None] = instantiate(init, **({"build": build} if takes_build else {}))
    return made


@contextmanager
def remedies(dataset: Dataset) -> Iterator[None]:
    """Add to an error about the channels or the shape of gray images, or the number of outputs, what the data set has
    to offer."""
    try:
        yield
    except ValueError as error:
        shape = list(dataset.input_shape)
        as_stored = ", as images [N, H, W, 1] of an npz file have them" if len(shape) == 2 else ""
        if ("channel" in str(error) and shape[0] == 1) or (re.search("channel|input_shape", str(error)) and as_stored):
            way = f"The images are gray, {shape}; dataset.channels=3, or 1, gives them channels{as_stored}"
        elif "network's outputs" in str(error):
            way = f"The data need {dataset.outputs} outputs, which a key such as model.num_classes may set"
        else:
            raise
        raise ValueError(f"{error}. {way}") from error


def execution(config: DictConfig) -> Execution:
    """Return how blocks are evaluated, and set PyTorch's precision of products on a GPU."""
    precision = config.get("precision")  # a stored configuration has neither the default nor the neutral keys
    how = {key: config[key] for key in ("compile", "channels_last", "recompute") if key in config}
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Execution("bf16" if precision == "bf16" else "fp32", **how)
