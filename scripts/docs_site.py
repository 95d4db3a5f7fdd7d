"""What `make docs` adds to MkDocs: pages and files of the repository outside of docs/, under their paths in it.

The README is the home page. A link between files of the repository becomes one between their places in the site; a file
that is no page is copied if a page links to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FURTHER_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")  # to a file
EXAMPLE = re.compile(r"^>>> (?:.+\n?)+?(?=\n\n|\n*\Z)", re.MULTILINE)


def place_of(path: str) -> str:
    """Return where a file of the repository is in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def path_of(place: str) -> str:
    """Return the path in the repository of a page of the site."""
    return "README.md" if place == "index.md" else place if place in FURTHER_PAGES else f"docs/{place}"


def linked_files(path: str) -> list[str]:
    """Return the paths in the repository that a page of it links to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [normpath(join(dirname(path), match[2])) for match in LINK.finditer(text)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, and what pages link to."""
    pages = [*FURTHER_PAGES, *(path_of(file.src_uri) for file in files.documentation_pages())]
    for path in dict.fromkeys([*FURTHER_PAGES, *(linked for page in pages for linked in linked_files(page))]):
        if files.get_file_from_path(place_of(path)) is None and (ROOT / path).is_file():
            files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead from its place in the site to those of other files."""
    place = page.file.src_uri
    folder = dirname(path_of(place))

    def moved(link: re.Match[str]) -> str:
        target = place_of(normpath(join(folder, link[2])))
        return f"{link[1]}{relpath(target, dirname(place) or '.')}{link[3]}"

    return LINK.sub(moved, markdown)


class DoctestsAsCode(griffe.Extension):
    """Turns the examples of docstrings, paragraphs that begin with `>>>`, into blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change an object's docstring."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
