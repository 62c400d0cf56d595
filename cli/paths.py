"""The types of options that are paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class _NonEmptyPath(click.Path):
    """A path. An empty text, as a variable that is not set leaves it, would name the current folder: it is refused."""

    def __init__(self, **kinds: bool) -> None:
        super().__init__(path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; was a variable not set?", param, ctx)
        return super().convert(value, param, ctx)


PATH, FILE, FOLDER = _NonEmptyPath(), _NonEmptyPath(dir_okay=False), _NonEmptyPath(file_okay=False)
"""Of options that take the path of anything, of a file, of a folder."""
