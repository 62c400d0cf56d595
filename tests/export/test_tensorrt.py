"""TensorRT takes the graph. Engines are built here, without a GPU; none is run."""

from __future__ import annotations

import onnx
import pytest
from small_model import GRID, SIZE

from edgeflame.package import Package


def test_nothing_but_a_cast_touches_the_bytes(package: Package) -> None:
    """TensorRT refuses any other operation on uint8."""
    graph = onnx.load_from_string(package.model_onnx).graph
    assert [node.op_type for node in graph.node if "image" in node.input] == ["Cast"]


def test_tensorrt_rtx_builds_an_engine_for_each_generation(package: Package) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(package.model_onnx), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    outputs = {network.get_output(index).name: tuple(network.get_output(index).shape) for index in range(2)}
    assert outputs == {"score": (-1,), "anomaly_map": (-1, GRID, GRID)}

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    generations = [trt.ComputeCapability.SM86, trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
    config.num_compute_capabilities = len(generations)
    for index, generation in enumerate(generations):
        config.set_compute_capability(generation, index)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((batch, SIZE, SIZE, 3) for batch in (1, 1, 8)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
