"""The parts of a simulation: photographs of a folder, or generated boards. Nothing is read or drawn before it is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.simulation.config import BoardsData, FolderData, SimulationConfig
from boards.camera import Camera
from boards.dataset import DatasetSpec, PlannedPart, plan_parts
from boards.surface import generator
from edgeflame.dataset import ImageRecord, open_dataset
from edgeflame.errors import DataError
from edgeflame.images import ImageU8, read_image, read_mask


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One picture of a part: a file that exists, or pixels.

    Attributes:
        stem, suffix: its file name, unique within split and label of its source.
        image: a file, or ``[H, W, 3]`` uint8 BGR.
        mask: of the defect; a file, or ``[H, W]`` uint8, 255 on the defect.
    """

    stem: str
    suffix: str
    image: Path | ImageU8
    mask: Path | ImageU8 | None = None


@dataclass(frozen=True, kw_only=True)
class SimulatedPart:
    """A physical part: never split between sites.

    Attributes:
        group: its name, unique in the source.
        category: its texture; of a folder, the folder's name.
        split, label: ``train`` or ``test``; ``good`` or the defect.
        photographs: its pictures as a camera takes them; None is the common camera.
    """

    group: str
    category: str
    split: str
    label: str
    photographs: Callable[[Camera | None], Iterator[Photograph]]


@dataclass(frozen=True, kw_only=True)
class PartPool:
    """Parts by name. ``groups_known``: whether parts are known, or every photograph is taken for one."""

    train: Mapping[str, SimulatedPart]
    test: Mapping[str, SimulatedPart]
    groups_known: bool


def load_parts(config: SimulationConfig) -> PartPool:
    """The parts that the configuration names; nothing is drawn or read yet.

    Raises:
        DataError: the folder is no data set, or has no test part.
    """
    match config.data:
        case FolderData():
            return _load_folder_parts(config.data, config.seed)
        case BoardsData():
            return _generate_board_parts(config.data)


def _load_folder_parts(data: FolderData, seed: int) -> PartPool:
    dataset = open_dataset(Path(data.path), None if data.groups is None else Path(data.groups))
    if not dataset.test or not any(record.is_good for record in dataset.test):
        raise DataError(
            f"{dataset.root}: a simulation measures its models; expected test/good and test/<defect> below it"
        )
    by_key: dict[tuple[str, str, str], list[ImageRecord]] = {}
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        for record in records:
            by_key.setdefault((split, record.label, record.group), []).append(record)
    numbers = {record.path: index for index, record in enumerate((*dataset.train, *dataset.test))}
    train: dict[str, SimulatedPart] = {}
    test: dict[str, SimulatedPart] = {}
    for (split, label, group), photographs in by_key.items():
        part = SimulatedPart(
            group=group,
            category=dataset.root.name,
            split=split,
            label=label,
            photographs=_folder_photographer(photographs, numbers, seed),
        )
        # A part may have good photographs and defective ones.
        (train if split == "train" else test)[group if split == "train" else f"{label}:{group}"] = part
    chosen = draw_subset(sorted(train), data.max_train_groups, generator(seed, "train parts"))
    kept: list[str] = []
    for label in sorted({part.label for part in test.values()}):
        own = sorted(name for name, part in test.items() if part.label == label)
        kept += draw_subset(own, data.max_test_groups, generator(seed, "test parts", label))
    return PartPool(
        train={name: train[name] for name in chosen},
        test={name: test[name] for name in kept},
        groups_known=dataset.groups_known,
    )


def draw_subset(names: Sequence[str], at_most: int | None, rng: np.random.Generator) -> list[str]:
    """So many of the names, drawn, sorted; all if there are no more, or ``at_most`` is None."""
    if at_most is None or at_most >= len(names):
        return list(names)
    return sorted(names[index] for index in rng.permutation(len(names))[:at_most])


def _folder_photographer(
    records: Sequence[ImageRecord], numbers: Mapping[Path, int], seed: int
) -> Callable[[Camera | None], Iterator[Photograph]]:
    def photographs(camera: Camera | None) -> Iterator[Photograph]:
        for record in records:
            # Numbered, because folders below train/good may hold files of one name.
            stem = f"{numbers[record.path]:05d}-{record.path.stem}"
            if camera is None:
                yield Photograph(stem=stem, suffix=record.path.suffix, image=record.path, mask=record.mask)
                continue
            image = camera.rephotograph(read_image(record.path), generator(seed, "rephotograph", record.name))
            mask = None if record.mask is None else read_mask(record.mask)
            yield Photograph(stem=stem, suffix=".png", image=image, mask=mask)

    return photographs


def _generate_board_parts(data: BoardsData) -> PartPool:
    train: dict[str, SimulatedPart] = {}
    test: dict[str, SimulatedPart] = {}
    for texture in data.textures:
        spec = DatasetSpec(
            texture=texture,
            num_train_parts=data.train_parts,
            num_test_good_parts=data.test_good_parts,
            num_test_defective_parts=data.test_defective_parts,
            num_photos=data.photos,
            image_size=data.image_size,
            seed=data.seed,
            camera=Camera(),
        )
        for planned in plan_parts(spec):
            part = SimulatedPart(
                group=f"{texture}-{planned.group}",
                category=texture,
                split=planned.split,
                label=planned.label,
                photographs=_board_photographer(planned, spec),
            )
            (train if planned.split == "train" else test)[part.group] = part
    return PartPool(train=train, test=test, groups_known=True)


def _board_photographer(planned: PlannedPart, spec: DatasetSpec) -> Callable[[Camera | None], Iterator[Photograph]]:
    def photographs(camera: Camera | None) -> Iterator[Photograph]:
        for stem, image, mask in planned.photographs(spec, camera or spec.camera):
            yield Photograph(stem=f"{spec.texture}-{stem}", suffix=".png", image=image, mask=mask)

    return photographs
