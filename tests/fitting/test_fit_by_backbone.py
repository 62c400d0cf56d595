"""Fitting by a backbone that is given as ONNX: the package is that of PyTorch, and PyTorch is not needed."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge.runtimes.load import compare_with_references, open_runtime
from edgeflame.archive import open_archive, write_archive
from edgeflame.dataset import open_dataset
from edgeflame.errors import ConfigError, MissingDependencyError, PackageError, RuntimeUnavailableError, UsageError
from edgeflame.images import Preprocessing, write_image
from edgeflame.methods import Calibration, Learning
from edgeflame.package import read_package, write_package
from fitting.embeddings import Embeddings
from fitting.imageset import ImageSet
from fitting.site_statistics import fit_statistics
from tests.support.commands import edgeflame, error_of
from tests.support.part_images import part_image
from tests.support.paths import REPOSITORY

SETTINGS = """
[backbone]
name = "{name}"
{taps}
weights = "random"
channels = {channels}

[input]
height = {height}
width = {width}

[scoring]
rank = 6
smoothing_sigma = 1.0

[calibration]
folds = 3
"""
# PyTorch's export takes most of it.
pytestmark = pytest.mark.timeout(600)

TOLERANCE = 0.005
"""The parity gate's, of float32."""


def write_settings(
    path: Path,
    *,
    name: str = "test_efficientnet",
    taps: str = "stages = [1, 2]",
    channels: str = '"auto"',
    size: tuple[int, int] = (64, 64),
) -> Path:
    path.write_text(SETTINGS.format(name=name, taps=taps, channels=channels, height=size[0], width=size[1]))
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("settings") / "learning.toml")


@pytest.fixture(scope="module")
def donor(parts_folder: Path, settings: Path) -> Path:
    """A package by PyTorch."""
    out = settings.with_name("donor.edgeflame")
    result = edgeflame("fit", "--data", parts_folder, "--out", out, "--config", settings, "--product", "other")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def backbone_file(settings: Path) -> Path:
    out = settings.with_name("backbone.edgeflame")
    result = edgeflame("export", "--backbone", out, "--config", settings)
    assert result.exit_code == 0, result.output
    assert "for images of 64x64" in result.output
    return out


def fit_by(backbone: Path, data: Path, out: Path, *more: object) -> Path:
    result = edgeflame(
        "fit", "--data", data, "--out", out, "--backbone-from", backbone, "--product", "plate", "--rank", 6, *more
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    "network",
    [
        {"name": "tf_efficientnet_lite0", "taps": "stages = [2, 3]", "size": (64, 96)},
        {"name": "resnet18", "taps": "stages = [1, 2]", "channels": "40", "size": (96, 64)},
        {"name": "test_efficientnet", "taps": "layers = [1, 2, 3]", "size": (128, 128)},
        {"name": "vit_tiny_patch16_224", "taps": "stages = [2, 4]", "channels": "60", "size": (64, 96)},
    ],
    ids=["lite", "projected", "blocks", "transformer"],
)
def test_the_package_is_that_of_pytorch(network: dict, parts_folder: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "learning.toml", **network)
    by_torch = tmp_path / "torch.edgeflame"
    result = edgeflame("fit", "--data", parts_folder, "--out", by_torch, "--config", config, "--product", "plate")
    assert result.exit_code == 0, result.output
    exported = edgeflame("export", "--backbone", tmp_path / "backbone.edgeflame", "--model", by_torch)
    assert exported.exit_code == 0, exported.output
    expected = read_package(by_torch)
    for number, source in enumerate((tmp_path / "backbone.edgeflame", by_torch)):
        found = read_package(fit_by(source, parts_folder, tmp_path / f"{number}.edgeflame", "--config", config))
        for key in ("learning", "weights", "grid", "num_channels", "rank", "num_images", "frames", "product"):
            assert getattr(found.manifest, key) == getattr(expected.manifest, key), key
        assert found.manifest.threshold.value == pytest.approx(expected.manifest.threshold.value, rel=TOLERANCE)
        ours, theirs = found.manifest.provenance["statistics"], expected.manifest.provenance["statistics"]
        assert ours["pooling_radius"] == theirs["pooling_radius"]
        assert ours["channels_before_projection"] == theirs["channels_before_projection"]
        assert [one["file"] for one in ours["least_normal"]] == [one["file"] for one in theirs["least_normal"]]
        np.testing.assert_allclose(found.statistics.mean, expected.statistics.mean, rtol=1e-3, atol=1e-3)
        # What runs the one runs the other, whoever made the reference scores.
        whole = msgspec.structs.replace(found.manifest, references=expected.manifest.references)
        assert compare_with_references(open_runtime(found.model_onnx, device="cpu"), found).passed
        write_package(
            tmp_path / "crossed.edgeflame",
            manifest=whole,
            model_onnx=found.model_onnx,
            statistics=found.statistics,
            references=expected.references,
        )
        crossed = read_package(tmp_path / "crossed.edgeflame")
        assert compare_with_references(open_runtime(crossed.model_onnx, device="cpu"), crossed).passed


