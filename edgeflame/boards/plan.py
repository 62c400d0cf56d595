"""Which parts a data set holds and where each photograph goes: decided before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edgeflame.boards.board import MIN_IMAGE_SIZE
from edgeflame.boards.camera import Camera
from edgeflame.boards.defects import DEFECTS
from edgeflame.boards.seeds import derive_seed
from edgeflame.boards.textures import TEXTURES
from edgeflame.dataset import GOOD

# Five starting points in [0, 1], one for each defect, so that even one part of each kind spans the range.
_STAGGER = (0.4, 0.8, 0.2, 0.6, 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """All that decides a data set's bytes.

    Attributes:
        texture: one of ``TEXTURES``.
        num_train_parts: good parts to train on, at least 1.
        num_test_good_parts: good parts to test on.
        num_test_defective_parts: defective parts to test on, dealt out over the defects in turn.
        num_photos: photographs of each part, at least 1.
        image_size: side of the photographs in pixels.
        seed: which parts.
        camera: what photographs them.

    Raises:
        ValueError: a value out of its range.
    """

    texture: str
    num_train_parts: int
    num_test_good_parts: int
    num_test_defective_parts: int
    num_photos: int
    image_size: int
    seed: int
    camera: Camera

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            msg = f"no texture {self.texture!r}; there are {', '.join(TEXTURES)}"
            raise ValueError(msg)
        least = {
            "num_train_parts": 1,
            "num_test_good_parts": 0,
            "num_test_defective_parts": 0,
            "num_photos": 1,
            "image_size": MIN_IMAGE_SIZE,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                msg = f"{name} is at least {low}, got {value}"
                raise ValueError(msg)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``dataset.json`` holds them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """One part of a data set.

    Attributes:
        group: its name in ``groups.csv``, unique in the data set.
        split: ``train`` or ``test``.
        label: ``good`` or the defect.
        severity: 0 for a good part.
        seed: the board's.
        stems: its photographs' file names without the ending, unique in their folder.
    """

    group: str
    split: str
    label: str
    severity: float
    seed: int
    stems: tuple[str, ...]

    def image_name(self, photo: int) -> str:
        """Path of a photograph below the data set's root."""
        return f"{self.split}/{self.label}/{self.stems[photo]}.png"

    def mask_name(self, photo: int) -> str:
        """Path of its mask below the data set's root; good parts have none."""
        return f"ground_truth/{self.label}/{self.stems[photo]}_mask.png"


def plan_parts(spec: DatasetSpec) -> Iterator[PlannedPart]:
    """All parts of a data set, training parts first."""
    for index in range(spec.num_train_parts):
        yield _part(spec, "train", GOOD, index, 0.0)
    for index in range(spec.num_test_good_parts):
        yield _part(spec, "test", GOOD, index, 0.0)
    for kind, defect in enumerate(DEFECTS):
        count = len(range(kind, spec.num_test_defective_parts, len(DEFECTS)))
        for index in range(count):
            yield _part(spec, "test", defect, index, defect_severity(kind, index, count))


def defect_severity(kind: int, index: int, count: int) -> float:
    """Severity of the ``index``-th of ``count`` parts with the ``kind``-th defect.

    The parts of a defect lie evenly over the range; defects are staggered. Over all defects the range from
    0 to 1 is covered evenly, both ends included.
    """
    steps = count * len(_STAGGER) - 1
    return round((index + _STAGGER[kind]) * len(_STAGGER) / steps, 4)


def _part(spec: DatasetSpec, split: str, label: str, index: int, severity: float) -> PlannedPart:
    return PlannedPart(
        group=f"{split}-{label}-{index:04d}",
        split=split,
        label=label,
        severity=severity,
        seed=derive_seed(spec.seed, "dataset", split, label, index),
        stems=tuple(f"{index:04d}-{photo}" for photo in range(spec.num_photos)),
    )
