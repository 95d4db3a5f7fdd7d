"""Where numbers come from: machine, versions, commit, sources."""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, resolve_name
from inspect import isclass, isfunction, ismodule
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hydra.utils import get_object

from experiments.identity import OWN_PACKAGES

ROOT = Path(__file__).parents[1]  # of the clone, or the folder of the installed packages
FEW = 6  # files that a message names
SHARED = "experiments.training"  # what other tasks import of the suite that determines numbers


def provenance(device: torch.device, config: dict[str, Any]) -> dict[str, Any]:
    """Return the machine in words, library versions, the git commit, and the sources of what a configuration names."""
    return {
        "machine": machine(device),
        "versions": {name: version(name) for name in ("torch", "numpy", "hydra-core")}
        | {"python": platform.python_version()},
        "commit": commit(),
        "sources": sources(config),
    }


def machine(device: torch.device) -> str:
    """Return the machine in words, such as `AMD EPYC, 2 threads` or `NVIDIA GeForce RTX 2080 Ti`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(folder: Path = ROOT) -> str | None:
    """Return the git commit of a clone, with `+` if what determines numbers has changes; None if there is no git, or if
    the code is not in it, as it is installed into an environment inside a clone of something else."""
    try:
        git(folder, "ls-files", "--error-unmatch", "admm")
        changes = git(folder, "status", "--porcelain", "-uno", ".", ":!tests", ":!results", ":!*.md")
        return git(folder, "rev-parse", "--short=12", "HEAD").strip() + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(folder: Path, *arguments: str) -> str:
    """Run git, and return what it prints. Raises OSError or CalledProcessError."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return done.stdout


# --- Sources


def sources(config: dict[str, Any]) -> dict[str, str]:
    """Return the first twelve digits of the SHA-256 of each file that determines a run's numbers, by the file's name
    (admm/blocks.py).

    These are the modules that the configuration names (`_target_`, the task), the optimizer's first, and the modules
    that they import, without installed libraries. Of the suite's own imports only `SHARED` counts. Of a user's own
    files comments, docstrings and formatting do not count: see `own_code`."""
    found: dict[str, str] = {}
    waiting = list(named_modules({"optimizer": config.get("optimizer")} | config))
    while waiting:
        module = waiting.pop(0)
        if is_own(module) and (name := file_name(module)) not in found:
            found[name], imports = read(module)
            waiting += [other for other in imports if other == SHARED or not other.startswith("experiments.")]
    return found


def own_code(sources: Mapping[str, str]) -> dict[str, str]:
    """Return those of a run's `sources` that are a user's own; they are part of the run's identity."""
    return {name: sha for name, sha in sources.items() if name.partition("/")[0] not in OWN_PACKAGES}


def changed_files(sources: Mapping[str, str]) -> list[str]:
    """Return the names of those files of this project, among a run's `sources`, that are others today."""
    return [name for name, sha in sources.items() if name not in own_code(sources) and hash_of_file(name) != sha]


@cache
def hash_of_file(name: str) -> str | None:
    """Return the hash of a file of this project, as `sources` has it; None if there is no such file."""
    with suppress(FileNotFoundError):
        return short_hash((ROOT / name).read_text(encoding="utf-8"))
    return None


def short_hash(text: str) -> str:
    """Return the first twelve digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def named_modules(config: Any) -> Iterator[str]:
    """Yield the modules of the objects that a configuration names, except those of its logger and its report."""
    if isinstance(config, list):
        for value in config:
            yield from named_modules(value)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key in ("_target_", "task") and "." in str(value):  # a data set's task is a word
                with suppress(Exception):  # a wrong name is told where it is used
                    yield module_of(str(value))
            elif key not in ("logger", "report"):
                yield from named_modules(value)


def module_of(name: str) -> str:
    """Return the module that defines an object; of an object of another library's class, such as a `functools.partial`,
    the module in which it is found. Raises an error of Hydra's for a name of nothing."""
    parents = [*accumulate(name.split(".")[:-1], "{}.{}".format)]
    places = [str(get_object(name).__module__), *reversed(parents)]
    return next((place for place in places if place in sys.modules and is_own(place)), places[0])


@cache
def is_own(module: str) -> bool:
    """Return whether a module is this library's or a user's own. Other libraries are recorded by their version."""
    package = module.partition(".")[0]
    if package in OWN_PACKAGES:
        return True  # installed or not
    try:
        spec = find_spec(package)
    except ValueError:  # as of __main__
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    files = [Path(place) for place in places if place and Path(place).exists()]
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return bool(files) and not any(
        library in file.parents or {"site-packages", "dist-packages"} & set(file.parts)
        for file in files
        for library in libraries
    )


def file_name(module: str) -> str:
    """Return the name of a module's source file, with the path from the folder that has the package."""
    is_package = hasattr(import_module(module), "__path__")
    return f"{module.replace('.', '/')}{'/__init__' if is_package else ''}.py"


@cache
def read(module: str) -> tuple[str, list[str]]:
    """Return the hash of a module's source, as it is at the first call, and the modules that it imports."""
    imported = import_module(module)
    if not getattr(imported, "__file__", None):
        return "", []  # a folder without a file of its own
    text = Path(str(imported.__file__)).read_text(encoding="utf-8")
    counts = text if module.partition(".")[0] in OWN_PACKAGES else without_comments(text)
    return short_hash(counts), list(dict.fromkeys(imports(imported, text)))


def without_comments(text: str) -> str:
    """Return a module's source without comments and docstrings, in a format of its own."""

    class WithoutDocstrings(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            return None if isinstance(node.value, ast.Constant) else node

    return ast.unparse(WithoutDocstrings().visit(ast.parse(text)))


def imports(module: ModuleType, text: str) -> Iterator[str]:
    """Yield the modules that a module's source imports. For an imported name it is the module that defines the name, so
    that a package does not bring in all of its modules."""
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if is_own(name.name))
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            if is_own(origin):
                yield from (defined_in(origin, name.name) for name in node.names)


def defined_in(module: str, name: str) -> str:
    """Return the module that defines a name of `module`."""
    with suppress(ImportError):
        import_module(f"{module}.{name}")  # a module of a package
    value = getattr(import_module(module), name, None)
    found = value.__name__ if ismodule(value) else value.__module__ if isclass(value) or isfunction(value) else module
    return found if is_own(found) else module


def changed_sources(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the sources that differ, and of those that only one side has."""
    return [name for name in {**now, **then} if then.get(name) != now.get(name)]


def sources_changed_since(commit: str | None, names: list[str], folder: Path = ROOT) -> list[str] | None:
    """Return the names of the sources that differ from a commit's in git; None if git does not have the commit, or if
    the commit had changes."""
    if commit is None or commit.endswith("+"):
        return None
    try:
        there = [name for name in names if (folder / name).exists()]
        differing = git(folder, "diff", "--name-only", "--relative", commit, "--", *there) if there else ""
        return [name for name in there if name in differing.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return None


def first_few(files: Sequence[str]) -> str:
    """Return the first `FEW` files in words, and how many more there are."""
    more = f" and {len(files) - FEW} more" if len(files) > FEW else ""
    return f"{', '.join(files[:FEW])}{more}"
