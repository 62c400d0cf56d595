"""After a switch: the trial, roll-backs by themselves and by word, restarts and SIGKILL at the worst moments."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cli import cli
from edge.cameras import plan_cameras
from edge.check import _models
from edge.config import InspectConfig
from edge.inspector import InspectorLoader
from edge.models.state import (
    ConfiguredProduct,
    ModelState,
    ProductState,
    ReleasedVersion,
    package_files,
    settle_at_start,
)
from edge.models.store import PackageStore, TrustedKeys
from edgeflame.archive import open_archive, write_archive
from edgeflame.config import load_config
from edgeflame.errors import ConfigError
from edgeflame.images import ImageU8
from edgeflame.mqtt.url import parse_broker_url
from edgeflame.package import Package, read_package
from edgeflame.signing import public_key_id, sign_package, verify_release, write_keys
from fleet.publish import withdraw_release
from tests.support.brokers import BrokerProcess
from tests.support.release_server import Server
from tests.support.rollout_daemon import Daemon, stream, variant
from tests.support.signing_keys import Keys
from tests.support.small_package import good_image
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(120)


def faint_image(seed: int) -> ImageU8:
    """With a mark that only a strict model fails."""
    image = good_image(seed)
    image[16:32, 16:32] -= 2
    return image


def score_of(package: Package, image: ImageU8) -> float:
    from edge.runtimes.load import open_runtime

    return float(open_runtime(package.model_onnx, device="cpu", num_threads=1).score(image[None]).scores[0])


def test_a_model_that_proves_bad_is_rolled_back_by_itself_and_not_taken_again(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, tmp_path: Path
) -> None:
    threshold = referenced.manifest.threshold.value
    faint, good = score_of(referenced, faint_image(3)), max(score_of(referenced, good_image(seed)) for seed in range(8))
    assert good < faint < threshold, "the line's model passes what a strict one fails"
    factor = (good + faint) / 2 / threshold
    strict = variant(referenced, tmp_path / "strict.edgeflame", keys.private, factor=factor)
    # First parts on which both agree, for as long as the shadow run lasts; then faint marks.
    parts = stream(tmp_path / "parts", [good_image(seed) for seed in range(8)], 2000)
    stream(parts, [faint_image(3), good_image(1), good_image(2)], 20_000, start=2000)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=parts,
            fleet="trial",
            models="shadow_parts = 30\nmax_slowdown = 10",
            parts_per_s=250.0,
        ) as daemon,
        Server(embedded, fleet="trial") as server,
    ):
        release = server.announce(strict, key=public_key_id(keys.public))
        server.wait_for(release, "running")
        outcome = server.wait_for(release, "rolled_back")
        assert outcome.reason == "rejects_too_much"
        assert "fails parts that the model before passed" in outcome.detail
        before = referenced.sha256[:12]
        wait_for(lambda: daemon.judging_model == before, "the model before judges again")
        assert server.models is not None
        assert (server.models.present.sha256, server.models.present.origin) == (referenced.sha256, "file")
        results = daemon.results()
        assert [one["sequence"] for one in results] == list(range(len(results))), "no part is missing"
        models = [one["model"] for one in results]
        assert sum(a != b for a, b in itertools.pairwise(models)) == 2, "there and back"
        assert not (daemon.state / "models" / f"{read_package(strict).sha256}.edgeflame").exists()
        # Said again, it is not taken; nor after a restart, when the broker says it anew.
        server.say(release)
        daemon.kill()
        daemon.start()
        count = len(daemon.named("broker_connected"))
        wait_for(lambda: len(daemon.named("broker_connected")) >= count + 2, "the line is there again")
        assert daemon.record["decided"] == [release.release]
        assert daemon.record["candidate"] is None
        assert len(daemon.named("release_offered")) == 1


def test_a_withdrawn_release_goes_also_from_a_line_that_was_off(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=parts,
            fleet="withdrawn",
            models="shadow_parts = 0",
        ) as daemon,
        Server(embedded, fleet="withdrawn") as server,
    ):
        release = server.announce(new, key=public_key_id(keys.public))
        server.wait_for(release, "running")
        daemon.kill()
        number = daemon.num_results
        withdraw_release(parse_broker_url(embedded.url), daemon.topics, "test piece", connect_timeout_s=10)
        daemon.start()
        outcome = server.wait_for(release, "withdrawn")
        assert outcome.detail == "by its publisher"
        # It began with what was decided last, and went back when it heard of it.
        assert daemon.named("model_from_release")
        assert daemon.results()[number]["model"] == read_package(new).sha256[:12]
        wait_for(lambda: daemon.judging_model == referenced.sha256[:12], "the file judges again")
        assert daemon.record["present"] is None


def test_sigkill_while_it_is_fetched_and_while_it_is_tried(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    sha256, present = read_package(new).sha256, referenced.sha256[:12]
    num_chunks = -(-new.stat().st_size // 4096)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=parts,
            fleet="killed",
            models="shadow_parts = 100000\nmax_slowdown = 10",
        ) as daemon,
        Server(embedded, fleet="killed") as server,
    ):

        def killed_at(stage: str) -> None:
            daemon.kill()
            candidate = daemon.record["candidate"]
            assert (candidate["release"]["manifest"]["sha256"], candidate["stage"]) == (sha256, stage)

        def started_with() -> str:
            number = daemon.num_results
            daemon.start()
            wait_for(lambda: daemon.num_results > number, "the line judges again")
            return str(daemon.results()[number]["model"])

        # The publisher is gone in the middle: the line has some chunks, and waits.
        server.max_chunks = 4
        release = server.announce(new, key=public_key_id(keys.public))
        partial = daemon.state / "models" / "incoming" / "partial" / "publisher" / sha256
        wait_for(lambda: partial.exists() and partial.stat().st_blocks * 512 >= 4 * 4096, "some chunks are there")
        killed_at("fetching")
        # Both come back.
        server.max_chunks, before = None, server.num_chunks
        assert started_with() == present
        wait_for(lambda: server.models and server.models.candidate and server.models.candidate.done, "it is tried")
        wait_for(lambda: server.models and server.models.candidate and server.models.candidate.stage == "shadow", "")
        assert server.num_chunks - before <= num_chunks - 4, "what had come was not sent again"
        killed_at("shadow")
        config = tmp_path / "line" / "line.toml"
        config.write_text(config.read_text().replace("100000", "60"))
        before = server.num_chunks
        assert started_with() == present
        server.wait_for(release, "running")
        assert server.num_chunks == before, "it was all there"
        wait_for(lambda: daemon.judging_model == sha256[:12], "the new model judges")


def test_what_a_line_starts_with(signed: Path, referenced: Package, keys: Keys, tmp_path: Path) -> None:
    first = variant(referenced, tmp_path / "first.edgeflame", keys.private)
    second = variant(referenced, tmp_path / "second.edgeflame", keys.private, factor=1.02)
    write_keys(tmp_path / "other")
    store = PackageStore(tmp_path / "models")
    configured = ConfiguredProduct(name="piece", product="test piece", file=str(signed), sha256=referenced.sha256)
    versions = []
    for path in (second, first):
        sha256 = read_package(path).sha256
        os.link(path, store.path(sha256))
        versions.append(
            ReleasedVersion(sha256=sha256, release="0" * 32, name=path.name, since=datetime.now(timezone.utc))
        )
    entry = ProductState(configured=referenced.sha256, present=versions[0], previous=(versions[1],), on_trial=True)
    record = ModelState(products={"test piece": entry})

    def settled(product: ConfiguredProduct = configured, key: Path = keys.public) -> tuple[ProductState, Path]:
        trusted = TrustedKeys((str(key),))
        found = settle_at_start(record, {"test piece": product}, store=store, keys=trusted)
        return found["test piece"], package_files(found, {"test piece": product}, store)["piece"]

    assert settled() == (entry, store.path(versions[0].sha256)), "the release stays"
    # Another file in the configuration is a newer decision.
    other = msgspec.structs.replace(configured, sha256="1" * 64)
    found, file = settled(other)
    assert (found.present, found.previous, found.configured, file) == (None, (), "1" * 64, signed)
    # A key that is trusted no more.
    found, file = settled(key=tmp_path / "other" / "edgeflame-key.pub")
    assert (found.present, file) == (None, signed)
    assert found.outcomes[0].reason == "untrusted"
    # A damaged package gives way to the one before it, at last to the file.
    stored = store.path(versions[0].sha256)
    data = bytearray(stored.read_bytes())
    data[5000] ^= 1
    stored.unlink()
    stored.write_bytes(data)
    found, file = settled()
    assert (found.present, file) == (versions[1], store.path(versions[1].sha256))
    assert (found.outcomes[0].fate, found.outcomes[0].reason) == ("rolled_back", "package")
    store.path(versions[1].sha256).unlink()
    assert settled()[1] == signed


def test_a_threshold_of_the_configuration_is_not_for_every_model(signed: Path, keys: Keys, tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    section = f'[models]\npublic_keys = ["{keys.public}"]\n'
    arguments = ["inspect", "--model", str(signed), "--source", str(tmp_path), "--config", str(config)]

    def error(text: str, *more: str) -> str:
        config.write_text(text)
        result = CliRunner().invoke(cli, [*arguments, *more])
        assert isinstance(result.exception, ConfigError), result.output
        return str(result.exception)

    mqtt = '[mqtt]\nbroker = "mqtt://127.0.0.1:1"\nfleet = "f"\nline = "l"\n'
    state = ("--state", str(tmp_path / "state"))
    assert "needs the section [mqtt]" in error(section, *state)
    assert "needs the section [mqtt]" in error(section + mqtt)
    assert "a threshold is a raw distance of one model" in error(section + mqtt, "--threshold", "3", *state)
    loader = InspectorLoader(device="cpu")
    plan = plan_cameras(
        load_config(config, InspectConfig), model=signed, source=str(tmp_path), product_of=lambda file: "test piece"
    )
    (finding,) = _models(plan, loader, tmp_path / "state")
    assert finding.level == "ok"
    assert f"signed with key {public_key_id(keys.public)} are taken; of released models none" in finding.what
    (finding,) = _models(plan, loader, None)
    assert finding.level == "problem"
    assert not (tmp_path / "state").exists(), "a check writes nothing"


_DIES = """
import os, sys
from pathlib import Path
from edge.models.store import PackageStore
with PackageStore(Path(sys.argv[1])).checking("1" * 32):
    os._exit(9)
