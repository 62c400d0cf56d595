"""The sizes of the photographs that a model was made of, by which a line knows frames of another shape.

A frame of another shape is squeezed into the model's input all the same, and its part looks as no part ever looked; a
smaller one has lost what the model looks for.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

LEEWAY = 1.25
"""How far beyond the range of photographs of several sizes a frame may lie: cut-outs of parts come as they are."""


class FrameSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Least and largest sizes of photographs, as the camera gave them: width, height, and width over height."""

    widths: tuple[int, int]
    heights: tuple[int, int]
    ratios: tuple[float, float]

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]]) -> FrameSizes | None:
        """The range of some widths and heights; None of none."""
        known = list(sizes)
        if not known:
            return None
        widths, heights = zip(*known, strict=True)
        ratios = [width / height for width, height in known]
        return cls(
            widths=(min(widths), max(widths)), heights=(min(heights), max(heights)), ratios=(min(ratios), max(ratios))
        )

    def has(self, width: int, height: int) -> bool:
        """Whether a frame is of a size that the photographs had: the one they all have, or near the range of theirs."""
        if self.widths[0] == self.widths[1] and self.heights[0] == self.heights[1]:
            return (width, height) == (self.widths[0], self.heights[0])
        within = zip((width, height, width / height), (self.widths, self.heights, self.ratios), strict=True)
        return all(least / LEEWAY <= value <= most * LEEWAY for value, (least, most) in within)

    def __str__(self) -> str:
        (width, most_width), (height, most_height) = self.widths, self.heights
        first, last = f"{width}x{height}", f"{most_width}x{most_height}"
        return first if first == last else f"{first} to {last}"
