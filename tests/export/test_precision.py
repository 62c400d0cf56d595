"""The backbone in float16 and the scoring head in float32."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from edgeflame.errors import NumericalError, UsageError
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone
from edgeflame.onnx_session import open_session
from edgeflame.package import Package
from edgeflame.tensorrt import load_tensorrt
from export.builder import fold_constants
from export.int8 import Target
from export.network import scoring_graph
from export.precision import backbone_borders, backbone_nodes, with_precision
from export.trt import build_engines
from tests.support.small_package import bad_image, embed, good_image, random_gaussian

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def run(model: onnx.ModelProto, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = open_session(model.SerializeToString(), device="cpu", num_threads=None)
    scores, maps = session.run(["score", "anomaly_map"], {"image": images})
    return scores, maps


@pytest.fixture(scope="module")
def convolutional() -> tuple[onnx.ModelProto, np.ndarray]:
    """A real backbone with random weights, and images for it."""
    from trainer.backbone import build_network

    preprocessing = Preprocessing(height=64, width=64)
    network, _ = build_network(Backbone(weights="random", stages=(1, 2)), preprocessing, seed=1)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    embeddings = embed(network, images)
    statistics = random_gaussian(
        grid=network.grid, channels=network.num_channels, rank=8, mean=embeddings[0] + 0.1 * embeddings[1]
    )
    graph = scoring_graph(network, statistics, preprocessing=preprocessing, smoothing_sigma=1.0, metadata={"a": "b"})
    return onnx.load_from_string(graph), images


def test_float16_scores_alike_and_the_original_is_left_alone(
    convolutional: tuple[onnx.ModelProto, np.ndarray],
) -> None:
    model, images = convolutional
    before = model.SerializeToString()
    half = with_precision(model, "fp16")
    assert model.SerializeToString() == before
    np.testing.assert_allclose(run(half, images)[0], run(model, images)[0], rtol=0.01)
    assert not np.array_equal(run(half, images)[1], run(model, images)[1])


def test_every_weight_of_the_backbone_is_halved_and_none_of_the_head(
    convolutional: tuple[onnx.ModelProto, np.ndarray],
) -> None:
    model, _ = convolutional
    half = with_precision(model, "fp16")
    before = {entry.name: entry.data_type for entry in model.graph.initializer}
    after = {entry.name: entry.data_type for entry in half.graph.initializer}
    assert before.keys() == after.keys()
    for name, kind in after.items():
        expected = HALF if before[name] == FLOAT and not name.startswith("edgeflame.") else before[name]
        assert kind == expected, name
    inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    body = {name for node in backbone_nodes(half.graph) for name in node.output}
    assert FLOAT not in {types[name] for name in body}
    assert types["edgeflame.squared"] == types["edgeflame.delta"] == FLOAT


def test_inputs_outputs_and_metadata(convolutional: tuple[onnx.ModelProto, np.ndarray]) -> None:
    model, _ = convolutional
    assert backbone_borders(model.graph)[0] == ["rgb"]
    for precision in ("fp32", "fp16"):
        typed = with_precision(model, precision)  # type: ignore[arg-type]
        assert list(typed.graph.input) == list(model.graph.input)
        assert list(typed.graph.output) == list(model.graph.output)
        metadata = {entry.key: entry.value for entry in typed.metadata_props}
        assert metadata == {"a": "b", "edgeflame.precision": precision}


def test_constants_in_attributes_are_halved_too(package: Package) -> None:
    images = np.stack([good_image(5), bad_image(6)])
    model = onnx.load_from_string(package.model_onnx)
    scores = run(with_precision(model, "fp16"), images)[0]
    # The spread of a block is a difference of squares: this network loses far more than a real one.
    assert scores[0] < package.manifest.threshold.value < scores[1]


def test_a_weight_beyond_float16_is_refused(convolutional: tuple[onnx.ModelProto, np.ndarray]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(convolutional[0])
    entry = next(
        item for item in model.graph.initializer if item.data_type == FLOAT and not item.name.startswith("edgeflame.")
    )
    array = onnx.numpy_helper.to_array(entry).copy()
    array.flat[0] = 1e5
    entry.CopyFrom(onnx.numpy_helper.from_array(array, entry.name))
    with pytest.raises(NumericalError, match=r"holds 1e\+05, beyond float16's 65504"):
        with_precision(model, "fp16")


@pytest.fixture(scope="module")
def calibrated(convolutional: tuple[onnx.ModelProto, np.ndarray]) -> dict[str, onnx.ModelProto]:
    """The same in int8, for each kind of runtime."""
    model, images = convolutional
    targets: tuple[Target, ...] = ("cpu", "tensorrt")
    return {target: with_precision(model, "int8", calibration=images, target=target) for target in targets}


def test_int8_leaves_the_head_in_float32_and_the_original_alone(
    convolutional: tuple[onnx.ModelProto, np.ndarray], calibrated: dict[str, onnx.ModelProto]
) -> None:
    model, images = convolutional
    assert not any(node.op_type.endswith("QuantizeLinear") for node in model.graph.node)
    head = {node.name: node.op_type for node in model.graph.node if node.name.startswith("edgeflame.")}
    expected = run(model, images)[0]
    for quantised in calibrated.values():
        onnx.checker.check_model(quantised, full_check=True)
        found = {node.name: node for node in quantised.graph.node}
        assert {name: found[name].op_type for name in head} == head
        inner = [name for node in backbone_nodes(quantised.graph) for name in node.output]
        assert sum("QuantizeLinear" in name for name in inner) > 10
        scores = run(quantised, images)[0]
        np.testing.assert_allclose(scores, expected, rtol=0.5)  # random weights: far from the parity gate's 15%
        assert not np.array_equal(scores, expected)
        metadata = {entry.key: entry.value for entry in quantised.metadata_props}
        assert metadata == {"a": "b", "edgeflame.precision": "int8"}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None,
    reason="no processor without VNNI can be emulated here",
)
def test_int8_scores_the_same_on_a_processor_without_vnni(
    convolutional: tuple[onnx.ModelProto, np.ndarray], calibrated: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    model, images = convolutional
    np.save(tmp_path / "images.npy", images)
    models = {"float": model, **calibrated}
    for name, graph in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(graph.SerializeToString())
    code = """
