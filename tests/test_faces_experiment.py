"""Representations of faces, their probes and the report, with a small network and generated faces."""

from __future__ import annotations

import errno
import json
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from launches import multirun
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from scipy.optimize import nnls
from scipy.stats import ttest_rel
from sklearn.decomposition import PCA as Components
from torch import nn

from admm.files import WriteError
from experiments.errors import BadInput
from experiments.faces.backbones import BACKBONES, Backbone
from experiments.faces.data import ATTRIBUTES, Faces
from experiments.faces.probes import Probe
from experiments.identity import identity
from experiments.integrity import problems
from experiments.jobs import Job
from experiments.launch import Launch
from experiments.reports.base import report_of
from experiments.reports.faces import chosen_factors
from experiments.reports.results_page import experiment_section, rows_of
from experiments.store import Run, Slot, Store, seal, unseal
from experiments.tasks import deepfacto
from experiments.tasks.deepfacto import (
    Features,
    Represented,
    Verification,
    attributes_to_probe,
    execute,
    heat_maps,
    load,
)
from experiments.training import Observer, train_or_resume, with_optimizer

ROOT = Path(__file__).parents[1]
PEOPLE = 24
ABOVE_NMF = "minus NMF afterwards (Collins et al.) [95 %]"  # a column


def small_backbone(weights: None) -> nn.Sequential:
    torch.manual_seed(0)
    stages = OrderedDict(
        stem=nn.Conv2d(3, 4, 2, 2),
        act=nn.ReLU(),
        body=nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
        embed=nn.Sequential(nn.Flatten(), nn.Linear(6 * 4 * 4, 5)),
    )
    stages["body"][1].running_mean.fill_(5.0)
    stages["body"][1].running_var.fill_(900.0)
    return nn.Sequential(stages)


@pytest.fixture
def faces() -> Faces:
    """Three images of each of 24 people; who has the first attribute is redder, the others have no attribute."""
    random = np.random.RandomState(0)
    people = np.arange(PEOPLE).repeat(3)
    images = (
        random.randint(0, 120, (PEOPLE, 3, 8, 8)).repeat(3, 0) + random.randint(0, 20, (3 * PEOPLE, 3, 8, 8))
    ).astype(np.uint8)
    answers = np.zeros((len(people), 40), np.int8)
    answers[:, 1] = -1
    answers[people % 2 == 0, 0] = 1
    images[people % 2 == 0, 0] += 100
    half = torch.arange(len(people))
    names = tuple(f"{p}/{n}.jpg" for n, p in enumerate(people))
    tensors = map(torch.from_numpy, (images, people))
    persons = tuple(map(str, range(PEOPLE)))
    return Faces(*tensors, names, persons, torch.from_numpy(answers), half[:36], half[36:], "made-up labels", "abc")


@pytest.fixture(autouse=True)
def backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "dlib_resnet29", Backbone(small_backbone, size=8))


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose(
            "config",
            [
                "experiment=lfw_proxy",
                "backbone.frozen=stem",
                "backbone.cut=body",
                "fewest=5",
                "verification.number=20",
                "probe.costs=[1e-3,1]",
                f"dataset.root={folder}",
                "seeds=[0,1]",
                "progress=false",
                *overrides,
            ],
        )


def row(method: str, setting: str = "rank4", experiment: str = "lfw_proxy") -> str:
    return f"row={experiment if method == 'deepfacto' else 'lfwa_deepfacto'}/{method}-{setting}"


def job(options: DictConfig, faces: Faces, folder: Path, method: str, setting: str = "rank4") -> Job:
    info = {"experiment": "lfw_proxy", "method": method, "setting": setting, "seeds": list(options.seeds)}
    info |= {
        "iterations": options.iterations,
        "overrides": [],
        "machine": "here",
        "commit": "c",
        "versions": {},
        "note": None,
        "dataset": {"sha256": faces.sha256},
    }
    return Job(faces, Slot(folder, "lfw_proxy", f"{method}-{setting}", f"{method}{setting}"), info, {})


def executed(folder: Path, faces: Faces, method: str, setting: str, *overrides: str) -> Run:
    options = config(folder, row(method, setting), *overrides)
    found = job(options, faces, folder, method, setting)
    return execute(options, found)


LAUNCH = Launch("lfw_proxy", "pca", None, (), Path(), (), False, False, None)
SMALL = ("iterations=3", "evaluate_every=1", "optimizer.frozen=1", "optimizer.warm_rounds=5", "optimizer.batch_size=12")


