"""What leaves the outbox: a result and the numbers by which a receiver knows it again."""

from __future__ import annotations

import msgspec

from edge.results import Result


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One result on its way to one destination; JSON on the wire.

    A receiver keeps the highest ``number`` it has seen of each ``outbox``. A lower or equal one is a repetition,
    a gap is a loss, and both can be told without asking back.
    """

    outbox: str
    """Of this state folder; 32 hexadecimal digits."""
    number: int
    """Place in the outbox, from 1, without gaps."""
    redelivered: bool
    """It may have been delivered before: the answer to an earlier attempt was lost."""
    result: msgspec.Raw
    """:class:`edge.results.Result` as JSON."""

    def encode(self) -> bytes:
        """The bytes to send."""
        return msgspec.json.encode(self)

    def read_result(self) -> Result:
        """The result itself."""
        return _RESULT.decode(self.result)


_RESULT = msgspec.json.Decoder(Result)
