"""The scoring graph: camera bytes in, score and anomaly map out, as one ONNX model.

Axes: N images, H x W the input, h x w the patch grid, P = h * w positions, C embedding channels.

    image [N, H, W, 3] uint8, BGR
      -> float32, planes, RGB                 -> backbone -> its stages' maps
      -> embeddings [P, N, C]                 `export.embedding`
      -> distance of every position [P, N]    `export.distances`
      -> Gaussian smoothing                   two products with constant matrices, no padding
      -> anomaly_map [N, h, w], score [N] = its maximum

The backbone is written by PyTorch's exporter, the rest by hand, node by node: the order of axes is what ONNX Runtime
runs fastest. Opset 18 is the exporter's lowest, and one that TensorRT 10.3 takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.checker
import onnx.helper
from torch import nn

from edgeflame.images import Preprocessing
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import smoothing_matrix
from export.builder import INPUT, MAP, RGB, SCORE, GraphBuilder
from export.distances import add_distances
from export.embedding import add_embeddings, export_network

BATCH_AXIS = "N"
OPSET = 18
IR_VERSION = 8
"""The oldest that allows opset 18, so that older runtimes on the line load the file."""


def scoring_graph(
    network: nn.Module,
    statistics: PackageStatistics,
    *,
    preprocessing: Preprocessing,
    smoothing_sigma: float,
    metadata: Mapping[str, str],
) -> bytes:
    """The whole way from a pre-processed camera image to its score, as a serialised ONNX model.

    The basis is stored in float16 and cast up once, when a runtime loads the model; arithmetic is float32.
    A NaN or infinite value at any position makes every cell of the map, and the score, NaN.

    Args:
        network: maps ``rgb [N, 3, H, W]`` float32 0..255 to ``[N, C, h, w]`` float32, normalisation inside. One that
            is also a :class:`export.embedding.StagedNetwork` gives a faster graph.
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
    model = export_network(network, preprocessing, opset=OPSET)
    body = model.graph
    head = GraphBuilder()
    embeddings = add_embeddings(head, network, body, grid=statistics.grid, num_channels=statistics.num_channels)
    add_map(head, add_distances(head, embeddings, statistics), grid=statistics.grid, sigma=smoothing_sigma)
    entry = GraphBuilder()
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


def add_map(g: GraphBuilder, distances: str, *, grid: tuple[int, int], sigma: float) -> None:
    """Distances ``[P, N]`` to the smoothed map ``[N, h, w]`` and its maximum, the graph's outputs."""
    height, width = grid
    images_first = g.node("Transpose", distances, result="distance", perm=[1, 0])
    unsmoothed = g.node("Reshape", images_first, g.integers("map_shape", 0, height, width), result="unsmoothed_map")
    # Also without smoothing (then with identities): 0 * NaN is NaN, so the two products carry a fault at one
    # position to every cell, and the maximum cannot overlook it, whatever it does with single NaNs.
    rows = g.constant("smoothing_rows", smoothing_matrix(height, sigma))
    columns = g.constant("smoothing_columns", smoothing_matrix(width, sigma).T)
    g.node("MatMul", g.node("MatMul", rows, unsmoothed, result="smoothed_rows"), columns, result=MAP)
    g.node("ReduceMax", MAP, g.integers("map_axes", 1, 2), result=SCORE, keepdims=0)


def _to_rgb_planes(g: GraphBuilder) -> None:
    """Image ``[N, H, W, 3]`` uint8 BGR to ``rgb [N, 3, H, W]`` float32. TensorRT only ever casts bytes."""
    pixels = g.node("Cast", INPUT, result="pixels", to=onnx.TensorProto.FLOAT)
    planes = g.node("Transpose", pixels, result="bgr_planes", perm=[0, 3, 1, 2])
    g.node("Gather", planes, g.integers("rgb_order", 2, 1, 0), result=RGB, axis=1)
