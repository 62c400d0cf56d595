"""What is kept of each product that is taught at this line, in a folder under the line's state, over restarts.

STATE/teaching/PRODUCT/record.json      the record: always written whole
STATE/teaching/PRODUCT/photographs/     the pictures taken, whole frames as the camera gave them
STATE/teaching/PRODUCT/refused/         the last pictures that were left out, shrunk
STATE/teaching/PRODUCT/learnt/          the last model learnt, with the scores of its photographs
STATE/teaching/PRODUCT/models/          the models that went live
"""

from __future__ import annotations

import datetime as dt
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import msgspec

from edge.config.inspection import Rectangle
from edgeflame.errors import DataError, StorageError, UsageError
from edgeflame.images import Region
from edgeflame.log import EventLog
from edgeflame.mqtt.topics import check_name, is_name
from edgeflame.state import check_format_version, read_json, storage_errors, write_record

log = EventLog("teaching")

FOLDER = "teaching"
"""Name in the state folder."""
FORMAT = 1
MAX_PRODUCTS = 100
MAX_PHOTOGRAPHS = 2000
"""Of one product."""
THUMB_SIDE = 320
"""Longest side of a photograph as it is shown among many, pixels."""
REFUSED_KEPT = 12
MODELS_KEPT = 5
"""Models of one product that one can go back to."""
MIN_REGION = 32
"""Least side of a region of interest, pixels."""


class TakenPhotograph(msgspec.Struct, frozen=True, kw_only=True):
    """One picture that was taken."""

    name: str
    """File name; also of its part in a groups file."""
    part: int
    """Number of the part that it shows; photographs of one part have the same."""
    part_id: str
    captured: dt.datetime
    thrown_out: bool = False
    """A person said that it shows no good part; it is kept, and not learnt from."""
    part_known: bool = True
    """Whether it is known to show this part: it was triggered, a file, or taken by hand."""


class RefusedPicture(msgspec.Struct, frozen=True, kw_only=True):
    """One picture that was left out."""

    name: str
    reasons: tuple[str, ...]
    """Words of :class:`edge.result.Reason`, and ``same_part``: it hardly differs from the picture before."""
    captured: dt.datetime


class LearntMarks(msgspec.Struct, frozen=True, kw_only=True):
    """What marks made of a model; keys of a package's provenance ``learnt_from_marks``."""

    num_good_marks: int
    num_bad_marks: int
    left_out: dict[str, int]
    """Reason to the number of marks left out for it."""
    comparison: str
    """With the model before, on parts that neither saw, for people."""
    look_at: tuple[str, ...] = ()
    """Pictures of marks that the others contradict."""


class TaughtModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was learnt and waits for a person."""

    file: str
    """Of the package, relative to the product's folder."""
    sha256: str
    at: dt.datetime
    photographs: tuple[str, ...]
    """Names of those that it was learnt from."""
    region: Rectangle | None
    threshold: float
    """As it was learnt, raw distance."""
    chosen: float | None = None
    """The threshold that a person chose; null: as it was learnt."""
    prior: str | None = None
    """The product whose model it leans on."""
    marks: LearntMarks | None = None
    """Null: it was learnt from photographs alone."""


class LiveModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that went live."""

    file: str
    """Of the package, relative to the product's folder."""
    model: str
    """First 12 digits of the package's SHA-256."""
    since: dt.datetime


class TeachingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one product that is taught."""

    format: int = FORMAT
    product: str
    camera: str
    created: dt.datetime
    frame: tuple[int, int] | None = None
    """Width and height of the pictures collected."""
    region: Rectangle | None = None
    """x, y, width, height: what the model looks at; null: the whole picture."""
    collecting: bool = False
    """Whether each next part is taken."""
    photographs: tuple[TakenPhotograph, ...] = ()
    refused: tuple[RefusedPicture, ...] = ()
    """The last ones, the newest first."""
    num_refused: int = 0
    next_number: int = 1
    next_part: int = 1
    learning_since: dt.datetime | None = None
    """Set while a model is learnt; where it is set at the start, the daemon ended meanwhile."""
    learnt: TaughtModel | None = None
    live: tuple[LiveModel, ...] = ()
    """The newest first; the first one is what the product's name means at this line."""
    before: str | None = None
    """The product that the camera inspected before this one went live; empty: none."""
    problem: str | None = None
    """What went wrong last, for people; null once something worked."""

    @property
    def good(self) -> tuple[TakenPhotograph, ...]:
        """Those that are learnt from."""
        return tuple(one for one in self.photographs if not one.thrown_out)

    @property
    def num_parts(self) -> int:
        """Number of different parts among them."""
        return len({one.part for one in self.good})

    @property
    def is_outdated(self) -> bool:
        """Whether photographs or region have changed since the model was learnt."""
        learnt = self.learnt
        return learnt is not None and (
            learnt.region != self.region or set(learnt.photographs) != {one.name for one in self.good}
        )


