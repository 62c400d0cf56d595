"""A line whose camera gives the pictures that a test puts in, with a teacher, and real models and threads."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras, Overrides, plan_cameras
from edge.config import CameraConfig, InspectConfig
from edge.config.outputs import TeachingConfig, WebConfig
from edge.control import DaemonControl
from edge.frame import Frame, make_frame
from edge.inspector import InspectorLoader
from edge.result import Inspected, Result
from edge.teaching.orders import ProductTeaching, TeachingOrder
from edge.teaching.teacher import LineTeacher
from edgeflame.images import ImageU8
from edgeflame.marks import MarkStore, TrueLabel
from tests.support.small_package import good_image
from tests.support.waiting import wait_for

WIDTH, HEIGHT = 128, 96


@dataclass(kw_only=True)
class FedCamera:
    """A live camera that gives what is put into it."""

    name: str = "camera:fed"
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None
    coming: queue.SimpleQueue[ImageU8] = field(default_factory=queue.SimpleQueue)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        count = 0
        while not stop.is_set():
            try:
                image = self.coming.get(timeout=0.02)
            except queue.Empty:
                continue
            count += 1
            yield make_frame(part_id=f"part-{count:04d}", source=self.name, image_bgr=image)


@dataclass(kw_only=True)
class TaughtLine:
    """A running line with one camera."""

    camera: FedCamera
    worker: CameraWorker
    cameras: Cameras
    control: DaemonControl
    teacher: LineTeacher
    results: list[Result]
    inspected: list[Inspected]
    marks: MarkStore

    def feed(self, image: ImageU8) -> Result:
        """Have a part pass, and wait for its verdict, the listeners, and the collector's thread."""
        before = len(self.results)
        self.camera.coming.put(image)
        wait_for(lambda: len(self.results) > before, "a verdict")
        waiting = self.teacher._collectors["camera"]._waiting
        wait_for(lambda: waiting.unfinished_tasks == 0, "the collector is done")
        return self.results[before]

    def order(self, action: str, product: str = "cap", **more: Any) -> ProductTeaching:
        return self.teacher.run(TeachingOrder(action=action, product=product, **more))  # type: ignore[arg-type]

    def collect(self, count: int, *, first: int = 100, product: str = "cap") -> ProductTeaching:
        """Have parts pass until so many more are collected."""
        had = len(self.order("status", product).photographs)
        self.order("collect", product)
        for seed in range(first, first + count):
            self.feed(part(seed))
            had += 1
            wait_for(lambda wanted=had: len(self.order("status", product).photographs) == wanted, f"photograph {had}")
        return self.order("stop", product)

    def take(self, image: ImageU8, *, same_part: bool = False) -> None:
        """Take one picture by hand."""
        asking = threading.Thread(target=lambda: self.order("take", same_part=same_part))
        asking.start()
        wait_for(lambda: bool(self.teacher._collectors["camera"]._asked), "it is asked for")
        self.feed(image)
        asking.join()

    def learn(self, product: str = "cap", **more: Any) -> ProductTeaching:
        """Learn, and wait for what comes of it."""
        self.order("learn", product, **more)
        wait_for(lambda: self.order("status", product).learning is None, "the end of learning", timeout_s=300)
        return self.order("status", product)

    def mark_parts(self, region: tuple[int, int, int, int], *, good: int = 2, bad: int = 8) -> None:
        """Say of good parts, and of parts with a faint hole, what they were, and of one of another product."""
        x, y, width, height = region

        def mark(name: str, image: ImageU8, was: TrueLabel, product: str = "cap") -> None:
            self.marks.add(name, image[y : y + height, x : x + width].copy(), was, product=product)

        for seed in range(good):
            mark(f"good-{seed}", part(300 + seed), "good")
        for seed in range(bad):
            image = part(400 + seed).astype(int)
            image[30:50, 40:60] -= 9
            mark(f"bad-{seed}", np.clip(image, 0, 255).astype(np.uint8), "bad")
        mark("other", part(500), "bad", "lid")


def part(seed: int) -> ImageU8:
    """A good part: noise about a ramp with marks that differ from part to part."""
    image = np.repeat(np.repeat(good_image(seed, 64), 2, axis=0), 2, axis=1)[:HEIGHT, :WIDTH].copy()
    rng = np.random.default_rng(seed)
    tone = rng.integers(-12, 13, (6, 8, 1)).repeat(16, axis=0).repeat(16, axis=1)
    return np.clip(image.astype(int) + tone, 0, 255).astype(np.uint8)


def bad_part(seed: int) -> ImageU8:
    """The same with a dark hole."""
    image = part(seed)
    image[24:56, 30:70] //= 6
    return image


@contextlib.contextmanager
def taught_line(
    state: Path, package: Path | None, *, camera: FedCamera | None = None, torch: bool = False, **keys: Any
) -> Iterator[TaughtLine]:
    """A line, with one product or none; ``keys`` are sections of its configuration."""
    source = camera or FedCamera()
    teaching = keys.pop("teaching", TeachingConfig())
    config = InspectConfig(
        products={} if package is None else {"tile": str(package)},
        cameras={"camera": CameraConfig(source="camera:0")},
        web=WebConfig(),
        teaching=teaching,
        **keys,
    )
    plan = plan_cameras(config, model=None, source=None, product_of=str)
    results: list[Result] = []
    inspected: list[Inspected] = []

    def accept(one: Inspected) -> None:
        inspected.append(one)

    with mock.patch("edge.cameras.open_image_source", return_value=source):
        overrides = Overrides(state)
        state.mkdir(parents=True, exist_ok=True)
        cameras = Cameras(plan, InspectorLoader(device="cpu", num_threads=1), overrides, state)
    (worker,) = cameras.workers
    control = DaemonControl(cameras, overrides=overrides)
    halt = threading.Event()
    thread = threading.Thread(target=worker.run, args=(accept, halt), daemon=True)

    class Last:
        """Comes after the collector, so that what it has seen everybody has."""

        def on_part(self, _captured: object, one: Inspected) -> None:
            results.append(one.result)

    marks = MarkStore(state / "marks")
    with LineTeacher(state, cameras, control, teaching, marks, torch=torch) as teacher:
        control.teacher = teacher
        worker.add_listener(Last())
        thread.start()
        try:
            yield TaughtLine(
                camera=source,
                worker=worker,
                cameras=cameras,
                control=control,
                teacher=teacher,
                results=results,
                inspected=inspected,
                marks=marks,
            )
        finally:
            halt.set()
            thread.join(10)
