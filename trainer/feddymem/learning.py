"""A site's training by FedDyMem: the sample of patches, and the dynamic memory with its generator.

The backbone is frozen, so nothing is propagated through it: patches (a bounded, seeded sample) are computed once, and
an epoch is a few products of small matrices. That is why this is not an objective of the network's training loop.

Axes: n patches, B entries of the site's own memory, M (global) prototypes, C embedding channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgeflame.errors import DataError, NumericalError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.statistics.memory import MemoryBank, grid_places
from fitting.embeddings import Embeddings
from trainer.feddymem.metric import (
    MemoryGenerator,
    Whitening,
    aligned_tensor,
    comparable,
    fit_whitening,
    means_of_groups,
    nearest_index,
)


@dataclass(frozen=True, kw_only=True)
class PatchSample:
    """Patches of a site's images.

    Attributes:
        values: ``[n, C]`` float32.
        places: ``[n, 2]`` float32, row and column of each as shares of the picture's height and width.
        image_of: ``[n]`` int64, which image each is from.
        num_images: N.
    """

    values: Tensor
    places: Tensor
    image_of: Tensor
    num_images: int

    def without(self, images: list[int]) -> PatchSample:
        """The patches of all images but some."""
        kept = ~torch.isin(self.image_of, torch.tensor(images, dtype=torch.int64))
        on_device = kept.to(self.values.device)
        return PatchSample(
            values=self.values[on_device],
            places=self.places[on_device],
            image_of=self.image_of[kept],
            num_images=self.num_images,
        )


def sample_patches(
    embeddings: Embeddings, *, max_patches: int, seed: int, device: torch.device, progress: Progress = no_progress
) -> PatchSample:
    """As many patches of each image as ``max_patches`` allows, at random positions.

    Args:
        embeddings: of the site's images.
        max_patches: of all images; at least one of each is taken.
        seed: of the choice.
        device: where they go.
        progress: counts images.
    """
    generator = np.random.default_rng(seed)
    num_images = len(embeddings)
    positions = embeddings.grid[0] * embeddings.grid[1]
    each = max(1, min(positions, max_patches // num_images))
    values = np.empty((num_images, each, embeddings.num_channels), dtype=np.float32)
    places, of_grid = np.empty((num_images, each, 2), dtype=np.float32), grid_places(embeddings.grid)
    done = 0
    for indices, batch in embeddings.batches(range(num_images)):
        for index, image in zip(indices, batch, strict=True):
            chosen = np.sort(generator.choice(positions, size=each, replace=False))
            values[index], places[index] = image[chosen], of_grid[chosen]
        done += len(indices)
        progress(done, num_images, "patches")
    return PatchSample(
        values=aligned_tensor(values.reshape(num_images * each, -1)).to(device),
        places=aligned_tensor(places.reshape(num_images * each, 2)).to(device),
        image_of=torch.arange(num_images).repeat_interleave(each),
        num_images=num_images,
    )


log = EventLog("feddymem")

BATCH_PATCHES = 4096


@dataclass(frozen=True, kw_only=True)
class SiteMemory:
    """What a site keeps to itself between rounds.

    Attributes:
        entries: ``[B, C]`` its dynamic memory, in the frozen backbone's coordinates.
        places: ``[B, 2]`` row and column of each, as shares of the picture's height and width.
        generator: the site's own.
    """

    entries: Tensor
    places: Tensor
    generator: MemoryGenerator

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file, by name."""
        return {"entries": self.entries, "places": self.places, "generator": self.generator.weight.detach()}


