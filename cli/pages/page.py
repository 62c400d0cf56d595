"""Rendering and writing a page, and the photographs in it, with their heat maps and masks."""

from __future__ import annotations

import base64
import importlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame import __version__
from edgeflame.errors import MissingDependencyError, StorageError
from edgeflame.images import read_mask, shrink
from edgeflame.state import atomic_write

if TYPE_CHECKING:
    from edgeflame.dataset import ImageRecord
    from edgeflame.images import ImageU8, Preprocessing


JPEG_QUALITY = 85


def render_page(template: str, **context: Any) -> str:
    """Fill in a template of this folder.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as exc:
        raise MissingDependencyError('the report needs jinja2: pip install "edgeflame[report]"') from exc
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.PackageLoader("cli.pages", ""),
    )
    environment.filters |= {
        "figure": format_figure,
        "percent": percent,
        "picture": picture_uri,
        "short": lambda sha256: (sha256 or "–")[:12],
        "title": lambda text: text.replace("_", " ").capitalize(),
    }
    now = time.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(version=__version__, made=now, **context)


def prepare_report_folder(folder: Path) -> None:
    """Make the folder for a page. To be called before the work, so that a wrong name is found before it is done.

    Raises:
        MissingDependencyError: what pages are made with is not installed.
        StorageError: the folder cannot be made.
    """
    try:
        importlib.import_module("jinja2")
    except ImportError as exc:
        raise MissingDependencyError('the report needs jinja2: pip install "edgeflame[report]"') from exc
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(f"{folder}: cannot be made ({exc.strerror})") from exc


def write_page(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; what is no text, such as a file's name that is not UTF-8, is escaped.

    Raises:
        StorageError: it cannot be written.
    """
    atomic_write(path, page.encode(errors="backslashreplace"), durable=False)
    return path


def picture_uri(image: ImageU8) -> str:
    """An image as a ``data:`` address, JPEG."""
    import cv2

    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def format_figure(value: object) -> str:
    """A figure for people, at most four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else "–"


def percent(share: float) -> str:
    """A share as people read it: a digit behind the point only below ten percent."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


MAX_SIDE = 512
"""Larger pictures are shrunk: a page holds dozens of them."""

HIT, MISSED, FALSE = (96, 190, 64), (72, 72, 240), (32, 170, 245)
"""BGR of pixels found, missed and found where nothing is. They differ in lightness too."""

_TRUTH = (255, 214, 64)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A photograph on a page.

    Attributes:
        name: its file, below the data set's root.
        label: ``good`` or the defect's name.
        ratio: score over threshold.
        picture: what is shown first.
        heat_map: the same with the anomaly map over it.
        mask: hits, misses and false alarms in colour at a pixel threshold; None without a true mask.
    """

    name: str
    label: str
    ratio: float
    picture: ImageU8
    heat_map: ImageU8
    mask: ImageU8 | None = None


def draw_example(
    record: ImageRecord,
    anomaly_map: npt.NDArray[np.floating],
    preprocessing: Preprocessing,
    *,
    threshold: float,
    pixel_threshold: float | None = None,
) -> Example:
    """Draw one photograph.

    Args:
        record: its file is read again.
        anomaly_map: ``[h, w]`` raw.
        preprocessing: the model's; the picture shows the region that the model saw.
        threshold: of the verdict.
        pixel_threshold: of the mask; None for no mask.

    Raises:
        DataError: the file cannot be read any more.
    """
    from edge.overlay import draw_overlay

    photograph = shrink(preprocessing.picture(preprocessing.read(record.path)), MAX_SIDE)
    truth = None
    if record.mask is not None:
        whole = preprocessing.crop(read_mask(record.mask, max_pixels=preprocessing.max_pixels))
        size = (photograph.shape[1], photograph.shape[0])
        # A thin crack must survive the shrinking: any pixel of it counts.
        small = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
        truth = np.where(np.asarray(small) > 0, 255, 0).astype(np.uint8)
    picture = photograph.copy()
    if truth is not None:
        contours, _ = cv2.findContours(truth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, _TRUTH, max(1, max(picture.shape[:2]) // 240), cv2.LINE_AA)
    return Example(
        name=record.name,
        label=record.label,
        ratio=float(anomaly_map.max()) / threshold,
        picture=picture,
        heat_map=shrink(draw_overlay(photograph, anomaly_map, threshold, truth, label=False), MAX_SIDE),
        mask=None
        if truth is None or pixel_threshold is None
        else _mask_picture(photograph, truth > 0, anomaly_map, pixel_threshold),
    )


def _mask_picture(
    photograph: ImageU8,
    truth: npt.NDArray[np.bool_],
    anomaly_map: npt.NDArray[np.floating],
    pixel_threshold: float,
) -> ImageU8:
    size = (photograph.shape[1], photograph.shape[0])
    found = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > pixel_threshold
    canvas = (0.35 * photograph + 40).astype(np.uint8)
    for region, colour in ((found & truth, HIT), (truth & ~found, MISSED), (found & ~truth, FALSE)):
        canvas[region] = (0.2 * canvas[region] + 0.8 * np.array(colour)).astype(np.uint8)
    return canvas
