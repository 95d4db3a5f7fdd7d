"""The notebooks run from their first cell to the last."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["tour", "figures"])
def test_a_notebook_runs(name: str) -> None:
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if name == "tour":
        assert float(outputs[-1]["data"]["text/plain"]) > 95.0
