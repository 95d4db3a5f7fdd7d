"""What the figures have in common: a legend above their panels, a caption below them, and which colours they use."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.reports.methods import PALETTE, method_of

LINE = 120  # characters of a caption, at most
PER_INCH = 15.5, 14.0  # characters of a caption and of a legend
BESIDE = 9  # characters that the line beside a text of the legend takes, and the gap to the next column


def legend_above(figure: Figure, title: str = "") -> None:
    """Draw one legend of all panels above them, which has each text once. The figure grows by its height."""
    of_panels = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {text: handle for handles, texts in of_panels for handle, text in zip(handles, texts, strict=True)}
    sizes = [(BESIDE + max(map(len, lines := text.split("\n"))), len(lines)) for text in entries]
    width = PER_INCH[1] * figure.get_figwidth()

    def columns(number: int) -> list[NDArray[Any]]:
        return np.array_split(np.array(sizes), number)  # as Matplotlib fills them

    fitting = [n for n in range(1, len(entries) + 1) if sum(column[:, 0].max() for column in columns(n)) <= width]
    number = ceil(len(entries) / ceil(len(entries) / max(fitting, default=1)))  # no more than its rows need
    look: dict[str, Any] = {"ncols": number, "title": title, "fontsize": 9, "frameon": False}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", **look)
    grow(figure, 0.1 + 0.2 * (bool(title) + max(column[:, 1].sum() for column in columns(number))))


def caption_below(figure: Figure, text: str) -> None:
    """Write a caption below the panels, in lines of equal length. The figure grows by its height."""
    longest = min(LINE, int(PER_INCH[0] * figure.get_figwidth()))
    lines = textwrap.wrap(text, min(longest, len(text) // ceil(len(text) / longest) + 10))
    figure.supxlabel("\n".join(lines), fontsize=8)
    grow(figure, 0.16 * len(lines))


def grow(figure: Figure, inches: float) -> None:
    """Make a figure higher."""
    figure.set_figheight(figure.get_figheight() + inches)


def colours_of(methods: Sequence[str]) -> list[str]:
    """Return a colour for each of these methods: its own, or one of `PALETTE` that the others leave.

    Where a method comes again, its colour is lighter. Where there is no other method, as in a grid, the colours are a
    `sequence`.
    """
    if len(methods) > 1 == len(set(methods)):
        return sequence(len(methods))
    own = {name: method_of(name).colour for name in methods}
    free = cycle([colour for colour in PALETTE if colour not in own.values()] or PALETTE)
    shades = {name: iter(lighter(own[name] or next(free), number)) for name, number in Counter(methods).items()}
    return [next(shades[name]) for name in methods]


def lighter(colour: str, number: int) -> list[str]:
    """Return a number of shades of a colour, from the colour itself to a light one."""
    red, green, blue = (1 - part for part in to_rgb(colour))
    return [to_hex((1 - red * share, 1 - green * share, 1 - blue * share)) for share in np.linspace(1.0, 0.5, number)]


def sequence(number: int) -> list[str]:
    """Return a number of colours from dark to light, for what is no method."""
    return [to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0.05, 0.85, number))]
