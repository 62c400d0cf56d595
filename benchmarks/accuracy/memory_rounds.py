"""What FedDyMem detects, alone and together, and for how many bytes.

    python benchmarks/accuracy/memory_rounds.py --data NAME=DIR ... [--parts 6] [--seeds 0 1] [--sizes 512]

For each data set in the MVTec layout, on its test part:

- one site with all its good photographs;
- with `--parts`, three sites with so many parts each, drawn by each seed: every site alone, and after `--rounds` rounds
  with the two others. What sites send is reduced, held to the privacy floor and aggregated by the product's own code,
  without a broker between them.

`--sizes` are the most prototypes that a site keeps and sends; the fleet's memory has twice as many. Figures are image
AUROC and bytes of a site in a round, up and down. `--cache` keeps the embeddings, in float16. Results are added to
`--out` one by one, and a row that is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from aggregator.config import AggregateConfig
from aggregator.run import aggregate_updates
from aggregator.strategies.interface import Contribution
from edgeflame.dataset import open_dataset
from edgeflame.methods import Learning, start_from_presets
from edgeflame.statistics.memory import MemoryBank, empty_bank, grid_places, read_bank, write_bank
from fitting.crossfit import image_scores, score_maps
from fitting.imageset import ImageSet
from trainer.device import rgb_tensor
from trainer.embedding import embed
from trainer.feddymem.learning import PatchSample, SiteMemory, fit_metric, initial_memory, train_memory
from trainer.feddymem.site import memory_statistics, shareable_memory
from trainer.model import build_model

SPACE = "0" * 64
AT_ONCE = 8
Halves = npt.NDArray[np.float16]


class Data:
    """Embeddings of a data set: ``train [N, P, C]`` of ``parts [N]``, ``test``, and whether each of it is defective."""

    def __init__(self, name: str, folder: Path, cache: Path | None) -> None:
        file = None if cache is None else cache / f"{name}.npz"
        if file is not None and file.is_file():
            held = np.load(file)
            labels = held["tl"]
            self.train, self.test, self.parts = held["train"], held["test"], held["groups"]
            self.defective = labels if labels.dtype == bool else labels != "good"
            return
        dataset, learning = open_dataset(folder), Learning(method="none")
        network = build_model(learning)[0].backbone.eval()

        def embedded(records: Any) -> Halves:
            images, device = ImageSet(list(records), learning.input), torch.device("cpu")
            starts = range(0, len(images), AT_ONCE)
            batches = (images.batch(range(start, min(start + AT_ONCE, len(images)))) for start in starts)
            return np.concatenate([embed(network, rgb_tensor(one, device)).astype(np.float16) for one in batches])

        self.train, self.test = embedded(dataset.train), embedded(dataset.test)
        self.parts = np.array([record.group for record in dataset.train])
        self.defective = np.array([not record.is_good for record in dataset.test])
        if file is not None:
            np.savez(file, train=self.train, test=self.test, tl=self.defective, groups=self.parts)

    def drawn_sites(self, num_parts: int, seed: int) -> list[Halves]:
        """The photographs of three sites with so many parts each."""
        names = np.array(sorted(set(self.parts)))
        order = names[np.random.default_rng(seed).permutation(len(names))]
        return [self.train[np.isin(self.parts, order[num_parts * k : num_parts * (k + 1)])] for k in range(3)]

    def auroc(self, memory: SiteMemory, patches: PatchSample, fleet: MemoryBank | None, learning: Learning) -> float:
        """Of a site's statistics on the test part."""
        metric = fit_metric(patches, memory, fleet, learning)
        statistics = memory_statistics(memory, patches, fleet, metric, learning, grid=_grid(self.test))
        starts = range(0, len(self.test), AT_ONCE)
        maps = (
            score_maps(statistics, self.test[at : at + AT_ONCE].astype(np.float32), learning.scoring) for at in starts
        )
        return float(roc_auc_score(self.defective, np.concatenate([image_scores(one) for one in maps])))


def _grid(embeddings: Halves) -> tuple[int, int]:
    side = round(embeddings.shape[1] ** 0.5)
    return side, side


