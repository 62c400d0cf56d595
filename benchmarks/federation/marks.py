"""What one site's marks bring to the others: heads learnt in rounds by `method = "feedback"`.

    python benchmarks/federation/marks.py [--data NAME ...] [--cameras same own] [--seeds 3] [--out DIR]

The good parts are dealt to five sites. Of each kind of defect a half of the parts can be marked, the other half judges.
Each kind is marked at one site only (the first site marks the first kind, and so on), all of its markable parts there.
Then, at the four others, with statistics of their own and on pictures of their own cameras:

- `none`: nobody has marked anything;
- `home`: the same parts are marked at the site itself, and it learns alone, as by `edgeflame learn`;
- `fleet`: heads were exchanged, and the site judged the fleet's by its own held-out parts, as `edgeflame train` does.
  "Used" is at how many of these sites the head then counted.

With `--data solar` two sites have monocrystalline cells and mark a half of the defective ones, three have
polycrystalline ones and mark none; measured is at these. "Brought" is the gain of `fleet` as a share of that of `home`.
"Attack" is the area under the curve when the head's logit is to tell marked parts from parts of the same kinds that
nobody marked, as the site that marked them sees both: 0.5 tells nothing.

The rounds are numpy alone: initial head, training and judging are those of the sites, the average is the aggregator's
`fedavg`. Settings were chosen on boards and solar cells; magnetic tile is only measured. Figures go to `marks.jsonl`
one by one, and `marks.md` is made of all: a run that was ended goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from gain import BOARDS, TILE, StoredEmbeddings, parts_of, photographs
from sklearn.metrics import roc_auc_score

from aggregator.simulation.parts import SimulatedPart
from boards.camera import Camera
from edgeflame.methods import Learning
from edgeflame.statistics.head import DefectHead
from edgeflame.tensors import F64
from fitting.crossfit import cross_fit
from fitting.defect_head import fit_head
from fitting.embeddings import Embedder, Embeddings
from fitting.head_training import Coordinates, HeadImages, layers_of
from fitting.marked_images import describe_for_head
from fitting.shared_head import SharedHead, initial_head, judge, judging_both, train_round
from trainer.embedding import TorchEmbedder
from trainer.model import build_model

HERE = Path(__file__).resolve().parent
SITES, ROUNDS = 5, 5
Figures = dict[str, Any]


@dataclass
class Site:
    """A site, with the test part as it sees it.

    Attributes:
        good: its good images, with held-out scores.
        test: images of the test part.
        labels: of the test part.
    """

    good: HeadImages
    test: HeadImages
    labels: np.ndarray
    grid: tuple[int, int]

    def bad(self, chosen: np.ndarray) -> HeadImages:
        return self.test.subset(np.flatnonzero(chosen))


def prepare(embedder: Embedder, train: Sequence[SimulatedPart], tested: Tested, camera: Camera | None) -> Site:
    """Fit a site's statistics and describe all images."""
    learning = Learning()
    pictures = list(photographs(train, camera))
    embeddings = StoredEmbeddings(embedder, (image for _, image in pictures), learning)
    groups = [group for group, _ in pictures]
    found = cross_fit(cast("Embeddings", embeddings), groups, learning)

    return Site(
        good=describe_for_head(
            found.statistics, cast("Embeddings", embeddings), learning, groups, scores=found.held_out.scores
        ),
        test=describe_for_head(
            found.statistics,
            cast("Embeddings", tested.embeddings),
            learning,
            tested.groups,
            kinds=[label.replace("good", "") for label in tested.labels],
        ),
        labels=np.array(tested.labels),
        grid=embedder.grid,
    )


@dataclass
class Tested:
    """The test part as a camera sees it."""

    embeddings: StoredEmbeddings
    groups: list[str]
    labels: list[str]


def see(embedder: Embedder, parts: Sequence[SimulatedPart], camera: Camera | None) -> Tested:
    """Photograph and embed the test part."""
    pictures = [(part, image) for part in parts for _, image in photographs([part], camera)]
    return Tested(
        embeddings=StoredEmbeddings(embedder, (image for _, image in pictures), Learning()),
        groups=[f"{part.label}:{part.group}" for part, _ in pictures],
        labels=[part.label for part, _ in pictures],
    )


