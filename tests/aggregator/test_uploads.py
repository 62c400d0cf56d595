"""The aggregator's side of many uploads at once: they share what the broker may hold for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aggregator.uploads import MAX_CHUNKS_IN_FLIGHT, UploadReceiver
from edgeflame.mqtt.messages import BlobNeed, Offer
from edgeflame.transfer.protocol import Sender, describe_file, unpack_mask
from edgeflame.transfer.store import BlobStore

RUN = "0" * 32
NUM_CHUNKS = 100


@pytest.mark.parametrize("num_sites", [1, 5, 100])
def test_what_is_on_its_way_from_all_sites_stays_below_what_a_broker_queues(tmp_path: Path, num_sites: int) -> None:
    folder, chance = tmp_path, random.Random(num_sites)
    blob = chance.randbytes(NUM_CHUNKS)
    (folder / "blob").write_bytes(blob)
    manifest = describe_file(folder / "blob", chunk_bytes=1)
    offer = Offer(run=RUN, purpose="update", round=1, manifest=manifest, num_samples=1)
    senders = {f"site{number}": Sender(manifest) for number in range(num_sites)}
    answers: list[tuple[str, BlobNeed]] = []
    on_the_way: list[tuple[str, int]] = []
    most = 0
    intake = UploadReceiver(BlobStore(folder / "store"), lambda site, need: answers.append((site, need)))
    waiting = sorted(senders)
    arrived = 0
    now = 0.0
    while arrived < num_sites:
        now += 0.001
        if waiting and (not on_the_way or chance.random() < 0.3):
            site = waiting.pop()
            if intake.start(site, offer, now=now) is not None:
                arrived += 1
        while answers:
            site, need = answers.pop(0)
            missing = unpack_mask(need.missing, NUM_CHUNKS)
            senders[site].handle_request(site, missing, resend=need.resend, now=now, window=need.window)
            while (index := senders[site].next_chunk(now)) is not None:
                on_the_way.append((site, index))
        most = max(most, len(on_the_way))
        if on_the_way:
            site, index = on_the_way.pop(chance.randrange(min(len(on_the_way), 20)))
            arrived += (
                intake.receive_chunk(site, manifest.sha256, index, blob[index : index + 1], now=now)[1] is not None
            )
    assert most <= MAX_CHUNKS_IN_FLIGHT + num_sites
    assert most >= min(NUM_CHUNKS / 2, MAX_CHUNKS_IN_FLIGHT / 2), "the sites are held back for nothing"
    intake.close()
