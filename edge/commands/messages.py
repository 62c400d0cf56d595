"""The messages on a line's command topic, and its replies; JSON.

``edgeflame/v1/<fleet>/line/<line>/command``, to the line, never retained::

    {"command": "pause", "id": "7f3a", "camera": "left"}

``edgeflame/v1/<fleet>/line/<line>/reply``, from the line: :class:`Reply` with the same ``id``.

A ``camera`` may be left out if there is only one; ``pause`` and ``resume`` without it mean all cameras. Unknown keys
are refused: a mistyped ``camera`` must not mean "all".
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge.teaching.orders import TeachingOrder
from edgeflame.errors import FederationError
from edgeflame.marks import Kind, TrueLabel

MAX_COMMAND_BYTES = 4096

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class _Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command"):
    id: Id
    """Chosen by the sender and repeated in the reply. A second command with the same id is answered, not executed."""
    by: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """Name of the sender, for the log; it is not verified."""


class PauseCamera(_Command, frozen=True, kw_only=True, tag="pause"):
    """Stop inspecting parts."""

    camera: Name | None = None


class ResumeCamera(_Command, frozen=True, kw_only=True, tag="resume"):
    """Resume the inspection."""

    camera: Name | None = None


class SetThreshold(_Command, frozen=True, kw_only=True, tag="threshold"):
    """Set the threshold of the model in use; kept over restarts."""

    camera: Name | None = None
    threshold: float | None
    """Raw distance; null: the configuration's, or the package's own."""


class TakeSnapshot(_Command, frozen=True, kw_only=True, tag="snapshot"):
    """Store a picture of the next part; the reply has its result."""

    camera: Name | None = None


class SwitchProduct(_Command, frozen=True, kw_only=True, tag="product"):
    """Inspect another product; kept over restarts."""

    camera: Name | None = None
    product: Name


class RunGoldenTest(_Command, frozen=True, kw_only=True, tag="golden"):
    """Test a camera with the photographs of its golden parts, or with the next part."""

    camera: Name | None = None
    expected: Literal["good", "bad"] | None = None
    """The next part is a golden part of this kind; null: test the photographs."""


class AcknowledgeTest(_Command, frozen=True, kw_only=True, tag="acknowledge"):
    """Acknowledge that a self-test failed."""

    camera: Name | None = None


class HandleDrift(_Command, frozen=True, kw_only=True, tag="drift"):
    """Settle a camera's drift alarm."""

    camera: Name | None = None
    action: Literal["clear", "relearn"]
    """``clear``: the cause was removed; ``relearn``: the present state is right, and becomes the reference."""


class MarkPart(_Command, frozen=True, kw_only=True, tag="mark"):
    """Say what a part that was inspected a short while ago really was."""

    camera: Name | None = None
    part: Name
    """Its name, ``part_id`` of its result."""
    was: TrueLabel
    kind: Kind | None = None
    """Of the defect."""


class RollBackModel(_Command, frozen=True, kw_only=True, tag="rollback"):
    """Go back to the model before."""

    product: Name
    to_file: bool = False
    """Go back to the configuration's file, past all earlier released models."""


class SwitchModel(_Command, frozen=True, kw_only=True, tag="switch_model", omit_defaults=True):
    """Switch to the released model that waits for a person's decision."""

    product: Name
    allow_older: bool = False
    """Take up the release that was refused because its number is lower than one seen before. Left out where false, for
    lines of earlier versions."""


class TeachProduct(_Command, frozen=True, kw_only=True, tag="teach"):
    """Teach a product at this line; the reply says how it stands."""

    order: TeachingOrder


class ReloadConfig(_Command, frozen=True, kw_only=True, tag="reload"):
    """Read the configuration again."""


class DescribeLine(_Command, frozen=True, kw_only=True, tag="describe"):
    """Reply with the line's status."""


Command = (
    PauseCamera
    | ResumeCamera
    | SetThreshold
    | TakeSnapshot
    | SwitchProduct
    | RunGoldenTest
    | AcknowledgeTest
    | HandleDrift
    | MarkPart
    | RollBackModel
    | SwitchModel
    | TeachProduct
    | ReloadConfig
    | DescribeLine
)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one command."""

    id: str
    ok: bool
    error: str | None = None
    """Why the command failed; null if it did not."""
    exit_code: int = 0
    """Exit code of the error's kind; see docs/exit-codes.md."""
    answer: msgspec.Raw = msgspec.Raw(b"null")
    """Result of the command as JSON: the line's status or a snapshot, for instance."""


class _Head(msgspec.Struct):
    id: Id


_COMMAND: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_HEAD = msgspec.json.Decoder(_Head)


def decode_command(data: bytes) -> Command:
    """Read a command.

    Raises:
        FederationError: it is not a command.
    """
    if len(data) > MAX_COMMAND_BYTES:
        raise FederationError(f"a command of {len(data)} bytes; at most {MAX_COMMAND_BYTES} are read")
    try:
        return _COMMAND.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise FederationError(f"not a command ({str(exc)[:200]})") from exc


def read_command_id(data: bytes) -> str | None:
    """The id in a message that is not a valid command, so that it can be answered; None if there is none."""
    if len(data) > MAX_COMMAND_BYTES:
        return None
    try:
        return _HEAD.decode(data).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
