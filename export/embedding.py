"""From the network's maps to embeddings, one row a position, in the scoring graph.

Axes: N images, h x w the patch grid, P = h * w positions, C channels, C_s channels of one stage on its own h_s x w_s.

A network that tells its stages apart (:class:`StagedNetwork`) is exported up to them. Resizing to the grid and
averaging with neighbours are linear, and rows are apart from columns, so both together are two products with small
constant matrices. They are taken with the channels last, where the distances want them, and where a stage is still
small. (On a CPU this halves the time between backbone and distances: resizing, averaging and transposing the whole
embedding take three passes over it.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from edgeflame.errors import DataError, NumericalError
from edgeflame.images import Preprocessing
from export.builder import RGB, GraphBuilder

F32 = npt.NDArray[np.float32]

EMBEDDINGS = "embeddings"
"""Result of :func:`add_embeddings`: ``[P, N, C]`` float32."""


@runtime_checkable
class StagedNetwork(Protocol):
    """A network whose embeddings are its stages' maps, each put on the grid, concatenated over channels or summed."""

    @property
    def sums_stages(self) -> bool:
        """Summed, not concatenated."""
        ...

    def stage_maps(self, rgb: Tensor) -> Sequence[Tensor]:
        """``[N, C_s, h_s, w_s]`` of each stage."""
        ...

    def on_grid(self, stage: Tensor) -> Tensor:
        """``[N, C_s, h, w]``: linear, the same for every channel, rows apart from columns."""
        ...


def export_network(network: nn.Module, preprocessing: Preprocessing, *, opset: int) -> onnx.ModelProto:
    """The network as ONNX, from ``rgb`` to its stages' maps or, if it has none, its embeddings ``[N, C, h, w]``.

    Raises:
        NumericalError: a weight is NaN or infinite.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            # ReLU6 would clip a NaN to a number and hide the fault.
            raise NumericalError(f"the network's {name} holds NaN or infinite values")
    frozen = copy.deepcopy(network).cpu().eval()
    for module in frozen.modules():
        if hasattr(module, "inplace"):
            # The exporter has to take in-place activations apart again, which takes it as long as all the rest.
            module.inplace = False  # type: ignore[assignment]  # torch types every attribute as a tensor
    # With an example batch of one the exporter would make the batch axis static.
    example = torch.zeros(2, 3, preprocessing.height, preprocessing.width)
    with torch.no_grad():
        program = torch.onnx.export(
            _Stages(frozen).eval() if isinstance(frozen, StagedNetwork) else frozen,
            (example,),
            input_names=[RGB],
            dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        # Traces of the exporting machine's source files.
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def add_embeddings(
    g: GraphBuilder, network: nn.Module, body: onnx.GraphProto, *, grid: tuple[int, int], num_channels: int
) -> str:
    """What follows the exported network ``body``: its maps as embeddings ``[P, N, C]``.

    Raises:
        DataError: the network gives embeddings of another grid or number of channels.
    """
    outputs = {value.name: _shape(value) for value in body.output}
    if isinstance(network, StagedNetwork):
        mixing = {name: _mixing(network, shape[1:]) for name, shape in outputs.items()}
        channels = [shape[0] for shape in outputs.values()]
        found = [channels[0] if network.sums_stages else sum(channels), *next(iter(mixing.values()))[2]]
    else:
        (found,) = outputs.values()
    if found != [num_channels, *grid]:
        raise DataError(
            f"the network gives embeddings of shape {found} (C, h, w), the statistics describe {[num_channels, *grid]}"
        )
    if not isinstance(network, StagedNetwork):
        by_cell = g.node(
            "Reshape", *outputs, g.integers("cells_shape", 0, num_channels, grid[0] * grid[1]), result="by_cell"
        )
        return g.node("Transpose", by_cell, result=EMBEDDINGS, perm=[2, 0, 1])
    stages = [_stage(g, f"stage_{index}", name, outputs[name], mixing[name][:2]) for index, name in enumerate(outputs)]
    if network.sums_stages:
        return g.node("Sum", *stages, result=EMBEDDINGS)
    return g.node("Concat", *stages, result=EMBEDDINGS, axis=2)


def _stage(g: GraphBuilder, name: str, maps: str, shape: list[int], matrices: tuple[F32, F32]) -> str:
    """One stage's maps ``[N, C_s, h_s, w_s]`` on the grid, ``[P, N, C_s]``."""
    channels, _, width = shape
    rows, columns = matrices
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


def _mixing(network: StagedNetwork, size: list[int]) -> tuple[F32, F32, tuple[int, int]]:
    """What ``on_grid`` does to rows ``[h, h_s]`` and to columns ``[w, w_s]``, found by asking it, and h and w.

    It keeps constants, so that a map with one row of ones shows what becomes of that row.
    """
    height, width = size
    with torch.no_grad():
        one_row = network.on_grid(torch.eye(height)[:, None, :, None].expand(-1, -1, -1, width).contiguous())
        one_column = network.on_grid(torch.eye(width)[:, None, None, :].expand(-1, -1, height, -1).contiguous())
    rows: F32 = np.ascontiguousarray(one_row[:, 0, :, 0].numpy().T)
    columns: F32 = np.ascontiguousarray(one_column[:, 0, 0, :].numpy().T)
    return rows, columns, (len(rows), len(columns))


def _is_identity(matrix: F32) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == np.eye(len(matrix))).all())


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """Of an output, without its batch axis."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]


class _Stages(nn.Module):
    """A staged network up to its stages."""

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.stage_maps(rgb))
