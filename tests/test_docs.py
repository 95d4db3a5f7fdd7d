"""The references of the documents exist: each `file: name` is a file of the project that defines the name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"`((?:admm|conf|experiments|scripts)/[\w./-]+)(?:: ([\w.]+))?`")
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
REFERENCES = sorted({match.groups() for page in PAGES for match in REFERENCE.finditer(page.read_text())}, key=str)
REFERENCES = [(f, n) for f, n in REFERENCES if not re.search("gradient_descent|my_digits", f)]  # which a reader writes


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_a_reference_of_the_documents_exists(file: str, name: str | None) -> None:
    assert (ROOT / file).exists()
    for part in (name or "").split("."):
        if part:
            assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b *[:=]", (ROOT / file).read_text(), re.MULTILINE)


def test_there_are_references() -> None:
    assert len(REFERENCES) > 15
