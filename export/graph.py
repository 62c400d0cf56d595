"""The scoring graph, camera bytes in, score and anomaly map out, as one ONNX model; and its first half, to embeddings.

Axes: N images, H x W the input, h x w the patch grid, P = h * w positions, C embedding channels, C_s channels of one
stage on its own h_s x w_s.

    image [N, H, W, 3] uint8, BGR
      -> float32, planes, RGB                 -> backbone -> its stages' maps
      -> embeddings [P, N, C]                 stages put on the grid; here the first half ends
      -> distance of every position [P, N]    `export.distances`
      -> times the image's factor [N, 1, 1]   only with a head: `export.head`
      -> edgeflame.unsmoothed_map [N, h, w]   what runtimes ask for as well: `edgeflame.scoring_graph`
      -> Gaussian smoothing                   two products with constant matrices, no padding
      -> anomaly_map [N, h, w], score [N] = its maximum

The backbone comes as ONNX, as `export.network` has PyTorch's exporter write it; the rest is written by hand, node by
node: the order of axes is what ONNX Runtime runs fastest. Opset 18 is the exporter's lowest, and one that TensorRT
10.3 takes.

:func:`embedding_graph` makes the first half of a network, and :func:`cut_embedding_graph` takes it out of any package's
graph again; :func:`complete_graph` puts statistics behind it. So a new product needs a network's ONNX, and no PyTorch.

Resizing a stage to the grid and averaging with neighbours are linear, and rows are apart from columns, so both
together are two products with small constant matrices. They are taken with the channels last, where the distances want
them, and where a stage is still small. (On a CPU this halves the time between backbone and distances: resizing,
averaging and transposing the whole embedding take three passes over it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import google.protobuf.message
import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.shape_inference

from edgeflame.errors import DataError, PackageError
from edgeflame.images import Preprocessing
from edgeflame.operators import check_operators
from edgeflame.scoring_graph import EMBEDDINGS, INPUT, MAP, OWN_PREFIX, SCORE, UNSMOOTHED
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import smoothing_matrix
from edgeflame.statistics.head import DefectHead
from edgeflame.tensors import F32
from export.builder import RGB, GraphBuilder
from export.distances import add_distances
from export.head import add_head

BATCH_AXIS = "N"
OPSET = 18
IR_VERSION = 8
"""The oldest that allows opset 18, so that older runtimes on the line load the file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StageMixing:
    """How the map of one stage is put on the grid: ``rows @ map @ columns.T``.

    Attributes:
        rows: ``[h, h_s]``.
        columns: ``[w, w_s]``.
    """

    rows: F32
    columns: F32