def check_region(region: Rectangle, frame: tuple[int, int] | None) -> None:
    """Refuse a region of interest that is not in the picture.

    Args:
        region: x, y, width, height.
        frame: width and height of the camera's picture; None: none has come yet.

    Raises:
        UsageError: it reaches beyond the picture, or is too small.
        DataError: there is no picture yet.
    """
    x, y, width, height = region
    said = f"the region {width}x{height} at {x},{y}"
    if frame is None:
        raise DataError("the camera has given no picture yet in which a region could lie")
    if min(x, y) < 0 or min(width, height) < 1 or x + width > frame[0] or y + height > frame[1]:
        raise UsageError(f"{said} reaches beyond the camera's picture of {frame[0]}x{frame[1]} pixels")
    if min(width, height) < MIN_REGION:
        raise UsageError(f"{said} is too small: {MIN_REGION} pixels or more in width and height")


def as_region(rectangle: Rectangle) -> Region:
    """The same as the learning's region."""
    x, y, width, height = rectangle
    return Region(x=x, y=y, width=width, height=height)


@final
class TeachingStore:
    """The records and their folders; thread-safe. A record that is damaged is left alone and reported.

    Args:
        folder: ``STATE/teaching``.

    Raises:
        StorageError: the folder cannot be read; so in every method.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0
        """Rises with every change."""
        self._lock = threading.RLock()
        self._records: dict[str, TeachingRecord] = {}
        self.damaged: dict[str, str] = {}
        """What is wrong with the records that cannot be read, by product."""
        with storage_errors(folder, "read"):
            names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        for name in filter(is_name, names):
            try:
                record = self._read(name)
            except StorageError as exc:
                log.error("teaching_record_damaged", product=name, reason=str(exc))
                self.damaged[name] = str(exc)
            else:
                if record is not None:
                    self._records[name] = record

    def _read(self, name: str) -> TeachingRecord | None:
        path = self.folder / name / "record.json"
        record = read_json(path, TeachingRecord, advice="move the folder away, and teach the product again")
        if record is not None:
            check_format_version(f"{path}: the record", found=record.format, known=FORMAT)
        return record

    @property
    def records(self) -> Sequence[TeachingRecord]:
        """All of them, the newest first."""
        with self._lock:
            return sorted(self._records.values(), key=lambda one: one.created, reverse=True)

    def get(self, product: str) -> TeachingRecord:
        """A product's record.

        Raises:
            UsageError: it is not taught here.
        """
        with self._lock:
            record = self._records.get(product)
        if record is None:
            known = ", ".join(sorted(self._records)) or "none yet"
            raise UsageError(f"no product {product[:80]!r} is taught at this line; there are: {known}")
        return record

    def path(self, product: str) -> Path:
        """A product's folder."""
        return self.folder / check_name("product", product)

    def create(self, record: TeachingRecord) -> None:
        """Begin a product.

        Raises:
            UsageError: there are too many, or there is one of this name, be it in other letters.
        """
        with self._lock:
            same = next((name for name in self._records if name.casefold() == record.product.casefold()), None)
            if same is not None:
                since = self._records[same].created.astimezone()
                raise UsageError(f"{same} is being taught already, since {since:%Y-%m-%d %H:%M}: go on with that one")
            if record.product in self.damaged:
                raise UsageError(self.damaged[record.product])
            if len(self._records) >= MAX_PRODUCTS:
                raise UsageError(f"{MAX_PRODUCTS} products are taught here; discard one of them first")
            folder = self.path(record.product)
            with storage_errors(folder, "create"):
                for name in ("photographs", "thumbs", "refused", "learnt", "models"):
                    (folder / name).mkdir(parents=True, exist_ok=True)
            self._save(record)

    def change(self, product: str, change: Callable[[TeachingRecord], TeachingRecord]) -> TeachingRecord:
        """Replace a record by a changed one, on the disk first; returns the new one."""
        with self._lock:
            before = self.get(product)
            after = change(before)
            if after != before:
                self._save(after)
            return after

    def discard(self, product: str) -> None:
        """Delete a product with everything that was collected and learnt."""
        with self._lock:
            self.get(product)
            folder = self.path(product)
            gone = folder.with_name(f".{product}.discarded")
            with storage_errors(folder, "delete"):
                shutil.rmtree(gone, ignore_errors=True)
                # At once: half a folder would be a product with half its photographs.
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            del self._records[product]
            self.version += 1

    def touched(self) -> None:
        """Something to show has changed that is not in the records."""
        with self._lock:
            self.version += 1

    def _save(self, record: TeachingRecord) -> None:
        write_record(self.path(record.product) / "record.json", record)
        self._records[record.product] = record
        self.version += 1


def live_products(state: Path | None) -> dict[str, Path]:
    """The packages of the products that were taught at a line and went live, by product."""
    if state is None:
        return {}
    store = TeachingStore(state / FOLDER)
    return {one.product: store.path(one.product) / one.live[0].file for one in store.records if one.live}
