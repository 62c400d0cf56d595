"""Sections of a camera: how it is captured and inspected, how its parts are announced, and what watches over it."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeGuard

import cv2
import msgspec
import numpy as np
from msgspec import Meta

from edgeflame.bounds import BASIC, LONGEST_SIDE, Count, NotEmpty, Port, Positive, Register, Side
from edgeflame.errors import ConfigError
from edgeflame.image_quality import MAX_MEAN, MIN_COLOUR, MIN_MEAN, MIN_SPREAD
from edgeflame.images import MAX_MEGAPIXELS

DeviceId = Annotated[int, Meta(ge=0, le=255)]
"""A Modbus device's id, also called unit or slave id."""
RequestTimeout = Annotated[float, Meta(ge=0.05, le=60)]
"""How long an answer to a Modbus request may take, seconds."""


class CaptureConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[capture]``."""

    policy: Literal["auto", "wait", "latest"] = "auto"
    """When scoring is slower than the source: ``wait`` holds the source back, ``latest`` drops the oldest frame
    and counts it. ``auto``: ``latest`` for cameras and streams, ``wait`` for files."""
    depth: Annotated[int, Meta(ge=1, le=64)] = 2
    """Frames that wait to be scored."""
    max_megapixels: Annotated[float, Meta(gt=0, le=1000)] = MAX_MEGAPIXELS
    """Largest picture of a file that is decoded, in millions of pixels; one that claims more is ``unreadable``, however
    small its file is. A decoded picture takes three bytes a pixel, and twice that at 16 bits."""

    @property
    def max_pixels(self) -> int:
        """The same, in pixels."""
        return int(self.max_megapixels * 1e6)


class ImageQualityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[image_quality]``: what a usable image is. The defaults refuse only what no working camera and lamp
    would give.
    """

    min_mean: Annotated[float, Meta(ge=0, le=255)] = MIN_MEAN
    """Darkest mean grey level, 0..255, of the model's input; 0 allows any."""
    max_mean: Annotated[float, Meta(ge=0, le=255)] = MAX_MEAN
    """Brightest mean grey level; 255 allows any."""
    min_spread: Annotated[float, Meta(ge=0, le=128)] = MIN_SPREAD
    """Smallest standard deviation, in grey levels, of the channel that varies most; a real sensor's noise alone is
    more than this, a dropped signal's even grey is less. 0 allows any."""

    min_sharpness: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Least sharpness, as a share of that of the package's reference images; a lens out of focus has a fifth of it or
    less. 0, the default, allows any: parts may differ in this more than lenses do."""
    max_repeats: Annotated[int, Meta(ge=0, le=10**6)] = 5
    """How many times in a row a live camera may give the same picture, to the last bit: a sensor's noise prevents it, a
    frozen driver does nothing else. 0 allows any number, which a synthetic stream needs."""

    min_colour: Annotated[float, Meta(ge=0, le=0.9)] = MIN_COLOUR
    """Least chroma, as a share of that of the package's least colourful reference image: less is a camera that fell
    back to grey. This check also notices exchanged red and blue. It cannot judge grey products. 0 switches it off."""
    frame_size: Literal["model", "any"] = "model"
    """``model``: a frame whose size is not among those of the photographs that the model was made of is ``unknown``
    (``wrong_size``). ``any``: it is judged, and the log says so; likewise where ``roi.frame`` or ``roi.crop`` is set,
    which then counts. Packages of earlier versions do not say which sizes they were made of."""
    max_shift: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Largest shift against the package's reference images, as a share of the picture's side; 0, the default, allows
    any. The check needs something that stays in its place from part to part; where there is nothing it is refused."""

    def __post_init__(self) -> None:
        if self.min_mean > self.max_mean:
            raise ConfigError(
                f"image_quality.min_mean must be <= max_mean, not {self.min_mean:g} with {self.max_mean:g}"
            )


