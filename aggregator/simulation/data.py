"""The data of a simulation: where its parts come from, how they are partitioned among the sites, and each site's
images on disk.

::

    OUT/data/common/test, ground_truth          the test part all models share
    OUT/data/sites/<site>/train/good            a site's images; also test and ground_truth where
                                                these are not the common ones: own cameras, or not all textures
    OUT/data/*/groups.csv                       which photographs show the same part
    OUT/data/layout.json                        which site has which parts; written last

1. Parts come from a folder of photographs or are generated boards (:func:`load_parts`). A part is a physical object
   with all its photographs.
2. They are partitioned among the sites (:func:`partition_parts`; pure): a part is never split, and every part goes to
   exactly one site.
3. Each site's photographs are written (:func:`prepare_site_data`). These are ordinary data sets: ``edgeflame train
   --data OUT/data/sites/<site>`` learns from the same images as the simulated site. With one camera for all, a folder's
   photographs are links to where they lie. With cameras of their own, photographs are taken anew: of generated boards
   by the camera, of a folder's photographs as if the camera had looked at them. Then the common test part is shared
   out over all cameras, so that none of its photographs is from a camera that no site trained on.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from aggregator.simulation.config import BoardsData, FolderData, Partition, SimulationConfig
from boards.camera import Camera
from boards.dataset import DatasetSpec, PlannedPart, plan_parts
from boards.surface import generator
from edgeflame.dataset import GROUPS_FILES, ImageRecord, open_dataset
from edgeflame.errors import ConfigError, DataError, StorageError
from edgeflame.images import ImageU8, read_image, read_mask, write_image
from edgeflame.layout import GOOD
from edgeflame.log import Progress
from edgeflame.state import read_json, storage_errors, write_json


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One picture of a part: a file that exists, or pixels.

    Attributes:
        stem, suffix: its file name, unique within split and label of its source.
        image: a file, or ``[H, W, 3]`` uint8 BGR.
        mask: of the defect; a file, or ``[H, W]`` uint8, 255 on the defect.
    """

    stem: str
    suffix: str
    image: Path | ImageU8
    mask: Path | ImageU8 | None = None


@dataclass(frozen=True, kw_only=True)
class SimulatedPart:
    """A physical part: never split between sites.

    Attributes:
        group: its name, unique in the source.
        category: its texture; of a folder, the folder's name.
        split, label: ``train`` or ``test``; ``good`` or the defect.
        photographs: its pictures as a camera takes them; None is the common camera.
    """

    group: str
    category: str
    split: str
    label: str
    photographs: Callable[[Camera | None], Iterator[Photograph]]


@dataclass(frozen=True, kw_only=True)
class PartPool:
    """Parts by name. ``groups_known``: whether parts are known, or every photograph is taken for one."""

    train: Mapping[str, SimulatedPart]
    test: Mapping[str, SimulatedPart]
    groups_known: bool


def load_parts(config: SimulationConfig) -> PartPool:
    """The parts that the configuration names; nothing is drawn or read yet.

    Raises:
        DataError: the folder is no data set, or has no test part.
    """
    match config.data:
        case FolderData():
            return _load_folder_parts(config.data, config.seed)
        case BoardsData():
            return _generate_board_parts(config.data)


def _load_folder_parts(data: FolderData, seed: int) -> PartPool:
    dataset = open_dataset(Path(data.path), None if data.groups is None else Path(data.groups))
    if not dataset.test or not any(record.is_good for record in dataset.test):
        raise DataError(
            f"{dataset.root}: a simulation measures its models; expected test/good and test/<defect> below it"
        )
    by_key: dict[tuple[str, str, str], list[ImageRecord]] = {}
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        for record in records:
            by_key.setdefault((split, record.label, record.group), []).append(record)
    numbers = {record.path: index for index, record in enumerate((*dataset.train, *dataset.test))}
    train: dict[str, SimulatedPart] = {}
    test: dict[str, SimulatedPart] = {}
    for (split, label, group), photographs in by_key.items():
        part = SimulatedPart(
            group=group,
            category=dataset.root.name,
            split=split,
            label=label,
            photographs=_folder_photographer(photographs, numbers, seed),
        )
        # A part may have good photographs and defective ones.
        (train if split == "train" else test)[group if split == "train" else f"{label}:{group}"] = part
    chosen = _draw_subset(sorted(train), data.max_train_groups, generator(seed, "train parts"))
    kept: list[str] = []
    for label in sorted({part.label for part in test.values()}):
        own = sorted(name for name, part in test.items() if part.label == label)
        kept += _draw_subset(own, data.max_test_groups, generator(seed, "test parts", label))
    return PartPool(
        train={name: train[name] for name in chosen},
        test={name: test[name] for name in kept},
        groups_known=dataset.groups_known,
    )


