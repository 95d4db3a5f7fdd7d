"""How an error or warning of the library, which names an argument, gets the path of the key that sets the argument."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)
IN_THE_SUITE = {  # what the library's messages say, in words of the command line
    "initialise: ": "init: ",
    "admm.as_constructed(build), where build() makes a new network": "init=as_constructed",
    "download=True": "dataset.download=true",
    ", a schedule {'start': …, 'end': …}, or a list, one per replica": ", or a schedule {start: …, end: …}",
    ", or a list, one per replica": "",  # which `experiments.checks` refuses
}


@contextmanager
def warnings_in_log(config: DictConfig) -> Iterator[None]:
    """Log the library's warnings with the paths of their keys, where Python prints a line of the suite's source."""
    print_warning = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *others: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):  # see `admm.user_warnings`
            log.warning("%s", with_key_path(str(message), config, "optimizer"))
        else:
            print_warning(message, category, filename, *others)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def in_suites_words(message: str) -> str:
    """Return a message of the library in words of the command line."""
    for words, ours in IN_THE_SUITE.items():
        message = message.replace(words, ours)
    return message


def with_key_path(message: str, config: DictConfig, first: str = "") -> str:
    """Return a message "name: …" with the path of the key of that name, such as "optimizer.batch_size: …".

    The key is looked for in the group `first` and its own groups, and then in the whole configuration and its groups;
    among groups of one level, the one that has it, or else the one that has the value in the message. Any other message
    stays as it is.
    """
    message = in_suites_words(message)
    name, colon, value = message.partition(": ")
    if not colon or not (match := re.match(r"\w+(?=[.\[]|$)", name)):
        return message
    key = match[0]
    for level in _levels(config, first):
        groups = {path: group for path, group in level.items() if key in group}
        if len(groups) > 1:
            groups = {path: group for path, group in groups.items() if value.startswith(f"{group[key]!r} ")}
        for path in groups:
            return f"{path}.{message}".lstrip(".")
    return message


def _levels(config: DictConfig, first: str) -> Iterator[dict[str, DictConfig]]:
    """Yield the groups to look in, by path, one level after the other."""
    for path in dict.fromkeys((first, "")):
        node = OmegaConf.select(config, path) if path else config
        if isinstance(node, DictConfig):
            groups = {str(key): group for key, group in node.items() if isinstance(group, DictConfig)}
            yield {path: node}
            yield {f"{path}.{key}".lstrip("."): group for key, group in groups.items()}
