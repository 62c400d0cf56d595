"""ONNX Runtime: what was asked for runs, foreign graphs and images are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnxruntime
import pytest

from edge.runtimes.interface import check_runtime_fits
from edge.runtimes.load import open_runtime
from edge.runtimes.onnx_runtime import open_onnx_runtime
from edgeflame import onnx_session
from edgeflame.errors import DataError, PackageError, RuntimeUnavailableError
from edgeflame.package import Package
from edgeflame.scoring_graph import UNSMOOTHED, with_unsmoothed_map
from edgeflame.statistics.gaussian import smooth_maps
from tests.support.small_package import GRID, SIZE, bad_image, good_image


def test_it_scores_a_batch(package: Package) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu", num_threads=1)
    assert runtime.provider == "CPUExecutionProvider"
    assert (runtime.input_size, runtime.grid) == ((SIZE, SIZE), (GRID, GRID))
    scores, maps, unsmoothed = runtime.score(np.stack([good_image(1), bad_image(2)]))
    assert scores.shape == (2,)
    assert maps.shape == (2, GRID, GRID)
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    assert unsmoothed is not None
    sigma = package.manifest.learning.scoring.smoothing_sigma
    np.testing.assert_allclose(smooth_maps(unsmoothed, sigma), maps, rtol=1e-5)
    assert scores[0] <= package.manifest.threshold.value < scores[1]


def test_a_graph_without_a_map_before_smoothing_gives_the_smoothed_one(package: Package) -> None:
    """Of an unknown maker, say: score and map are all that a scoring graph must have."""
    other = package.model_onnx.replace(UNSMOOTHED.encode(), UNSMOOTHED[:-1].encode() + b"q")
    assert other != package.model_onnx
    assert with_unsmoothed_map(other) == other
    images = np.stack([good_image(1), bad_image(2)])
    found = open_runtime(other, device="cpu", num_threads=1).score(images)
    assert found.unsmoothed is None
    np.testing.assert_array_equal(found.scores_and_shown()[1], found.maps)
    np.testing.assert_array_equal(
        found.scores, open_runtime(package.model_onnx, device="cpu", num_threads=1).score(images).scores
    )


def test_the_further_output_is_what_onnx_itself_would_write(package: Package) -> None:
    model = onnx.load_from_string(with_unsmoothed_map(package.model_onnx))
    assert [output.name for output in model.graph.output] == ["score", "anomaly_map", UNSMOOTHED]
    plain = onnx.load_from_string(package.model_onnx)
    plain.graph.output.append(onnx.helper.make_tensor_value_info(UNSMOOTHED, onnx.TensorProto.FLOAT, None))
    assert model == plain


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, SIZE, SIZE + 1, 3), np.uint8),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
        np.zeros((1, SIZE, SIZE, 3), np.float32),
    ],
)
def test_images_of_another_size_or_type_are_refused(package: Package, batch: np.ndarray) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu", num_threads=1)
    with pytest.raises(DataError, match="expected uint8 images"):
        runtime.score(batch)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_an_error_and_auto_takes_the_cpu(package: Package) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"edgeflame\[gpu\]"):
        open_runtime(package.model_onnx, device="cuda")
    assert open_runtime(package.model_onnx, device="auto").provider == "CPUExecutionProvider"


def test_a_silent_fall_back_is_an_error_when_cuda_was_asked_for(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU build on a machine without a driver: it offers CUDA, and then runs on the CPU."""

    def session(model: bytes, options: object, providers: list[tuple[str, object]]) -> object:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    fake = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=session,
        capi=onnxruntime.capi,
    )
    monkeypatch.setattr(onnx_session, "import_library", lambda: fake)
    with pytest.raises(RuntimeUnavailableError, match="falls back to CPUExecutionProvider"):
        open_runtime(package.model_onnx, device="cuda")
    assert open_runtime(package.model_onnx, device="auto").provider == "CPUExecutionProvider"


