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
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeflame.bounds import BASIC, Count, NotNegative, Positive, Seed, Share
from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing

ThresholdMode = Literal["expected", "promise"]
"""What a rate of false rejects means: what is to be expected, or what is not exceeded with confidence."""

RejectUnit = Literal["photograph", "part"]
"""What is rejected: each photograph by itself, or a part as soon as one of its photographs is."""

ExchangeKind = Literal["weights", "controls", "memory", "head"]
"""What sites send: the model's tensors; or with them SCAFFOLD's control variates, under ``CONTROL_PREFIX``; or a memory
bank (:mod:`edgeflame.statistics.memory`) and no weights at all; or a head for marked defects, beside a backbone that
stays as it is."""

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

    @property
    def learns(self) -> bool:
        """Whether it learns more than statistics: weights, or a memory. That needs PyTorch."""
        return self.objective is not None or self.exchange == "memory"


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
    "feedback": Method(
        summary="a head for defects that were marked at any site, averaged; the backbone as it is",
        objective=None,
        strategy="fedavg",
        exchange="head",
    ),
}
"""By name; a method is one entry here, an objective of the trainer and a rule of the aggregator."""

SOLO_METHODS = tuple(name for name, method in METHODS.items() if method.alone)
FEDERATED_METHODS = tuple(name for name, method in METHODS.items() if method.strategy is not None)

MAX_RANK = 512

PrototypeCount = Annotated[int, Meta(ge=1, le=1 << 16)]
"""How many vectors a memory holds, or a site sends."""


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


_Place = Annotated[int, Meta(ge=0, le=10_000)]


class Backbone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A timm feature network."""

    name: str = "tf_efficientnet_lite0"
    """The network's name in timm."""
    stages: tuple[_Place, ...] | Literal["auto"] = "auto"
    """timm ``out_indices``; their maps are resized to the finest of them and concatenated. ``auto``: see ``TAPS``."""
    layers: tuple[_Place, ...] = ()
    """Used in place of stages: numbers of single blocks of an EfficientNet, from 0, as the FLAME paper counts B5's."""
    weights: str = "auto"
    """``auto`` (an installed weights package, then the timm hub), ``random``, or a .safetensors/.pth file."""
    neighbourhood: Literal[1, 3, 5, 7, 9] = 3
    """Side, in cells of the patch grid, of the square that each embedding is averaged over; 1 averages nothing.
    Averaged more widely than over 9, an embedding no longer tells where it is."""
    channels: Literal["auto", "all"] | Count = "auto"
    """The number of channels to which a random semi-orthogonal projection reduces the embedding. ``auto``: as many as
    ``MOMENT_BUDGET_BYTES`` allow, which for narrow embeddings is all of them; ``all``: no projection."""
    projection_seed: Seed = 0
    """Seed of the projection. It must be the same at all sites, whose embeddings must mean the same."""

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
        for key, numbers in (("stages", self.taps.stages), ("layers", self.taps.layers)):
            if any(number < 0 for number in numbers) or list(numbers) != sorted(set(numbers)):
                raise ConfigError(f"backbone {key} must be rising numbers >= 0, not {list(numbers)}")
        if not self.taps.stages and not self.taps.layers:
            raise ConfigError("backbone stages must be rising numbers >= 0, not none at all")


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site's training: optimiser, FADE (Eq. 14-16) and FLAME (Eq. 19-21)."""

    epochs: Annotated[int, Meta(ge=0, le=10**6)] = 1
    """Passes over the site's images; in a federation, per round."""
    learning_rate: Positive = 1e-4
    """Learning rate of the backbone; low, because a long or fast adaptation makes the embedding collapse."""
    discriminator_learning_rate: Positive = 0.1
    """Learning rate of FADE's discriminator, which starts untrained; the paper has one rate for both."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Momentum of stochastic gradient descent."""
    weight_decay: NotNegative = 1e-5
    """Weight decay of the backbone and the discriminator."""
    batch_size: Annotated[int, Meta(ge=2, le=1 << 16)] = 16
    """Images in one training step."""
    noise_std: Positive = 1.0
    """Standard deviation of the noise of Eq. 14, see ``noise_scale``."""
    noise_scale: Literal["relative", "absolute"] = "relative"
    """``relative``: in units of each channel's standard deviation; ``absolute``: as in the paper."""
    margin: Positive = 0.5
    """th+ = margin and th- = -margin of Eq. 16."""
    distillation_weight: NotNegative = 0.5
    """mu of Eq. 21; used by ``flame`` only."""
    temperature: Positive = 0.5
    """tau of Eq. 20, which the paper does not give; used by ``flame`` only."""
    proximal_weight: NotNegative = 0.01
    """mu of Eq. 9; used by ``fedprox`` only."""
    contrast_weight: NotNegative = 1.0
    """MOON's mu; used by ``moon`` only."""
    contrast_temperature: Positive = 0.5
    """MOON's tau; used by ``moon`` only."""
    batch_norm: BatchNorm = "frozen"
    """The statistics in the backbone's batch normalisation. ``frozen``: as pre-trained. ``average``: learnt, and
    averaged like weights. ``local`` (FedBN, arXiv 2102.07623): learnt, and every batch norm stays at its site."""
    precision: Precision = "auto"
    """Number format of the networks in training; ``auto`` is bfloat16 on a GPU that computes in it, else float32.
    Losses and statistics are float32."""


