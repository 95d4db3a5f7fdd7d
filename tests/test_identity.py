"""A run's identity: what counts, what a rename costs, and how runs of schema 1 are brought up to date."""

import json
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from stores import run_json

import admm.losses
import admm.optimizers
from experiments import identity as module
from experiments.identity import (
    FORMER_NAMES,
    NOT_IN_IDENTITY,
    identity,
    identity_config,
    row_identity,
    todays_key,
    with_former_names,
    with_todays_names,
)
from experiments.migration import migrate
from experiments.reports.searches import read_ranking
from experiments.rows import CONF
from experiments.store import SUMS, Run, Slot, sums
from experiments.tasks import deepfacto

MODULES = (admm.optimizers, admm.losses, deepfacto)  # of classes that configurations name
CHOICES = {"experiment": "mnist_shallow", "method": "bcd", "setting": "tuned"}
CONFIG: dict[str, Any] = {
    "seeds": [0, 1],
    "dataset": {"name": "a", "root": "x"},
    "optimizer": {"_target_": "admm.optimizers.BCD", "gamma": 1.0},
    "device": "cpu",
    "force": False,
}


def of(config: dict[str, Any], data: str = "data", **choices: str) -> str:
    return identity(config, CHOICES | choices, data)


def with_optimizer(**values: Any) -> dict[str, Any]:
    return CONFIG | {"optimizer": CONFIG["optimizer"] | values}


def test_identity_covers_values_data_and_choices() -> None:
    others = [with_optimizer(gamma=2.0), CONFIG | {"seeds": [0]}, CONFIG | {"precision": "bf16"}]
    changed = [*map(of, others), of(CONFIG, "other data"), *(of(CONFIG, **{key: "another"}) for key in CHOICES)]
    assert len({of(CONFIG), *changed}) == 1 + len(changed)


def test_identity_does_not_cover_the_execution_nor_the_order_of_keys() -> None:
    same = {"optimizer": CONFIG["optimizer"], "dataset": {"root": "y", "name": "a"}, "seeds": [0, 1], "device": "cuda"}
    assert of(same) == of(CONFIG)
    assert of(CONFIG | dict.fromkeys([key for key in NOT_IN_IDENTITY if "." not in key], "another")) == of(CONFIG)
    assert "root" not in identity_config(CONFIG)["dataset"] and CONFIG["dataset"]["root"] == "x"


def test_a_number_counts_by_its_value() -> None:
    assert of(with_optimizer(gamma=1)) == of(with_optimizer(gamma=1.0)) != of(with_optimizer(gamma=True))


def test_an_own_class_counts_by_its_name_and_another_one_by_its_path() -> None:
    assert of(with_optimizer(_target_="admm.optimizers.bcd.BCD")) == of(CONFIG)
    assert of(with_optimizer(_target_="mine.BCD")) != of(CONFIG) != of(with_optimizer(_target_="admm.DLADMM"))


def test_a_null_counts_only_where_the_default_is_another() -> None:
    assert of(CONFIG | {"new": None}) == of(CONFIG)
    init = {"_target_": "admm.models.initialiser", "name": "kaiming_normal"}
    assert len({of(CONFIG | {"init": init | more}) for more in ({}, {"bias": None}, {"bias": 0.0})}) == 3
    admm = {"_target_": "admm.optimizers.BlockADMM", "iterations": 3}
    assert of(CONFIG | {"optimizer": admm}) == of(CONFIG | {"optimizer": admm | {"penalty": None}})


def test_a_row_has_one_identity_for_all_seeds() -> None:
    def row(config: dict[str, Any]) -> str:
        return row_identity(config, CHOICES, "data")

    assert row(CONFIG) == row(CONFIG | {"seeds": [7]}) != row(with_optimizer(gamma=2.0))


