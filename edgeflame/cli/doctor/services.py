"""What systemd says about our services."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from edgeflame.findings import Finding, note, ok, problem

_TIMEOUT_S = 10.0


def check_services() -> Iterator[Finding]:
    """A finding for each service of ours that this machine has; none without systemd."""
    command = shutil.which("systemctl")
    if command is None:
        return
    query = [command, "list-units", "--all", "--plain", "--no-legend", "--type=service", "edgeflame-*"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return
    # Where systemd is installed and does not run the machine, a container for instance, it says nothing here.
    for line in done.stdout.splitlines():
        unit, _, active, state, *_ = [*line.split(maxsplit=4), "", "", "", ""]
        if not unit.startswith("edgeflame-"):
            continue
        name = unit.removesuffix(".service")
        if active == "failed":
            yield problem(
                name,
                "has failed, and is not started again",
                f"journalctl -u {unit} -n 50 says why; then systemctl restart {unit}",
            )
        elif state == "auto-restart":
            yield note(name, "fails and is started again and again", f"journalctl -u {unit} -n 50 says why")
        else:
            yield ok(name, f"{active} ({state})")