def open_sites(name: str, tile: Path, cameras: str, seed: int) -> list[Site]:
    """The five sites of a data set."""
    model, _ = build_model(Learning())
    model.eval()
    embedder = TorchEmbedder(model.backbone)
    sites: list[Site] = []
    seen: dict[tuple[str, Camera | None], Tested] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = ["solar-mono"] * 2 + ["solar-poly"] * 3 if name == "solar" else [name] * SITES
        for number, kind in enumerate(names):
            per_site = 24 if kind == "tile" else 40
            pool = parts_of(kind, tile, per_site * SITES, seed, Path(folder))
            order = np.random.default_rng(seed).permutation(sorted(pool.train))
            chosen = order[number * per_site : (number + 1) * per_site]
            camera = Camera.for_site(f"site-{number}", seed) if cameras == "own" else None
            if (kind, camera) not in seen:
                # Only the last: they are large.
                seen = {(kind, camera): see(embedder, [pool.test[key] for key in sorted(pool.test)], camera)}
            sites.append(prepare(embedder, [pool.train[key] for key in chosen], seen[kind, camera], camera))
            print(f"{name} {cameras} {seed}: site {number}", flush=True)
    return sites


def factors(head: DefectHead | None, images: HeadImages) -> F64:
    """The head's factors, from cells instead of embeddings."""
    if head is None:
        return np.ones(len(images))
    return np.exp(head.log_factors_of_cells(images.cells.astype(np.float32)).astype(np.float64))


def rounds(sites: Sequence[Site], marks: Sequence[HeadImages], seed: int, num_rounds: int = ROUNDS) -> SharedHead:
    """The fleet's head after so many rounds."""
    channels = sites[0].good.cells.shape[2]
    head = initial_head(channels, space="0" * 64, seed=0)
    coordinates = [Coordinates(site.good, symmetric=True) for site in sites]
    shares = np.array([len(site.good) + len(bad) for site, bad in zip(sites, marks, strict=True)], np.float64)
    shares /= shares.sum()
    for _ in range(num_rounds):
        trained = [
            train_round(head, where, site.good, bad, seed=seed)[0]
            for site, bad, where in zip(sites, marks, coordinates, strict=True)
        ]
        average = sum(share * one.parameters.astype(np.float64) for share, one in zip(shares, trained, strict=True))
        marked = float(sum(share * one.marked for share, one in zip(shares, trained, strict=True)))
        head = SharedHead(
            parameters=np.asarray(average, dtype=np.float32), num_channels=channels, marked=marked, space=head.space
        )
    return head


def area(good: F64, bad: F64) -> float:
    return float(roc_auc_score(np.repeat([0, 1], [len(good), len(bad)]), np.concatenate([good, bad])))


