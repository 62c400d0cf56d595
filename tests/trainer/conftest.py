"""A small data set and a small configuration: timm's smallest network, random weights, 64 x 64 images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeflame.dataset import open_dataset
from edgeflame.images import Preprocessing, write_image
from edgeflame.methods import Backbone, Calibration, Learning, Scoring, Training
from fitting.imageset import ImageSet
from tests.support.part_images import SIZE, part_image


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVTec layout: 24 good photographs of 12 parts to train on; 6 good and 6 with a hole to test on."""
    root = tmp_path_factory.mktemp("parts")
    rows = ["path,part"]
    for index in range(24):
        name = f"train/good/{index:02}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(root / name, part_image(index))
        rows.append(f"{name},{index // 2}")
    for index in range(6):
        for label in ("good", "hole"):
            name = f"test/{label}/{index}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            image = part_image(100 + index)
            if label == "hole":
                spoiled = part_image(100 + index, hole=True)
                mask = (np.abs(spoiled.astype(int) - image).max(axis=2) > 0).astype(np.uint8) * 255
                mask_path = root / f"ground_truth/hole/{index}_mask.png"
                mask_path.parent.mkdir(parents=True, exist_ok=True)
                write_image(mask_path, mask)
                image = spoiled
            write_image(root / name, image)
            rows.append(f"{name},t{index}")
    (root / "groups.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def small_learning() -> Learning:
    return Learning(
        backbone=Backbone(name="test_efficientnet", stages=(1, 2), weights="random"),
        input=Preprocessing(height=SIZE, width=SIZE),
        training=Training(epochs=2, learning_rate=1e-3, discriminator_learning_rate=1e-3, batch_size=8, noise_std=0.3),
        scoring=Scoring(rank=6, max_rank=8, ridge=0.01, smoothing_sigma=1.0),
        calibration=Calibration(folds=3),
    )


@pytest.fixture(scope="session")
def images(parts_folder: Path, small_learning: Learning) -> ImageSet:
    return ImageSet(open_dataset(parts_folder).train, small_learning.input)
