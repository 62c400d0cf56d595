"""Generated furniture boards: what the demo, the tests, benchmarks and simulations inspect.

A :class:`Board` is one physical part, a piece of one of five laminates, good or with one of five defects. A
:class:`Camera` photographs it, as often as one likes, and gives the exact mask of the defect with each
picture. :func:`write_dataset` makes data sets of them, :class:`BoardStream` a conveyor.
"""

from boards.board import DEFECTS, MASK_EPSILON, Board, make_board
from boards.camera import Camera
from boards.dataset import BoardStream, DatasetSpec, StreamPart, write_dataset
from boards.surface import derive_seed, generator
from boards.textures import TEXTURES

__all__ = [
    "DEFECTS",
    "MASK_EPSILON",
    "TEXTURES",
    "Board",
    "BoardStream",
    "Camera",
    "DatasetSpec",
    "StreamPart",
    "derive_seed",
    "generator",
    "make_board",
    "write_dataset",
]
