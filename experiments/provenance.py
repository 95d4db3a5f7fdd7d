"""Where numbers come from: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """The machine in words, library versions and the git commit."""
    return {
        "machine": machine(device),
        "versions": {name: version(name) for name in ("torch", "numpy", "hydra-core")}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def machine(device: torch.device) -> str:
    """Such as `AMD EPYC, 2 threads` or `NVIDIA GeForce RTX 2080 Ti`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """The git commit of a clone, with `+` if what determines numbers has changes there; None where there is no git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changes = git("status", "--porcelain", "-uno", ".", ":!tests", ":!results", ":!*.md")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
