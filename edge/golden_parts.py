"""The self-test with golden parts: known parts are inspected again and again, to notice a line that finds nothing more.

Photographs are inspected by the camera's own inspector, at its present threshold, one between two frames: a test of
twenty photographs delays no part by more than one. A golden part before the camera is inspected like any part, and its
result is marked ``golden``: it is delivered and written to the PLC like any other, but not counted as production.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import msgspec

from edge.camera_worker import CameraWorker
from edge.config.inspection import SelfTestConfig
from edge.frame import Captured, make_frame
from edge.result import Result
from edge.status import Expected, GoldenCheck, GoldenReport, GoldenStatus
from edgeflame.background import BackgroundThread
from edgeflame.dataset import image_files
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, StorageError, UsageError
from edgeflame.images import printable_name, read_samples
from edgeflame.layout import child_folder
from edgeflame.log import EventLog
from edgeflame.state import read_json, storage_errors, write_record

VERDICT_OF = {"good": "pass", "bad": "fail"}


def check_golden_part(result: Result, part: str, expected: Expected) -> GoldenCheck:
    """Compare one golden part's result with what it should be; ``unknown`` is never right."""
    return GoldenCheck(
        part=part,
        expected=VERDICT_OF[expected],
        verdict=result.verdict,
        ratio=None if result.ratio is None else round(result.ratio, 4),
        reasons=result.reasons,
    )


def golden_message(checks: tuple[GoldenCheck, ...]) -> str:
    """The outcome of a test for people, with the parts that were judged wrongly."""
    wrong = [one for one in checks if not one.is_right]
    if not wrong:
        return f"{len(checks)} golden part{'s' if len(checks) > 1 else ''} judged rightly"
    listed = ", ".join(
        f"{one.part} should {one.expected} and came out {one.verdict}"
        + (f" at {one.ratio:.2f} of the threshold" if one.ratio is not None else "")
        for one in wrong[:3]
    )
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{len(wrong)} of {len(checks)} golden parts judged wrongly: {listed}{more}"


def last_due(times: Sequence[dt.time], now: dt.datetime) -> dt.datetime | None:
    """The latest moment not after ``now`` (aware) at which a test was due by this machine's clock; None without times.

    Each day is reckoned by the rules of its own: a time that comes twice, when summer time ends, is the first of the
    two; one that is skipped, when it begins, is an hour later.
    """
    today = now.astimezone().date()
    moments = [
        dt.datetime.combine(today - dt.timedelta(days=back), time).astimezone(dt.timezone.utc)
        for back in (0, 1)
        for time in times
    ]
    return max((moment for moment in moments if moment <= now), default=None)


def is_due(times: Sequence[dt.time], last_test: dt.datetime | None, now: dt.datetime) -> bool:
    """Whether a test is due that has not been made; one that was missed while the daemon was off is.

    A last test in the future, before the clock was set back, counts as made now: the next time of the day comes.
    """
    due = last_due(times, now)
    return due is not None and (last_test is None or last_test < due)


log = EventLog("golden")

HISTORY_FILE = "history.jsonl"
MAX_HISTORY_BYTES = 4 << 20
"""Size from which on the history is begun anew, some thousand tests; the file before is kept beside it."""

_POLL_S = 5.0
"""How often the clock is checked for a test that is due, seconds."""


def golden_photographs(folder: Path, product: str) -> list[tuple[Path, Expected]]:
    """The photographs of a product, the good ones first.

    Raises:
        ConfigError: there are none.
    """
    # A package that was given without a name calls itself what it likes.
    own = folder / product if "/" not in product and product not in (".", "..") else folder
    root = own if own.is_dir() else folder
    found: list[tuple[Path, Expected]] = []
    kinds: tuple[Expected, ...] = ("good", "bad")
    try:
        for kind in kinds:
            photographs = child_folder(root, kind) if root.is_dir() else None
            if photographs is not None:
                found += [(file, kind) for file in image_files(photographs)]
    except (OSError, DataError) as exc:
        raise ConfigError(f"self_test.folder: {root} cannot be read ({exc})") from exc
    if not found:
        raise ConfigError(
            f"self_test.folder: no photographs in {root / 'good'} or {root / 'bad'} of the product {product!r}"
        )
    return found


