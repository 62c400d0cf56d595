"""Collecting: each next part of a camera is taken as a photograph of a good one, while the line goes on.

The collector is a listener of the camera worker's: it gets each part once its verdict is out, and hands it to a thread
of its own. While that one is busy, parts are passed over and counted; the camera never waits.

A picture is left out, and shown, where the line's own health checks would refuse it: by its light and its sharpness,
another size than the others, the same picture again. Where a camera gives pictures without a trigger, many of them show
the part that still lies there; one that hardly differs from the last taken is not taken.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import final

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edge.config.inspection import ImageQualityConfig
from edge.frame import Captured
from edge.health import image_faults, sharpness
from edge.result import Inspected, Reason
from edge.teaching.record import (
    MAX_PHOTOGRAPHS,
    REFUSED_KEPT,
    THUMB_SIDE,
    RefusedPicture,
    TakenPhotograph,
    TeachingRecord,
    TeachingStore,
)
from edgeflame.background import BackgroundThread
from edgeflame.errors import DataError, EdgeFlameError, StorageError
from edgeflame.images import ImageU8, read_image, shrink, to_8_bit, write_image
from edgeflame.log import EventLog
from edgeflame.state import storage_errors

log = EventLog("teaching")

SAME_PART = "same_part"
"""Why a picture was left out: it hardly differs from the one before, so the part still lies there."""
SAME_GREY_LEVELS = 1.5
"""Two pictures with a smaller mean difference of their thumbnails, in grey levels, show the part that lies there."""
THUMBNAIL = 48
QUEUE_PARTS = 2
MIN_FREE_BYTES = 500_000_000
"""Less free disk ends collecting: the rest is for the line's results."""
NICENESS = 10
_SHOWN_SIDE = 960
_SHARP_OF = 5
"""Photographs whose sharpness tells what is sharp."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A single picture that was asked for."""

    product: str
    same_part: bool
    answer: queue.SimpleQueue[str | EdgeFlameError] = field(default_factory=queue.SimpleQueue)


