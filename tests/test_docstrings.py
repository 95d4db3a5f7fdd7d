"""The examples in the library's docstrings run, and every public class and function has a docstring."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import admm

MODULES = [name for _, name, is_package in pkgutil.walk_packages(admm.__path__, "admm.") if not is_package]
WITH_EXAMPLES = {
    "admm.blocks": ["split"],
    "admm.callbacks": ["EarlyStopping"],
    "admm.checkpoints": ["save"],
    "admm.data": ["load", "normalise", "with_channels"],
    "admm.losses": ["SquaredError", "CrossEntropy", "BinaryCrossEntropy", "Hinge", "FunctionLoss"],
    "admm.optimizers.backprop": ["Backprop"],
    "admm.optimizers.bcd": ["BCD"],
    "admm.optimizers.dladmm": ["DLADMM"],
    "admm.optimizers.protocol": ["Problem"],
    "admm.optimizers.rules": ["Adam", "SGD", "Clipped", "Grouped", "Averaged"],
    "admm.optimizers.standard_admm": ["StandardADMM"],
    "admm.optimizers.taylor": ["Taylor"],
    "admm.schedules": ["Schedule", "schedule", "block_values"],
    "admm.training": ["train"],
}


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_give_what_they_print(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in examples(module):
        runner.run(test, out=report.append)
    assert not report, "".join(report)
    found = {test.name.removeprefix(f"{name}.") for test in examples(module)}
    assert set(WITH_EXAMPLES.get(name, ())) <= found


def documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public classes and functions that are defined in a module, and the public methods of the classes, by name."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", getattr(value, method)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    docs = {n: inspect.getdoc(value) for n, value in documented(module)}
    assert not [n for n, doc in docs.items() if not doc or doc.startswith(f"{n}(")]  # a dataclass's default: its call