def test_every_representation_is_probed_and_reported(faces: Faces, tmp_path: Path) -> None:
    runs = [
        executed(tmp_path, faces, "raw", "default"),
        executed(tmp_path, faces, "pca", "rank4"),
        executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5"),
        executed(tmp_path, faces, "deepfacto", "rank4", *SMALL, "optimizer.warm_rounds=50"),
    ]
    for run, seeds in zip(runs, ([0], [0], [0, 1], [0, 1]), strict=True):
        probes = run.table("probes")
        assert list(probes["seed"]) == seeds and set(probes["attribute"]) == {ATTRIBUTES[0]}
        assert (probes["positives"] == 18).all() and (probes["majority"] == 50.0).all()
        assert (probes["balanced_accuracy"] > 75.0).all()  # red faces
    assert list(runs[3].history["iteration"].unique()) == [0, 1, 2, 3]
    report = report_of("lfw_proxy")
    table, figures = report.table(runs), report.figures(runs)
    assert list(table["method"]) == ["activations", "PCA", "NMF afterwards (Collins et al.)", "DeepFacto"]
    assert table["setting"].str.endswith("made-up labels").all() and table["paper"].isna().all()
    assert set(figures) == {"lfw_proxy", "lfw_proxy_rank4_heat_maps"}
    by_iteration = runs[3].history.groupby("iteration")["verification"].mean()
    assert table["after"].iloc[3] == pytest.approx(by_iteration[3])
    assert table["verification before"].iloc[3] == pytest.approx(by_iteration[1])
    by_seed = [run.table("probes").groupby("seed")["balanced_accuracy"].mean() for run in runs[2:]]
    low, high = ttest_rel(by_seed[1], by_seed[0]).confidence_interval()
    difference = f"{(by_seed[1] - by_seed[0]).mean():z.2f} [{low:z.2f}, {high:z.2f}]"
    assert list(table[ABOVE_NMF]) == ["– (no row nmf-default)", "– (one seed)", "baseline", difference]
    of_attributes = report_of("lfw_proxy").further_tables(runs)["lfw_proxy_attributes"]
    assert len(of_attributes) == 40 and "DeepFacto rank4, made-up labels: AUC" in of_attributes
    male = of_attributes.set_index("attribute").loc["Male"]
    assert male["paper, LFWA: rank 256"] == 81.3 and male["paper, LFWA: Zhang et al. 2014"] == 92
    with pytest.raises(ValueError, match="factors: there is no 4, only 0 to 3"):
        report.heat_maps(runs[3], [0, 4])
    assert len(report.heat_maps(runs[3], [3, 1]).axes) == 3 * 8


def test_seeds_that_have_diverged_have_a_score_of_0_and_are_told(faces: Faces, tmp_path: Path) -> None:
    small = [*SMALL, "optimizer.frozen=0"]
    one = executed(
        tmp_path / "1", faces, "deepfacto", "rank4", *small, "optimizer.theta_step.blocks=[[1e-3,1e300],0,[1e-3,1e300]]"
    )
    both = executed(tmp_path / "2", faces, "deepfacto", "rank4", *small, "optimizer.theta_step.blocks=[1e300,0,1e300]")
    (measured,) = one.table("probes").groupby("replica")["balanced_accuracy"].mean()
    assert sorted(report_of("lfw_proxy").score(one).values()) == [0.0, pytest.approx(measured)]
    assert list(report_of("lfw_proxy").score(both).values()) == [0.0, 0.0]
    nmf = executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    for run, seeds, why in ((both, 0, "diverged"), (one, 1, "one seed")):
        table = report_of("lfw_proxy").table([nmf, run])
        assert table["setting"].iloc[1] == f"rank4, made-up labels, {2 - seeds} of 2 seeds diverged"
        assert list(table["seeds"]) == [2, seeds]
        assert list(table[ABOVE_NMF]) == ["baseline", f"– ({why})"]


