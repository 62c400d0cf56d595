"""The learning methods and their configuration: what a site fits with, an aggregator hands out, and a package records.

``METHODS`` is the registry: a method is one entry here, an objective of the trainer and a strategy of the
aggregator. :class:`Learning` is all configuration of learning. It is plain data, so that an aggregator without
torch can check it; what it means lives in ``trainer``.

A preset is what settings start from before a file or the command line changes them. ``preset = "default"`` is what
measured best here, and is written in the structs themselves but for what depends on the method. ``preset =
"paper"`` is what the FLAME paper prints, for comparison: its momentum of 0.09 (probably meant to be 0.9) and its
absolute noise of 0.015 included. It has one learning rate for backbone and discriminator, gives no tau (0.5 here),
and does not average embeddings over neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing

RejectUnit = Literal["photograph", "part"]
"""What is rejected: each photograph by itself, or a part as soon as one of its photographs is."""

ExchangeKind = Literal["weights", "controls", "memory"]
"""What sites send: the model's tensors; or with them SCAFFOLD's control variates, under ``CONTROL_PREFIX``; or a memory
bank (:mod:`edgeflame.statistics.memory`) and no weights at all."""

CONTROL_PREFIX = "control."
"""Of the names of tensors that travel with a model without being part of it."""

Precision = Literal["auto", "float32", "bfloat16"]

Preset = Literal["default", "paper"]

BatchNorm = Literal["frozen", "average", "local"]


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """A learning method: what a site minimises, and how a server makes one model of many."""

    summary: str
    objective: str | None = "fade"
    """A key of ``trainer.objectives.OBJECTIVES``; None trains nothing."""
    alone: bool = False
    """``fit`` takes it: it needs no other site."""
    strategy: str | None = None
    """A key of ``aggregator.strategies.STRATEGIES``, its own rule at the server; None: it does not federate."""
    exchange: ExchangeKind = "weights"


METHODS: dict[str, Method] = {
    "none": Method(
        summary="the pre-trained backbone as it is, and Gaussian statistics",
        objective=None,
        alone=True,
    ),
    "fade": Method(
        summary="FADE: the backbone adapted against noised embeddings, at one site",
        alone=True,
    ),
    "solo": Method(
        summary="SOLO: FADE at one site for as long as a whole federation trains, nothing exchanged",
        alone=True,
    ),
    "fedavg": Method(
        summary="FADE at each site, weights averaged",
        strategy="fedavg",
    ),
    "fedprox": Method(
        summary="FADE at each site, held near the global model, weights averaged",
        objective="fedprox",
        strategy="fedavg",
    ),
    "fednova": Method(
        summary="FADE at each site, changes averaged per step taken",
        strategy="fednova",
    ),
    "scaffold": Method(
        summary="FADE at each site with control variates against drift",
        objective="scaffold",
        strategy="scaffold",
        exchange="controls",
    ),
    "moon": Method(
        summary="FADE at each site with a contrast between the global and the last local model",
        objective="moon",
        strategy="fedavg",
    ),
    "flame": Method(
        summary="FADE at each site with FLAME's distillation between the global and the last local model",
        objective="flame",
        strategy="fedavg",
    ),
    "feddymem": Method(
        summary="FedDyMem: a memory of normal patches; sites share averages of it, not weights",
        objective=None,
        alone=True,
        strategy="kmeans",
        exchange="memory",
    ),
}
"""By name; a method is one entry here, an objective of the trainer and a rule of the aggregator."""

SOLO_METHODS = tuple(name for name, method in METHODS.items() if method.alone)
FEDERATED_METHODS = tuple(name for name, method in METHODS.items() if method.strategy is not None)

MAX_RANK = 512

MAX_NEIGHBOURHOOD = 9
"""Cells; averaged more widely, an embedding no longer tells where it is."""


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{rule}, not {value}")


class Taps(msgspec.Struct, frozen=True, kw_only=True):
    """Where an embedding's maps are taken from a network: one of the two is empty."""

    stages: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        kind, numbers = ("layers", self.layers) if self.layers else ("stages", self.stages)
        return f"{kind} {', '.join(map(str, numbers))}"


TAPS = {
    "tf_efficientnet_lite0": Taps(stages=(2, 3)),
    "tf_efficientnet_lite1": Taps(stages=(2, 3)),
    "tf_efficientnet_lite2": Taps(stages=(2, 3)),
    "resnet18": Taps(stages=(1, 2, 3)),
    "wide_resnet50_2": Taps(stages=(1, 2, 3)),
    "efficientnet_b5": Taps(layers=(7, 20, 26)),
}
"""By default: what measured well for the Lite family, and the FLAME paper's for its three backbones, the first three
residual stages (0 is the stem) and layers 7, 20 and 26."""

