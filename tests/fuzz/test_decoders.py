"""Every decoder under hostile bytes: nothing but its declared error gets out, and memory does not grow.

``make fuzz`` tries 10,000 cases for each decoder (``EDGEFLAME_FUZZ`` says how many); the test suite a hundred.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import socket
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from PIL import Image

from aggregator.config import AggregateConfig
from aggregator.control import PauseSite, RequestQueue, StopRun
from aggregator.exchanges import WEIGHTS, validate_weights
from aggregator.journal import Journal
from aggregator.simulation.config import SimulationConfig
from cli.train import SiteFile
from edge.config import InspectConfig
from edge.parts.mqtt_trigger import read_announcement
from edgeflame.config import parse_config
from edgeflame.dataset import open_dataset
from edgeflame.errors import (
    ConfigError,
    DataError,
    EdgeFlameError,
    FederationError,
    LinkError,
    NumericalError,
    PackageError,
    StorageError,
    UsageError,
)
from edgeflame.images import decode_image, write_image
from edgeflame.methods import Learning
from edgeflame.mqtt import messages as m
from edgeflame.mqtt.kit import Kit, encode_kit, read_kit
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.package import make_references, read_package, write_package
from edgeflame.signing import PRIVATE_KEY, PUBLIC_KEY, read_signature, sign_package, verify_signature, write_keys
from edgeflame.statistics.codec import decode_statistics, encode_statistics
from edgeflame.statistics.memory import MemoryBank, read_bank, write_bank
from edgeflame.statistics.shared import StatisticsFile, read_moments, write_site_statistics
from edgeflame.tensors import TensorFile
from edgeflame.transfer.protocol import unpack_mask
from tests.edge.web.test_page import TOKEN, judge, part, station
from tests.support import mutations
from tests.support.mutations import Mutator
from tests.support.paths import RECORDED
from tests.support.small_package import good_image, random_gaussian, small_manifest, write_small_package
from trainer.agent.control import SiteControl, SitePause, parse_schedule
from trainer.agent.state import FinishRecord, SiteState

CASES = int(os.environ.get("EDGEFLAME_FUZZ", "100"))
MAX_GROWTH_BYTES = 300 << 20
"""Of the whole process, Hypothesis's own memory included; a single bomb let through would be far above."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A decoder: valid inputs, how to damage them, how to feed it, and the errors it declares."""

    valid: list[bytes]
    mutate: Mutator
    feed: Callable[[bytes], Any]
    errors: tuple[type[EdgeFlameError], ...]


def recorded(kind: str) -> list[bytes]:
    return [line for file in sorted(RECORDED.glob(f"*/{kind}.jsonl")) for line in file.read_bytes().splitlines()]


