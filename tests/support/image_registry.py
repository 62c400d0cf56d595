"""A real registry of container images for tests, with images of no layers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import wait_for

REGISTRY = shutil.which("docker-registry")


@contextlib.contextmanager
def image_registry(folder: Path) -> Iterator[str]:
    """Run one that keeps its images below ``folder``; its address, ``localhost:PORT``."""
    assert REGISTRY is not None
    address = f"localhost:{free_port()}"
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/images}}}}\nhttp: {{addr: '{address}'}}\n"
    )
    with (folder / "registry.log").open("w") as log:
        process = subprocess.Popen([REGISTRY, "serve", config], stdout=log, stderr=log, env={"PATH": os.defpath})
    try:
        wait_for(lambda: _answers(f"http://{address}/v2/"), what="the registry")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def push(address: str, image: str) -> str:
    """Put an image of no layers there under ``name:tag``; its digest."""
    name, _, tag = image.rpartition(":")
    config = json.dumps(
        {"architecture": "arm64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "of": image}
    )
    blob = {"digest": _digest(config.encode()), "size": len(config)}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **blob},
        "layers": [],
    }
    with _request("POST", f"http://{address}/v2/{name}/blobs/uploads/") as started:
        place = started.headers["Location"]
    joined = "&" if "?" in place else "?"
    _request("PUT", f"{place}{joined}digest={blob['digest']}", config.encode(), "application/octet-stream").close()
    data = json.dumps(manifest).encode()
    _request("PUT", f"http://{address}/v2/{name}/manifests/{tag}", data, kind).close()
    return _digest(data)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _request(method: str, url: str, data: bytes = b"", kind: str = "text/plain"):  # type: ignore[no-untyped-def]
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": kind})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def _answers(url: str) -> bool:
    try:
        _request("GET", url).close()
    except OSError:
        return False
    return True
