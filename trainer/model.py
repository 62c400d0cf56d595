"""The model a site trains and a fleet exchanges: embedding network and discriminator, as safetensors.

Tensor names begin with ``backbone.network.`` or ``discriminator.``; a method may have further tensors travel with
the model, under ``CONTROL_PREFIX``. Everything that has an effect is exchanged,
batch-norm statistics included; torch's ``num_batches_tracked`` counters have none and stay at home, so that every
exchanged tensor is floating point and can be averaged.

Batch norm that stays at its site (FedBN, Li et al. 2021, arXiv 2102.07623): with ``training.batch_norm = "local"``
every batch norm's scale, shift and statistics are the site's own. They are put into the global model before it is
used, and taken out of an update before it is sent, which then holds the global model's. Embeddings of different sites
are then in different spaces, so their statistics cannot be merged.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflame.errors import FederationError, StorageError
from edgeflame.images import Preprocessing
from edgeflame.methods import CONTROL_PREFIX, METHODS, Backbone, ExchangeKind, Learning
from edgeflame.package import WeightsOrigin
from edgeflame.state import atomic_write
from trainer.backbone import EmbeddingNetwork, build_network

LEAKY_SLOPE = 0.2
"""As in SimpleNet (arXiv 2303.15140), whose discriminator this is."""


class Discriminator(nn.Module):
    """Normality of each patch: a two-layer perceptron per position, as 1 x 1 convolutions."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(num_channels, num_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(num_channels)
        self.score = nn.Conv2d(num_channels, 1, kernel_size=1, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score patches: ``[B, C, h, w]`` to ``[B, 1, h, w]``, higher where more normal."""
        scores: Tensor = self.score(functional.leaky_relu(self.norm(self.hidden(embeddings)), LEAKY_SLOPE))
        return scores


WEIGHTS_KEY = "weights"
"""The one metadata key of a model file: where its backbone's weights came from, as JSON. safetensors writes several
keys in an order of chance, and the same model should give the same file."""


class SiteModel(nn.Module):
    """Embedding network and FADE's discriminator; the discriminator is thrown away after training.

    Attributes:
        extra_tensors: what is exchanged with the model without being part of it, on the CPU.
    """

    def __init__(self, backbone: EmbeddingNetwork, discriminator: Discriminator, exchange: ExchangeKind) -> None:
        super().__init__()
        self.backbone = backbone
        self.discriminator = discriminator
        self.extra_tensors: dict[str, Tensor] = {}
        if exchange == "controls":
            self.extra_tensors = {
                CONTROL_PREFIX + name: torch.zeros(parameter.shape) for name, parameter in self.named_parameters()
            }

    def exchanged(self) -> dict[str, Tensor]:
        """What leaves the site: name to tensor on the CPU, contiguous, detached copies."""
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.endswith("num_batches_tracked")}
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in {**own, **self.extra_tensors}.items()
        }


def build_model(learning: Learning) -> tuple[SiteModel, WeightsOrigin]:
    """The model before any training; the same for the same configuration and weights.

    Raises:
        ConfigError: unknown backbone.
        DataError: a weights file cannot be read or does not fit.
        MissingDependencyError: no weights can be had.
    """
    backbone, origin = build_network(learning.backbone, learning.input, seed=learning.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learning.seed)
        discriminator = Discriminator(backbone.num_channels)
    return SiteModel(backbone, discriminator, METHODS[learning.method].exchange), origin


def embedding_space_id(learning: Learning, weights: WeightsOrigin) -> str:
    """SHA-256 of what decides on the embeddings: the weights, and how they are used."""
    # Where the weights were found does not matter, only what they are.
    backbone = msgspec.structs.replace(learning.backbone, weights="")
    return hashlib.sha256(msgspec.json.encode([weights.sha256, backbone, learning.input])).hexdigest()


def _empty_model(learning: Learning) -> SiteModel:
    """A model to load exchanged tensors into; looks for no weights.

    Raises:
        ConfigError: unknown backbone.
    """
    # A round loads several models of one kind, and building one takes longer than copying it.
    return copy.deepcopy(_cached_model(learning.backbone, learning.input, METHODS[learning.method].exchange))


@functools.lru_cache(maxsize=4)
def _cached_model(backbone: Backbone, preprocessing: Preprocessing, exchange: ExchangeKind) -> SiteModel:
    network = EmbeddingNetwork(backbone, preprocessing)
    network.eval()
    return SiteModel(network.to(memory_format=torch.channels_last), Discriminator(network.num_channels), exchange)


def save_model(path: Path, model: SiteModel, weights: WeightsOrigin | None = None) -> None:
    """Write the exchanged tensors, whole or not at all; the same model gives the same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    metadata = {WEIGHTS_KEY: msgspec.json.encode(weights).decode()} if weights else None
    atomic_write(path, safetensors.torch.save(model.exchanged(), metadata=metadata), durable=False)


def save_private(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what a site keeps to itself; errors as :func:`save_model`."""
    private = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, safetensors.torch.save(private), durable=False)


def load_private(path: Path | str | None) -> dict[str, Tensor]:
    """Read what a site kept to itself; nothing where there is no file.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    if path is None:
        return {}
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as exc:
        raise StorageError(f"{path}: cannot read what this site kept from its last round ({exc})") from exc


def load_model(path: Path, learning: Learning) -> tuple[SiteModel, WeightsOrigin | None]:
    """Read a model of the given configuration, and where its weights came from, if the file says so.

    Raises:
        StorageError: the file cannot be read.
        FederationError: it is not such a model: other names, shapes or types, or values that are not finite.
    """
    model = _empty_model(learning)
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            origin = (stream.metadata() or {}).get(WEIGHTS_KEY)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        weights = msgspec.json.decode(origin, type=WeightsOrigin) if origin else None
    except (FileNotFoundError, PermissionError) as exc:
        raise StorageError(f"{path}: cannot read the model ({exc})") from exc
    except (safetensors.SafetensorError, msgspec.DecodeError, OSError, ValueError, RecursionError) as exc:
        raise FederationError(f"{path}: not a model in safetensors format, or damaged ({exc})") from exc
    wanted = model.exchanged()
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        raise FederationError(
            f"{path}: not a model of this configuration: {len(odd)} tensors differ, for instance {odd[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise FederationError(
                f"{path}: {name} should be {wanted[name].dtype} {list(wanted[name].shape)}, "
                f"is {tensor.dtype} {list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise FederationError(f"{path}: {name} holds NaN or infinite values")
    model.extra_tensors = {name: tensors.pop(name) for name in model.extra_tensors}
    model.load_state_dict(tensors, strict=False)  # only the counters are missing, as just checked
    return model, weights


BATCH_NORM_PREFIX = "norm."
"""Prefix of the names of batch-norm tensors in a site's private state."""


def batch_norm_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all batch norms' tensors, counters left out: ``BATCH_NORM_PREFIX`` + name to tensor on the CPU."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, tensor in module.state_dict().items():
                if key != "num_batches_tracked":
                    found[f"{BATCH_NORM_PREFIX}{name}.{key}"] = tensor.detach().to("cpu", copy=True)
    return found


def load_batch_norms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load batch-norm tensors into a model; tensors without ``BATCH_NORM_PREFIX`` are ignored."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(BATCH_NORM_PREFIX):
                own[name.removeprefix(BATCH_NORM_PREFIX)].copy_(tensor)
