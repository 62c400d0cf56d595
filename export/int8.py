"""The backbone in int8 by quantisation nodes (Q/DQ), calibrated on good images; the scoring head stays in float32.

Two runtimes, two recipes, found by measuring and by what they accept:

- ``cpu``: ONNX Runtime's integer kernels. Activations uint8 with a zero point, so that the clips of ReLU6 vanish into
  the quantisation, and integer biases, without which a convolution stays in float32. (Symmetric int8 activations were
  1.7 times *slower* than float32 there, this is 1.3 to 1.5 times faster.)
- ``tensorrt``: symmetric int8, biases left in float32; it takes nothing else.

Both quantise weights symmetrically, per channel. Range: the least and the largest value seen in calibration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import onnx
import onnx.helper

from edgeflame.errors import UsageError, require_extra
from edgeflame.images import ImageU8
from edgeflame.scoring_graph import INPUT, OWN_PREFIX

Target = Literal["cpu", "tensorrt"]

MAX_CALIBRATION_IMAGES = 64
"""More change no range by much, and each is run through every layer of the network."""

_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""Tells ONNX Runtime that shapes are known and constants folded, which the exporter sees to."""


def quantised(model: onnx.ModelProto, images: ImageU8 | None, target: Target) -> onnx.ModelProto:
    """A float32 scoring graph with an int8 backbone; the scoring head, input and outputs stay the same.

    Args:
        model: of :func:`export.network.scoring_graph`.
        images: good images of the line, ``[N, H, W, 3]`` uint8 BGR as the graph takes them, N >= 1.
        target: the runtime that is to run it.

    Raises:
        UsageError: no images.
        MissingDependencyError: ONNX Runtime's quantisation is not installed.
    """
    if images is None or not len(images):
        raise UsageError(
            "int8 needs good images of the line to find the ranges of its activations: give --calibration DIR"
        )
    tools = _import_tools()
    kind = tools.QuantType.QUInt8 if target == "cpu" else tools.QuantType.QInt8
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(prepared, {**metadata, **_PREPARED})
    with tempfile.TemporaryDirectory(prefix="edgeflame-int8-") as folder:
        source, result = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(prepared.SerializeToString())
        tools.quantize_static(
            source,
            result,
            _Images(images),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind,
            weight_type=tools.QuantType.QInt8,
            nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith(OWN_PREFIX)],
            calibrate_method=tools.CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": target == "tensorrt",
                "WeightSymmetric": True,
                "QuantizeBias": target == "cpu",
            },
        )
        whole = onnx.load_from_string(result.read_bytes())
    whole.producer_name, whole.producer_version = model.producer_name, model.producer_version
    del whole.metadata_props[:]
    onnx.helper.set_model_props(whole, metadata)
    return whole


def _import_tools() -> ModuleType:
    with require_extra("cpu", "int8 needs ONNX Runtime's quantisation"):
        from onnxruntime import quantization
    module: ModuleType = quantization
    return module


class _Images:
    """Images one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: ImageU8) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        return None if image is None else {INPUT: image[None]}