@final
class Collector:
    """Takes photographs of one camera's parts; a context manager.

    Args:
        camera: the camera's name.
        store: gets the photographs.
        limits: what a picture must be like.
        min_free: bytes of disk that must remain.
    """

    def __init__(
        self,
        camera: str,
        store: TeachingStore,
        limits: Callable[[], ImageQualityConfig],
        *,
        min_free: int = MIN_FREE_BYTES,
    ) -> None:
        self._camera = camera
        self._store = store
        self._limits = limits
        self._min_free = min_free
        self.last: Captured | None = None
        """The last frame with a picture, for the region of interest to be drawn on."""
        self.others: Callable[[Captured, Inspected], None] | None = None
        """A shadow run, which gets the same parts."""
        self.num_passed_over = 0
        """Parts that came while one was being written."""
        self._product: str | None = None
        self._lock = threading.Lock()
        self._asked: list[_Asked] = []
        """Single pictures that were asked for."""
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_PARTS)
        self._before: npt.NDArray[np.float32] | None = None
        self._checksum: int | None = None
        self._sharpness: list[float] = []
        self._thread = BackgroundThread(f"collector-{camera}", self._run, wake=self._offer_end)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close()

    @property
    def product(self) -> str | None:
        """The product that each next part is taken for; None: parts are not taken."""
        return self._product

    def begin(self, product: str) -> None:
        """Take each next part."""
        if self._product != product:
            self._before, self._checksum, self._sharpness = None, None, []
        self._product = product

    def end(self) -> None:
        """Take no more parts."""
        self._product = None

    def take(self, product: str, *, same_part: bool, timeout_s: float) -> str:
        """Take the next picture, whatever it looks like the one before; returns its name.

        Args:
            product: for which it is taken.
            same_part: whether it shows the part of the photograph before.
            timeout_s: how long to wait for a picture.

        Raises:
            DataError: no picture came in time, or it is none that a line would judge.
            StorageError: it cannot be kept.
        """
        asked = _Asked(product=product, same_part=same_part)
        with self._lock:
            self._asked.append(asked)
        try:
            told = asked.answer.get(timeout=timeout_s)
        except queue.Empty:
            with self._lock:
                is_waiting = asked in self._asked
                if is_waiting:
                    self._asked.remove(asked)
            if is_waiting:
                raise DataError(f"camera {self._camera}: no picture came within {timeout_s:g} s") from None
            # It came at the last moment, and is being written.
            told = asked.answer.get()
        if isinstance(told, EdgeFlameError):
            raise told
        return told

    # On the camera's thread.

    def on_part(self, captured: Captured, inspected: Inspected) -> None:
        """Take a part, or pass it over; takes microseconds."""
        frame = captured.frame
        if frame.image_bgr is None:
            return
        self.last = captured
        if (others := self.others) is not None:
            others(captured, inspected)
        if inspected.result.golden:
            # Golden parts may be bad ones.
            return
        product = self._product
        if product is None and not self._asked:
            return
        with self._lock:
            if self._waiting.full():
                # What was asked for waits for the next picture.
                self.num_passed_over += 1
            elif self._asked:
                self._waiting.put_nowait(partial(self._take_one, captured, self._asked.pop(0)))
            elif product is not None:
                self._waiting.put_nowait(partial(self._take_next, captured, product))

    # On the collector's own.

    def _offer_end(self) -> None:
        with contextlib.suppress(queue.Full), self._lock:
            self._waiting.put_nowait(None)

    def _run(self, stop: threading.Event) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while not stop.is_set():
            try:
                work = self._waiting.get(timeout=0.5)
            except queue.Empty:
                continue
            if work is None:
                return
            try:
                work()
            finally:
                self._waiting.task_done()

    def _take_one(self, captured: Captured, asked: _Asked) -> None:
        try:
            name, reasons = self._keep(captured, asked.product, same_part=asked.same_part, may_repeat=True)
        except EdgeFlameError as exc:
            asked.answer.put(exc)
            return
        if name is None:
            words = ", ".join(reasons).replace("_", " ")
            asked.answer.put(DataError(f"the picture was left out: {words}"))
        else:
            asked.answer.put(name)

    def _take_next(self, captured: Captured, product: str) -> None:
        if product != self._product:
            # It was stopped meanwhile.
            return
        try:
            self._keep(captured, product, same_part=False, may_repeat=False)
        except EdgeFlameError as exc:
            # The disk is full, say: what was collected is there, and the line inspects on.
            log.error("collecting_stopped", product=product, camera=self._camera, reason=str(exc))
            self.end()
            problem = f"collecting stopped: {exc}"
            try:
                self._store.change(product, lambda one: msgspec.structs.replace(one, collecting=False, problem=problem))
            except EdgeFlameError:
                self._store.touched()

    def _keep(
        self, captured: Captured, product: str, *, same_part: bool, may_repeat: bool
    ) -> tuple[str | None, tuple[str, ...]]:
        """Keep a photograph, or leave it out; returns its name, or None and why."""
        record, frame = self._store.get(product), captured.frame
        samples = frame.samples
        assert samples is not None
        if len(record.photographs) >= MAX_PHOTOGRAPHS:
            raise DataError(f"{product} has {MAX_PHOTOGRAPHS} photographs, and no more are taken")
        image = to_8_bit(samples)
        thumbnail = _thumbnail(_cropped(image, record))
        checksum = zlib.crc32(np.ascontiguousarray(image).data)
        reasons = self._faults(image, record)
        is_known = frame.trigger is not None or frame.origin is not None
        if not reasons and checksum == self._checksum:
            reasons = (Reason.FROZEN.value,)
        elif not (reasons or may_repeat or is_known) and self._before is not None and _alike(thumbnail, self._before):
            reasons = (SAME_PART,)
        if reasons:
            if reasons != (SAME_PART,):
                self._leave_out(captured, image, record, reasons)
            else:
                self._store.touched()
            return None, reasons
        folder = self._store.path(product)
        with storage_errors(folder, "look at"):
            free = shutil.disk_usage(folder).free
        if free < self._min_free:
            raise StorageError(
                f"only {free / 1e6:.0f} MB of disk are free; {self._min_free / 1e6:.0f} are left for the line's results"
            )
        name = f"{record.next_number:05d}.png"
        write_image(folder / "photographs" / name, samples)
        write_image(folder / "thumbs" / f"{name}.jpg", shrink(image, THUMB_SIDE))

        def with_photograph(one: TeachingRecord) -> TeachingRecord:
            last = one.photographs[-1].part if one.photographs and same_part else None
            photograph = TakenPhotograph(
                name=name,
                part=one.next_part if last is None else last,
                part_id=frame.part_id,
                captured=frame.captured_utc,
                part_known=is_known or may_repeat,
            )
            return msgspec.structs.replace(
                one,
                frame=(image.shape[1], image.shape[0]),
                photographs=(*one.photographs, photograph),
                next_number=one.next_number + 1,
                next_part=one.next_part + (last is None),
                problem=None,
            )

        self._store.change(product, with_photograph)
        self._before, self._checksum = thumbnail, checksum
        return name, ()

    def _faults(self, image: ImageU8, record: TeachingRecord) -> tuple[str, ...]:
        size = (image.shape[1], image.shape[0])
        if record.frame is not None and size != record.frame:
            return (Reason.WRONG_SIZE.value,)
        seen = _cropped(image, record)
        known = self._sharpness
        reference = float(np.median(known)) if len(known) >= _SHARP_OF else None
        faults = tuple(reason.value for reason in image_faults(seen, self._limits(), reference_sharpness=reference))
        if not faults:
            self._sharpness = [*known, sharpness(seen)][-50:]
        return faults

    def _leave_out(self, captured: Captured, image: ImageU8, record: TeachingRecord, reasons: tuple[str, ...]) -> None:
        folder = self._store.path(record.product) / "refused"
        name = f"{record.num_refused + 1:06d}.jpg"
        write_image(folder / name, shrink(image, _SHOWN_SIDE))
        refused = RefusedPicture(name=name, reasons=reasons, captured=captured.frame.captured_utc)
        after = self._store.change(
            record.product,
            lambda one: msgspec.structs.replace(
                one, refused=(refused, *one.refused)[:REFUSED_KEPT], num_refused=one.num_refused + 1
            ),
        )
        kept = {one.name for one in after.refused}
        for path in folder.glob("*.jpg"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _cropped(image: ImageU8, record: TeachingRecord) -> ImageU8:
    if record.region is None:
        return image
    x, y, width, height = record.region
    part = image[y : y + height, x : x + width]
    # A picture of another size, which is refused anyway.
    return part if part.size else image


def _thumbnail(image: ImageU8) -> npt.NDArray[np.float32]:
    """Grey levels of a small copy, without the light's mean."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    small = grey.astype(np.float32)
    return np.asarray(small - small.mean(), dtype=np.float32)


def _alike(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> bool:
    return float(np.abs(one - other).mean()) < SAME_GREY_LEVELS


def look_alike(folder: Path, names: list[str]) -> bool:
    """Whether all of the photographs, two or more, hardly differ from the first: one part again and again."""
    first: npt.NDArray[np.float32] | None = None
    for name in names:
        small = _thumbnail(read_image(folder / name))
        if first is None:
            first = small
        elif not _alike(small, first):
            return False
    return len(names) > 1
