"""The backbone of a scoring graph alone, for comparison."""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx.utils

from export.precision import backbone_borders


def backbone_model(model_onnx: bytes) -> bytes:
    """From ``image`` to the embeddings: the same input step and the same network, without distances and map."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(model_onnx))
    (image,) = model.graph.input
    leaving = backbone_borders(model.graph)[1]
    alone: onnx.ModelProto = onnx.utils.Extractor(model).extract_model([image.name], leaving)
    data: bytes = alone.SerializeToString()
    return data
