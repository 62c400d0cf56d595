"""``edgeflame learn``: a candidate from marks, and what is said of marks that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge.runtimes.load import compare_with_references, open_runtime
from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import ImageU8, write_image
from edgeflame.mark_shapes import Polygon
from edgeflame.marks import MarkStore
from edgeflame.package import Package, read_package, write_package
from tests.support.commands import edgeflame, error_of
from tests.support.small_package import SIZE, bad_image, good_image

# PyTorch exports the network of the small package.
pytestmark = pytest.mark.timeout(600)


def scratched(seed: int, *, faint: int = 12) -> ImageU8:
    """A good image with a faint stripe."""
    image = good_image(seed).astype(np.int16)
    image[20:24, 8:56] += faint
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed in range(40):
        path = tmp_path / "data" / f"{seed:02d}.png"
        path.parent.mkdir(exist_ok=True)
        write_image(path, good_image(1000 + seed))
    return tmp_path / "data"


@pytest.fixture
def store(tmp_path: Path) -> MarkStore:
    return MarkStore(tmp_path / "state" / "marks")


def learn(package_file: Path, data: Path, store: MarkStore, *more: object) -> tuple[int, dict[str, object], Path]:
    out = data.parent / "candidate.edgeflame"
    result = edgeflame(
        "learn", "--model", package_file, "--data", data, "--marks", store.folder.parent, "--out", out, "--json", *more
    )
    assert result.exit_code == 0, result.output
    told: dict[str, object] = json.loads(result.stdout)
    return result.exit_code, told, out


def test_a_candidate_beside_the_present_package(
    tmp_path: Path, package_file: Path, package: Package, data: Path, store: MarkStore
) -> None:
    before = package_file.read_bytes()
    stripe = Polygon(points=((8, 20), (56, 20), (56, 23), (8, 23)))
    for seed in range(12):
        store.add(f"bad-{seed}", scratched(seed), "bad", kind="scratch" if seed % 2 else "hole", where=[stripe])
        store.add(f"good-{seed}", good_image(500 + seed), "good", product=package.manifest.product)
    _, told, out = learn(package_file, data, store)
    candidate = read_package(out)
    assert package_file.read_bytes() == before
    assert (told["num_good_marks"], told["num_bad_marks"], told["left_out"]) == (12, 12, {})
    assert candidate.manifest.num_images == 52  # good marks are good parts
    assert candidate.manifest.product == package.manifest.product
    assert candidate.manifest.threshold.labelled is not None
    assert candidate.manifest.provenance["learnt_from_marks"]["previous_package"] == package.sha256
    assert "more of 52 good" in str(told["comparison"]) or "fewer of 52 good" in str(told["comparison"])
    # What runs on the line is what was learnt.
    runtime = open_runtime(candidate.model_onnx, device="cpu")
    assert compare_with_references(runtime, candidate).worst < 0.005
    images = np.stack([scratched(900), good_image(901)])
    bad, good = runtime.score(images).scores
    assert bad > candidate.manifest.threshold.value > good
    # Learnt again from the candidate, and with less.
    (store.folder / "bad" / "bad-0.png").unlink()
    result = edgeflame(
        "learn", "--model", out, "--data", data, "--marks", store.folder, "--out", tmp_path / "next.edgeflame"
    )
    assert result.exit_code == 0, result.output
    assert "next.edgeflame: would have caught" in result.output


def test_marks_that_cannot_be_used_are_left_out_and_told(
    tmp_path: Path, package: Package, data: Path, store: MarkStore
) -> None:
    package_file = tmp_path / "sized.edgeflame"
    write_package(
        package_file,
        manifest=msgspec.structs.replace(package.manifest, frames=FrameSizes.of([(SIZE, SIZE)])),
        model_onnx=package.model_onnx,
        statistics=package.statistics,
    )
    for seed in range(5):
        store.add(f"bad-{seed}", bad_image(seed), "bad")
    store.add("other", bad_image(20), "bad", product="another product")
    store.add("wide", np.zeros((SIZE, 2 * SIZE, 3), np.uint8), "bad")
    store.add("both-1", bad_image(30), "bad")
    store.add("both-2", bad_image(30), "good")
    store.add("twice", bad_image(1), "bad")
    store.add("in-data", good_image(1003), "bad")
    store.add("damaged", bad_image(40), "bad")
    (store.folder / "bad" / "damaged.png").write_bytes(b"no picture")
    _, told, out = learn(package_file, data, store)
    left_out = told["left_out"]
    assert left_out == {
        "of another product than test piece": 1,
        "one picture marked both good and bad": 2,
        "one picture marked twice": 1,
        "pictures of another shape: another camera or region": 1,
        "pictures that cannot be read": 1,
        "good images that a mark calls bad": 1,
    }
    assert told["num_bad_marks"] == 6
    assert read_package(out).manifest.num_images == 39


def test_what_cannot_be_learnt_writes_nothing(tmp_path: Path, package_file: Path, data: Path, store: MarkStore) -> None:
    out = tmp_path / "candidate.edgeflame"
    arguments = ["learn", "--model", package_file, "--data", data, "--marks", tmp_path / "state", "--out", out]
    assert "no marks here" in str(error_of(edgeflame(*arguments)))
    store.add("a", bad_image(1), "bad", product="another product")
    assert "no mark can be used; 1 left out: of another product" in str(error_of(edgeflame(*arguments)))
    assert "not replaced" in str(error_of(edgeflame(*arguments[:-1], package_file)))
    assert not out.exists()
    store.add("b", bad_image(2), "bad")
    (out.parent / "folder").mkdir()
    assert edgeflame(*arguments[:-1], tmp_path / "folder").exit_code != 0
