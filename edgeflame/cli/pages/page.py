"""Rendering and writing a page, and the pictures in it."""

from __future__ import annotations

import base64
import importlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflame.errors import MissingDependencyError, StorageError

if TYPE_CHECKING:
    from edgeflame.images import ImageU8

JPEG_QUALITY = 85


def render(package: str, template: str, **context: Any) -> str:
    """Fill in a template that lies in ``package``; it may include those that lie here.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as exc:
        msg = 'the report needs jinja2: pip install "edgeflame[report]"'
        raise MissingDependencyError(msg) from exc

    def read(name: str) -> str | None:
        for place in dict.fromkeys((package, "edgeflame.cli.pages")):
            file = resources.files(place).joinpath(name)
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FunctionLoader(read)
    )
    environment.filters["picture"] = picture_uri
    environment.filters["title"] = lambda text: text.replace("_", " ").capitalize()
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**context)


def prepare(folder: Path) -> None:
    """Make the folder that a page is to lie in: before the work, so that a wrong name does not cost it.

    Raises:
        MissingDependencyError: what pages are made with is not installed.
        StorageError: the folder cannot be made.
    """
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as exc:
            msg = f'the report needs {name}: pip install "edgeflame[report]"'
            raise MissingDependencyError(msg) from exc
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        msg = f"{folder}: cannot be made ({exc.strerror})"
        raise StorageError(msg) from exc


def write_page(path: Path, page: str) -> Path:
    """Write a page, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        msg = f"{path}: cannot be written ({exc.strerror})"
        raise StorageError(msg) from exc
    return path


def picture_uri(image: ImageU8) -> str:
    """An image as a ``data:`` address, JPEG."""
    import cv2

    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def percent(share: float) -> str:
    """A share as people read it: a digit behind the point only below ten percent."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"
