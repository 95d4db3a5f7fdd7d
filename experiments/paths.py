"""`~` in paths is the home folder: in configurations, in YAML and on the command line, and in arguments of scripts."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import InterpolationResolutionError

from experiments.implied import drop_other_cuts, left_to_rows, with_implied
from experiments.overrides import names_another_class

IN_OVERRIDE = re.compile(r"(?<=[=,])~(?=/|$)")
IN_VALUE = re.compile(r"^(sqlite:///)?~(?=/|$)")


def in_full(text: str) -> Path:
    """Return the path that an argument of a script means."""
    return Path(text).expanduser()


def expand(node: DictConfig | ListConfig) -> None:
    """Replace the `~` of all values that are `~` or begin with `~/`, those of environment variables too."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(value, dict | list):
            expand(node[key])
        elif isinstance(value, str):
            with suppress(InterpolationResolutionError):
                value = node[key] if value.startswith("${oc.env:") else value
            if IN_VALUE.search(value):
                with read_write(node):
                    node[key] = IN_VALUE.sub(rf"\g<1>{Path.home().as_posix()}", value)


def expand_in_configurations() -> None:
    """Make Hydra `expand` each configuration that it composes from now on, with the overrides that others imply, and
    without what goes with another cut; that of a launch also without what is `left_to_rows`. An override that names
    another class than a node has takes the place of the node; see `names_another_class`.

    Hydra has no hook for this: it makes the folders of a launch and of a sweep's jobs before a callback, or the task,
    sees their configuration."""
    load, apply = ConfigLoaderImpl.load_configuration, ConfigLoaderImpl._apply_overrides_to_config

    @wraps(load)
    def load_expanded(self: Any, config_name: Any, overrides: list[str], **how: Any) -> DictConfig:
        home = Path.home().as_posix()
        overrides = with_implied([IN_OVERRIDE.sub(lambda _: home, o) for o in overrides])
        try:
            config = load(self, config_name, overrides, **how)
        except ConfigCompositionException as error:
            if how.get("run_mode") == RunMode.MULTIRUN and (left := left_to_rows(overrides, str(error))):
                config = load_expanded(self, config_name, [o for o in overrides if o not in left], **how)
                task = config.hydra.overrides.task
                config.hydra.overrides.task = [o for o in overrides if o in (*task, *left)]
                return config
            # `experiments.hints` has better advice than a +
            error.args = (str(error).partition("\nTo append to your config")[0],)
            raise
        drop_other_cuts(config, overrides)
        expand(config)
        return config

    @wraps(apply)
    def apply_replacing(overrides: list[Override], config: DictConfig) -> None:
        for override in overrides:
            if names_another_class(override, config):
                OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
            else:
                apply([override], config)

    ConfigLoaderImpl.load_configuration = load_expanded  # type: ignore[assignment, method-assign]
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply_replacing)  # type: ignore[assignment, method-assign]
