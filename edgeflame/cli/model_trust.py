"""``edgeflame model keygen|sign|verify``: whose package it is, and whether it scores as it was trained to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

_FILE = click.Path(path_type=Path)


@click.command("keygen")
@click.option("--out", type=_FILE, required=True, metavar="DIR", help="Folder for the two key files.")
def keygen(out: Path) -> None:
    """Make a key pair for signing packages. The private key stays with whoever signs."""
    from edgeflame.signing import PRIVATE_KEY, PUBLIC_KEY, write_keys

    identity = write_keys(out)
    click.echo(f"key {identity}")
    click.echo(f"  {out / PRIVATE_KEY}  signs packages: keep it secret")
    click.echo(f"  {out / PUBLIC_KEY}  verifies them: give it to every line")


@click.command("sign")
@click.argument("package_file", metavar="FILE", type=_FILE)
@click.option("--key", type=_FILE, required=True, metavar="FILE", help="Private key.")
def sign(package_file: Path, key: Path) -> None:
    """Sign a package, in place."""
    from edgeflame.signing import sign_package

    click.echo(f"{package_file}: signed with key {sign_package(package_file, key)}")


@click.command("verify")
@click.argument("package_file", metavar="FILE", type=_FILE)
@click.option("--public-key", type=_FILE, metavar="FILE", help="Ask for a signature of this key as well.")
@click.option(
    "--onnx", "onnx_file", type=_FILE, metavar="FILE", help="Check this exported model in place of the package's own."
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
    from edge.runtimes.interface import check_runtime_fits
    from edge.runtimes.load import compare_with_references, open_runtime, require_parity
    from edgeflame.console import print_json
    from edgeflame.errors import UsageError
    from edgeflame.package import read_package
    from edgeflame.signing import read_signature, verify_signature

    package = read_package(package_file)
    signature = read_signature(package)
    verified = None if public_key is None else verify_signature(package, public_key)
    graph = package.model_onnx
    if onnx_file is not None:
        try:
            graph = onnx_file.read_bytes()
        except OSError as exc:
            msg = f"{onnx_file}: cannot be read ({exc.strerror})"
            raise UsageError(msg) from exc
    runtime = open_runtime(graph, device=device)
    check_runtime_fits(runtime, package.manifest)
    report = compare_with_references(runtime, package) if package.references else None
    if as_json:
        print_json({"sha256": package.sha256, "verified_key": verified, "parity": report})
    else:
        click.echo(f"{package_file}: whole, sha256 {package.sha256}")
        if verified is not None:
            click.echo(f"signature: good, key {verified}")
        else:
            told = "none" if signature is None else f"key {signature.key_id!r}, not verified (--public-key)"
            click.echo(f"signature: {told}")
        if report is None:
            click.echo("parity: not checked, the package holds no reference images")
    if report is None:
        return
    require_parity(runtime, package)
    if not as_json:
        click.echo(
            f"parity: {report.num_images} reference images on {report.provider} in {report.precision} differ by at "
            f"most {report.worst:.2g} (relative; {report.tolerance:.2g} is allowed), no verdict flips"
        )
