"""``edgeflame calibrate``: the threshold set again, from good images the statistics have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The package (.edgeflame).")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Good images that the model was NOT fitted on: a plain folder, or a data set's test/good.",
)
@click.option(
    "--groups",
    type=click.Path(path_type=Path),
    help="CSV that says which images show the same part.  [default: groups.csv or tiles.csv in the folder]",
)
@click.option("--false-reject-rate", type=float, help="Share of good parts that may be rejected.  [default: as fitted]")
@click.option("--confidence", type=float, help="With which this is promised.  [default: as fitted]")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the package.  [default: in place]")
@click.option(
    "--on-unreadable",
    type=click.Choice(["skip", "refuse"]),
    default="skip",
    show_default=True,
    help="Skip and count images that cannot be read, or stop at the first.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    false_reject_rate: float | None,
    confidence: float | None,
    out: Path | None,
    on_unreadable: Literal["skip", "refuse"],
    device: Literal["auto", "cpu", "cuda"],
) -> None:
    """Set a package's threshold from good images of the line it will inspect.

    No defective image is needed. The promise rests on the number of parts: 299 for 1% with 95% confidence.
    """
    import msgspec

    from edge.runtimes import check_runtime_fits, open_runtime
    from edgeflame.console import progress_bar
    from edgeflame.dataset import open_dataset
    from edgeflame.errors import DataError
    from edgeflame.package import read_package, write_package
    from trainer.evaluation import score_records
    from trainer.threshold import set_threshold

    replace = msgspec.structs.replace
    package = read_package(model)
    manifest = package.manifest
    calibration = manifest.learning.calibration
    if false_reject_rate is not None:
        calibration = replace(calibration, false_reject_rate=false_reject_rate)
    if confidence is not None:
        calibration = replace(calibration, confidence=confidence)
    dataset = open_dataset(data, groups)
    # In a data set the training part is what the statistics were fitted on.
    records = tuple(record for record in dataset.test if record.is_good) if dataset.test else dataset.train
    if not records:
        msg = f"{data}: no good images to calibrate with (a data set needs test/good)"
        raise DataError(msg)
    runtime = open_runtime(package.model_onnx, device=device)
    check_runtime_fits(runtime, manifest)
    with progress_bar("Scoring good images") as progress:
        kept, scores, _ = score_records(
            runtime.score, records, manifest.learning.input, on_unreadable=on_unreadable, progress=progress
        )
    threshold = set_threshold(scores, [record.group for record in kept], calibration, groups_known=dataset.groups_known)
    target = out or model
    updated = replace(
        manifest,
        threshold=threshold,
        learning=replace(manifest.learning, calibration=calibration),
        provenance={
            **manifest.provenance,
            "calibrated": {"previous_threshold": manifest.threshold.value, "num_images": len(kept)},
        },
    )
    write_package(
        target,
        manifest=updated,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=package.references,
    )
    parts = "parts" if threshold.groups_known else "images, each taken for a part of its own"
    click.echo(
        f"{target}: threshold {threshold.value:.4g} (was {manifest.threshold.value:.4g}): at most "
        f"{threshold.false_reject_rate:.2%} of good parts rejected, with {threshold.confidence:.0%} confidence, "
        f"from {threshold.num_groups} {parts}"
    )
