"""The notebooks run from their first cell to the last; in the gallery's, both methods end at nearly the same score."""

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]


def _executed(name: str, *further: str) -> list[Any]:
    """Return the outputs of a notebook's cells, and of further code at its end."""
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    book.cells += map(nbformat.v4.new_code_cell, further)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return outputs


@pytest.mark.parametrize("name", ["tour", "figures"])
def test_a_notebook_runs(name: str) -> None:
    outputs = _executed(name)
    if name == "tour":
        assert float(outputs[-1]["data"]["text/plain"]) > 95.0


@pytest.mark.parametrize(
    ("name", "least", "apart"),
    [
        ("resnet18", 30.0, 5.0),  # percent, here and where the score is above 1
        ("unet", 0.7, 0.05),
        ("gpt", 28.0, 2.0),
        ("graph", 80.0, 2.0),
        ("tabular", 0.4, 0.05),
        ("finetuning", 95.0, 2.0),
    ],
)
def test_a_notebook_of_the_gallery_comes_near_adam(name: str, least: float, apart: float) -> None:
    pytest.importorskip("torchvision") if name == "resnet18" else None
    outputs = _executed(name, "print(*last.mean().iloc[:, -1])")
    adam, ours = map(float, outputs[-1]["text"].split())
    assert ours > least
    assert abs(ours - adam) < apart
