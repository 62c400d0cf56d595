"""``edgeflame learn``: a candidate package from marks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from cli.options import cost_of_a_miss, dataset_options, json_option, model_option, prior_option, scores_option
from cli.output import echo, print_json, print_threshold, progress_bar
from cli.paths import PATH


@click.command()
@model_option
@click.option(
    "--data",
    required=True,
    type=PATH,
    metavar="DIR",
    help="Good photographs to learn from, as for `fit`: those that the package was fitted on, or newer ones.",
)
@dataset_options
@click.option(
    "--marks",
    required=True,
    type=PATH,
    metavar="DIR",
    help="The marks: a line's state folder, or its folder of marks.",
)
@click.option("--out", required=True, type=PATH, metavar="FILE", help="Where to write the candidate.")
@click.option(
    "--cost-of-miss",
    type=float,
    metavar="X",
    help="What a missed bad part costs, in rejected good ones.  [default: 10]",
)
@prior_option
@scores_option
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="Use so many CPU cores at most.  [default: all]"
)
@json_option
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    marks: Path,
    out: Path,
    cost_of_miss: float | None,
    prior_file: Path | None,
    scores_file: Path | None,
    threads: int | None,
    on_unreadable: Literal["skip", "refuse"],
    as_json: bool,
) -> None:
    """Learn from what people marked as good and bad, and write a candidate package beside the present one.

    Good marks enter statistics and threshold. Bad ones move the threshold, and train a small head if held-out marks
    show that it helps and that kinds of defects that were never marked are not caught worse. Nothing is replaced:
    publish the candidate, or run it, when the comparison convinces you. Needs no PyTorch.
    """
    if threads is not None and hasattr(os, "sched_setaffinity"):
        # Before any library starts its threads.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from functools import partial

    from cli.marks import open_marks
    from edgeflame.dataset import open_dataset
    from edgeflame.errors import UsageError, require_extra
    from edgeflame.package import DEFAULT_REFERENCES, read_package

    miss = cost_of_a_miss(cost_of_miss, marks)
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder to write {out.name} into")
    if out.exists() and out.samefile(model):
        raise UsageError(f"{out}: the present package is not replaced; name another file for the candidate")
    store = open_marks(marks)
    dataset = open_dataset(data, groups)
    package = read_package(model)
    with require_extra("cpu", "putting a package together needs onnx"):
        from export.graph import complete_graph, cut_embedding_graph
    from fitting.backbone import open_backbone
    from fitting.learn import learn
    from fitting.packaging import choose_references, save_package
    from fitting.prior import read_prior

    manifest = package.manifest
    backbone, embedder = open_backbone(model, cut_embedding_graph, device="cpu")
    learnt = learn(
        package,
        embedder,
        dataset,
        store,
        cost_of_miss=miss,
        prior=None if prior_file is None else read_prior(prior_file),
        on_unreadable=on_unreadable,
        stage=progress_bar,
    )
    provenance = {name: value for name, value in manifest.provenance.items() if name != "calibrated"}
    count = len(package.references) if package.references else DEFAULT_REFERENCES * bool(manifest.references)
    written = save_package(
        out,
        embedder=embedder,
        site_statistics=learnt.site,
        learning=manifest.learning,
        weights=manifest.weights,
        provenance={**provenance, "statistics": learnt.site.details, "learnt_from_marks": learnt.details},
        make_graph=partial(complete_graph, backbone.graph),
        product=manifest.product,
        site=manifest.site,
        references=choose_references(learnt.site.images, count),
    )
    if scores_file is not None:
        from fitting.scores import scores_of, write_scores

        write_scores(scores_file, scores_of(learnt.site, manifest.learning.calibration))
    if as_json:
        print_json({"package": str(out), "threshold": written.threshold, **learnt.details})
        return
    for reason, number in learnt.left_out.items():
        echo(f"left out: {number} {reason}", err=True)
    print_threshold(written.threshold)
    head = learnt.details["head"]
    if learnt.site.head is None:
        echo(f"no head: {head.get('no_head', 'no bad part is marked')}")
    else:
        before, after = head["image_AUROC_before"], head["image_AUROC_after"]
        echo(
            f"head of weight {head['weight']:g}: held-out marks told from good parts at {before} before, {after} after"
        )
    if learnt.details["look_at"]:
        echo(f"marks that others contradict, look at them: {', '.join(learnt.details['look_at'])}")
    echo(f"{out}: {learnt.comparison}")