class Scoring(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gaussian statistics and the score made of them (Eq. 17, 18, 22, 23)."""

    rank: Literal["auto"] | Annotated[int, Meta(ge=0, le=MAX_RANK)] = "auto"
    """Eigenpairs kept per position; ``auto`` takes ``max_rank``, or as many as the images can determine."""
    max_rank: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 24
    """The rank that ``auto`` takes; the inspection's time and memory grow with it."""
    ridge: Literal["auto"] | Positive = "auto"
    """Share of the mean variance added to every eigenvalue. Few images need much: ``auto`` takes 12 over their number,
    at least 0.03 and at most 0.3."""
    pooling_radius: Literal["auto"] | Annotated[int, Meta(ge=0, le=8)] = "auto"
    """Each position's statistics take in the square of cells of the patch grid within this radius, for parts that do
    not lie exactly alike; 0 takes in none. ``auto`` takes 1 where that accepts clearly less while it keeps as many of
    the held-out parts, else 0."""
    drop_worst: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Share of the training images that look least normal to statistics without their part, left out of statistics
    and threshold; 0 leaves none out. They are named in the log and in the package."""
    smoothing_sigma: NotNegative = 2.0
    """Standard deviation of the map's Gaussian smoothing, in cells of the patch grid; 0 for none."""


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FedDyMem; of ``[training]`` it uses epochs, momentum, weight_decay, noise_std, noise_scale and margin."""

    entries: PrototypeCount = 512
    """Entries of a site's own dynamic memory, which never leaves the site."""
    prototypes: PrototypeCount = 512
    """The most averages of its entries that a site sends."""
    global_prototypes: PrototypeCount = 1024
    """Entries of the fleet's memory, which the server makes of what the sites send, by k-means."""
    update_rate: Share = 0.5
    """Share of the way that an entry moves to the mean of the patches assigned to it, in each epoch."""
    learning_rate: Positive = 0.01
    """Learning rate of the memory generator."""
    temperature: Positive = 1.0
    """T of memory-reduce's weights exp(-d^2 / T), in units of the mean squared distance of an entry to its seed."""
    ridge: Positive = 0.1
    """Share of the mean variance added to every eigenvalue of the covariance before whitening."""
    max_patches: Count = 131_072
    """Patches of all images that a site learns from; about 80 MB per 131,072."""
    position_weight: NotNegative = 0.0
    """What the place of a patch counts for beside its embedding when the nearest prototype is sought: a whole side of
    the picture as much as so many standard deviations of every channel. Prototypes then carry their places and spreads.
    0: neither, as an aggregator of an earlier version expects. The default preset of ``feddymem`` takes 4."""
    measure_spreads: bool = False
    """Whether every site measures how much its patches differ from each of the fleet's prototypes, so that these carry
    the spread of all sites. It takes places, and a second round. False, as an aggregator of an earlier version expects;
    the default preset of ``feddymem`` does it."""
    min_group: Annotated[float, Meta(ge=1, le=10**9)] = 32.0
    """Privacy floor: what is sent is worth at least so many equally weighted patches ..."""
    min_images: Annotated[float, Meta(ge=1, le=10**9)] = 4.0
    """... of so many equally weighted images. What is not is merged into its neighbour."""


DEFAULT_COST_OF_MISS = 10.0
"""Of a missed defective part against a rejected good one, as shares of each: it costs far more, and comes far less
often."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the threshold is set from good images alone."""

    mode: ThresholdMode = "expected"
    """``expected``: this share of the good is rejected on average, and what can be promised is told beside it.
    ``promise``: no more than this share is rejected, with ``confidence``; 5% takes 59 parts, 1% takes 299. With fewer,
    the threshold is then the highest score of all, where one odd part can hide real defects."""
    false_reject_rate: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    """Share of the good that the line may reject, in the sense of ``mode``."""
    confidence: Annotated[float, Meta(gt=0, lt=1)] = 0.95
    """Probability with which the promised rate holds, see docs/methods.md."""
    unit: RejectUnit = "photograph"
    """What the line rejects, and so what the rate counts: each ``photograph`` by itself, as `inspect` does, or a
    ``part`` as soon as one of its photographs is rejected. Either way parts are what is independent."""
    folds: Annotated[int, Meta(ge=2, le=100)] = 10
    """Number of folds of the cross-fit: each fold is scored by the statistics of all the others. Fewer folds leave out
    more parts at a time, and find good parts less normal than the final statistics do."""


class Learning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of learning: the keys of ``edgeflame fit --config F``, with a section for each subject."""

    method: Annotated[str, BASIC] = "none"
    """How the backbone is adapted and what sites exchange: a name in ``METHODS``."""
    preset: Preset = "default"
    """The set of defaults that a file's settings replace, see ``edgeflame.methods``; without effect afterwards."""
    seed: Seed = 0
    """Seed of everything that learning draws: noise, batches, the discriminator's start."""
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


def resized_as_begun(learning: Learning, begun: Learning) -> Learning:
    """Settings for what was begun by ``begun``: where that does not say how images are resized, they go on by area.

    Earlier versions left the key out, and today's default is another.
    """
    if begun.input.resize is not msgspec.UNSET:
        return learning
    return msgspec.structs.replace(learning, input=msgspec.structs.replace(learning.input, resize=msgspec.UNSET))


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
        # Packages and runs of earlier versions have no such key, and go on with OpenCV's INTER_AREA.
        ANY_METHOD: {"input": {"resize": "halving"}},
        # As long as ten rounds of a federation.
        "solo": {"training": {"epochs": 10}},
        # An epoch moves the memory a step of k-means on.
        "feddymem": {"training": {"epochs": 5}, "memory": {"position_weight": 4.0, "measure_spreads": True}},
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
        has_default = isinstance(field.default, Learning)
        section = raw.get(field.name, {} if has_default else None)
        if field.type is Learning and isinstance(section, dict):
            filled[field.name] = _apply_preset(section, field.default if has_default else Learning())
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) and isinstance(section, dict):
            filled[field.name] = start_from_presets(section, field.type)
    return filled


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a key, the value of ``above`` counts."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge_settings(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _apply_preset(raw: dict[str, Any], default: Learning) -> dict[str, Any]:
    named = {"method": default.method, "preset": default.preset, **raw}
    # An unknown name is reported when this is decoded.
    by_method = PRESETS.get(str(named["preset"]), {})
    settings = merge_settings(by_method.get(ANY_METHOD, {}), by_method.get(str(named["method"]), {}))
    return merge_settings(settings, named)
