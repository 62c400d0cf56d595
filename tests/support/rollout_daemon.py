"""A real inspection daemon as a process, for tests that publish models to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from edgeflame.images import ImageU8, write_image
from edgeflame.log import no_progress
from edgeflame.mqtt.release_messages import ProductModels, Release
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.package import Package, write_package
from edgeflame.signing import sign_package
from fleet.observe import ReleaseProgress
from fleet.publish import ReleaseTerms, publish_package, read_fleet_models
from tests.support.brokers import BrokerProcess
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for

PRODUCT = "test piece"


def stream(folder: Path, images: Iterable[ImageU8], count: int, *, start: int = 0) -> Path:
    """A folder with ``count`` parts that repeat a few images, each under a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = []
    for index, image in enumerate(images):
        path = folder.parent / f"{folder.name}-original-{start}-{index}.png"
        write_image(path, image)
        originals.append(path)
    for number in range(start, start + count):
        os.link(originals[number % len(originals)], folder / f"part-{number:06d}.png")
    return folder


def variant(package: Package, path: Path, key: Path, *, factor: float = 1.01, **changes: Any) -> Path:
    """Another model of the same product: with another threshold, signed."""
    threshold = msgspec.structs.replace(package.manifest.threshold, value=package.manifest.threshold.value * factor)
    manifest = msgspec.structs.replace(package.manifest, threshold=threshold, **changes)
    write_package(
        path,
        manifest=manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=package.references,
    )
    sign_package(path, key)
    return path


def _read_slowly(process: subprocess.Popen[bytes], parts_per_s: float) -> None:
    """Read results slowly: a line inspects as fast as its results, of some 400 bytes each, are read."""
    assert process.stdout is not None
    pause = threading.Event()
    with process.stdout as stream:
        while os.read(stream.fileno(), 2000):
            pause.wait(5 / parts_per_s)


class Daemon:
    """``edgeflame inspect`` with a section ``[models]``; a context manager that kills it.

    Args:
        folder: for its state, configuration and log.
        broker: the broker of ``[mqtt]``.
        model: the package of ``--model``.
        key: the trusted public key.
        source: the folder of its parts.
        line: its name.
        fleet: name of the fleet.
        models: more lines of the section ``[models]``.
        mqtt: lines of the section ``[mqtt]`` in place of the broker's address.
        parts_per_s: at most, once its standard output is full, which has room for some 150 parts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        broker: BrokerProcess,
        model: Path,
        key: Path,
        source: Path,
        line: str = "line-1",
        fleet: str = "test",
        models: str = "",
        mqtt: str = "",
        parts_per_s: float = 50.0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.line, self.fleet, self.broker = folder / "state", line, fleet, broker
        self.results_file = folder / "results.jsonl"
        self._log = folder / "log"
        self._parts_per_s = parts_per_s
        config = folder / "line.toml"
        where = mqtt or f'broker = "{broker.url}"'
        config.write_text(
            f'[mqtt]\n{where}\nfleet = "{fleet}"\nline = "{line}"\n\n[models]\npublic_keys = ["{key}"]\n{models}\n'
        )
        self._command = [
            sys.executable, "-m", "edgeflame", "--log-format", "json", "inspect", "--model", str(model),
            "--source", str(source), "--config", str(config), "--state", str(self.state), "--json",
            "--results", str(self.results_file), "--device", "cpu", "--threads", "1",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.topics = Topics(fleet=fleet)

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it; it goes through its source from the beginning again."""
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, env=env)
        self._process = process
        threading.Thread(target=_read_slowly, args=(process, self._parts_per_s), daemon=True).start()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    def wait(self) -> int:
        """Until it ends by itself."""
        assert self._process is not None
        return self._process.wait(60)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log."""
        found = []
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def named(self, event: str) -> list[dict[str, Any]]:
        """Log lines of one kind."""
        return [one for one in self.events if one.get("event") == event]

    def results(self) -> list[dict[str, Any]]:
        """Its results since its first start."""
        lines = self.results_file.read_text().split("\n") if self.results_file.exists() else []
        return [json.loads(line) for line in lines[:-1]]

    @property
    def judging_model(self) -> str:
        """The model of its newest result."""
        return str(json.loads(self.results_file.read_bytes().rsplit(b"\n", 2)[-2])["model"])

    @property
    def num_results(self) -> int:
        """How many results it has given since its first start."""
        return self.results_file.read_bytes().count(b"\n") if self.results_file.exists() else 0

    @property
    def record(self) -> dict[str, Any]:
        """Its record of the product's models."""
        path = self.state / "models" / "record.json"
        entry: dict[str, Any] = json.loads(path.read_text())["products"][PRODUCT] if path.exists() else {}
        return entry

    def said(self) -> ProductModels | None:
        """Its retained message about the product's models; None before the first."""
        view = read_fleet_models(parse_broker_url(self.broker.url), self.topics, connect_timeout_s=10)
        models = view.lines.get(self.line)
        return None if models is None else models.of(PRODUCT)

    def wait_until_announced(self) -> None:
        """Wait until it has published which models it runs."""
        wait_for(lambda: self.said() is not None, "the line says what it runs")

    def publish(self, path: Path, release: Release, **terms: Any) -> list[ReleaseProgress]:
        """As ``edgeflame model publish``, also of what that would refuse."""
        return publish_package(
            path,
            release,
            ReleaseTerms(**{"lines": (self.line,), "timeout_s": 30.0, "until": "running", **terms}),
            broker=parse_broker_url(self.broker.url),
            topics=self.topics,
            connect_timeout_s=10,
            report=lambda standings: no_progress(0, 0),
        )