def test_runs_of_one_rank_with_values_of_their_own_are_told_apart(faces: Faces, tmp_path: Path) -> None:
    runs = []
    for step in ("0.001", "0.002"):
        run = executed(tmp_path / step, faces, "deepfacto", "rank4", *SMALL, "seeds=[0]")
        told = run.info | {"overrides": ["fewest=5", f"optimizer.theta_step={step}"], "identity": step}
        (run.folder / "run.json").write_text(json.dumps(told))
        runs.append(Run(run.folder))
    figures = report_of("lfw_proxy").figures(runs)
    axes = figures["lfw_proxy"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"DeepFacto, rank4, optimizer.theta_step={step}" for step in ("0.001", "0.002")
    ]
    assert "fewest=5" in figures["lfw_proxy"].get_supxlabel()  # of both
    assert len({bar.get_y() for bar in axes.patches}) == 2
    assert {f"lfw_proxy_rank4_{step}_heat_maps" for step in ("0.001", "0.002")} < set(figures)
    columns = report_of("lfw_proxy").further_tables(runs)["lfw_proxy_attributes"].columns
    assert sum("optimizer.theta_step=0.002" in column for column in columns) == 3


def test_impossible_ranks_and_rounds_are_named(faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"model.rank: None is not a whole number from 1 up; setting=rank32 or so"):
        deepfacto.run(config(tmp_path, "optimizer=pca"), LAUNCH)
    monkeypatch.setattr(deepfacto, "user_errors", nullcontext)
    with pytest.raises(ValueError, match=r"model.rank: 32 is more than the 6 channels"):
        executed(tmp_path, faces, "pca", "rank32")
    with pytest.raises(Exception, match=r"rounds: 0 is not a whole number from 1 up"):
        executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=0")


def test_the_paper_s_numbers_stand_beside_lfwa_s_labels_alone(faces: Faces, tmp_path: Path) -> None:
    for labels, expected in (("LFWA", 74.8), ("made-up labels", None)):
        options = config(tmp_path, row("deepfacto"), *SMALL)
        options.seeds = [0]
        found = job(options, replace(faces, labels=labels), tmp_path / labels.split()[0], "deepfacto")
        table = report_of("lfwa_deepfacto").table([execute(options, found)])
        assert table["paper"].iloc[0] == expected or (expected is None and pd.isna(table["paper"].iloc[0]))
        assert list(table["paper"].iloc[1:]) == [81.0, 84.0, 83.16]  # what the paper cites