def restore_memory(tensors: Mapping[str, Tensor], num_channels: int, device: torch.device) -> SiteMemory | None:
    """What :meth:`SiteMemory.tensors` gave; None if there is nothing.

    Raises:
        DataError: it is of other embeddings.
    """
    if not tensors:
        return None
    entries, weight = tensors["entries"], tensors["generator"]
    # Earlier versions kept no places, in runs in which they count for nothing.
    places = tensors.get("places", torch.full((len(entries), 2), 0.5))
    if entries.shape[1:] != (num_channels,) or weight.shape != (num_channels, num_channels):
        raise DataError(f"this site's memory is of {entries.shape[-1]} channels, its backbone has {num_channels}")
    generator = MemoryGenerator(num_channels).to(device)
    with torch.no_grad():
        generator.weight.copy_(weight)
    # Copied, because a file's memory is not aligned; see `aligned_tensor`.
    return SiteMemory(entries=entries.to(device, copy=True), places=places.to(device, copy=True), generator=generator)


def initial_memory(patches: PatchSample, *, size: int, seed: int) -> SiteMemory:
    """Some of the patches, at random, as entries; and the identity for a generator."""
    order = torch.randperm(len(patches.values), generator=torch.Generator().manual_seed(seed))[:size]
    chosen = order.sort().values.to(patches.values.device)
    return SiteMemory(
        entries=patches.values[chosen],
        places=patches.places[chosen],
        generator=MemoryGenerator(patches.values.shape[1]).to(patches.values.device),
    )


def fit_metric(patches: PatchSample, memory: SiteMemory, fleet: MemoryBank | None, learning: Learning) -> Whitening:
    """Whitening by the covariance of the site's patches about the nearest of its entries and the fleet's prototypes.

    Which is the nearest is judged after whitening by the covariance of all patches. The covariance of the prototypes
    themselves would tell by how much normal patches differ from one another, and not how far one may be from those that
    it should resemble.

    Raises:
        NumericalError: nothing varies between the patches.
    """
    device, ridge = patches.values.device, learning.memory.ridge
    # Of a fleet whose memory carries no places, its sites count none: distances must mean the same to all prototypes.
    placed = fleet is None or not len(fleet) or fleet.places is not None
    place_scale = learning.memory.position_weight * patches.values.shape[1] ** 0.5 if placed else 0.0
    values = patches.values.cpu().numpy()
    rough = fit_whitening(values, None, ridge=ridge, device=device, place_scale=place_scale)
    known, places = all_prototypes(memory, fleet)
    plain = MemoryGenerator(values.shape[1]).to(device)
    index = nearest_index(
        comparable(rough, plain, patches.values, patches.places), comparable(rough, plain, known, places)
    )
    if len(torch.unique(index)) == len(values):
        return rough  # every patch is a prototype, and nothing varies about them
    nearest = known[index].cpu().numpy()
    return fit_whitening(values, nearest, ridge=ridge, device=device, place_scale=place_scale)


def all_prototypes(memory: SiteMemory, fleet: MemoryBank | None) -> tuple[Tensor, Tensor]:
    """The site's entries and the fleet's prototypes ``[., C]``, and their places ``[., 2]``."""
    if fleet is None or not len(fleet):
        return memory.entries, memory.places
    places = np.full((len(fleet), 2), 0.5, dtype=np.float32) if fleet.places is None else fleet.places
    values, at = (aligned_tensor(one).to(memory.entries.device) for one in (fleet.prototypes, places))
    return torch.cat([memory.entries, values]), torch.cat([memory.places, at])


