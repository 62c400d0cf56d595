"""A site's training: the dynamic memory and its generator, for some epochs over its patches.

The backbone is frozen, so nothing is propagated through it: patches are computed once, and an epoch is a few products
of small matrices. That is why this is not an objective of the network's training loop.

Axes: n patches, B entries of the site's own memory, M global prototypes, C embedding channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.errors import DataError, NumericalError
from edgeflame.learning import Learning
from edgeflame.memory_bank import MemoryBank
from trainer.feddymem.metric import MemoryGenerator, Whitening, greedy_k_centre, nearest, tensor_of, whitening_of
from trainer.feddymem.patches import Patches

log = EventLog("feddymem")

SEED_PATCHES = 8192
"""Patches among which the first entries are sought; the search costs patches times entries."""

BATCH_PATCHES = 4096


@dataclass(frozen=True, kw_only=True)
class SiteMemory:
    """What a site keeps to itself between rounds.

    Attributes:
        entries: ``[B, C]`` its dynamic memory, in the frozen backbone's coordinates.
        generator: its own.
    """

    entries: Tensor
    generator: MemoryGenerator

    def tensors(self) -> dict[str, Tensor]:
        """For its file."""
        return {"entries": self.entries, "generator": self.generator.weight.detach()}


def restored(tensors: Mapping[str, Tensor], num_channels: int, device: torch.device) -> SiteMemory | None:
    """What :meth:`SiteMemory.tensors` gave; None if there is nothing.

    Raises:
        DataError: it is of other embeddings.
    """
    if not tensors:
        return None
    entries, weight = tensors["entries"], tensors["generator"]
    if entries.shape[1:] != (num_channels,) or weight.shape != (num_channels, num_channels):
        msg = f"this site's memory is of {entries.shape[-1]} channels, its backbone has {num_channels}"
        raise DataError(msg)
    generator = MemoryGenerator(num_channels).to(device)
    with torch.no_grad():
        generator.weight.copy_(weight)
    # Copied, because a file's memory is not aligned; see `tensor_of`.
    return SiteMemory(entries=entries.to(device, copy=True), generator=generator)


def metric_of(patches: Patches, fleet: MemoryBank | None, learning: Learning) -> Whitening:
    """Whitening by the covariance of the fleet's prototypes; without them, of the site's patches."""
    device, ridge = patches.values.device, learning.memory.ridge
    if fleet is not None and len(fleet) > 1:
        return whitening_of(fleet.prototypes, fleet.weights, ridge=ridge, device=device)
    return whitening_of(patches.values.cpu().numpy(), None, ridge=ridge, device=device)


def first_memory(patches: Patches, whitening: Whitening, learning: Learning, *, seed: int) -> SiteMemory:
    """Entries that lie far apart, and the identity for a generator."""
    device = patches.values.device
    order = torch.randperm(len(patches.values), generator=torch.Generator().manual_seed(seed))[:SEED_PATCHES]
    some = patches.values[order.sort().values.to(device)]
    chosen = greedy_k_centre(whitening(some), learning.memory.entries)
    return SiteMemory(entries=some[chosen], generator=MemoryGenerator(some.shape[1]).to(device))


def train_memory(
    memory: SiteMemory,
    patches: Patches,
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
    shared = None if fleet is None or not len(fleet) else tensor_of(fleet.prototypes).to(device)
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
                msg = f"the metric loss became {losses['loss'].item()}; try a lower memory.learning_rate"
                raise NumericalError(msg)
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(part)
        with torch.no_grad():
            entries = updated(entries, patches, whitening, generator, rate=settings.update_rate)
        last = {name: value / count for name, value in sums.items()}
        log.info("epoch", number=epoch + 1, of=training.epochs, **last)
        progress(epoch + 1, training.epochs, "memory")
    return SiteMemory(entries=entries, generator=generator), last


def metric_loss(
    generator: MemoryGenerator, known: Tensor, good: Tensor, noised: Tensor, *, margin: float
) -> dict[str, Tensor]:
    """The loss of :func:`train_memory` and its parts; all arguments are whitened, ``[., C]``."""
    scale = known.shape[1] ** 0.5
    near, far = (_distance(generator, rows, known) / scale for rows in (good, noised))
    violated = functional.relu(margin - far + near)
    return {
        "loss": near.square().mean() + violated.mean(),
        "pull": near.square().mean().detach(),
        "separated": (violated == 0).float().mean().detach(),
    }


def assigned(patches: Patches, entries: Tensor, whitening: Whitening, generator: MemoryGenerator) -> Tensor:
    """The entry nearest to each patch, ``[n]`` int64."""
    with torch.no_grad():
        return nearest(generator(whitening(patches.values)), generator(whitening(entries)))


def updated(
    entries: Tensor, patches: Patches, whitening: Whitening, generator: MemoryGenerator, *, rate: float
) -> Tensor:
    """Exponential moving average of the entries towards the patches assigned to them; others stay."""
    entry_of = assigned(patches, entries, whitening, generator).cpu()
    sums = torch.zeros(entries.shape, dtype=torch.float64)
    # On the CPU, where the order of additions is always the same.
    sums.index_add_(0, entry_of, patches.values.cpu().double())
    counts = torch.bincount(entry_of, minlength=len(entries))[:, None]
    means = (sums / counts.clamp_min(1)).float().to(entries.device)
    return torch.where((counts > 0).to(entries.device), entries + rate * (means - entries), entries)


def _distance(generator: MemoryGenerator, rows: Tensor, known: Tensor) -> Tensor:
    # The nearest is chosen without a gradient. The generator is linear, so it may take the difference itself; the
    # gradient of an indexed product would be summed by threads in an order of chance.
    with torch.no_grad():
        index = nearest(generator(rows), generator(known))
    distance: Tensor = (generator(rows - known[index]).square().sum(dim=1) + 1e-12).sqrt()
    return distance
