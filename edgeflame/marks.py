"""Marks: what people said that a part really was, with its picture, in a folder that people may look into.

    MARKS/good/NAME.png, MARKS/bad/NAME.png    the pictures, without loss
    MARKS/marks.jsonl                          what was said, one line each; lines are only ever added

The last line about a picture holds: another mark corrects an earlier one, and a line with ``removed`` takes it back. A
mark without a picture is none (the pictures may be taken away), and a picture without a line is not a mark. Several
processes may use a folder at once: whoever adds a line holds a lock on the file. A picture is there before its line,
and a line is whole or taken out again, so that a full disk or a kill loses the new mark and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from edgeflame.errors import StorageError, UsageError
from edgeflame.fitted_images import image_digest
from edgeflame.images import ImageU8, ImageU16, write_image
from edgeflame.layout import GOOD
from edgeflame.log import EventLog
from edgeflame.mark_shapes import Shape, Shapes
from edgeflame.state import storage_errors, with_checksum, without_checksum

log = EventLog("marks")

TrueLabel = Literal["good", "bad"]

_NO_KINDS = (GOOD, "bad", "train", "test")

LINES_FILE = "marks.jsonl"
DEFAULT_MAX_MARKS = 10_000
WARN_SHARE = 0.8
"""Share of ``max_marks`` from which on each new mark logs a warning."""

Kind = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,39}$", description="letters, digits, ' _.-', 1..40")]
"""The kind of a defect; it names a folder when marks are exported."""
Person = Annotated[str, Meta(max_length=100)]


_NO_RESULT = msgspec.Raw(b"{}")


class MarkedResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the line had said of the part, as far as it is known: fields of ``edge.result.Result``."""

    part_id: str = ""
    camera: str = ""
    verdict: str = ""
    score: float | None = None
    threshold: float | None = None
    model: str = ""
    """First 12 digits of the SHA-256 of the package that judged."""
    captured: dt.datetime | None = None


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of ``marks.jsonl``: a mark. Lines of earlier versions have the first four fields.

    In the file it has a checksum as its last key; lines of earlier versions have none.
    """

    was: TrueLabel
    marked: dt.datetime
    file: str
    """Picture, relative to the folder: the area the model saw, without heat."""
    result: msgspec.Raw = _NO_RESULT
    """The whole result, as the line told it."""
    kind: Kind | None = None
    """Of the defect; None where nobody said it."""
    by: Person = ""
    """Who marked it, as far as that person told; it is not verified."""
    product: str = ""
    """Which product was judged; empty where that is not known."""
    part: str = ""
    """Which part it is, where somebody knows it by more than its result."""
    where: Shapes = ()
    """Where the defect is; empty where nobody said it."""
    digest: str = ""
    """Of the picture's pixels (``image_digest``), hexadecimal; empty in marks of earlier versions."""
    whole_frame: bool = False
    """The picture is a photograph that is still to be cropped to a region of interest; otherwise it has been."""

    @property
    def name(self) -> str:
        """The picture's file name without its suffix; the same for all marks of one picture."""
        return Path(self.file).stem

    @property
    def judged(self) -> MarkedResult:
        """What the line had said, as far as it is known."""
        try:
            return msgspec.json.decode(self.result, type=MarkedResult)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return MarkedResult()

    @property
    def group(self) -> str:
        """The part that the picture shows, as far as it is known: two cameras may have seen one."""
        return self.part or self.judged.part_id or self.name

    @property
    def label(self) -> str:
        """``good``, the kind of defect, or ``bad``: a folder's name in the MVTec layout."""
        return GOOD if self.was == "good" else self.kind or "bad"


class _Line(Mark, frozen=True, kw_only=True, omit_defaults=True):
    """Any line; ``removed`` takes the mark back."""

    removed: bool = False


class MarkCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many marks there are."""

    good: int
    bad: int
    at_most: int
    folder: str
    kinds: dict[str, int]
    """Kinds of defects and how many have them, the most frequent first."""


_LINE = msgspec.json.Decoder(_Line)


class MarkStore:
    """The marks of a folder; safe for any thread, and beside other processes.

    Args:
        folder: created with the first mark.
        max_marks: most pictures kept. Marks are never deleted to make room: once there are as many, further ones are
            refused until somebody has taken pictures away.
    """

    def __init__(self, folder: Path, *, max_marks: int = DEFAULT_MAX_MARKS) -> None:
        self.folder = folder
        self._max_marks = max_marks
        self._lock = threading.Lock()
        self._history: dict[str, list[_Line]] = {}
        self._num_lost = 0
        """Pictures of which no line says anything, when it was last looked."""
        self._read_to = (0, 0)
        """Inode of the file and the position up to which its lines were read."""

    def marks(self) -> list[Mark]:
        """The marks that hold, in the order of their first mention.

        Raises:
            StorageError: the folder cannot be read.
        """
        with self._lock, storage_errors(self.folder, "read the marks"):
            self._read_lines()
            files = self._files()
            self._tell_lost(files)
            return [lines[-1] for lines in self._history.values() if lines and _holds(lines[-1], files)]

    def find(self, name: str) -> Mark | None:
        """The mark of a picture's name; None if there is none."""
        return next((mark for mark in self.marks() if mark.name == name), None)

    def picture(self, mark: Mark) -> Path:
        """The file of a mark's picture."""
        return self.folder / mark.file

    def add(
        self,
        name: str,
        image: ImageU8 | ImageU16,
        was: TrueLabel,
        *,
        result: msgspec.Raw = _NO_RESULT,
        kind: str | None = None,
        by: str = "",
        product: str = "",
        part: str = "",
        where: Sequence[Shape] = (),
        whole_frame: bool = False,
    ) -> Mark:
        """Keep a picture and what it was; an earlier mark of the same name is corrected.

        Args:
            name: of the picture, unique; no suffix, a plain file name.
            image: ``[height, width, 3]`` BGR.
            was: what the part really was.
            result: what the line said of it, JSON.
            kind: of the defect.
            by: who marks.
            product: that was judged.
            part: that the picture shows, where the result does not say it.
            where: the defect is, in pixels of ``image``.
            whole_frame: see :class:`Mark`.

        Raises:
            UsageError: a good part with a kind or region of defect, or a kind that cannot name a folder.
            StorageError: it cannot be written, or there are ``max_marks`` already; nothing has changed.
        """
        mark = _Line(
            was=was,
            marked=dt.datetime.now(dt.timezone.utc),
            file=f"{was}/{name}.png",
            result=result,
            kind=kind,
            by=by,
            product=product,
            part=part,
            where=tuple(where),
            digest=image_digest(image).hex(),
            whole_frame=whole_frame,
        )
        _check(mark)
        with self._changing() as lines:
            self._require_room(mark)
            target = self.folder / mark.file
            is_new = not target.exists()
            write_image(target, image)
            try:
                _append(lines, mark)
            except OSError:
                if is_new:
                    target.unlink(missing_ok=True)
                raise
            (self.folder / _other(mark.file)).unlink(missing_ok=True)
        log.info("part_marked", part=mark.judged.part_id, verdict=mark.judged.verdict, was=was, kind=kind)
        return mark

    def correct(
        self,
        name: str,
        *,
        was: TrueLabel | None = None,
        kind: str | msgspec.UnsetType | None = msgspec.UNSET,
        where: Sequence[Shape] | None = None,
        by: str = "",
    ) -> Mark:
        """Say something else of a marked picture; what is not given stays.

        Raises:
            UsageError: there is no such mark, or what it would say makes no sense.
            StorageError: it cannot be written; nothing has changed.
        """
        before = self._require(name)
        became = before.was if was is None else was
        # A part that was good after all has no kind of defect, and none anywhere.
        told_kind = kind if kind is not msgspec.UNSET else before.kind if became == "bad" else None
        told_where = tuple(where) if where is not None else before.where if became == "bad" else ()
        return self._replace(
            name,
            msgspec.structs.replace(
                before,
                was=became,
                kind=told_kind,
                where=told_where,
                by=by or before.by,
                marked=dt.datetime.now(dt.timezone.utc),
                file=f"{became}/{name}.png",
            ),
        )

    def undo(self, name: str) -> Mark | None:
        """Take back what was said last of a picture: what was said before holds again; None if that was nothing.

        Raises:
            UsageError: there is no such mark.
            StorageError: it cannot be written; nothing has changed.
        """
        self._require(name)
        with self._lock:
            said = [line for line in self._history[name] if not line.removed]
        # Each undo is a line too: it steps back to the opinion before the one that holds now.
        now = said[-1]
        earlier = [line for line in said if line.marked < now.marked]
        if not earlier:
            self.remove(name)
            return None
        return self._replace(name, earlier[-1])

    def remove(self, name: str, *, by: str = "") -> None:
        """Delete a mark and its picture.

        Raises:
            UsageError: there is no such mark.
            StorageError: it cannot be written.
        """
        before = self._require(name)
        gone = msgspec.structs.replace(before, removed=True, by=by or before.by)
        with self._changing() as lines:
            _append(lines, gone)
            (self.folder / before.file).unlink(missing_ok=True)
        log.info("mark_removed", part=before.judged.part_id, was=before.was)

    def counts(self) -> MarkCounts:
        """How many marks there are."""
        marks = self.marks()
        kinds = Counter(mark.kind for mark in marks if mark.kind is not None)
        bad = sum(mark.was == "bad" for mark in marks)
        return MarkCounts(
            good=len(marks) - bad,
            bad=bad,
            at_most=self._max_marks,
            folder=str(self.folder),
            kinds=dict(kinds.most_common()),
        )

    def _require(self, name: str) -> _Line:
        if self.find(name) is None:
            raise UsageError(f"there is no mark {name[:100]!r}")
        with self._lock:
            return self._history[name][-1]

    def _replace(self, name: str, mark: _Line) -> Mark:
        _check(mark)
        with self._changing() as lines:
            before = self._history[name][-1]
            old, new = self.folder / before.file, self.folder / mark.file
            if old != new:
                new.parent.mkdir(parents=True, exist_ok=True)
                os.link(old, new)
            try:
                _append(lines, mark)
            except OSError:
                if old != new:
                    new.unlink(missing_ok=True)
                raise
            if old != new:
                old.unlink(missing_ok=True)
        log.info("mark_corrected", part=mark.judged.part_id, was=mark.was, kind=mark.kind)
        return mark

    def _require_room(self, mark: Mark) -> None:
        files = self._files()
        if len(files) >= self._max_marks and not {mark.file, _other(mark.file)} & files:
            raise StorageError(
                f"{self.folder}: {len(files)} marked parts are kept, and no more (web.max_marks); take good/ and bad/ "
                "away for the next training"
            )
        if len(files) >= WARN_SHARE * self._max_marks:
            log.warning("marks_nearly_full", kept=len(files) + 1, at_most=self._max_marks, folder=str(self.folder))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[FileIO]:
        """The file of lines, locked, with all of its lines read; only one thread of all processes is in here."""
        with self._lock, storage_errors(self.folder, "keep the mark"):
            for was in get_args(TrueLabel):
                (self.folder / was).mkdir(parents=True, exist_ok=True)
            # Without a buffer: what a full disk did not take must not be written when the file is closed.
            with (self.folder / LINES_FILE).open("a+b", buffering=0) as lines:
                fcntl.flock(lines, fcntl.LOCK_EX)
                self._read_lines()
                yield lines
                self._read_lines()

    def _read_lines(self) -> None:
        """Read what was added since; a line that is cut short at the end is left for later."""
        try:
            stream = (self.folder / LINES_FILE).open("rb")
        except FileNotFoundError:
            self._history, self._read_to = {}, (0, 0)
            return
        with stream:
            status = os.fstat(stream.fileno())
            inode, position = self._read_to
            if inode != status.st_ino or position > status.st_size:
                self._history, position = {}, 0
            stream.seek(position)
            data = stream.read()
        whole = data.rfind(b"\n") + 1
        for row in data[:whole].splitlines():
            if not row.strip():
                continue
            sound = without_checksum(row)
            if sound is None:
                log.warning("mark_unreadable", folder=str(self.folder), reason="it does not have its checksum")
                continue
            try:
                line = _LINE.decode(sound)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                log.warning("mark_unreadable", folder=str(self.folder), reason=str(exc)[:200])
                continue
            if Path(line.file).parts[:-1] != (line.was,):
                log.warning("mark_unreadable", folder=str(self.folder), reason=f"its picture is {line.file[:100]!r}")
                continue
            self._history.setdefault(line.name, []).append(line)
        self._read_to = (status.st_ino, position + whole)

    def _tell_lost(self, files: set[str]) -> None:
        """Warn of pictures of which no line says anything, once for each number of them."""
        names = {line.file for lines in self._history.values() for line in lines}
        num_lost = len(files - names)
        if num_lost > self._num_lost:
            log.warning(
                "pictures_without_a_mark",
                folder=str(self.folder),
                count=num_lost,
                consequence="what was said of them is lost; nothing is learnt from them",
            )
        self._num_lost = num_lost

    def _files(self) -> set[str]:
        files: set[str] = set()
        for was in get_args(TrueLabel):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / was) as entries:
                files.update(f"{was}/{entry.name}" for entry in entries if entry.name.endswith(".png"))
        return files


