"""The network of a model as ONNX, written by PyTorch's exporter, and the scoring graph made of it.

Axes: N images, h x w the patch grid, C channels, C_s channels of one stage on its own h_s x w_s.

A network that tells its stages apart (:class:`StagedNetwork`) is exported up to them; :mod:`export.graph` puts them on
the grid. This is the one module of the export that needs PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeflame.errors import NumericalError
from edgeflame.images import Preprocessing
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.head import DefectHead
from export.builder import RGB
from export.graph import OPSET, StageMixing, complete_graph, embedding_graph, output_shapes


@runtime_checkable
class StagedNetwork(Protocol):
    """A network whose embeddings are its stages' maps, each put on the grid, concatenated over channels or summed."""

    @property
    def sums_stages(self) -> bool:
        """Whether stages are summed, not concatenated over channels."""
        ...

    def stage_maps(self, rgb: Tensor) -> Sequence[Tensor]:
        """``[N, C_s, h_s, w_s]`` of each stage."""
        ...

    def on_grid(self, stage: Tensor) -> Tensor:
        """``[N, C_s, h, w]``: linear, the same for every channel, rows apart from columns."""
        ...


def embedding_graph_of(network: nn.Module, preprocessing: Preprocessing) -> bytes:
    """The way from a pre-processed camera image to its embeddings, as a serialised ONNX model.

    Args:
        network: maps ``rgb [N, 3, H, W]`` float32 0..255 to ``[N, C, h, w]`` float32, normalisation inside. One that
            is also a :class:`StagedNetwork` gives a faster graph.
        preprocessing: gives H and W.

    Returns:
        The model that :func:`export.graph.embedding_graph` describes.

    Raises:
        NumericalError: a weight of the network is NaN or infinite.
    """
    body = export_network(network, preprocessing).graph
    mixing, sums_stages = None, False
    if isinstance(network, StagedNetwork):
        mixing = [_mixing(network, shape[1:]) for shape in output_shapes(body).values()]
        sums_stages = network.sums_stages
    return embedding_graph(body, mixing=mixing, sums_stages=sums_stages, preprocessing=preprocessing)


def scoring_graph(
    network: nn.Module,
    statistics: PackageStatistics,
    *,
    preprocessing: Preprocessing,
    smoothing_sigma: float,
    metadata: Mapping[str, str],
    head: DefectHead | None = None,
) -> bytes:
    """The whole way from a pre-processed camera image to its score, as :func:`export.graph.complete_graph` gives it.

    Args:
        network: as :func:`embedding_graph_of` takes it.
        statistics: of its embeddings.
        preprocessing: gives H and W.
        smoothing_sigma: of the map, in cells; 0 for none.
        metadata: written into the model's ``metadata_props``.
        head: of marked defects, if there is one.

    Raises:
        DataError: the network's embeddings are not those the statistics describe.
        NumericalError: a weight of the network is NaN or infinite.
    """
    base = embedding_graph_of(network, preprocessing)
    return complete_graph(base, statistics, smoothing_sigma=smoothing_sigma, metadata=metadata, head=head)


def export_network(network: nn.Module, preprocessing: Preprocessing) -> onnx.ModelProto:
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
            opset_version=OPSET,
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


def _mixing(network: StagedNetwork, size: list[int]) -> StageMixing:
    """What ``on_grid`` does to rows and columns of a stage of ``size`` h_s, w_s, found by trying it.

    It keeps constants, so that a map with one row of ones shows what becomes of that row.
    """
    height, width = size
    with torch.no_grad():
        one_row = network.on_grid(torch.eye(height)[:, None, :, None].expand(-1, -1, -1, width).contiguous())
        one_column = network.on_grid(torch.eye(width)[:, None, None, :].expand(-1, -1, height, -1).contiguous())
    return StageMixing(
        rows=np.ascontiguousarray(one_row[:, 0, :, 0].numpy().T),
        columns=np.ascontiguousarray(one_column[:, 0, 0, :].numpy().T),
    )


class _Stages(nn.Module):
    """A staged network up to its stages."""

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.stage_maps(rgb))
