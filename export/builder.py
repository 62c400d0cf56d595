"""Nodes and constants of the hand-written part of the scoring graph, and the names that set it apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper

OWN_PREFIX = "edgeflame."
"""Of the names of all nodes and constants outside the backbone."""

INPUT, SCORE, MAP = "image", "score", "anomaly_map"
"""Names of the graph's input and outputs: the contract with the runtimes."""

RGB = "rgb"
"""Where the backbone begins: ``[N, 3, H, W]`` float32, 0..255."""

_PLAIN = (RGB, SCORE, MAP)


class GraphBuilder:
    """Collects nodes and constants, in order; every method returns the full name of what it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        full = f"{OWN_PREFIX}{name}"
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), full))
        return full

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(self, kind: str, *inputs: str, result: str, **attributes: Any) -> str:
        # What the rest of the model refers to keeps its plain name.
        output = result if result in _PLAIN else f"{OWN_PREFIX}{result}"
        self.nodes.append(
            onnx.helper.make_node(kind, list(inputs), [output], name=f"{OWN_PREFIX}{result}", **attributes)
        )
        return output
