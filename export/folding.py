"""Constants of the scoring graph's own part, computed ahead.

ONNX Runtime folds what depends on constants alone when it loads a model. TensorRT folds only some of it: of the
distances it would keep the products of constants, and take them again for every frame.
"""

from __future__ import annotations

import onnx
import onnx.helper
import onnx.numpy_helper
from onnx.reference import ReferenceEvaluator

from export.builder import OWN_PREFIX


def fold_constants(model_onnx: bytes) -> bytes:
    """The same graph with what its own nodes make of constants alone as constants; the backbone is left as it is."""
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
