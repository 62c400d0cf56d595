"""TensorRT engines on disk, and the report that says what each was built from and for.

`edgeflame export --trt` writes them, the line reads them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from edgeflame.errors import PackageError, RuntimeUnavailableError

REPORT = "engines.json"
"""Name of the build report, beside the engines."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One engine file and what it was built from."""

    file: str
    size_bytes: int
    sha256: str
    build_s: float
    compute_capability: str
    precision: str
    max_batch: int
    model_sha256: str
    """Of the ONNX model that was built, in its precision."""
    package_sha256: str
    runtime: str
    runtime_version: str
    reused: bool = False
    """It was there already, unaltered."""


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """All engines in a folder."""

    engines: tuple[EngineRecord, ...] = ()


def read_report(out: Path) -> BuildReport:
    """A folder's build report; empty if there is none, or none that can be read: then all is built again."""
    try:
        return msgspec.json.decode((out / REPORT).read_bytes(), type=BuildReport)
    except (OSError, msgspec.DecodeError):
        return BuildReport()


def find_engine(
    folder: Path, *, package_sha256: str, runtime: str, runtime_version: str, compute_capability: str
) -> tuple[EngineRecord, bytes]:
    """The engine of a package for a runtime and a GPU; of several, the last that was built.

    Args:
        folder: with a build report.
        package_sha256: of the package file.
        runtime: ``tensorrt_rtx`` or ``tensorrt``.
        runtime_version: its exact version; an engine of another is not taken.
        compute_capability: of the GPU, for instance ``8.9``.

    Raises:
        RuntimeUnavailableError: there is none; the message says what there is, and how to build it.
        PackageError: it was cut short or altered since it was built.
    """
    records = read_report(folder).engines
    wanted = (package_sha256, runtime, runtime_version, compute_capability)
    fitting = [record for record in records if _key(record) == wanted]
    if not fitting:
        build = f"edgeflame export --trt --out {folder} --compute-capability {compute_capability}"
        msg = (
            f"{folder} holds no engine of package {package_sha256[:12]} for {runtime} {runtime_version} and compute "
            f"capability {compute_capability}; {_what_there_is(records, package_sha256)}. Build it here: {build}"
        )
        raise RuntimeUnavailableError(msg)
    record = fitting[-1]
    path = folder / record.file
    try:
        # The report is no more to be trusted than the engine: a file is only ever looked for beside it.
        data = (folder / Path(record.file).name).read_bytes()
    except OSError as exc:
        msg = f"{path}: the engine cannot be read ({exc.strerror}); build it again: edgeflame export --trt"
        raise PackageError(msg) from exc
    if hashlib.sha256(data).hexdigest() != record.sha256:
        msg = f"{path}: the engine was cut short or altered since it was built; build it again: edgeflame export --trt"
        raise PackageError(msg)
    return record, data


def _key(record: EngineRecord) -> tuple[str, str, str, str]:
    return record.package_sha256, record.runtime, record.runtime_version, record.compute_capability


def _what_there_is(records: tuple[EngineRecord, ...], package_sha256: str) -> str:
    own = [record for record in records if record.package_sha256 == package_sha256]
    if not own:
        return f"its {len(records)} engines are of other packages" if records else "it holds none at all"
    kinds = {f"{record.runtime} {record.runtime_version} and {record.compute_capability}" for record in own}
    return f"it has those for {'; '.join(sorted(kinds))}"