def train_memory(
    memory: SiteMemory,
    patches: PatchSample,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    *,
    seed: int,
    progress: Progress = no_progress,
) -> tuple[SiteMemory, dict[str, float]]:
    """Train the generator and update the memory, epoch by epoch; the same arguments give the same memory.

    Metric loss, for a patch z and its noised copy z' (Eq. 14 of FADE), with d their distances to the nearest prototype
    (of the site's memory and the fleet's) over sqrt(C): mean of ``d(z)^2 + max(0, margin - d(z') + d(z))``. The first
    term pulls, the second keeps all from falling into one point.

    Returns:
        The new memory, and the terms of the last epoch.

    Raises:
        NumericalError: the loss is not finite.
    """
    settings, training = learning.memory, learning.training
    device = patches.values.device
    generator = MemoryGenerator(patches.values.shape[1]).to(device)
    generator.load_state_dict(memory.generator.state_dict())
    memory = SiteMemory(entries=memory.entries, places=memory.places, generator=generator)
    noise = torch.Generator(device=device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    spread = patches.values.std(dim=0) if training.noise_scale == "relative" else torch.ones_like(whitening.centre)
    optimiser = torch.optim.SGD(
        generator.parameters(),
        lr=settings.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    count, last = len(patches.values), {}
    for epoch in range(training.epochs):
        prototypes, places = all_prototypes(memory, fleet)
        known = whitening(prototypes)
        known_places = whitening.place_scale * places
        sums: dict[str, float] = {}
        for part in torch.split(torch.randperm(count, generator=order), BATCH_PATCHES):
            values, at = patches.values[part.to(device)], whitening.place_scale * patches.places[part.to(device)]
            shift = training.noise_std * spread * torch.randn(values.shape, generator=noise, device=device)
            losses = metric_loss(
                generator,
                (known, known_places),
                (whitening(values), at),
                (whitening(values + shift), at),
                margin=training.margin,
            )
            if not torch.isfinite(losses["loss"]):
                raise NumericalError(
                    f"the metric loss became {losses['loss'].item()}; try a lower memory.learning_rate"
                )
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(part)
        memory = update_entries(memory, patches, whitening, rate=settings.update_rate)
        last = {name: value / count for name, value in sums.items()}
        log.info("epoch", number=epoch + 1, of=training.epochs, **last)
        progress(epoch + 1, training.epochs, "memory")
    return memory, last


Placed = tuple[Tensor, Tensor]
"""Whitened values ``[., C]`` and scaled places ``[., 2]``."""


def metric_loss(
    generator: MemoryGenerator, known: Placed, good: Placed, noised: Placed, *, margin: float
) -> dict[str, Tensor]:
    """The loss of :func:`train_memory` and its parts. Places decide which prototype is the nearest, no more."""
    scale = known[0].shape[1] ** 0.5
    near, far = (_nearest_distance(generator, rows, known) / scale for rows in (good, noised))
    violated = functional.relu(margin - far + near)
    return {
        "loss": near.square().mean() + violated.mean(),
        "pull": near.square().mean().detach(),
        "separated": (violated == 0).float().mean().detach(),
    }


def assign_patches(patches: PatchSample, memory: SiteMemory, whitening: Whitening) -> Tensor:
    """The entry nearest to each patch, ``[n]`` int64."""
    return nearest_index(
        comparable(whitening, memory.generator, patches.values, patches.places),
        comparable(whitening, memory.generator, memory.entries, memory.places),
    )


def update_entries(memory: SiteMemory, patches: PatchSample, whitening: Whitening, *, rate: float) -> SiteMemory:
    """Exponential moving average of the entries towards the patches assigned to them; others stay."""
    entry_of = assign_patches(patches, memory, whitening).cpu()

    def moved(before: Tensor, values: Tensor) -> Tensor:
        return before + rate * (means_of_groups(values, entry_of, len(before), empty=before) - before)

    return SiteMemory(
        entries=moved(memory.entries, patches.values),
        places=moved(memory.places, patches.places),
        generator=memory.generator,
    )


def _nearest_distance(generator: MemoryGenerator, rows: Placed, known: Placed) -> Tensor:
    # The nearest is chosen without a gradient. The generator is linear, so it may take the difference itself; the
    # gradient of an indexed product would be summed by threads in an order of chance.
    with torch.no_grad():
        index = nearest_index(*(torch.cat([generator(values), places], dim=1) for values, places in (rows, known)))
    distance: Tensor = (generator(rows[0] - known[0][index]).square().sum(dim=1) + 1e-12).sqrt()
    return distance
