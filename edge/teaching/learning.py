"""Learning: ``edgeflame fit``, or ``learn`` with marks, in a process of its own, watched by a thread.

It has bounded cores and memory, gives way to the line (:mod:`edge.teaching.launch`), and is ended when it takes more
memory than allowed. What it makes is taken over whole or not at all; whatever becomes of it, photographs and the model
before are untouched.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec

from edge.teaching.basis import LearningBasis
from edge.teaching.orders import LearningProgress
from edge.teaching.record import TeachingRecord
from edgeflame.background import BackgroundThread
from edgeflame.dataset import ImageRecord, write_groups
from edgeflame.errors import DataError, EdgeFlameError, StorageError, UsageError
from edgeflame.layout import GOOD
from edgeflame.log import EventLog, printable
from edgeflame.state import link_or_copy, storage_errors

log = EventLog("teaching")

_POLL_S = 0.2
READING, STATISTICS = "Reading images", "Statistics and threshold"
_SHARES = {READING: (0.02, 0.1), STATISTICS: (0.1, 0.95)}
"""Where in the whole the stages lie that take the time."""

MODEL_FILE, SCORES_FILE = "model.edgeflame", "scores.json"


@dataclass(frozen=True, kw_only=True)
class LearningResult:
    """What learning made.

    Attributes:
        folder: with ``MODEL_FILE`` and ``SCORES_FILE``.
        photographs: names of those that it learnt from.
        prior: the product whose model it leans on; None: it leans on none.
    """

    folder: Path
    photographs: tuple[str, ...]
    prior: str | None


class _Line(msgspec.Struct):
    progress: str
    done: int
    total: int


_LINE = msgspec.json.Decoder(_Line)

Outcome = LearningResult | EdgeFlameError


@final
class LearningProcess:
    """Learns one product at a time.

    Args:
        cores: that the process may use.
        max_memory_mib: that it may take.
        on_done: called on the learner's thread, with the product and what came of it.
        on_progress: called when the progress has changed.
    """

    def __init__(
        self,
        *,
        cores: int,
        max_memory_mib: float,
        on_done: Callable[[str, Outcome], None],
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._cores = cores
        self._max_memory_mib = max_memory_mib
        self._on_done = on_done
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._product: str | None = None
        self._thread: BackgroundThread | None = None
        self._progress: LearningProgress | None = None
        self.process_id: int | None = None
        """Of the process, while there is one."""

    @property
    def product(self) -> str | None:
        """The product that is being learnt; None: none is."""
        return self._product

    def progress(self, product: str) -> LearningProgress | None:
        """How far a product has come; None if it is not being learnt."""
        with self._lock:
            return self._progress if product == self._product else None

    def start(self, record: TeachingRecord, folder: Path, basis: LearningBasis) -> None:
        """Begin to learn.

        Args:
            record: the product's.
            folder: the product's.
            basis: what is learnt from beside the photographs.

        Raises:
            UsageError: another product is being learnt.
            StorageError: the photographs cannot be laid out.
        """
        with self._lock:
            if self._product is not None:
                raise UsageError(f"{self._product} is being learnt; wait for it, or cancel it")
            self._product = record.product
            self._progress = LearningProgress(stage="Starting", done=0.0, left_s=None, memory_mib=0.0)
        try:
            work = folder / "learning"
            command = _lay_out(record, folder, work, basis)
        except BaseException:
            self._product = None
            raise
        prior = basis.prior_product
        thread = BackgroundThread("learner", lambda stop: self._run(record, work, command, prior, stop), join_s=5.0)
        self._thread = thread
        thread.start()

    def cancel(self) -> None:
        """End the process; ``on_done`` is called with the reason."""
        if (thread := self._thread) is not None:
            thread.request_stop()

    def close(self) -> None:
        """End the process, and wait for it."""
        if (thread := self._thread) is not None:
            thread.close()

    # On the learner's thread.

    def _run(
        self, record: TeachingRecord, work: Path, command: Sequence[str], prior: str | None, stop: threading.Event
    ) -> None:
        outcome: Outcome
        try:
            self._watch(command, stop)
            outcome = LearningResult(folder=work, photographs=tuple(one.name for one in record.good), prior=prior)
        except EdgeFlameError as exc:
            outcome = exc
        except OSError as exc:
            outcome = StorageError(f"the learning process cannot be started ({exc.strerror})")
        try:
            self._on_done(record.product, outcome)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with self._lock:
                self._product, self._progress, self._thread, self.process_id = None, None, None, None
            self._on_progress()

    def _watch(self, command: Sequence[str], stop: threading.Event) -> None:
        """Run the process to its end.

        Raises:
            EdgeFlameError: it did not come to a good end.
        """
        launch = [sys.executable, "-m", "edge.teaching.launch", str(os.getpid()), str(self._cores), *command]
        environment = {**os.environ, "EDGEFLAME_PROGRESS": "json"}
        process = subprocess.Popen(
            launch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        self.process_id = process.pid
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = BackgroundThread("learner-log", lambda _: _read(process, lines), join_s=1.0)
        reader.start()
        told: list[str] = []
        clock = _Clock()
        try:
            while process.poll() is None:
                if stop.wait(_POLL_S):
                    raise DataError("learning was cancelled")
                memory_mib = _memory_mib(process.pid)
                if memory_mib > self._max_memory_mib:
                    raise DataError(
                        f"learning took more than the {self._max_memory_mib:g} MiB of memory that it may have "
                        "(teaching.max_memory_mib), and was ended"
                    )
                self._take(lines, told, clock, memory_mib)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.close()
        self._take(lines, told, clock, 0.0)
        if process.returncode:
            raise DataError(_why(process.returncode, told))

    def _take(self, lines: queue.SimpleQueue[str], told: list[str], clock: _Clock, memory_mib: float) -> None:
        while not lines.empty():
            line = lines.get()
            try:
                one = _LINE.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                told.append(line)
                del told[:-20]
            else:
                clock.note(one)
        now = LearningProgress(stage=clock.stage, done=clock.done, left_s=clock.left_s(), memory_mib=round(memory_mib))
        with self._lock:
            changed, self._progress = now != self._progress, now
        if changed:
            self._on_progress()


class _Clock:
    """How far learning has come, and how long it will take."""

    def __init__(self) -> None:
        self.stage, self.done = "Starting", 0.0
        self._begun_at: tuple[float, float] | None = None
        """When the present stage's first image was done, and how far it was then."""

    def note(self, line: _Line) -> None:
        if line.progress != self.stage:
            self.stage, self._begun_at = line.progress, None
        first, last = _SHARES.get(line.progress, (self.done, self.done))
        within = min(1.0, line.done / line.total) if line.total else 0.0
        self.done = round(max(self.done, first + (last - first) * within), 3)
        if line.progress == STATISTICS and within == 1.0:
            self.stage = "Putting it together"
        if self._begun_at is None and line.done:
            self._begun_at = time.monotonic(), self.done

    def left_s(self) -> float | None:
        if self._begun_at is None or self.stage != STATISTICS:
            return None
        begun_s, begun_done = self._begun_at
        advanced = self.done - begun_done
        return round((time.monotonic() - begun_s) / advanced * (1.0 - self.done), 0) if advanced > 0.01 else None