def deal(site: Site, seed: int) -> tuple[list[str], np.ndarray]:
    """The kinds of defects, and which images can be marked: those of a half of each kind's parts."""
    kinds = sorted(set(site.labels) - {"good"})
    markable = np.zeros(len(site.labels), dtype=bool)
    rng = np.random.default_rng(seed)
    groups = np.array(site.test.groups)
    for kind in kinds:
        parts = np.unique(groups[site.labels == kind])
        chosen = parts[rng.permutation(len(parts))[: len(parts) // 2]]
        markable |= np.isin(groups, chosen)
    return kinds, markable


def marked_at(sites: Sequence[Site], seed: int, name: str) -> list[np.ndarray]:
    """Which test images each site has marked."""
    marked = []
    for number, site in enumerate(sites):
        kinds, markable = deal(site, seed)
        if name == "solar":
            marked.append(markable & (number < 2))
        else:
            own = [kind for index, kind in enumerate(kinds) if index % SITES == number]
            marked.append(markable & np.isin(site.labels, own))
    return marked


def measure(sites: Sequence[Site], name: str, cameras: str, seed: int) -> list[Figures]:
    """For each kind at each site that has not marked it the areas under the curve, and how the head came to count."""
    marked = marked_at(sites, seed, name)
    marks = [site.bad(own) for site, own in zip(sites, marked, strict=True)]
    head = rounds(sites, marks, seed)
    found = []
    for number, site in enumerate(sites):
        coordinates = Coordinates(site.good, symmetric=True)
        fitted = judge(head, coordinates, site.good, marks[number], grid=site.grid, rate=0.05, seed=seed)
        kinds, markable = deal(site, seed)
        is_good = site.labels == "good"
        fused = site.test.scores * factors(fitted.head, site.test)
        attack = _attack(head, coordinates, site, marked[number], seed)
        for index, kind in enumerate(kinds):
            if (number < 2) if name == "solar" else (index % SITES == number):
                continue
            at_home = fit_head(site.good, site.bad(markable & (site.labels == kind)), grid=site.grid, seed=seed)
            by_home = site.test.scores * factors(at_home.head, site.test)
            judged = ~markable & (site.labels == kind)
            found.append(
                {
                    "data": name,
                    "cameras": cameras,
                    "seed": seed,
                    "site": number,
                    "kind": str(kind),
                    "none": area(site.test.scores[is_good], site.test.scores[judged]),
                    "home": area(by_home[is_good], by_home[judged]),
                    "fleet": area(fused[is_good], fused[judged]),
                    "home_weight": at_home.details["weight"],
                    "weight": fitted.details["weight"],
                    "good_called_bad": fitted.details.get("good_called_bad"),
                    "no_head": fitted.details.get("no_head", ""),
                }
            )
        if attack is not None:
            found.append({"data": name, "cameras": cameras, "seed": seed, "site": number, "attack": attack})
    return found


def _attack(head: SharedHead, coordinates: Coordinates, site: Site, marked: np.ndarray, seed: int) -> float | None:
    learnt = np.flatnonzero(marked)
    if not len(learnt):
        return None
    bad = site.bad(marked)
    learnt = learnt[~judging_both(site.good, bad, seed)[1]]
    others = np.flatnonzero(np.isin(site.labels, np.unique(site.labels[marked])) & ~marked)
    logits = layers_of(head.parameters, head.num_channels).logits(coordinates, site.test)
    return area(logits[others], logits[learnt])


def page(figures: Sequence[Figures]) -> str:
    """The tables, means over seeds and sites."""
    lines = []
    fleets = sorted({(one["data"], one["cameras"]) for one in figures})
    for data, cameras in fleets:
        of = [one for one in figures if (one["data"], one["cameras"]) == (data, cameras)]
        rows = [one for one in of if "kind" in one]
        attack = np.mean([one["attack"] for one in of if "attack" in one])
        kinds = sorted({one["kind"] for one in rows})
        for kind in [*kinds, "mean of kinds"] if len(kinds) > 1 else kinds:
            own = [one for one in rows if kind in (one["kind"], "mean of kinds")]
            none, home, fleet = (float(np.mean([one[key] for one in own])) for key in ("none", "home", "fleet"))
            brought = f"{(fleet - none) / (home - none):.0%}" if home - none > 0.005 else "home brings nothing"
            used = sum(one["weight"] > 0 for one in own)
            last = f"{attack:.3f}" if kind == [*kinds, "mean of kinds"][-1] or len(kinds) == 1 else ""
            lines.append(
                f"| {data} | {cameras} | {kind} | {none:.3f} | {home:.3f} | {fleet:.3f} | {brought} | "
                f"{used} of {len(own)} | {last} |"
            )
    table, seeds = "\n".join(lines), len({one["seed"] for one in figures})
    return f"""# What one site's marks bring to the others

`python benchmarks/federation/marks.py`, whose text says what is compared: image AUROC of each kind at the sites that
have not marked it. Means over the sites, and over {seeds} {"seed" if seeds == 1 else "seeds"}.

| data | cameras | kind | none | home | fleet | brought | used | attack |
|---|---|---|---|---|---|---|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["tile"], choices=("tile", "solar", *BOARDS))
    parser.add_argument("--cameras", nargs="+", default=["same", "own"], choices=("same", "own"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tile", type=Path, default=Path(os.environ.get("EDGEFLAME_MAGNETIC_TILE", TILE)))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    store = options.out / "marks.jsonl"
    figures: list[Figures] = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    for seed in range(options.seeds):
        for name in options.data:
            for cameras in options.cameras:
                if any((one["data"], one["cameras"], one["seed"]) == (name, cameras, seed) for one in figures):
                    continue
                fresh = measure(open_sites(name, options.tile, cameras, seed), name, cameras, seed)
                figures += fresh
                with store.open("a") as stream:
                    stream.writelines(json.dumps(one) + "\n" for one in fresh)
                (options.out / "marks.md").write_text(page(figures))
    print(page(figures))


if __name__ == "__main__":
    main()
