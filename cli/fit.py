"""``edgeflame fit``: one site's model from its good images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from cli.options import cost_of_a_miss, dataset_options, defects_options, prior_option, promise_options, scores_option
from cli.output import echo, influential_in_words, print_promises, print_threshold, progress_bar
from cli.paths import PATH
from edgeflame.config import load_config
from edgeflame.errors import MissingDependencyError, UsageError, require_extra
from edgeflame.images import MAX_INPUT_SIDE, Region
from edgeflame.log import EventLog
from edgeflame.methods import METHODS, PRESETS, SOLO_METHODS, Learning
from edgeflame.mqtt.topics import MAX_NAME_CHARS
from edgeflame.package import DEFAULT_REFERENCES, MAX_REFERENCES

if TYPE_CHECKING:
    from edgeflame.onnx_session import Device
    from edgeflame.package import Manifest
    from fitting.fit import FittedModel, Learner, Model
    from fitting.packaging import GraphFunction


log = EventLog("fit")


@click.command()
@click.option(
    "--data",
    required=True,
    type=PATH,
    help="Folder of good images, or a data set in the MVTec layout (its train/good is used).",
)
@click.option("--out", required=True, type=PATH, help="The package to write (.edgeflame).")
@click.option(
    "--method",
    help=f"{'; '.join(f'{name}: {METHODS[name].summary}' for name in SOLO_METHODS)}.  [default: {Learning().method}]",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="What settings start from: what measured best here, or what the FLAME paper prints.  [default: default]",
)
@click.option("--config", type=PATH, help="TOML file with the learning's settings.")
@click.option("--product", help="Name of the kind of part.  [default: the folder's]")
@click.option("--rank", metavar="N|auto", help=f"Eigenpairs kept per position.  [default: {Learning().scoring.rank}]")
@click.option("--size", type=click.IntRange(32, MAX_INPUT_SIDE), help="Side of the square model input, in pixels.")
@click.option(
    "--bits", type=click.IntRange(8, 16), help="Bits of the samples in files of 16 bits: 10, 12.  [default: 16]"
)
@click.option("--roi", metavar="X,Y,WIDTH,HEIGHT", help="Region of the camera image to look at, in its pixels.")
@dataset_options
@click.option("--seed", type=int, help="Of everything random.")
@promise_options("the configuration's")
@defects_options
@click.option(
    "--drop-worst",
    type=click.FloatRange(0, 0.5),
    metavar="SHARE",
    help="Leave out this share of the images, those that look least normal: 0.02.  [default: none]",
)
@click.option(
    "--report",
    "report_dir",
    type=PATH,
    metavar="DIR",
    help="Write index.html there: the images that look least normal, as pictures.",
)
@scores_option
@click.option(
    "--reference-images",
    type=click.IntRange(0, MAX_REFERENCES),
    default=DEFAULT_REFERENCES,
    show_default=True,
    help="Good images put into the package, against which what runs it is checked; 0 keeps all images here.",
)
@click.option(
    "--backbone-from",
    type=PATH,
    metavar="FILE",
    help="Take the backbone of this package, whatever its product, or of a file of `export --backbone`, as it is: "
    "needs no PyTorch, and starts sooner.  [default: PyTorch makes it]",
)
@prior_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda; with PyTorch also cuda:1, ...")
def command(
    data: Path,
    out: Path,
    method: str | None,
    preset: str | None,
    config: Path | None,
    product: str | None,
    groups: Path | None,
    defects: Path | None,
    cost_of_miss: float | None,
    on_unreadable: Literal["skip", "refuse"],
    reference_images: int,
    report_dir: Path | None,
    backbone_from: Path | None,
    prior_file: Path | None,
    scores_file: Path | None,
    device: str,
    **settings: Any,
) -> None:
    """Fit a model to the good images of one product, with statistics and a threshold, and write it as a package.

    No defective image is needed. The package can inspect at once.
    """
    miss = cost_of_a_miss(cost_of_miss, defects)
    if prior_file is not None and backbone_from is not None:
        raise UsageError("--prior takes the backbone of its package: leave --backbone-from out")
    backbone_from = backbone_from or prior_file
    read_learning = partial(_learning, config, method, preset, settings)
    # What is wrong with the settings is said before anything is read.
    open_means = (
        partial(_torch_means, read_learning(), device)
        if backbone_from is None
        else partial(_given_means, backbone_from, device, read_learning, is_prior=prior_file is not None)
    )
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder to write {out.name} into")

    from edgeflame.dataset import open_dataset, open_defects
    from edgeflame.package import check_product

    product = check_product(product_of(data) if product is None else product)
    # Before the heavy imports: a wrong path should not take seconds to be found.
    dataset = open_dataset(data, groups)
    labelled = () if defects is None else open_defects(defects).test

    if report_dir is not None:
        from cli.pages.page import prepare_report_folder

        prepare_report_folder(report_dir)

    means = open_means()

    from fitting.fit import fit
    from fitting.packaging import save_package
    from fitting.prior import read_prior

    fitted = fit(
        dataset,
        means.learning,
        means.learner,
        prior=None if prior_file is None else read_prior(prior_file),
        on_unreadable=on_unreadable,
        num_references=reference_images,
        defects=labelled,
        cost_of_miss=miss,
        stage=progress_bar,
    )
    manifest = save_package(
        out,
        make_graph=means.graph_of(fitted.model),
        embedder=fitted.model.embedder,
        site_statistics=fitted.site,
        learning=means.learning,
        weights=fitted.model.weights,
        provenance={**fitted.provenance(), **means.provenance},
        product=product,
        site=None,
        references=fitted.references,
    )
    _print_summary(out, manifest, fitted)
    if not dataset.groups_known:
        _write_groups(out.with_suffix(".groups.csv"), fitted)
    if scores_file is not None:
        from fitting.scores import scores_of, write_scores

        write_scores(scores_file, scores_of(fitted.site, means.learning.calibration))
    if report_dir is not None:
        from cli.pages.fit import write_fit

        page = write_fit(report_dir, fitted=fitted, manifest=manifest, package_file=out, data=data)
        echo(f"report: {page}")


@dataclass(frozen=True, kw_only=True)
class _Means:
    """What a fit is made with, by PyTorch or by a backbone that is given.

    Attributes:
        learning: the settings.
        learner: by them.
        graph_of: gives, of the model that was fitted, what makes its scoring graph; reference images are scored by it
            afterwards.
        provenance: what the package says of it.
    """

    learning: Learning
    learner: Learner[Any]
    graph_of: Callable[[Any], GraphFunction]
    provenance: dict[str, Any] = field(default_factory=dict)


def _given_means(
    path: Path, device: str, read_learning: Callable[[dict[str, Any]], Learning], *, is_prior: bool
) -> _Means:
    """The backbone of a file, in ONNX Runtime; with a prior, images are resized as its were."""
    devices: dict[str, Device] = {"auto": "auto", "cpu": "cpu", "cuda": "cuda"}
    if device not in devices:
        raise UsageError(f"--device {device}: with a given backbone it is one of {', '.join(devices)}")
    with require_extra("cpu", "putting a package together needs onnx"):
        from export.graph import complete_graph, cut_embedding_graph
    from edgeflame.package import read_package
    from fitting.backbone import open_backbone
    from fitting.fit import FrozenLearner, GaussianModel

    backbone, embedder = open_backbone(path, cut_embedding_graph, device=devices[device])
    settings = backbone.settings()
    if is_prior:
        settings["input"]["resize"] = read_package(path).manifest.learning.input.resized_by
    learning = read_learning(settings)
    backbone.require_fits(learning)
    return _Means(
        learning=learning,
        learner=FrozenLearner(GaussianModel(embedder, backbone.weights, learning)),
        graph_of=lambda _: partial(complete_graph, backbone.graph),
        provenance={"backbone": backbone.origin},
    )


def _torch_means(learning: Learning, device: str) -> _Means:
    """PyTorch.

    Raises:
        MissingDependencyError: it is not installed; the message says what does without.
    """
    try:
        import onnxscript  # noqa: F401 - PyTorch's export asks for it at the very end
        import timm  # noqa: F401

        from export.network import scoring_graph
        from trainer.device import keep_freed_memory, pick_device
        from trainer.exchange import open_learner
    except ImportError as exc:
        install = f"({exc}): pip install 'edgeflame[train]'"
        if METHODS[learning.method].learns:
            raise MissingDependencyError(f"method {learning.method} needs PyTorch {install}") from exc
        raise MissingDependencyError(
            "there is no backbone: either give one, by --backbone-from FILE (any package, or what `edgeflame export "
            f"--backbone` wrote where PyTorch is), or have PyTorch make one {install}"
        ) from exc
    keep_freed_memory()
    return _Means(
        learning=learning,
        learner=open_learner(learning, pick_device(device)),
        graph_of=lambda model: partial(scoring_graph, model.network.cpu(), preprocessing=learning.input),
    )


def _write_groups(path: Path, fitted: FittedModel[Model]) -> None:
    """Say which photographs were taken for one part, in a file that a person can correct."""
    from edgeflame.dataset import write_groups

    images = fitted.site.images
    several = len(images) - len(set(images.groups))
    told = f"{len(images)} photographs taken for {len(set(images.groups))} parts by their looks"
    if not several:
        told = "each photograph taken for a part of its own"
    if path.exists():
        echo(f"{told}; {path} is there already and was left as it is")
        return
    write_groups(path, images.records)
    echo(f"{told}: {path}; where that is wrong, correct it and fit again with --groups {path}")


def product_of(data: Path) -> str:
    """A product's name from its folder of images; of a data set from the data set's, which has them in train/good."""
    folder = data.resolve()
    while folder.name in ("good", "train") and folder.parent != folder:
        folder = folder.parent
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._")[:MAX_NAME_CHARS]
    return name or "product"


def _learning(
    config: Path | None,
    method: str | None,
    preset: str | None,
    settings: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> Learning:
    """Read the configuration file, put the options that were given over it, and both over ``defaults``."""
    rank, size = settings["rank"], settings["size"]
    roi = None if settings["roi"] is None else msgspec.structs.asdict(Region.parse(settings["roi"]))
    overrides = {
        "method": method,
        "preset": preset,
        "seed": settings["seed"],
        "scoring": {"rank": None if rank is None else _rank(rank), "drop_worst": settings["drop_worst"]},
        "input": {"height": size, "width": size, "roi": roi, "bits": settings["bits"]},
        "calibration": {name: settings[name] for name in ("mode", "false_reject_rate", "confidence", "unit")},
    }
    return load_config(config, Learning, overrides, defaults)


def _rank(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as exc:
        raise UsageError(f"--rank takes a number or auto, not {text!r}") from exc


NUM_NAMED = 5
"""How many of the least normal images the command names; the package names more, and the page shows them."""


def _print_summary(out: Path, manifest: Manifest, fitted: FittedModel[Model]) -> None:
    unreadable = len(fitted.report.unreadable)
    skipped = f", {unreadable} unreadable skipped" if unreadable else ""
    echo(f"{out}: {manifest.learning.method}, {manifest.num_images} images{skipped}, {manifest.size_in_words}")
    if fitted.report.unfit:
        unfit = [f"{name} ({', '.join(reasons)})" for name, reasons in list(fitted.report.unfit.items())[:NUM_NAMED]]
        echo(f"{len(fitted.report.unfit)} that a line would not judge, take them out: {', '.join(unfit)}")
    if "prior" in fitted.site.details:
        echo(fitted.site.details["prior"]["in_words"])
    print_threshold(manifest.threshold)
    print_promises(manifest.threshold, fitted.site.held_out_scores, fitted.defective_scores)
    influential = influential_in_words(fitted.site.influential, fitted.site.images.records)
    if influential is not None:
        echo(influential)
    named = [
        f"{one.record.name} ({one.score / manifest.threshold.value:.2f} x threshold{', left out' * one.left_out})"
        for one in fitted.site.suspects[:NUM_NAMED]
    ]
    echo(f"least normal, look at them: {', '.join(named)}")