def from_file(folder: Path, name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A decoder of files as one of bytes."""
    path = folder / name

    def feed(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return feed


def text(read: Callable[[str], Any]) -> Callable[[bytes], Any]:
    """A decoder of text as one of bytes; what is no text does not reach it."""
    return lambda data: read(data.decode("utf-8", "replace"))


def tensors(folder: Path) -> bytes:
    rng = np.random.default_rng(0)
    path = folder / "seed.safetensors"
    values = {
        "weight": rng.normal(size=(40, 3)).astype(np.float32),
        "bias": rng.normal(size=(7,)).astype(np.float16),
        "count": np.array([3], dtype=np.int64),
        "flag": np.array([True, False]),
    }
    safetensors.numpy.save_file(values, path, metadata={"origin": "test"})
    return path.read_bytes()


def read_all(path: Path) -> None:
    with TensorFile(path) as file:
        for name in file.schema:
            for _ in file.blocks(name):
                pass


def verify_all(path: Path) -> None:
    with StatisticsFile(path) as blob:
        blob.verify()
    read_moments(path)


def blob(folder: Path, form: Any) -> bytes:
    from edgeflame.statistics.moments import MomentAccumulator

    rng = np.random.default_rng(0)
    accumulator = MomentAccumulator()
    accumulator.add(rng.normal(size=(6, 4, 5)).astype(np.float32))
    path = folder / f"seed-{form}"
    rank = 2 if form == "low_rank" else 0
    write_site_statistics(path, accumulator.moments(), grid=(2, 2), model="a" * 64, form=form, rank=rank)
    return path.read_bytes()


def small_package(folder: Path) -> Path:
    """A package with all its parts but a real graph, which nobody looks into here."""
    statistics = random_gaussian(grid=(4, 4), channels=5, rank=2)
    images = np.stack([good_image(seed) for seed in range(2)])
    path = folder / "small.edgeflame"
    write_package(
        path,
        manifest=small_manifest(statistics, threshold=1.0),
        model_onnx=b"graph" * 100,
        statistics=statistics,
        references=make_references(images, np.ones((2, 4, 4))),
    )
    return path


def targets(folder: Path) -> dict[str, Target]:
    package = small_package(folder)
    write_keys(folder / "keys")
    private, public = folder / "keys" / PRIVATE_KEY, folder / "keys" / PUBLIC_KEY
    sign_package(package, private)
    sound = read_package(package)
    base = folder / "base.safetensors"
    base.write_bytes(tensors(folder))
    write_bank(
        folder / "memory",
        MemoryBank(
            prototypes=np.eye(4, dtype=np.float32),
            weights=np.full(4, 0.25, dtype=np.float32),
            effective_patches=np.full(4, 40, dtype=np.float32),
            effective_images=np.full(4, 5, dtype=np.float32),
            count=9,
            space="a" * 64,
        ),
    )
    data = folder / "data"
    (data / "train" / "good").mkdir(parents=True)
    for name in "abc":
        write_image(data / "train" / "good" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    state = folder / "state"
    memory = SiteState(state)
    memory.store_finished("0" * 32, FinishRecord(model="a" * 64, package=None, package_sha256=None, summary={"x": 1.0}))
    finish_json = state / "runs" / ("0" * 32) / "finish.json"
    requests = RequestQueue(folder)
    wishes = SiteControl(folder)

    def signature(path: Path) -> str:
        package = read_package(path)
        read_signature(package)
        for reference in package.references:
            reference.image(package.manifest.learning.input)
        return verify_signature(package, public)

    def wish(path: Path) -> Any:
        return wishes.pause

    def request(_: Path) -> Any:
        requests.process_pending(str)

    def journal(path: Path) -> Any:
        for beside in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            beside.unlink(missing_ok=True)
        with Journal(path) as journal:
            return journal.last_run()

    return {
        "message up": Target(
            valid=recorded("up"), mutate=mutations.json_document, feed=m.decode_up, errors=(FederationError,)
        ),
        "message down": Target(
            valid=recorded("down"), mutate=mutations.json_document, feed=m.decode_down, errors=(FederationError,)
        ),
        "round state": Target(
            valid=recorded("round"), mutate=mutations.json_document, feed=m.decode_round, errors=(FederationError,)
        ),
        "presence": Target(
            valid=recorded("presence"),
            mutate=mutations.json_document,
            feed=m.decode_presence,
            errors=(FederationError,),
        ),
        "bitmap": Target(
            valid=[b"\x05\x01", b"\x00\x00"],
            mutate=mutations.raw,
            feed=lambda data: unpack_mask(data, 10),
            errors=(FederationError,),
        ),
        "topic": Target(
            valid=[
                Topics(fleet="f").site_up("site").encode(),
                Topics(fleet="f").training_chunk("a" * 64, 7).encode(),
                Topics(fleet="f").up_chunk("s", "b" * 64, 3).encode(),
            ],
            mutate=mutations.raw,
            feed=text(Topics(fleet="f").parse),
            errors=(),
        ),
        "safetensors": Target(
            valid=[base.read_bytes()],
            mutate=mutations.safetensors,
            feed=from_file(folder, "tensors", read_all),
            errors=(DataError,),
        ),
        "update": Target(
            valid=[base.read_bytes()],
            mutate=mutations.safetensors,
            feed=from_file(
                folder,
                "update",
                lambda path: (WEIGHTS.validate_initial(path), validate_weights(path, base, max_relative_change=10.0)),
            ),
            errors=(),
        ),
        "memory": Target(
            valid=[(folder / "memory").read_bytes()],
            mutate=mutations.safetensors,
            feed=from_file(folder, "memory", read_bank),
            errors=(DataError, NumericalError),
        ),
        "shared statistics": Target(
            valid=[blob(folder, "moments"), blob(folder, "low_rank")],
            mutate=mutations.safetensors,
            feed=from_file(folder, "statistics", verify_all),
            errors=(DataError, NumericalError),
        ),
        "package": Target(
            valid=[package.read_bytes()],
            mutate=mutations.archive,
            feed=from_file(folder, "package", signature),
            errors=(PackageError, DataError),
        ),
        "package statistics": Target(
            valid=[encode_statistics(sound.statistics)],
            mutate=mutations.safetensors,
            feed=decode_statistics,
            errors=(DataError, NumericalError),
        ),
        "public key": Target(
            valid=[public.read_bytes()],
            mutate=mutations.raw,
            feed=from_file(folder, "key.pem", lambda path: verify_signature(sound, path)),
            errors=(UsageError, PackageError),
        ),
        "aggregator's configuration": Target(
            valid=[b'rounds = 3\nquorum = 0.5\nexpected_sites = ["a"]\n[learning]\nmethod = "flame"\n[convergence]\n'],
            mutate=mutations.raw,
            feed=lambda data: parse_config(data, AggregateConfig, "test"),
            errors=(ConfigError,),
        ),
        "learning": Target(
            valid=[b'method = "fade"\n[training]\nepochs = 2\n[scoring]\nrank = 4\n[input]\nheight = 64\nwidth = 64\n'],
            mutate=mutations.raw,
            feed=lambda data: parse_config(data, Learning, "test"),
            errors=(ConfigError,),
        ),
        "site's configuration": Target(
            valid=[b'broker = "mqtt://x"\nfleet = "f"\nsite = "s"\nreference_images = 3\n'],
            mutate=mutations.raw,
            feed=lambda data: parse_config(data, SiteFile, "test"),
            errors=(ConfigError,),
        ),
        "kit": Target(
            valid=[kit()],
            mutate=mutations.raw,
            feed=from_file(folder, "site.kit", read_kit),
            errors=(ConfigError, UsageError, LinkError),
        ),
        "broker URL": Target(
            valid=[b"mqtt://user:pass@host:1883", b"mqtts://[::1]:8883", b"localhost"],
            mutate=mutations.raw,
            feed=text(parse_broker_url),
            errors=(UsageError,),
        ),
        "announcement of a part": Target(
            valid=[b"A-17", b'{"part_id": "A-17", "number": 17, "time": "2026-01-02T03:04:05.678Z"}'],
            mutate=mutations.raw,
            feed=read_announcement,
            errors=(DataError,),
        ),
        "groups file": Target(
            valid=[b"path,group\ntrain/good/a.png,1\ntrain/good/b.png,1\ntrain/good/c.png,2\n"],
            mutate=mutations.raw,
            feed=from_file(folder, "groups.csv", lambda path: open_dataset(data, path)),
            errors=(DataError,),
        ),
        **{
            f"{kind} image": Target(
                valid=valid,
                mutate=mutations.image,
                feed=lambda data: decode_image(data, "test", max_pixels=1 << 20),
                errors=(DataError,),
            )
            for kind, valid in image_files().items()
        },
        "journal": Target(
            valid=[journal_bytes(folder)],
            mutate=mutations.raw,
            feed=from_file(folder, "journal.sqlite", journal),
            errors=(StorageError,),
        ),
        "site's record": Target(
            valid=[finish_json.read_bytes()],
            mutate=mutations.json_document,
            feed=from_file(finish_json.parent, finish_json.name, lambda _: memory.finished("0" * 32)),
            errors=(StorageError,),
        ),
        "wish": Target(
            valid=[m.msgspec.json.encode(SitePause(reason="x"))],
            mutate=mutations.json_document,
            feed=from_file(folder, "pause.json", wish),
            errors=(StorageError,),
        ),
        "request": Target(
            valid=[m.msgspec.json.encode(PauseSite(site="a")), m.msgspec.json.encode(StopRun())],
            mutate=mutations.json_document,
            feed=from_file(folder / "requests", "1.json", request),
            errors=(),
        ),
        "line's configuration": Target(
            valid=[LINE],
            mutate=mutations.toml,
            feed=lambda data: parse_config(data, InspectConfig, "line.toml"),
            errors=(ConfigError,),
        ),
        "simulation's configuration": Target(
            valid=[SIMULATION],
            mutate=mutations.toml,
            feed=lambda data: parse_config(data, SimulationConfig, "simulation.toml"),
            errors=(ConfigError,),
        ),
        "schedule": Target(
            valid=[b"mon-fri 22:00-06:00, sat-sun"],
            mutate=mutations.raw,
            feed=text(parse_schedule),
            errors=(UsageError,),
        ),
    }


LINE = b"""
[products]
tile = "tile.edgeflame"
[cameras.infeed]
source = "camera:0"
product = "tile"
[cameras.infeed.verdict]
review_band = 0.1
[image_quality]
min_mean = 3.0
max_repeats = 5
[roi]
frame = [640, 480]
crop = [0, 0, 64, 64]
ignore = [[0, 0, 5, 5], [[1, 1], [9, 1], [9, 9]]]
[drift]
parts_per_year = 2e6
[self_test]
folder = "golden"
times = ["06:00"]
[trigger]
delay_ms = 10.0
[trigger.modbus]
host = "plc"
register = 3
[parts]
deadline_ms = 300.0
wrap = [1, 999]
number = "(.+)$"
[images]
max_age_days = 30.0
[outbox]
history = 100
[retry]
max_delay_s = 30.0
[mqtt]
broker = "mqtts://broker:8883"
fleet = "f"
line = "l"
[webhook]
url = "https://mes/results"
[web]
listen = "127.0.0.1:8080"
names = ["line-1"]
stale_after_s = 30.0
[modbus]
host = "plc"
layout = 2
[models]
public_keys = ["key.pub"]
keep = 2
"""
SIMULATION = b"""
seed = 1
[data]
kind = "boards"
train_parts = 8
image_size = 64
[partition]
beta = 0.5
[fleet]
rounds = 2
deadline_s = 60.0
[fleet.learning]
method = "flame"
[fleet.learning.training]
learning_rate = 1e-4
batch_size = 4
[fleet.learning.input]
height = 64
width = 64
roi = {x = 0, y = 0, width = 9, height = 9}
[evaluation]
every = 1
"""

REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n",
    b"GET /api/view?camera=camera HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/line HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /parts/1/plain.jpg?side=100 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    b"GET /parts/1/heat.jpg HTTP/1.0\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: line\r\n\r\n",
    *(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        for path, body in (
            ("/api/parts/1/mark", '{"was": "good"}'),
            ("/api/cameras/camera/do", '{"action": "acknowledge"}'),
            ("/api/cameras/camera/do", '{"action": "product", "product": "tile"}'),
        )
    ),
]


def send(address: str, request: bytes) -> None:
    """A request, whole or not, over a connection of its own; what comes back must not be an error of ours."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        # The server may have answered, and closed, before it has all.
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            status = connection.recv(64)
            assert not status.startswith(b"HTTP/1.1 500"), status


def image_files() -> dict[str, list[bytes]]:
    """Small pictures of every format, of the kinds of each that cameras and programs write."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8))
    grey, deep = colour.convert("L"), Image.fromarray(np.full((40, 24), 3000, np.uint16))
    turned = Image.Exif()
    turned[0x112] = 6
    alpha = colour.convert("RGBA")

    def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    packings = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    return {
        "JPEG": [encode(colour, "JPEG", exif=turned), encode(colour, "JPEG", progressive=True), encode(grey, "JPEG")],
        "PNG": [encode(one, "PNG") for one in (colour, grey, deep, alpha, colour.convert("P"), grey.convert("1"))],
        "BMP": [encode(one, "BMP") for one in (colour, grey, colour.convert("P"))],
        "TIFF": [encode(colour, "TIFF", compression=packing) for packing in packings]
        + [encode(deep, "TIFF", compression="tiff_lzw"), encode(grey.convert("1"), "TIFF", compression="group4")],
        "WebP": [encode(colour, "WEBP"), encode(alpha, "WEBP", lossless=True, exif=turned)],
    }


def kit() -> bytes:
    from datetime import datetime, timedelta, timezone

    pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    soon = datetime.now(timezone.utc) + timedelta(days=300)
    fields = {"fleet": "f", "name": "s", "role": "site", "broker": "mqtts://h:8883", "ca": pem, "cert": pem, "key": pem}
    return encode_kit(Kit(**fields, expires=soon))  # type: ignore[arg-type]


def journal_bytes(folder: Path) -> bytes:
    from aggregator.events import InitialSiteChosen, RunStarted, SiteJoined

    path = folder / "seed.sqlite"
    with Journal(path) as journal:
        started = RunStarted(run="0" * 32, config=AggregateConfig(), time="2026-01-01T00:00:00Z")
        joined = SiteJoined(site="a", install="1" * 32, initial="b" * 64)
        journal.append("0" * 32, [started, joined, InitialSiteChosen(site="a")])
    return path.read_bytes()


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    folder = tmp_path_factory.mktemp("fuzz")
    with station(folder / "page", write_small_package(folder / "page.edgeflame")) as (page, address):
        judge(page, part(0, "fail"))
        routes = Target(valid=REQUESTS, mutate=mutations.raw, feed=lambda data: send(address, data), errors=())
        yield {**targets(folder), "the page's routes": routes}


NAMES = (
    "message up", "message down", "round state", "presence", "bitmap", "topic", "safetensors", "update",
    "memory", "shared statistics", "package",
    "package statistics", "public key", "aggregator's configuration", "learning",
    "site's configuration", "kit", "broker URL", "groups file", "journal", "site's record", "wish", "request",
    "schedule", "announcement of a part", "JPEG image", "PNG image", "BMP image", "TIFF image", "WebP image",
    "line's configuration", "simulation's configuration", "the page's routes",
)  # fmt: skip


def test_every_decoder_is_named(all_targets: dict[str, Target]) -> None:
    assert set(all_targets) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_valid_input_is_read(name: str, all_targets: dict[str, Target]) -> None:
    for data in all_targets[name].valid:
        all_targets[name].feed(data)


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_input(name: str, all_targets: dict[str, Target]) -> None:
    target = all_targets[name]

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize="EDGEFLAME_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations.seeds())
    def run(seed: int) -> None:
        rng = random.Random(seed)
        data = target.mutate(rng.choice(target.valid), rng)
        with contextlib.suppress(*target.errors):
            target.feed(data)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MAX_GROWTH_BYTES


BOMB_BYTES = 16 << 20


def peak_of(work: Callable[[], Any], errors: tuple[type[EdgeFlameError], ...]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(errors):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_json_of_100_mb_is_refused_by_its_size() -> None:
    data = b'{"v":"1.0","type":"hello","x":"' + b"A" * 100_000_000 + b'"}'
    for decode in (m.decode_up, m.decode_down, m.decode_round, m.decode_presence):
        assert peak_of(lambda decode=decode: decode(data), (FederationError,)) < BOMB_BYTES


@pytest.mark.parametrize("length", [2**20, 2**31, 2**63, 2**64 - 1])
def test_headers_that_claim_more_than_is_there_allocate_nothing(length: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    assert peak_of(lambda: read_all(path), (DataError,)) < BOMB_BYTES


@pytest.mark.parametrize("shape", ["[1099511627776]", "[65536,65536,4]", "[0,99999999999]", "[-1]", "[1,1e99]"])
def test_tensors_that_claim_more_than_is_there_allocate_nothing(shape: str, tmp_path: Path) -> None:
    header = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,40]}}}}'.encode()
    path = tmp_path / "bomb"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    assert peak_of(lambda: read_all(path), (DataError,)) < BOMB_BYTES


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.edgeflame"
    with zipfile.ZipFile(small_package(tmp_path)) as sound, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in sound.infolist():
            archive.writestr(info.filename, bytes(1 << 28) if info.filename.endswith("onnx") else sound.read(info))
    assert path.stat().st_size < 1 << 20
    assert peak_of(lambda: read_package(path), (PackageError,)) < BOMB_BYTES


@pytest.mark.parametrize("field", ["size_bytes", "chunk_bytes"])
@pytest.mark.parametrize("number", [0, -1, 2**31, 2**53, 2**63, 2**64])
def test_manifests_of_impossible_chunk_counts_are_refused(field: str, number: int) -> None:
    offer = next(line for line in recorded("up") if b'"type":"offer"' in line)
    changed = m.msgspec.json.decode(offer)
    changed["manifest"][field] = number
    data = m.msgspec.json.encode(changed)
    assert peak_of(lambda: m.decode_up(data), (FederationError,)) < BOMB_BYTES
