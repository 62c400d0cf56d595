"""``edgeflame calibrate``: the threshold set again, from good images the statistics have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.options import (
    dataset_options,
    device_option,
    json_option,
    model_option,
    promise_options,
)
from cli.output import echo, print_json, print_promises, print_threshold, progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from edgeflame.dataset import Dataset, ImageRecord
    from edgeflame.drift_reference import DriftReference
    from edgeflame.methods import Calibration
    from edgeflame.package import Package

    F32 = npt.NDArray[np.float32]


@click.command()
@model_option
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Good images that the model was NOT fitted on: a plain folder, or a data set's test/good.",
)
@dataset_options
@promise_options("as fitted")
@click.option("--max-f1", is_flag=True, help="Take the threshold of the highest F1 on test/good and test/<defect>.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to write the package.  [default: in place]"
)
@device_option
@json_option
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    false_reject_rate: float | None,
    confidence: float | None,
    unit: str | None,
    max_f1: bool,
    out: Path | None,
    on_unreadable: Literal["skip", "refuse"],
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Set a package's threshold from good images of the line it will inspect.

    No defective image is needed. The promise rests on the number of parts: 299 for 1% with 95% confidence. Where the
    data set has defective images as well, it is shown how many of them each promise catches.
    """
    import msgspec
    import numpy as np

    from edge.runtimes.interface import check_runtime_fits
    from edge.runtimes.load import open_runtime
    from edgeflame.dataset import open_dataset
    from edgeflame.errors import UsageError
    from edgeflame.package import read_package, write_package

    target = out or model
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder to write {target.name} into")
    replace = msgspec.structs.replace
    package = read_package(model)
    manifest = package.manifest
    calibration = updated_calibration(
        manifest.learning.calibration, false_reject_rate=false_reject_rate, confidence=confidence, unit=unit
    )
    dataset = open_dataset(data, groups)
    records = _records(dataset, data, max_f1=max_f1)
    runtime = open_runtime(package.model_onnx, device=device)
    check_runtime_fits(runtime, manifest)

    from fitting.evaluation import score_records
    from fitting.threshold import set_f1_threshold, set_threshold

    with progress_bar("Scoring images") as progress:
        kept, scores, maps = score_records(
            runtime.score, records, manifest.learning.input, on_unreadable=on_unreadable, progress=progress
        )
    is_good = np.array([record.is_good for record in kept])
    good, defective = scores[is_good], scores[~is_good]
    parts = [record.group for record in kept if record.is_good]
    known = dataset.groups_known
    threshold = (
        set_f1_threshold(good, parts, defective, calibration, groups_known=known)
        if max_f1
        else set_threshold(good, parts, calibration, groups_known=known)
    )
    updated = replace(
        manifest,
        threshold=threshold,
        learning=replace(manifest.learning, calibration=calibration),
        provenance={
            **manifest.provenance,
            "calibrated": {
                "previous_threshold": manifest.threshold.value,
                "num_images": len(good),
                "num_defective": len(defective) if max_f1 else 0,
            },
        },
    )
    write_package(
        target,
        manifest=updated,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=package.references,
        condition=_condition(
            package, [record for record, fine in zip(kept, is_good, strict=True) if fine], good, maps[is_good]
        ),
    )
    if package.signature_json is not None:
        echo(f"{target}: not signed any more, for its threshold changed; `edgeflame model sign` signs it", err=True)
    if as_json:
        print_json({"package": str(target), "previous_threshold": manifest.threshold.value, "threshold": threshold})
        return
    echo(f"{target}: threshold was {manifest.threshold.value:.4g}")
    print_threshold(threshold)
    print_promises(threshold, good, defective)


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


def _records(dataset: Dataset, data: Path, *, max_f1: bool) -> tuple[ImageRecord, ...]:
    """Choose the images to score: not the training part of a data set, which the statistics were fitted on."""
    from edgeflame.errors import DataError

    records = dataset.test or dataset.train
    if not any(record.is_good for record in records):
        raise DataError(f"{data}: no good images to calibrate with (a data set needs test/good)")
    if max_f1 and all(record.is_good for record in records):
        raise DataError(f"{data}: no defective images: the highest F1 needs labelled defects (test/<defect>)")
    return records
