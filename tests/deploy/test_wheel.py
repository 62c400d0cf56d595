"""The wheel as an inspection box installs it: with a CPU runtime and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import msgspec
import pytest

from tests.support.commands import edgeflame
from tests.support.paths import REPOSITORY
from tests.support.small_package import write_images
from tests.test_architecture import PACKAGES

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves traces beside its sources."""
    root = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, root / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, root / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(root / "dist"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (root / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, by PyTorch."""
    folder = tmp_path_factory.mktemp("backbone")
    settings = '[backbone]\nname = "test_efficientnet"\nstages = [1, 2]\nweights = "random"\n'
    (folder / "learning.toml").write_text(settings)
    out = folder / "backbone.edgeflame"
    result = edgeflame("export", "--backbone", out, "--config", folder / "learning.toml", "--size", 64)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def box(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment with the wheel and the extra ``cpu`` alone."""
    root = tmp_path_factory.mktemp("box")
    venv.create(root, with_pip=True)
    done = subprocess.run(
        [root / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[cpu]"],
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "bin"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def on_box(box: Path, folder: Path, *command: object) -> str:
    # Away from the repository, whose folders Python would otherwise import from the working directory.
    program, *arguments = map(str, command)
    done = subprocess.run(
        [str(box / program), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_with_all_its_parts_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.suffix in {".py", ".j2", ".html", ".css", ".js", ".svg"}
    }
    assert expected - names == set()
    assert {name.partition("/")[0] for name in names if not name.partition("/")[0].endswith(".dist-info")} == {
        *PACKAGES
    }


def test_it_inspects_on_a_box_without_torch(box: Path, package_file: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "test")
    output = on_box(box, tmp_path, "edgeflame", "inspect", "--model", package_file, "--source", "test", "--json")
    parts = [msgspec.json.decode(line) for line in output.splitlines()]
    assert [part["verdict"] for part in parts] == ["pass"] * 3 + ["fail"] * 2
    boards = on_box(
        box, tmp_path, "edgeflame", "inspect", "--model", package_file, "--json",
        "--source", "boards:warm_wood?parts=4&size=64", "--images", "rejects", "--results", "results.jsonl",
    )  # fmt: skip
    assert len(boards.splitlines()) == 4
    assert "test piece" in on_box(box, tmp_path, "edgeflame", "model", "show", package_file)


def test_it_fits_a_new_product_without_torch(
    box: Path, backbone_file: Path, parts_folder: Path, tmp_path: Path
) -> None:
    fitted = on_box(
        box, tmp_path, "edgeflame", "fit", "--data", parts_folder, "--out", "m.edgeflame", "--rank", 6,
        "--backbone-from", backbone_file, "--defects", parts_folder / "test/hole",
    )  # fmt: skip
    assert "24 images" in fitted
    evaluated = on_box(
        box, tmp_path, "edgeflame", "evaluate", "--model", "m.edgeflame", "--data", parts_folder, "--json"
    )
    assert msgspec.json.decode(evaluated)["image_AUROC"] > 0.8
    on_box(
        box,
        tmp_path,
        "edgeflame",
        "calibrate",
        "--model",
        "m.edgeflame",
        "--data",
        parts_folder,
        "--out",
        "n.edgeflame",
    )
    inspected = on_box(
        box,
        tmp_path,
        "edgeflame",
        "inspect",
        "--model",
        "n.edgeflame",
        "--source",
        parts_folder / "test/good",
        "--json",
    )
    assert len(inspected.splitlines()) == 6
    # The next product is fitted by the package of this one.
    on_box(
        box, tmp_path, "edgeflame", "fit", "--data", parts_folder, "--out", "o.edgeflame", "--rank", 6,
        "--backbone-from", "m.edgeflame",
    )  # fmt: skip


def test_torch_is_not_there(box: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, edge.daemon\n"
        "names = 'torch', 'torchvision', 'timm', 'sklearn', 'scipy', 'onnxscript'\n"
        "print([name for name in names if importlib.util.find_spec(name)])"
    )
    assert on_box(box, tmp_path, "python", "-c", code).strip() == "[]"
