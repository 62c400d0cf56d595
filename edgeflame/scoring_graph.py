"""The contract between the scoring graph, which `export` writes, and the runtimes: names, and what a runtime asks for.

A package's graph has two outputs: the score, and the smoothed map whose maximum it is. The map before smoothing is a
tensor inside the graph. It is far sharper and costs nothing, so runtimes ask for it as well
(:func:`with_unsmoothed_map`). The package stays as it is, so that lines with older software run newer packages, and
packages of older software give their unsmoothed maps too.
"""

from __future__ import annotations

INPUT, SCORE, MAP = "image", "score", "anomaly_map"
"""Names of the graph's input and of the outputs that a package's graph has."""

OWN_PREFIX = "edgeflame."
"""The names of all nodes, constants and tensors outside the backbone begin with this; input and outputs have none."""

UNSMOOTHED = f"{OWN_PREFIX}unsmoothed_map"
"""Name of the distances ``[N, h, w]`` before they are smoothed."""

EMBEDDINGS = f"{OWN_PREFIX}embeddings"
"""Name of the embeddings ``[P, N, C]`` float32, of which the distances are taken. What leads to them is a
graph of its own for `fit` where PyTorch is not (`export.graph`)."""

PRECISION_KEY = f"{OWN_PREFIX}precision"
"""Key of the precision in the graph's metadata; a graph without it is ``fp32``."""


def with_unsmoothed_map(model_onnx: bytes) -> bytes:
    """The same model with ``UNSMOOTHED`` as a further output; the model itself if it has no such tensor.

    Its shape is for the runtime to infer. No ONNX library is needed, which a line does not have: in protobuf's encoding
    a message that comes twice is merged, and lists are joined, so that a second ``graph`` with but one output adds it
    to the first one's.
    """
    name = UNSMOOTHED.encode()
    if name not in model_onnx:
        return model_onnx
    float_tensor = _field(2, _field(1, b"\x08\x01"))  # ValueInfoProto.type.tensor_type.elem_type = FLOAT
    output = _field(1, name) + float_tensor  # ValueInfoProto.name
    return model_onnx + _field(7, _field(12, output))  # ModelProto.graph.output


def _field(number: int, payload: bytes) -> bytes:
    """A field of bytes or of a message, in protobuf's encoding; below 128 bytes a length is one byte."""
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload
