"""Which pictures of a compressed video are whole, and how many never came. Pure.

Most pictures of a video say only what has changed since another one, their reference. When a picture is lost or
damaged, a decoder goes on with what it has: it shows the part before it, or a smear of both, until the next *keyframe*,
which needs no reference. So from the packet that something is wrong with to the next keyframe no picture is to be
judged.

What tells is the decoder, whose complaints are reported here by whoever runs it, and a jump in the packets' times
where they came evenly before. A packet is one picture; they come in the order of decoding, pictures in that of showing.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from dataclasses import dataclass
from typing import final

LOST = "lost"
"""Why a frame was dropped: it is missing in the video, by the times of those around it."""

MAX_IN_DECODER = 64
"""Number of packets whose pictures may be outstanding; no decoder holds back more."""

_STEPS, _EVEN_STEPS, _FEWEST_STEPS = 8, 0.75, 4
"""Number of steps between packets that are remembered; the share of them that must be even, so that a longer one means
a loss; and how many there must be at least."""

_UNEVENNESS = 1.25
_JUMP = 1.75
"""A step is even up to the first, and a loss from the second on, in medians of the steps before it. Cameras' clocks
jitter by less than a quarter of a step, and a step with one picture lost is two."""

MAX_LOST = 1_000_000
"""A longer jump is no count of pictures."""


UNDECODED = "the video is damaged: a picture cannot be decoded"


@dataclass(frozen=True, kw_only=True)
class PictureState:
    """What is known of a picture when it comes out of the decoder."""

    damage: str | None
    """Why it must not be judged, for people; None: it is whole."""
    num_lost: int
    """Number of pictures that are missing before it."""
    num_undecoded: int
    """Number of packets before it that gave no picture."""


@final
class StreamDamage:
    """Follows the packets of one stream into the decoder, and its pictures out of it."""

    def __init__(self) -> None:
        self._number = -1
        self._time: float | None = None
        self._steps: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._is_inter = False
        self._damaged_at = -1
        self._reason: str | None = None
        self._losses: dict[int, int] = {}
        """Number of pictures that are missing before a packet, by packet, as long as it is not told."""
        self._awaited: dict[int, float | None] = {}
        """When the pictures that are outstanding are to be shown, by packet."""

    def add_packet(
        self, time: float | None, *, shown: float | None = None, is_key: bool, gives_picture: bool = True
    ) -> int:
        """Add a packet that goes into the decoder; returns its number.

        Args:
            time: the packet's time of decoding, in any unit; None: not known.
            shown: when its picture is to be shown, in the same unit; None: not known.
            is_key: whether it is a keyframe.
            gives_picture: whether a picture is to come of it.
        """
        self._number += 1
        if gives_picture:
            self._awaited[self._number] = shown
        self._is_inter |= not is_key
        if time is not None:
            lost = self._missing_before(time)
            if lost:
                self._losses[self._number] = lost
                # Before this packet: if it is a keyframe, nothing depends on what is missing.
                words = "a picture is" if lost == 1 else f"{lost} pictures are"
                self._damage(f"{words} missing by the times of the others", self._number - 1)
        return self._number

    def complain(self, reason: str, number: int | None = None) -> None:
        """Something is wrong with a packet (None: the one that was added last), or with what it refers to."""
        self._damage(reason, self._number if number is None else number)

    @property
    def is_inter(self) -> bool:
        """Whether a packet has come that is not a keyframe."""
        return self._is_inter

    def fail_packet(self, reason: str) -> None:
        """The packet that was added last gives no picture, which the caller reports."""
        self.complain(reason)
        self._awaited.pop(self._number, None)

    def take_picture(self, number: int | None, *, is_key: bool) -> PictureState:
        """The state of a picture that comes out of the decoder.

        Args:
            number: its packet's; None: not known.
            is_key: whether the decoder says that it is a keyframe.
        """
        if number is None:
            # Without a number nothing is known of its order: as if it were the latest.
            number = self._number
        shown = self._awaited.pop(number, None)
        if is_key and self._damaged_at < number:
            self._reason = None
        damage = None if self._reason is None else f"{self._reason}; nothing is judged until the next keyframe"
        told = [one for one in self._losses if one <= number]
        lost = sum(self._losses.pop(one) for one in told)
        return PictureState(damage=damage, num_lost=lost, num_undecoded=self._overdue(number, shown))

    def end(self) -> int:
        """At the end of the stream: number of packets that gave no picture."""
        count = len(self._awaited)
        self._awaited.clear()
        return count

    def _damage(self, reason: str, number: int) -> None:
        # The first reason is the one that explains the others.
        self._reason = self._reason or f"the video is damaged: {reason}"
        self._damaged_at = max(self._damaged_at, number)

    def _overdue(self, number: int, shown: float | None) -> int:
        """Number of packets whose picture will not come any more: a later one is shown already. They are forgotten."""
        overdue = [
            one
            for one, time in self._awaited.items()
            if one <= number - MAX_IN_DECODER or (shown is not None and time is not None and time < shown)
        ]
        for one in overdue:
            del self._awaited[one]
        return len(overdue)

    def _missing_before(self, time: float) -> int:
        before, self._time = self._time, time
        if before is None:
            return 0
        step = time - before
        lost = 0
        if len(self._steps) >= _FEWEST_STEPS:
            usual = statistics.median(self._steps)
            even = sum(usual / _UNEVENNESS <= one <= usual * _UNEVENNESS for one in self._steps)
            if usual > 0 and even >= _EVEN_STEPS * len(self._steps) and step >= _JUMP * usual:
                lost = min(round(step / usual) - 1, MAX_LOST)
        self._steps.append(step)
        return lost


@final
class PipelineDamage:
    """As :class:`StreamDamage`, for a pipeline that decodes out of our sight.

    Of its decoder is known what went in and what came out, by time stamps; images come after that, perhaps fewer of
    them or others (where a rate is changed, say). An image is as good as the last picture that is not later than it.
    """

    def __init__(self) -> None:
        self._stream = StreamDamage()
        self._packets: dict[float, tuple[int, bool]] = {}
        """Number of each packet, and whether it is a keyframe, by time stamp."""
        self._last_stamp: float | None = None
        self._pictures: collections.deque[tuple[float, PictureState]] = collections.deque()
        """Those that no image has followed yet, by time stamp."""
        self._damage: str | None = None

    def add_packet(
        self, decoded: float | None, stamp: float | None, *, is_key: bool, is_after_gap: bool, is_corrupt: bool
    ) -> None:
        """Add a packet that goes into the decoder.

        Args:
            decoded: its time of decoding; None: not known.
            stamp: its time stamp, in the same unit. Without one it is not looked at: it may be any piece of a picture.
            is_key: whether it is a keyframe.
            is_after_gap: whether something is missing before it.
            is_corrupt: whether something is missing in it.
        """
        if stamp is None:
            return
        is_first = self._last_stamp is None
        if stamp != self._last_stamp:
            number = self._stream.add_packet(stamp if decoded is None else decoded, shown=stamp, is_key=is_key)
            self._packets[stamp] = (number, is_key)
            if len(self._packets) > MAX_IN_DECODER:
                del self._packets[min(self._packets)]
        self._last_stamp = stamp
        # What is missing may be the keyframe's own beginning; pictures that all are keyframes come whole or not at all.
        if is_corrupt or (is_after_gap and not is_first and (not is_key or self._stream.is_inter)):
            self._stream.complain("a part of it did not arrive")

    def take_picture(self, stamp: float | None, *, is_corrupt: bool) -> None:
        """Add a picture that comes out of the decoder.

        Args:
            stamp: its time stamp; None: not known.
            is_corrupt: whether the decoder says that it is damaged.
        """
        if stamp is None or stamp not in self._packets:
            return
        number, is_key = self._packets.pop(stamp)
        if is_corrupt:
            self._stream.complain("the decoder says so", number)
        state = self._stream.take_picture(number, is_key=is_key)
        if state.num_undecoded and not is_key:
            self._stream.complain("a picture cannot be decoded", number)
            state = dataclasses.replace(state, damage=state.damage or UNDECODED)
        self._pictures.append((stamp, state))

    def take_image(self, stamp: float | None) -> PictureState:
        """The state of an image that the pipeline gives.

        Args:
            stamp: its time stamp; None: not known.
        """
        num_lost = num_undecoded = 0
        while self._pictures and (stamp is None or self._pictures[0][0] <= stamp):
            _, state = self._pictures.popleft()
            self._damage = state.damage
            num_lost += state.num_lost
            num_undecoded += state.num_undecoded
        return PictureState(damage=self._damage, num_lost=num_lost, num_undecoded=num_undecoded)

    def end(self) -> int:
        """At the end of the stream: number of packets that gave no picture, and were not told yet."""
        return self._stream.end() + sum(state.num_undecoded for _, state in self._pictures)
