"""A site's training by FedDyMem: the metric, the sample of patches, and the dynamic memory with its generator.

The backbone is frozen, so nothing is propagated through it: patches (a bounded, seeded sample) are computed once, and
an epoch is a few products of small matrices. That is why this is not an objective of the network's training loop.

The metric in which patches and prototypes are compared is whitening, then the memory generator. A linear generator
*before* the whitening would be undone by it (a Mahalanobis distance does not change under linear maps), so it comes
after: T = (I + W) S^(-1/2), with S the prototypes' covariance and W = 0 at first. The root is the symmetric one, which
turns nothing, so that a generator still fits when the covariance changes from round to round.

Axes: n patches, B entries of the site's own memory, M (global) prototypes, C embedding channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflame.errors import DataError, NumericalError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.statistics.memory import MemoryBank
from edgeflame.tensors import F32
from fitting.embeddings import Embeddings

DISTANCES_AT_ONCE = 1 << 24
"""Elements of a distance matrix held at once: 64 MiB."""


def aligned_tensor(array: F32) -> Tensor:
    """A tensor of its own: in memory that torch aligns, so that its products are the same bits every time.

    The products of a tensor that shares numpy's memory depend on where that happens to lie.
    """
    return torch.from_numpy(array).clone()


class MemoryGenerator(nn.Module):
    """A residual linear projection, the identity at first. It is trained at a site and never leaves it."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, num_channels))

    def forward(self, whitened: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, C]``."""
        return whitened + whitened @ self.weight.T


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """``(x - centre) @ matrix``: ``[C]`` and ``[C, C]``, symmetric."""

    centre: Tensor
    matrix: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, C]``."""
        return (embeddings - self.centre) @ self.matrix


def fit_whitening(samples: F32, weights: F32 | None, *, ridge: float, device: torch.device) -> Whitening:
    """Whitening by the covariance of ``samples [n, C]`` with ``weights [n]``, plus a ridge.

    Args:
        samples: prototypes or patches.
        weights: of each; None weighs all the same.
        ridge: share of the mean variance that is added to every eigenvalue.
        device: where the result lives.

    Raises:
        NumericalError: nothing varies between the samples.
    """
    share = np.full(len(samples), 1 / len(samples)) if weights is None else weights / weights.sum(dtype=np.float64)
    values = samples.astype(np.float64)
    centre = share @ values
    centred = values - centre
    covariance = (centred * share[:, None]).T @ centred
    eigenvalues, vectors = np.linalg.eigh(covariance)
    mean_variance = float(np.clip(eigenvalues, 0, None).mean())
    if not mean_variance > 0:
        raise NumericalError("nothing varies between the patches; are they all of the same picture?")
    matrix = (vectors / np.sqrt(np.clip(eigenvalues, 0, None) + ridge * mean_variance)) @ vectors.T
    return Whitening(
        centre=aligned_tensor(centre.astype(np.float32)).to(device),
        matrix=aligned_tensor(matrix.astype(np.float32)).to(device),
    )


def combined_transform(whitening: Whitening, generator: MemoryGenerator) -> F32:
    """Both as one matrix ``[C, C]``, for :class:`edgeflame.statistics.memory.MemoryStatistics`."""
    with torch.no_grad():
        both = generator.weight.double() @ whitening.matrix.double() + whitening.matrix.double()
    transform: F32 = both.float().cpu().numpy()
    return transform


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """``[n, C]`` and ``[M, C]`` to ``[n, M]``, >= 0."""
    products = rows @ columns.T
    squared = rows.square().sum(dim=1, keepdim=True) + columns.square().sum(dim=1) - 2 * products
    return squared.clamp_min(0)


