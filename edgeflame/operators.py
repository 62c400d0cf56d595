"""What a package's graph may be made of: pure operators whose work is bounded by the sizes of their tensors.

A graph is a program, and a runtime runs whatever it says. What EdgeFlame exports computes a score from an image and
needs no loops, branches, sequences, random numbers, text or files; so a graph that has any is none of ours, and is
refused before a runtime sees it. The list is of operators of ONNX's own domain, and wider than what is written today:
the export checks its graphs by it, so whatever it writes can be run.

The graph is read without the package ``onnx``, which a line does not need: of the few messages that matter, by the wire
format of Protocol Buffers and the field numbers of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edgeflame.errors import PackageError

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil
    Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCTIONS = """
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare TopK Hardmax LogSoftmax Softmax
"""
_LINEAR = """
    Attention Conv ConvInteger ConvTranspose DeformConv Einsum Gemm MatMul MatMulInteger QLinearConv QLinearMatMul
"""
_POOLING_AND_NORMALISATION = """
    AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool BatchNormalization GroupNormalization
    InstanceNormalization LRN LayerNormalization LpNormalization MeanVarianceNormalization RMSNormalization
"""
_LAYOUT = """
    AffineGrid CenterCropPad Col2Im Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather
    GatherElements GatherND GridSample OneHot Pad Range Reshape Resize RoiAlign ScatterElements ScatterND Shape Size
    Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze Upsample
"""
_QUANTISATION = "DequantizeLinear DynamicQuantizeLinear QuantizeLinear"

ALLOWED_OPERATORS = frozenset(
    " ".join((_ELEMENTWISE, _REDUCTIONS, _LINEAR, _POOLING_AND_NORMALISATION, _LAYOUT, _QUANTISATION)).split()
)
"""Operators of the domain ``ai.onnx`` that a graph may have; no other domain may be used."""

_DOMAINS = frozenset({"", "ai.onnx"})


def check_operators(model_onnx: bytes) -> None:
    """Make sure that a graph has nothing but allowed operators, and all of its data in itself.

    Raises:
        PackageError: it has something else, or is no ONNX model.
    """
    # ONNX Runtime takes a format of its own as well, which this could not look into.
    if model_onnx[4:8] == b"ORTM":
        raise _refused("it is in ONNX Runtime's own format")
    try:
        _check_model(memoryview(model_onnx))
    except (IndexError, UnicodeDecodeError, RecursionError) as exc:
        raise _refused("it is no ONNX model, or cut short") from exc


def _check_model(model: memoryview) -> None:
    has_graph = False
    for field in _fields(model):
        match field.number:
            case 7:  # graph
                has_graph = True
                _check_graph(field.data)
            case 20 | 25:  # training_info, functions
                raise _refused("it has functions or training steps of its own")
    if not has_graph:
        raise _refused("there is no graph in it")


def _check_graph(graph: memoryview) -> None:
    for field in _fields(graph):
        match field.number:
            case 1:  # node
                _check_node(field.data)
            case 5:  # initializer
                _check_tensor(field.data)
            case 15:  # sparse_initializer
                raise _refused("it has sparse tensors")


def _check_node(node: memoryview) -> None:
    kind, domain = "", ""
    for field in _fields(node):
        match field.number:
            case 4:  # op_type
                kind = str(field.data, "utf-8")
            case 7:  # domain
                domain = str(field.data, "utf-8")
            case 5:  # attribute
                _check_attribute(field.data)
    if domain not in _DOMAINS:
        raise _refused(f"it has an operator {kind[:40]!r} of the domain {domain[:40]!r}")
    if kind not in ALLOWED_OPERATORS:
        raise _refused(f"it has an operator {kind[:40]!r}")


def _check_attribute(attribute: memoryview) -> None:
    for field in _fields(attribute):
        match field.number:
            case 5 | 10:  # t, tensors
                _check_tensor(field.data)
            case 6 | 11:  # g, graphs
                raise _refused("it has graphs within its operators")
            case 22 | 23:  # sparse_tensor, sparse_tensors
                raise _refused("it has sparse tensors")


def _check_tensor(tensor: memoryview) -> None:
    for field in _fields(tensor):
        # external_data, data_location
        if field.number == 13 or (field.number == 14 and field.value != 0):
            raise _refused("it names files outside of the package")


def _refused(why: str) -> PackageError:
    return PackageError(
        f"the package's graph cannot be loaded by ONNX Runtime here: {why}, which no graph of EdgeFlame's export does"
    )


class _Field(NamedTuple):
    number: int
    value: int
    """Of a number; of everything else 0."""
    data: memoryview
    """Of text and messages; of numbers empty."""


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of a message, each occurrence: where the format says that the last one counts, all are looked at.

    Raises:
        IndexError: it is cut short, or no message.
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise IndexError(at)
        value, data = 0, message[:0]
        match wire_type:
            case 0:
                value, at = _varint(message, at)
            case 1 | 5:
                at += 8 if wire_type == 1 else 4
            case 2:
                size, at = _varint(message, at)
                data = message[at : at + size]
                at += size
            case _:
                raise IndexError(at)
        if at > end:
            raise IndexError(at)
        yield _Field(number, value, data)


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(at)
