"""What the library says of an argument becomes what the suite says of a key."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from admm.models import initialiser
from experiments import messages
from experiments.errors import BadInput, meant, user_errors
from experiments.messages import warnings_in_log, with_key_path

SGD = {"_target_": "admm.optimizers.SGD", "momentum": 0.0}
GOTMARE = {
    "_target_": "admm.optimizers.Gotmare",
    "iterations": "${iterations}",
    "theta_step": 0.1,
    "batch_size": 64,
    "z_update": SGD,
    "theta_update": {"_target_": "admm.optimizers.Adam", "beta1": 0.9},
}


def config(**changes: Any) -> DictConfig:
    groups = {"init": {"name": "normal"}, "dataset": {"name": "digits", "holdout": 0}, "split": {"after": "fc1"}}
    made = OmegaConf.create({"iterations": 3, "seeds": [0], "optimizer": GOTMARE, **groups})
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


@pytest.mark.parametrize(
    ("message", "group", "expected"),
    [
        ("batch_size: 99 is not", "optimizer", "optimizer.batch_size: 99 is not"),
        ("batch_size: 99 is not", "", "optimizer.batch_size: 99 is not"),
        ("iterations: 0 is not", "optimizer", "optimizer.iterations: 0 is not"),
        ("iterations: 0 is not", "", "iterations: 0 is not"),
        ("theta_step.start: 2 values", "optimizer", "optimizer.theta_step.start: 2 values"),
        ("momentum: 2 is not", "optimizer", "optimizer.z_update.momentum: 2 is not"),
        ("after: no layer 'x'", "optimizer", "split.after: no layer 'x'"),
        ("name: 'digits' is not", "", "dataset.name: 'digits' is not"),
        ("name: 'normal' is not", "", "init.name: 'normal' is not"),
        ("name: 'other' is not", "", "name: 'other' is not"),
        ("dataset.holdout: 0 is", "", "dataset.holdout: 0 is"),
        ("network: a layer", "optimizer", "network: a layer"),
        ("an error without a name", "optimizer", "an error without a name"),
        ("/a/folder/batch_size: is damaged", "optimizer", "/a/folder/batch_size: is damaged"),
    ],
)
def test_the_name_of_an_argument_becomes_the_path_of_its_key(message: str, group: str, expected: str) -> None:
    assert with_key_path(message, config(), group) == expected


def test_what_a_constructor_alone_draws_is_told_in_words_of_the_command_line() -> None:
    network = nn.Linear(2, 2)
    network.positions = nn.Parameter(torch.randn(3))
    with (
        pytest.raises(BadInput, match=r"^init: parameter 'positions' is .* init=as_constructed$"),
        user_errors(),
    ):
        initialiser("pytorch")(network)


def test_a_warning_at_a_line_of_the_suite_is_logged_with_the_path_of_its_key(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="^batch_size: a user's own$") as caught, warnings_in_log(config()):
        warnings.warn_explicit("batch_size: 99 is much", UserWarning, messages.__file__, 1)
        warnings.warn_explicit("batch_size: a user's own", UserWarning, __file__, 1)
    assert [record.getMessage() for record in caplog.records] == ["optimizer.batch_size: 99 is much"]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("my_networks:small", "my_networks:small is written with dots alone: my_networks.small"),
        ("pkg/nets.py:small", "pkg/nets.py:small is written with dots alone: pkg.nets.small"),
        ("./my_networks.small", "./my_networks.small is written with dots alone: my_networks.small"),
        (
            "my_modules",
            "my_modules is of type module; write a function or a class, such as my_modules.Own, my_modules.own",
        ),
        ("my_modules.number", "my_modules.number is of type int; write a function or a class"),
    ],
)
def test_a_target_that_is_a_path_a_module_or_a_value_is_told_with_what_is_right(
    target: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_modules.py").write_text("from pathlib import Path\nnumber = 3\nclass Own: ...\ndef own(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    made = config(loss={"_target_": target})
    with pytest.raises(BadInput) as error, user_errors(made):
        instantiate(made.loss)
    assert str(error.value) == f"loss._target_: {expected}"
    if "dots" in expected:  # as a data set's function is looked for
        with pytest.raises(BadInput) as error, user_errors(made):
            get_method(target)
        assert str(error.value) == f"loss._target_: {expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer__z_update__momentum", 2, "optimizer.z_update.momentum: 2 is not a number from 0 up and below 1.0"),
        ("optimizer__theta_update__beta1", -1, "optimizer.theta_update.beta1: -1 is not a number from 0 up"),
    ],
)
def test_a_nested_object_of_the_configuration_is_named_with_its_path(key: str, value: Any, expected: str) -> None:
    made = config(**{key: value})
    with pytest.raises(BadInput) as error, user_errors(made):
        instantiate(made.optimizer, _convert_="all")
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "my_network.small",
            "loss._target_: there is no module 'my_network', here in {} or installed; did you mean",
        ),
        ("my_networks.smal", "loss._target_: my_networks has no 'smal'; did you mean small?"),
        ("my_networks.other", "loss._target_: my_networks has no 'other'"),
        (
            "my_wrong.small",
            "loss._target_: my_wrong cannot be imported: ModuleNotFoundError: No module named 'nowh",
        ),
        ("small", "loss._target_: small has no module before it, as in my_networks.small"),
        ("admm.losses.SquaredEror", "loss._target_: admm.losses has no 'SquaredEror'; did you mean SquaredError?"),
        (
            "my_networks.small",
            "loss.scale: small() takes input_shape, width; 'loss={{_target_: …}}' replaces all of its keys",
        ),
        ("my_networks.Plain", "loss._target_: Plain() takes no arguments; 'loss={{_target_: …}}' replaces all of its"),
    ],
)
def test_a_target_that_is_not_there_is_told_with_the_nearest(
    target: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_networks.py").write_text("def small(input_shape, width=3): ...\nclass Plain: ...")
    (tmp_path / "my_wrong.py").write_text("import nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = config(loss={"_target_": target, "scale": 1.0})
    with pytest.raises(BadInput) as error, user_errors(made):
        instantiate(made.loss)
    assert str(error.value).startswith(expected.format(tmp_path))
    assert not caplog.text  # Hydra would tell it once more


@pytest.mark.parametrize(
    ("name", "expected"),
    [("admm", "dladmm or block_admm"), ("sgdd", "sgd"), ("gd", "sgd"), ("block", "block_admm"), ("other", "")],
)
def test_names_that_contain_what_was_given_are_meant_before_the_nearest(name: str, expected: str) -> None:
    assert meant(name, ["dladmm", "block_admm", "sgd"]) == (f"; did you mean {expected}?" if expected else "")
