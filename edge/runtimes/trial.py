"""The first run of a graph that is not known yet: in a process of its own, with a bound on its time.

Whatever the graph does to its runtime (endless work, memory without bound, a crash in native code) ends that process,
and not the line's. Run as a program, it reads a graph from standard input and writes what came of it as JSON.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from edge.runtimes.onnx_runtime import open_onnx_runtime
from edgeflame.errors import (
    EdgeFlameError,
    MissingDependencyError,
    PackageError,
    RuntimeUnavailableError,
    StorageError,
)
from edgeflame.onnx_session import import_library
from edgeflame.state import is_claimed, read_json, write_record

TRIAL_TIMEOUT_S = 120.0
"""A large backbone takes seconds for an image on a slow CPU, with all of its start a few more."""

TRIED_FILE, MAX_REMEMBERED = "tried-graphs.json", 100

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = "import sys; sys.path[0] = sys.argv[1]; from edge.runtimes.trial import run_trial; run_trial()"
_KINDS: dict[str, type[EdgeFlameError]] = {
    kind.__name__: kind for kind in (PackageError, RuntimeUnavailableError, MissingDependencyError)
}


class _Outcome(msgspec.Struct):
    kind: str | None = None
    """Name of the error; None if there was none."""
    text: str = ""


def try_graph(model_onnx: bytes, *, timeout_s: float = TRIAL_TIMEOUT_S) -> None:
    """Load a graph on the CPU and score one grey image with it, in a process of its own.

    Raises:
        PackageError: it cannot be loaded or run, does not end within ``timeout_s``, or ends its process.
        RuntimeUnavailableError: the runtime failed, for instance out of memory.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(_ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with child:
        try:
            answer, _ = child.communicate(model_onnx, timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise PackageError(f"the package's graph does not score an image within {timeout_s:g} s") from exc
        finally:
            child.kill()
    try:
        outcome = msgspec.json.decode(answer.rpartition(b"\n")[2], type=_Outcome)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PackageError(
            f"the package's graph ended the process that tried it (exit code {child.returncode}): killed for its "
            "memory, or a crash in ONNX Runtime"
        ) from exc
    if outcome.kind is not None:
        raise _KINDS.get(outcome.kind, PackageError)(outcome.text)


class TriedGraphs:
    """Packages whose graph has run here once, by SHA-256 and version of ONNX Runtime.

    Args:
        state: the line's state folder, where they are remembered over restarts once a daemon has run with it; None:
            they are not.
    """

    def __init__(self, state: Path | None = None) -> None:
        self._state = state
        self._known: list[str] = []
        if state is not None and is_claimed(state, "line"):
            # Without what it says, graphs are tried again.
            with contextlib.suppress(StorageError):
                record = read_json(state / TRIED_FILE, _Tried, advice="it is made again")
                self._known = [] if record is None else record.tried

    def __contains__(self, package_sha256: object) -> bool:
        return _tried_as(package_sha256) in self._known

    def add(self, package_sha256: str) -> None:
        """Remember one."""
        self._known = [*self._known, _tried_as(package_sha256)][-MAX_REMEMBERED:]
        if self._state is not None and is_claimed(self._state, "line"):
            with contextlib.suppress(StorageError):
                write_record(self._state / TRIED_FILE, _Tried(tried=self._known))


class _Tried(msgspec.Struct):
    tried: list[str] = []


def _tried_as(package_sha256: object) -> str:
    return f"{package_sha256} onnxruntime {import_library().__version__}"


def run_trial() -> None:
    """The process's program."""
    # The line's inspection goes first, and of all processes this is to be killed where memory runs out.
    os.nice(10)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    outcome = _Outcome()
    try:
        runtime = open_onnx_runtime(sys.stdin.buffer.read(), device="cpu", num_threads=None)
        runtime.score(np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8))
    except EdgeFlameError as exc:
        outcome = _Outcome(kind=type(exc).__name__, text=str(exc))
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(outcome))
