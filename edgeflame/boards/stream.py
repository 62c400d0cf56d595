"""An endless conveyor of generated boards, for the inspection daemon to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edgeflame.boards.board import make_board
from edgeflame.boards.camera import Camera
from edgeflame.boards.defects import DEFECTS
from edgeflame.boards.seeds import derive_seed, generator
from edgeflame.boards.textures import TEXTURES
from edgeflame.dataset import GOOD
from edgeflame.images import ImageU8


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPart:
    """One part as the camera saw it.

    Attributes:
        part_id: ``part-000000`` and so on.
        image_bgr: ``[S, S, 3]`` uint8.
        mask: ``[S, S]`` uint8, 255 on the defect; all 0 for a good part.
        label: ``good`` or the defect.
        severity: 0 for a good part.
    """

    part_id: str
    image_bgr: ImageU8
    mask: ImageU8
    label: str
    severity: float


@dataclass(frozen=True, kw_only=True)
class BoardStream:
    """Boards passing a camera, each photographed once; iterating again starts over with the same parts.

    A part depends on the seed and its place in the stream alone. Its seed is derived from the words "stream"
    and its number, that of a data set's part from "dataset", so the two share no board even when both are
    given the same ``seed``.

    Attributes:
        texture: one of ``TEXTURES``.
        seed: which parts.
        camera: of the site.
        defect_rate: probability that a part is defective, in ``[0, 1]``; defects and severities are then
            drawn uniformly.
        num_parts: after how many parts the stream ends; None for never.
        image_size: side of the pictures in pixels.

    Raises:
        ValueError: a value out of its range.
    """

    texture: str
    seed: int = 0
    camera: Camera = field(default_factory=Camera)
    defect_rate: float = 0.1
    num_parts: int | None = None
    image_size: int = 256

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            msg = f"no texture {self.texture!r}; there are {', '.join(TEXTURES)}"
            raise ValueError(msg)
        if not 0.0 <= self.defect_rate <= 1.0:
            msg = f"defect_rate lies between 0 and 1, got {self.defect_rate}"
            raise ValueError(msg)
        if self.num_parts is not None and self.num_parts < 0:
            msg = f"num_parts is at least 0, got {self.num_parts}"
            raise ValueError(msg)

    def __iter__(self) -> Iterator[StreamPart]:
        index = 0
        while self.num_parts is None or index < self.num_parts:
            yield self.part(index)
            index += 1

    def part(self, index: int) -> StreamPart:
        """The part at a place in the stream, from 0, without making those before it."""
        seed = self._part_seed(index)
        rng = generator(seed, "fate")
        # Always three draws, so that a part's defect does not depend on the rate.
        chance, kind, severity = rng.random(), int(rng.integers(len(DEFECTS))), round(float(rng.random()), 4)
        defect = DEFECTS[kind] if chance < self.defect_rate else None
        board = make_board(
            texture=self.texture, seed=seed, image_size=self.image_size, defect=defect, severity=severity
        )
        image, mask = self.camera.photograph(board, generator(seed, "photograph", 0))
        return StreamPart(
            part_id=f"part-{index:06d}",
            image_bgr=image,
            mask=mask,
            label=defect or GOOD,
            severity=severity if defect else 0.0,
        )

    def _part_seed(self, index: int) -> int:
        return derive_seed(self.seed, "stream", index)
