"""``edgeflame calibrate``: the threshold set again, from good images the statistics have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.options import (
    cost_of_a_miss,
    dataset_options,
    defects_options,
    device_option,
    json_option,
    model_option,
    promise_options,
)
from cli.output import (
    echo,
    influential_in_words,
    print_json,
    print_promises,
    print_threshold,
    progress_bar,
    share_above,
)
from cli.paths import PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from edgeflame.dataset import Dataset, ImageRecord, LoadReport
    from edgeflame.drift_reference import DriftReference
    from edgeflame.methods import Calibration
    from edgeflame.package import Package
    from edgeflame.threshold import Threshold

    F32 = npt.NDArray[np.float32]


@click.command()
@model_option
@click.option(
    "--data",
    required=True,
    type=PATH,
    metavar="DIR",
    help="Good images that the model was NOT fitted on: a plain folder, or a data set's test/good.",
)
@dataset_options
@promise_options("as fitted")
@defects_options
@click.option("--max-f1", is_flag=True, help="Take the threshold of the highest F1 on test/good and test/<defect>.")
@click.option("--out", type=PATH, metavar="FILE", help="Where to write the package with the new threshold.")
@click.option("--in-place", is_flag=True, help="Write it over the package itself.")
@click.option(
    "--accept-worse", is_flag=True, help="Write over the package although the new threshold promises less than its own."
)
@click.option(
    "--allow-fitted",
    is_flag=True,
    help="Use images that the model was fitted on as well: their scores are too low, and so is the threshold.",
)
@device_option
@json_option
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    false_reject_rate: float | None,
    confidence: float | None,
    mode: str | None,
    unit: str | None,
    defects: Path | None,
    cost_of_miss: float | None,
    max_f1: bool,
    out: Path | None,
    in_place: bool,
    accept_worse: bool,
    allow_fitted: bool,
    on_unreadable: Literal["skip", "refuse"],
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Find a package's threshold by good images of the line it will inspect; --out or --in-place write it.

    No defective image is needed. The promise rests on the number of parts: 299 for 1% with 95% confidence. Where the
    data set has defective images as well, it is shown how many of them each promise catches.
    """
    import msgspec
    import numpy as np

    from edge.runtimes.interface import check_runtime_fits
    from edge.runtimes.load import open_runtime
    from edgeflame.dataset import LoadReport, open_dataset
    from edgeflame.package import read_package, rewrite_package

    target = _target(model, out, in_place=in_place)
    miss = cost_of_a_miss(cost_of_miss, defects)
    replace = msgspec.structs.replace
    package = read_package(model)
    manifest = package.manifest
    calibration = updated_calibration(
        manifest.learning.calibration,
        mode=mode,
        false_reject_rate=false_reject_rate,
        confidence=confidence,
        unit=unit,
    )
    dataset = open_dataset(data, groups)
    records = _records(dataset, data, defects, max_f1=max_f1)
    runtime = open_runtime(package.model_onnx, device=device)
    check_runtime_fits(runtime, manifest)

    from fitting.evaluation import score_records
    from fitting.expected_cost import set_least_cost
    from fitting.suspects import influential_parts
    from fitting.threshold import set_f1_threshold, set_threshold

    report = LoadReport(made_of=package.manifest.frames)
    with progress_bar("Scoring images") as progress:
        kept, scores, maps = score_records(
            lambda images: runtime.score(images)[:2],
            records,
            manifest.learning.input,
            on_unreadable=on_unreadable,
            report=report,
            progress=progress,
        )
    _refuse_fitted(package, report, allowed=allow_fitted)
    is_good = np.array([record.is_good for record in kept])
    good, defective = scores[is_good], scores[~is_good]
    parts = [record.group for record in kept if record.is_good]
    known = dataset.groups_known
    threshold = (
        set_f1_threshold(good, parts, defective, calibration, groups_known=known)
        if max_f1
        else set_threshold(good, parts, calibration, groups_known=known)
    )
    if defects is not None and not max_f1:
        kinds = [record.group for record in kept if not record.is_good]
        threshold = set_least_cost(threshold, good, parts, defective, kinds, cost_of_miss=miss)
    worse = None if target is None else _worse_promise(target, threshold, calibration)
    refused = worse is not None and not accept_worse
    if target is not None and not refused:
        rewrite_package(
            target,
            package,
            manifest=replace(
                manifest,
                threshold=threshold,
                learning=replace(manifest.learning, calibration=calibration),
                provenance={
                    **manifest.provenance,
                    "calibrated": {
                        "previous_threshold": manifest.threshold.value,
                        "num_images": len(good),
                        "num_defective": len(defective) if max_f1 or defects is not None else 0,
                    },
                },
            ),
            condition=_condition(
                package, [record for record, fine in zip(kept, is_good, strict=True) if fine], good, maps[is_good]
            ),
        )
    written = None if refused else target
    if as_json:
        print_json(
            {
                "package": None if written is None else str(written),
                "previous_threshold": manifest.threshold.value,
                "previous": manifest.threshold,
                "threshold": threshold,
            }
        )
    else:
        _print_both(model, manifest.threshold, threshold, good, defective)
        print_promises(threshold, good, defective)
        moving = () if max_f1 else influential_parts(good, parts, calibration)
        words = influential_in_words(moving, [record for record in kept if record.is_good])
        if words is not None:
            echo(words)
    _tell_what_was_written(written, package, worse=worse, refused=refused)


