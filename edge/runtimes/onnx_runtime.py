"""ONNX Runtime: the CPU everywhere, CUDA where its package was built for it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np

from edge.runtimes.interface import INPUT, MAP, PRECISION_KEY, SCORE, Device, Scores, check_batch
from edgeflame.console import EventLog
from edgeflame.errors import MissingDependencyError, PackageError, RuntimeUnavailableError
from edgeflame.images import MAX_INPUT_SIDE, ImageU8

log = EventLog("runtime")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_LOG_ERRORS_ONLY = 3


class OnnxRuntime:
    """A session of ONNX Runtime whose inputs and outputs are those of a scoring graph."""

    def __init__(self, session: Any, *, failures: tuple[type[Exception], ...]) -> None:
        self._session = session
        self._failures = failures
        self._input_size, self._grid = _read_signature(session)
        self._provider: str = session.get_providers()[0]
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
            scores, maps = self._session.run([SCORE, MAP], {INPUT: batch})
        except self._failures as exc:
            msg = f"ONNX Runtime failed on a batch of {len(batch)} ({_first_line(exc)})"
            raise RuntimeUnavailableError(msg) from exc
        if scores.shape != (len(batch),) or maps.shape != (len(batch), *self._grid):
            msg = f"the graph answered a batch of {len(batch)} with shapes {list(scores.shape)} and {list(maps.shape)}"
            raise PackageError(msg)
        return Scores(np.asarray(scores, dtype=np.float32), np.asarray(maps, dtype=np.float32))


def open_onnx_runtime(model_onnx: bytes, *, device: Device, num_threads: int | None) -> OnnxRuntime:
    """Load a scoring graph into ONNX Runtime; see :func:`edge.runtimes.open_runtime`."""
    session = open_session(model_onnx, device=device, num_threads=num_threads)
    return OnnxRuntime(session, failures=_failures(_import_library()))


def open_session(model_onnx: bytes, *, device: Device, num_threads: int | None) -> Any:
    """Load any graph, with what :func:`open_onnx_runtime` asks of the device, but without looking at its signature."""
    library = _import_library()
    failures = _failures(library)
    providers = _providers(library, device)
    options = library.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    # A model in memory must be whole; one that names files beside it would otherwise read them from the
    # working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        session = library.InferenceSession(model_onnx, options, providers=providers)
    except failures as exc:
        msg = f"the package's graph cannot be loaded by ONNX Runtime {library.__version__} ({_first_line(exc)})"
        raise PackageError(msg) from exc
    running = session.get_providers()[0]
    if running != providers[0]:
        if device != "auto":
            msg = f"asked for {device}, but ONNX Runtime falls back to {running}; is the CUDA driver installed?"
            raise RuntimeUnavailableError(msg)
        log.info("runtime_fell_back", wanted=providers[0], running=running)
    return session


def _import_library() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as exc:
        msg = (
            f"ONNX Runtime is not installed, or damaged ({exc}): pip install 'edgeflame[cpu]', or "
            "'edgeflame[gpu]' on a machine with an NVIDIA GPU (never both)"
        )
        raise MissingDependencyError(msg) from exc
    module: ModuleType = onnxruntime
    return module


def _failures(library: ModuleType) -> tuple[type[Exception], ...]:
    """Every error ONNX Runtime raises; they share no base but Exception. ValueError is from its Python part."""
    state = library.capi.onnxruntime_pybind11_state
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, ValueError)


def _providers(library: ModuleType, device: Device) -> list[str]:
    available = library.get_available_providers()
    if device == "cpu" or (device == "auto" and CUDA not in available):
        return [CPU]
    if CUDA not in available:
        msg = (
            "asked for cuda, but the installed ONNX Runtime has no CUDA: pip uninstall onnxruntime, then "
            "pip install 'edgeflame[gpu]'"
        )
        raise RuntimeUnavailableError(msg)
    return [CUDA, CPU]


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
    if set(inputs) != {INPUT} or set(outputs) != {SCORE, MAP}:
        raise PackageError(msg)
    image, score, anomaly_map = inputs[INPUT], outputs[SCORE], outputs[MAP]
    types = (image.type, score.type, anomaly_map.type)
    if types != ("tensor(uint8)", "tensor(float)", "tensor(float)"):
        raise PackageError(msg)
    if len(image.shape) != 4 or image.shape[3] != 3 or len(score.shape) != 1 or len(anomaly_map.shape) != 3:
        raise PackageError(msg)
    sides = (*image.shape[1:3], *anomaly_map.shape[1:])
    if not all(isinstance(side, int) and 1 <= side <= MAX_INPUT_SIDE for side in sides):
        raise PackageError(msg)
    return (sides[0], sides[1]), (sides[2], sides[3])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