def test_a_rename_costs_a_line_and_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"Descent.weight_penalty": ("gamma",), "mine.Descent": ("admm.optimizers.BCD",), "dataset.its": ("name",)}
    monkeypatch.setattr(module, "FORMER_NAMES", lines)
    optimizer = {"_target_": "mine.Descent", "weight_penalty": 1.0}
    renamed = CONFIG | {"optimizer": optimizer, "dataset": {"its": "a", "root": "x"}}
    assert of(renamed) == of(CONFIG)
    assert with_todays_names(CONFIG) == renamed and with_former_names(renamed) == CONFIG
    assert with_todays_names(renamed) == renamed, "a configuration of today stays as it is"
    others = {"backbone": {"gamma": 1.0}, "loss": {"_target_": "admm.losses.Hinge", "gamma": 1.0}}
    assert with_todays_names(others) == others, "a key of the same name elsewhere stays as it is"


def test_a_second_rename_costs_no_run_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMER_NAMES", {"BCD.penalty": ("gamma", "weight_penalty")})
    names = ("gamma", "weight_penalty", "penalty")
    stored = [with_todays_names({"optimizer": {"_target_": "admm.optimizers.BCD", name: 1.0}}) for name in names]
    assert stored == 3 * [{"optimizer": {"_target_": "admm.optimizers.BCD", "penalty": 1.0}}]
    assert {of(CONFIG | config) for config in stored} == {of(CONFIG)}


def test_names_of_today_exist() -> None:
    """And those that they had belong to nothing else, of the same class or, as a ranking has keys alone, of another."""
    files = [file.read_text(encoding="utf-8") for file in CONF.glob("optimizer/*.yaml")]
    configured = {key for text in files for key in re.findall(r"^ *(\w+):", text, re.MULTILINE)}
    for line, former_names in FORMER_NAMES.items():
        owner, _, name = line.rpartition(".")
        if name[0].isupper():
            get_object(line)
        elif owner[0].isupper():
            (own,) = {getattr(module, owner) for module in MODULES if hasattr(module, owner)}
            fields = signature(own).parameters
            assert name in fields and not (fields.keys() | configured) & set(former_names)


