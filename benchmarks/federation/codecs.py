"""Size, error and time of each form of an update: FLAME with the default backbone on generated boards; Markdown.

Bytes are what a site sends up in a round; downloads are the model as it is, once for all sites.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import get_args

import boards_fleet
import torch

from edgeflame.log import LOGGER_NAME
from edgeflame.mqtt.messages import Codec
from edgeflame.transfer.compression import decode_update, encode_update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", choices=get_args(Codec), nargs="+", default=get_args(Codec))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger(LOGGER_NAME).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        for codec in options.codec:
            row = measure(Path(name), codec, options.rounds)
            print(row, flush=True)
            if options.out:
                with options.out.open("a") as stream:
                    stream.write(row + "\n")


def measure(root: Path, codec: Codec, rounds: int) -> str:
    """A row: bytes a round, their share, error, seconds to encode and decode, figures of the final model."""
    result, figures = boards_fleet.run(root, num_sites=3, rounds=rounds, compression=codec)
    parts = [part for entry in result.ledger["rounds"] for part in entry["contributed"]]
    error = max(part["metrics"].get("codec_error", 0.0) for part in parts)
    updates = sorted((root / "run" / "sites").glob(f"*/runs/*/round-{rounds:06}/update.safetensors"))
    raw = [path.stat().st_size for path in updates]
    sent = [path.with_name("update.encoded") for path in updates] if codec != "raw" else updates
    sizes = [path.stat().st_size for path in sent]
    encode_s, decode_s = timings(codec, root, updates[0], result.ledger["rounds"][-1]["base_sha256"])
    return (
        f"| {codec} | {sum(sizes) / len(sizes) / 1e6:.2f} | {sum(sizes) / sum(raw):.2f} | {error:.1e} | "
        f"{encode_s:.2f} | {decode_s:.2f} | {100 * figures['image_AUROC']:.2f} | {100 * figures['pixel_AUROC']:.2f} |"
    )


def timings(codec: Codec, root: Path, update: Path, base_sha256: str) -> tuple[float, float]:
    """Seconds to encode and to decode one update."""
    if codec == "raw":
        return 0.0, 0.0
    base = next(path for path in (root / "run").glob(f"**/blobs/{base_sha256}"))
    started = time.perf_counter()
    encode_update(codec, base, update, root / "sent")
    between = time.perf_counter()
    decode_update(codec, base, root / "sent", root / "back")
    return between - started, time.perf_counter() - between


if __name__ == "__main__":
    main()
