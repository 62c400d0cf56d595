"""A small data set and a small configuration: timm's smallest network, random weights, 64 x 64 images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgeflame.dataset import open_dataset
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone, Calibration, Learning, Scoring, Training
from fitting.imageset import ImageSet
from tests.support.commands import edgeflame
from tests.support.part_images import SIZE
from tests.support.shared_files import made_once


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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


SETTINGS = """
[backbone]
name = "test_efficientnet"
stages = [1, 2]
weights = "random"

[input]
height = 64
width = 64

[scoring]
rank = 6
smoothing_sigma = 1.0

[training]
epochs = 1
batch_size = 8
"""


@pytest.fixture(scope="session")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "learning.toml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="session")
def fitted_package(parts_folder: Path, settings_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fit(out: Path) -> None:
        result = edgeflame("fit", "--data", parts_folder, "--out", out, "--config", settings_file, "--product", "plate")
        assert result.exit_code == 0, result.output
        assert "24 images" in result.output
        assert "12 parts" in result.output

    return made_once(tmp_path_factory, "m.edgeflame", fit)
