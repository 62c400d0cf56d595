"""ONNX Runtime: the CPU everywhere, CUDA and TensorRT where its package was built for them.

Only the CPU has been run so far; the rest follows ONNX Runtime's documentation.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge.runtimes.interface import Device, Scores, check_batch
from edgeflame.cpus import are_cpus_limited, usable_cpus
from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError
from edgeflame.images import MAX_INPUT_SIDE, ImageU8
from edgeflame.log import EventLog
from edgeflame.operators import check_operators
from edgeflame.scoring_graph import INPUT, MAP, PRECISION_KEY, SCORE, UNSMOOTHED, with_unsmoothed_map

log = EventLog("runtime")

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

_PROVIDERS: dict[Device, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "ort-tensorrt": (TENSORRT, CUDA, CPU),
}
_OPTIONS = {CUDA: {"use_tf32": "0"}}
"""TF32 has ten bits of mantissa; the distance's difference of squares needs float32's."""

_LOG_ERRORS_ONLY = 3


class OnnxRuntime:
    """A session of ONNX Runtime whose inputs and outputs are those of a scoring graph."""

    def __init__(self, session: Any, *, failures: tuple[type[Exception], ...]) -> None:
        self._session = session
        self._failures = failures
        self._input_size, self._grid = _read_signature(session)
        self._gives_unsmoothed = any(node.name == UNSMOOTHED for node in session.get_outputs())
        self._provider: str = session.get_providers()[0]
        self._idle: list[_Bound] = []
        self._precision: str = session.get_modelmeta().custom_metadata_map.get(PRECISION_KEY, "fp32")

    @property
    def provider(self) -> str:
        return self._provider

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def input_size(self) -> tuple[int, int]:
        return self._input_size

    @property
    def grid(self) -> tuple[int, int]:
        return self._grid

    def score(self, batch: ImageU8) -> Scores:
        check_batch(batch, self._input_size)
        try:
            # Buffers are used by one thread at a time; there are as many as there were threads at once.
            bound = self._idle.pop()
        except IndexError:
            bound = self._bind(len(batch))
        if len(bound.image) != len(batch):
            bound = self._bind(len(batch))
        np.copyto(bound.image, batch)
        try:
            self._session.run_with_iobinding(bound.binding)
            bound.binding.synchronize_outputs()
        except self._failures as exc:
            raise RuntimeUnavailableError(
                f"ONNX Runtime failed on a batch of {len(batch)} ({_first_line(exc)})"
            ) from exc
        unsmoothed = None if bound.unsmoothed is None else bound.unsmoothed.copy()
        scores = Scores(bound.scores.copy(), bound.maps.copy(), unsmoothed)
        self._idle.append(bound)
        return scores

    def _bind(self, count: int) -> _Bound:
        """Buffers for a batch size, bound in ONNX Runtime once; kept for the next batch of that size."""
        image = np.empty((count, *self._input_size, 3), dtype=np.uint8)
        # NaN until written: if a graph writes fewer values than declared, that shows as a fault.
        scores = np.full(count, np.nan, dtype=np.float32)
        maps = np.full((count, *self._grid), np.nan, dtype=np.float32)
        outputs = {SCORE: scores, MAP: maps}
        if self._gives_unsmoothed:
            outputs[UNSMOOTHED] = np.full_like(maps, np.nan)
        binding = self._session.io_binding()
        binding.bind_input(INPUT, "cpu", 0, image.dtype, image.shape, image.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _Bound(binding, image, scores, maps, outputs.get(UNSMOOTHED))


class _Bound(NamedTuple):
    """Buffers, and the binding that holds their addresses."""

    binding: Any
    image: ImageU8
    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    unsmoothed: npt.NDArray[np.float32] | None


def open_onnx_runtime(model_onnx: bytes, *, device: Device, num_threads: int | None) -> OnnxRuntime:
    """Load a scoring graph into ONNX Runtime; see :func:`edge.runtimes.load.open_runtime`."""
    session = open_session(with_unsmoothed_map(model_onnx), device=device, num_threads=num_threads)
    return OnnxRuntime(session, failures=_failures(_import_library()))


def open_session(model_onnx: bytes, *, device: Device, num_threads: int | None) -> Any:
    """Load any graph into a session, with the options of :func:`open_onnx_runtime`, without checking its contract."""
    library = _import_library()
    failures = _failures(library)
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
    if num_threads is None and are_cpus_limited():
        num_threads = usable_cpus()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        given = [(name, _OPTIONS.get(name, {})) for name in providers]
        session = library.InferenceSession(model_onnx, options, providers=given)
    except failures as exc:
        raise PackageError(
            f"the package's graph cannot be loaded by ONNX Runtime {library.__version__} ({_first_line(exc)})"
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
    available = _import_library().get_available_providers()
    return tuple(device for device, providers in _PROVIDERS.items() if providers[0] in available)


def _import_library() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError(
            f"ONNX Runtime is not installed, or damaged ({exc}): pip install 'edgeflame[cpu]', or "
            "'edgeflame[gpu]' on a machine with an NVIDIA GPU (never both)"
        ) from exc
    module: ModuleType = onnxruntime
    return module


def _failures(library: ModuleType) -> tuple[type[Exception], ...]:
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


def _read_signature(session: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Input size and grid, if inputs and outputs are a scoring graph's.

    Raises:
        PackageError: they are not.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in (*inputs.values(), *outputs.values()))
    msg = (
        f"not a scoring graph: expected {INPUT} tensor(uint8) [N, H, W, 3], {SCORE} tensor(float) [N] and "
        f"{MAP} tensor(float) [N, h, w], got {found}"
    )
    unsmoothed = outputs.pop(UNSMOOTHED, None)
    if set(inputs) != {INPUT} or set(outputs) != {SCORE, MAP}:
        raise PackageError(msg)
    image, score, anomaly_map = inputs[INPUT], outputs[SCORE], outputs[MAP]
    types = (image.type, score.type, anomaly_map.type)
    if types != ("tensor(uint8)", "tensor(float)", "tensor(float)"):
        raise PackageError(msg)
    if len(image.shape) != 4 or image.shape[3] != 3 or len(score.shape) != 1 or len(anomaly_map.shape) != 3:
        raise PackageError(msg)
    if unsmoothed is not None and (unsmoothed.type, unsmoothed.shape[1:]) != (anomaly_map.type, anomaly_map.shape[1:]):
        raise PackageError(msg)
    sides = (*image.shape[1:3], *anomaly_map.shape[1:])
    if not all(isinstance(side, int) and 1 <= side <= MAX_INPUT_SIDE for side in sides):
        raise PackageError(msg)
    return (sides[0], sides[1]), (sides[2], sides[3])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