def nearest_index(rows: Tensor, columns: Tensor) -> Tensor:
    """The index of the nearest column for each row, ``[n]`` int64."""
    at_once = max(1, DISTANCES_AT_ONCE // max(1, len(columns)))
    found = [squared_distances(part, columns).argmin(dim=1) for part in torch.split(rows, at_once)]
    return torch.cat(found)


def greedy_k_centre(points: Tensor, count: int) -> Tensor:
    """Points that lie far apart: each next one is the farthest from those before (the first: from the mean).

    Args:
        points: ``[n, C]``.
        count: how many; fewer where no more than that differ.

    Returns:
        Their indices, ``[<= count]`` int64.
    """
    distance = squared_distances(points, points.mean(dim=0, keepdim=True))[:, 0]
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        farthest = int(distance.argmax())
        if chosen and not float(distance[farthest]) > 0:
            break
        chosen.append(farthest)
        new = squared_distances(points, points[farthest : farthest + 1])[:, 0]
        # Exactly zero, also where rounding says otherwise: a point is not chosen twice.
        new[farthest] = 0
        distance = new if len(chosen) == 1 else torch.minimum(distance, new)
    return torch.tensor(chosen, dtype=torch.int64, device=points.device)


@dataclass(frozen=True, kw_only=True)
class PatchSample:
    """Patches of a site's images.

    Attributes:
        values: ``[n, C]`` float32.
        image_of: ``[n]`` int64, which image each is from.
        num_images: N.
    """

    values: Tensor
    image_of: Tensor
    num_images: int

    def without(self, images: list[int]) -> PatchSample:
        """The patches of all images but some."""
        kept = ~torch.isin(self.image_of, torch.tensor(images, dtype=torch.int64))
        return PatchSample(
            values=self.values[kept.to(self.values.device)], image_of=self.image_of[kept], num_images=self.num_images
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
    done = 0
    for indices, batch in embeddings.batches(range(num_images)):
        for index, image in zip(indices, batch, strict=True):
            chosen = np.sort(generator.choice(positions, size=each, replace=False))
            values[index] = image[chosen]
        done += len(indices)
        progress(done, num_images, "patches")
    return PatchSample(
        values=aligned_tensor(values.reshape(num_images * each, -1)).to(device),
        image_of=torch.arange(num_images).repeat_interleave(each),
        num_images=num_images,
    )


log = EventLog("feddymem")

SEED_PATCHES = 8192
"""Patches among which the first entries are sought; the search costs patches times entries."""

BATCH_PATCHES = 4096


@dataclass(frozen=True, kw_only=True)
class SiteMemory:
    """What a site keeps to itself between rounds.

    Attributes:
        entries: ``[B, C]`` its dynamic memory, in the frozen backbone's coordinates.
        generator: the site's own.
    """

    entries: Tensor
    generator: MemoryGenerator

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file, by name."""
        return {"entries": self.entries, "generator": self.generator.weight.detach()}


def restore_memory(tensors: Mapping[str, Tensor], num_channels: int, device: torch.device) -> SiteMemory | None:
    """What :meth:`SiteMemory.tensors` gave; None if there is nothing.

    Raises:
        DataError: it is of other embeddings.
    """
    if not tensors:
        return None
    entries, weight = tensors["entries"], tensors["generator"]
    if entries.shape[1:] != (num_channels,) or weight.shape != (num_channels, num_channels):
        raise DataError(f"this site's memory is of {entries.shape[-1]} channels, its backbone has {num_channels}")
    generator = MemoryGenerator(num_channels).to(device)
    with torch.no_grad():
        generator.weight.copy_(weight)
    # Copied, because a file's memory is not aligned; see `aligned_tensor`.
    return SiteMemory(entries=entries.to(device, copy=True), generator=generator)


def fit_metric(patches: PatchSample, fleet: MemoryBank | None, learning: Learning) -> Whitening:
    """Whitening by the covariance of the fleet's prototypes; without them, of the site's patches."""
    device, ridge = patches.values.device, learning.memory.ridge
    if fleet is not None and len(fleet) > 1:
        return fit_whitening(fleet.prototypes, fleet.weights, ridge=ridge, device=device)
    return fit_whitening(patches.values.cpu().numpy(), None, ridge=ridge, device=device)


def initial_memory(patches: PatchSample, whitening: Whitening, learning: Learning, *, seed: int) -> SiteMemory:
    """Entries that lie far apart, and the identity for a generator."""
    device = patches.values.device
    order = torch.randperm(len(patches.values), generator=torch.Generator().manual_seed(seed))[:SEED_PATCHES]
    some = patches.values[order.sort().values.to(device)]
    chosen = greedy_k_centre(whitening(some), learning.memory.entries)
    return SiteMemory(entries=some[chosen], generator=MemoryGenerator(some.shape[1]).to(device))


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
    entries = memory.entries
    shared = None if fleet is None or not len(fleet) else aligned_tensor(fleet.prototypes).to(device)
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
        known = whitening(entries if shared is None else torch.cat([entries, shared]))
        sums: dict[str, float] = {}
        for part in torch.split(torch.randperm(count, generator=order), BATCH_PATCHES):
            values = patches.values[part.to(device)]
            shift = training.noise_std * spread * torch.randn(values.shape, generator=noise, device=device)
            losses = metric_loss(generator, known, whitening(values), whitening(values + shift), margin=training.margin)
            if not torch.isfinite(losses["loss"]):
                raise NumericalError(
                    f"the metric loss became {losses['loss'].item()}; try a lower memory.learning_rate"
                )
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(part)
        with torch.no_grad():
            entries = update_entries(entries, patches, whitening, generator, rate=settings.update_rate)
        last = {name: value / count for name, value in sums.items()}
        log.info("epoch", number=epoch + 1, of=training.epochs, **last)
        progress(epoch + 1, training.epochs, "memory")
    return SiteMemory(entries=entries, generator=generator), last


def metric_loss(
    generator: MemoryGenerator, known: Tensor, good: Tensor, noised: Tensor, *, margin: float
) -> dict[str, Tensor]:
    """The loss of :func:`train_memory` and its parts; all arguments are whitened, ``[., C]``."""
    scale = known.shape[1] ** 0.5
    near, far = (_nearest_distance(generator, rows, known) / scale for rows in (good, noised))
    violated = functional.relu(margin - far + near)
    return {
        "loss": near.square().mean() + violated.mean(),
        "pull": near.square().mean().detach(),
        "separated": (violated == 0).float().mean().detach(),
    }


def assign_patches(patches: PatchSample, entries: Tensor, whitening: Whitening, generator: MemoryGenerator) -> Tensor:
    """The entry nearest to each patch, ``[n]`` int64."""
    with torch.no_grad():
        return nearest_index(generator(whitening(patches.values)), generator(whitening(entries)))


def update_entries(
    entries: Tensor, patches: PatchSample, whitening: Whitening, generator: MemoryGenerator, *, rate: float
) -> Tensor:
    """Exponential moving average of the entries towards the patches assigned to them; others stay."""
    entry_of = assign_patches(patches, entries, whitening, generator).cpu()
    sums = torch.zeros(entries.shape, dtype=torch.float64)
    # On the CPU, where the order of additions is always the same.
    sums.index_add_(0, entry_of, patches.values.cpu().double())
    counts = torch.bincount(entry_of, minlength=len(entries))[:, None]
    means = (sums / counts.clamp_min(1)).float().to(entries.device)
    return torch.where((counts > 0).to(entries.device), entries + rate * (means - entries), entries)


def _nearest_distance(generator: MemoryGenerator, rows: Tensor, known: Tensor) -> Tensor:
    # The nearest is chosen without a gradient. The generator is linear, so it may take the difference itself; the
    # gradient of an indexed product would be summed by threads in an order of chance.
    with torch.no_grad():
        index = nearest_index(generator(rows), generator(known))
    distance: Tensor = (generator(rows - known[index]).square().sum(dim=1) + 1e-12).sqrt()
    return distance
