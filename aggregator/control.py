"""The operator's control of a running aggregator: small files in its state directory, each answered by another.

    STATE/requests/<number>.json     a request, written by ``edgeflame rounds``, deleted when it has been carried out
    STATE/requests/<number>.answer   its outcome, deleted by who asked

Files, because who may write into the state directory may decide about the run, and because a request waits there for
an aggregator that is not running just now.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgeflame.errors import EdgeFlameError, StorageError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import Name, Text
from edgeflame.state import storage_errors, write_json

log = EventLog("aggregator")

MAX_REQUEST_BYTES = 4096


class _OperatorRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="request", forbid_unknown_fields=True):
    reason: Text = "no reason given"


class StopRun(_OperatorRequest, frozen=True, kw_only=True, tag="stop"):
    """End the run without a result; after its end, send an aggregator that stays away."""


class FinishEarly(_OperatorRequest, frozen=True, kw_only=True, tag="finish"):
    """No round after the one at hand."""


class PauseSite(_OperatorRequest, frozen=True, kw_only=True, tag="pause"):
    site: Name


class ResumeSite(_OperatorRequest, frozen=True, kw_only=True, tag="resume"):
    site: Name


class RemoveSite(_OperatorRequest, frozen=True, kw_only=True, tag="remove"):
    """The site is of the run no more."""

    site: Name


OperatorRequest = StopRun | FinishEarly | PauseSite | ResumeSite | RemoveSite

_REQUEST_DECODER: msgspec.json.Decoder[OperatorRequest] = msgspec.json.Decoder(OperatorRequest)


class RequestResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request; ``text`` is for people."""

    ok: bool
    text: str


_RESULT_DECODER = msgspec.json.Decoder(RequestResult)


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
        """Ask for something; the number of the request."""
        number = f"{time.time_ns():020d}"
        write_json(self._folder / f"{number}.json", request)
        return number

    def take_result(self, number: str) -> RequestResult | None:
        """What came of a request, if it was carried out; the answer can be taken once."""
        path = self._folder / f"{number}.answer"
        try:
            answer = _RESULT_DECODER.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise StorageError(f"{path}: cannot read the answer ({exc})") from exc
        path.unlink(missing_ok=True)
        return answer

    def process_pending(self, carry_out: Callable[[OperatorRequest], str]) -> None:
        """Have every request carried out, oldest first.

        Args:
            carry_out: does it, journalled, and says what came of it; a ``UsageError`` says that it cannot be. Being
                killed in it is harmless: the request is still there, and doing it twice is the same as once.
        """
        for path in sorted(self._folder.glob("*.json")):
            try:
                answer = RequestResult(ok=True, text=carry_out(_read_request(path)))
            except UsageError as exc:
                answer = RequestResult(ok=False, text=str(exc))
            log.info("request_answered", ok=answer.ok, answer=answer.text)
            write_json(path.with_suffix(".answer"), answer)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _read_request(path: Path) -> OperatorRequest:
    with storage_errors(path, "read"):
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_REQUEST_BYTES else b""
    try:
        return _REQUEST_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError) as exc:
        raise UsageError(f"{path.name} is no request ({exc})") from exc