def test_a_ranking_s_keys_have_the_names_of_today(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("setting,optimizer.update.weight_decay,loss.scale,held-out\ntuned,1.0,0.3,98.0\n")
    columns = ["setting", "optimizer.theta_update.weight_decay", "loss.scale", "held-out"]
    assert list(read_ranking(tmp_path / "a.csv")) == columns == list(map(todays_key, columns))


# The configuration and the identity that a run of the paper's Figure 3 had by schema 1.
FORMER = """
seeds: [0, 1, 2, 3, 4]
grid: null
iterations: 120
evaluate_every: 5
dtype: float32
dataset: {name: mnist, normalisation: unit, first: null, holdout: 0, holdout_seed: 0}
model: {_target_: admm.models.mlp, hidden: [128, 128]}
init: {_target_: admm.models.initialiser, name: normal, mean: 0.0, std: 0.03, bias: 0.1}
split: {_target_: admm.blocks.split, per_layer: true, activation: end}
loss: {_target_: admm.losses.SquaredError, scale: 1.0}
optimizer: {_target_: admm.optimizers.BCD, gamma: 1.0, rho: 1.0, alpha: 0.1}
setting: tuned
"""
# That of the tuned Block-ADMM, with keys that have other names today.
FORMER_KEYS = """
seeds: [0, 1, 2, 3, 4]
grid: null
iterations: 20
evaluate_every: 1
dtype: float32
dataset: {name: mnist, normalisation: unit, holdout: 0, holdout_seed: 0}
model: {_target_: admm.models.mlp, hidden: [128, 128]}
init: {_target_: admm.models.initialiser, name: pytorch}
split: {_target_: admm.blocks.split, per_layer: true, activation: start}
loss: {_target_: admm.losses.SquaredError, scale: 0.3}
optimizer:
  _target_: admm.optimizers.BlockADMM
  iterations: 20
  sweep: minibatch
  batch_size: 256
  beta: 1.0
  primal_rounds: 1
  theta_step: {start: 0.002, end: 0.0}
  theta_passes: 1.0
  update: {_target_: admm.optimizers.Adam, beta1: 0.9, beta2: 0.999, epsilon: 1.0e-08, weight_decay: 1.0}
  z_step: 1.0
  z_update:
    _target_: admm.optimizers.ZUpdate
    name: majorised
    steps: 4
    last: prox
    beta1: 0.9
    beta2: 0.999
    epsilon: 1.0e-08
  curvature_every: 2
  dual_step: {start: 1.0, end: 0.0}
  dual_init: 0.0
  refresh: 0.9
  slice_size: 2000
  penalty: null
setting: tuned
"""
DATA = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"


def former(root: Path, method: str = "bcd", identity: str = "470ff6e8c385", config: str = FORMER) -> Run:
    slot = Slot(root, "mnist_shallow", f"{method}-tuned", identity)
    slot.folder.mkdir(parents=True)
    (slot.folder / "config.yaml").write_text(config, encoding="utf-8")
    (slot.folder / "history.csv").write_text("iteration,replica\n0,0\n", encoding="utf-8")
    data = {"sha256": DATA, "holdout": 0}
    content = run_json(method, "tuned", "2026-11-22", identity=slot.identity, dataset=data)
    del content["schema"]  # schema 1 did not write it
    (slot.folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    return Run(slot.folder)


def test_a_run_of_schema_1_is_migrated_once_and_whole(tmp_path: Path) -> None:
    run = former(tmp_path)
    history = (run.folder / "history.csv").read_bytes()
    (line,) = migrate(tmp_path)
    (moved,) = tmp_path.glob("runs/mnist_shallow/*")
    config = yaml.safe_load(FORMER) | {"precision": "fp32"}
    expected = identity(config, CHOICES, DATA)
    assert line == f"mnist_shallow/bcd-tuned-470ff6e8c385 -> mnist_shallow/bcd-tuned-{expected}"
    assert moved.name == f"bcd-tuned-{expected}" and Run(moved).info["identity"] == expected
    assert Run(moved).config == {key: value for key, value in config.items() if key != "setting"}
    assert (moved / "history.csv").read_bytes() == history
    assert dict(reversed(pair.split("  ")) for pair in (moved / SUMS).read_text().splitlines()) == sums(moved)
    assert list(migrate(tmp_path)) == []


def test_a_run_of_schema_1_with_former_keys_is_migrated_to_the_identity_that_it_has_had_since(tmp_path: Path) -> None:
    former(tmp_path, "block_admm", "c467fa653c12", FORMER_KEYS)
    list(migrate(tmp_path))
    (moved,) = tmp_path.glob("runs/mnist_shallow/*")
    assert moved.name == "block_admm-tuned-da4044245623"
    optimizer = Run(moved).config["optimizer"]
    assert (optimizer["forward_mixing"], optimizer["theta_update"]["weight_decay"]) == (0.9, 1.0)
    assert (optimizer["z_update"]["output_update"], optimizer["sample_storage"]) == ("prox", "device")
    assert not {"refresh", "update", "variables"} & set(optimizer) and "last" not in optimizer["z_update"]


def test_a_run_whose_configuration_was_changed_is_not_migrated(tmp_path: Path) -> None:
    run = former(tmp_path)
    (run.folder / "config.yaml").write_text(FORMER.replace("120", "121"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml hashes to .*, not to 470ff6e8c385"):
        list(migrate(tmp_path))
    assert [path.name for path in tmp_path.glob("runs/mnist_shallow/*")] == [run.folder.name]


def test_a_migration_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = former(tmp_path)
    shutil.copytree(run.folder, tmp_path / "copy")
    list(migrate(tmp_path))
    shutil.copytree(tmp_path / "copy", run.folder)  # as if it was stopped before the former folder was deleted
    assert len(list(migrate(tmp_path))) == 1 and len(list(tmp_path.glob("runs/mnist_shallow/*"))) == 1
