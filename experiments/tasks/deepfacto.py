"""§4.2: DeepFacto on faces. A representation of faces, what linear probes find in it, and where it looks."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from sklearn.decomposition import PCA as Components
from torch import Tensor, nn
from torch.nn import functional

from admm.blocks import Parameters, split
from admm.checkpoints import Row
from admm.checks import at_least_one
from admm.data import cached_npy
from admm.files import explain_write_errors
from admm.minibatches import minibatches
from admm.nmf import NMF, feature_maps, matrix, warm_start
from admm.optimizers import DeepFacto, Problem
from experiments.device import find_device
from experiments.errors import BadInput, user_errors
from experiments.faces.backbones import BACKBONES
from experiments.faces.data import Faces, load_faces, pairs, split_people
from experiments.faces.probes import Probe, verification
from experiments.jobs import Job, run_once
from experiments.launch import Launch
from experiments.loggers import Logger
from experiments.reports.scores import mean_score
from experiments.store import PROBES, Run, seal, unseal
from experiments.training import (
    NO_LOGGER,
    Observer,
    end_record,
    execution,
    logger_of,
    train_or_resume,
    with_optimizer,
    write_start_record,
)

log = logging.getLogger(__name__)
SLICE = 256  # images that a network is applied to at a time
BATCH = 512  # training faces of which the triplet loss is evaluated
SHOWN = 8  # people in a figure of heat maps
PROBED = ["replica", "seed", "attribute", "positives", "majority", "accuracy", "balanced_accuracy", "auc", "cost"]
THUMBNAIL = 100  # pixels on each side of their images


def run(config: DictConfig, launch: Launch) -> float | None:
    """Represent the faces and probe the representation, unless that has been done. Returns `seeds`' mean score."""
    has_rank = not config.optimizer._target_.endswith(".Raw")
    if has_rank and not (isinstance(config.model.rank, int) and config.model.rank > 0):
        raise BadInput(f"model.rank: {config.model.rank!r} is not a whole number from 1 up; setting=rank32 or so")
    return mean_score(run_once(config, launch, execute, partial(load, config.backbone)), config.seeds)


def load(backbone: DictConfig, name: str, root: str, holdout: int, device: Any, dtype: Any, **options: Any) -> Faces:
    """Return the faces in the crop and size of the backbone, whose weights are part of their `sha256`.

    With `holdout`, about so many training images, with all of their people, are the test set; the data set's own test
    images are left out.

    Raises ValueError for a wrong key, DatasetError and BackboneError for what is missing.
    """
    if dtype != torch.float32:
        raise ValueError("dtype: faces need float32")
    network = build(backbone)
    box = tuple(backbone.box) if backbone.box else None
    faces = _load(root=Path(root) / name, box=box, size=BACKBONES[backbone.name].size, **options)
    if holdout:
        if not 0 < holdout < len(faces.train):
            raise ValueError(
                f"dataset.holdout: {holdout!r} is not between 0 and the {len(faces.train)} training images"
            )
        kept, held = split_people(faces.people[faces.train].numpy(), 1.0 - holdout / len(faces.train), 0)
        faces = replace(faces, train=faces.train[kept], test=faces.train[held])
    return replace(faces, sha256=digest(f"{faces.sha256} {holdout}", *network.state_dict().values()))


_load = lru_cache(maxsize=1)(load_faces)  # the runs of a launch share their data


def build(backbone: DictConfig) -> nn.Sequential:
    """Return the pre-trained network, in evaluation mode.

    Raises ValueError for a wrong key, BackboneError for what is missing.
    """
    if backbone.name not in BACKBONES:
        raise ValueError(f"backbone.name: {backbone.name!r} is not one of {', '.join(BACKBONES)}")
    if backbone.name == "inception_resnet_v1" and backbone.weights is None:
        raise ValueError(
            "backbone.weights: null is a network that has not been trained; vggface2, casia-webface or a file"
        )
    return BACKBONES[backbone.name].build(backbone.weights).eval()


def digest(*content: str | Tensor) -> str:
    """Return the SHA-256 of texts, and of tensors with their shapes."""
    sha = hashlib.sha256()
    for item in content:
        sha.update(item.encode() if isinstance(item, str) else f"{list(item.shape)}".encode())
        if isinstance(item, Tensor):
            sha.update(item.contiguous().numpy().data)
    return sha.hexdigest()