def patches_of(images: Halves, learning: Learning) -> PatchSample:
    """As many patches of each image as the configuration allows."""
    count, positions, channels = images.shape
    each = max(1, min(positions, learning.memory.max_patches // count))
    generator = np.random.default_rng(learning.seed)
    chosen = np.stack([np.sort(generator.choice(positions, size=each, replace=False)) for _ in range(count)])
    values = np.stack([image[at] for image, at in zip(images, chosen, strict=True)]).astype(np.float32)
    return PatchSample(
        values=torch.from_numpy(values.reshape(-1, channels)),
        places=torch.from_numpy(grid_places(_grid(images))[chosen.reshape(-1)]),
        image_of=torch.arange(count).repeat_interleave(each),
        num_images=count,
    )


def trained(
    patches: PatchSample, before: SiteMemory | None, fleet: MemoryBank | None, learning: Learning, seed: int
) -> SiteMemory:
    """A round at a site."""
    memory = before or initial_memory(patches, size=learning.memory.entries, seed=learning.seed)
    return train_memory(memory, patches, fleet, fit_metric(patches, memory, fleet, learning), learning, seed=seed)[0]


def together(sites: list[PatchSample], alone: list[SiteMemory], learning: Learning, rounds: int) -> dict[str, Any]:
    """The rounds of three sites, of which ``alone`` is what the first leaves at each."""
    config, memories, fleet, sizes = AggregateConfig(learning=learning), list(alone), None, []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name, "0")
        write_bank(base, empty_bank(sites[0].values.shape[1], SPACE))
        for number in range(1, rounds + 1):
            parts = []
            for k, patches in enumerate(sites):
                if number > 1:
                    memories[k] = trained(patches, memories[k], fleet, learning, number)
                metric, out = fit_metric(patches, memories[k], fleet, learning), Path(name, f"{number}-{k}")
                write_bank(out, shareable_memory(memories[k], patches, fleet, metric, learning, space=SPACE))
                parts.append(Contribution(site=f"site-{k}", path=out, weight=1 / len(sites)))
                sizes.append(out.stat().st_size)
            result = Path(name, str(number))
            aggregate_updates(config, base, parts, result, num_members=len(sites))
            base, fleet = result, read_bank(result)
        least = min(float(read_bank(part.path).effective_patches.min()) for part in parts)
        return {
            "memories": memories,
            "fleet": fleet,
            "bytes_up": max(sizes),
            "bytes_down": base.stat().st_size,
            "prototypes_sent": [len(read_bank(part.path)) for part in parts],
            "least_effective_patches": least,
        }


def learning_of(size: int, **memory: float) -> Learning:
    """The product's defaults but for the number of prototypes."""
    settings = {"entries": size, "prototypes": size, "global_prototypes": 2 * size, **memory}
    return msgspec.convert(start_from_presets({"method": "feddymem", "memory": settings}, Learning), Learning)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, of all rows."""
    lines = [
        "| data | prototypes | learnt from | alone | together | bytes up + down, per site and round |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone, joint = (row.get(key) for key in ("alone", "together"))
        bytes_ = f"{row['bytes_up']:,} + {row['bytes_down']:,}" if joint else "–"
        cells = [
            row["data"],
            str(row["size"]),
            f"3 sites of {row['parts']} parts, seed {row['seed']}" if joint else f"all {row['images']} photographs",
            ", ".join(f"{one:.3f}" for one in alone) + (f" (mean {np.mean(alone):.3f})" if joint else ""),
            ", ".join(f"{one:.3f}" for one in joint) + f" (mean {np.mean(joint):.3f})" if joint else "–",
            bytes_,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--parts", type=int, default=0, help="parts of each of three sites; 0: one site with all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory_rounds.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, folder in (one.split("=", 1) for one in given.data):
        data = Data(name, Path(folder), given.cache)
        for size in given.sizes:
            for seed in given.seeds if given.parts else [0]:
                rows = json.loads(given.out.read_text()) if given.out.is_file() else []
                key = {"data": name, "size": size, "parts": given.parts, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                begun, learning = time.monotonic(), learning_of(size)
                images = data.drawn_sites(given.parts, seed) if given.parts else [data.train]
                sites = [patches_of(one, learning) for one in images]
                memories = [trained(patches, None, None, learning, 1) for patches in sites]
                alone = [
                    data.auroc(memory, patches, None, learning) for memory, patches in zip(memories, sites, strict=True)
                ]
                row: dict[str, Any] = {**key, "images": sum(map(len, images)), "alone": alone}
                print(row, flush=True)
                if given.parts:
                    ended = together(sites, memories, learning, given.rounds)
                    fleet, kept = ended.pop("fleet"), ended.pop("memories")
                    row["together"] = [
                        data.auroc(memory, patches, fleet, learning)
                        for memory, patches in zip(kept, sites, strict=True)
                    ]
                    row |= ended
                row["seconds"] = round(time.monotonic() - begun)
                print(row, flush=True)
                rows = json.loads(given.out.read_text()) if given.out.is_file() else []
                given.out.write_text(json.dumps([*rows, row], indent=1) + "\n")
                given.out.with_suffix(".md").write_text(table([*rows, row]))


if __name__ == "__main__":
    main()
