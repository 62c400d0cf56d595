"""The data of a simulation: where its parts come from, how they are partitioned among the sites, and each site's
images on disk.

::

    OUT/data/common/test, ground_truth          the test part all models share
    OUT/data/sites/<site>/train/good            a site's images; also test and ground_truth where
                                                these are not the common ones: own cameras, or not all textures
    OUT/data/marks/<site>                       parts that the site has marked bad, with method "feedback"
    OUT/data/*/groups.csv                       which photographs show the same part
    OUT/data/layout.json                        which site has which parts; written last

1. Parts come from a folder of photographs or are generated boards (:mod:`aggregator.simulation.parts`). A part is a
   physical object with all its photographs.
2. They are partitioned among the sites (:func:`partition_parts`; pure): a part is never split, and every part goes to
   exactly one site.
3. With method "feedback" some defective parts are marked (:func:`deal_marks`; pure), and no longer tested on.
4. Each site's photographs are written (:func:`prepare_site_data`). These are ordinary data sets: ``edgeflame train
   --data OUT/data/sites/<site>`` learns from the same images as the simulated site. With one camera for all, a folder's
   photographs are links to where they lie. With cameras of their own, photographs are taken anew: of generated boards
   by the camera, of a folder's photographs as if the camera had looked at them. Then the common test part is shared
   out over all cameras, so that none of its photographs is from a camera that no site trained on.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from aggregator.simulation.config import Partition, SimulationConfig
from aggregator.simulation.parts import PartPool, SimulatedPart, draw_subset, load_parts
from boards.camera import Camera
from boards.surface import generator
from edgeflame.dataset import GROUPS_FILES
from edgeflame.errors import ConfigError, StorageError
from edgeflame.images import ImageU8, read_samples, write_image
from edgeflame.layout import GOOD
from edgeflame.log import Progress
from edgeflame.marks import MarkStore, kind_of_label
from edgeflame.state import read_json, storage_errors, write_json


def partition_parts(
    groups: Mapping[str, str], sites: Sequence[str], partition: Partition, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Which parts each site has.

    Args:
        groups: the category of every part, by the part's name.
        sites: names, in order.
        partition: the rule.
        rng: random generator of all draws.

    Returns:
        For every site its parts, sorted.

    Raises:
        ConfigError: there are too few parts.
    """
    names = sorted(groups)
    quotas = _site_quotas(len(names), len(sites), partition, rng)
    shuffled = [names[index] for index in rng.permutation(len(names))]
    if partition.category_beta is None:
        edges = np.cumsum([0, *quotas])
        assignments = [shuffled[start:stop] for start, stop in itertools.pairwise(edges)]
    else:
        assignments = _partition_by_category(shuffled, groups, quotas, partition.category_beta, rng)
    return {site: sorted(assigned) for site, assigned in zip(sites, assignments, strict=True)}


def _site_quotas(num_groups: int, num_sites: int, partition: Partition, rng: np.random.Generator) -> list[int]:
    """How many parts each site gets: the minimum, and of the rest its share (even, or drawn)."""
    rest = num_groups - num_sites * partition.min_groups
    if rest < 0:
        raise ConfigError(
            f"{num_sites} sites of at least {partition.min_groups} parts need {num_sites * partition.min_groups}, "
            f"there are {num_groups} to train on; take fewer sites, more parts, or a lower partition.min_groups"
        )
    if partition.beta == "even":
        shares = np.full(num_sites, 1 / num_sites)
    else:
        shares = rng.dirichlet(np.full(num_sites, partition.beta))
    extra = np.floor(shares * rest).astype(int)
    # What rounding down left over goes to the sites that lost most by it.
    by_loss = np.argsort(-(shares * rest - extra), kind="stable")
    extra[by_loss[: rest - int(extra.sum())]] += 1
    return [int(partition.min_groups + one) for one in extra]