def test_without_onnx_runtime_the_message_names_the_extras() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edge.runtimes.load import open_runtime\n"
        "from edgeflame.errors import MissingDependencyError\n"
        "try: open_runtime(b'')\n"
        "except MissingDependencyError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "edgeflame[cpu]" in done.stdout
    assert "edgeflame[gpu]" in done.stdout


@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), b"\x08\x08" * 50])
def test_bytes_that_are_no_model(data: bytes) -> None:
    with pytest.raises(PackageError, match="cannot be loaded"):
        open_runtime(data, device="cpu")


def test_a_model_cut_short_anywhere_is_refused(package: Package) -> None:
    model = package.model_onnx
    for length in range(0, len(model), len(model) // 40):
        with pytest.raises(PackageError):
            open_runtime(model[:length], device="cpu", num_threads=1)


def _edited(package: Package, change: object) -> bytes:
    model = onnx.load_from_string(package.model_onnx)
    change(model)  # type: ignore[operator]
    data: bytes = model.SerializeToString()
    return data


def test_a_graph_with_another_contract_is_refused(package: Package) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for index, name in enumerate(node.output):
                if name == "score":
                    node.output[index] = "result"
        model.graph.output[0].name = "result"

    def drop_map(model: onnx.ModelProto) -> None:
        del model.graph.output[1]

    for change in (rename, drop_map):
        with pytest.raises(PackageError, match="not a scoring graph"):
            open_runtime(_edited(package, change), device="cpu")


def test_a_model_that_names_files_beside_it_is_refused(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a name could point anywhere; a package is whole, or it is not loaded."""

    def outsource(model: onnx.ModelProto) -> None:
        mean = next(entry for entry in model.graph.initializer if entry.name == "edgeflame.mean")
        (tmp_path / "outside.bin").write_bytes(mean.raw_data)
        onnx.external_data_helper.set_external_data(mean, "outside.bin")
        mean.ClearField("raw_data")
        mean.data_location = onnx.TensorProto.EXTERNAL

    data = _edited(package, outsource)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match="cannot be loaded"):
        open_runtime(data, device="cpu")


def test_a_graph_that_is_not_its_manifests_is_refused(package: Package) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu")
    check_runtime_fits(runtime, package.manifest)

    class Other:
        provider, input_size, grid = runtime.provider, (128, 64), runtime.grid

    with pytest.raises(PackageError, match="takes 64x128 images"):
        check_runtime_fits(Other(), package.manifest)  # type: ignore[arg-type]


def test_buffers_are_made_once_for_a_batch_size_and_answers_are_the_callers(package: Package) -> None:
    runtime = open_onnx_runtime(package.model_onnx, device="cpu", num_threads=1)
    first = runtime.score(good_image(1)[None])
    (bound,) = runtime._idle
    addresses = [array.ctypes.data for array in (bound.image, bound.scores, bound.maps)]
    kept = first.scores.copy()
    second = runtime.score(bad_image(2)[None])
    assert runtime._idle == [bound]
    assert [array.ctypes.data for array in (bound.image, bound.scores, bound.maps)] == addresses
    np.testing.assert_array_equal(bound.image[0], bad_image(2))
    np.testing.assert_array_equal(first.scores, kept)
    assert second.scores[0] != first.scores[0]
    assert runtime.score(np.stack([good_image(1)] * 2)).scores == pytest.approx([kept[0]] * 2, rel=1e-5)


def test_an_operation_the_runtime_lacks_is_named(package: Package) -> None:
    def rename(model: onnx.ModelProto) -> None:
        node = next(item for item in model.graph.node if item.name == "edgeflame.distance_positions_first")
        node.op_type = "Sqroot"

    with pytest.raises(PackageError, match=r"cannot be loaded by ONNX Runtime .*Sqroot"):
        open_runtime(_edited(package, rename), device="cpu")


@pytest.mark.skipif("TensorrtExecutionProvider" in onnxruntime.get_available_providers(), reason="TensorRT is there")
def test_tensorrts_provider_where_there_is_none_is_an_error(package: Package) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"has no TensorrtExecutionProvider.*edgeflame\[gpu\]"):
        open_runtime(package.model_onnx, device="ort-tensorrt")
