"""What a line does not take, and says why: and that nothing of it is left, and the line goes on judging."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgeflame.archive import write_archive
from edgeflame.package import Package, ReferenceImage, read_package, write_package
from edgeflame.signing import public_key_id, sign_package, write_keys
from edgeflame.transfer.protocol import describe_file
from fleet.publish import describe_package
from tests.support.brokers import BrokerProcess
from tests.support.release_server import Server
from tests.support.rollout_daemon import Daemon, variant
from tests.support.signing_keys import Keys
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def daemon(
    embedded: BrokerProcess, signed: Path, keys: Keys, parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    with Daemon(
        tmp_path_factory.mktemp("refusals"),
        broker=embedded,
        model=signed,
        key=keys.public,
        source=parts,
        models="shadow_parts = 40\nmax_bytes = 1000000\nmax_slowdown = 10",
        fleet="refusals",
    ) as process:
        yield process


@pytest.fixture(scope="module")
def server(daemon: Daemon, embedded: BrokerProcess) -> Iterator[Server]:
    with Server(embedded, fleet="refusals") as process:
        yield process


@pytest.fixture(scope="module")
def key(keys: Keys) -> str:
    return public_key_id(keys.public)


def flip(path: Path, member: str, offset: int, out: Path) -> Path:
    """One bit of a member is another."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        start = info.header_offset + 30 + len(member.encode()) + offset
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    out.write_bytes(data)
    return out