MOMENT_BUDGET_BYTES = 2 << 30
"""Of second moments (positions x channels^2 x 8). Wider embeddings are projected: resnet18's 448 channels on a 64 x 64
grid to 256."""


class Backbone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A timm feature network."""

    name: str = "tf_efficientnet_lite0"
    """Its name in timm."""
    stages: tuple[int, ...] | Literal["auto"] = "auto"
    """timm ``out_indices``; their maps are resized to the finest of them and concatenated. ``auto``: see ``TAPS``."""
    layers: tuple[int, ...] = ()
    """In place of stages: numbers of single blocks of an EfficientNet, from 0, as the FLAME paper counts B5's."""
    weights: str = "auto"
    """``auto`` (an installed weights package, then the timm hub), ``random``, or a .safetensors/.pth file."""
    neighbourhood: int = 3
    """Side, in cells of the patch grid, of the square that each embedding is averaged over; 1 for none."""
    channels: int | Literal["auto", "all"] = "auto"
    """To how many channels a random semi-orthogonal projection reduces the embedding; ``auto``: as many as
    ``MOMENT_BUDGET_BYTES`` allow, which for narrow embeddings is all of them."""
    projection_seed: int = 0
    """Of the projection: the same for all sites, whose embeddings must mean the same."""

    @property
    def taps(self) -> Taps:
        """The stages or layers whose maps make the embedding."""
        if self.layers:
            return Taps(layers=self.layers)
        return TAPS[self.name] if self.stages == "auto" else Taps(stages=self.stages)

    def __post_init__(self) -> None:
        if self.stages == "auto" and not self.layers and self.name not in TAPS:
            raise ConfigError(
                f"backbone {self.name} needs backbone.stages; only these have a default: {', '.join(TAPS)}"
            )
        if self.stages != "auto" and self.layers:
            raise ConfigError("backbone.stages and backbone.layers exclude each other")
        _require(
            isinstance(self.channels, str) or self.channels >= 1, "backbone.channels: auto, all or >= 1", self.channels
        )
        _require(
            1 <= self.neighbourhood <= MAX_NEIGHBOURHOOD and self.neighbourhood % 2 == 1,
            f"backbone.neighbourhood must be odd, 1..{MAX_NEIGHBOURHOOD}",
            self.neighbourhood,
        )
        for key, numbers in (("stages", self.taps.stages), ("layers", self.taps.layers)):
            if any(number < 0 for number in numbers) or list(numbers) != sorted(set(numbers)):
                raise ConfigError(f"backbone {key} must be rising numbers >= 0, not {list(numbers)}")
        if not self.taps.stages and not self.taps.layers:
            raise ConfigError("backbone stages must be rising numbers >= 0, not none at all")


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site's training: optimiser, FADE (Eq. 14-16) and FLAME (Eq. 19-21)."""

    epochs: int = 1
    """Passes over the site's images; in a federation, per round."""
    learning_rate: float = 1e-4
    """Of the backbone; gentle, because a long or fast adaptation makes the embedding collapse."""
    discriminator_learning_rate: float = 0.1
    """Of FADE's discriminator, which starts from nothing; the paper has one rate for both."""
    momentum: float = 0.9
    """Of stochastic gradient descent."""
    weight_decay: float = 1e-5
    """Of all that is trained."""
    batch_size: int = 16
    """Images a step."""
    noise_std: float = 1.0
    """Standard deviation of the noise of Eq. 14, see ``noise_scale``."""
    noise_scale: Literal["relative", "absolute"] = "relative"
    """``relative``: in units of each channel's standard deviation; ``absolute``: as in the paper."""
    margin: float = 0.5
    """th+ = margin and th- = -margin of Eq. 16."""
    distillation_weight: float = 0.5
    """mu of Eq. 21; used by ``flame`` only."""
    temperature: float = 0.5
    """tau of Eq. 20, which the paper does not give; used by ``flame`` only."""
    proximal_weight: float = 0.01
    """mu of Eq. 9; used by ``fedprox`` only."""
    contrast_weight: float = 1.0
    """MOON's mu; used by ``moon`` only."""
    contrast_temperature: float = 0.5
    """MOON's tau; used by ``moon`` only."""
    batch_norm: BatchNorm = "frozen"
    """The backbone's statistics. ``frozen``: as pre-trained. ``average``: learnt, and averaged like weights.
    ``local`` (FedBN, arXiv 2102.07623): learnt, and every batch norm stays at its site."""
    precision: Precision = "auto"
    """Of the networks in training; ``auto`` is bfloat16 on a GPU that computes in it, else float32. Losses and
    statistics are float32."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "training.epochs must be >= 0", self.epochs)
        _require(self.learning_rate > 0, "training.learning_rate must be > 0", self.learning_rate)
        rate = self.discriminator_learning_rate
        _require(rate > 0, "training.discriminator_learning_rate must be > 0", rate)
        _require(0 <= self.momentum < 1, "training.momentum must be in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "training.weight_decay must be >= 0", self.weight_decay)
        _require(self.batch_size >= 2, "training.batch_size must be >= 2", self.batch_size)
        _require(self.noise_std > 0, "training.noise_std must be > 0", self.noise_std)
        _require(self.margin > 0, "training.margin must be > 0", self.margin)
        _require(self.distillation_weight >= 0, "training.distillation_weight must be >= 0", self.distillation_weight)
        _require(self.temperature > 0, "training.temperature must be > 0", self.temperature)
        _require(self.proximal_weight >= 0, "training.proximal_weight must be >= 0", self.proximal_weight)
        _require(self.contrast_weight >= 0, "training.contrast_weight must be >= 0", self.contrast_weight)
        tau = self.contrast_temperature
        _require(tau > 0, "training.contrast_temperature must be > 0", tau)


class Scoring(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gaussian statistics and the score made of them (Eq. 17, 18, 22, 23)."""

    rank: int | Literal["auto"] = "auto"
    """Eigenpairs kept per position; ``auto`` takes what held-out groups find most likely."""
    max_rank: int = 24
    """The most ``auto`` may take: the line's budget."""
    ridge: float | Literal["auto"] = "auto"
    """Share of the mean variance added to every eigenvalue; ``auto`` as for the rank. Few images need much."""
    drop_worst: float = 0.0
    """Share of the training images that look least normal to statistics without their part, left out of statistics
    and threshold; 0 leaves none out. They are named in the log and in the package."""
    smoothing_sigma: float = 2.0
    """Standard deviation of the map's Gaussian smoothing, in cells of the patch grid; 0 for none."""

    def __post_init__(self) -> None:
        _require(self.rank == "auto" or 0 <= self.rank <= MAX_RANK, f"scoring.rank: auto or 0..{MAX_RANK}", self.rank)
        _require(1 <= self.max_rank <= MAX_RANK, f"scoring.max_rank must be 1..{MAX_RANK}", self.max_rank)
        _require(self.ridge == "auto" or self.ridge > 0, "scoring.ridge: auto or > 0", self.ridge)
        _require(0 <= self.drop_worst <= 0.5, "scoring.drop_worst must be in [0, 0.5]", self.drop_worst)
        _require(self.smoothing_sigma >= 0, "scoring.smoothing_sigma must be >= 0", self.smoothing_sigma)


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FedDyMem; of ``[training]`` it uses epochs, momentum, weight_decay, noise_std, noise_scale and margin."""

    entries: int = 1024
    """Of a site's own dynamic memory, which never leaves it."""
    prototypes: int = 256
    """Averages of them that a site sends, at most."""
    global_prototypes: int = 512
    """Of the fleet's memory, which the server makes of what the sites send, by k-means."""
    update_rate: float = 0.5
    """Share of the way that an entry moves to the mean of the patches assigned to it, in each epoch."""
    learning_rate: float = 0.01
    """Of the memory generator."""
    temperature: float = 1.0
    """T of memory-reduce's weights exp(-d^2 / T), in units of the mean squared distance of an entry to its seed."""
    ridge: float = 0.1
    """Share of the prototypes' mean variance added to every eigenvalue of their covariance before whitening."""
    max_patches: int = 131_072
    """Patches of all images that a site learns from; about 80 MB per 131,072."""
    min_group: float = 32.0
    """Privacy floor: what is sent is worth at least so many equally weighted patches ..."""
    min_images: float = 4.0
    """... of so many equally weighted images. What is not is merged into its neighbour."""

    def __post_init__(self) -> None:
        for name, most in (("entries", 1 << 16), ("prototypes", 1 << 16), ("global_prototypes", 1 << 16)):
            _require(1 <= getattr(self, name) <= most, f"memory.{name} must be 1..{most}", getattr(self, name))
        _require(0 < self.update_rate <= 1, "memory.update_rate must be in (0, 1]", self.update_rate)
        for name in ("learning_rate", "temperature", "ridge"):
            _require(getattr(self, name) > 0, f"memory.{name} must be > 0", getattr(self, name))
        _require(self.max_patches >= 1, "memory.max_patches must be >= 1", self.max_patches)
        for name in ("min_group", "min_images"):
            _require(getattr(self, name) >= 1, f"memory.{name} must be >= 1", getattr(self, name))


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the threshold is set from good images alone."""

    false_reject_rate: float = 0.05
    """Share of the good that the line may reject, if the number of parts allows to promise it: 5% takes 59, 1% takes
    299 of them. With fewer, the threshold is the highest score of all, where one odd part can hide real defects."""
    confidence: float = 0.95
    """With which the rate is promised, see docs/methods.md."""
    unit: RejectUnit = "photograph"
    """What the line rejects, and so what the rate counts: each ``photograph`` by itself, as `inspect` does, or a
    ``part`` as soon as one of its photographs is rejected. Either way parts are what is independent."""
    folds: int = 5
    """Parts of the cross-fit: statistics of all folds but one score the one."""

    def __post_init__(self) -> None:
        _require(
            0 < self.false_reject_rate < 1, "calibration.false_reject_rate must be in (0, 1)", self.false_reject_rate
        )
        _require(0 < self.confidence < 1, "calibration.confidence must be in (0, 1)", self.confidence)
        _require(2 <= self.folds <= 100, "calibration.folds must be 2..100", self.folds)


class Learning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. The sections ``[backbone]``, ``[training]``, ... of a TOML file."""

    method: str = "none"
    """How the backbone is adapted and what sites exchange: a name in ``METHODS``."""
    preset: Preset = "default"
    """What the settings started from when they were read, see ``edgeflame.methods``; of no effect afterwards."""
    seed: int = 0
    """Of everything drawn in learning: noise, batches, projections of a discriminator's start."""
    backbone: Backbone = Backbone()
    input: Preprocessing = Preprocessing()
    training: Training = Training()
    scoring: Scoring = Scoring()
    memory: Memory = Memory()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if METHODS[self.method].exchange == "memory" and self.scoring.drop_worst > 0:
            raise ConfigError(f"scoring.drop_worst must be 0 with method {self.method}, not {self.scoring.drop_worst}")


