"""With which packages a daemon starts: its configuration's files, or what was decided since. Nothing is written here.

The newer decision counts. A released model stays in use over restarts as long as the configuration names the file that
it named when the release was taken up; whoever puts another file there has decided anew, and that file is used. A
released package that is missing, damaged, or not signed by a key that is trusted now gives way to the one before it,
at last to the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from edge.models import record as records
from edge.models.check import RefusedError, TrustedKeys, read_trusted
from edge.models.record import ProductRecord, Record
from edge.models.seats import Configured
from edge.models.store import PackageStore
from edgeflame.console import EventLog

log = EventLog("models")


def settle(
    record: Record, products: Mapping[str, Configured], *, store: PackageStore, keys: TrustedKeys
) -> dict[str, ProductRecord]:
    """What each product is to run.

    Args:
        record: as the last process left it.
        products: as the configuration has them.
        store: packages on disk.
        keys: whose packages are taken.
    """
    settled = {}
    for product, configured in products.items():
        entry = record.products.get(product, ProductRecord(configured=configured.sha256))
        if entry.configured != configured.sha256:
            if entry.present is not None:
                log.warning(
                    "model_from_file",
                    product=product,
                    file=configured.file,
                    reason="the configuration names another package than when the released one was taken",
                    instead_of=entry.present.sha256[:12],
                )
            entry = records.use_file(entry, configured.sha256)
        while (present := entry.present) is not None:
            try:
                read_trusted(store.path(present.sha256), sha256=present.sha256, product=product, keys=keys)
            except RefusedError as exc:
                entry = one_back(entry, product, exc.reason, str(exc))
            else:
                log.warning(
                    "model_from_release",
                    product=product,
                    sha256=present.sha256[:12],
                    name=present.name,
                    instead_of=configured.file,
                    back="edgeflame model rollback --to-file, or another file in the configuration",
                )
                break
        settled[product] = entry
    return settled


def one_back(entry: ProductRecord, product: str, reason: str, detail: str) -> ProductRecord:
    """The model before, because the present one cannot be used at the start."""
    log.error("released_model_not_used", product=product, reason=reason, detail=detail)
    return records.roll_back(entry, datetime.now(timezone.utc), reason=reason, detail=f"at the start: {detail}")


def files(
    settled: Mapping[str, ProductRecord], products: Mapping[str, Configured], store: PackageStore
) -> dict[str, Path]:
    """Package files by the configuration's names."""
    return {
        configured.name: Path(configured.file)
        if (present := settled[product].present) is None
        else store.path(present.sha256)
        for product, configured in products.items()
    }
