"""ONNX Runtime's library and its sessions, with the options that inspection and fitting share.

Only the CPU has been run so far; the rest follows ONNX Runtime's documentation.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal

from edgeflame.cpus import are_cpus_limited, usable_cpus
from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError
from edgeflame.log import EventLog
from edgeflame.operators import check_operators

log = EventLog("runtime")

Device = Literal["auto", "cpu", "cuda", "ort-tensorrt"]
"""Devices of ONNX Runtime: the CPU, or a GPU by its CUDA or its TensorRT provider. ``auto``: CUDA if it works here,
else the CPU."""

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

_PROVIDERS: dict[Device, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "ort-tensorrt": (TENSORRT, CUDA, CPU),
}
_OPTIONS = {CUDA: {"use_tf32": "0"}}
"""TF32 has ten bits of mantissa; the distance's difference of squares needs float32's."""

_LOG_ERRORS_ONLY = 3


def open_session(model_onnx: bytes, *, device: Device, num_threads: int | None) -> Any:
    """Load a graph into a session; its contract is not checked.

    Args:
        model_onnx: the ONNX model; it need not be trusted.
        device: where it runs.
        num_threads: CPU threads for one call; None: as many as there are cores to use.

    Raises:
        PackageError: the graph cannot be loaded by this runtime, or has operators that no graph of ours has.
        RuntimeUnavailableError: the requested device cannot be used.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    library = import_library()
    failures = failures_of(library)
    providers = _providers(library, device)
    check_operators(model_onnx)
    options = library.SessionOptions()
    # What was checked is what is read: never a model in ONNX Runtime's own format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = _LOG_ERRORS_ONLY
    # A model in memory must be complete; one that names external files would otherwise read them from the
    # working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    # Threads that wait for the next operator must not keep their cores busy between two images.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Nor for long between two operators: the thread that is waited for may be queued for the very core on which
    # another spins, and the image then takes several times as long. Versions of ONNX Runtime before 1.26 ignore it.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    # Without VNNI, integer products of uint8 with int8 are summed in pairs in 16 bits and saturate: exact ones instead.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if num_threads is None and are_cpus_limited():
        num_threads = usable_cpus()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        given = [(name, _OPTIONS.get(name, {})) for name in providers]
        session = library.InferenceSession(model_onnx, options, providers=given)
    except failures as exc:
        raise PackageError(
            f"the package's graph cannot be loaded by ONNX Runtime {library.__version__} ({first_line(exc)})"
        ) from exc
    running = session.get_providers()[0]
    if running != providers[0]:
        if device != "auto":
            raise RuntimeUnavailableError(
                f"asked for {device}, but ONNX Runtime falls back to {running}; is the CUDA driver installed?"
            )
        log.info("runtime_fell_back", wanted=providers[0], running=running)
    return session


def available_devices() -> tuple[Device, ...]:
    """Devices that the installed ONNX Runtime was built for; only loading a model shows whether they work here.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    available = import_library().get_available_providers()
    return tuple(device for device, providers in _PROVIDERS.items() if providers[0] in available)


def import_library() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError(
            f"ONNX Runtime is not installed, or damaged ({exc}): pip install 'edgeflame[cpu]', or "
            "'edgeflame[gpu]' on a machine with an NVIDIA GPU (never both)"
        ) from exc
    module: ModuleType = onnxruntime
    return module


def failures_of(library: ModuleType) -> tuple[type[Exception], ...]:
    """Every error ONNX Runtime raises; they share no base but Exception.

    ValueError is from its Python part, MemoryError and RuntimeError are C++'s own, as its binding hands them on.
    """
    state = library.capi.onnxruntime_pybind11_state
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, ValueError, MemoryError, RuntimeError)


def _providers(library: ModuleType, device: Device) -> tuple[str, ...]:
    available = library.get_available_providers()
    if device == "auto":
        return _PROVIDERS["cuda" if CUDA in available else "cpu"]
    wanted = _PROVIDERS[device]
    if wanted[0] not in available:
        raise RuntimeUnavailableError(
            f"asked for {device}, but the installed ONNX Runtime has no {wanted[0]}: pip uninstall onnxruntime, then "
            "pip install 'edgeflame[gpu]'"
        )
    if device == "ort-tensorrt":
        # NVIDIA's libraries read it when they start; this provider has no option for it.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    return wanted


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one of our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
