"""Charts of the pages: lines, dots and bars on two axes, as SVG whose colours are classes of ``style.css``.

A chart is drawn in a frame whose size is in its own units, and scales with the page. Letters scale with it: a chart's
frame is as wide as the place it is made for. Curves and histograms of scores are made here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from edgeflame.layout import GOOD

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Scores = npt.NDArray[np.floating]


NARROW, HALF, WIDE = 360, 500, 860
"""Widths of charts of which three, two and one fit beside each other on a page."""

_LETTER = 7.2
"""Width of a letter, about: the room for labels is made by it."""

NUM_COLOURS = 8
"""Classes ``c0`` to ``c7``."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a chart.

    Attributes:
        low: value at its beginning.
        high: value at its end.
        ticks: values that are written on it, with their text.
        label: what it shows.
        log: whether equal distances are equal ratios.
        grid: whether a line goes through each tick.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    log: bool = False
    grid: bool = True

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the axis's beginning, 1 at its end."""
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)


def round_axis(values: Iterable[float]) -> Axis:
    """An axis with about four round ticks, which enclose the values."""
    listed = list(values)
    low, high = min(listed), max(listed)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(low=ticks[0], high=ticks[-1], ticks=[(tick, f"{tick:.6g}") for tick in ticks])


class Chart:
    """A chart that is drawn from back to front.

    ``style`` is everywhere one or more classes of the style sheet; ``title`` is what is shown under the pointer.
    """

    def __init__(self, name: str, x: Axis, y: Axis, *, width: int = HALF, height: int = 240) -> None:
        """Draw an empty one with its axes.

        Args:
            name: for those who do not see it.
            x: to the right.
            y: upwards.
            width: of the frame, with all labels.
            height: of the frame, with all labels.
        """
        self._name, self._width, self._height = name, width, height
        self._x, self._y = x, y
        self._left = 16 + _LETTER * max((len(text) for _, text in y.ticks), default=0)
        self._right, self._top = width - 14, 30 if y.label else 12
        self._bottom = height - (46 if x.label else 28 if x.ticks else 8)
        self._parts: list[str] = []
        self._axes()

    def rule(self, style: str, *, x: float | None = None, y: float | None = None) -> None:
        """Draw a line through the whole chart at a value of ``x`` or of ``y``."""
        if x is not None:
            self._line(style, self._across(x), self._top, self._across(x), self._bottom)
        if y is not None:
            self._line(style, self._left, self._up(y), self._right, self._up(y))

    def curve(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """Draw a line through points."""
        placed = dict.fromkeys(f"{self._across(x)},{self._up(y)}" for x, y in points)
        self._parts.append(f'<polyline class="curve {style}" points="{" ".join(placed)}"/>')

    def dots(self, points: Iterable[tuple[float, float, str]], style: str, *, radius: float = 4.5) -> None:
        """Draw points ``(x, y, title)``."""
        for x, y, title in points:
            self._parts.append(
                f'<circle class="{style}" cx="{self._across(x)}" cy="{self._up(y)}" r="{radius}">'
                f"<title>{escape(title)}</title></circle>"
            )

    def bar(self, x: tuple[float, float], y: tuple[float, float], style: str, title: str = "") -> None:
        """Draw a rectangle from one value to another on each axis."""
        left, right, top, bottom = self._across(x[0]), self._across(x[1]), self._up(y[1]), self._up(y[0])
        self._parts.append(
            f'<rect class="{style}" x="{left}" y="{top}" width="{max(0.0, right - left):.1f}" '
            f'height="{max(0.0, bottom - top):.1f}"><title>{escape(title)}</title></rect>'
        )

    def svg(self) -> str:
        """The ``<svg>`` element."""
        return (
            f'<svg class="chart{" wide" if self._width >= WIDE else ""}" viewBox="0 0 {self._width} {self._height}" '
            f'role="img" aria-label="{escape(self._name)}">{"".join(self._parts)}</svg>'
        )

    def _axes(self) -> None:
        for value, text in self._y.ticks:
            if self._y.grid:
                self.rule("grid", y=value)
            self._text(self._left - 8, self._up(value) + 5, text, "end")
        for value, text in self._x.ticks:
            if self._x.grid:
                self.rule("grid", x=value)
            self._text(self._across(value), self._bottom + 18, text, "middle")
        if self._y.label:
            self._text(0, 14, f"↑ {self._y.label}", "start")
        if self._x.label:
            self._text(self._right, self._height - 5, f"{self._x.label} →", "end")

    def _across(self, x: float) -> float:
        return round(self._left + self._x.share(x) * (self._right - self._left), 1)

    def _up(self, y: float) -> float:
        return round(self._bottom - self._y.share(y) * (self._bottom - self._top), 1)

    def _line(self, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self._parts.append(f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')


def class_styles(names: Sequence[str]) -> dict[str, str]:
    """A style for each name; from the ninth on the colours come again, dashed, then dotted."""
    dashes = ("", " dashed", " dotted")
    return {name: f"c{i % NUM_COLOURS}{dashes[i // NUM_COLOURS % 3]}" for i, name in enumerate(names)}


def roc_chart(good: Scores, by_class: Mapping[str, Scores], threshold: float) -> str:
    """Shares of defective images caught against good ones rejected; the dot is the threshold."""
    import numpy as np

    from fitting.metrics import caught_and_rejected

    chart = _unit_square("ROC", "good photographs rejected", "defective photographs caught")
    chart.curve([(0, 0), (1, 1)], "back")
    for style, defective in _curves(by_class):
        caught, rejected = (np.concatenate([[0], counts]) for counts in caught_and_rejected(good, defective))
        # Those between the ends of a straight piece are not drawn.
        bends = (np.diff(rejected, 2) != 0) | (np.diff(caught, 2) != 0)
        corner = np.concatenate([[True], bends, [True]])
        chart.curve(zip(rejected[corner] / len(good), caught[corner] / len(defective), strict=True), style)
    everything = np.concatenate(list(by_class.values()))
    at = float((good > threshold).mean()), float((everything > threshold).mean())
    chart.dots([(*at, f"at the threshold: {at[0]:.1%} rejected, {at[1]:.1%} caught")], "accent", radius=5.5)
    return chart.svg()


def precision_recall_chart(good: Scores, by_class: Mapping[str, Scores], threshold: float) -> str:
    """How many of the rejected are defective against how many of the defective are caught."""
    import numpy as np

    from fitting.metrics import caught_and_rejected

    chart = _unit_square(
        "precision and recall", "defective photographs caught", "share of the rejected that is defective"
    )
    for style, defective in _curves(by_class):
        caught_there, rejected_there = caught_and_rejected(good, defective)
        # From the lowest threshold up to one that nothing reaches.
        precision = np.append((caught_there / (caught_there + rejected_there))[::-1], 1.0)
        recall = np.append(caught_there[::-1] / len(defective), 0.0)
        # Between two thresholds the precision is that of the one before.
        corners = np.stack([np.repeat(recall, 2)[1:], np.repeat(precision, 2)[:-1]], axis=1)
        chart.curve(((x, y) for x, y in corners), style)
    everything = np.concatenate(list(by_class.values()))
    caught, rejected = int((everything > threshold).sum()), int((good > threshold).sum())
    if caught + rejected:
        at = caught / len(everything), caught / (caught + rejected)
        chart.dots([(*at, f"at the threshold: {at[0]:.1%} caught, precision {at[1]:.1%}")], "accent", radius=5.5)
    return chart.svg()


def histogram_chart(by_label: Mapping[str, Scores], threshold: float) -> str:
    """Scores of the good images and of each class, one row each, as multiples of the threshold."""
    import numpy as np

    ratios = {name: scores / threshold for name, scores in by_label.items()}
    everything = np.concatenate(list(ratios.values()))
    low, high = max(1e-3, min(0.5, float(everything.min()))), max(1.5, float(everything.max()))
    edges = np.geomspace(low * 0.98, high * 1.02, 48)
    marks = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
    names = {name: f"{name.replace('_', ' ')} ({len(values)})" for name, values in ratios.items()}
    bottoms = {name: float(len(ratios) - 1 - row) for row, name in enumerate(ratios)}
    chart = Chart(
        "scores",
        Axis(
            low=edges[0],
            high=edges[-1],
            ticks=[(mark, f"{mark:g}") for mark in marks if edges[0] <= mark <= edges[-1]],
            label="score over threshold (dashed: the threshold)",
            log=True,
            grid=False,
        ),
        Axis(low=0, high=len(ratios), ticks=[(bottoms[name] + 0.4, names[name]) for name in ratios], grid=False),
        width=NARROW,
        height=50 * len(ratios) + 62,
    )
    for name, values in ratios.items():
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
        bottom = bottoms[name]
        chart.rule("grid", y=bottom)
        for index in np.flatnonzero(counts):
            top = bottom + 0.88 * float(counts[index] / counts.max())
            span = f"{edges[index]:.2g} to {edges[index + 1]:.2g} × threshold"
            chart.bar(
                (edges[index], edges[index + 1]), (bottom, top), "good" if name == GOOD else "bad",
                f"{counts[index]} of {len(values)}: {span}",
            )  # fmt: skip
    chart.rule("limit", x=1.0)
    return chart.svg()


def _unit_square(name: str, x: str, y: str) -> Chart:
    ticks = [(tick, f"{tick:g}") for tick in (0, 0.25, 0.5, 0.75, 1)]
    axes = [Axis(low=-0.01, high=1.02, ticks=ticks, label=label) for label in (x, y)]
    return Chart(name, *axes, width=NARROW, height=310)


def _curves(by_class: Mapping[str, Scores]) -> Iterator[tuple[str, Scores]]:
    """Style and scores of each class, thin, and of all of them, thick, on top."""
    import numpy as np

    kinds = class_styles(list(by_class)) if len(by_class) > 1 else {}
    yield from ((f"thin {style}", by_class[name]) for name, style in kinds.items())
    yield "all", np.concatenate(list(by_class.values()))
