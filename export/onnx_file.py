"""A package's graph as an ONNX file of its own, for runtimes other than EdgeFlame's."""

from __future__ import annotations

import google.protobuf.message
import onnx
import onnx.checker
import onnx.helper
import onnx.shape_inference

from edgeflame.errors import PackageError
from edgeflame.images import ImageU8
from edgeflame.operators import check_operators
from edgeflame.package import Package
from export.int8 import Target
from export.precision import Precision, with_precision


def onnx_with_metadata(
    package: Package,
    precision: Precision = "fp32",
    *,
    calibration: ImageU8 | None = None,
    target: Target = "cpu",
) -> bytes:
    """The package's graph, checked, with ``metadata_props`` that describe it to users without the package.

    Args:
        package: the package.
        precision: of its backbone; it, ``calibration`` and ``target`` as in :func:`export.precision.with_precision`.
        calibration: good images.
        target: the runtime that is to run it.

    Raises:
        PackageError: the graph is not valid ONNX.
        NumericalError: a weight does not fit the precision.
    """
    try:
        model = onnx.load_from_string(package.model_onnx)
        onnx.checker.check_model(model, full_check=True)
    except (
        google.protobuf.message.DecodeError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as exc:
        raise PackageError(f"the package's graph is not valid ONNX ({str(exc).strip().splitlines()[0]})") from exc
    model = with_precision(model, precision, calibration=calibration, target=target)
    known = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**known, **export_description(package)})
    data: bytes = model.SerializeToString()
    check_operators(data)
    return data


def export_description(package: Package) -> dict[str, str]:
    """Metadata of the exported file, each key with the prefix ``edgeflame.``."""
    manifest = package.manifest
    given = manifest.learning.input
    roi = given.roi
    facts = {
        "package_sha256": package.sha256,
        "version": manifest.edgeflame_version,
        "created": manifest.created,
        "product": manifest.product,
        "method": manifest.learning.method,
        "threshold": repr(manifest.threshold.value),
        "input": f"uint8 BGR [N, {given.height}, {given.width}, 3], cropped to the roi, resized by {given.resized_by}",
        "roi": "" if roi is None else f"{roi.x},{roi.y},{roi.width},{roi.height}",
    }
    return {f"edgeflame.{key}": value for key, value in facts.items()}
