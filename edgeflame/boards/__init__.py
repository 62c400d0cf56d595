"""Generated furniture boards: what the demo, the tests, benchmarks and simulations inspect.

A :class:`Board` is one physical part, a piece of one of five laminates, good or with one of five defects. A
:class:`Camera` photographs it, as often as one likes, and gives the exact mask of the defect with each
picture. :func:`write_dataset` makes data sets of them, :class:`BoardStream` a conveyor.
"""

from edgeflame.boards.board import Board, make_board
from edgeflame.boards.camera import Camera
from edgeflame.boards.dataset import DatasetSummary, write_dataset
from edgeflame.boards.defects import DEFECTS, MASK_EPSILON
from edgeflame.boards.seeds import derive_seed, generator
from edgeflame.boards.stream import BoardStream, StreamPart
from edgeflame.boards.textures import TEXTURES

__all__ = [
    "DEFECTS",
    "MASK_EPSILON",
    "TEXTURES",
    "Board",
    "BoardStream",
    "Camera",
    "DatasetSummary",
    "StreamPart",
    "derive_seed",
    "generator",
    "make_board",
    "write_dataset",
]
