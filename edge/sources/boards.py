"""A generated stream of furniture boards, good and defective, for demos and tests: the truth is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from boards.camera import Camera
from boards.dataset import BoardStream
from boards.textures import TEXTURES
from edge.frame import Frame, make_frame
from edgeflame.errors import UsageError

SYNTAX = "boards:TEXTURE?seed=0&defect_rate=0.3&parts=100&site=1&size=256&every=1"

MAX_EVERY_S = 3600


@dataclass(frozen=True, kw_only=True)
class BoardSource:
    """Boards on a belt under one site's camera. They wait for us, so none is dropped."""

    name: str
    stream: BoardStream
    every_s: float = 0.0
    """Seconds from one board to the next; 0: as fast as they are judged."""
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
    texture, _, query = address.removeprefix("boards:").partition("?")
    if texture not in TEXTURES:
        raise UsageError(f"--source {address}: no texture {texture!r}; there are {', '.join(TEXTURES)}")
    try:
        options = dict(parse_qsl(query, strict_parsing=True, keep_blank_values=True)) if query else {}
        seed = int(options.pop("seed", "0"))
        site = options.pop("site", None)
        parts = options.pop("parts", None)
        stream = BoardStream(
            texture=texture,
            seed=seed,
            # The generator tells the number 1 from the name "1"; data sets of several sites use numbers.
            camera=Camera() if site is None else Camera.for_site(int(site) if site.isdecimal() else site, seed),
            defect_rate=float(options.pop("defect_rate", "0.1")),
            num_parts=None if parts is None else int(parts),
            image_size=int(options.pop("size", "256")),
        )
        if stream.image_size < 64 or stream.image_size > 2048:
            raise ValueError(f"size lies between 64 and 2048, got {stream.image_size}")
        every_s = float(options.pop("every", "0"))
        if not 0 <= every_s <= MAX_EVERY_S:
            raise ValueError(f"every lies between 0 and {MAX_EVERY_S} seconds, got {every_s:g}")
    except ValueError as exc:
        raise UsageError(f"--source {address}: {exc}; it is written {SYNTAX}") from exc
    if options:
        raise UsageError(f"--source {address}: unknown option {', '.join(options)}; it is written {SYNTAX}")
    return BoardSource(name=address, stream=stream, every_s=every_s)