import sys
from pathlib import Path
import numpy as np
from edgeflame.onnx_session import open_session
folder = Path(sys.argv[1])
images = np.load(folder / "images.npy")
for path in folder.glob("*.onnx"):
    session = open_session(path.read_bytes(), device="cpu", num_threads=1)
    np.save(path.with_suffix(".npy"), session.run(["score"], {"image": images})[0])
"""
    # The widest processor that QEMU emulates has AVX2, and neither AVX-512 nor VNNI.
    command = ["qemu-x86_64", "-cpu", "max", sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    for name, graph in models.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), run(graph, images)[0], rtol=1e-3, err_msg=name)


def test_int8_is_symmetric_and_without_integer_biases_where_tensorrt_runs_it(
    calibrated: dict[str, onnx.ModelProto],
) -> None:
    def types(model: onnx.ModelProto) -> set[int]:
        return {entry.data_type for entry in model.graph.initializer if not entry.name.startswith("edgeflame.")}

    int8, uint8, int32 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32
    assert types(calibrated["cpu"]) >= {int8, uint8}
    assert not types(calibrated["tensorrt"]) & {uint8, int32}
    points = [
        onnx.numpy_helper.to_array(entry)
        for entry in calibrated["tensorrt"].graph.initializer
        if entry.name.endswith("zero_point")
    ]
    assert points
    assert not any(point.any() for point in points)


def test_tensorrt_takes_int8(calibrated: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    data = calibrated["tensorrt"].SerializeToString()
    (record,) = build_engines(
        load_tensorrt("rtx"),
        fold_constants(data),
        tmp_path,
        capabilities=["8.9"],
        precision="int8",
        max_batch=2,
        package_sha256="0" * 64,
    )
    assert record.size_bytes > 10_000


def test_int8_without_images_says_what_it_needs(convolutional: tuple[onnx.ModelProto, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="--calibration DIR"):
        with_precision(convolutional[0], "int8")