def _lay_out(record: TeachingRecord, folder: Path, work: Path, basis: LearningBasis) -> list[str]:
    """Lay out the photographs in a folder for ``fit`` or ``learn``; returns the command."""
    with storage_errors(work, "use"):
        shutil.rmtree(work, ignore_errors=True)
        (work / "data").mkdir(parents=True)
    for one in record.good:
        link_or_copy(folder / "photographs" / one.name, work / "data" / one.name)
    command: list[str | Path] = [sys.executable, "-m", "edgeflame"]
    if basis.marks is not None and basis.base is not None:
        command += ["learn", "--model", basis.base, "--marks", basis.marks]
    else:
        command += ["fit", "--product", record.product, "--device", "cpu"]
        command += [] if record.region is None else ["--roi", ",".join(map(str, record.region))]
        command += [] if basis.base is None or basis.prior is not None else ["--backbone-from", basis.base]
    command += [] if basis.prior is None else ["--prior", basis.prior]
    command += ["--data", work / "data", "--out", work / MODEL_FILE, "--scores", work / SCORES_FILE]
    grouped = len(record.good) > record.num_parts
    if grouped or all(one.part_known for one in record.good):
        groups = work / f"{record.product}.groups.csv"
        write_groups(
            groups,
            [
                ImageRecord(path=work / "data" / one.name, name=one.name, label=GOOD, group=str(one.part), mask=None)
                for one in record.good
            ],
        )
        command += ["--groups", groups]
    return [str(one) for one in command]


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[str]) -> None:
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            lines.put(line[:2000].decode(errors="replace").rstrip("\n"))


def _memory_mib(process_id: int) -> float:
    """Memory that a process holds, MiB; 0 where it cannot be told."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return 0.0


def _why(code: int, told: Sequence[str]) -> str:
    """Why the process ended without a model."""
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        short = " (as the system does when memory is short)" if -code == signal.SIGKILL else ""
        return f"the learning process was killed by {name}{short}; nothing is lost: learn again"
    said = next((line.partition("edgeflame: ")[2] for line in reversed(told) if "edgeflame: " in line), None)
    if said is None:
        said = told[-1] if told else f"it ended with code {code}"
    return f"nothing was learnt: {printable(said)}"
