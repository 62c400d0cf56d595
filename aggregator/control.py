"""The operator's control of a running aggregator: small files in its state directory, each answered by another.

    STATE/requests/<number>.json     a request, written by ``edgeflame rounds``, deleted when it has been carried out
    STATE/requests/<number>.answer   its outcome, deleted by the command that asked

They are files because whoever may write into the state directory may decide about the run, and because a request waits
there for an aggregator that is not running just now.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from aggregator.outputs import RoundOutput
from aggregator.rounds import RoundMachine
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import Name, Text
from edgeflame.state import read_json, storage_errors, write_json

log = EventLog("aggregator")

MAX_REQUEST_BYTES = 4096


class _OperatorRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="request", forbid_unknown_fields=True):
    reason: Text = "no reason given"


class StopRun(_OperatorRequest, frozen=True, kw_only=True, tag="stop"):
    """End the run without a result; after its end, stop an aggregator that stayed."""


class FinishEarly(_OperatorRequest, frozen=True, kw_only=True, tag="finish"):
    """No further round after the open one."""


class PauseSite(_OperatorRequest, frozen=True, kw_only=True, tag="pause"):
    site: Name


class ResumeSite(_OperatorRequest, frozen=True, kw_only=True, tag="resume"):
    site: Name


class RemoveSite(_OperatorRequest, frozen=True, kw_only=True, tag="remove"):
    """The site is no longer part of the run."""

    site: Name


OperatorRequest = StopRun | FinishEarly | PauseSite | ResumeSite | RemoveSite

_REQUEST_DECODER: msgspec.json.Decoder[OperatorRequest] = msgspec.json.Decoder(OperatorRequest)


class RequestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a request; ``text`` is for people."""

    ok: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class RequestOutcome:
    """The outcome of a request.

    Attributes:
        outputs: the state machine's outputs, to be carried out.
        text: for the operator.
        ends_service: whether an aggregator that stays after the end is to stop.
    """

    outputs: list[RoundOutput] = field(default_factory=list)
    text: str
    ends_service: bool = False


def apply_request(request: OperatorRequest, machine: RoundMachine, now: float) -> RequestOutcome:
    """Hand an operator's request to the round machine; doing it twice is the same as once.

    Raises:
        UsageError: it cannot be done; the message says why.
    """
    state = machine.state
    if isinstance(request, PauseSite | ResumeSite | RemoveSite) and request.site not in state.active_members:
        names = ", ".join(sorted(state.active_members)) or "nobody"
        raise UsageError(f"{request.site} is not a site of this run; its sites are: {names}")
    match request:
        case _ if state.ended is not None:
            stops = isinstance(request, StopRun)
            text = f"the run is over ({state.phase}){'; the aggregator leaves' if stops else ''}"
            return RequestOutcome(text=text, ends_service=stops)
        case StopRun():
            outputs = machine.stop_run(request.reason)
            return RequestOutcome(outputs=outputs, text="the run is stopped", ends_service=True)
        case FinishEarly():
            if state.phase in ("waiting", "initialise"):
                raise UsageError("no round has begun, so there is no model to finish with; stop the run instead")
            outputs = machine.finish_early(f"by the operator: {request.reason}", now)
            return RequestOutcome(outputs=outputs, text=f"the rounds end with round {len(machine.state.rounds)}")
        case PauseSite():
            outputs = machine.pause_site(request.site, by="operator", reason=request.reason, now=now)
            return RequestOutcome(outputs=outputs, text=f"{request.site} is paused")
        case ResumeSite():
            outputs = machine.resume_site(request.site, by="operator", now=now)
            own = machine.state.paused.get(request.site, {}).get("site")
            text = f"{request.site} goes on" if own is None else f"{request.site} rests by its own wish: {own}"
            return RequestOutcome(outputs=outputs, text=text)
        case RemoveSite():
            detail = f"removed by the aggregator's operator: {request.reason}"
            outputs = machine.site_leaves(request.site, by="operator", detail=detail, now=now)
            return RequestOutcome(outputs=outputs, text=f"{request.site} is removed")


class RequestQueue:
    """The requests of a state directory.

    Raises:
        StorageError: here and in every method, when the disk fails.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "requests"
        with storage_errors(self._folder, "create"):
            self._folder.mkdir(parents=True, exist_ok=True)

    def submit(self, request: OperatorRequest) -> str:
        """Write a request; returns its number."""
        number = f"{time.time_ns():020d}"
        write_json(self._folder / f"{number}.json", request)
        return number

    def take_result(self, number: str) -> RequestResult | None:
        """The result of a request, if it was carried out; it can be taken once."""
        path = self._folder / f"{number}.answer"
        result = read_json(path, RequestResult, advice="see the aggregator's log for what came of the request")
        if result is not None:
            path.unlink(missing_ok=True)
        return result

    def process_pending(self, carry_out: Callable[[OperatorRequest], str]) -> None:
        """Have every request carried out, oldest first.

        Args:
            carry_out: does it, with its events journalled, and returns the result in words; raises ``UsageError`` if it
                cannot be done. Being killed in it is harmless: the request is still there, and doing it twice is the
                same as once.
        """
        for path in sorted(self._folder.glob("*.json")):
            try:
                result = RequestResult(ok=True, text=carry_out(_read_request(path)))
            except UsageError as exc:
                result = RequestResult(ok=False, text=str(exc))
            log.info("request_answered", ok=result.ok, answer=result.text)
            write_json(path.with_suffix(".answer"), result)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _read_request(path: Path) -> OperatorRequest:
    with storage_errors(path, "read"):
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_REQUEST_BYTES else b""
    try:
        return _REQUEST_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError, RecursionError) as exc:
        raise UsageError(f"{path.name} is no request ({exc})") from exc
