"""What the committed configuration says of an experiment's rows: their settings and seeds."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.identity import EXECUTION_KEYS

log = logging.getLogger(__name__)
CONF = Path(__file__).parents[1] / "conf"
CHOICES = ("experiment", "optimizer", "setting")  # overrides that choose a row of an experiment


@dataclass(frozen=True)
class TableRow:
    """The row of an experiment's table that a run is for.

    overrides: those of the command line that change the row's numbers. seeds: the committed ones.
    """

    experiment: str
    setting: str
    overrides: list[str]
    seeds: list[int]


def row_of(config: DictConfig, method: str, by_seed: bool) -> TableRow:
    """The row of a job's configuration, of an optimizer `method`. by_seed: its seeds may be run a few at a time.

    Raises ValueError for names or groups that do not fit together.
    """
    choices = HydraConfig.get().runtime.choices
    experiment = choices["experiment"]
    settings = CONF / f"settings/{config.get('setting')}/{experiment}_{method}.yaml"
    check_names(experiment, method, choices.get("setting"), settings)
    setting, own = setting_of_row(config.setting, settings)
    overrides, seeds = own_overrides(HydraConfig.get().overrides.task), seeds_of_row(experiment, settings)
    if by_seed and set(config.seeds) <= set(seeds):
        overrides = [override for override in overrides if not override.startswith("seeds=")]
    if not settings.exists() and "defaults" in own:
        overrides.append(f"setting={config.setting}")  # it changes a group, as init=… of the command line does
    check_groups(overrides, settings)
    return TableRow(experiment, setting, overrides, seeds)


def setting_of_row(setting: str, settings: Path) -> tuple[str, Any]:
    """The name of a run's setting, and the content of its file in conf/setting. The name is default if neither this
    file nor `settings`, the row's own in conf/settings, says anything."""
    file = CONF / f"setting/{setting}.yaml"
    own: Any = OmegaConf.load(file) if file.exists() else OmegaConf.create({"elsewhere": True})  # by --config-dir
    if settings.exists() or setting == "default" or set(own) - {"setting"}:
        return setting, own
    log.warning("setting=%s changes nothing here, as there is no %s: as setting=default", setting, in_conf(settings))
    return "default", own


def seeds_of_row(experiment: str, settings: Path) -> list[int]:
    """The seeds of an experiment as committed, with the settings of one of its rows."""
    files = (
        OmegaConf.load(CONF / "config.yaml"),
        inherited(CONF / f"experiment/{experiment}.yaml"),
        inherited(CONF / f"setting/{settings.parent.name}.yaml"),
        inherited(settings),
    )
    return list(OmegaConf.merge(*files).seeds)


def inherited(file: Path) -> Any:
    """The content of a file of settings or of an experiment, if it exists, on that of the files of its kind in its
    defaults list."""
    own: Any = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    names = [name for name in own.pop("defaults", []) if isinstance(name, str)]  # not the choices of other groups
    places = [CONF / name[1:] if name.startswith("/") else file.parent / name for name in names]
    return OmegaConf.merge(*(inherited(place.with_name(f"{place.name}.yaml")) for place in places), own)


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of the command line that change the numbers of an experiment's row."""

    def chooses_only(override: str) -> bool:
        key = override.lstrip("+~").split("=")[0]
        return key in CHOICES or any(key == name or key.startswith(f"{name}.") for name in EXECUTION_KEYS)

    return [override for override in overrides if not chooses_only(override)]


def in_conf(file: Path) -> str:
    """The name of a file of conf/<group>/<option>/, for messages."""
    return f"conf/{file.parents[1].name}/{file.parent.name}/{file.name}"


def check_place() -> None:
    """Raises ValueError where this package is a copy without the configuration beside it."""
    if not CONF.is_dir():
        raise ValueError(
            f"{CONF}: there is no such folder, as `experiments` was installed as a copy, whose code may also be older "
            "than the clone's; do pip install -e . there"
        )


def check_names(experiment: str, method: str, setting: str | None, settings: Path) -> None:
    """Raises ValueError for names of files that are taken for another row's."""
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
                    f"{in_conf(settings)}: is of experiment={experiment} optimizer={method} and of "
                    f"experiment={other} optimizer={of_other}; rename one of them"
                )


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
                    f"{group}={option}: {in_conf(settings)} sets {group}."
                    f"{f', {group}.'.join(sorted(foreign))}; override these, or take setting=default"
                )
