"""The optimizers' defaults: the classes' are those of the configuration, and they train."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf/optimizer"


def assert_defaults(configured: Any) -> None:
    """That what has been made of a file is what its class makes of the arguments that it cannot do without."""
    needed = {f.name: getattr(configured, f.name) for f in fields(configured)}
    needed = {f.name: needed[f.name] for f in fields(configured) if f.default is f.default_factory is MISSING}
    assert configured == type(configured)(**needed)
    for value in needed.values():
        if is_dataclass(value):
            assert_defaults(value)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_file_of_conf_optimizer_has_the_defaults_of_its_class(name):
    config = OmegaConf.create({"iterations": 5, "model": {"rank": 4}, "file": OmegaConf.load(CONF / f"{name}.yaml")})
    configured = instantiate(config, _convert_="all")["file"]
    missing = {f.name for f in fields(configured)} - set(config.file)
    assert not missing, "options that the file does not show"
    assert_defaults(configured)
