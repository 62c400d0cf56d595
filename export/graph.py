"""The scoring graph: camera bytes in, score and anomaly map out, as one ONNX model.

Axes: N images, H x W the input, h x w the patch grid, P = h * w positions, C embedding channels, K rank.

    image [N, H, W, 3] uint8, BGR
      -> float32, planes, RGB                 -> network -> embeddings [N, C, h, w]
      -> distance of every position           [P, N, C] x [P, C, K] and back, see `edgeflame.statistics`
      -> Gaussian smoothing                   two products with constant matrices, no padding
      -> anomaly_map [N, h, w], score [N] = its maximum

The backbone is written by PyTorch's exporter, the rest by hand, node by node: the order of axes below is what
ONNX Runtime runs fastest. Opset 18 is the exporter's lowest, and one that TensorRT 10.3 takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import torch
from torch import nn

from edgeflame.errors import DataError, NumericalError
from edgeflame.images import Preprocessing
from edgeflame.statistics import LowRankGaussian, smoothing_matrix

INPUT, SCORE, MAP = "image", "score", "anomaly_map"
"""Names of the graph's input and outputs: the contract with the runtimes."""

BATCH_AXIS = "N"
OPSET = 18
IR_VERSION = 8
"""The oldest that allows opset 18, so that older runtimes on the line load the file."""

_RGB, _EMBEDDINGS = "rgb", "embeddings"


def scoring_graph(
    network: nn.Module,
    statistics: LowRankGaussian,
    *,
    preprocessing: Preprocessing,
    smoothing_sigma: float,
    metadata: Mapping[str, str],
) -> bytes:
    """The whole way from a pre-processed camera image to its score, as a serialised ONNX model.

    The basis is stored in float16 and cast up once, when a runtime loads the model; arithmetic is float32.
    A NaN or infinite value at any position makes every cell of the map, and the score, NaN.

    Args:
        network: maps ``rgb [N, 3, H, W]`` float32 0..255 to ``[N, C, h, w]`` float32, normalisation inside.
        statistics: of the network's embeddings.
        preprocessing: gives H and W.
        smoothing_sigma: of the map, in cells; 0 for none.
        metadata: written into the model's ``metadata_props``.

    Returns:
        A model with input ``image [N, H, W, 3]`` uint8 BGR and outputs ``score [N]`` and
        ``anomaly_map [N, h, w]`` float32, N dynamic.

    Raises:
        DataError: the network's embeddings are not those the statistics describe.
        NumericalError: a weight of the network is NaN or infinite.
    """
    model = _export_network(network, preprocessing)
    body = model.graph
    _check_embeddings(body, statistics)
    head = _Builder()
    _score(head, statistics, smoothing_sigma)

    entry = _Builder()
    _to_rgb_planes(entry)
    height, width = statistics.grid
    float32, uint8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*entry.nodes, *body.node, *head.nodes],
        "edgeflame",
        [value(INPUT, uint8, [BATCH_AXIS, preprocessing.height, preprocessing.width, 3])],
        [value(SCORE, float32, [BATCH_AXIS]), value(MAP, float32, [BATCH_AXIS, height, width])],
        initializer=[*entry.constants, *body.initializer, *head.constants],
    )
    whole = onnx.helper.make_model(
        graph,
        producer_name="edgeflame",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    onnx.helper.set_model_props(whole, dict(metadata))
    onnx.checker.check_model(whole, full_check=True)
    data: bytes = whole.SerializeToString()
    return data


def _export_network(network: nn.Module, preprocessing: Preprocessing) -> onnx.ModelProto:
    """The network as ONNX: ``rgb`` to ``embeddings``, without the exporter's traces of source files."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            # ReLU6 would clip a NaN to a number and hide the fault.
            msg = f"the network's {name} holds NaN or infinite values"
            raise NumericalError(msg)
    frozen = copy.deepcopy(network).cpu().eval()
    for module in frozen.modules():
        if hasattr(module, "inplace"):
            # The exporter has to take in-place activations apart again, which takes it as long as all the rest.
            module.inplace = False  # type: ignore[assignment]  # torch types every attribute as a tensor
    # With an example batch of one the exporter would make the batch axis static.
    example = torch.zeros(2, 3, preprocessing.height, preprocessing.width)
    with torch.no_grad():
        program = torch.onnx.export(
            frozen,
            (example,),
            input_names=[_RGB],
            output_names=[_EMBEDDINGS],
            dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def _check_embeddings(body: onnx.GraphProto, statistics: LowRankGaussian) -> None:
    shape = [dim.dim_value for dim in body.output[0].type.tensor_type.shape.dim][1:]
    expected = [statistics.num_channels, *statistics.grid]
    if shape != expected:
        msg = f"the network gives embeddings of shape {shape} (C, h, w), the statistics describe {expected}"
        raise DataError(msg)


class _Builder:
    """Collects nodes and constants under names of their own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        full = f"edgeflame.{name}"
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), full))
        return full

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(self, kind: str, *inputs: str, result: str, **attributes: Any) -> str:
        # What the rest of the model refers to keeps its plain name.
        output = result if result in (_RGB, SCORE, MAP) else f"edgeflame.{result}"
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output], name=f"edgeflame.{result}", **attributes))
        return output