def with_members(path: Path, out: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """With other members, and a zip that is right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    write_archive(out, members)
    return out


def unsigned(signed: Path, tmp_path: Path, package: Package) -> Path:
    return with_members(signed, tmp_path / "p", lambda members: members.__delitem__("signature.json"))


def unsigned_and_damaged(signed: Path, tmp_path: Path, package: Package) -> Path:
    return flip(unsigned(signed, tmp_path, package), "statistics.safetensors", 900, tmp_path / "damaged")


def of_another_key(signed: Path, tmp_path: Path, package: Package) -> Path:
    write_keys(tmp_path / "other")
    return variant(package, tmp_path / "p", tmp_path / "other" / "edgeflame-key.pem")


def with_a_flipped_bit_in_the_model(signed: Path, tmp_path: Path, package: Package) -> Path:
    return flip(signed, "model.onnx", 1000, tmp_path / "p")


def with_a_flipped_bit_in_the_statistics(signed: Path, tmp_path: Path, package: Package) -> Path:
    return flip(signed, "statistics.safetensors", 900, tmp_path / "p")


def with_another_model_and_a_manifest_to_fit(signed: Path, tmp_path: Path, package: Package) -> Path:
    manifest = msgspec.structs.replace(package.manifest, created="2030-01-01T00:00:00Z")
    forged = tmp_path / "forged"
    write_package(
        forged,
        manifest=manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=package.references,
    )
    with zipfile.ZipFile(signed) as archive:
        signature = archive.read("signature.json")
    return with_members(forged, tmp_path / "p", lambda members: members.update({"signature.json": signature}))


def of_another_threshold(signed: Path, tmp_path: Path, package: Package) -> Path:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        manifest["threshold"]["value"] *= 100
        members["manifest.json"] = json.dumps(manifest).encode()

    return with_members(signed, tmp_path / "p", change)


def with_a_signature_cut_short(signed: Path, tmp_path: Path, package: Package) -> Path:
    def change(members: dict[str, bytes]) -> None:
        signature = json.loads(members["signature.json"])
        signature["signature"] = signature["signature"][:20]
        members["signature.json"] = json.dumps(signature).encode()

    return with_members(signed, tmp_path / "p", change)


def of_an_older_format(signed: Path, tmp_path: Path, package: Package) -> Path:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        manifest["format_version"] = 0
        members["manifest.json"] = json.dumps(manifest).encode()

    return with_members(signed, tmp_path / "p", change)


def no_package(signed: Path, tmp_path: Path, package: Package) -> Path:
    (tmp_path / "p").write_bytes(b"#!/bin/sh\nrm -rf /\n" * 1000)
    return tmp_path / "p"


def cut_short(signed: Path, tmp_path: Path, package: Package) -> Path:
    (tmp_path / "p").write_bytes(signed.read_bytes()[:-1000])
    return tmp_path / "p"


MADE = [
    (unsigned, "unsigned", "not signed"),
    (unsigned_and_damaged, "unsigned", "not signed"),
    (of_another_key, "untrusted", "signed with key"),
    (with_a_flipped_bit_in_the_model, "package", "model.onnx"),
    (with_a_flipped_bit_in_the_statistics, "package", "statistics.safetensors"),
    (with_another_model_and_a_manifest_to_fit, "altered", "was altered after key"),
    (of_another_threshold, "altered", "was altered after key"),
    (with_a_signature_cut_short, "altered", "was altered after key"),
    (of_an_older_format, "package", "package format 0, this EdgeFlame"),
    (no_package, "package", "not a model package"),
    (cut_short, "package", "not a model package"),
]


@pytest.mark.parametrize(("make", "reason", "words"), MADE, ids=[make.__name__ for make, _, _ in MADE])
def test_what_is_not_what_it_should_be_is_refused(
    make: Callable[[Path, Path, Package], Path],
    reason: str,
    words: str,
    signed: Path,
    referenced: Package,
    key: str,
    server: Server,
    daemon: Daemon,
    tmp_path: Path,
) -> None:
    path = make(signed, tmp_path, referenced)
    outcome = server.wait_for(server.announce(path, key=key))
    assert (outcome.fate, outcome.reason) == ("refused", reason)
    assert words in outcome.detail
    assert str(daemon.state) not in outcome.detail, "the line's folders are nobody's business"
    assert_nothing_is_left(daemon, server, referenced)


def assert_nothing_is_left(daemon: Daemon, server: Server, package: Package) -> None:
    assert server.models is not None
    assert server.models.candidate is None
    assert (server.models.present.sha256, server.models.present.origin) == (package.sha256, "file")
    folder = daemon.state / "models"
    wait_for(lambda: not list(folder.glob("*.edgeflame")), "the package is deleted")
    assert not [path for path in (folder / "incoming").rglob("*") if path.is_file() and path.name != "lock"]
    before = daemon.num_results
    wait_for(lambda: daemon.num_results > before, "the line judges on")
    assert daemon.judging_model == package.sha256[:12]


def test_what_would_be_refused_anyway_is_not_fetched(
    signed: Path, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    server.num_chunks = 0
    outcome = server.wait_for(server.announce(signed, key="0123456789abcdef"))
    assert (outcome.fate, outcome.reason) == ("refused", "untrusted")
    (tmp_path / "large").write_bytes(bytes(1_000_001))
    outcome = server.wait_for(server.announce(tmp_path / "large", key=key))
    assert (outcome.fate, outcome.reason) == ("refused", "too_large")
    assert server.num_chunks == 0
    assert_nothing_is_left(daemon, server, referenced)


def test_other_bytes_than_announced_are_tried_three_times_and_given_up(
    signed: Path, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    manifest = msgspec.structs.replace(describe_file(signed, chunk_bytes=4096), sha256="5" * 64)
    server.num_chunks = 0
    outcome = server.wait_for(server.announce(signed, key=key, manifest=manifest))
    assert (outcome.fate, outcome.reason) == ("refused", "hash")
    assert server.num_chunks >= 3 * manifest.num_chunks
    assert_nothing_is_left(daemon, server, referenced)


def test_another_product_in_the_package_or_the_announcement(
    signed: Path, keys: Keys, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    other = variant(referenced, tmp_path / "other", keys.private, product="another piece")
    server.announce(other, key=key, product="another piece")
    outcome = server.wait_for(server.announce(other, key=key))
    assert (outcome.fate, outcome.reason) == ("refused", "product")
    assert server.models is not None
    assert len(daemon.record["outcomes"]) == len(server.models.outcomes), "one for others is not our business"
    assert_nothing_is_left(daemon, server, referenced)


def test_a_model_that_scores_otherwise_here_than_it_was_trained_to(
    keys: Keys, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    first = referenced.references[0]
    wrong = msgspec.structs.replace(first.expected, score=first.expected.score * 1.1)
    path = tmp_path / "wrong"
    write_package(
        path,
        manifest=referenced.manifest,
        model_onnx=referenced.model_onnx,
        statistics=referenced.statistics,
        references=[ReferenceImage(png=first.png, expected=wrong), *referenced.references[1:]],
    )
    sign_package(path, keys.private)
    outcome = server.wait_for(server.announce(path, key=key))
    assert (outcome.fate, outcome.reason) == ("refused", "parity")
    assert_nothing_is_left(daemon, server, referenced)


def test_a_model_that_judges_otherwise_is_refused_with_the_figures_and_pictures(
    keys: Keys, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    strict = variant(referenced, tmp_path / "strict", keys.private, factor=0.01)
    outcome = server.wait_for(server.announce(strict, key=key))
    assert (outcome.fate, outcome.reason) == ("refused", "disagreement")
    found = outcome.disagreement
    assert found is not None
    assert found.newly_failed == found.differing > 0
    assert found.newly_passed == found.faults == 0
    folder = daemon.state / "models" / "shadow" / read_package(strict).sha256
    assert json.loads((folder / "report.json").read_bytes())["differing"] == found.differing
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert any(name.endswith("-pass-fail.png") for name in pictures)
    assert_nothing_is_left(daemon, server, referenced)


def test_what_was_refused_is_not_tried_again_unless_it_is_published_anew(
    signed: Path, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    path = unsigned(signed, tmp_path, referenced)
    release = server.announce(path, key=key)
    first = server.wait_for(release)
    fetched = server.num_chunks
    offers = len(daemon.named("release_offered"))
    server.say(release)
    again = server.wait_for(server.announce(path, key=key))
    assert (again.fate, again.reason) == ("refused", "unsigned")
    assert server.outcome(release) == first, "the repetition changed nothing"
    assert server.num_chunks <= 2 * fetched
    assert server.num_chunks > fetched
    assert len(daemon.named("release_offered")) == offers + 1, "the repetition was not taken up"


def test_what_nobody_takes_does_not_end_what_is_being_tried(
    keys: Keys, key: str, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    good = variant(referenced, tmp_path / "good.edgeflame", keys.private, factor=1.03)
    release = server.announce(good, key=key, shadow_parts=100_000)
    wait_for(lambda: server.models and server.models.candidate and server.models.candidate.done, "it is tried")
    outcome = server.wait_for(server.announce(good, key="0123456789abcdef"))
    assert (outcome.fate, outcome.reason) == ("refused", "untrusted")
    assert server.models is not None
    assert server.models.candidate is not None
    assert (server.models.candidate.release, server.models.candidate.stage) == (release.release, "shadow")
    server.say(msgspec.structs.replace(release, withdrawn=True))
    assert server.wait_for(release).fate == "withdrawn"
    assert_nothing_is_left(daemon, server, referenced)


def test_after_all_that_a_good_one_is_taken_tried_and_switched_to_without_a_gap(
    keys: Keys, server: Server, daemon: Daemon, referenced: Package, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    sha256 = read_package(new).sha256
    (standing,) = daemon.publish(new, describe_package(new, keys.public))
    assert (standing.word, standing.is_good) == ("running", True), standing
    said = daemon.said()
    assert said is not None
    assert (said.present.sha256, said.present.origin, said.present.on_trial) == (sha256, "release", True)
    assert said.previous[-1].sha256 == referenced.sha256
    found = said.outcomes[0].disagreement
    assert found is not None
    assert found.parts >= 40
    assert (found.differing, found.faults) == (0, 0)
    assert found.correlation == pytest.approx(1.0)
    assert found.slowdown is not None
    wait_for(lambda: daemon.judging_model == sha256[:12], "the new model judges")
    assert daemon.stop() in (0, 130)
    results = daemon.results()
    assert [one["sequence"] for one in results] == list(range(len(results))), "no part is missing"
    models = [one["model"] for one in results]
    first = models.index(sha256[:12])
    assert set(models[:first]) == {referenced.sha256[:12]}
    assert set(models[first:]) == {sha256[:12]}, "from one part to the next, and not back"
    assert {one["verdict"] for one in results} == {"pass", "fail"}


def test_nothing_went_wrong_in_silence(daemon: Daemon) -> None:
    assert not daemon.named("models_thread_failed")
    assert not daemon.named("models_not_settled")
    assert not daemon.named("watcher_failed")