def test_probes_that_were_measured_are_not_measured_again(
    faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = deepfacto.Probe.__call__

    def counted(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(deepfacto.Probe, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    (kept,) = tmp_path.glob("runs/.partial/*/probes.jsonl")
    kept.write_text(kept.read_text() + '{"scores": "cut o')
    run = executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    assert len(calls) == 3  # seed 0; seed 1, which was interrupted; seed 1
    assert list(run.table("probes")["seed"]) == [0, 1]


def test_what_was_sealed_and_changed_is_not_read() -> None:
    line = seal({"auc": 87.5})
    assert unseal(line) == {"auc": 87.5}
    for changed in (line.replace("87", "97"), line[:-3], line[1:], "", "{}"):
        with pytest.raises(ValueError, match="the checksum is another"):
            unseal(changed)


def test_a_full_disk_leaves_the_probes_that_were_measured(
    faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two is cut off in the middle of its line; when there is room, it alone is measured again."""
    real, calls = Path.open, []

    def opened(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = real(path, mode, *rest, **named)
        if mode == "a":
            calls.append(path)
        if len(calls) == 2:
            write = file.write
            monkeypatch.setattr(Path, "open", real)

            def half(text: str) -> int:
                write(text[: len(text) // 2])
                file.close()
                raise OSError(errno.ENOSPC, "No space left on device")

            return nullcontext(SimpleNamespace(write=half))
        return file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(WriteError, match=r"probes.jsonl: what was probed could not be written: .*No space left"):
        executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    measured = []
    measure = deepfacto.Probe.__call__
    monkeypatch.setattr(
        deepfacto.Probe, "__call__", lambda self, *given: (measured.append(1), measure(self, *given))[1]
    )
    monkeypatch.setattr(Slot, "complete", lambda *_: None)
    executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    executed(tmp_path, faces, "nmf", "rank4", "optimizer.rounds=5")
    assert len(measured) == 1


def test_runs_of_faces_check_clean(faces: Faces, tmp_path: Path) -> None:
    for method, more in (("nmf", ["optimizer.rounds=5"]), ("deepfacto", [*SMALL])):
        options = config(tmp_path, row(method), *more)
        plain: Any = OmegaConf.to_container(options, resolve=True)
        found = job(options, faces, tmp_path, method)
        sha = identity(plain, {key: found.info[key] for key in ("experiment", "method", "setting")}, faces.sha256)
        given = {"schema": 2, "identity": sha, "dataset": {"sha256": faces.sha256}}
        found = replace(found, config=plain, slot=replace(found.slot, identity=sha), info=found.info | given)
        run = execute(options, found)
        assert list(problems(run.folder)) == []
        damaged = run.folder / "probes.csv"
        damaged.write_text(damaged.read_text().replace(ATTRIBUTES[0], ATTRIBUTES[1], 1))
        assert list(problems(run.folder)) == ["probes.csv: was changed, its SHA-256 is not that in SHA256SUMS"]
    with (run.folder / "arrays.npz").open("r+b") as file:
        file.truncate(1000)
    (run.folder / "SHA256SUMS").unlink()
    (problem,) = problems(run.folder)
    assert problem.startswith("arrays.npz: does not parse")


def test_each_point_of_a_grid_has_its_own_probes(faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path, row("deepfacto"), "seeds=[0]", *SMALL)
    options.seeds, options.optimizer.theta_step = [0, 0], [0.0, 0.1]
    found, seen = job(options, faces, tmp_path, "deepfacto"), []
    measure = deepfacto.Probe.__call__
    monkeypatch.setattr(
        deepfacto.Probe, "__call__", lambda self, x, *rest: (seen.append(x), measure(self, x, *rest))[1]
    )
    probes = execute(options, found).table("probes")
    assert list(probes["replica"]) == [0, 1] and list(probes["seed"]) == [0, 0]
    assert len(seen) == 2 and not np.array_equal(*seen)


def test_labels_that_cannot_be_probed_are_named_before_the_training(
    faces: Faces, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="no attribute is had by 19 training faces, and not had by 19"):
        attributes_to_probe(faces, 19, Probe())
    assert attributes_to_probe(faces, 18, Probe()) == [0] and not caplog.messages
    # Of the training people number 3 alone, and of the test people half.
    faces.attributes[:, 20] = ((faces.people == 3) | (faces.people >= 18)).to(torch.int8)
    assert attributes_to_probe(faces, 3, Probe()) == [0]
    assert caplog.messages[0].startswith(f"not probed: {ATTRIBUTES[20]}; to choose C, training people are held out")
    assert attributes_to_probe(faces, 3, Probe(costs=(0.1,))) == [0, 20]


def test_an_attribute_of_one_training_person_is_left_out_of_a_run(faces: Faces, tmp_path: Path) -> None:
    faces.attributes[:, 20] = ((faces.people == 3) | (faces.people >= 18)).to(torch.int8)
    run = executed(tmp_path, faces, "raw", "default", "fewest=3")
    assert set(run.table("probes")["attribute"]) == {ATTRIBUTES[0]}


def test_nmf_and_pca_are_fitted_to_the_training_faces(faces: Faces, tmp_path: Path) -> None:
    options = config(tmp_path, row("pca"))
    features, task = Features(options, faces), Verification(faces, 20, 0)
    columns = features.maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    train = features.maps[faces.train].permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    (found,) = deepfacto.PCA(4).represent(features, task, [0])
    expected = Components(4, random_state=0).fit(train).transform(columns)
    np.testing.assert_allclose(found.scores.permute(0, 2, 3, 1).reshape(-1, 4).numpy(), expected, atol=1e-3, rtol=1e-4)
    first, second = deepfacto.PostHocNMF(3, 20).represent(features, task, [0, 1])
    assert not torch.equal(first.scores, second.scores)
    assert first.scores.min() >= 0.0 and first.scores.shape == (72, 3, 4, 4)
    assert first.row is not None and 0.0 < first.row["residual_2"] < 0.5


def test_the_frozen_features_are_kept_and_are_those_of_the_weights(
    faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path)
    first = Features(options, faces).frozen
    expected = small_backbone(None)[0](faces.images.float())
    torch.testing.assert_close(first, expected.detach())
    with monkeypatch.context() as patched:
        patched.setattr(Features, "applied", lambda *_: pytest.fail("computed again"))
        assert torch.equal(Features(options, faces).frozen, first)
    # Another stage with the same parameters is not taken for it, nor is a damaged file.
    other = Features(config(tmp_path, "backbone.frozen=act"), faces)
    assert torch.equal(other.frozen, first.relu())
    (kept,) = (path for path in (tmp_path / "lfwa/cache").iterdir() if path != other._kept)
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(Features(options, faces).frozen, first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.cut=neck", r"backbone.cut: 'neck' is not one of stem, act, body, embed"),
        ("backbone.frozen=body", r"backbone.frozen: 'body' does not come before the cut, 'body'"),
    ],
)
def test_wrong_stages_are_named(override: str, message: str, faces: Faces, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Features(config(tmp_path, override), faces)


def test_held_out_people_are_training_people(faces: Faces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    people = torch.cat([torch.zeros(20), torch.ones(9), torch.arange(2, 9), faces.people[36:]]).long()
    monkeypatch.setattr(deepfacto, "_load", lambda **_: replace(faces, people=people))
    options = config(tmp_path)

    def loaded(**changes: Any) -> Faces:
        named = {"name": "lfwa", "root": str(tmp_path), "holdout": 0, "device": None, "dtype": torch.float32} | changes
        return load(options.backbone, **named)

    for holdout in (5, 10, 20):
        kept = loaded(holdout=holdout)
        assert set(kept.train.tolist()) | set(kept.test.tolist()) == set(faces.train.tolist())
        assert not set(people[kept.train].tolist()) & set(people[kept.test].tolist())
        assert abs(len(kept.test) - holdout) <= 10  # of people with 20, 9 and 1 images
    assert len({loaded(holdout=h).sha256 for h in (0, 5, 10)}) == 3
    with pytest.raises(ValueError, match=r"dataset.holdout: 99 is not between 0 and the 36 training images"):
        loaded(holdout=99)
    with pytest.raises(ValueError, match="dtype: faces need float32"):
        loaded(dtype=torch.float64)


def test_wrong_backbones_are_named(tmp_path: Path) -> None:
    for changes, message in (
        ({"name": "resnet"}, r"backbone.name: 'resnet' is not one of dlib_resnet29, inception_resnet_v1"),
        ({"name": "inception_resnet_v1"}, "backbone.weights: null is a network that has not been trained"),
    ):
        options = config(tmp_path)
        options.backbone.update(changes)
        with pytest.raises(ValueError, match=message):
            deepfacto.build(options.backbone)


def test_heat_maps_are_of_consistent_factors_at_different_places(faces: Faces) -> None:
    scores = torch.full((72, 5, 4, 4), 0.5)  # factor 0: everywhere
    scores[:, 1:] = torch.rand(72, 4, 4, 4) * 0.1
    scores[:, 1, 0, 0] += 1.0
    scores[:, 2, 3, 3] += 0.5
    scores[:, 3, 0, 0] += 0.7  # the place of factor 1
    scores[torch.arange(72), 4, torch.arange(72) % 4, torch.arange(72) // 4 % 4] += 1.0  # anywhere
    shown = heat_maps(Represented(0, 7, scores), faces)
    assert chosen_factors(shown, 2) == [1, 2] and shown["seed"] == 7
    assert shown["consistency"][0] == pytest.approx(0.0, abs=1e-6) and shown["consistency"][4] < 0.1
    assert (shown["consistency"] <= 1.0).all()
    assert shown["maps"].shape == (5, 8, 4, 4) and shown["faces"].shape == (8, 3, 100, 100)


def test_the_scores_of_deepfacto_are_projections_of_the_trained_maps(faces: Faces, tmp_path: Path) -> None:
    options = config(tmp_path, row("deepfacto"), *SMALL)
    features, task = Features(options, faces), Verification(faces, 20, 0)
    found = job(options, faces, tmp_path, "deepfacto")
    represented, *_ = deepfacto.train_jointly(options, found, features, task)
    scores = next(iter(represented)).scores
    problem = deepfacto.build_problem(options, features)
    test = features, features.frozen[task.images], task
    observer = Observer(quantity="verification")
    start = with_optimizer(options, problem, found.info["seeds"])
    train_or_resume(options, found, start, test, observer, measure=deepfacto.measure_faces)
    state = start.state
    network = problem.blocks.export(state.theta, 0)
    assert isinstance(network, nn.Sequential)
    with torch.no_grad():
        maps = network[0](features.frozen[:2])
    assert not torch.allclose(
        maps, features.maps[:2], rtol=1e-4
    )  # the tail has been trained, the backbone's own has not
    places = (rows[:2].permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for rows in (maps, scores))
    basis = network[1].basis.double().numpy()
    for column, score in zip(*places, strict=True):
        assert np.linalg.norm(column - basis @ score) <= nnls(basis, column)[1] * (1 + 1e-3) + 1e-4


def test_the_tail_keeps_its_running_statistics(faces: Faces, tmp_path: Path) -> None:
    options = config(tmp_path, row("deepfacto"), *SMALL, "optimizer.frozen=0")
    features = Features(options, faces)
    problem = deepfacto.build_problem(options, features)
    optimizer = instantiate(options.optimizer, _convert_="all")
    state = optimizer.init(problem, [0])
    torch.testing.assert_close(state.z[0][0], features.maps[faces.train])
    start = state.theta.flat().clone()
    optimizer.step(problem, state)
    of_tail = sum(parameter.numel() for parameter in features.tail.parameters())
    assert of_tail and not torch.equal(state.theta.flat()[:, :of_tail], start[:, :of_tail])
    assert (problem.blocks.export(state.theta, 0)[0].layers[1][1].running_mean == 5.0).all()


def test_the_whole_experiment_runs_and_runs_once(tmp_path: Path) -> None:
    """As a user launches it, with a network of its own."""
    random = np.random.RandomState(0)
    names = []
    for person in range(16):
        folder = tmp_path / "data/lfwa/faces" / f"P{person:02}"
        folder.mkdir(parents=True)
        face = random.randint(0, 120, (8, 8, 3))
        for number in range(3):
            pixels = face + random.randint(0, 20, (8, 8, 3)) + np.array([100 * (person % 2), 0, 0])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"P{person:02}_{number}.png")
            names.append((f"P{person:02}_{number}.png", person % 2))
    table = pd.DataFrame({"image": [n for n, _ in names]} | {a: [y for _, y in names] for a in ATTRIBUTES})
    table.to_csv(tmp_path / "data/lfwa/lfw_attributes_proxy.csv.gz", index=False)
    faces = ["experiment=lfw_proxy", "backbone.frozen=stem", "backbone.cut=body"]
    faces += ["backbone.box=null", "fewest=3", "verification.number=10", "probe.costs=[1e-3]", "seeds=[0,1]"]
    faces += [f"{key}={tmp_path}/{key}" for key in ("results", "outputs")] + [f"dataset.root={tmp_path}/data"]

    def launch(*arguments: str) -> list[Run]:
        multirun(*faces, *arguments, "progress=false", "threads=1")
        return Store(tmp_path / "outputs").runs("lfw_proxy")

    unreported = "~hydra.callbacks.report"  # as the others are
    (raw,) = launch("optimizer=raw", unreported)
    assert len(raw.table("probes")) == 40
    runs = launch("optimizer=pca,nmf", "setting=rank4", unreported)
    small = ["optimizer.batch_size=12", "optimizer.warm_rounds=5", "optimizer.frozen=1", "iterations=2"]
    runs = launch(row("deepfacto"), *small)
    assert [run.info["method"] for run in runs] == ["raw", "pca", "nmf", "deepfacto"]
    assert [run.info["setting"] for run in runs] == ["default", "rank4", "rank4", "rank4"]
    assert all(run.info["labels"] == "proxy labels" for run in runs)
    again = launch("setting=default")
    assert [run.info["finished"] for run in again] == [run.info["finished"] for run in runs]
    assert list(tmp_path.glob("outputs/logs/*/*/lfw_proxy_rank4_*_heat_maps.png"))


def test_the_page_lists_the_experiment(faces: Faces, tmp_path: Path) -> None:
    others = [("deepfacto", "rank256_loss"), ("deepfacto", "rank32_printed")]
    assert rows_of("lfw_proxy") == [*rows_of("lfwa_deepfacto"), *others]
    assert rows_of("lfw_proxy")[0] == ("raw", "default") and len(rows_of("lfw_proxy")) == 12
    for name, (optimizer, setting) in product(("lfw_proxy", "lfwa_deepfacto"), rows_of("lfwa_deepfacto")):
        options = config(tmp_path, f"experiment={name}", row(optimizer, setting, name))
        method = instantiate(options.optimizer, _convert_="all")
        assert f"rank{options.model.rank}" == setting or optimizer == "raw"
        assert getattr(method, "rank", options.model.rank) == options.model.rank
    run = executed(tmp_path, faces, "raw", "default")
    text = "\n\n".join(experiment_section(report_of("lfw_proxy"), [run]))
    assert "made-up labels" in text and "[lfw_proxy_attributes.csv](tables/lfw_proxy_attributes.csv)" in text