@final
class GoldenTester:
    """The self-tests of one camera; a context manager, whose thread starts the tests of the configured times.

    Args:
        worker: the camera worker.
        config: section ``[self_test]``.
        folder: for the last test and the history; None: nothing outlives the run.
        on_change: called after every test and acknowledgement.
        now: returns the time, aware.

    Raises:
        ConfigError: the configured folder has no photographs.
    """

    def __init__(
        self,
        worker: CameraWorker,
        config: SelfTestConfig,
        *,
        folder: Path | None,
        on_change: Callable[[], None] = lambda: None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.timezone.utc),
    ) -> None:
        self._worker = worker
        self._config = config
        self._folder = folder
        self._on_change = on_change
        self._now = now
        self._testing = threading.Lock()
        self._status = self._read()
        self._last_scheduled = self._status.last.at if self._status.last is not None else None
        self._thread = BackgroundThread(f"golden-{worker.name}", self._run, join_s=_POLL_S)
        if config.folder is not None:
            golden_photographs(Path(config.folder), worker.inspector.product)

    def __enter__(self) -> GoldenTester:
        if self._config.times:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.close()

    def status(self) -> GoldenStatus:
        """The last self-test."""
        return self._status

    def problem(self) -> str | None:
        """Why the camera is not ready; None unless the last test failed and ``blocks_readiness`` is set."""
        status = self._status
        if status.last is None or not status.is_failing or not self._config.blocks_readiness:
            return None
        return f"the self-test failed: {status.last.message}"

    def test(self, expected: Expected | None = None) -> GoldenReport:
        """Test the photographs, or with ``expected`` the next part before the camera.

        Raises:
            UsageError: no photographs are configured, or another test is running.
            ConfigError: the folder has no photographs.
            DataError: no part came in time.
            RuntimeUnavailableError: the frame being inspected does not come to an end.
        """
        if not self._testing.acquire(blocking=False):
            raise UsageError(f"camera {self._worker.name}: a self-test is running")
        try:
            inspector = self._worker.inspector
            checks = self._photographs() if expected is None else self._part(expected)
            report = GoldenReport(
                camera=self._worker.name,
                product=inspector.product,
                model=inspector.model_id,
                kind="photographs" if expected is None else "part",
                at=self._now().astimezone(dt.timezone.utc),
                passed=all(check.is_right for check in checks),
                message=golden_message(checks),
                checks=checks,
            )
            self._keep(GoldenStatus(last=report))
        finally:
            self._testing.release()
        tell = log.info if report.passed else log.error
        tell("golden_test", camera=report.camera, passed=report.passed, kind=report.kind, reason=report.message)
        self._on_change()
        return report

    def acknowledge(self) -> GoldenStatus:
        """Acknowledge that the last test failed."""
        if self._status.is_failing:
            self._keep(msgspec.structs.replace(self._status, acknowledged=True))
            log.warning("golden_acknowledged", camera=self._worker.name)
            self._on_change()
        return self._status

    def _photographs(self) -> tuple[GoldenCheck, ...]:
        if self._config.folder is None:
            raise UsageError(
                "self_test.folder is not configured; a golden part before the camera can be tested as good or bad"
            )
        checks = []
        for number, (file, expected) in enumerate(
            golden_photographs(Path(self._config.folder), self._worker.inspector.product)
        ):
            part = printable_name(f"{file.parent.name}/{file.name}")
            image, error = None, None
            try:
                image = read_samples(file, max_pixels=self._worker.max_pixels)
            except DataError as exc:
                error = str(exc)
            frame = make_frame(part_id=f"golden:{part}", source=str(file), image_bgr=image, error=error)
            inspected = self._worker.inspect_photograph(Captured(sequence=number, frame=frame))
            checks.append(check_golden_part(inspected.result, part, expected))
        return tuple(checks)

    def _part(self, expected: Expected) -> tuple[GoldenCheck, ...]:
        inspected = self._worker.next_golden_part(self._config.wait_s)
        if inspected is None:
            raise DataError(f"camera {self._worker.name}: no part came within {self._config.wait_s:g} s")
        return (check_golden_part(inspected.result, inspected.result.part_id, expected),)

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(_POLL_S):
            now = self._now()
            if not is_due(self._config.day_times, self._last_scheduled, now):
                continue
            self._last_scheduled = now
            try:
                self.test()
            except EdgeFlameError as exc:
                log.error("golden_test_not_made", camera=self._worker.name, reason=str(exc))
            except Exception as exc:  # noqa: BLE001 - the thread's outermost frame: the next shift is tested again
                log.error("golden_test_not_made", camera=self._worker.name, reason=repr(exc))

    def _read(self) -> GoldenStatus:
        file = self._file()
        if file is None:
            return GoldenStatus()
        try:
            return read_json(file, GoldenStatus, advice="it is not used") or GoldenStatus()
        except StorageError as exc:
            log.warning("golden_state_unreadable", file=str(file), reason=str(exc), consequence="begins anew")
            return GoldenStatus()

    def _file(self) -> Path | None:
        return self._folder / f"{self._worker.name}.json" if self._folder is not None else None

    def _keep(self, status: GoldenStatus) -> None:
        self._status = status
        file = self._file()
        if file is None or self._folder is None:
            return
        try:
            with storage_errors(self._folder, "keep the self-tests"):
                self._folder.mkdir(parents=True, exist_ok=True)
                history = self._folder / HISTORY_FILE
                if history.exists() and history.stat().st_size > MAX_HISTORY_BYTES:
                    history.replace(history.with_suffix(".old.jsonl"))
                with history.open("ab") as stream:
                    stream.write(msgspec.json.encode(status) + b"\n")
            write_record(file, status)
        except StorageError as exc:
            log.error("golden_not_kept", camera=self._worker.name, reason=str(exc))
