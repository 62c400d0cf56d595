"""``edgeflame model``: list, show, sign and verify packages; publishing them is in :mod:`cli.model_release`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.model_release import fetch, publish, rollback, status, switch, withdraw
from cli.output import cell, echo
from cli.paths import PATH

if TYPE_CHECKING:
    from edgeflame.package import Package, PackageHead


@click.command("keygen")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Folder for the two key files.")
def keygen(out: Path) -> None:
    """Make a key pair for signing packages. The private key stays with whoever signs."""
    from edgeflame.signing import PRIVATE_KEY, PUBLIC_KEY, write_keys

    identity = write_keys(out)
    echo(f"key {identity}")
    echo(f"  {out / PRIVATE_KEY}  signs packages: keep it secret")
    echo(f"  {out / PUBLIC_KEY}  verifies them: give it to every line")


@click.command("sign")
@click.argument("package_file", metavar="FILE", type=PATH)
@click.option("--key", type=PATH, required=True, metavar="FILE", help="Private key.")
@click.option(
    "--release-number",
    type=click.IntRange(1, 2**53),
    metavar="N",
    help="Lines take no lower number of a product than they have seen.  [default: the one it has, else the time]",
)
def sign(package_file: Path, key: Path, release_number: int | None) -> None:
    """Sign a package, in place, and number the release."""
    from edgeflame.signing import sign_package

    echo(f"{package_file}: signed with key {sign_package(package_file, key, release=release_number)}")


@click.command("verify")
@click.argument("package_file", metavar="FILE", type=PATH)
@click.option("--public-key", type=PATH, metavar="FILE", help="Ask for a signature of this key as well.")
@click.option(
    "--onnx", "onnx_file", type=PATH, metavar="FILE", help="Check this exported model in place of the package's own."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def verify(
    package_file: Path,
    public_key: Path | None,
    onnx_file: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Verify a package: whole, signed by whom it should be, and scoring its reference images as it was trained to.

    The exit code is 1 if a score differs by more than the precision's tolerance or a verdict flips.
    """
    from cli.output import print_json
    from edge.runtimes.interface import check_runtime_fits
    from edge.runtimes.load import compare_with_references, open_runtime, require_parity
    from edge.runtimes.trial import try_graph
    from edgeflame.errors import UsageError
    from edgeflame.package import read_package
    from edgeflame.signing import read_signature, verify_release, verify_signature

    def accept(head: PackageHead) -> None:
        if public_key is not None:
            verify_signature(head, public_key)
            verify_release(head, public_key)

    package = read_package(package_file, accept=accept)
    signature = read_signature(package)
    verified = signature.key_id if signature is not None and public_key is not None else None
    graph = package.model_onnx
    if onnx_file is not None:
        try:
            graph = onnx_file.read_bytes()
        except OSError as exc:
            raise UsageError(f"{onnx_file}: cannot be read ({exc.strerror})") from exc
    try_graph(graph)
    runtime = open_runtime(graph, device=device)
    check_runtime_fits(runtime, package.manifest)
    report = compare_with_references(runtime, package) if package.references else None
    if as_json:
        print_json({"sha256": package.sha256, "verified_key": verified, "parity": report})
    else:
        echo(f"{package_file}: whole, sha256 {package.sha256}")
        if verified is not None:
            release = f", release number {signature.release}" if signature is not None and signature.release else ""
            echo(f"signature: good, key {verified}{release}")
        else:
            text = "none" if signature is None else f"key {signature.key_id!r}, not verified (--public-key)"
            echo(f"signature: {text}")
        if report is None:
            echo("parity: not checked, the package holds no reference images")
    if report is None:
        return
    require_parity(runtime, package)
    if not as_json:
        echo(
            f"parity: {report.num_images} reference images on {report.provider} in {report.precision} differ by at "
            f"most {report.worst:.2g} (relative; {report.tolerance:.2g} is allowed), no verdict flips"
        )


@click.command("rename")
@click.argument("package_file", metavar="FILE", type=PATH)
@click.argument("product", metavar="PRODUCT")
def rename(package_file: Path, product: str) -> None:
    """Give a package's product another name, in place. Lines tell products apart by it; a signature is lost."""
    import msgspec

    from edgeflame.package import check_product, read_package, rewrite_package

    check_product(product)
    package = read_package(package_file)
    rewrite_package(package_file, package, manifest=msgspec.structs.replace(package.manifest, product=product))
    echo(f"{package_file}: {product}, before {package.manifest.product}")
    if package.signature_json is not None:
        echo(f"{package_file}: not signed any more; `edgeflame model sign` signs it", err=True)


@click.group("model")
def command() -> None:
    """Look into model packages, sign and verify them, bring them to the lines."""


for _other in (keygen, sign, verify, rename, publish, fetch, withdraw, status, switch, rollback):
    command.add_command(_other)


