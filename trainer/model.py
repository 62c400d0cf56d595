"""The model a site trains and a fleet exchanges: embedding network and discriminator, as safetensors.

Tensor names begin with ``backbone.network.`` or ``discriminator.``. Everything that has an effect is exchanged,
batch-norm statistics included; torch's ``num_batches_tracked`` counters have none and stay at home, so that every
exchanged tensor is floating point and can be averaged.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from edgeflame.errors import FederationError, StorageError
from edgeflame.learning import Learning
from edgeflame.package import WeightsOrigin
from trainer.backbone import EmbeddingNetwork, build_network
from trainer.fade import Discriminator

WEIGHTS_KEY = "weights"
"""The one metadata key of a model file: where its backbone's weights came from, as JSON. safetensors writes several
keys in an order of chance, and the same model should give the same file."""


class SiteModel(nn.Module):
    """Embedding network and FADE's discriminator; the discriminator is thrown away after training."""

    def __init__(self, backbone: EmbeddingNetwork, discriminator: Discriminator) -> None:
        super().__init__()
        self.backbone = backbone
        self.discriminator = discriminator

    def exchanged(self) -> dict[str, Tensor]:
        """What leaves the site: name to tensor on the CPU, contiguous, detached copies."""
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
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
    return SiteModel(backbone, discriminator), origin


def empty_model(learning: Learning) -> SiteModel:
    """A model to load exchanged tensors into; looks for no weights.

    Raises:
        ConfigError: unknown backbone.
    """
    backbone = EmbeddingNetwork(learning.backbone, learning.input)
    backbone.eval()
    return SiteModel(backbone.to(memory_format=torch.channels_last), Discriminator(backbone.num_channels))


def save_model(path: Path, model: SiteModel, weights: WeightsOrigin | None = None) -> None:
    """Write the exchanged tensors, whole or not at all; the same model gives the same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    metadata = {WEIGHTS_KEY: msgspec.json.encode(weights).decode()} if weights else None
    try:
        partial.write_bytes(safetensors.torch.save(model.exchanged(), metadata=metadata))
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        msg = f"{path}: cannot write the model ({exc.strerror})"
        raise StorageError(msg) from exc


def load_model(path: Path, learning: Learning) -> tuple[SiteModel, WeightsOrigin | None]:
    """Read a model of the given configuration, and where its weights came from, if the file says so.

    Raises:
        StorageError: the file cannot be read.
        FederationError: it is not such a model: other names, shapes or types, or values that are not finite.
    """
    model = empty_model(learning)
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            origin = (stream.metadata() or {}).get(WEIGHTS_KEY)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        weights = msgspec.json.decode(origin, type=WeightsOrigin) if origin else None
    except (FileNotFoundError, PermissionError) as exc:
        msg = f"{path}: cannot read the model ({exc})"
        raise StorageError(msg) from exc
    except (safetensors.SafetensorError, msgspec.DecodeError, OSError, ValueError) as exc:
        msg = f"{path}: not a model in safetensors format, or damaged ({exc})"
        raise FederationError(msg) from exc
    wanted = model.exchanged()
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        msg = f"{path}: not a model of this configuration: {len(odd)} tensors differ, for instance {odd[0]}"
        raise FederationError(msg)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            msg = (
                f"{path}: {name} should be {wanted[name].dtype} {list(wanted[name].shape)}, "
                f"is {tensor.dtype} {list(tensor.shape)}"
            )
            raise FederationError(msg)
        if not torch.isfinite(tensor).all():
            msg = f"{path}: {name} holds NaN or infinite values"
            raise FederationError(msg)
    model.load_state_dict(tensors, strict=False)  # only the counters are missing, as just checked
    return model, weights
