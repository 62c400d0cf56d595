"""TensorRT engines of a scoring graph, one file for each kind of GPU.

tensorrt-rtx builds for GPUs that are not in this machine; tensorrt (JetPack 6's 10.3 and later) builds on the device.
One recipe serves both: a typed graph, parsed and built strongly typed, with TF32 off, so that float32 means float32.
What a library lacks is found by ``hasattr``, not by its version. Only tensorrt-rtx's part has been run so far.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgeflame.errors import PackageError, RuntimeUnavailableError, StorageError
from edgeflame.scoring_graph import INPUT, with_unsmoothed_map
from edgeflame.state import atomic_write, write_json
from edgeflame.tensorrt import ENGINE_REPORT_FILE, BuildReport, EngineRecord, TensorRT, read_build_report
from export.precision import Precision


def build_engines(
    library: TensorRT,
    model_onnx: bytes,
    out: Path,
    *,
    capabilities: Sequence[str],
    precision: Precision,
    max_batch: int,
    package_sha256: str,
    started: Callable[[str], None] = lambda _: None,
) -> list[EngineRecord]:
    """Build an engine for each compute capability, unless it is there already.

    Each file is written whole or not at all, under a name keyed by model, runtime, capability, precision and largest
    batch, so that none is ever taken for another. The folder's build report is brought up to date after each.

    Args:
        library: builds.
        model_onnx: a scoring graph, typed in ``precision``.
        out: folder; made if missing.
        capabilities: for instance ``8.9``.
        precision: of ``model_onnx``, for name and report.
        max_batch: the most images at once.
        package_sha256: of the package, for the report.
        started: called with each file's name before it is built.

    Raises:
        RuntimeUnavailableError: TensorRT cannot take the graph; the message names the ONNX node.
        StorageError: a file cannot be written; older ones are intact.
    """
    model_onnx = with_unsmoothed_map(model_onnx)
    model_sha256 = hashlib.sha256(model_onnx).hexdigest()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(f"{out}: cannot be used as a folder ({exc.strerror})") from exc
    known = {record.file: record for record in read_build_report(out).engines}
    records = []
    for capability in capabilities:
        generation = f"sm{capability.replace('.', '')}"
        file = f"{model_sha256[:12]}-{precision}-b{max_batch}-{generation}-{library.kind}{library.version}.engine"
        record = _reusable(out, known.get(file), model_sha256)
        if record is None:
            started(file)
            start = time.monotonic()
            cache = out / f".timing-{generation}-{library.kind}{library.version}.cache"
            engine = _build(library, model_onnx, capability, max_batch=max_batch, timing_cache=cache)
            seconds = time.monotonic() - start
            atomic_write(out / file, engine)
            record = EngineRecord(
                file=file,
                size_bytes=len(engine),
                sha256=hashlib.sha256(engine).hexdigest(),
                build_s=round(seconds, 2),
                compute_capability=capability,
                precision=precision,
                max_batch=max_batch,
                model_sha256=model_sha256,
                package_sha256=package_sha256,
                runtime=library.module.__name__,
                runtime_version=library.version,
            )
            known[file] = record
            report = BuildReport(engines=tuple(known[name] for name in sorted(known)))
            write_json(out / ENGINE_REPORT_FILE, report, indent=2)
        records.append(record)
    return records


def _reusable(out: Path, record: EngineRecord | None, model_sha256: str) -> EngineRecord | None:
    """The record of a file that is still what was written, else None: one cut short is built again."""
    if record is None or record.model_sha256 != model_sha256:
        return None
    try:
        data = (out / record.file).read_bytes()
    except OSError:
        return None
    same = hashlib.sha256(data).hexdigest() == record.sha256
    return msgspec.structs.replace(record, reused=True) if same else None


def _build(library: TensorRT, model_onnx: bytes, capability: str, *, max_batch: int, timing_cache: Path) -> bytes:
    trt = library.module
    library.take_errors()
    builder = trt.Builder(library.logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse(model_onnx):
        raise RuntimeUnavailableError(_parser_message(library, parser))
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if library.builds_ahead:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    cache = None if library.builds_ahead else _load_timing_cache(config, timing_cache)
    sides = tuple(network.get_input(0).shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, (1, *sides), (1, *sides), (max_batch, *sides))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        why = "; ".join(library.take_errors()) or "it does not say why"
        raise RuntimeUnavailableError(
            f"{trt.__name__} {library.version} cannot build the graph for compute capability {capability}: {why}"
        )
    if cache is not None:
        atomic_write(timing_cache, bytes(cache.serialize()))
    return bytes(serialized)


def _strongly_typed(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    # From version 11 on every network is, and the flag may go; EXPLICIT_BATCH has been without effect since 10.
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _load_timing_cache(config: Any, path: Path) -> Any:
    """Measured kernels of earlier builds on this device. tensorrt-rtx measures none when it builds ahead."""
    if not hasattr(config, "create_timing_cache"):
        return None
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    # One of another device or version is refused by TensorRT: begin anew.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _parser_message(library: TensorRT, parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        raise PackageError(
            f"the graph cannot be read by TensorRT ({'; '.join(library.take_errors()) or 'no reason given'})"
        )
    first = errors[0]
    name, operator = _error_text(first, "node_name"), _error_text(first, "node_operator")
    node = f"the ONNX node {name!r} ({operator})" if name or operator else "the graph"
    more = f", and {len(errors) - 1} more errors" if len(errors) > 1 else ""
    described = " ".join(str(first.desc()).split())
    return f"{library.module.__name__} {library.version} does not take {node}: {described}{more}"


def _error_text(error: Any, name: str) -> str:
    return str(getattr(error, name)()) if hasattr(error, name) else ""