class Evaluated(nn.Module):
    """Layers whose batch normalisation keeps its running statistics also in training, as is usual in fine-tuning."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.eval()

    def train(self, mode: bool = True) -> Evaluated:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Features:
    """Faces as the frozen part of a backbone sees them, and the rest of that backbone.

    tail: from there to the cut, and a ReLU, whose output is what is factorised. rest: from there to the embedding.
    """

    def __init__(self, config: DictConfig, faces: Faces) -> None:
        """Raises ValueError where `backbone.frozen` and `backbone.cut` are not two of its stages in their order."""
        backbone, network = config.backbone, build(config.backbone)
        names = [name for name, _ in network.named_children()]
        for key in ("frozen", "cut"):
            if backbone[key] not in names:
                raise ValueError(f"backbone.{key}: {backbone[key]!r} is not one of {', '.join(names)}")
        first, last = (names.index(backbone[key]) + 1 for key in ("frozen", "cut"))
        if first >= last:
            raise ValueError(f"backbone.frozen: {backbone.frozen!r} does not come before the cut, {backbone.cut!r}")
        layers = list(network)
        self.faces, self.device = faces, find_device(config.device)
        self.tail, self.rest = Evaluated([*layers[first:last], nn.ReLU()]), nn.Sequential(*layers[first:]).eval()
        self._frozen = nn.Sequential(*layers[:first]).eval()
        images = f"{backbone.name} {backbone.frozen} {faces.images.shape}"
        key = digest(images, faces.images, *self._frozen.state_dict().values())[:16]
        self._kept = Path(config.dataset.root) / config.dataset.name / "cache" / f"features-{key}.npy"

    @cached_property
    def frozen(self) -> Tensor:
        """Frozen features of all faces, [N, C, H, W]; cached in the data set's folder, if that can be written."""
        return torch.from_numpy(
            cached_npy(
                self._kept,
                lambda: self.applied(self._frozen, self.faces.images).numpy(),
                lambda error: log.warning("the features are not kept: %s", error),
            )
        )

    @cached_property
    def maps(self) -> Tensor:
        """The maps of all faces that are factorised, before any training: [N, C, H, W] ≥ 0."""
        return self.applied(self.tail, self.frozen)

    @torch.no_grad()
    def applied(self, network: nn.Module, x: Tensor) -> Tensor:
        """Apply a network in evaluation mode on the device, `SLICE` samples at a time. Returns outputs on the host."""
        network.to(self.device).eval()
        return torch.cat([network(part.to(self.device).float()).cpu() for part in x.split(SLICE)])


class Verification:
    """Pairs of test faces, half of them of one person."""

    def __init__(self, faces: Faces, number: int, seed: int) -> None:
        """Raises ValueError where the test faces do not have so many pairs."""
        drawn, self.same = pairs(faces.people, faces.test, number, seed)
        self.images, positions = drawn.flatten().unique(return_inverse=True)  # the pairs' images
        self.pairs = positions.view_as(drawn)

    def accuracy(self, embeddings: Tensor) -> float:
        """Return the verification accuracy in percent, given the embeddings of `images`."""
        return verification(embeddings, self.pairs, self.same)


@dataclass(frozen=True)
class Represented:
    """Scores [N, r, H, W] of all faces by one replica of a method, and its row of the history if it was not trained."""

    replica: int
    seed: int
    scores: Tensor
    row: Row | None = None


@dataclass(frozen=True)
class Raw:
    """The backbone's own maps, and verification by its own embedding."""

    def represent(self, features: Features, task: Verification, seeds: Sequence[int]) -> Iterator[Represented]:
        accuracy = task.accuracy(features.applied(features.rest, features.frozen[task.images]))
        row: Row = {"iteration": 0, "replica": 0, "seed": seeds[0], "verification": accuracy}
        yield Represented(0, seeds[0], features.maps, row)


@dataclass(frozen=True)
class PCA:
    """Principal components of the maps' columns, fitted to the training faces."""

    rank: int

    def represent(self, features: Features, task: Verification, seeds: Sequence[int]) -> Iterator[Represented]:
        columns = matrix(features.maps[None])[0].T.numpy()
        train = matrix(features.maps[None, features.faces.train])[0].T.numpy()
        fitted = Components(self.rank, random_state=seeds[0] % 2**32).fit(train)
        scores = torch.from_numpy(fitted.transform(columns).T.copy())
        row: Row = {"iteration": 0, "replica": 0, "seed": seeds[0]}
        yield Represented(0, seeds[0], feature_maps(scores[None], like=features.maps[None])[0], row)


@dataclass(frozen=True)
class PostHocNMF:
    """Non-negative factorisation of a network that has been trained without it (Collins et al. 2018)."""

    rank: int
    rounds: int

    def __post_init__(self) -> None:
        at_least_one("rounds", self.rounds)

    def represent(self, features: Features, task: Verification, seeds: Sequence[int]) -> Iterator[Represented]:
        train = matrix(features.maps[None, features.faces.train]).to(features.device)
        for replica, seed in enumerate(seeds):
            torch.manual_seed(seed)
            layer = NMF(train.shape[1], self.rank).to(features.device)
            scores = warm_start(train, layer.basis[None], self.rounds)
            residual = (train - layer.basis @ scores).norm() / train.norm()
            row: Row = {"iteration": self.rounds, "replica": replica, "seed": seed, "residual_2": residual.item()}
            yield Represented(replica, seed, features.applied(layer, features.maps), row)