def kind_of_label(label: str) -> str | None:
    """The kind of defect that a folder of defects is named after; None if it says no more than bad."""
    if label.casefold() in ("bad", "defect"):
        return None
    return re.sub(r"[^A-Za-z0-9 _.-]+", "_", label).lstrip(" _.-")[:40] or None


def _check(mark: Mark) -> None:
    if mark.was == "good" and (mark.kind is not None or mark.where):
        raise UsageError("a good part has no kind of defect, and no place where one is")
    try:
        msgspec.json.decode(msgspec.json.encode(mark), type=_Line)
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:
        raise UsageError(f"this mark cannot be kept ({exc})") from exc
    if mark.kind is not None and mark.kind.casefold() in _NO_KINDS:
        raise UsageError(f"{mark.kind} is no kind of defect")


def _append(lines: FileIO, mark: Mark) -> None:
    """Add a line, whole or not at all, and onto the disk."""
    end = lines.seek(0, os.SEEK_END)
    row = with_checksum(msgspec.json.encode(mark)) + b"\n"
    try:
        if end and os.pread(lines.fileno(), 1, end - 1) != b"\n":
            # What a kill left half-written ends here.
            row = b"\n" + row
        rest = memoryview(row)
        while rest:
            rest = rest[lines.write(rest) :]
        os.fsync(lines.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            lines.truncate(end)
        raise


def _holds(mark: _Line, files: set[str]) -> bool:
    return not mark.removed and mark.file in files


def _other(file: str) -> str:
    was, _, name = file.partition("/")
    return f"{'bad' if was == 'good' else 'good'}/{name}"