def test_a_package_says_where_its_backbone_came_from(parts_folder: Path, donor: Path, tmp_path: Path) -> None:
    package = read_package(fit_by(donor, parts_folder, tmp_path / "m.edgeflame"))
    assert package.manifest.learning.backbone.name == "test_efficientnet"
    assert package.manifest.weights == read_package(donor).manifest.weights
    assert package.manifest.provenance["backbone"] == {
        "file": "donor.edgeflame",
        "sha256": read_package(donor).sha256,
        "product": "other",
    }
    # And serves as one in its turn.
    again = read_package(fit_by(tmp_path / "m.edgeflame", parts_folder, tmp_path / "n.edgeflame"))
    assert again.manifest.threshold == package.manifest.threshold


def test_the_backbone_of_a_package_can_go_without_its_images(donor: Path, parts_folder: Path, tmp_path: Path) -> None:
    result = edgeflame("export", "--model", donor, "--backbone", tmp_path / "b.edgeflame")
    assert result.exit_code == 0, result.output
    with open_archive(tmp_path / "b.edgeflame") as archive:
        assert archive.names == {"manifest.json", "backbone.onnx"}
    by_file = read_package(fit_by(tmp_path / "b.edgeflame", parts_folder, tmp_path / "1.edgeflame"))
    by_package = read_package(fit_by(donor, parts_folder, tmp_path / "2.edgeflame"))
    assert by_file.manifest.threshold == by_package.manifest.threshold
    assert by_file.model_onnx == by_package.model_onnx