Rectangle = tuple[int, int, int, int]
"""x, y, width, height."""
Point = tuple[int, int]
Shape = tuple[int | Point, ...]
"""A rectangle, or a polygon of points. The numbers are checked by hand: msgspec 0.22 crashes on a union of a bounded
number and a tuple."""


class RoiConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[roi]``, the region of interest: pixels of the camera's frame, from its upper left corner."""

    frame: tuple[Side, Side] | None = None
    """Width and height that every frame must have, or the part is ``unknown`` (``wrong_size``). If left out, a live
    camera must keep to the size of its first frame."""
    crop: Rectangle | None = None
    """``[x, y, width, height]`` that the model gets in place of the package's own region of interest, after the camera
    was mounted anew: it must show there what it showed in training."""
    roi: Rectangle | None = None
    """``[x, y, width, height]``: nothing outside it is inspected."""
    ignore: tuple[Shape, ...] = ()
    """What is not inspected: rectangles ``[x, y, width, height]`` and polygons ``[[x, y], [x, y], [x, y], ...]``."""
    ignore_image: NotEmpty | None = None
    """A PNG of the frame's size: what is not black in it is not inspected. Its path is relative to the working
    folder."""

    def __post_init__(self) -> None:
        for name, shape in (("crop", self.crop), ("roi", self.roi), *(("ignore", shape) for shape in self.ignore)):
            if shape is not None:
                _check_shape(name, shape)


def _check_shape(name: str, shape: Shape) -> None:
    if is_rectangle(shape):
        x, y, width, height = shape
        fits = min(x, y) >= 0 and min(width, height) > 0 and max(shape) <= LONGEST_SIDE
    elif _is_polygon(shape):
        points = np.asarray(shape)
        fits = (
            len(points) >= 3
            and points.min() >= 0
            and points.max() <= LONGEST_SIDE
            and cv2.contourArea(points.astype(np.float32)) > 0
        )
    else:
        fits = False
    if not fits:
        shapes = "[x, y, width, height]" + (" or a polygon of three points or more" if name == "ignore" else "")
        raise ConfigError(f"roi.{name} is {shapes} with an area, in pixels from 0, not {shape_words(shape)}")


def is_rectangle(shape: Shape) -> TypeGuard[Rectangle]:
    return len(shape) == 4 and all(isinstance(part, int) for part in shape)


def _is_polygon(shape: Shape) -> TypeGuard[tuple[Point, ...]]:
    return all(isinstance(part, tuple) for part in shape)


def shape_words(shape: Shape) -> str:
    return str([part if isinstance(part, int) else list(part) for part in shape])


class DriftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How soon a change of the line raises an alarm, and how rarely there is one where nothing changes."""

    enabled: bool = True
    """Whether drift is watched; this needs a state folder."""
    false_alarms_per_year: Positive = 1.0
    """Upper bound of the alarms in a year for one camera with one model, all its streams together, on a line where
    nothing changes."""
    parts_per_year: Annotated[float, Meta(ge=1000, le=10**12)] = 2_000_000.0
    """Parts in a year: a part every four seconds in one shift makes 1.8 million. Ten times as many delay an alarm by a
    sixth."""
    tolerance: Annotated[float, Meta(ge=0.01, le=0.4)] = 0.1
    """How far the typical part may move among the reference's parts without an alarm, in ranks: 0.1 is from the
    middle to where 60% lie below, about 0.35 of their standard deviation."""
    alike: Annotated[float, Meta(ge=1, le=10_000)] = 20.0
    """Number of parts in a row that are alike, as neighbours usually are; 1 if each is independent. A larger number
    delays alarms in proportion."""
    learn: Annotated[int, Meta(ge=50, le=20_000)] = 2000
    """Number of parts that a reference is learnt from, if the package has none or after ``relearn``."""
    reference: Literal["auto", "line"] = "auto"
    """``auto``: the package's reference if it has one; ``line``: always learnt from the first parts."""
    max_per_s: Annotated[float, Meta(gt=0, le=10**6)] = 10.0
    """Most parts in a second that drift is computed for, which bounds the computing time; further ones are skipped."""

    def __post_init__(self) -> None:
        if self.parts_per_alarm < 100:
            raise ConfigError("drift: false_alarms_per_year is more than one in a hundred of parts_per_year")

    @property
    def parts_per_alarm(self) -> float:
        """Mean number of parts between false alarms: the average run length."""
        return self.parts_per_year / self.false_alarms_per_year


class SelfTestConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which known (golden) parts the line is tested with, and when."""

    folder: NotEmpty | None = None
    """Photographs of known parts, ``good/`` that must pass and ``bad/`` that must fail; for several products in
    folders of their names. If left out, only a golden part before the camera can be tested."""
    times: tuple[str, ...] = ()
    """When the photographs are tested automatically, local time: ``["06:00", "14:00", "22:00"]`` for each shift."""
    blocks_readiness: bool = True
    """A failed test makes the line not ready until one passes or a person acknowledges it."""
    wait_s: Annotated[float, Meta(gt=0, le=3600)] = 60.0
    """How long a test before the camera waits for the golden part, seconds."""

    def __post_init__(self) -> None:
        for text in self.times:
            try:
                dt.time.fromisoformat(text)
            except ValueError as exc:
                raise ConfigError(f"self_test.times: {text[:40]!r} is no time of the day (such as 06:00)") from exc
        if self.times and self.folder is None:
            raise ConfigError(
                "self_test.times needs self_test.folder: a part before the camera cannot be tested by the clock"
            )

    @property
    def day_times(self) -> tuple[dt.time, ...]:
        """The times in their order."""
        return tuple(sorted(dt.time.fromisoformat(text) for text in self.times))


class MqttTriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger.mqtt]``: one message is one part."""

    topic: Annotated[str, Meta(pattern=r"^[^+#\x00]+$", description="one topic without wildcards")] | None = None
    """Topic of the messages, without wildcards; if left out, ``edgeflame/v1/<fleet>/line/<line>/trigger`` of the
    section ``[mqtt]``."""
    broker: NotEmpty | None = None
    """``mqtt://[user@]host[:port]`` or ``mqtts://``, the password from ``EDGEFLAME_MQTT_PASSWORD``; if left out, that
    of ``[mqtt]``, with its certificates or kit."""
    ca: NotEmpty | None = None
    """PEM file of the certificate authority, for a broker of its own."""
    cert: NotEmpty | None = None
    """PEM file of our certificate there."""
    key: NotEmpty | None = None
    """PEM file of its private key."""
    part_id: str = "part_id"
    """Key of the part's name in a message that is a JSON object; any other message is the name itself."""
    number: str = "number"
    """Key of the part's number; a message may lack it."""
    time: str = "time"
    """Key of the time at which the part was there, with its offset from UTC; a message may lack it."""
    use_time: bool = False
    """Whether that time counts rather than that of the message's arrival: only where both clocks are kept together, and
    ``trigger.lookback_ms`` covers the transport."""

    def __post_init__(self) -> None:
        if self.broker is None and (self.ca or self.cert or self.key):
            raise ConfigError(
                "trigger.mqtt: ca, cert and key are for a broker of its own; [mqtt] has those of its broker"
            )


class ModbusTriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger.modbus]``: exactly one of the four places is polled."""

    host: NotEmpty
    """Name or address of the PLC."""
    port: Port = 502
    """TCP port of its Modbus server."""
    unit: DeviceId = 1
    """Device id of the PLC."""
    register: Register | None = None
    """Address, from 0, of a holding register that counts parts: a change is one part, and a jump shows what was
    missed. This form is to be preferred."""
    input_register: Register | None = None
    """Address of an input register that counts parts."""
    coil: Register | None = None
    """Address, from 0, of a coil whose rising edge is one part. A pulse shorter than ``poll_ms`` may go unseen."""
    discrete_input: Register | None = None
    """Address of a discrete input whose rising edge is one part."""
    words: Literal[1, 2] = 1
    """Registers of the counter: 1, or 2 with the high word first."""
    poll_ms: Annotated[float, Meta(ge=1, le=60_000)] = 20.0
    """Time from one request to the next; a trigger is noticed this and the time of an answer later at most."""
    timeout_s: RequestTimeout = 1.0
    """How long an answer to a request may take."""

    def __post_init__(self) -> None:
        places = [
            place for place in (self.register, self.input_register, self.coil, self.discrete_input) if place is not None
        ]
        if len(places) != 1:
            raise ConfigError(
                "trigger.modbus needs one of register, input_register, coil and discrete_input, and only one"
            )
        if places[0] > 65536 - self.words:
            raise ConfigError(f"trigger.modbus: a counter of {self.words} words must be at 0..65534, not {places[0]}")

    @property
    def is_counter(self) -> bool:
        """Whether it is a register that counts parts; otherwise it is a contact."""
        return self.register is not None or self.input_register is not None


class TriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger]``; without ``mqtt`` or ``modbus`` every frame is a part."""

    delay_ms: Annotated[float, Meta(ge=-5000, le=600_000)] = 0.0
    """Time from the trigger to the moment the part is in front of the camera."""
    window_ms: Annotated[float, Meta(ge=1, le=600_000)] = 500.0
    """How long it stays there: the first image in this time is the part's."""
    lookback_ms: Annotated[float, Meta(ge=0, le=10_000)] = 250.0
    """How long after an image's capture its trigger may reach us; images are held for this time."""
    mqtt: MqttTriggerConfig | None = None
    """Messages that announce parts."""
    modbus: ModbusTriggerConfig | None = None
    """A PLC's register or contact that announces parts."""

    def __post_init__(self) -> None:
        if self.mqtt is not None and self.modbus is not None:
            raise ConfigError("trigger: mqtt or modbus, not both")
        if self.lookback_ms < -self.delay_ms:
            raise ConfigError(
                f"trigger.lookback_ms must cover a negative delay_ms, {self.delay_ms:g}, not {self.lookback_ms:g}"
            )

    @property
    def is_on(self) -> bool:
        """Whether parts are announced; otherwise every frame is a part."""
        return self.mqtt is not None or self.modbus is not None


Milliseconds = Annotated[float, Meta(ge=1, le=3_600_000)]
"""A time of up to an hour."""


PartNumber = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A number that parts have."""


class PartsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[parts]``."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"remembered": "dedup_window"}

    deadline_ms: Annotated[Milliseconds | None, BASIC] = None
    """The verdict is out this long after the trigger, or after the capture where there is none: ``unknown``, if the
    model has not answered by then. If left out, there is no deadline."""
    max_age_ms: Milliseconds | None = None
    """An image captured longer ago than this when its turn comes is not inspected."""
    hang_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0
    """With a deadline: a model that is busy with one image for this many seconds ends the inspection with exit code 12,
    to be started again by its supervisor."""
    number: str | None = None
    """Regular expression whose one group is the part's number in its name, for instance ``(\\d+)$``; for parts
    whose trigger gives no number, and for files."""
    wrap: tuple[PartNumber, PartNumber] | None = None
    """First and last number, where the numbers begin anew after the last; a counter in registers wraps by itself."""
    max_gap: Count = 1000
    """A jump by more than this means that the numbers began anew, not that as many parts are missing."""
    dedup_window: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    """Number of past parts among which a repeated number or name is noticed."""

    def __post_init__(self) -> None:
        if self.wrap is not None and not 0 <= self.wrap[0] < self.wrap[1] - 1:
            raise ConfigError(f"parts.wrap must be [first, last], three numbers or more, not {list(self.wrap)}")
        if self.number is not None:
            try:
                groups = re.compile(self.number).groups
            except re.error as exc:
                raise ConfigError(f"parts.number is no regular expression ({exc}): {self.number!r}") from exc
            if groups != 1:
                raise ConfigError(f"parts.number must have one group, for the number, not {groups}: {self.number!r}")