def _target(model: Path, out: Path | None, *, in_place: bool) -> Path | None:
    """Where to write the package; None for nowhere.

    Raises:
        UsageError: two places, or one in no folder.
    """
    from edgeflame.errors import UsageError

    if in_place and out is not None:
        raise UsageError("--out and --in-place exclude each other: where is the package to be written?")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder to write {out.name} into")
    return model if in_place else out


def _refuse_fitted(package: Package, report: LoadReport, *, allowed: bool) -> None:
    """Refuse images that the model was fitted on: their scores are lower than those of parts that it has never seen.

    Raises:
        DataError: there are such images, and they were not asked for.
    """
    from edgeflame.errors import DataError
    from edgeflame.fitted_images import known_among

    if not package.fitted:
        echo("the package does not say which images it was fitted on: give none of them", err=True)
    seen = known_among(report.digests, package.fitted)
    if seen is None:
        return
    seen += " are among those the model was fitted on: their scores, and so the threshold, are too low"
    if not allowed:
        raise DataError(f"{seen}; give others, or --allow-fitted")
    echo(seen, err=True)


WORSE_BY = 1.1
"""A promise is worse if its rate is higher than before by more than this factor: less is chance."""


def _worse_promise(target: Path, after: Threshold, calibration: Calibration) -> str | None:
    """What the new threshold promises less than that of the package it would replace, in words; None if nothing.

    It is not worse if another rate, confidence or unit was asked for, and there are no fewer parts.
    """
    from edgeflame.errors import PackageError
    from edgeflame.package import read_package

    if not target.exists():
        return None
    try:
        manifest = read_package(target).manifest
    except PackageError:
        return None
    before = manifest.threshold
    by_wish = calibration != manifest.learning.calibration and after.num_groups >= before.num_groups
    if after.false_reject_rate <= WORSE_BY * before.false_reject_rate or by_wish:
        return None
    return (
        f"{target}: the new threshold promises at most {after.false_reject_rate:.2%} from {after.basis()}, and the "
        f"package's own {before.false_reject_rate:.2%} from {before.basis()}"
    )


def _print_both(model: Path, before: Threshold, after: Threshold, good: F32, defective: F32) -> None:
    """Print the threshold as it was and as it would be, and what each does to these images."""
    echo(f"{model}, before")
    print_threshold(before)
    echo("after")
    print_threshold(after)
    for what, scores in (("good rejected", good), ("defective caught", defective)):
        if len(scores):
            was, now = (share_above(scores, one.value) for one in (before, after))
            echo(f"{what} of these images: {was} before, {now} after")


def _tell_what_was_written(target: Path | None, package: Package, *, worse: str | None, refused: bool) -> None:
    """Say where the package is now, and what is worse about it.

    Raises:
        NegativeAnswerError: it was not written, for its promise is worse.
    """
    from edgeflame.errors import NegativeAnswerError

    if refused:
        raise NegativeAnswerError(
            f"{worse}: nothing was written; another --out FILE keeps both, --accept-worse writes it"
        )
    if worse is not None:
        echo(worse, err=True)
    if target is None:
        echo("nothing was written; --out FILE or --in-place writes it", err=True)
        return
    echo(f"{target}: written", err=True)
    if package.signature_json is not None:
        echo(f"{target}: not signed any more, for its threshold changed; `edgeflame model sign` signs it", err=True)


def updated_calibration(calibration: Calibration, **options: Any) -> Calibration:
    """Put the options that were given over a configuration."""
    import msgspec

    from edgeflame.config import parse_config
    from edgeflame.methods import Calibration

    before = msgspec.structs.asdict(calibration)
    overrides = {name: value for name, value in options.items() if value is not None}
    return parse_config(b"", Calibration, "calibration", {**before, **overrides})


def _condition(package: Package, records: Sequence[ImageRecord], scores: F32, maps: F32) -> DriftReference:
    """Make the drift reference of these images, since the threshold is set from them."""
    from edgeflame.dataset import load_images
    from edgeflame.drift_reference import MAX_REFERENCE_IMAGES, AlignmentTemplate, image_streams, make_drift_reference
    from edgeflame.package import evenly_spaced

    preprocessing = package.manifest.learning.input
    references = [reference.image(preprocessing) for reference in package.references]
    template = AlignmentTemplate(references) if references else None
    chosen = [records[index] for index in evenly_spaced(len(records), MAX_REFERENCE_IMAGES)]
    return make_drift_reference(
        {"score": scores, "embedding": maps.mean(axis=(1, 2))},
        [image_streams(image, template) for _, image in load_images(chosen, preprocessing)],
        num_parts=len({record.group for record in records}),
        num_images=len(records),
    )


def _records(dataset: Dataset, data: Path, defects: Path | None, *, max_f1: bool) -> tuple[ImageRecord, ...]:
    """Choose the images to score: not the training part of a data set, which the statistics were fitted on.

    Labelled defects that were given take the place of the data set's.
    """
    from edgeflame.dataset import open_defects
    from edgeflame.errors import DataError

    records = dataset.test or dataset.train
    if not any(record.is_good for record in records):
        raise DataError(f"{data}: no good images to calibrate with (a data set needs test/good)")
    if defects is not None:
        records = (*(record for record in records if record.is_good), *open_defects(defects).test)
    if max_f1 and all(record.is_good for record in records):
        raise DataError(f"{data}: no defective images: the highest F1 needs labelled defects (test/<defect>)")
    return records
