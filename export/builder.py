"""Nodes and constants of the hand-written part of the scoring graph.

Constants that follow from other constants can be computed ahead (:func:`fold_constants`). ONNX Runtime does so by
itself when it loads a model. TensorRT folds only some of them: of the distances it would keep the products of
constants, and take them again for every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeflame.scoring_graph import MAP, OWN_PREFIX, SCORE

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

    def node(self, kind: str, *inputs: str, result: str, others: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node; ``others`` are results beyond the first, which nothing uses."""
        # What the rest of the model refers to keeps its plain name.
        output = result if result in _PLAIN else f"{OWN_PREFIX}{result}"
        self.nodes.append(
            onnx.helper.make_node(
                kind,
                list(inputs),
                [output, *(f"{OWN_PREFIX}{other}" for other in others)],
                name=f"{OWN_PREFIX}{result}",
                **attributes,
            )
        )
        return output


def fold_constants(model_onnx: bytes) -> bytes:
    """The same graph with the results of its own nodes that depend on constants only stored as constants.

    The backbone is left as it is.
    """
    model = onnx.load_from_string(model_onnx)
    graph = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    ahead: list[onnx.NodeProto] = []
    known = set(constants)
    for node in graph.node:
        if node.name.startswith(OWN_PREFIX) and all(name in known for name in node.input):
            ahead.append(node)
            known.update(node.output)
    made = {name for node in ahead for name in node.output}
    staying = [node for node in graph.node if node.output[0] not in made]
    needed = [name for name in made if any(name in node.input for node in staying)]
    used = {name for node in ahead for name in node.input}
    part = onnx.helper.make_graph(
        ahead,
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(name) for name in needed],
        initializer=[constants[name] for name in constants if name in used],
    )
    values = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=model.opset_import)).run(needed, {})
    still_used = {name for node in staying for name in node.input}
    kept = [entry for name, entry in constants.items() if name in still_used]
    kept += [onnx.numpy_helper.from_array(value, name) for name, value in zip(needed, values, strict=True)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in staying]
    initializers = [onnx.TensorProto.FromString(entry.SerializeToString()) for entry in kept]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    data: bytes = model.SerializeToString()
    return data
