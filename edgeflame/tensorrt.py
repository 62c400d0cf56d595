"""TensorRT as it is installed here, and the engines on disk that it built.

The library is one for RTX (``tensorrt_rtx``) or one for Jetson and data-centre GPUs (``tensorrt``). Beside the
engines lies a report that says what each was built from and for: `edgeflame export --trt` writes them,
`edgeflame inspect` and `bench` read them.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import re
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import msgspec

from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError, UsageError
from edgeflame.log import EventLog

log = EventLog("tensorrt")

TensorRTKind = Literal["rtx", "tensorrt"]
TENSORRT_KINDS: tuple[TensorRTKind, ...] = get_args(TensorRTKind)

DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
"""RTX 30, 40 and 50."""

_MODULES: dict[TensorRTKind, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_DEVICE_TREE = Path("/proc/device-tree/model")
_MAX_KEPT_ERRORS = 50


class TensorRT:
    """An imported library, with the one logger that it accepts per process.

    Attributes:
        kind: which it is.
        module: the library.
        version: its own.
        builds_ahead: it builds for GPUs other than the one in this machine, and needs none.
        logger: hands TensorRT's own messages on.
    """

    def __init__(self, kind: TensorRTKind, module: ModuleType) -> None:
        self.kind = kind
        self.module: Any = module
        self.version = str(module.__version__)
        self.builds_ahead = hasattr(module, "ComputeCapability")
        self._errors: deque[str] = deque(maxlen=_MAX_KEPT_ERRORS)
        self.logger = _make_logger(self.module, self._errors)

    def take_errors(self) -> list[str]:
        """The messages of errors that it logged since the last call."""
        errors = list(self._errors)
        self._errors.clear()
        return errors

    def capabilities(self) -> list[str]:
        """Compute capabilities it can build for without the GPU at hand, for instance ``8.9``."""
        if not self.builds_ahead:
            return []
        names = [name for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d{2,}", name)]
        return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=float)


_loaded: dict[TensorRTKind, TensorRT] = {}


def load_tensorrt(kind: TensorRTKind | None = None) -> TensorRT:
    """Import TensorRT, once.

    Args:
        kind: which; None takes the one installed, and ``rtx`` of two.

    Raises:
        MissingDependencyError: none is installed, or it does not load; the message says what this machine needs.
    """
    reasons = []
    for candidate in TENSORRT_KINDS if kind is None else (kind,):
        if candidate in _loaded:
            return _loaded[candidate]
        try:
            module = importlib.import_module(_MODULES[candidate])
        except (ImportError, OSError, RuntimeError) as exc:
            # OSError: a library of CUDA or of TensorRT itself is not where the loader looks.
            reasons.append(f"{_MODULES[candidate]}: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}")
            continue
        _loaded[candidate] = TensorRT(candidate, module)
        return _loaded[candidate]
    raise MissingDependencyError(
        f"TensorRT is not installed, or does not load ({'; '.join(reasons)}). {_what_to_install()}"
    )


def select_capabilities(library: TensorRT, asked: tuple[str, ...]) -> list[str]:
    """Compute capabilities to build for, written ``8.9``.

    Args:
        library: what builds.
        asked: ``8.9``, ``89`` or ``SM89``, any number; empty for the default: ``DEFAULT_CAPABILITIES``, or the
            GPU of this machine where the library builds for no other.

    Raises:
        UsageError: it does not build for one of them.
        RuntimeUnavailableError: the GPU of this machine is needed and cannot be had.
    """
    if not library.builds_ahead:
        own = device_capability()
        wrong = [text for text in asked if _normalised(text) != own]
        if wrong:
            raise UsageError(
                f"tensorrt {library.version} builds for the GPU of this machine alone ({own}), not for {wrong[0]}: "
                "run the export there, or use tensorrt-rtx for RTX GPUs"
            )
        return [own]
    known = library.capabilities()
    chosen = list(dict.fromkeys(_normalised(text) for text in asked or DEFAULT_CAPABILITIES))
    for text in chosen:
        if text not in known:
            raise UsageError(
                f"tensorrt-rtx {library.version} does not build for compute capability {text}, but for "
                f"{', '.join(known)}; a Jetson or a data-centre GPU builds its own with the extra 'tensorrt'"
            )
    return chosen


def _normalised(text: str) -> str:
    digits = text.upper().removeprefix("SM").replace(".", "").replace("_", "")
    if not re.fullmatch(r"[0-9]{2,3}", digits):
        raise UsageError(f"a compute capability is written 8.9 (or SM89), not {text!r}")
    return f"{digits[:-1]}.{digits[-1]}"


def device_capability() -> str:
    """The compute capability of this machine's first GPU, ``8.9`` say.

    Written after NVIDIA's documentation; it has not been run on a GPU.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise MissingDependencyError(
            f"asking the GPU for its compute capability needs cuda-bindings ({exc}): pip install cuda-bindings"
        ) from exc
    parts = []
    for attribute in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        try:
            code, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, attribute), 0)
        except RuntimeError as exc:
            raise RuntimeUnavailableError(
                f"an engine is for the GPU of its machine, and there is none here ({exc})"
            ) from exc
        if int(code) != 0:
            raise RuntimeUnavailableError(
                f"an engine is for the GPU of its machine, and none can be used here ({code.name})"
            )
        parts.append(int(value))
    return f"{parts[0]}.{parts[1]}"


