"""From a trained memory to what a package scores with, and its threshold by cross-fitting."""

from __future__ import annotations

import numpy as np

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.learning import Learning
from edgeflame.memory_bank import MemoryBank
from edgeflame.memory_statistics import MemoryStatistics
from edgeflame.moments import F32, F64
from trainer.embedding import Embeddings
from trainer.feddymem.learning import SiteMemory, assigned
from trainer.feddymem.metric import Whitening, transform_of
from trainer.feddymem.patches import Patches
from trainer.feddymem.reduce import NO_FLOOR, Floor, contents_of, reduce_memory
from trainer.gaussian import image_scores, make_folds, require_enough, score_maps
from trainer.suspects import HighestMaps

log = EventLog("feddymem")


def sent_memory(
    memory: SiteMemory, patches: Patches, whitening: Whitening, learning: Learning, *, space: str
) -> MemoryBank:
    """What leaves the site: at most ``memory.prototypes`` averages, each above the privacy floor.

    Raises:
        DataError: nothing is above the floor.
    """
    floor = Floor(patches=learning.memory.min_group, images=learning.memory.min_images)
    return _reduced(memory, patches, whitening, learning, space=space, floor=floor)


def memory_statistics(
    memory: SiteMemory,
    patches: Patches,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    *,
    grid: tuple[int, int],
) -> MemoryStatistics:
    """The site's own averages, which stay in its package and need reach no floor, beside the fleet's."""
    own = _reduced(memory, patches, whitening, learning, space="0" * 64, floor=NO_FLOOR).prototypes
    shared = np.zeros((0, own.shape[1]), dtype=np.float32) if fleet is None else fleet.prototypes
    return MemoryStatistics(
        grid=grid,
        count=patches.num_images,
        prototypes=np.concatenate([own, shared]),
        transform=transform_of(whitening, memory.generator),
        centre=whitening.centre.cpu().numpy(),
        num_global=len(shared),
    )


def held_out_scores(
    memory: SiteMemory,
    patches: Patches,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    embeddings: Embeddings,
    *,
    progress: Progress = no_progress,
) -> tuple[F64, F64, dict[int, F32]]:
    """Scores ``[N]`` of all images by memories from which their fold's patches are left out.

    Beside them the means ``[N]`` of their maps, and the maps of the highest.

    The site's own averages are made again of the other folds' patches. Generator, entries' places and, in a
    federation, the fleet's prototypes did see all images; that makes the scores a little low.

    Raises:
        DataError: too few images or parts.
        NumericalError: an embedding is not finite.
    """
    groups = embeddings.images.groups
    require_enough(len(groups), len(set(groups)))
    scores, means, highest, done = np.zeros(len(groups)), np.zeros(len(groups)), HighestMaps(), 0
    for fold in make_folds(groups, learning.calibration.folds, learning.seed):
        others = patches.without(fold)
        statistics = memory_statistics(memory, others, fleet, whitening, learning, grid=embeddings.network.grid)
        for indices, batch in embeddings.batches(fold):
            maps = score_maps(statistics, batch, learning.scoring)
            scores[indices], means[indices] = image_scores(maps), maps.mean(axis=(1, 2), dtype=np.float64)
            highest.add(indices, scores[indices], maps)
            done += len(indices)
            progress(done, len(groups), "scoring held-out parts")
    return scores, means, highest.by_index()


def _reduced(
    memory: SiteMemory, patches: Patches, whitening: Whitening, learning: Learning, *, space: str, floor: Floor
) -> MemoryBank:
    entry_of = assigned(patches, memory.entries, whitening, memory.generator)
    contents = contents_of(patches.values, patches.image_of, entry_of, patches.num_images)
    return reduce_memory(
        contents,
        whitening,
        memory.generator,
        size=learning.memory.prototypes,
        temperature=learning.memory.temperature,
        floor=floor,
        count=patches.num_images,
        space=space,
    )