def accumulated_steps(num_steps: int, momentum: float) -> float:
    """How many gradients' worth SGD has moved after so many steps: the sum of its gradients' weights.

    ``sum_{k=1..K} (1 - rho^k) / (1 - rho)``, ``|a|_1`` of FedNova (arXiv 2007.07481, section 4) for SGD with
    momentum rho: a gradient goes on to act in the steps after its own. Without momentum it is K.
    """
    if momentum == 0:
        return float(num_steps)
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)


ANY_METHOD = "*"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        # As long as ten rounds of a federation.
        "solo": {"training": {"epochs": 10}},
    },
    "paper": {
        ANY_METHOD: {
            "backbone": {"neighbourhood": 1},
            "training": {
                "epochs": 10,
                "learning_rate": 0.01,
                "discriminator_learning_rate": 0.01,
                "momentum": 0.09,
                "weight_decay": 1e-5,
                "batch_size": 32,
                "noise_std": 0.015,
                "noise_scale": "absolute",
                "margin": 0.5,
                "distillation_weight": 0.5,
                "proximal_weight": 0.01,
                "contrast_weight": 1.0,
            },
        },
        "solo": {"training": {"epochs": 200}},
    },
}
"""By name and method: settings as a file would give them."""


def start_from_presets(raw: dict[str, Any], kind: type) -> dict[str, Any]:
    """Put a file's settings over those of the preset they name, wherever ``kind`` holds a :class:`Learning`.

    Args:
        raw: as read from a file; not checked yet, so it may hold anything.
        kind: what it is to be decoded as.
    """
    if kind is Learning:
        return _apply_preset(raw, Learning())
    if not issubclass(kind, msgspec.Struct):
        return raw
    filled = dict(raw)
    for field in msgspec.structs.fields(kind):
        section = raw.get(field.encode_name)
        if field.type is Learning and isinstance(section, dict):
            default = field.default if isinstance(field.default, Learning) else Learning()
            filled[field.encode_name] = _apply_preset(section, default)
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) and isinstance(section, dict):
            filled[field.encode_name] = start_from_presets(section, field.type)
    return filled


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both say something, the upper counts."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge_settings(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _apply_preset(raw: dict[str, Any], default: Learning) -> dict[str, Any]:
    named = {"method": default.method, "preset": default.preset, **raw}
    # A name that is none is told when this is decoded.
    by_method = PRESETS.get(str(named["preset"]), {})
    settings = merge_settings(by_method.get(ANY_METHOD, {}), by_method.get(str(named["method"]), {}))
    return merge_settings(settings, named)
