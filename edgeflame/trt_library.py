"""TensorRT as it is installed here: for RTX (``tensorrt_rtx``) or for Jetson and data-centre GPUs (``tensorrt``)."""

from __future__ import annotations

import importlib
import platform
import re
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from edgeflame.console import EventLog
from edgeflame.errors import MissingDependencyError, RuntimeUnavailableError, UsageError

log = EventLog("tensorrt")

Kind = Literal["rtx", "tensorrt"]
KINDS: tuple[Kind, ...] = get_args(Kind)

DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
"""RTX 30, 40 and 50."""

_MODULES: dict[Kind, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_DEVICE_TREE = Path("/proc/device-tree/model")
_REMEMBERED = 50


class TensorRT:
    """An imported library, with the one logger it takes per process.

    Attributes:
        kind: which it is.
        module: the library.
        version: its own.
        builds_ahead: it builds for GPUs other than the one in this machine, and needs none.
        logger: hands TensorRT's own messages on.
    """

    def __init__(self, kind: Kind, module: ModuleType) -> None:
        self.kind = kind
        self.module: Any = module
        self.version = str(module.__version__)
        self.builds_ahead = hasattr(module, "ComputeCapability")
        self._errors: deque[str] = deque(maxlen=_REMEMBERED)
        self.logger = _make_logger(self.module, self._errors)

    def take_errors(self) -> list[str]:
        """What it complained of since the last call."""
        errors = list(self._errors)
        self._errors.clear()
        return errors

    def capabilities(self) -> list[str]:
        """Compute capabilities it can build for without the GPU at hand, for instance ``8.9``."""
        if not self.builds_ahead:
            return []
        names = [name for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d{2,}", name)]
        return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=float)


_loaded: dict[Kind, TensorRT] = {}


def load_tensorrt(kind: Kind | None = None) -> TensorRT:
    """Import TensorRT, once.

    Args:
        kind: which; None takes the one installed, and ``rtx`` of two.

    Raises:
        MissingDependencyError: none is installed, or it does not load; the message says what this machine needs.
    """
    reasons = []
    for candidate in KINDS if kind is None else (kind,):
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
    msg = f"TensorRT is not installed, or does not load ({'; '.join(reasons)}). {_what_to_install()}"
    raise MissingDependencyError(msg)


def chosen_capabilities(library: TensorRT, asked: tuple[str, ...]) -> list[str]:
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
        own = own_capability()
        wrong = [text for text in asked if _normalised(text) != own]
        if wrong:
            msg = (
                f"tensorrt {library.version} builds for the GPU of this machine alone ({own}), not for {wrong[0]}: "
                "run the export there, or use tensorrt-rtx for RTX GPUs"
            )
            raise UsageError(msg)
        return [own]
    known = library.capabilities()
    chosen = list(dict.fromkeys(_normalised(text) for text in asked or DEFAULT_CAPABILITIES))
    for text in chosen:
        if text not in known:
            msg = (
                f"tensorrt-rtx {library.version} does not build for compute capability {text}, but for "
                f"{', '.join(known)}; a Jetson or a data-centre GPU builds its own with the extra 'tensorrt'"
            )
            raise UsageError(msg)
    return chosen


def _normalised(text: str) -> str:
    digits = text.upper().removeprefix("SM").replace(".", "").replace("_", "")
    if not re.fullmatch(r"[0-9]{2,3}", digits):
        msg = f"a compute capability is written 8.9 (or SM89), not {text!r}"
        raise UsageError(msg)
    return f"{digits[:-1]}.{digits[-1]}"


def own_capability() -> str:
    """Of the first GPU of this machine. Written after NVIDIA's documentation; it has not been run on a GPU."""
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        msg = f"asking the GPU for its compute capability needs cuda-bindings ({exc}): pip install cuda-bindings"
        raise MissingDependencyError(msg) from exc
    parts = []
    for attribute in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        try:
            code, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, attribute), 0)
        except RuntimeError as exc:
            msg = f"an engine is for the GPU of its machine, and there is none here ({exc})"
            raise RuntimeUnavailableError(msg) from exc
        if int(code) != 0:
            msg = f"an engine is for the GPU of its machine, and none can be used here ({code.name})"
            raise RuntimeUnavailableError(msg)
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
