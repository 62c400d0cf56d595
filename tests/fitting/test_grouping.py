"""Photographs of one part are found by their looks; those of different parts stay single."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeflame.dataset import open_dataset
from edgeflame.images import ImageU8, Preprocessing
from edgeflame.tensors import F32
from fitting.embeddings import Embeddings
from fitting.grouping import find_parts, largest_groups
from fitting.imageset import ImageSet

SIDE, CELL = 128, 8
GRID = (SIDE // CELL, SIDE // CELL)


class CellEmbedder:
    """The grey values of each cell."""

    grid = GRID
    num_channels = num_tapped_channels = CELL * CELL
    forward_size = 8

    def embed(self, images: ImageU8) -> F32:
        grey = images.mean(axis=3, dtype=np.float32)
        cells = grey.reshape(len(grey), GRID[0], CELL, GRID[1], CELL).transpose(0, 1, 3, 2, 4)
        return np.ascontiguousarray(cells.reshape(len(grey), -1, CELL * CELL))


def photograph(part: int, shot: int, *, lean: float = 0.0) -> ImageU8:
    """A common shape, the part's own grain, and the shot's light and noise; ``lean`` shifts the shape."""
    grain = np.random.default_rng(part).normal(0, 12, (SIDE, SIDE))
    rng = np.random.default_rng((part, shot))
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    shape = 80 * np.exp(-((x - 0.5 - lean) ** 2 + (y - 0.5) ** 2) / 0.05)
    light = rng.uniform(0.7, 1.2)
    image = np.clip(light * (60 + shape + grain) + rng.normal(0, 4, (SIDE, SIDE)), 0, 255).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)


def embeddings_of(folder: Path, photographs: list[ImageU8]) -> Embeddings:
    for index, image in enumerate(photographs):
        cv2.imwrite(str(folder / f"{index:03}.png"), image)
    images = ImageSet(open_dataset(folder).train, Preprocessing(height=SIDE, width=SIDE))
    return Embeddings(CellEmbedder(), images)


@pytest.mark.parametrize("max_cache", [True, False])
def test_photographs_of_one_part_are_found_in_any_light(tmp_path: Path, max_cache: bool) -> None:
    shots = [(part, shot) for part in range(10) for shot in range(1 + part % 4)]
    embeddings = embeddings_of(tmp_path, [photograph(*one) for one in shots])
    if not max_cache:
        embeddings = Embeddings(CellEmbedder(), embeddings.images, max_cache_bytes=0)
    found = find_parts(embeddings)
    first = {part: found[shots.index((part, 0))] for part, _ in shots}
    assert found == [first[part] for part, _ in shots]
    assert len(set(found)) == 10
    largest = largest_groups(found)
    assert [len(one) for one in largest] == [4, 4, 3]
    assert all(shots[index][0] == shots[indices[0]][0] for indices in largest for index in indices)


@pytest.mark.parametrize("lean", [0.0, 0.08])
def test_single_photographs_stay_single(tmp_path: Path, lean: float) -> None:
    leans = np.random.default_rng(1).uniform(-lean, lean, 40)
    embeddings = embeddings_of(tmp_path, [photograph(part, 0, lean=leans[part]) for part in range(40)])
    assert find_parts(embeddings) == embeddings.images.groups


def test_few_photographs_and_those_of_a_single_part_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    few = embeddings_of(tmp_path / "few", [photograph(0, shot) for shot in range(5)])
    assert find_parts(few) == few.images.groups
    (tmp_path / "two").mkdir()
    unequal = embeddings_of(tmp_path / "two", [photograph(int(shot > 8), shot) for shot in range(12)])
    assert len(set(find_parts(unequal))) > 1