def _partition_by_category(
    shuffled: Sequence[str], groups: Mapping[str, str], quotas: Sequence[int], beta: float, rng: np.random.Generator
) -> list[list[str]]:
    """Each site draws its own mixture q ~ Dir(beta p), p the categories' shares, and its parts by q (Hsu et al. 2019).

    A category that is used up is no longer drawn: q is renormalised over the rest, in which a site's q may be zero to
    rounding; then it takes what is most plentiful.
    """
    categories = sorted(set(groups.values()))
    left = {category: [name for name in shuffled if groups[name] == category] for category in categories}
    prior = np.array([len(left[category]) for category in categories]) / len(shuffled)
    assignments = []
    for quota in quotas:
        mixture = rng.dirichlet(beta * prior)
        assigned = []
        for _ in range(quota):
            stock = np.array([len(left[category]) for category in categories])
            weights = np.where(stock > 0, mixture, 0.0)
            if weights.sum() > 0:
                chosen = int(rng.choice(len(categories), p=weights / weights.sum()))
            else:
                chosen = int(np.argmax(stock))
            assigned.append(left[categories[chosen]].pop())
        assignments.append(assigned)
    return assignments


def deal_marks(
    test: Mapping[str, SimulatedPart], sites: Mapping[str, Collection[str]], share: float, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Which test parts each site marks: of each kind of defect a share of the parts, at one site only.

    Kinds go to the sites in turn, both in order of their names. Of every kind one part is left to be tested on.

    Args:
        test: all test parts by name.
        sites: the categories of each site's parts; a site marks no part of another.
        share: of the parts of a kind.
        rng: random generator of all draws.

    Returns:
        For every site the names of the parts that it marks, sorted.
    """
    marked: dict[str, list[str]] = {site: [] for site in sites}
    taken: set[str] = set()
    kinds = sorted({part.label for part in test.values()} - {GOOD})
    for kind, site in zip(kinds, itertools.cycle(sites)):
        own = sorted(
            name
            for name, part in test.items()
            if part.label == kind and part.category in sites[site] and part.group not in taken
        )
        chosen = draw_subset(own, max(0, min(round(share * len(own)), len(own) - 1)), rng)
        marked[site] += chosen
        taken.update(test[name].group for name in chosen)
    return {site: sorted(names) for site, names in marked.items()}


LAYOUT_FILE = "layout.json"


class SiteData(msgspec.Struct, frozen=True, kw_only=True):
    """The data of one site."""

    site: str
    data: str
    """Its data set, below the simulation's folder."""
    test: str
    """The data set whose test part its own model is measured on."""
    num_images: int
    groups: tuple[str, ...]
    categories: dict[str, int]
    """Parts of each texture; of a folder, all of one category."""
    camera: dict[str, float] | None
    """None for the common one."""
    marks: str | None = None
    """Its folder of marks, below the simulation's folder; None: it has none."""
    marked: dict[str, tuple[str, ...]] = {}
    """The parts marked bad, by kind of defect."""


class SiteLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The sites in the order of their names."""

    common: str
    sites: tuple[SiteData, ...]


def prepare_site_data(config: SimulationConfig, out_dir: Path, report: Progress) -> SiteLayout:
    """Partition the parts and write the sites' folders, if that was not done already.

    Raises:
        ConfigError: too few parts for the sites.
        DataError: the folder is no data set, or lacks a test part, or a photograph cannot be read.
        StorageError: the disk fails, or the layout is damaged.
    """
    target, staging = out_dir / "data", out_dir / ".data.unfinished"
    if not target.exists():
        source = load_parts(config)
        with storage_errors(staging, "prepare the sites' data"):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        write_json(staging / LAYOUT_FILE, _write_site_data(config, source, staging, report), indent=1)
        with storage_errors(target, "prepare the sites' data"):
            staging.rename(target)
    layout_path = target / LAYOUT_FILE
    layout = read_json(layout_path, SiteLayout, advice="simulate into another folder")
    if layout is None:
        raise StorageError(f"{layout_path}: missing; simulate into another folder")
    return layout


def _write_site_data(config: SimulationConfig, source: PartPool, root: Path, report: Progress) -> SiteLayout:
    assignments = partition_parts(
        {name: part.category for name, part in source.train.items()},
        config.site_names,
        config.partition,
        generator(config.seed, "partition"),
    )
    categories = {
        site: dict(sorted(Counter(source.train[name].category for name in assigned).items()))
        for site, assigned in assignments.items()
    }
    marked, tested = _choose_marked(config, source, categories)
    own = config.cameras == "own"
    cameras = {site: Camera.for_site(site, config.seed) if own else None for site in config.site_names}
    names = sorted(tested)
    test_cameras = [cameras[config.site_names[i % config.sites]] for i in range(len(names))]
    order = generator(config.seed, "photographers").permutation(len(names))
    common = _DatasetWriter(root / "common", with_groups=source.groups_known)
    common.write((tested[name], test_cameras[index]) for name, index in zip(names, order, strict=True))
    everywhere = {part.category for part in source.train.values()}
    places = []
    for done, (site, assigned) in enumerate(assignments.items(), start=1):
        parts = [source.train[name] for name in assigned]
        folder = _DatasetWriter(root / "sites" / site, with_groups=source.groups_known)
        num_images = folder.write((part, cameras[site]) for part in parts)
        apart = config.evaluation.sites and (own or set(categories[site]) != everywhere)
        if apart:
            own_test = [part for name in names if (part := tested[name]).category in categories[site]]
            folder.write((part, cameras[site]) for part in own_test)
        by_kind: dict[str, list[str]] = {}
        for part in marked[site]:
            by_kind.setdefault(part.label, []).append(part.group)
            _write_marks(root / "marks" / site, part, cameras[site])
        places.append(
            SiteData(
                site=site,
                data=f"data/sites/{site}",
                test=f"data/sites/{site}" if apart else "data/common",
                num_images=num_images,
                groups=tuple(assigned),
                categories=categories[site],
                camera=None if (camera := cameras[site]) is None else asdict(camera),
                marks=f"data/marks/{site}" if by_kind else None,
                marked={kind: tuple(groups) for kind, groups in by_kind.items()},
            )
        )
        report(done, config.sites, "photographing" if own else "dealing")
    return SiteLayout(common="data/common", sites=tuple(places))


def _choose_marked(
    config: SimulationConfig, source: PartPool, categories: Mapping[str, Collection[str]]
) -> tuple[dict[str, list[SimulatedPart]], dict[str, SimulatedPart]]:
    """For each site the parts that it marks, and the test parts without them and other photographs of them."""
    if not config.has_marks:
        return {site: [] for site in categories}, dict(source.test)
    dealt = deal_marks(source.test, categories, config.marked, generator(config.seed, "marks"))
    marked = {site: [source.test[name] for name in names] for site, names in dealt.items()}
    groups = {part.group for parts in marked.values() for part in parts}
    if not groups:
        raise ConfigError(
            f"marked = {config.marked:g}: of no kind of defect is there a part to mark and another to test on; take "
            "more defective parts, or a larger share"
        )
    return marked, {name: part for name, part in source.test.items() if part.group not in groups}


def _write_marks(folder: Path, part: SimulatedPart, camera: Camera | None) -> None:
    """Mark all photographs of a part as bad, with their kind and without the place."""
    store = MarkStore(folder)
    for photo in part.photographs(camera):
        store.add(
            f"{part.label}-{photo.stem}",
            read_samples(photo.image) if isinstance(photo.image, Path) else photo.image,
            "bad",
            kind=kind_of_label(part.label),
            part=part.group,
            whole_frame=True,
        )


class _DatasetWriter:
    """A data set in the MVTec layout that is being written."""

    def __init__(self, root: Path, *, with_groups: bool) -> None:
        self._root = root
        self._with_groups = with_groups
        self._rows = ["path,group"]

    def write(self, parts: Iterable[tuple[SimulatedPart, Camera | None]]) -> int:
        """Add parts as a camera sees them; returns the number of photographs."""
        before = len(self._rows)
        for part, camera in parts:
            for photo in part.photographs(camera):
                name = f"{part.split}/{part.label}/{photo.stem}{photo.suffix}"
                self._write_file(name, photo.image)
                if part.label != GOOD and photo.mask is not None:
                    self._write_file(f"ground_truth/{part.label}/{photo.stem}_mask.png", photo.mask)
                self._rows.append(f"{name},{part.group}")
        if self._with_groups:
            with storage_errors(self._root, "write"):
                (self._root / GROUPS_FILES[0]).write_text("\n".join(self._rows) + "\n", encoding="utf-8")
        return len(self._rows) - before

    def _write_file(self, name: str, content: Path | ImageU8) -> None:
        path = self._root / name
        with storage_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content.resolve())
                return
        write_image(path, content)
