"""After a switch: the trial, roll-backs by themselves and by word, restarts and SIGKILL at the worst moments."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from brokers import BrokerProcess, wait_for
from daemon import Daemon, stream, variant
from keys import Keys
from server import Server
from small_model import good_image

from edgeflame.brokerurl import parse_broker_url
from edgeflame.images import ImageU8
from edgeflame.package import Package, read_package
from edgeflame.releases.onlooker import withdraw_release
from edgeflame.signing import public_key_id

pytestmark = pytest.mark.timeout(120)


def faint_image(seed: int) -> ImageU8:
    """With a mark that only a strict model fails."""
    image = good_image(seed)
    image[16:32, 16:32] -= 2
    return image


def score_of(package: Package, image: ImageU8) -> float:
    from edge.runtimes import open_runtime

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
    parts = stream(tmp_path / "parts", [good_image(seed) for seed in range(8)], 2500)
    stream(parts, [faint_image(3), good_image(1), good_image(2)], 20_000, start=2500)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=parts,
            fleet="trial",
            models="shadow_parts = 30\nmax_slowdown = 10",
        ) as daemon,
        Server(embedded, fleet="trial") as server,
    ):
        release = server.announce(strict, key=public_key_id(keys.public))
        server.wait_for(release, "running")
        outcome = server.wait_for(release, "rolled_back")
        assert outcome.reason == "rejects_too_much"
        assert "fails parts that the model before passed" in outcome.detail
        before = referenced.sha256[:12]
        wait_for(lambda: daemon.results()[-1]["model"] == before, "the model before judges again")
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
        withdraw_release(parse_broker_url(embedded.url), daemon.topics, "test piece", connect_timeout_s=10)
        daemon.start()
        outcome = server.wait_for(release, "withdrawn")
        assert outcome.detail == "by its publisher"
        # It began with what was decided last, and went back when it heard of it.
        assert daemon.named("model_from_release")
        wait_for(lambda: daemon.results()[-1]["model"] == referenced.sha256[:12], "the file judges again")
        assert daemon.record["present"] is None


@pytest.mark.parametrize("moment", ["fetching", "shadow", "running"])
def test_sigkill_at_any_moment_leaves_the_last_decision(
    moment: str,
    embedded: BrokerProcess,
    signed: Path,
    referenced: Package,
    keys: Keys,
    parts: Path,
    tmp_path: Path,
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    sha256, key = read_package(new).sha256, public_key_id(keys.public)
    shadow_parts = 60 if moment != "shadow" else 100_000
    fleet = f"killed-{moment}"
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=signed,
            key=keys.public,
            source=parts,
            fleet=fleet,
            models=f"shadow_parts = {shadow_parts}\nmax_slowdown = 10",
        ) as daemon,
        Server(embedded, fleet=fleet) as server,
    ):
        server.max_chunks = 4 if moment == "fetching" else None
        release = server.announce(new, key=key)
        if moment == "fetching":
            # The publisher is gone in the middle: the line has some chunks, and waits.
            partial = daemon.state / "models" / "incoming" / "partial" / "publisher" / sha256
            wait_for(lambda: partial.exists() and partial.stat().st_blocks * 512 >= 4 * 4096, "some chunks are there")
        elif moment == "shadow":
            candidate_parts = lambda: server.models and server.models.candidate and server.models.candidate.done  # noqa: E731
            wait_for(candidate_parts, "the shadow run has begun")
        else:
            server.wait_for(release, "running")
        daemon.kill()
        number = len(daemon.results())
        record = json.loads((daemon.state / "models" / "record.json").read_bytes())["products"]["test piece"]
        stage = None if record["candidate"] is None else record["candidate"]["stage"]
        assert stage == {"fetching": "fetching", "shadow": "shadow", "running": None}[moment]
        server.max_chunks, sent = None, server.num_chunks
        if moment == "shadow":
            config = tmp_path / "line" / "line.toml"
            config.write_text(config.read_text().replace("100000", "60"))
        daemon.start()
        if moment != "running":
            server.wait_for(release, "running")
        wait_for(lambda: len(daemon.results()) > number + 5, "the line judges again")
        first = daemon.results()[number]["model"]
        assert first == (sha256[:12] if moment == "running" else referenced.sha256[:12])
        wait_for(lambda: daemon.results()[-1]["model"] == sha256[:12], "the new model judges")
        if moment == "fetching":
            total = -(-new.stat().st_size // 4096)
            assert server.num_chunks - sent <= total - 4 + 1, "what had come was not sent again"
        else:
            assert server.num_chunks == sent, "it was all there"


def test_who_puts_another_file_into_the_configuration_has_decided_anew(
    embedded: BrokerProcess, signed: Path, referenced: Package, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    other = variant(referenced, tmp_path / "other.edgeflame", keys.private, factor=1.02)
    configured = tmp_path / "configured.edgeflame"
    os.link(signed, configured)
    with (
        Daemon(
            tmp_path / "line",
            broker=embedded,
            model=configured,
            key=keys.public,
            source=parts,
            fleet="configured",
            models="shadow_parts = 0\ntrial_parts = 0",
        ) as daemon,
        Server(embedded, fleet="configured") as server,
    ):
        release = server.announce(new, key=public_key_id(keys.public))
        server.wait_for(release, "confirmed")

        def started_with() -> str:
            number = len(daemon.results())
            daemon.start()
            wait_for(lambda: len(daemon.results()) > number, "the line judges again")
            return str(daemon.results()[number]["model"])

        daemon.kill()
        assert started_with() == read_package(new).sha256[:12], "the release stays"
        # Its key is trusted no more, or the package was damaged: the file.
        daemon.kill()
        stored = daemon.state / "models" / f"{read_package(new).sha256}.edgeflame"
        data = stored.read_bytes()
        stored.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        assert started_with() == referenced.sha256[:12]
        assert daemon.named("released_model_not_used")
        wait_for(lambda: server.models and server.models.outcomes[0].fate == "rolled_back", "the line says so")
        # Taken again on purpose, and then a new file in the configuration: the newer decision.
        again = server.announce(new, key=public_key_id(keys.public))
        server.wait_for(again, "confirmed")
        daemon.kill()
        configured.unlink()
        os.link(other, configured)
        assert started_with() == read_package(other).sha256[:12]
        assert daemon.named("model_from_file")
        wait_for(lambda: server.models and server.models.present.origin == "file", "the line says so")


def test_a_threshold_of_the_configuration_is_not_for_every_model(
    embedded: BrokerProcess, signed: Path, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    daemon = Daemon(
        tmp_path / "line",
        broker=embedded,
        model=signed,
        key=keys.public,
        source=parts,
        models="\n[verdict]\nthreshold = 3.0",
    )
    with daemon:
        assert daemon.wait() == 5
    assert "a threshold is a raw distance of one model" in (tmp_path / "line" / "log").read_text()
