"""``edgeflame demo-data``: write generated furniture boards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.output import echo
from cli.paths import PATH

if TYPE_CHECKING:
    from boards.dataset import DatasetSpec


# As boards.textures.TEXTURES, written out because importing that package loads OpenCV; a test keeps them equal.
_TEXTURES = (
    "warm_white_grid",
    "straight_cloud_pattern",
    "moon_shadow_white_oak",
    "warm_wood",
    "green_grey_wood",
)


@click.command("demo-data")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="New or empty folder to write to.")
@click.option("--texture", type=click.Choice(_TEXTURES), show_default="warm_wood", help="Laminate of the boards.")
@click.option("--all-textures", is_flag=True, help="A data set of each laminate, in DIR/<texture>.")
@click.option(
    "--parts",
    "num_parts",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Good boards to train on; as many defective and half as many good ones to test on.",
)
@click.option(
    "--photos",
    "num_photos",
    type=click.IntRange(1, 100),
    default=2,
    show_default=True,
    help="Photographs of each board.",
)
@click.option(
    "--size",
    "image_size",
    type=click.IntRange(64, 2048),
    default=256,
    show_default=True,
    help="Side of the photographs in pixels.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which boards.")
@click.option(
    "--sites",
    "num_sites",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="More than one: DIR/site-1 and so on, each with its own camera and boards.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    out: Path,
    texture: str | None,
    all_textures: bool,
    num_parts: int,
    num_photos: int,
    image_size: int,
    seed: int,
    num_sites: int,
    as_json: bool,
) -> None:
    """Write generated furniture boards in the MVTec layout.

    Photographs of good boards to train on, of other good and of defective boards to test on, with a mask for
    each defect. The same options give the same files.
    """
    from boards.camera import Camera
    from boards.dataset import DatasetSpec, write_dataset
    from boards.surface import derive_seed
    from boards.textures import TEXTURES
    from cli.output import print_json, progress_bar
    from edgeflame.errors import UsageError

    if all_textures and texture:
        raise UsageError("--texture and --all-textures contradict each other; give one of them")
    textures = TEXTURES if all_textures else (texture or "warm_wood",)
    num_good, num_defective = (num_parts + 1) // 2, num_parts
    per_dataset = (num_parts + num_good + num_defective) * num_photos
    total = per_dataset * num_sites * len(textures)
    written: list[tuple[Path, DatasetSpec, bool]] = []
    with progress_bar("Photographing boards") as report:
        for site in range(1, num_sites + 1):
            camera = Camera.for_site(site, seed)
            for name in textures:
                folder = out / f"site-{site}" if num_sites > 1 else out
                before = len(written) * per_dataset

                def advance(done: int, _: int, before: int = before, note: str = name) -> None:
                    report(before + done, total, note)

                spec = DatasetSpec(
                    texture=name,
                    num_train_parts=num_parts,
                    num_test_good_parts=num_good,
                    num_test_defective_parts=num_defective,
                    num_photos=num_photos,
                    image_size=image_size,
                    seed=derive_seed(seed, "site", site),
                    camera=camera,
                )
                target = folder / name if all_textures else folder
                written.append((target, spec, write_dataset(target, spec, progress=advance)))
    if as_json:
        print_json({"datasets": [_as_json(*one) for one in written]})
        return
    for one in written:
        _echo(*one)


def _as_json(out: Path, spec: DatasetSpec, is_new: bool) -> dict[str, object]:
    return {
        "out": str(out),
        "texture": spec.texture,
        "num_parts": spec.num_parts,
        "num_train_images": spec.num_train_parts * spec.num_photos,
        "num_test_good_images": spec.num_test_good_parts * spec.num_photos,
        "num_test_defective_images": spec.num_test_defective_parts * spec.num_photos,
        "image_size": spec.image_size,
        "reused": not is_new,
    }


def _echo(out: Path, spec: DatasetSpec, is_new: bool) -> None:
    photos = spec.num_photos
    echo(
        f"{out}: {spec.texture}, {spec.num_parts} boards, {spec.num_parts * photos} photographs"
        f" {'written' if is_new else 'already there'}"
        f" (train {spec.num_train_parts * photos} good; test {spec.num_test_good_parts * photos} good,"
        f" {spec.num_test_defective_parts * photos} defective)"
    )
