"""Sections of a camera: ``[capture]``, ``[health]``, ``[view]``, ``[drift]`` and ``[golden]``."""

from __future__ import annotations

import datetime as dt
from typing import Literal, TypeGuard

import cv2
import msgspec
import numpy as np

from edgeflame.errors import ConfigError


class CaptureConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[capture]``."""

    policy: Literal["auto", "wait", "latest"] = "auto"
    """When scoring is slower than the source: ``wait`` holds the source back, ``latest`` drops the oldest frame
    and counts it. ``auto``: ``latest`` for cameras and streams, ``wait`` for files."""
    depth: int = 2
    """Frames held ready."""

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 64:
            raise ConfigError(f"capture.depth must be 1..64, not {self.depth}")


class HealthLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[health]``. The defaults refuse only what no working camera and lamp would give."""

    min_mean: float = 3.0
    """Darkest mean grey level, 0..255, of the model's input; 0 allows any."""
    max_mean: float = 252.0
    """Brightest mean grey level; 255 allows any."""
    min_spread: float = 0.5
    """Smallest standard deviation, in grey levels, of the liveliest channel; a real sensor's noise alone is
    more than this, a dropped signal's even grey is less. 0 allows any."""

    min_sharpness: float = 0.0
    """Least sharpness, as a share of that of the package's reference images; a lens out of focus has a fifth of it or
    less. 0, the default, allows any: parts may differ in this more than lenses do."""
    max_repeats: int = 5
    """A live camera may give the same picture, to the last bit, so many times running: a sensor's noise forbids it, a
    frozen driver does nothing else. 0 allows any number; so does a synthetic stream need it."""

    min_colour: float = 0.25
    """Least chroma, as a share of that of the package's least colourful reference image: less is a camera that fell
    back to grey. Also has exchanged red and blue noticed. Says nothing about grey products. 0 switches it off."""
    max_shift: float = 0.0
    """Largest shift against the package's reference images, as a share of the picture's side; 0, the default, allows
    any. It takes something that stays in its place from part to part; where there is nothing it is refused."""

    def __post_init__(self) -> None:
        for name, value, most in (("min_colour", self.min_colour, 0.9), ("max_shift", self.max_shift, 0.5)):
            if not 0 <= value <= most:
                raise ConfigError(f"health.{name} must be 0..{most:g}, not {value}")
        if not 0 <= self.min_sharpness <= 1:
            raise ConfigError(f"health.min_sharpness must be 0..1, not {self.min_sharpness}")
        if self.max_repeats < 0:
            raise ConfigError(f"health.max_repeats must be 0 or more, not {self.max_repeats}")
        if not 0 <= self.min_mean <= self.max_mean <= 255:
            raise ConfigError(f"health: 0 <= min_mean <= max_mean <= 255, not {self.min_mean} and {self.max_mean}")
        if not 0 <= self.min_spread <= 128:
            raise ConfigError(f"health.min_spread must be 0..128, not {self.min_spread}")


Rectangle = tuple[int, int, int, int]
"""x, y, width, height."""
Point = tuple[int, int]
Shape = tuple[int | Point, ...]
"""A rectangle, or a polygon of points."""


class ViewConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[view]``: pixels of the camera's frame, from its upper left corner."""

    frame: tuple[int, int] | None = None
    """Width and height that every frame must have, or the part is ``unknown`` (``wrong_size``). Left out, a live
    camera must keep to the size of its first frame."""
    crop: Rectangle | None = None
    """``[x, y, width, height]`` that the model gets in place of the package's own region of interest, after the camera
    was mounted anew: it must show there what it showed in training."""
    roi: Rectangle | None = None
    """``[x, y, width, height]``: nothing outside it is judged."""
    ignore: tuple[Shape, ...] = ()
    """What is not judged: rectangles ``[x, y, width, height]`` and polygons ``[[x, y], [x, y], [x, y], ...]``."""
    ignore_image: str | None = None
    """A PNG of the frame's size: what is not black in it is not judged. Relative to the working folder."""

    def __post_init__(self) -> None:
        if self.frame is not None and min(self.frame) < 1:
            raise ConfigError(f"view.frame is [width, height] in pixels, not {list(self.frame)}")
        for name, shape in (("crop", self.crop), ("roi", self.roi), *(("ignore", shape) for shape in self.ignore)):
            if shape is not None:
                _check_shape(name, shape)


