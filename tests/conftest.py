"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.brokers import BROKERS, BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.shared_files import made_once
from tests.support.signing_keys import Keys

if TYPE_CHECKING:
    from edgeflame.package import Package


def pytest_configure() -> None:
    """The hundreds of programs that tests start do not inherit what slows or deafens them.

    SIGINT may be ignored here, as in background jobs. Without files of bytecode each would compile EdgeFlame anew. And
    several workers have no use for threads that wait for each other by spinning.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Three workers for two cores: much of the time a test waits for the programs it has started."""
    cores = yield
    return cores + cores // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are given the most time come first, then those of many tests: none is left over in the end."""
    limits: dict[Path, float] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), limit.args[0] if limit else 0)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (limits[item.path], counts[item.path]), reverse=True)


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """The Magnetic Tile Defects photographs; tests that need them are skipped where the folder is missing."""
    named = os.environ.get("EDGEFLAME_MAGNETIC_TILE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "magnetic-tile"
    if not (folder / "train" / "good").is_dir():
        pytest.skip("the magnetic-tile photographs are not here (set EDGEFLAME_MAGNETIC_TILE)")
    return folder


@pytest.fixture(scope="session")
def package_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real package with a model small enough for tests; see ``small_package``."""
    from tests.support.small_package import write_small_package

    return made_once(tmp_path_factory, "small.edgeflame", write_small_package)


@pytest.fixture(scope="session")
def package(package_file: Path) -> Package:
    """The same, in memory."""
    from edgeflame.package import read_package

    return read_package(package_file)


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerProcess]:
    """Each kind of broker, fresh."""
    with BrokerProcess(request.param, tmp_path) as process:
        yield process


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[BrokerProcess]:
    """The embedded broker, fresh."""
    with BrokerProcess("embedded", tmp_path) as process:
        yield process


@pytest.fixture(scope="session")
def undisturbed_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final global model of two sites and two rounds when nothing goes wrong."""

    def write(path: Path) -> None:
        folder = tmp_path_factory.mktemp("undisturbed")
        with BrokerProcess("embedded", folder) as broker, Fleet(broker, folder) as fleet:
            aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
            sites = [fleet.site("a"), fleet.site("b")]
            assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
            path.write_bytes(fleet.model())

    return made_once(tmp_path_factory, "undisturbed.safetensors", write).read_bytes()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """A key pair that a line trusts."""
    from edgeflame.signing import write_keys

    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder)
    return Keys(folder)


@pytest.fixture(scope="session")
def signed(package: Package, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package with reference images, signed."""
    from edgeflame.signing import sign_package
    from tests.support.small_package import with_references

    path = with_references(package, tmp_path_factory.mktemp("signed") / "signed.edgeflame")
    sign_package(path, keys.private)
    return path


@pytest.fixture(scope="session")
def parts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVTec layout: 24 good photographs of 12 parts to train on; 6 good and 6 with a hole to test on."""
    import numpy as np

    from edgeflame.images import write_image
    from tests.support.part_images import part_image

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