def test_the_backbone_of_a_trained_package_is_the_trained_one(
    parts_folder: Path, settings: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "fade.edgeflame"
    result = edgeflame("fit", "--data", parts_folder, "--out", trained, "--config", settings, "--method", "fade")
    assert result.exit_code == 0, result.output
    package = read_package(fit_by(trained, parts_folder, tmp_path / "m.edgeflame", "--config", settings))
    assert package.manifest.learning.method == "none"
    assert package.manifest.weights.source == f"trained by fade, package {read_package(trained).sha256[:12]}"
    assert package.manifest.threshold.value == pytest.approx(read_package(trained).manifest.threshold.value, rel=0.005)


TORCH_FREE = """
import sys
for name in ("torch", "torchvision", "timm", "onnxscript"):
    sys.modules[name] = None  # as where it is not installed
from cli import main
sys.argv[0] = "edgeflame"
main()
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *map(str, arguments)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=110,
    )  # fmt: skip


def test_all_of_it_works_where_torch_is_not(parts_folder: Path, backbone_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeflame"
    fitted = without_torch(
        "fit", "--data", parts_folder, "--out", out, "--backbone-from", backbone_file, "--rank", 6,
        "--defects", parts_folder / "test/hole", "--report", tmp_path / "report",
    )  # fmt: skip
    assert fitted.returncode == 0, fitted.stderr
    assert (tmp_path / "report/index.html").is_file()
    evaluated = without_torch("evaluate", "--model", out, "--data", parts_folder, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert msgspec.json.decode(evaluated.stdout)["image_AUROC"] > 0.8
    calibrated = without_torch("calibrate", "--model", out, "--data", parts_folder, "--in-place", "--accept-worse")
    assert calibrated.returncode == 0, calibrated.stderr
    inspected = without_torch("inspect", "--model", out, "--source", parts_folder / "test/hole", "--json")
    assert inspected.returncode == 0, inspected.stderr
    assert len(inspected.stdout.splitlines()) == 6


def test_without_torch_and_backbone_the_error_names_both_ways(parts_folder: Path, tmp_path: Path) -> None:
    done = without_torch("fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame")
    assert done.returncode == MissingDependencyError.exit_code
    assert "--backbone-from FILE" in done.stderr
    assert "pip install 'edgeflame[train]'" in done.stderr
    trained = without_torch("fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame", "--method", "fade")
    assert "method fade needs PyTorch" in trained.stderr
    assert "--backbone-from" not in trained.stderr
    exported = without_torch("export", "--backbone", tmp_path / "b.edgeflame")
    assert exported.returncode == MissingDependencyError.exit_code
    assert "--model" in exported.stderr


def test_memory_does_not_grow_with_the_images(backbone_file: Path, tmp_path: Path) -> None:
    """Where neither images nor embeddings are kept; what is kept otherwise has a bound."""
    from export.graph import cut_embedding_graph
    from fitting.backbone import open_backbone

    _, embedder = open_backbone(backbone_file, cut_embedding_graph, device="cpu")
    for index in range(210):
        write_image(tmp_path / f"{index:03}.png", part_image(index))
    records = open_dataset(tmp_path).train
    learning = Learning(input=Preprocessing(height=64, width=64), calibration=Calibration(folds=3))

    def peak_bytes(count: int) -> int:
        images = ImageSet(records[:count], learning.input, max_cache_bytes=0)
        embeddings = Embeddings(embedder, images, max_cache_bytes=0)
        tracemalloc.start()
        try:
            site = fit_statistics(embeddings, learning, groups_known=True)
            assert site.statistics.count == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(70)  # what is made once
    assert peak_bytes(210) < 1.1 * peak_bytes(70)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--method", "fade"), UsageError, "method fade learns more than statistics"),
        (("--method", "feddymem"), UsageError, "method feddymem learns more than statistics"),
        (("--size", "128"), ConfigError, "input.height is 128, but the backbone of donor.edgeflame is made for 64"),
        (("--device", "cuda:1"), UsageError, "one of auto, cpu, cuda"),
    ],
)
def test_what_does_not_go_with_a_given_backbone(
    parts_folder: Path, donor: Path, tmp_path: Path, arguments: tuple[str, ...], kind: type, message: str
) -> None:
    out = tmp_path / "m.edgeflame"
    error = error_of(edgeflame("fit", "--data", parts_folder, "--out", out, "--backbone-from", donor, *arguments))
    assert isinstance(error, kind)
    assert message in str(error)
    assert not out.exists()


def test_a_configuration_for_another_backbone_is_refused(parts_folder: Path, donor: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "learning.toml", name="resnet18")
    error = error_of(
        edgeflame(
            "fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame", "--backbone-from", donor,
            "--config", config,
        )
    )  # fmt: skip
    assert "backbone.name is resnet18, but the backbone of donor.edgeflame is made for test_efficientnet" in str(error)


def test_files_that_hold_no_backbone(parts_folder: Path, backbone_file: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.edgeflame"

    def error_with(data: bytes) -> str:
        odd.write_bytes(data)
        error = error_of(
            edgeflame("fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame", "--backbone-from", odd)
        )
        assert isinstance(error, PackageError)
        return str(error)

    whole = backbone_file.read_bytes()
    assert "not a model package, or cut short" in error_with(whole[: len(whole) // 2])
    assert "not a model package" in error_with(b"an ONNX file, say")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    assert "or cut short (Bad CRC-32 for file 'backbone.onnx')" in error_with(bytes(flipped))
    with open_archive(backbone_file) as archive:
        document = archive.read_small("manifest.json", 1 << 20)
        graph = archive.read_small("backbone.onnx", 1 << 30)
    assert document is not None
    assert graph is not None
    write_archive(odd, {"manifest.json": document, "backbone.onnx": graph[:-1] + bytes([graph[-1] ^ 1])})
    assert "backbone.onnx was altered or damaged" in error_with(odd.read_bytes())
    for old, new, message in (
        (b'"format_version": 1', b'"format_version": 9', "backbone format 9, this EdgeFlame"),
        (b"edgeflame-backbone", b"somebody-backbone", "neither a model package nor a backbone"),
        (b'"grid": [', b'"grid": [1, ', "manifest.json is wrong"),
    ):
        write_archive(odd, {"manifest.json": document.replace(old, new, 1), "backbone.onnx": graph})
        assert message in error_with(odd.read_bytes())


def test_a_machine_that_embeds_otherwise_is_refused(
    parts_folder: Path, donor: Path, backbone_file: Path, tmp_path: Path
) -> None:
    """Here it is the file that says something else than its graph, which comes to the same."""
    package = read_package(donor)
    score = msgspec.structs.replace(package.references[0].expected, score=2 * package.references[0].expected.score)
    write_package(
        tmp_path / "donor.edgeflame",
        manifest=package.manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=[type(package.references[0])(png=package.references[0].png, expected=score)],
    )
    with open_archive(backbone_file) as archive:
        manifest = msgspec.json.decode(archive.read_small("manifest.json", 1 << 20) or b"")
        graph = archive.read_small("backbone.onnx", 1 << 30)
    assert graph is not None
    manifest["expected"][3] += 1.0
    write_archive(
        tmp_path / "backbone.edgeflame", {"manifest.json": msgspec.json.encode(manifest), "backbone.onnx": graph}
    )
    for name in ("donor.edgeflame", "backbone.edgeflame"):
        error = error_of(
            edgeflame(
                "fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame", "--backbone-from", tmp_path / name
            )
        )
        assert isinstance(error, RuntimeUnavailableError)
        assert "other embeddings here than PyTorch did" in str(error)


def test_a_package_without_reference_images_is_taken_and_the_log_says_what_is_not_known(
    donor: Path, parts_folder: Path, tmp_path: Path
) -> None:
    package = read_package(donor)
    bare = tmp_path / "bare.edgeflame"
    write_package(bare, manifest=package.manifest, model_onnx=package.model_onnx, statistics=package.statistics)
    result = edgeflame(
        "fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame", "--backbone-from", bare, "--rank", 6
    )
    assert result.exit_code == 0, result.output
    assert "backbone_not_checked" in result.stderr
    assert read_package(tmp_path / "m.edgeflame").references, "the new one has its own"


def test_a_package_whose_graph_ends_in_no_embeddings(donor: Path, parts_folder: Path, tmp_path: Path) -> None:
    package = read_package(donor)
    write_package(
        tmp_path / "old.edgeflame",
        manifest=package.manifest,
        model_onnx=package.model_onnx.replace(b"edgeflame.embeddings", b"edgeflame.embeddingz"),
        statistics=package.statistics,
    )
    error = error_of(
        edgeflame(
            "fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame",
            "--backbone-from", tmp_path / "old.edgeflame",
        )
    )  # fmt: skip
    assert "no embeddings that a backbone could end in" in str(error)
