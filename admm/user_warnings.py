"""Warnings that show the user's own line, instead of one of this package."""

from __future__ import annotations

import sys
import warnings
from traceback import walk_stack


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that has called this package, whatever is called in between, such as a user's module."""
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_stack(sys._getframe())]
    outermost = max(level for level, package in enumerate(packages, start=1) if package == "admm")
    warnings.warn(message, category, stacklevel=outermost + 1)
