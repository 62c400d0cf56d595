"""What may be said on a line's command topic, and what it answers. JSON.

``edgeflame/v1/<fleet>/line/<line>/command``, to the line, never retained::

    {"command": "pause", "id": "7f3a", "camera": "left"}

``edgeflame/v1/<fleet>/line/<line>/reply``, from the line: :class:`Reply` with the same ``id``.

A ``camera`` may be left out where there is one alone; ``pause`` and ``resume`` without one mean all of them. Unknown
keys are refused: a mistyped ``camera`` must not turn into "all".
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgeflame.errors import FederationError

MAX_COMMAND_BYTES = 4096

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class _Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command"):
    id: Id
    """Chosen by the sender; the reply carries it. A second command of the same id is answered and not done again."""
    by: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """Who asks, for the log; nothing vouches for it."""


class PauseCamera(_Command, frozen=True, kw_only=True, tag="pause"):
    """Judge no more parts."""

    camera: Name | None = None


class ResumeCamera(_Command, frozen=True, kw_only=True, tag="resume"):
    """Go on."""

    camera: Name | None = None


class SetThreshold(_Command, frozen=True, kw_only=True, tag="threshold"):
    """Another threshold for the model in use; kept over restarts."""

    camera: Name | None = None
    threshold: float | None
    """Raw distance; null: the configuration's, or the package's own."""


class TakeSnapshot(_Command, frozen=True, kw_only=True, tag="snapshot"):
    """Keep a picture of the next part, and answer with its result."""

    camera: Name | None = None


class SwitchProduct(_Command, frozen=True, kw_only=True, tag="product"):
    """Judge another product; kept over restarts."""

    camera: Name | None = None
    product: Name


class RunGoldenTest(_Command, frozen=True, kw_only=True, tag="golden"):
    """Test a camera with the photographs of its golden parts, or with the next part."""

    camera: Name | None = None
    expected: Literal["good", "bad"] | None = None
    """The next part is a golden one, and this is what it is; null: the photographs."""


class AcknowledgeTest(_Command, frozen=True, kw_only=True, tag="acknowledge"):
    """A person takes note that a self-test failed."""

    camera: Name | None = None


class HandleDrift(_Command, frozen=True, kw_only=True, tag="drift"):
    """What was done about a camera's drift."""

    camera: Name | None = None
    action: Literal["clear", "relearn"]
    """The cause was removed, or the line as it is now is right."""


class RollBackModel(_Command, frozen=True, kw_only=True, tag="rollback"):
    """Go back to the model before."""

    product: Name
    to_file: bool = False
    """To that of the configuration's file, however many were between."""


class SwitchModel(_Command, frozen=True, kw_only=True, tag="switch_model"):
    """Switch to the released model that waits for this word."""

    product: Name


class ReloadConfig(_Command, frozen=True, kw_only=True, tag="reload"):
    """Read the configuration again."""


class DescribeLine(_Command, frozen=True, kw_only=True, tag="describe"):
    """Say what the line is doing."""


Command = (
    PauseCamera
    | ResumeCamera
    | SetThreshold
    | TakeSnapshot
    | SwitchProduct
    | RunGoldenTest
    | AcknowledgeTest
    | HandleDrift
    | RollBackModel
    | SwitchModel
    | ReloadConfig
    | DescribeLine
)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one command."""

    id: str
    ok: bool
    error: str | None = None
    """Why it was not done."""
    exit_code: int = 0
    """That of the error's family; see docs/exit-codes.md."""
    answer: msgspec.Raw = msgspec.Raw(b"null")
    """What the command gives: what the line is doing now, a snapshot."""


class _Head(msgspec.Struct):
    id: Id


_COMMAND: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_HEAD = msgspec.json.Decoder(_Head)


def decode_command(data: bytes) -> Command:
    """Read a command.

    Raises:
        FederationError: it is none, whatever it is.
    """
    if len(data) > MAX_COMMAND_BYTES:
        raise FederationError(f"a command of {len(data)} bytes; at most {MAX_COMMAND_BYTES} are read")
    try:
        return _COMMAND.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise FederationError(f"not a command ({str(exc)[:200]})") from exc


def read_command_id(data: bytes) -> str | None:
    """The id in what is no command, if one can be read: whoever sent it shall hear that it was not done."""
    if len(data) > MAX_COMMAND_BYTES:
        return None
    try:
        return _HEAD.decode(data).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
