"""Marking the parts that the page remembers, and looking through the marks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import msgspec
import numpy as np

from edge.result import Inspected, Result
from edge.status import CameraStatus
from edge.web.history import PartHistory
from edgeflame.errors import DataError, UsageError
from edgeflame.images import ImageU8, read_image, shrink
from edgeflame.mark_shapes import Shape, Shapes, paint
from edgeflame.marks import Kind, Mark, MarkStore, Person, TrueLabel

PAGE_SIZE = 24
"""Most marks in one answer."""
_RED = (60, 60, 230)
"""BGR, of the outline of what a person marked."""


class MarkBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person says of a part: body of ``POST /api/parts/{key}/mark``."""

    was: TrueLabel
    kind: Kind | None = None
    by: Person = ""
    where: Shapes = ()


class ChangeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /api/marks/{name}``."""

    action: Literal["correct", "undo", "delete"]
    was: TrueLabel | None = None
    """For ``correct``, as are the next two; what is left out stays."""
    kind: Kind | msgspec.UnsetType | None = msgspec.UNSET
    where: Shapes | None = None
    by: Person = ""


class MarkQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which marks are looked for."""

    was: TrueLabel | None = None
    kind: str | None = None
    """``-`` for those of no kind."""
    camera: str | None = None
    product: str | None = None
    part: str | None = None
    """Part of the part's name, in any case."""
    skip: int = 0
    """So many of the newest that fit."""

    def fits(self, mark: Mark) -> bool:
        """Whether a mark is looked for."""
        judged = mark.judged
        return (
            (self.was is None or mark.was == self.was)
            and (self.kind is None or (mark.kind or "-") == self.kind)
            and (self.camera is None or judged.camera == self.camera)
            and (self.product is None or mark.product == self.product)
            and (self.part is None or self.part.casefold() in judged.part_id.casefold())
        )


class ShownMark(msgspec.Struct, frozen=True, kw_only=True):
    """One mark on the page."""

    name: str
    was: TrueLabel
    kind: str | None
    by: str
    marked: dt.datetime
    has_place: bool
    """Whether it says where the defect is."""
    product: str
    camera: str
    part_id: str
    verdict: str
    """What the line had said; empty where that is not known."""
    ratio: float | None
    """Score over threshold."""
    model: str


class MarksView(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/marks``: how many there are, and those that fit, the newest first."""

    good: int
    bad: int
    at_most: int
    folder: str
    kinds: dict[str, int]
    """Kinds of defects said so far, the most frequent first."""
    fitting: int
    marks: tuple[ShownMark, ...]


class PartMarks:
    """Marks remembered parts; thread-safe.

    Args:
        store: keeps the marks.
        history: remembers the parts.
        statuses: of the cameras, which say whose product a model is.
    """

    def __init__(self, store: MarkStore, history: PartHistory, statuses: Callable[[], Sequence[CameraStatus]]) -> None:
        self.store = store
        self._history = history
        self._statuses = statuses
        self._products: dict[str, str] = {}

    def mark(self, key: int, said: MarkBody) -> Mark:
        """Mark the part with a key of the page.

        Raises:
            UsageError: it is no longer remembered, or what is said makes no sense.
            DataError: it has no picture.
            StorageError: the mark cannot be kept; nothing has changed.
        """
        inspected = self._history.part(key)
        if inspected is None:
            raise UsageError("this part is no longer kept")
        return self._keep(inspected, said)

    def mark_part(self, camera: str | None, part_id: str, was: TrueLabel, *, kind: str | None, by: str) -> Mark:
        """Mark the last part of a name; errors as :meth:`mark`, also where several cameras have seen it."""
        found = self._history.find(part_id, camera)
        if found is None:
            raise UsageError(f"no part {part_id[:100]!r} is remembered; only the last ones are (web.recent)")
        return self._keep(found, MarkBody(was=was, kind=kind, by=by))

    def view(self, query: MarkQuery) -> MarksView:
        """The marks that fit.

        Raises:
            StorageError: they cannot be read.
        """
        counts = self.store.counts()
        fitting = [mark for mark in reversed(self.store.marks()) if query.fits(mark)]
        start = max(0, query.skip)
        return MarksView(
            good=counts.good,
            bad=counts.bad,
            at_most=counts.at_most,
            folder=counts.folder,
            kinds=counts.kinds,
            fitting=len(fitting),
            marks=tuple(_shown(mark) for mark in fitting[start : start + PAGE_SIZE]),
        )

    def change(self, name: str, body: ChangeBody) -> Mark | None:
        """Correct, take back or delete a mark; returns what holds now, None if nothing.

        Raises:
            UsageError: there is no such mark, or what is said makes no sense.
            StorageError: it cannot be written; nothing has changed.
        """
        match body.action:
            case "correct":
                return self.store.correct(name, was=body.was, kind=body.kind, where=body.where, by=body.by)
            case "undo":
                return self.store.undo(name)
            case "delete":
                self.store.remove(name, by=body.by)
                return None

    def picture(self, name: str, *, side: int) -> bytes | None:
        """A mark's picture as JPEG, with the outline of what was marked, at most ``side`` pixels long; None: none."""
        mark = self.store.find(name)
        if mark is None:
            return None
        try:
            image = read_image(self.store.picture(mark))
        except DataError:
            # Somebody has just taken it away.
            return None
        if mark.where:
            image = _outlined(image, mark.where)
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(shrink(image, side)), [cv2.IMWRITE_JPEG_QUALITY, 88])
        return data.tobytes()

    def _keep(self, inspected: Inspected, said: MarkBody) -> Mark:
        result, image = inspected.result, inspected.image
        if image is None:
            raise DataError(f"part {result.part_id} has no picture to keep")
        return self.store.add(
            name_of(result),
            image,
            said.was,
            result=msgspec.Raw(msgspec.json.encode(result)),
            kind=said.kind,
            by=said.by,
            product=self._product_of(result),
            where=said.where,
        )

    def _product_of(self, result: Result) -> str:
        # A camera may have been switched to another product since.
        self._products.update({status.model: status.product for status in self._statuses()})
        return self._products.get(result.model, "")


def name_of(result: Result) -> str:
    """The name of a part's mark."""
    # Cameras with one trigger may capture the same part at the same moment, each as its first.
    when = f"{result.captured:%Y%m%dT%H%M%S%f}Z"
    return f"{when}-{result.camera}-{result.sequence:08d}-{result.part_file_name}"


def _shown(mark: Mark) -> ShownMark:
    judged = mark.judged
    ratio = judged.score / judged.threshold if judged.score is not None and judged.threshold else None
    return ShownMark(
        name=mark.name,
        was=mark.was,
        kind=mark.kind,
        by=mark.by,
        marked=mark.marked,
        has_place=bool(mark.where),
        product=mark.product,
        camera=judged.camera,
        part_id=judged.part_id or mark.name,
        verdict=judged.verdict,
        ratio=None if ratio is None else round(ratio, 4),
        model=judged.model,
    )


def _outlined(image: ImageU8, where: Sequence[Shape]) -> ImageU8:
    mask = paint(where, height=image.shape[0], width=image.shape[1])
    found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return np.asarray(cv2.drawContours(image.copy(), found, -1, _RED, max(1, max(image.shape) // 200)), dtype=np.uint8)
