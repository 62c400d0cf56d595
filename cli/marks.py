"""``edgeflame marks``: look at what people said parts were, and take it to and from the MVTec layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import json_option
from cli.output import cell, echo, print_json
from cli.paths import PATH

if TYPE_CHECKING:
    from edgeflame.marks import MarkStore

_FOLDER = click.argument("folder", type=PATH, metavar="MARKS")


@click.group("marks", short_help="Marks: what people said that parts really were.")
def command() -> None:
    """What people said that parts really were, on the line's page or by `edgeflame line mark`.

    MARKS is a line's state folder, or the folder `marks` in it. `edgeflame learn` learns from it.
    """


def open_marks(folder: Path, *, must_exist: bool = True) -> MarkStore:
    """The marks of a line's state folder, or of a folder of marks.

    Raises:
        UsageError: there is none.
    """
    from edge.daemon import MARKS_FOLDER
    from edgeflame.errors import UsageError
    from edgeflame.marks import LINES_FILE, MarkStore

    within = folder / MARKS_FOLDER
    if not (folder / LINES_FILE).is_file() and within.is_dir():
        folder = within
    if must_exist and not (folder / LINES_FILE).is_file():
        raise UsageError(f"{folder}: no marks here ({LINES_FILE}); give a line's state folder, or its folder of marks")
    return MarkStore(folder)


@command.command("list")
@_FOLDER
@click.option("--was", type=click.Choice(["good", "bad"]), help="Only these.")
@click.option("--kind", metavar="NAME", help="Only this kind of defect.")
@click.option("--product", metavar="NAME", help="Only this product.")
@json_option
def list_marks(folder: Path, was: str | None, kind: str | None, product: str | None, as_json: bool) -> None:
    """List the marks, the oldest first."""
    from rich.console import Console
    from rich.table import Table

    marks = [
        mark
        for mark in open_marks(folder).marks()
        if was in (None, mark.was) and kind in (None, mark.kind) and product in (None, mark.product)
    ]
    if as_json:
        print_json(marks)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("marked", "was", "kind", "the line said", "product", "part", "by", "picture"):
        table.add_column(heading, overflow="fold")
    for mark in marks:
        judged = mark.judged
        said = judged.verdict
        if judged.score is not None and judged.threshold:
            said += f" {judged.score / judged.threshold:.2f}"
        table.add_row(
            cell(f"{mark.marked.astimezone():%Y-%m-%d %H:%M}"),
            cell(mark.was),
            cell(mark.kind or ""),
            cell(said),
            cell(mark.product),
            cell(judged.part_id),
            cell(mark.by),
            cell(mark.file),
        )
    if marks:
        Console(width=max(Console().width, 140)).print(table)
    bad = sum(mark.was == "bad" for mark in marks)
    echo(f"{len(marks)} marks: {len(marks) - bad} good, {bad} bad")


@command.command()
@_FOLDER
@click.argument("out", type=PATH, metavar="OUT")
def export(folder: Path, out: Path) -> None:
    """Write the marks as a data set in the MVTec layout: test/good, test/<kind>, ground_truth, groups.csv.

    OUT must be empty or not there. Marks without a kind go to test/bad; masks are of those that say where the defect
    is.
    """
    import csv
    import io

    from edgeflame.errors import UsageError
    from edgeflame.images import read_image, write_image
    from edgeflame.mark_shapes import paint
    from edgeflame.state import atomic_copy, atomic_write, storage_errors

    store = open_marks(folder)
    marks = store.marks()
    if not marks:
        raise UsageError(f"{store.folder}: there are no marks")
    with storage_errors(out, "write"):
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out}: there is something in it already; name a folder that is empty or not there")
        rows = [("path", "group")]
        for mark in marks:
            target = out / "test" / mark.label / f"{mark.name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_copy(store.picture(mark), target)
            rows.append((target.relative_to(out).as_posix(), mark.group))
            if mark.where:
                image = read_image(target)
                truth = out / "ground_truth" / mark.label / f"{mark.name}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                write_image(truth, paint(mark.where, height=image.shape[0], width=image.shape[1]))
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\n").writerows(rows)
        atomic_write(out / "groups.csv", stream.getvalue().encode())
    bad = sum(mark.was == "bad" for mark in marks)
    echo(f"{out}: {len(marks) - bad} good, {bad} bad")


@command.command("import")
@_FOLDER
@click.argument("data", type=PATH, metavar="DATA")
@click.option("--product", default="", metavar="NAME", help="Which product they show.")
@click.option("--by", default="", metavar="NAME", help="Who says so.")
def import_marks(folder: Path, data: Path, product: str, by: str) -> None:
    """Take pictures with labels into MARKS: a data set in the MVTec layout, or a folder of classes.

    Names of folders of defects become kinds, masks become outlines. Pictures that are there already keep the mark they
    have.
    """
    import re

    from edgeflame.dataset import open_dataset
    from edgeflame.errors import DataError
    from edgeflame.fitted_images import image_digest
    from edgeflame.images import read_mask, read_samples
    from edgeflame.mark_shapes import outlines
    from edgeflame.marks import kind_of_label

    dataset = open_dataset(data)
    records = (*dataset.train, *dataset.test)
    store = open_marks(folder, must_exist=False)
    known = {mark.digest for mark in store.marks()}
    added = there = 0
    unreadable: list[str] = []
    for record in records:
        try:
            image = read_samples(record.path)
            where = outlines(read_mask(record.mask)) if record.mask is not None else ()
        except DataError as exc:
            unreadable.append(str(exc))
            continue
        digest = image_digest(image).hex()
        if digest in known:
            there += 1
            continue
        known.add(digest)
        store.add(
            f"{re.sub(r'[^A-Za-z0-9_.]+', '_', record.path.stem)[-60:]}-{digest[:12]}",
            image,
            "good" if record.is_good else "bad",
            kind=None if record.is_good else kind_of_label(record.label),
            by=by,
            product=product,
            where=where,
            part=record.group if dataset.groups_known else "",
            whole_frame=True,
        )
        added += 1
    for reason in unreadable[:5]:
        echo(f"left out: {reason}", err=True)
    echo(f"{store.folder}: {added} added, {there} were there already, {len(unreadable)} could not be read")
