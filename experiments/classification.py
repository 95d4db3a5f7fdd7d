"""The task of all experiments but DeepFacto: train a classifier, keep what was measured in the store."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from admm.data import Dataset, DatasetError, load
from admm.losses import one_hot
from admm.optimizers import Problem
from admm.training import History, Row, train
from experiments.progress import RunProgress
from experiments.provenance import provenance
from experiments.store import NEUTRAL, Run, Slot, identity

log = logging.getLogger(__name__)
ROW_NAMES = ("experiment", "optimizer", "setting")  # overrides that choose a row of an experiment


def run(config: DictConfig) -> None:
    """Run one job of a launch, unless it has been run, and leave a note of it in Hydra's folder for the report.

    Bad input ends the program with a message that names the key or file.
    """
    try:
        finished = _run(config)
    except (DatasetError, ValueError, TypeError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise SystemExit(f"error: {cause}") from (error if log.isEnabledFor(logging.DEBUG) else None)
    (Path(HydraConfig.get().runtime.output_dir) / "run.txt").write_text(str(finished.folder.absolute()))


def _run(config: DictConfig) -> Run:
    check(config)
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if not _chooses_only(o)]
    experiment, method = hydra.runtime.choices["experiment"], hydra.runtime.choices["optimizer"]
    device, dtype = _device(config.device), _dtype(config.dtype)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load(**config.dataset, device=device, dtype=dtype)
    points = spread_grid(config)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    root = Path(config.outputs if overrides else config.results)
    slot = Slot(root, experiment, f"{method}-{config.setting}", identity(plain, dataset.sha256))
    info = {
        "experiment": experiment,
        "method": method,
        "setting": config.setting,
        "overrides": overrides,
        "identity": slot.identity,
        "seeds": list(config.seeds),
        "points": points,
        "iterations": config.iterations,
        "dataset": {"name": dataset.name, "sha256": dataset.sha256, "holdout": config.dataset.holdout},
    }
    with slot.lock():
        if config.force:
            slot.discard()
        elif (finished := slot.finished()) is not None:
            log.info("%s-%s is there already: %s", method, config.setting, finished.folder)
            return finished
        return _train(config, plain, dataset, slot, info | provenance(device))


def _train(config: DictConfig, plain: dict[str, Any], dataset: Dataset, slot: Slot, info: dict[str, Any]) -> Run:
    problem, optimizer, logger = (
        _problem(config, dataset),
        instantiate(config.optimizer, _convert_="all"),
        instantiate(config.logger),
    )
    slot.partial.mkdir(parents=True, exist_ok=True)
    if slot.checkpoint.exists():
        log.info("resuming from %s", slot.checkpoint)
    logger.open(info, plain)
    with RunProgress(slot.name, config.iterations, config.progress) as progress:
        reported: set[int] = set()

        def observe(rows: list[Row], history: History) -> None:
            logger.log(rows)
            for replica in history.diverged.keys() - reported:
                iteration, seed = history.diverged[replica], config.seeds[replica]
                log.warning("%s: seed %d diverged (not finite after iteration %d)", slot.name, seed, iteration)
                reported.add(replica)
            if rows:
                last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
                mean = sum(row["test_accuracy"] for row in last) / len(last)
                progress.update(int(last[0]["iteration"]), mean, history.seconds)

        _, history = train(
            problem,
            optimizer,
            list(config.seeds),
            config.iterations,
            (dataset.x_test, dataset.y_test),
            config.evaluate_every,
            slot.checkpoint,
            config.checkpoint_seconds,
            observe,
        )
    logger.close()
    ended = {
        "seconds": round(history.seconds, 3),
        "diverged": history.diverged,  # by replica
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return slot.complete(plain, history.rows, info | ended)


def _problem(config: DictConfig, dataset: Dataset) -> Problem:
    network = instantiate(
        config.model, in_features=dataset.x_train[0].numel(), out_features=dataset.classes, _convert_="all"
    )
    return Problem(
        x=dataset.x_train,
        y=one_hot(dataset.y_train, dataset.classes, dataset.x_train),
        blocks=instantiate(config.split, network, _convert_="all"),
        loss=instantiate(config.loss),
        initialise=instantiate(config.init),
    )


def check(config: DictConfig) -> None:
    """Raises ValueError that names the key of a value that no run can have."""
    for key in ("iterations", "evaluate_every"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"{key}: {config[key]!r} is not a whole number from 1 up")
    seeds = config.seeds
    if not isinstance(seeds, ListConfig) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"seeds: {seeds!r} is not a list of whole numbers from 0 up, such as [0, 1, 2, 3, 4]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: {seeds!r} holds a seed twice")


def spread_grid(config: DictConfig) -> list[str]:
    """Turn the grid into lists of hyperparameters, one value a replica, in place; `seeds` becomes the replicas' seeds.

    Returns, for each replica, its point of the grid in words; nothing without a grid.
    """
    if not config.grid:
        return []
    grid = {str(key): list(values) for key, values in config.grid.items()}
    points = [point for point in product(*grid.values()) for _ in config.seeds]
    config.seeds = list(config.seeds) * (len(points) // len(config.seeds))
    for number, key in enumerate(grid):
        if not key.startswith("optimizer.") or OmegaConf.select(config, key) is None:
            raise ValueError(f"grid: {key!r} is not a hyperparameter of the optimizer; use -m {key}=… instead")
        OmegaConf.update(config, key, [point[number] for point in points], merge=False)
    return [", ".join(f"{key}={value}" for key, value in zip(grid, point, strict=True)) for point in points]


def _chooses_only(override: str) -> bool:
    """Whether an override of the command line leaves the numbers of an experiment's row as they are."""
    key = override.lstrip("+~").split("=")[0]
    return key in ROW_NAMES or any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({error}); auto, cpu, cuda, cuda:1, …") from None
    return torch.device(name)


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    if name not in dtypes:
        raise ValueError(f"dtype: {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]
