"""``edgeflame inspect --check``: checks that everything works that a daemon with this configuration would use.

Each thing is used as the daemon would: cameras give a frame, packages are loaded and checked on their reference images,
the frame is inspected, the broker is connected to, folders are written to. Nothing is sent that a plant would take for
a result: no verdict is written to the PLC, and nothing is posted to the web service.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from edge.cameras import CameraPlan, Overrides, Plan
from edge.config import InspectConfig
from edge.config.outputs import ModbusConfig, MqttConfig, WebConfig, WebhookConfig
from edge.delivery.mqtt import broker_url
from edge.delivery.webhook import WebhookDestination
from edge.frame import Captured, Frame, Source
from edge.inspector import InspectorLoader, InspectorProtocol
from edge.models.released import read_models_settings
from edge.models.state import ModelStateFile
from edge.models.store import RECORD_FILE
from edge.parts.tracker import PartTracker
from edge.parts.triggers import trigger_source
from edge.runtimes.interface import check_runtime_fits
from edge.runtimes.load import compare_with_references, open_runtime
from edge.runtimes.trial import try_graph
from edge.sources.child import MORE_SHARED_MEMORY, SHARED_MEMORY, SLOTS, ring_bytes
from edge.sources.locate import open_image_source
from edge.status import LineState
from edgeflame.background import BackgroundThread
from edgeflame.config import check_keys
from edgeflame.errors import (
    ConfigError,
    EdgeFlameError,
    LinkError,
    MissingDependencyError,
    PackageError,
    StorageError,
    require_extra,
)
from edgeflame.findings import Finding, note, ok, problem
from edgeflame.mqtt.check import check_broker
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import Topics
from edgeflame.onnx_session import Device, available_devices
from edgeflame.package import Package, read_package
from edgeflame.state import atomic_write, is_in_use, storage_errors

FRAME_TIMEOUT_S = 15.0
"""Time for a camera to be opened and to give its first picture, seconds."""

CONNECT_TIMEOUT_S = 5.0
"""Time for a broker, web service or trigger source to connect, seconds."""

LITTLE_ROOM_BYTES = 500_000_000
"""Less free disk than this gives a note: the outbox needs more in a long outage."""


def check_daemon(
    read_plan: Callable[[], Plan],
    loader: InspectorLoader,
    *,
    state: Path | None,
    images: Path | None,
    file: Path | None = None,
) -> Iterator[Finding]:
    """Run all checks; yields each finding as soon as it is there.

    Args:
        read_plan: reads the configuration and returns its plan.
        loader: opens packages.
        state: the state folder; None: there is none.
        images: the folder for pictures of failed and unknown parts; None: there is none.
        file: the configuration file, checked for unknown and renamed keys; None: there is none.
    """
    try:
        plan = read_plan()
    except EdgeFlameError as exc:
        yield problem("configuration", str(exc), "correct what the message names")
        return
    config = plan.config
    yield ok("configuration", f"{_count(len(plan.cameras), 'camera')}, {_count(len(plan.products), 'product')}")
    if file is not None:
        yield from check_keys(file, InspectConfig)
    loader.share_cores(len(plan.cameras))
    runs = state is not None and is_in_use(state)
    for name, file in plan.products.items():
        yield from _product(name, file, plan, loader)
    rings: list[int] = []
    for camera in plan.cameras:
        yield from _camera(camera, plan, loader, rings, runs=runs)
        yield from _trigger(camera, config.mqtt)
    if rings and not runs:
        yield from _shared_memory(sum(rings))
    needy = [name for name in ("mqtt", "webhook", "web") if getattr(config, name) is not None]
    if state is not None:
        yield from _state(state, runs=runs)
    elif needy:
        yield problem("state folder", f"[{'], ['.join(needy)}] need one", "give --state DIR")
    if images is not None:
        yield from _folder("images folder", images)
    if config.mqtt is not None:
        yield from _broker(config.mqtt, runs=runs)
    if config.models is not None:
        yield from _models(plan, loader, state)
    if config.webhook is not None:
        yield from _webhook(config.webhook)
    for camera in plan.cameras:
        if camera.modbus is not None:
            yield from _modbus(camera.name, camera.modbus)
    if config.web is not None:
        yield from _page(config.web, runs=runs)


def check_package(path: Path) -> Iterator[Finding]:
    """Read a package, run it on each device of the installed runtime, and compare with its reference images."""
    try:
        package = read_package(path)
    except PackageError as exc:
        yield problem("package", str(exc), "fetch it again, or make it again with edgeflame fit")
        return
    manifest = package.manifest
    yield ok("package", f"{manifest.product}, method {manifest.learning.method}, sha256 {package.sha256[:12]}")
    if package.signature_json is None:
        yield note("signature", "the package is not signed", "edgeflame model sign, and inspect with --public-key")
    # Without a runtime the CPU is tried all the same: that says what to install.
    yield from _run_package(package, "cpu")
    with contextlib.suppress(MissingDependencyError):
        if "cuda" in available_devices():
            yield from _run_package(package, "cuda")


def _run_package(package: Package, device: Device) -> Iterator[Finding]:
    suffix = "" if device == "cpu" else f" {device}"
    try:
        try_graph(package.model_onnx)
        runtime = open_runtime(package.model_onnx, device=device)
        check_runtime_fits(runtime, package.manifest)
        if not package.references:
            yield note(f"parity{suffix}", "the package holds no reference images, so its graph cannot be checked here")
            return
        report = compare_with_references(runtime, package)
    except EdgeFlameError as exc:
        do = (
            "pip install 'edgeflame[cpu]', or export the package again"
            if device == "cpu"
            else "install the NVIDIA driver, CUDA and cuDNN that this onnxruntime-gpu is built for, or use --device cpu"
        )
        yield problem(f"runtime{suffix}", str(exc), do)
        return
    worst = "not finite" if report.worst is None else f"{report.worst:.2g}"
    text = f"{report.num_images} reference images on {report.provider}: worst difference {worst}"
    if report.passed:
        yield ok(f"parity{suffix}", f"{text}, {report.tolerance:g} allowed")
    else:
        yield problem(
            f"parity{suffix}",
            f"{text}, {report.tolerance:g} allowed",
            "export the package again; do not inspect with it",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _product(name: str, file: Path, plan: Plan, loader: InspectorLoader) -> Iterator[Finding]:
    check = f"product {name}"
    settings = next((camera.settings for camera in plan.cameras if camera.product == name), plan.cameras[0].settings)
    try:
        package = loader.package(file)
        inspector = loader.open(file, settings, camera="check", product=name, is_live=False)
    except EdgeFlameError as exc:
        yield problem(check, str(exc), "fetch or make the package again, or name another one or another --device")
        return
    yield ok(check, f"model {inspector.model_id} on {inspector.provider}, threshold {inspector.threshold:.6g}")
    if not package.references:
        yield note(check, "the package holds no reference images: its scores here cannot be compared with training")


def _models(plan: Plan, loader: InspectorLoader, state: Path | None) -> Iterator[Finding]:
    try:
        products, keys, folder = read_models_settings(plan, loader, state)
        decided = ModelStateFile(folder / RECORD_FILE).state.products
    except EdgeFlameError as exc:
        yield problem("models", str(exc), "correct what the message names; docs/models.md has the whole section")
        return
    released = [
        f"{one.name} runs {present.sha256[:12]} ({present.name})"
        for product, one in products.items()
        if product in decided and (present := decided[product].present) is not None
    ]
    runs = "; ".join(released) or "none has been taken"
    yield ok("models", f"packages signed with key {keys} are taken; of released models {runs}")


def _camera(
    camera: CameraPlan, plan: Plan, loader: InspectorLoader, rings: list[int], *, runs: bool
) -> Iterator[Finding]:
    check = f"camera {camera.name}"
    try:
        source = open_image_source(camera.source, max_pixels=camera.settings.capture.max_pixels)
        frame = _first_frame(source)
    except EdgeFlameError as exc:
        if runs:
            yield note(check, f"{exc}; the daemon that runs may have it in use")
        else:
            yield problem(check, str(exc), "correct the source, or see to the camera and its cable")
        return
    if frame is None:
        what = f"{source.name}: no frame within {FRAME_TIMEOUT_S:g} s"
        if source.is_live:
            yield problem(check, what, "see to the camera, its cable and its address")
        else:
            yield note(check, f"{what}; nothing is there to inspect yet")
        return
    if frame.image_bgr is None:
        yield problem(check, f"{source.name}: {frame.error}", "see to the camera, or to the file that is named")
        return
    if source.is_live:
        rings.append(ring_bytes(frame.image_bgr.shape, SLOTS))
    size = f"{source.name}: a frame of {frame.image_bgr.shape[1]}x{frame.image_bgr.shape[0]}"
    try:
        inspector: InspectorProtocol = loader.open(
            plan.products[camera.product], camera.settings, camera=camera.name, product=camera.product, is_live=False
        )
    except EdgeFlameError:
        # The product's own check reports it.
        yield ok(check, size)
        return
    result = inspector.inspect_photograph(Captured(sequence=0, frame=frame)).result
    words = ", ".join(result.reasons) + (f" ({result.detail})" if result.detail else "")
    if result.verdict == "unknown":
        yield problem(
            check, f"{size}, judged unknown: {words}", "see to lamp, lens and view; docs/inspection.md has the reasons"
        )
    else:
        ratio = "" if result.ratio is None else f", {result.ratio:.2f} x threshold"
        yield ok(check, f"{size}, judged {result.verdict}{ratio}, in {result.latency_ms:.0f} ms")


def _shared_memory(needed_bytes: int) -> Iterator[Finding]:
    """Whether the images of all cameras at the same time have room: each alone had."""
    if not SHARED_MEMORY.is_dir():
        return
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    what = (
        f"the cameras' images need {needed_bytes / 1e6:.0f} MB in {SHARED_MEMORY}, {free_bytes / 1e6:.0f} MB are free"
    )
    if free_bytes < needed_bytes:
        yield problem("shared memory", what, MORE_SHARED_MEMORY)
    else:
        yield ok("shared memory", what)


def _trigger(camera: CameraPlan, mqtt: MqttConfig | None) -> Iterator[Finding]:
    """Check the trigger source of a camera, if its parts are announced; nothing is yielded if they are not."""
    check, settings = f"parts of {camera.name}", camera.settings
    try:
        tracker = PartTracker(camera.name, settings.trigger, settings.parts)
        source = tracker.source_opener(partial(open_image_source, camera.source), mqtt)()
        tracker.capture_config(settings.capture, is_live=source.is_live)
        if not settings.trigger.is_on:
            return
        trigger = trigger_source(camera.name, settings.trigger, settings.parts, mqtt)
    except (ConfigError, MissingDependencyError) as exc:
        yield problem(check, str(exc), "correct what the message names")
        return
    except EdgeFlameError:
        # The camera's own check reports it.
        return
    trigger.open(lambda _: None)
    try:
        until = time.monotonic() + CONNECT_TIMEOUT_S
        while (reason := trigger.problem()) is not None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        trigger.close()
    if reason is not None:
        yield problem(check, f"{trigger.name}: {reason}", "see to what announces the parts, and to [trigger]")
    else:
        yield ok(check, f"{trigger.name}: can announce them; none was waited for")


def _first_frame(source: Source) -> Frame | None:
    """The first frame of a source that has an image; None if no frame came in time.

    A stream that is joined in the middle has none before its first keyframe: the last of them, with its reason, is
    returned if no image comes in time.

    Raises:
        EdgeFlameError: the source cannot be read.
    """
    came: queue.SimpleQueue[Frame | EdgeFlameError | None] = queue.SimpleQueue()
    seen: collections.deque[Frame] = collections.deque(maxlen=1)

    def read(stop: threading.Event) -> None:
        try:
            frames = source.frames(stop)
            for frame in frames:
                seen.append(frame)
                if frame.image_bgr is not None or not source.is_live:
                    break
            came.put(seen[-1] if seen else None)
            stop.set()
            # Running the generator to its end releases the camera.
            for _ in frames:
                pass
        except EdgeFlameError as exc:
            came.put(exc)

    thread = BackgroundThread("check", read, join_s=3.0)
    thread.start()
    try:
        answer = came.get(timeout=FRAME_TIMEOUT_S)
    except queue.Empty:
        answer = seen[-1] if seen else None
    finally:
        thread.close()
    if isinstance(answer, EdgeFlameError):
        raise answer
    return answer


def _state(folder: Path, *, runs: bool) -> Iterator[Finding]:
    yield from _folder("state folder", folder)
    if runs:
        yield note(
            "state folder", f"{folder} is in use: a daemon runs with it", "use `edgeflame line reload`, or stop it"
        )
    try:
        Overrides(folder)
    except StorageError as exc:
        yield problem("state folder", str(exc), "do what the message says")


def _folder(check: str, folder: Path) -> Iterator[Finding]:
    probe = folder / f".check-{os.getpid()}"
    try:
        with storage_errors(folder, "be written to"):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(probe, b"edgeflame inspect --check")
            probe.unlink()
            free = shutil.disk_usage(folder).free
    except StorageError as exc:
        yield problem(check, str(exc), "give the user it runs as the right to write there, or make room")
        return
    if free < LITTLE_ROOM_BYTES:
        yield note(check, f"{folder}: only {free / 1e6:.0f} MB are free", "make room: a full disk stops the inspection")
    else:
        yield ok(check, f"{folder}: can be written to, {free / 1e9:.1f} GB free")


def _broker(config: MqttConfig, *, runs: bool) -> Iterator[Finding]:
    check, topics = "broker", Topics(fleet=config.fleet)
    state_topic = topics.line_state(config.line)
    try:
        url = broker_url(config)
        url.ssl_context()
    except EdgeFlameError as exc:
        yield problem(check, str(exc), "correct [mqtt]")
        return
    yield from check_broker(
        url,
        filters=(state_topic, topics.line_command(config.line)),
        timeout_s=CONNECT_TIMEOUT_S,
        member=f"line {config.line} of {config.fleet}",
        advice="correct [mqtt], renew the kit, or see to the broker",
        look=partial(_other_line, config, state_topic, runs=runs),
    )


def _other_line(config: MqttConfig, state_topic: str, session: Session, *, runs: bool) -> Iterator[Finding]:
    """A problem if another line of this name is online."""
    state = next((message.payload for message in session.retained() if message.topic == state_topic), None)
    line = None if state is None else _decode_state(state)
    if line is not None and line.online and not runs:
        yield problem(
            "broker",
            f"a line {config.line} is online already, with {line.source}: two of a name mix up what they publish",
            "give this one another name in [mqtt]",
        )


def _decode_state(payload: bytes) -> LineState | None:
    try:
        return msgspec.json.decode(payload, type=LineState)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _webhook(config: WebhookConfig) -> Iterator[Finding]:
    check, url = "webhook", urlsplit(config.url)
    address = f"{url.scheme}://{url.netloc}"
    try:
        connection = WebhookDestination(config).connect()
        connection.timeout = CONNECT_TIMEOUT_S
        with contextlib.closing(connection):
            connection.connect()
    except EdgeFlameError as exc:
        yield problem(check, str(exc), "correct [webhook]")
    except (OSError, http.client.HTTPException) as exc:
        yield problem(check, f"{address}: {exc or type(exc).__name__}", "correct webhook.url, or see to the service")
    else:
        yield ok(check, f"{address}: takes a connection; nothing was posted")


def _modbus(camera: str, config: ModbusConfig) -> Iterator[Finding]:
    check, last = f"PLC of {camera}", config.register + config.num_registers - 1
    registers = f"registers {config.register} to {last} of unit {config.unit}"
    try:
        with require_extra("plc", "[modbus] needs pymodbus"):
            from edge.modbus import ModbusLink
    except MissingDependencyError as exc:
        yield problem(check, str(exc), "install it")
        return
    link = ModbusLink(config.host, config.port, timeout_s=config.timeout_s)
    try:
        link.request(
            lambda client: client.read_holding_registers(
                config.register, count=config.num_registers, device_id=config.unit
            )
        )
    except LinkError as exc:
        what = f"{link.address}: cannot read {registers}: {exc}"
        yield problem(check, what, "see to the PLC, its memory map and the network; or correct [modbus]")
    else:
        yield ok(check, f"{link.address}: has {registers}; nothing was written")
    finally:
        link.close()


def _page(config: WebConfig, *, runs: bool) -> Iterator[Finding]:
    check = "page"
    try:
        with require_extra("web", "[web] needs more than is installed here"):
            from edge.web.server import listen
    except MissingDependencyError as exc:
        yield problem(check, str(exc), "install it")
        return
    try:
        listen(config).close()
    except EdgeFlameError as exc:
        if runs:
            yield note(check, f"{exc}; the daemon that runs has it")
        else:
            yield problem(check, str(exc), "choose another web.listen, or stop what uses it")
    else:
        yield ok(check, f"{config.listen} can be listened on")
