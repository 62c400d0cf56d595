"""Blob transfer over a fake link that drops, doubles, reorders, damages and cuts; and on a real disk."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeflame.errors import StorageError
from edgeflame.mqtt.messages import BlobManifest, BlobNeed
from edgeflame.transfer.protocol import MAX_ATTEMPTS, ChunkKind, Receiver, Sender, describe_file, unpack_mask
from edgeflame.transfer.store import BlobStore


def describe(blob: bytes, chunk_bytes: int, folder: Path) -> BlobManifest:
    path = folder / "blob"
    path.write_bytes(blob)
    return describe_file(path, chunk_bytes=chunk_bytes)


@dataclass
class Faults:
    """Chances of what happens to a message, and until which step of the transfer; then the link is perfect."""

    drop: float
    double: float
    damage: float
    cut: float
    reorder: float
    delay: float
    until: int


@dataclass
class Side:
    """A receiver with its memory for a disk."""

    receiver: Receiver
    data: bytearray
    done: bool = False
    given_up: bool = False


@dataclass
class FakeLink:
    random: random.Random
    faults: Faults
    step: int = 0
    to_receivers: list[tuple[int, bytes]] = field(default_factory=list)
    to_sender: list[tuple[str, BlobNeed]] = field(default_factory=list)
    held: list[tuple[int, list, object]] = field(default_factory=list)

    def advance(self) -> None:
        """One step on; what was held back long enough goes in."""
        self.step += 1
        for entry in [entry for entry in self.held if entry[0] <= self.step]:
            self.held.remove(entry)
            entry[1].append(entry[2])

    def chunk(self, index: int, data: bytes) -> None:
        self._put(self.to_receivers, (index, self._hurt(data)))

    def need(self, name: str, need: BlobNeed) -> None:
        self._put(self.to_sender, (name, need))

    def _put(self, queue: list, item: object) -> None:
        chance, faults = self.random.random, self.faults
        broken = self.step < faults.until
        if broken and chance() < faults.drop:
            return
        for _ in range(2 if broken and chance() < faults.double else 1):
            if broken and chance() < faults.delay:
                self.held.append((self.step + self.random.randint(1, 60), queue, item))
                continue
            at = self.random.randint(0, len(queue)) if broken and chance() < faults.reorder else len(queue)
            queue.insert(at, item)

    def _hurt(self, data: bytes) -> bytes:
        if self.step < self.faults.until and data:
            if self.random.random() < self.faults.damage:
                at = self.random.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ (1 << self.random.randrange(8))]) + data[at + 1 :]
            if self.random.random() < self.faults.cut:
                data = data[: self.random.randrange(len(data))]
        return data


def run_transfer(blob: bytes, manifest: BlobManifest, sides: dict[str, Side], link: FakeLink) -> int:
    """Everyone talks until all have it; returns the number of chunks sent. Time passes only when all is quiet."""
    sender = Sender(manifest)
    now, sent = 0.0, 0
    for name, side in sides.items():
        link.need(name, side.receiver.make_request(resend=True, now=now))
    while not all(side.done or side.given_up for side in sides.values()):
        link.advance()
        assert link.step < 20_000, "the transfer never ends"
        progress = False
        if link.to_sender:
            name, need = link.to_sender.pop(0)
            sender.handle_request(
                name, unpack_mask(need.missing, manifest.num_chunks), resend=need.resend, now=now, window=need.window
            )
            progress = True
        if (index := sender.next_chunk(now)) is not None:
            sent += 1
            link.chunk(index, blob[manifest.offset(index) : manifest.offset(index) + manifest.length(index)])
            progress = True
        if link.to_receivers:
            index, data = link.to_receivers.pop(0)
            for name, side in sides.items():
                take(side, manifest, index, data, now)
                if side.receiver.ack_due(now):
                    link.need(name, side.receiver.make_request(resend=False, now=now))
            progress = True
        if not progress:
            now += 1.0
            for name, side in sides.items():
                if not side.done and side.receiver.is_stalled(now):
                    link.need(name, side.receiver.make_request(resend=True, now=now))
    return sent


def take(side: Side, manifest: BlobManifest, index: int, data: bytes, now: float) -> None:
    if side.receiver.add_chunk(index, data, now=now) is ChunkKind.NEW:
        side.data[manifest.offset(index) : manifest.offset(index) + len(data)] = data
        if side.receiver.is_complete and not side.done:
            side.done = hashlib.sha256(side.data).hexdigest() == manifest.sha256
            if not side.done:
                side.given_up = not side.receiver.restart()


def new_side(manifest: BlobManifest, now: float = 0.0) -> Side:
    have = np.zeros(manifest.num_chunks, dtype=np.bool_)
    return Side(receiver=Receiver(manifest, have=have, now=now), data=bytearray(manifest.size_bytes))


chance = st.floats(0, 0.6)
faults = st.builds(
    Faults,
    drop=chance,
    double=chance,
    damage=chance,
    cut=chance,
    reorder=chance,
    delay=chance,
    until=st.integers(0, 400),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blob=st.binary(min_size=1, max_size=3000),
    chunk_bytes=st.integers(1, 700).filter(lambda n: n > 20),
    names=st.sets(st.sampled_from("abc"), min_size=1),
    trouble=faults,
    seed=st.integers(0, 2**32),
)
def test_a_bad_link_costs_time_and_never_gives_wrong_bytes(
    tmp_path: Path, blob: bytes, chunk_bytes: int, names: set[str], trouble: Faults, seed: int
) -> None:
    manifest = describe(blob, chunk_bytes, tmp_path)
    sides = {name: new_side(manifest) for name in sorted(names)}
    run_transfer(blob, manifest, sides, FakeLink(random.Random(seed), trouble))
    assert all(bytes(side.data) == blob for side in sides.values())


PERFECT = Faults(drop=0, double=0, damage=0, cut=0, reorder=0, delay=0, until=0)


def test_a_perfect_link_sends_each_chunk_once_for_all(tmp_path: Path) -> None:
    blob = random.Random(1).randbytes(10_000)
    manifest = describe(blob, 100, tmp_path)
    sides = {name: new_side(manifest) for name in "abcde"}
    sent = run_transfer(blob, manifest, sides, FakeLink(random.Random(0), PERFECT))
    # The first asks a moment before the others, and its first chunks are sent to the rest once more.
    assert manifest.num_chunks <= sent <= manifest.num_chunks + 5


def test_a_receiver_that_has_it_moves_nothing(tmp_path: Path) -> None:
    manifest = describe(b"x" * 1000, 100, tmp_path)
    sender = Sender(manifest)
    sender.handle_request("a", np.zeros(10, dtype=np.bool_), resend=True, now=0.0)
    assert sender.next_chunk(0.0) is None
    assert not sender.receivers


def test_the_window_bounds_what_is_on_its_way(tmp_path: Path) -> None:
    manifest = describe(b"x" * 1000, 10, tmp_path)
    sender = Sender(manifest)
    missing = np.ones(100, dtype=np.bool_)
    sender.handle_request("a", missing, resend=True, now=0.0, window=7)
    sent = [sender.next_chunk(0.0) for _ in range(20)]
    assert sent == [0, 1, 2, 3, 4, 5, 6] + [None] * 13
    missing[:4] = False
    sender.handle_request("a", missing, resend=False, now=0.0, window=7)
    assert [sender.next_chunk(0.0) for _ in range(5)] == [7, 8, 9, 10, None]


def test_one_silent_receiver_does_not_stop_the_others(tmp_path: Path) -> None:
    manifest = describe(b"x" * 100, 10, tmp_path)
    sender = Sender(manifest, silence_s=5.0)
    missing = np.ones(10, dtype=np.bool_)
    sender.handle_request("dead", missing, resend=True, now=0.0, window=2)
    sender.handle_request("alive", missing, resend=True, now=0.0, window=2)
    assert [sender.next_chunk(0.0) for _ in range(3)] == [0, 1, None]
    missing[:2] = False
    sender.handle_request("alive", missing, resend=False, now=4.0, window=2)
    assert sender.next_chunk(4.0) is None
    assert sender.next_chunk(6.0) == 2
    assert sender.receivers == {"alive"}


def test_a_silent_receiver_that_speaks_again_is_not_sent_what_is_on_its_way_already(tmp_path: Path) -> None:
    manifest = describe(b"x" * 100, 10, tmp_path)
    sender = Sender(manifest, silence_s=5.0)
    missing = np.ones(10, dtype=np.bool_)
    sender.handle_request("slow", missing, resend=True, now=0.0, window=3)
    assert [sender.next_chunk(0.0) for _ in range(4)] == [0, 1, 2, None]
    assert sender.next_chunk(6.0) is None
    assert not sender.receivers
    missing[0] = False
    sender.handle_request("slow", missing, resend=False, now=8.0, window=3)
    assert [sender.next_chunk(8.0) for _ in range(2)] == [3, None]


def arrive(receiver: Receiver, blob: bytes, index: int, now: float) -> bool:
    offset, length = receiver.manifest.offset(index), receiver.manifest.length(index)
    assert receiver.add_chunk(index, blob[offset : offset + length], now=now) is ChunkKind.NEW
    return receiver.ack_due(now)


def test_the_window_grows_on_a_fast_link_and_stays_small_on_a_slow_one(tmp_path: Path) -> None:
    blob = random.Random(5).randbytes(4000)
    manifest = describe(blob, 10, tmp_path)
    none = np.zeros(manifest.num_chunks, dtype=np.bool_)
    windows: dict[float, list[int]] = {}
    for seconds_a_chunk in (0.001, 0.1, 2.0, 20.0):
        receiver = Receiver(manifest, have=none, now=0.0)
        windows[seconds_a_chunk] = [receiver.make_request(resend=True, now=0.0).window]
        for index in range(100):
            now = seconds_a_chunk * (index + 1)
            if arrive(receiver, blob, index, now):
                windows[seconds_a_chunk].append(receiver.make_request(resend=False, now=now).window)
    assert windows[0.001][:4] == [16, 32, 64, 64]
    # 2 s of chunks, whatever their pace; and each acknowledged at once where they are rarer than one a second.
    assert all(18 <= window <= 22 for window in windows[0.1][1:])
    assert set(windows[2.0][1:]) == set(windows[20.0][1:]) == {2}
    assert len(windows[2.0]) == 101


def test_a_slow_link_is_given_the_time_that_its_chunks_take(tmp_path: Path) -> None:
    blob = random.Random(6).randbytes(100)
    receiver = Receiver(describe(blob, 10, tmp_path), have=np.zeros(10, dtype=np.bool_), now=0.0)
    assert receiver.is_stalled(5.0)
    assert not receiver.is_stalled(14.9)
    assert receiver.is_stalled(15.0)
    arrive(receiver, blob, 0, now=16.0)
    arrive(receiver, blob, 1, now=24.0)
    # The last pause was 8 s: nothing is lost before twice that.
    assert not receiver.is_stalled(39.9)
    assert receiver.is_stalled(40.0)
    arrive(receiver, blob, 2, now=41.0)
    for index in range(3, 5):
        arrive(receiver, blob, index, now=41.0)
    assert not receiver.is_stalled(45.9)
    assert receiver.is_stalled(46.0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), killed_after=st.integers(0, 11), seed=st.integers(0, 99))
def test_chunks_in_any_order_over_a_restart_are_hashed_right(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], killed_after: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("order")
    blob = random.Random(seed).randbytes(1150)
    manifest = describe(blob, 100, folder)
    incoming = BlobStore(folder / "store").receive(manifest, owner="a", now=0.0)
    for position, index in enumerate(order):
        if position == killed_after:
            incoming.close()
            incoming = BlobStore(folder / "store").receive(manifest, owner="a", now=0.0)
        incoming.add_chunk(index, blob[manifest.offset(index) :][: manifest.length(index)], now=0.0)
    assert incoming.finish()
    assert BlobStore(folder / "store").path(manifest.sha256).read_bytes() == blob


def test_a_false_hash_is_found_again_after_starting_over(tmp_path: Path) -> None:
    blob = b"q" * 500
    honest = describe(blob, 100, tmp_path)
    false = BlobManifest(sha256="0" * 64, size_bytes=500, chunk_bytes=100, crc32s=honest.crc32s)
    incoming = BlobStore(tmp_path / "store").receive(false, owner="a", now=0.0)
    for attempt in range(MAX_ATTEMPTS):
        for index in range(5):
            assert incoming.add_chunk(index, blob[:100], now=0.0) is ChunkKind.NEW
        assert not incoming.finish()
        assert incoming.receiver.restart() is (attempt + 1 < MAX_ATTEMPTS)
    incoming.discard()


def test_a_repair_request_counts_what_is_on_its_way_as_lost(tmp_path: Path) -> None:
    manifest = describe(b"x" * 50, 10, tmp_path)
    sender = Sender(manifest)
    missing = np.ones(5, dtype=np.bool_)
    sender.handle_request("a", missing, resend=True, now=0.0)
    assert [sender.next_chunk(0.0) for _ in range(6)] == [0, 1, 2, 3, 4, None]
    missing[[0, 2]] = False
    sender.handle_request("a", missing, resend=False, now=0.0)
    assert sender.next_chunk(0.0) is None
    sender.handle_request("a", missing, resend=True, now=0.0)
    assert [sender.next_chunk(0.0) for _ in range(4)] == [1, 3, 4, None]


def test_a_blob_with_another_hash_never_gets_into_the_store(tmp_path: Path) -> None:
    honest = describe(b"z" * 500, 100, tmp_path)
    false = BlobManifest(sha256="0" * 64, size_bytes=500, chunk_bytes=100, crc32s=honest.crc32s)
    store = BlobStore(tmp_path / "store")
    incoming = store.receive(false, owner="a", now=0.0)
    for index in range(5):
        incoming.add_chunk(index, b"z" * 100, now=0.0)
    assert incoming.receiver.is_complete
    assert not incoming.finish()
    assert false.sha256 not in store
    incoming.discard()


def test_a_false_manifest_is_given_up(tmp_path: Path) -> None:
    blob = b"y" * 500
    honest = describe(blob, 100, tmp_path)
    false = BlobManifest(sha256="0" * 64, size_bytes=500, chunk_bytes=100, crc32s=honest.crc32s)
    sides = {"a": new_side(false)}
    sent = run_transfer(blob, false, sides, FakeLink(random.Random(0), PERFECT))
    assert sides["a"].given_up
    assert not sides["a"].done
    assert sent == 5 * MAX_ATTEMPTS


def test_an_unfinished_blob_continues_after_a_restart(tmp_path: Path) -> None:
    blob = random.Random(2).randbytes(5000)
    manifest = describe(blob, 512, tmp_path)
    store = BlobStore(tmp_path / "store")
    incoming = store.receive(manifest, owner="a", now=0.0)
    for index in (0, 3, 9):
        data = blob[manifest.offset(index) :][: manifest.length(index)]
        assert incoming.add_chunk(index, data, now=0.0) is ChunkKind.NEW
    # No close: the process was killed.
    again = BlobStore(tmp_path / "store").receive(manifest, owner="a", now=0.0)
    assert again.receiver.num_missing == 7
    for index in range(10):
        again.add_chunk(index, blob[manifest.offset(index) :][: manifest.length(index)], now=0.0)
    assert again.finish()
    assert manifest.sha256 in store
    assert store.path(manifest.sha256).read_bytes() == blob
    incoming.close()


def test_chunks_whose_bytes_were_lost_in_a_power_cut_are_asked_for_again(tmp_path: Path) -> None:
    blob = random.Random(3).randbytes(3000)
    manifest = describe(blob, 1000, tmp_path)
    store = BlobStore(tmp_path / "store")
    incoming = store.receive(manifest, owner="a", now=0.0)
    for index in range(3):
        incoming.add_chunk(index, blob[index * 1000 : index * 1000 + 1000], now=0.0)
    incoming.close()
    partial = tmp_path / "store" / "partial" / "a" / manifest.sha256
    with partial.open("r+b") as stream:
        stream.seek(1000)
        stream.write(bytes(1000))
    again = store.receive(manifest, owner="a", now=0.0)
    assert unpack_mask(again.receiver.make_request(resend=True, now=0.0).missing, 3).tolist() == [False, True, False]
    again.close()


def test_the_same_blob_in_other_chunks_continues_too(tmp_path: Path) -> None:
    blob = random.Random(4).randbytes(4000)
    manifest = describe(blob, 1000, tmp_path)
    store = BlobStore(tmp_path / "store")
    incoming = store.receive(manifest, owner="a", now=0.0)
    incoming.add_chunk(1, blob[1000:2000], now=0.0)
    incoming.close()
    finer = describe(blob, 500, tmp_path)
    again = store.receive(finer, owner="a", now=0.0)
    assert (
        unpack_mask(again.receiver.make_request(resend=True, now=0.0).missing, 8).tolist()
        == [True, True, False, False] + [True] * 4
    )
    again.close()


def test_a_blob_larger_than_the_disk_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "store")
    huge = BlobManifest(sha256="0" * 64, size_bytes=65536 << 20, chunk_bytes=1 << 20, crc32s=bytes(4 * 65536))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1 << 30})())
        with pytest.raises(StorageError, match="1024 MiB free, a blob of 65536 MiB does not fit"):
            store.receive(huge, owner="a", now=0.0)
    assert not (tmp_path / "store" / "partial" / "a" / huge.sha256).exists()


def test_an_empty_or_unreadable_file_cannot_be_described(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(StorageError, match="0 bytes"):
        describe_file(tmp_path / "empty")
    with pytest.raises(StorageError, match="No such file"):
        describe_file(tmp_path / "missing")
