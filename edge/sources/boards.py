"""A source of generated furniture boards, good and defective and with known labels, for demos and tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from boards.camera import Camera
from boards.dataset import BoardStream
from boards.textures import TEXTURES
from edge.frame import Frame, make_frame
from edge.sources.address import AddressQuery
from edgeflame.errors import UsageError

SYNTAX = "boards:TEXTURE?seed=0&defect_rate=0.3&parts=100&site=1&size=256&every=1"

MAX_EVERY_S = 3600

MAX_NUMBER = 2**53
"""Largest number in an address that is exact as a float."""


@dataclass(frozen=True, kw_only=True)
class BoardSource:
    """Boards on a belt under one site's camera. They wait for us, so none is dropped."""

    name: str
    stream: BoardStream
    every_s: float = 0.0
    """Seconds from one board to the next; 0: as fast as they are inspected."""
    is_live: bool = False

    @property
    def is_endless(self) -> bool:
        return self.stream.num_parts is None

    @property
    def num_frames(self) -> int | None:
        return self.stream.num_parts

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for index, part in enumerate(self.stream):
            if stop.wait(self.every_s if index else 0.0):
                return
            yield make_frame(
                part_id=part.part_id, source=self.name, image_bgr=part.image_bgr, label=part.label, mask=part.mask
            )


def board_source(address: str) -> BoardSource:
    """Read an address such as ``boards:warm_wood?seed=3&parts=50``.

    Raises:
        UsageError: it is not of that form, or a value is out of its range.
    """
    texture, _, text = address.removeprefix("boards:").partition("?")
    if texture not in TEXTURES:
        raise UsageError(f"--source {address}: no texture {texture!r}; there are {', '.join(TEXTURES)}")
    known = ("seed", "site", "parts", "defect_rate", "size", "every")
    query = AddressQuery(address, text, known=known, syntax=SYNTAX)
    seed = query.whole_number("seed", 0, least=-MAX_NUMBER, most=MAX_NUMBER)
    site = query.options.get("site")
    stream = BoardStream(
        texture=texture,
        seed=seed,
        # The generator tells the number 1 from the name "1"; data sets of several sites use numbers.
        camera=Camera() if site is None else Camera.for_site(int(site) if site.isdecimal() else site, seed),
        defect_rate=query.number("defect_rate", 0.1, least=0, most=1),
        num_parts=query.whole_number("parts", 0, least=0, most=MAX_NUMBER) if "parts" in query.options else None,
        image_size=query.whole_number("size", 256, least=64, most=2048),
    )
    every_s = query.number("every", 0.0, least=0, most=MAX_EVERY_S)
    return BoardSource(name=address, stream=stream, every_s=every_s)