def _check_shape(name: str, shape: Shape) -> None:
    if is_rectangle(shape):
        x, y, width, height = shape
        fits = x >= 0 and y >= 0 and width > 0 and height > 0
    elif _is_polygon(shape):
        points = np.asarray(shape)
        fits = len(points) >= 3 and points.min() >= 0 and cv2.contourArea(points.astype(np.float32)) > 0
    else:
        fits = False
    if not fits:
        shapes = "[x, y, width, height]" + (" or a polygon of three points or more" if name == "ignore" else "")
        raise ConfigError(f"view.{name} is {shapes} with an area, in pixels from 0, not {shape_words(shape)}")


def is_rectangle(shape: Shape) -> TypeGuard[Rectangle]:
    return len(shape) == 4 and all(isinstance(part, int) for part in shape)


def _is_polygon(shape: Shape) -> TypeGuard[tuple[Point, ...]]:
    return all(isinstance(part, tuple) for part in shape)


def shape_words(shape: Shape) -> str:
    return str([part if isinstance(part, int) else list(part) for part in shape])


class DriftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How soon a line that changes is spoken of, and how seldom one that does not."""

    enabled: bool = True
    """Watched wherever there is a state folder."""
    false_alarms_per_year: float = 1.0
    """Of one camera with one model, all its streams together, on a line where nothing changes. An upper bound."""
    parts_per_year: float = 2_000_000.0
    """What a year is: a part every four seconds in one shift has 1.8 million. Ten times as many delay an alarm by a
    sixth."""
    tolerance: float = 0.1
    """How far the typical part may move among the reference's parts without being spoken of, in ranks: 0.1 is from the
    middle to where 60% lie below, about 0.35 of their standard deviation."""
    alike: float = 20.0
    """Parts in a row that are alike, because neighbours on a line are: 1 where each is independent. Alarms come later
    in the same measure."""
    learn: int = 2000
    """Parts that a reference is learnt from where the package has none, and after `relearn`."""
    reference: Literal["auto", "line"] = "auto"
    """``auto``: the package's where it has one; ``line``: always learnt from the first parts."""
    max_per_s: float = 10.0
    """Parts looked at per second; of a faster line, some. Bounds the time it takes."""

    def __post_init__(self) -> None:
        rules = (
            (self.false_alarms_per_year > 0, "drift.false_alarms_per_year must be > 0", self.false_alarms_per_year),
            (self.parts_per_year >= 1000, "drift.parts_per_year must be at least 1000", self.parts_per_year),
            (0.01 <= self.tolerance <= 0.4, "drift.tolerance must be 0.01..0.4", self.tolerance),
            (1 <= self.alike <= 10_000, "drift.alike must be 1..10000", self.alike),
            (50 <= self.learn <= 20_000, "drift.learn must be 50..20000", self.learn),
            (self.max_per_s > 0, "drift.max_per_s must be > 0", self.max_per_s),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")
        if self.parts_per_alarm < 100:
            raise ConfigError("drift: false_alarms_per_year is more than one in a hundred of parts_per_year")

    @property
    def parts_per_alarm(self) -> float:
        """Mean number of parts between false alarms: the average run length."""
        return self.parts_per_year / self.false_alarms_per_year


class GoldenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is tested, and when."""

    folder: str | None = None
    """Photographs of known parts, ``good/`` that must pass and ``bad/`` that must fail; for several products in
    folders of their names. Left out: only a golden part before the camera can be tested."""
    times: tuple[str, ...] = ()
    """When the photographs are tested by themselves, local time: ``["06:00", "14:00", "22:00"]`` for each shift."""
    blocks_readiness: bool = True
    """A failed test makes the line not ready until one passes or a person acknowledges it."""
    wait_s: float = 60.0
    """How long a test before the camera waits for the golden part."""

    def __post_init__(self) -> None:
        for text in self.times:
            try:
                dt.time.fromisoformat(text)
            except ValueError as exc:
                raise ConfigError(f"golden.times: {text[:40]!r} is no time of the day (such as 06:00)") from exc
        if self.times and self.folder is None:
            raise ConfigError(
                "golden.times needs golden.folder: a part before the camera cannot be tested by the clock"
            )
        if not 0 < self.wait_s <= 3600:
            raise ConfigError(f"golden.wait_s must be in (0, 3600], not {self.wait_s}")

    @property
    def day_times(self) -> tuple[dt.time, ...]:
        """In their order."""
        return tuple(sorted(dt.time.fromisoformat(text) for text in self.times))