def _what_to_install() -> str:
    if _is_jetson():
        return (
            "On this Jetson it comes with JetPack: sudo apt install python3-libnvinfer, and a virtual environment made "
            "with --system-site-packages"
        )
    if platform.machine() != "x86_64":
        return "On a data-centre GPU: pip install 'edgeflame[tensorrt]'; on a Jetson it comes with JetPack"
    return (
        "For RTX GPUs, also to build for them without one: pip install 'edgeflame[rtx]'; on a data-centre GPU: "
        "pip install 'edgeflame[tensorrt]'; on a Jetson it comes with JetPack"
    )


def _is_jetson() -> bool:
    try:
        return "jetson" in _DEVICE_TREE.read_text(errors="replace").lower()
    except OSError:
        return False


def _make_logger(module: Any, errors: deque[str]) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # The binding's own constructor, which `super()` does not reach.
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                errors.append(" ".join(message.split()))
            elif severity == module.ILogger.WARNING:
                log.debug("tensorrt_warning", message=" ".join(message.split()))

    return Logger()


ENGINE_REPORT_FILE = "engines.json"
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


def read_build_report(out: Path) -> BuildReport:
    """A folder's build report; empty if there is none, or none that can be read: then all is built again."""
    try:
        return msgspec.json.decode((out / ENGINE_REPORT_FILE).read_bytes(), type=BuildReport)
    except (OSError, msgspec.DecodeError, RecursionError):
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
    records = read_build_report(folder).engines
    wanted = (package_sha256, runtime, runtime_version, compute_capability)
    fitting = [record for record in records if _engine_key(record) == wanted]
    if not fitting:
        build = f"edgeflame export --trt --out {folder} --compute-capability {compute_capability}"
        raise RuntimeUnavailableError(
            f"{folder} holds no engine of package {package_sha256[:12]} for {runtime} {runtime_version} and compute "
            f"capability {compute_capability}; {_available_engines(records, package_sha256)}. Build it here: {build}"
        )
    record = fitting[-1]
    path = folder / record.file
    try:
        # The report is no more to be trusted than the engine: a file is only ever looked for beside it.
        data = (folder / Path(record.file).name).read_bytes()
    except OSError as exc:
        raise PackageError(
            f"{path}: the engine cannot be read ({exc.strerror}); build it again: edgeflame export --trt"
        ) from exc
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise PackageError(
            f"{path}: the engine was cut short or altered since it was built; build it again: edgeflame export --trt"
        )
    return record, data


def _engine_key(record: EngineRecord) -> tuple[str, str, str, str]:
    return record.package_sha256, record.runtime, record.runtime_version, record.compute_capability


def _available_engines(records: tuple[EngineRecord, ...], package_sha256: str) -> str:
    own = [record for record in records if record.package_sha256 == package_sha256]
    if not own:
        return f"its {len(records)} engines are of other packages" if records else "it holds none at all"
    kinds = {f"{record.runtime} {record.runtime_version} and {record.compute_capability}" for record in own}
    return f"it has those for {'; '.join(sorted(kinds))}"