"""


def test_a_package_whose_check_ended_the_process_is_not_checked_again(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=stream(tmp_path / "parts", [good_image(seed) for seed in range(4)], 5_000),
            fleet="died",
            models="shadow_parts = 0\ntrial_parts = 0",
        ) as daemon,
        Server(embedded, fleet="died") as server,
    ):
        server.max_chunks = 1
        release = server.announce(new, key=public_key_id(keys.public), release="1" * 32)
        wait_for(lambda: server.num_chunks == 1, "it is being fetched")
        daemon.kill()
        folder = daemon.state / "models"
        subprocess.run([sys.executable, "-c", _DIES, str(folder)], check=False, timeout=60)
        assert PackageStore(folder).died_checking("1" * 32)
        server.max_chunks = None
        daemon.start()
        outcome = server.wait_for(release)
        assert (outcome.fate, outcome.reason) == ("refused", "died")
        assert "publish --again" in outcome.detail
        assert not (folder / "checking").exists()
        server.wait_for(server.announce(new, key=public_key_id(keys.public)), "confirmed")
        assert not (folder / "checking").exists()


def test_an_older_release_is_refused_unless_a_person_says_so(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, tmp_path: Path
) -> None:
    def numbered(name: str, number: int, factor: float) -> Path:
        path = variant(referenced, tmp_path / f"{name}.edgeflame", keys.private, factor=factor)
        sign_package(path, keys.private, release=number)
        return path

    # The file's own number is the time of its signature.
    start = verify_release(referenced, keys.public)
    old, between, new = (numbered(name, start + n, 1 + n / 100) for n, name in ((1, "old"), (2, "between"), (3, "new")))
    key = public_key_id(keys.public)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=stream(tmp_path / "parts", [good_image(seed) for seed in range(4)], 8_000),
            fleet="older",
            models="shadow_parts = 0\ntrial_parts = 0",
        ) as daemon,
        Server(embedded, fleet="older") as server,
    ):

        def refused(path: Path) -> str:
            outcome = server.wait_for(server.announce(path, key=key))
            assert outcome.fate == "refused", outcome
            assert outcome.reason is not None
            return outcome.reason

        assert refused(numbered("before the file", start - 1, 1.04)) == "older", "than the configuration's file"
        server.wait_for(server.announce(new, key=key), "confirmed")
        assert refused(old) == "older"
        stripped, raised = tmp_path / "stripped", tmp_path / "raised"
        for path, change in ((stripped, {"release": 0}), (raised, {"release": start + 9})):
            with open_archive(old) as archive:
                members = {name: archive.read_small(name, 1 << 24) or b"" for name in archive.names}
            signature = json.loads(members["signature.json"])
            members["signature.json"] = json.dumps({**signature, **change}).encode()
            write_archive(path, {"manifest.json": members.pop("manifest.json"), **members})
        assert refused(stripped) == "older"
        assert refused(raised) == "altered"
        daemon.kill()
        daemon.start()
        daemon.wait_until_announced()
        arguments = ["line", "switch-model", "line-1", "test piece", "--allow-older"]
        arguments += ["--broker", embedded.url, "--fleet", "older"]
        wait_for(lambda: "no release was refused as older" in CliRunner().invoke(cli, arguments).stderr, "it answers")
        release = server.announce(old, key=key)
        assert server.wait_for(release).reason == "older", "also after a restart"
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.stderr
        server.wait_for(release, "confirmed")
        wait_for(lambda: daemon.judging_model == read_package(old).sha256[:12], "the older model judges")
        server.wait_for(server.announce(between, key=key), "confirmed")
        assert refused(old) == "older"