def execute(config: DictConfig, job: Job) -> Run:
    """Represent the faces, probe the representation for each attribute, and put the run into the store."""
    faces: Faces = job.dataset
    with user_errors(config):
        features, task = Features(config, faces), Verification(faces, **config.verification)
        probe, method = (instantiate(config[key], _convert_="all") for key in ("probe", "optimizer"))
        if not isinstance(method, DeepFacto) and not hasattr(method, "represent"):
            raise ValueError(f"optimizer: {job.info['method']} is not one of deepfacto, nmf, pca, raw")
        columns = attributes_to_probe(faces, config.fewest, probe)
        if not isinstance(method, DeepFacto) and (config.model.rank or 1) > features.maps.shape[1]:
            raise ValueError(f"model.rank: {config.model.rank} is more than the {features.maps.shape[1]} channels")
    info, history = job.info | {"labels": faces.labels}, list[Row]()
    with logger_of(config) as logger:  # of the joint training, which alone opens it
        if isinstance(method, DeepFacto):
            represented, rows, how = train_jointly(config, job, features, task, logger)
            history, info = rows, info | how
        else:
            write_start_record(job.slot, job.info)
            represented = method.represent(features, task, job.info["seeds"])
        probes, arrays = list[dict[str, Any]](), dict[str, NDArray[Any]]()
        info["scores_verification"] = []  # percent of pairs, by the scores themselves as embeddings
        for found in represented:
            history += [found.row] if found.row else []
            info["scores_verification"].append(task.accuracy(found.scores[task.images].flatten(1)))
            probes += probe_attributes(found, faces, probe, columns, job.slot.journal(PROBES))
            if isinstance(method, DeepFacto):
                arrays = arrays or heat_maps(found, faces)
        return job.slot.complete(job.config, history, info, {"probes": pd.DataFrame(probes, columns=PROBED)}, arrays)


def train_jointly(
    config: DictConfig, job: Job, features: Features, task: Verification, logger: Logger = NO_LOGGER
) -> tuple[Iterator[Represented], list[Row], dict[str, Any]]:
    """Train backbone, factorisation and embedding together, from the frozen features on, as the paper does.

    Returns the representations, the rows of the history, and what `run.json` says of the end."""
    with user_errors(config):
        problem = build_problem(config, features)
    test = (features, features.frozen[task.images], task)
    observer = Observer(logger, quantity="verification")
    start = with_optimizer(config, problem, job.info["seeds"])
    history = train_or_resume(config, job, start, test, observer, measure=measure_faces, keep_last=True)
    blocks, theta, seeds = problem.blocks, start.state.theta, start.state.seeds
    del start  # all else of the state is not kept meanwhile

    def represented() -> Iterator[Represented]:
        for replica, seed in enumerate(seeds):
            if replica not in history.diverged:
                tail, nmf, _ = blocks.export(theta, replica).children()
                yield Represented(replica, seed, features.applied(nn.Sequential(tail, nmf), features.frozen))

    return represented(), history.rows, end_record(history) | {"frozen": config.optimizer.frozen}


def build_problem(config: DictConfig, features: Features) -> Problem:
    """Return the problem of the training faces: their frozen features and identities, and a network `tail`, `nmf`,
    `embed`, whose `tail` keeps its pre-trained parameters. Raises ValueError for an impossible rank."""
    faces, map_of_one = features.faces, features.applied(features.tail, features.frozen[:1])[0]
    embed = nn.Sequential(nn.Flatten(), nn.Linear(config.model.rank * map_of_one[0].numel(), config.model.embedding))
    nmf = NMF(len(map_of_one), config.model.rank, config.model.lbfgs)
    network = nn.Sequential(OrderedDict(tail=features.tail.cpu(), nmf=nmf, embed=embed))

    def initialise(network: nn.Module) -> None:
        for layer in (network.get_submodule("nmf"), *network.get_submodule("embed").modules()):
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()

    blocks = split(network, after=["tail", "nmf"], execution=execution(config))
    x, y = (data[faces.train].to(features.device) for data in (features.frozen, faces.people))
    return Problem(x, y, blocks, instantiate(config.loss), initialise)


def measure_faces(
    problem: Problem, theta: Parameters, test: tuple[Features, Tensor, Verification]
) -> dict[str, Tensor]:
    """Return the verification accuracy on the test pairs, and the triplet loss of a mini-batch of training faces, each
    [R]."""
    features, x, task = test
    size = min(BATCH, problem.n_samples)
    batch = minibatches(problem.n_samples, size, [0], 0, problem.device, groups=problem.y, group_size=4)[0][0]
    found, losses = [], []
    for replica in range(theta.replicas):
        network = problem.blocks.export(theta, replica)
        found.append(task.accuracy(features.applied(network, x)))
        outputs = features.applied(network, problem.x[batch])
        losses.append(problem.loss.value(outputs, problem.y[batch].cpu()).mean())
    return {"verification": torch.tensor(found), "train_loss": torch.stack(losses).to(problem.device)}


