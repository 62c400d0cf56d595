"""Typed graphs: the backbone in float16 or int8, the scoring head in float32.

Runtimes that follow the graph's own types (TensorRT does, and has no other way from version 11 on) then need no
precision flag. The head stays in float32, where a squared distance may exceed float16's 65504.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import onnx.utils

from edgeflame.errors import NumericalError
from edgeflame.images import ImageU8
from edgeflame.scoring_graph import OWN_PREFIX, PRECISION_KEY
from export.int8 import Target, quantised

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
_LARGEST_HALF = float(np.finfo(np.float16).max)

_KEPT_INPUTS = {"Resize": (2,), "Upsample": (1,)}
"""Inputs that ONNX wants in float32 whatever the type of the data: scale factors."""


def with_precision(
    model: onnx.ModelProto, precision: Precision, *, calibration: ImageU8 | None = None, target: Target = "cpu"
) -> onnx.ModelProto:
    """A scoring graph in another precision, which its metadata then name; inputs and outputs stay the same.

    Args:
        model: a float32 scoring graph of :func:`export.network.scoring_graph`.
        precision: ``fp16`` casts the backbone's inputs to float16 and its outputs back; ``int8`` quantises it.
        calibration: good images for ``int8``, see :func:`export.int8.quantised`.
        target: the runtime that is to run ``int8``.

    Raises:
        NumericalError: a weight is beyond float16's range.
        UsageError: no images to calibrate ``int8`` on.
    """
    if precision == "int8":
        typed = quantised(model, calibration, target)
    else:
        typed = onnx.ModelProto()
        typed.CopyFrom(model)
    if precision == "fp16":
        _halve_backbone(typed.graph)
        onnx.checker.check_model(typed, full_check=True)
    known = {entry.key: entry.value for entry in typed.metadata_props}
    del typed.metadata_props[:]
    onnx.helper.set_model_props(typed, {**known, PRECISION_KEY: precision})
    return typed


def backbone_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes between the image's planes and the embeddings, in order."""
    return [node for node in graph.node if not node.name.startswith(OWN_PREFIX)]


def backbone_borders(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """Names of the tensors that enter the backbone and of those that leave it, constants aside."""
    body = backbone_nodes(graph)
    constants = {entry.name for entry in graph.initializer}
    made = {name for node in body for name in node.output}
    used = dict.fromkeys(name for node in body for name in node.input if name)
    outside = {name for node in graph.node if node.name.startswith(OWN_PREFIX) for name in node.input}
    return [name for name in used if name not in made | constants], [name for name in made if name in outside]


def _halve_backbone(graph: onnx.GraphProto) -> None:
    body = backbone_nodes(graph)
    entering, leaving = backbone_borders(graph)
    kept = _kept(body)
    for entry in graph.initializer:
        if entry.data_type == _FLOAT and not entry.name.startswith(OWN_PREFIX) and entry.name not in kept:
            entry.CopyFrom(_half(entry, entry.name))
    for node in body:
        if not kept.intersection(node.output):
            _halve_attributes(node)
    half_of = {name: f"{OWN_PREFIX}{name}_float16" for name in (*entering, *leaving)}
    for node in body:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = half_of.get(name, name)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        nodes += [_cast(name, half_of[name], _HALF) for name in node.output if name in entering]
        nodes += [_cast(half_of[name], name, _FLOAT) for name in leaving if half_of[name] in node.output]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.value_info[:]  # of the old types


def _kept(body: Iterable[onnx.NodeProto]) -> set[str]:
    return {
        node.input[index]
        for node in body
        for index in _KEPT_INPUTS.get(node.op_type, ())
        if index < len(node.input) and node.input[index]
    }


def _halve_attributes(node: onnx.NodeProto) -> None:
    """Constants written as attributes, and casts to float32."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _FLOAT:
            attribute.t.CopyFrom(_half(attribute.t, node.name))
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
            attribute.i = _HALF
        elif node.op_type == "Constant" and attribute.name == "value_float":
            value = onnx.numpy_helper.from_array(np.array(attribute.f, dtype=np.float32), node.name)
            attribute.CopyFrom(onnx.helper.make_attribute("value", _half(value, node.name)))


def _half(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    array = onnx.numpy_helper.to_array(tensor)
    largest = float(np.abs(array).max(initial=0.0))
    # The exporter writes infinities of its own (the open side of a clip); they stay what they are.
    if np.isfinite(largest) and largest > _LARGEST_HALF:
        raise NumericalError(
            f"the backbone's {name} holds {largest:.3g}, beyond float16's {_LARGEST_HALF:.0f}: export it as fp32"
        )
    return onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=f"{OWN_PREFIX}cast_to_{target}", to=kind)


def backbone_model(model_onnx: bytes) -> bytes:
    """From ``image`` to the embeddings: the same input step and the same network, without distances and map."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(model_onnx))
    (image,) = model.graph.input
    leaving = backbone_borders(model.graph)[1]
    alone: onnx.ModelProto = onnx.utils.Extractor(model).extract_model([image.name], leaving)
    data: bytes = alone.SerializeToString()
    return data