@command.command("list")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_packages(folder: Path, as_json: bool) -> None:
    """List the packages in a folder; what is broken is listed with its fault."""
    from cli.output import print_json
    from edgeflame.errors import DataError, PackageError
    from edgeflame.package import read_package
    from edgeflame.signing import read_signature

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.edgeflame")):
        try:
            package = read_package(path)
            signature = read_signature(package)
        except PackageError as exc:
            rows.append({"file": path.name, "error": str(exc)})
            continue
        manifest = package.manifest
        rows.append(
            {
                "file": path.name,
                "product": manifest.product,
                "site": manifest.site,
                "method": manifest.learning.method,
                "created": manifest.created,
                "threshold": manifest.threshold.value,
                "signed_by": None if signature is None else signature.key_id,
                "sha256": package.sha256,
            }
        )
    if as_json:
        print_json({"packages": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("file", "product", "site", "method", "created", "threshold", "signed by (unverified)", "sha256"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if "error" in row:
            table.add_row(cell(row["file"]), cell("unreadable", style="red"))
            continue
        cells = (row["file"], row["product"], row["site"] or "", row["method"], row["created"])
        table.add_row(
            *map(cell, cells), f"{row['threshold']:.4g}", cell((row["signed_by"] or "–")[:16]), row["sha256"][:12]
        )
    console = Console(width=max(Console().width, 140))
    console.print(table if rows else cell(f"no packages in {folder}"))
    for row in rows:
        if "error" in row:
            console.print(cell(row["error"], style="red"), soft_wrap=True)


@command.command("show")
@click.argument("package_file", metavar="FILE", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(package_file: Path, as_json: bool) -> None:
    """Verify a model package and say what it is, what its threshold promises, and where it comes from."""
    from cli.output import print_json
    from edgeflame.package import read_package

    package = read_package(package_file)
    if as_json:
        print_json({"file": str(package_file), "sha256": package.sha256, "manifest": package.manifest})
        return
    from rich.console import Console
    from rich.table import Table

    # Names come from the package: they are text, never mark-up.
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(package, package_file):
        table.add_row(cell(name), cell(value))
    Console().print(table)


def _lines(package: Package, path: Path) -> list[tuple[str, str]]:
    manifest = package.manifest
    learning, threshold = manifest.learning, manifest.threshold
    size, roi = learning.input, learning.input.roi
    region = "" if roi is None else f", of the region x {roi.x}, y {roi.y}, {roi.width}x{roi.height}"
    promise = "; ".join([threshold.promise(), *threshold.caveats()])
    grid = f"{manifest.grid[1]}x{manifest.grid[0]}"
    return [
        ("package", f"{path}, {_megabytes(path.stat().st_size)}, format {manifest.format_version}"),
        ("sha256", package.sha256),
        ("product", manifest.product + ("" if manifest.site is None else f", site {manifest.site}")),
        ("created", f"{manifest.created} by EdgeFlame {manifest.edgeflame_version}"),
        ("method", learning.method),
        ("backbone", f"{learning.backbone.name}, {learning.backbone.taps}"),
        ("weights", f"{manifest.weights.source} (sha256 {manifest.weights.sha256[:12]})"),
        ("input", f"{size.width}x{size.height} BGR{region}"),
        (
            "statistics",
            f"{manifest.num_images} images: grid {grid}, {manifest.num_channels} channels, {manifest.size_in_words}",
        ),
        ("head", "none" if package.head is None else f"of marked defects, {len(package.head.out)} hidden units"),
        ("threshold", f"{threshold.value:.6g}"),
        ("promise", promise),
        ("references", _references(package)),
        ("signature", _signature(package)),
        ("needs", _needs(package)),
        *[(f"· {name.replace('_', ' ')}", _short(in_words(value))) for name, value in manifest.provenance.items()],
    ]


def in_words(value: Any) -> str:
    """A value of a manifest as people read it: figures short, what is nested parted by commas and brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_bracketed(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_bracketed, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bracketed(value: Any) -> str:
    return f"({in_words(value)})" if isinstance(value, (dict, list, tuple)) and value else in_words(value)


def _references(package: Package) -> str:
    count = len(package.references)
    return f"{count} images, scored before it may judge" if count else "none: a runtime cannot be held to its scores"


def _signature(package: Package) -> str:
    from edgeflame.signing import read_signature

    signature = read_signature(package)
    return "none" if signature is None else f"by key {signature.key_id[:16]}, not verified here: edgeflame model verify"


def _needs(package: Package) -> str:
    roi = package.manifest.learning.input.roi
    if roi is None:
        camera = "frames of any size, of the part alone"
    else:
        camera = f"frames of at least {roi.x + roi.width}x{roi.y + roi.height}"
    return f"ONNX Runtime 1.17 or later, or an engine built by edgeflame export --trt; {camera}, as in training"


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} ... (all of it: --json)"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