def attributes_to_probe(faces: Faces, fewest: int, probe: Probe) -> list[int]:
    """Return the columns of the attributes that can be probed. Raises ValueError if there is none.

    At least `fewest` training faces must have the attribute, and as many must not; some test faces must have it, and
    some not. An attribute for which people cannot be held out to choose C is left out, with a warning."""
    counts = [[(faces.attributes[part] == kind).sum(0) for kind in (0, 1)] for part in (faces.train, faces.test)]
    enough = torch.stack([torch.stack(counts[0]).amin(0) >= fewest, torch.stack(counts[1]).amin(0) > 0]).all(0)
    columns, left_out = list[int](), list[str]()
    for column in enough.nonzero().flatten().tolist():
        kept, _ = labelled_faces(faces, column)
        if probe.can_choose(faces.attributes[kept, column].numpy(), faces.people[kept].numpy()):
            columns.append(column)
        else:
            left_out.append(faces.attribute_names[column])
    if left_out:
        log.warning(
            "not probed: %s; to choose C, training people are held out, and no third of them leaves faces with and "
            "without the attribute on both sides",
            ", ".join(left_out),
        )
    if not columns:
        raise ValueError(
            f"dataset.attributes: no attribute is had by {fewest} training faces, and not had by {fewest} (`fewest`), "
            f"of people of whom a third can be held out; the labels: {faces.labels}"
        )
    return columns


def labelled_faces(faces: Faces, column: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the test faces whose label for an attribute is known."""
    train, test = (part[faces.attributes[part, column] >= 0] for part in (faces.train, faces.test))
    return train, test


def probe_attributes(
    found: Represented, faces: Faces, probe: Probe, columns: Sequence[int], done: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for each attribute. Rows in the file `done` are not measured again; new rows are added to it."""
    content = digest(found.scores, repr(probe))
    known = {(row["scores"], row["attribute"]): row for row in recorded_rows(done)}
    x, people, attributes = found.scores.flatten(1).numpy(), faces.people.numpy(), faces.attributes.numpy()
    for column in columns:
        attribute, y = faces.attribute_names[column], attributes[:, column]
        row = known.get((content, attribute))
        if row is None:
            kept, tested = (part.numpy() for part in labelled_faces(faces, column))
            positives = int((y[tested] == 1).sum())
            share = 100.0 * positives / len(tested)
            row = {
                "scores": content,
                "attribute": attribute,
                "positives": positives,
                "majority": max(share, 100.0 - share),
            }
            row |= probe(x[kept], y[kept], people[kept], x[tested], y[tested])
            with explain_write_errors(done, "what was probed"), done.open("a", encoding="utf-8") as file:
                file.write(f"\n{seal(row)}\n")  # in a line of its own, also after one that was cut off
        yield {"replica": found.replica, "seed": found.seed} | {key: row[key] for key in row if key != "scores"}


def recorded_rows(done: Path) -> list[dict[str, Any]]:
    """Return the rows of an interrupted run's file, without those that were cut off or changed."""
    rows = []
    for line in done.read_text(encoding="utf-8").splitlines() if done.exists() else ():
        with suppress(ValueError):
            rows.append(unseal(line))
    return rows


def heat_maps(found: Represented, faces: Faces) -> dict[str, NDArray[Any]]:
    """Return what a figure of heat maps shows: maps [r, SHOWN, H, W] and thumbnails of test faces of different people;
    each factor's mean map [r, H, W] over all test faces, and its consistency [r].

    The consistency is the share of a factor's energy over all test faces that is one map with mean 0, common to them:
    near 1 if it looks at the same few places of every face, 0 if it is everywhere, or anywhere.
    """
    _, first = np.unique(faces.people[faces.test].numpy(), return_index=True)
    people = faces.test[first[np.random.RandomState(0).permutation(len(first))[:SHOWN]]]
    images = functional.interpolate(faces.images[people].float(), THUMBNAIL, mode="bilinear", antialias=True)
    scores = found.scores[faces.test]
    mean = scores.mean(0)
    common = (mean - mean.mean((1, 2), keepdim=True)).square().sum((1, 2))
    energy = scores.square().sum((2, 3)).mean(0)
    return {
        "seed": np.array(found.seed),
        "maps": found.scores[people].transpose(0, 1).numpy().astype(np.float32),
        "faces": images.round().byte().numpy(),
        "consistency": torch.where(energy > 0, common / energy, 0.0).numpy(),
        "mean": mean.numpy(),
    }
