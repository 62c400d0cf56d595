"""Every file and module that a page of the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.test_architecture import PACKAGES

PAGES = [
    page for page in sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("[bdt]*/**/*.md"))
    if page.name != "CHANGELOG.md" and page.parent.name != "reference"
]  # fmt: skip
FOLDERS = "|".join((*PACKAGES, "benchmarks", "deploy", "docs", "tests"))
FILE = re.compile(rf"(?:{FOLDERS})/[\w./-]+\.(?:py|md|toml|sh|yml)\b")
MODULE = re.compile(rf"(?:python -m |`)((?:{FOLDERS})(?:\.[a-z_]+)+)")
SUFFIXES = ("toml", "edgeflame", "db", "json", "log", "md", "yml", "py", "sh")


def relative(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in FILE.findall(text) if not (REPOSITORY / name).is_file()]
    missing += [name for name in MODULE.findall(text) if not is_there(name)]
    assert not missing


def is_there(name: str) -> bool:
    """Whether ``name`` is a module, or a word in one: ``package.module`` or ``package.module.name``."""
    folder, _, last = name.rpartition(".")
    if last in SUFFIXES or (REPOSITORY / name.replace(".", "/")).is_dir():
        return True
    path = REPOSITORY / folder.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    module = REPOSITORY / f"{name.replace('.', '/')}.py"
    return module.is_file() or (source.is_file() and re.search(rf"\b{last}\b", source.read_text()) is not None)