def embedding_graph(
    body: onnx.GraphProto, *, mixing: Sequence[StageMixing] | None, sums_stages: bool, preprocessing: Preprocessing
) -> bytes:
    """From camera bytes to embeddings: a network that is already ONNX, serialised.

    Args:
        body: the network, from ``rgb [N, 3, H, W]`` float32 0..255 (normalisation inside) to its stages' maps
            ``[N, C_s, h_s, w_s]`` or its embeddings ``[N, C, h, w]``, opset ``OPSET``.
        mixing: for each of the outputs of ``body`` how it is put on the grid; None if ``body`` gives embeddings.
        sums_stages: stages on the grid are summed, not concatenated over channels.
        preprocessing: gives H and W.

    Returns:
        A model with input ``image [N, H, W, 3]`` uint8 BGR and output ``EMBEDDINGS [P, N, C]`` float32, N dynamic.
    """
    ending = GraphBuilder()
    num_positions, num_channels = _add_embeddings(ending, body, mixing, sums_stages=sums_stages)
    entry = GraphBuilder()
    _to_rgb_planes(entry)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*entry.nodes, *body.node, *ending.nodes],
        "edgeflame",
        [value(INPUT, onnx.TensorProto.UINT8, [BATCH_AXIS, preprocessing.height, preprocessing.width, 3])],
        [value(EMBEDDINGS, onnx.TensorProto.FLOAT, [num_positions, BATCH_AXIS, num_channels])],
        initializer=[*entry.constants, *body.initializer, *ending.constants],
    )
    return _serialised(
        onnx.helper.make_model(
            graph,
            producer_name="edgeflame",
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
    )


def cut_embedding_graph(model_onnx: bytes, *, num_positions: int, num_channels: int) -> bytes:
    """The first half of a package's graph, as :func:`embedding_graph` made it.

    Args:
        model_onnx: the package's graph; it need not be trusted.
        num_positions: P, by the package's manifest.
        num_channels: C, likewise.

    Raises:
        PackageError: the graph is damaged, or holds no such embeddings.
    """
    check_operators(model_onnx)
    try:
        model = onnx.load_from_string(model_onnx)
        graph = model.graph
        needed, nodes = {EMBEDDINGS}, []
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                nodes.append(node)
                needed.update(node.input)
        if not nodes:
            raise PackageError("the package's graph holds no embeddings that a backbone could end in")
        value = onnx.helper.make_tensor_value_info
        cut = onnx.helper.make_graph(
            nodes[::-1],
            graph.name,
            graph.input,
            [value(EMBEDDINGS, onnx.TensorProto.FLOAT, [num_positions, BATCH_AXIS, num_channels])],
            initializer=[entry for entry in graph.initializer if entry.name in needed],
        )
        return _serialised(
            onnx.helper.make_model(
                cut, producer_name="edgeflame", ir_version=model.ir_version, opset_imports=model.opset_import
            )
        )
    except (
        google.protobuf.message.DecodeError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as exc:
        raise PackageError(f"the package's graph is not valid ONNX ({str(exc).strip().splitlines()[0]})") from exc


def complete_graph(
    embeddings_onnx: bytes,
    statistics: PackageStatistics,
    *,
    smoothing_sigma: float,
    metadata: Mapping[str, str],
    head: DefectHead | None = None,
) -> bytes:
    """The scoring graph of a network, as ONNX, and statistics of its embeddings, serialised.

    The basis is stored in float16 and cast up once, when a runtime loads the model; arithmetic is float32.
    A NaN or infinite value at any position makes every cell of the map, and the score, NaN.

    Args:
        embeddings_onnx: as :func:`embedding_graph` and :func:`cut_embedding_graph` give it.
        statistics: of its embeddings.
        smoothing_sigma: of the map, in cells; 0 for none.
        metadata: written into the model's ``metadata_props``.
        head: of marked defects; None for none.

    Returns:
        A model with input ``image [N, H, W, 3]`` uint8 BGR and outputs ``score [N]`` and
        ``anomaly_map [N, h, w]`` float32, N dynamic.

    Raises:
        DataError: the network's embeddings are not those the statistics describe.
    """
    whole = onnx.load_from_string(embeddings_onnx)
    graph = whole.graph
    (embeddings,) = graph.output
    num_positions, _, num_channels = (dim.dim_value for dim in embeddings.type.tensor_type.shape.dim)
    height, width = statistics.grid
    if (num_positions, num_channels) != (height * width, statistics.num_channels):
        raise DataError(
            f"the network gives embeddings of {num_channels} channels at {num_positions} positions, the statistics "
            f"describe {statistics.num_channels} on a grid of {height} x {width}"
        )
    if head is not None and (head.grid, head.num_channels) != (statistics.grid, statistics.num_channels):
        raise DataError(
            f"the head is for {head.num_channels} channels on a grid of {list(head.grid)}, the statistics describe "
            f"{statistics.num_channels} on {list(statistics.grid)}"
        )
    ending = GraphBuilder()
    factors = None if head is None else add_head(ending, EMBEDDINGS, head)
    distances = add_distances(ending, EMBEDDINGS, statistics)
    _add_map(ending, distances, factors, grid=statistics.grid, sigma=smoothing_sigma)
    graph.node.extend(ending.nodes)
    graph.initializer.extend(ending.constants)
    del graph.output[:]
    value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph.output.extend(
        [value(SCORE, float32, [BATCH_AXIS]), value(MAP, float32, [BATCH_AXIS, height, width])],
    )
    onnx.helper.set_model_props(whole, dict(metadata))
    return _serialised(whole)


def _serialised(model: onnx.ModelProto) -> bytes:
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    # What lines refuse is not to be written.
    check_operators(data)
    return data


def output_shapes(body: onnx.GraphProto) -> dict[str, list[int]]:
    """The shape of each output by its name, without its batch axis."""
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in body.output}


def _add_embeddings(
    g: GraphBuilder, body: onnx.GraphProto, mixing: Sequence[StageMixing] | None, *, sums_stages: bool
) -> tuple[int, int]:
    """The outputs of ``body`` as ``EMBEDDINGS [P, N, C]``; returns P and C."""
    outputs = output_shapes(body)
    result = EMBEDDINGS.removeprefix(OWN_PREFIX)
    if mixing is None:
        ((num_channels, height, width),) = outputs.values()
        cells = g.integers("cells_shape", 0, num_channels, height * width)
        by_cell = g.node("Reshape", *outputs, cells, result="by_cell")
        g.node("Transpose", by_cell, result=result, perm=[2, 0, 1])
        return height * width, num_channels
    stages = [
        _add_stage(g, f"stage_{index}", maps, shape, mixed)
        for index, ((maps, shape), mixed) in enumerate(zip(outputs.items(), mixing, strict=True))
    ]
    channels = [shape[0] for shape in outputs.values()]
    num_positions = len(mixing[0].rows) * len(mixing[0].columns)
    if sums_stages:
        g.node("Sum", *stages, result=result)
        return num_positions, channels[0]
    g.node("Concat", *stages, result=result, axis=2)
    return num_positions, sum(channels)


def _add_stage(g: GraphBuilder, name: str, maps: str, shape: list[int], mixing: StageMixing) -> str:
    """One stage's maps ``[N, C_s, h_s, w_s]`` on the grid, ``[P, N, C_s]``."""
    channels, _, width = shape
    rows, columns = mixing.rows, mixing.columns
    height_out, width_out = len(rows), len(columns)
    last = g.node("Transpose", maps, result=f"{name}_channels_last", perm=[2, 3, 0, 1])  # [h_s, w_s, N, C_s]
    if not _is_identity(rows):
        flat = g.node("Reshape", last, g.integers(f"{name}_by_row", len(rows[0]), -1), result=f"{name}_rows")
        last = g.node("MatMul", g.constant(f"{name}_row_matrix", rows), flat, result=f"{name}_mixed_rows")
    if not _is_identity(columns):
        flat = g.node("Reshape", last, g.integers(f"{name}_by_column", height_out, width, -1), result=f"{name}_columns")
        last = g.node("MatMul", g.constant(f"{name}_column_matrix", columns), flat, result=f"{name}_mixed_columns")
    positions = g.integers(f"{name}_by_position", height_out * width_out, -1, channels)
    return g.node("Reshape", last, positions, result=name)


def _is_identity(matrix: F32) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == np.eye(len(matrix))).all())


def _add_map(g: GraphBuilder, distances: str, factors: str | None, *, grid: tuple[int, int], sigma: float) -> None:
    """Distances ``[P, N]`` to the smoothed map ``[N, h, w]`` and its maximum, the graph's outputs.

    All distances of an image are multiplied by its factor ``[N, 1, 1]``, if there are factors.
    """
    height, width = grid
    images_first = g.node("Transpose", distances, result="distance", perm=[1, 0])
    shape, name = g.integers("map_shape", 0, height, width), UNSMOOTHED.removeprefix(OWN_PREFIX)
    if factors is None:
        unsmoothed = g.node("Reshape", images_first, shape, result=name)
    else:
        unsmoothed = g.node("Mul", g.node("Reshape", images_first, shape, result="distance_map"), factors, result=name)
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
