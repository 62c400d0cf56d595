"""Reading the configuration again: what changes between two frames, and what stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.cameras import Cameras, Overrides, Plan, ReloadReport, plan_cameras
from edge.config import InspectConfig
from edge.inspector import InspectorLoader
from edgeflame.config import parse_config
from edgeflame.errors import EdgeFlameError, RuntimeUnavailableError
from edgeflame.package import read_package
from tests.support.small_package import write_images, write_small_package


class Factory:
    """Two cameras of one product, and the file that says so."""

    def __init__(self, folder: Path, package_file: Path) -> None:
        self.folder = folder
        self.file = folder / "tile.edgeflame"
        shutil.copy(package_file, self.file)
        photos = write_images(folder / "photos")
        self.cameras_text = "".join(f'[cameras.{name}]\nsource = "{photos}"\nproduct = "tile"\n' for name in "ab")
        self.overrides = Overrides(folder / "state")
        self.cameras = Cameras(self.plan(), InspectorLoader(device="cpu", num_threads=1), self.overrides)

    def plan(self, *, products: str = "", more: str = "") -> Plan:
        text = f'[products]\ntile = "{self.file}"\n{products}{self.cameras_text}{more}'
        config = parse_config(text.encode(), InspectConfig, "line.toml")
        return plan_cameras(config, model=None, source=None, product_of=str)

    def reload(self, *, products: str = "", more: str = "") -> ReloadReport:
        return self.cameras.reload(self.plan(products=products, more=more))

    @property
    def models(self) -> list[str]:
        return [line.inspector.model_id for line in self.cameras.workers]


@pytest.fixture(scope="module")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the product."""
    return write_small_package(tmp_path_factory.mktemp("other") / "other.edgeflame", ridge=0.02)


@pytest.fixture
def factory(tmp_path: Path, package_file: Path) -> Factory:
    return Factory(tmp_path, package_file)


def model_of(file: Path) -> str:
    return read_package(file).sha256[:12]


def test_nothing_new_changes_nothing(factory: Factory) -> None:
    judges = [line.inspector for line in factory.cameras.workers]
    assert factory.reload() == ReloadReport(changed=(), needs_restart=())
    assert [line.inspector for line in factory.cameras.workers] == judges


def test_a_package_that_was_replaced_is_used_by_every_camera(factory: Factory, other_file: Path) -> None:
    shutil.copy(other_file, factory.file)
    assert factory.reload().changed == ("products.tile",)
    assert factory.models == [model_of(other_file)] * 2
    assert factory.reload().changed == ()


def test_a_package_that_is_none_changes_nothing_at_all(factory: Factory) -> None:
    before = factory.models
    factory.file.write_bytes(b"half a pack")
    with pytest.raises(EdgeFlameError):
        factory.reload(more="[verdict]\nthreshold = 7.0\n")
    assert factory.models == before
    assert all(line.inspector.threshold != 7.0 for line in factory.cameras.workers)


def test_what_came_from_the_fleet_stays_and_takes_the_new_rules(factory: Factory, other_file: Path) -> None:
    factory.cameras.use_package("tile", other_file, {})
    assert factory.models == [model_of(other_file)] * 2
    done = factory.reload(more="[verdict]\nthreshold = 7.0\n")
    assert done.changed == ("cameras.a.verdict", "cameras.b.verdict")
    assert factory.models == [model_of(other_file)] * 2
    assert [line.inspector.threshold for line in factory.cameras.workers] == [7.0, 7.0]
    assert factory.cameras.products["tile"] == other_file


def test_a_threshold_set_by_command_outlives_a_reload(factory: Factory) -> None:
    (model, _) = factory.models
    factory.overrides.set_threshold("a", model, 3.0)
    factory.reload(more="[verdict]\nthreshold = 7.0\n")
    assert [line.inspector.threshold for line in factory.cameras.workers] == [3.0, 7.0]


def test_products_come_and_go_but_not_one_that_is_in_use(factory: Factory, other_file: Path) -> None:
    done = factory.reload(products=f'board = "{other_file}"\n')
    assert done.changed == ("products.board",)
    assert set(factory.cameras.products) == {"tile", "board"}
    assert factory.cameras.open_inspector("a", "board").model_id == model_of(other_file)
    assert factory.reload().changed == ("products.board",)
    assert set(factory.cameras.products) == {"tile"}


def test_cameras_that_come_and_go_and_what_else_needs_a_restart(factory: Factory) -> None:
    factory.cameras_text = factory.cameras_text.replace("[cameras.b]", "[cameras.c]")
    done = factory.reload(more='[web]\nlisten = "127.0.0.1:0"\n[capture]\ndepth = 9\n')
    assert done.changed == ()
    assert done.needs_restart == ("cameras.a.capture", "cameras.b", "cameras.c", "web")
    # It says so again: it is still not in force.
    assert factory.reload(more="[capture]\ndepth = 9\n").needs_restart == (
        "cameras.a.capture", "cameras.b", "cameras.c",
    )  # fmt: skip


def test_where_one_camera_refuses_no_camera_changes(
    factory: Factory, other_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.camera_requests.PATIENCE_S", 0.05)
    first, second = factory.cameras.workers
    first.set_threshold(9.0)
    old_file = shutil.copy(factory.file, factory.folder / "old.edgeflame")
    before = factory.models
    shutil.copy(other_file, factory.file)
    with second._frame_lock.hold_frame():  # its model hangs
        with pytest.raises(RuntimeUnavailableError, match="camera b: the part in hand has been judged for more than"):
            factory.reload(more="[verdict]\nreview_band = 0.1\n")
        with pytest.raises(RuntimeUnavailableError):
            factory.cameras.use_package("tile", other_file, {})
    assert factory.models == before
    assert (first.inspector.threshold, first.status().threshold_set) == (9.0, True)
    assert first.inspector.review_band == 0.0
    assert factory.cameras.products["tile"] == factory.file
    # The next reload finds the same differences.
    assert factory.reload().changed == ("products.tile",)
    assert factory.models == [model_of(other_file)] * 2
    assert model_of(Path(old_file)) == before[0]