def _draw_subset(names: Sequence[str], at_most: int | None, rng: np.random.Generator) -> list[str]:
    if at_most is None or at_most >= len(names):
        return list(names)
    return sorted(names[index] for index in rng.permutation(len(names))[:at_most])


def _folder_photographer(
    records: Sequence[ImageRecord], numbers: Mapping[Path, int], seed: int
) -> Callable[[Camera | None], Iterator[Photograph]]:
    def photographs(camera: Camera | None) -> Iterator[Photograph]:
        for record in records:
            # Numbered, because folders below train/good may hold files of one name.
            stem = f"{numbers[record.path]:05d}-{record.path.stem}"
            if camera is None:
                yield Photograph(stem=stem, suffix=record.path.suffix, image=record.path, mask=record.mask)
                continue
            image = camera.rephotograph(read_image(record.path), generator(seed, "rephotograph", record.name))
            mask = None if record.mask is None else read_mask(record.mask)
            yield Photograph(stem=stem, suffix=".png", image=image, mask=mask)

    return photographs


def _generate_board_parts(data: BoardsData) -> PartPool:
    train: dict[str, SimulatedPart] = {}
    test: dict[str, SimulatedPart] = {}
    for texture in data.textures:
        spec = DatasetSpec(
            texture=texture,
            num_train_parts=data.train_parts,
            num_test_good_parts=data.test_good_parts,
            num_test_defective_parts=data.test_defective_parts,
            num_photos=data.photos,
            image_size=data.image_size,
            seed=data.seed,
            camera=Camera(),
        )
        for planned in plan_parts(spec):
            part = SimulatedPart(
                group=f"{texture}-{planned.group}",
                category=texture,
                split=planned.split,
                label=planned.label,
                photographs=_board_photographer(planned, spec),
            )
            (train if planned.split == "train" else test)[part.group] = part
    return PartPool(train=train, test=test, groups_known=True)


def _board_photographer(planned: PlannedPart, spec: DatasetSpec) -> Callable[[Camera | None], Iterator[Photograph]]:
    def photographs(camera: Camera | None) -> Iterator[Photograph]:
        for stem, image, mask in planned.photographs(spec, camera or spec.camera):
            yield Photograph(stem=f"{spec.texture}-{stem}", suffix=".png", image=image, mask=mask)

    return photographs


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
    own = config.cameras == "own"
    cameras = {site: Camera.for_site(site, config.seed) if own else None for site in config.site_names}
    names = sorted(source.test)
    test_cameras = [cameras[config.site_names[i % config.sites]] for i in range(len(names))]
    order = generator(config.seed, "photographers").permutation(len(names))
    common = _DatasetWriter(root / "common", with_groups=source.groups_known)
    common.write((source.test[name], test_cameras[index]) for name, index in zip(names, order, strict=True))
    everywhere = {part.category for part in source.train.values()}
    places = []
    for done, (site, assigned) in enumerate(assignments.items(), start=1):
        parts = [source.train[name] for name in assigned]
        folder = _DatasetWriter(root / "sites" / site, with_groups=source.groups_known)
        num_images = folder.write((part, cameras[site]) for part in parts)
        categories = dict(sorted(Counter(part.category for part in parts).items()))
        apart = config.evaluation.sites and (own or set(categories) != everywhere)
        if apart:
            own_test = [part for name in names if (part := source.test[name]).category in categories]
            folder.write((part, cameras[site]) for part in own_test)
        places.append(
            SiteData(
                site=site,
                data=f"data/sites/{site}",
                test=f"data/sites/{site}" if apart else "data/common",
                num_images=num_images,
                groups=tuple(assigned),
                categories=categories,
                camera=None if (camera := cameras[site]) is None else asdict(camera),
            )
        )
        report(done, config.sites, "photographing" if own else "dealing")
    return SiteLayout(common="data/common", sites=tuple(places))


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
