"""The doctor's checks of the machine: Python, runtimes, GPU, cameras, clock, disk, and our systemd services.

None needs anything but the bare install.
"""

from __future__ import annotations

import datetime as dt
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edgeflame.findings import Finding, note, ok, problem

MIN_PYTHON = (3, 10)
MIN_FREE_BYTES = 2 << 30
"""A day of results and evidence pictures on a busy line."""
MIN_FREE_SHARED_BYTES = 250_000_000
"""Live cameras' images lie in it; containers have 64 MB unless they are given more."""
_GPU_TIMEOUT_S = 10.0
_TRAINING = ("torch", "torchvision", "timm", "sklearn", "onnx", "onnxscript")


def check_machine(state: Path | None) -> Iterator[Finding]:
    """Run all checks of the machine.

    Args:
        state: the folder whose disk is looked at; the current one if None.
    """
    yield _python()
    yield from _onnxruntime()
    yield _training()
    yield _gpu()
    yield from _tensorrt()
    yield _cameras()
    yield _clock()
    yield _disk(state or Path.cwd())
    yield from _shared_memory()
    if state is not None:
        yield _state(state)


def distribution_version(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        return problem("python", text, "install Python 3.10 or later")
    if sys.platform != "linux":
        return note("python", text, "Linux is what EdgeFlame is made for and tested on")
    return ok("python", text)


def _onnxruntime() -> Iterator[Finding]:
    installed = {name: found for name in ("onnxruntime", "onnxruntime-gpu") if (found := distribution_version(name))}
    if not installed:
        yield problem("onnxruntime", "not installed: nothing can be inspected", "pip install 'edgeflame[cpu]'")
        return
    names = ", ".join(f"{name} {found}" for name, found in installed.items())
    if len(installed) > 1:
        yield problem(
            "onnxruntime",
            f"{names} are both installed; each overwrites files of the other",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'edgeflame[cpu]' or 'edgeflame[gpu]'",
        )
        return
    try:
        runtime = importlib.import_module("onnxruntime")
        providers = [name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers()]
    except (ImportError, AttributeError, OSError) as exc:
        yield problem(
            "onnxruntime", f"{names} does not load: {exc}", f"pip install --force-reinstall {next(iter(installed))}"
        )
        return
    yield ok("onnxruntime", f"{names}: built for {', '.join(providers)}")
    # Built for CUDA is not yet able to: without the driver's libraries it falls back to the CPU in silence.
    if "CUDA" in providers and not _loads("libcudart.so.12", "libcudart.so.13"):
        yield note(
            "onnxruntime cuda", "built for CUDA, but CUDA's libraries do not load here",
            "install the NVIDIA driver and CUDA, or use --device cpu",
        )  # fmt: skip


def _training() -> Finding:
    missing = [name for name in _TRAINING if importlib.util.find_spec(name) is None]
    # Others need scikit-learn or onnx as well; training begins with torch.
    if "torch" in missing:
        return ok(
            "training",
            "PyTorch is not installed, and not needed to inspect, nor to fit with --backbone-from (for training: "
            "pip install 'edgeflame[train]')",
        )
    if missing:
        return problem("training", f"{', '.join(missing)} missing", "pip install 'edgeflame[train]'")
    return ok("training", f"torch {distribution_version('torch')}, timm {distribution_version('timm')}")


def _gpu() -> Finding:
    if Path("/etc/nv_tegra_release").exists() or "tegra" in platform.release():
        return ok("gpu", f"NVIDIA Jetson, kernel {platform.release()}")
    command = shutil.which("nvidia-smi")
    if command is None:
        return ok("gpu", "none found (no nvidia-smi): models run on the CPU")
    query = [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        return problem("gpu", f"nvidia-smi fails: {exc}", "reinstall the NVIDIA driver and restart the machine")
    gpus = "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())
    return (
        ok("gpu", gpus)
        if gpus
        else note("gpu", "nvidia-smi lists no GPU", "check that the card is seated and seen by lspci")
    )


def _tensorrt() -> Iterator[Finding]:
    flavours = [
        f"{module} {getattr(importlib.import_module(module), '__version__', '?')}"
        for module in ("tensorrt_rtx", "tensorrt")
        if _imports(module)
    ]
    if flavours:
        yield ok("tensorrt", ", ".join(flavours))
    else:
        yield ok("tensorrt", "not installed: engines can neither be built nor run (extras 'rtx' and 'tensorrt')")


def _cameras() -> Finding:
    devices = sorted(Path("/dev").glob("video*"))
    if not devices:
        return ok("cameras", "no /dev/video*; network cameras are not looked for")
    closed = [path.name for path in devices if not os.access(path, os.R_OK | os.W_OK)]
    names = ", ".join(path.name for path in devices)
    if closed:
        return problem(
            "cameras", f"{', '.join(closed)} may not be opened by this user",
            f"sudo usermod -aG video {os.environ.get('USER') or '$USER'}, and log in again",
        )  # fmt: skip
    return ok("cameras", names)


def _clock() -> Finding:
    now = dt.datetime.now(dt.timezone.utc)
    newest = max((path.stat().st_mtime for path in Path(__file__).parent.glob("*.py")), default=0.0)
    if now.timestamp() < newest - 86_400:
        return problem(
            "clock", f"{now:%Y-%m-%d %H:%M} UTC is before this program was installed",
            "set the clock; certificates and results depend on it: timedatectl set-ntp true",
        )  # fmt: skip
    if _is_synchronised() is False:
        return note("clock", f"{now:%Y-%m-%d %H:%M} UTC, not synchronised", "timedatectl set-ntp true")
    return ok("clock", f"{now:%Y-%m-%d %H:%M} UTC, local zone {time.strftime('%Z')}")


def _is_synchronised() -> bool | None:
    """Whether systemd says that the clock is synchronised; None where it does not say."""
    command = shutil.which("timedatectl")
    if command is None:
        return None
    query = [command, "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip())


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free at {folder}"
    if usage.free < MIN_FREE_BYTES:
        return problem("disk", text, "free some space, or set images.max_mib and outbox.max_results lower")
    return ok("disk", text)


def _shared_memory() -> Iterator[Finding]:
    from edge.sources.child import MORE_SHARED_MEMORY, SHARED_MEMORY

    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        text = f"{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free in {SHARED_MEMORY}"
        if usage.free < MIN_FREE_SHARED_BYTES:
            text += "; a camera of 5 megapixels needs 60"
            yield note("shared memory", text, f"for live cameras {MORE_SHARED_MEMORY}")
        else:
            yield ok("shared memory", text)


def _state(folder: Path) -> Finding:
    from edgeflame.errors import StorageError
    from edgeflame.state import locked_state_dir

    if not folder.exists():
        parent = next(path for path in folder.absolute().parents if path.exists())
        if not os.access(parent, os.W_OK):
            return problem("state folder", f"{folder} cannot be made in {parent}", "make it, and give it to this user")
        return ok("state folder", f"{folder} can be made")
    try:
        with locked_state_dir(folder):
            pass
    except StorageError as exc:
        return problem("state folder", str(exc), "give this user the folder, or name another with --state")
    return ok("state folder", f"{folder} can be written and is not in use")


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def _loads(*libraries: str) -> bool:
    import ctypes

    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


_TIMEOUT_S = 10.0


def check_services() -> Iterator[Finding]:
    """A finding for each service of ours that this machine has; none without systemd."""
    command = shutil.which("systemctl")
    if command is None:
        return
    query = [command, "list-units", "--all", "--plain", "--no-legend", "--type=service", "edgeflame-*"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return
    # Where systemd is installed and does not run the machine, a container for instance, it says nothing here.
    for line in done.stdout.splitlines():
        unit, _, active, state, *_ = [*line.split(maxsplit=4), "", "", "", ""]
        if not unit.startswith("edgeflame-"):
            continue
        name = unit.removesuffix(".service")
        if active == "failed":
            yield problem(
                name,
                "has failed, and is not started again",
                f"journalctl -u {unit} -n 50 says why; then systemctl restart {unit}",
            )
        elif state == "auto-restart":
            yield note(name, "fails and is started again and again", f"journalctl -u {unit} -n 50 says why")
        else:
            yield ok(name, f"{active} ({state})")