def _to_rgb_planes(g: _Builder) -> None:
    """Image ``[N, H, W, 3]`` uint8 BGR to ``rgb [N, 3, H, W]`` float32. TensorRT only ever casts bytes."""
    pixels = g.node("Cast", INPUT, result="pixels", to=onnx.TensorProto.FLOAT)
    planes = g.node("Transpose", pixels, result="bgr_planes", perm=[0, 3, 1, 2])
    g.node("Gather", planes, g.integers("rgb_order", 2, 1, 0), result=_RGB, axis=1)


def _score(g: _Builder, statistics: LowRankGaussian, sigma: float) -> None:
    """Embeddings ``[N, C, h, w]`` to map and score.

    With d = x - mu, t = U'd and r = d - U t: distance^2 = (|r|^2 + sum_i (t_i s / l_i)^2) / s^2, where s^2 is the
    residual variance and l_i^2 the eigenvalues. A sum of squares: rounding cannot make it negative.
    """
    height, width = statistics.grid
    positions, channels = statistics.mean.shape
    eigenvalues, residual = statistics.variances()
    by_cell = g.node(
        "Reshape", _EMBEDDINGS, g.integers("cells_shape", 0, channels, positions), result="embeddings_by_cell"
    )
    positions_first = g.node("Transpose", by_cell, result="embeddings_positions_first", perm=[2, 0, 1])  # [P, N, C]
    delta = g.node("Sub", positions_first, g.constant("mean", statistics.mean[:, None, :]), result="delta")

    last_axis = g.integers("last_axis", 2)
    if statistics.rank:
        stored = g.constant("basis_float16", statistics.basis.astype(np.float16))
        basis = g.node("Cast", stored, result="basis", to=onnx.TensorProto.FLOAT)  # [P, C, K]
        back = g.node("Transpose", basis, result="basis_transposed", perm=[0, 2, 1])
        along = g.node("MatMul", delta, basis, result="along")  # [P, N, K]
        rest = g.node("Sub", delta, g.node("MatMul", along, back, result="within"), result="rest")
        rest_squared = g.node("ReduceSumSquare", rest, last_axis, result="rest_squared", keepdims=0)  # [P, N]
        relative = np.sqrt(residual[:, None].astype(np.float64) / eigenvalues).astype(np.float32)
        scaled = g.node("Mul", along, g.constant("along_scale", relative[:, None, :]), result="along_scaled")
        along_squared = g.node("ReduceSumSquare", scaled, last_axis, result="along_squared", keepdims=0)
        squared = g.node("Add", rest_squared, along_squared, result="squared_scaled")
    else:
        squared = g.node("ReduceSumSquare", delta, last_axis, result="squared_scaled", keepdims=0)
    normalised = g.node("Div", squared, g.constant("residual", residual[:, None]), result="squared")
    distance = g.node("Sqrt", normalised, result="distance_positions_first")
    images_first = g.node("Transpose", distance, result="distance", perm=[1, 0])
    unsmoothed = g.node("Reshape", images_first, g.integers("map_shape", 0, height, width), result="unsmoothed_map")

    # Also without smoothing (then with identities): 0 * NaN is NaN, so the two products carry a fault at one
    # position to every cell, and the maximum cannot overlook it, whatever it does with single NaNs.
    rows = g.constant("smoothing_rows", smoothing_matrix(height, sigma))
    columns = g.constant("smoothing_columns", smoothing_matrix(width, sigma).T)
    g.node("MatMul", g.node("MatMul", rows, unsmoothed, result="smoothed_rows"), columns, result=MAP)
    g.node("ReduceMax", MAP, g.integers("map_axes", 1, 2), result=SCORE, keepdims=0)
