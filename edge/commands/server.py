"""The line's command server: receives commands from the broker's connection, executes them, and replies.

Theory of operation
-------------------
:meth:`CommandServer.receive` runs on the connection's thread and only sorts: messages that are retained, too many at
once, or not commands are counted, and logged at a bounded rate. Commands go to one of two workers, each a thread with a
short queue: the quick one pauses, resumes and sets thresholds; the slow one loads models, reads files and waits for
parts. So a pause never waits behind a camera that gives no picture.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import final

import msgspec

from edge.commands.messages import (
    AcknowledgeTest,
    Command,
    DescribeLine,
    HandleDrift,
    MarkPart,
    PauseCamera,
    ReloadConfig,
    Reply,
    ResumeCamera,
    RollBackModel,
    RunGoldenTest,
    SetThreshold,
    SwitchModel,
    SwitchProduct,
    TakeSnapshot,
    TeachProduct,
    decode_command,
    read_command_id,
)
from edge.control import DaemonControl
from edgeflame.background import BackgroundThread
from edgeflame.errors import EdgeFlameError, FederationError
from edgeflame.log import EventLog

log = EventLog("commands")

MAX_PER_S, MAX_BURST = 20.0, 40.0
"""Most commands a second on average, and most at once: no person or controller sends more. Further ones are counted,
but neither read nor answered."""

MAX_WAITING = 16
"""Most commands that wait for a worker."""

REMEMBERED = 256
"""Number of past commands whose reply is kept, by id, for a command that comes again."""

_LOG_EVERY_S = 10.0
"""Least time between log lines about refused messages of one kind, seconds."""

_QUICK = (PauseCamera, ResumeCamera, SetThreshold, AcknowledgeTest, HandleDrift, DescribeLine)


@final
class CommandServer:
    """Executes commands; a context manager. Leaving it drops the commands that wait.

    Args:
        control: executes them.
        publish: sends a reply's bytes; drops them if there is no connection.
        clock: monotonic, seconds.
    """

    def __init__(
        self, control: DaemonControl, publish: Callable[[bytes], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._control = control
        self._publish = publish
        self._clock = clock
        self._allowance, self._allowed_at = MAX_BURST, clock()
        self._answers: collections.OrderedDict[str, bytes | None] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.refused: collections.Counter[str] = collections.Counter()
        """Number of refused messages by reason: ``junk``, ``flood``, ``retained``, ``busy``."""
        self._silent_until: dict[str, float] = {}
        self._quick: queue.Queue[Command | None] = queue.Queue(MAX_WAITING)
        self._slow: queue.Queue[Command | None] = queue.Queue(MAX_WAITING)
        self._threads = [
            BackgroundThread(f"commands-{name}", partial(self._serve, waiting), wake=partial(_end, waiting), join_s=0.5)
            for name, waiting in (("quick", self._quick), ("slow", self._slow))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.request_stop()
        # One may be waiting for a part or a model; a stop does not wait for that.
        for thread in self._threads:
            thread.close()

    def receive(self, payload: bytes, retained: bool) -> None:
        """Take a message of the command topic, valid or not; never blocks."""
        if retained:
            # It was sent at an unknown time, and comes again at every connection.
            self._refuse("retained", "a retained command is not done; delete it from the broker")
            return
        if not self._is_allowed():
            self._refuse("flood", f"more than {MAX_PER_S:g} commands a second")
            return
        try:
            command = decode_command(payload)
        except FederationError as exc:
            self._refuse("junk", str(exc))
            if (known := read_command_id(payload)) is not None:
                self._reply(known, exc)
            return
        with self._lock:
            if command.id in self._answers:
                before = self._answers[command.id]
                if before is not None:
                    self._publish(before)
                return
            self._answers[command.id] = None
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        try:
            (self._quick if isinstance(command, _QUICK) else self._slow).put_nowait(command)
        except queue.Full:
            self._refuse("busy", f"{MAX_WAITING} commands wait")
            self._reply(command.id, FederationError(f"{MAX_WAITING} commands wait already; try again later"))

    def _is_allowed(self) -> bool:
        now = self._clock()
        self._allowance = min(MAX_BURST, self._allowance + (now - self._allowed_at) * MAX_PER_S)
        self._allowed_at = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    def _refuse(self, kind: str, reason: str) -> None:
        self.refused[kind] += 1
        now = self._clock()
        if now >= self._silent_until.get(kind, now):
            self._silent_until[kind] = now + _LOG_EVERY_S
            log.warning("command_refused", kind=kind, count=self.refused[kind], reason=reason)

    def _serve(self, waiting: queue.Queue[Command | None], _: threading.Event) -> None:
        while (command := waiting.get()) is not None:
            fields = {name: getattr(command, name) for name in command.__struct_fields__ if name != "id"}
            log.info("command", command=str(command.__struct_config__.tag), id=command.id, **fields)
            try:
                answer: msgspec.Struct | EdgeFlameError = self._execute(command)
            except EdgeFlameError as exc:
                log.warning("command_failed", id=command.id, reason=str(exc))
                answer = exc
            except Exception as exc:  # noqa: BLE001 - a thread's outermost frame: the next command may be "resume"
                log.error("command_failed", id=command.id, reason=repr(exc))
                answer = FederationError(f"an unexpected error: {exc!r}")
            self._reply(command.id, answer)

    def _execute(self, command: Command) -> msgspec.Struct:
        control = self._control
        match command:
            case PauseCamera():
                return control.pause(command.camera)
            case ResumeCamera():
                return control.resume(command.camera)
            case SetThreshold():
                return control.set_threshold(command.camera, command.threshold)
            case TakeSnapshot():
                return control.snapshot(command.camera)
            case SwitchProduct():
                return control.switch_product(command.camera, command.product)
            case RunGoldenTest():
                return control.test_golden_parts(command.camera, command.expected)
            case AcknowledgeTest():
                return control.acknowledge(command.camera)
            case HandleDrift():
                return control.handle_drift(command.camera, command.action)
            case MarkPart():
                return control.mark(command.camera, command.part, command.was, kind=command.kind, by=command.by)
            case RollBackModel():
                return control.roll_back(command.product, to_file=command.to_file)
            case SwitchModel():
                return control.switch_model(command.product, allow_older=command.allow_older)
            case TeachProduct():
                return control.teach(command.order)
            case ReloadConfig():
                return control.reload()
            case DescribeLine():
                return control.describe()

    def _reply(self, which: str, answer: msgspec.Struct | EdgeFlameError) -> None:
        if isinstance(answer, EdgeFlameError):
            reply = Reply(id=which, ok=False, error=str(answer), exit_code=answer.exit_code)
        else:
            reply = Reply(id=which, ok=True, answer=msgspec.Raw(msgspec.json.encode(answer)))
        data = msgspec.json.encode(reply)
        with self._lock:
            if which in self._answers:
                self._answers[which] = data
        self._publish(data)


def _end(waiting: queue.Queue[Command | None]) -> None:
    """Drop the commands that wait, and have the thread that does them end."""
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()
    # Another command may just have come.
    with contextlib.suppress(queue.Full):
        waiting.put_nowait(None)
