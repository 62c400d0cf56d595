"""Photographs the operator's page of a running inspection of generated boards, for docs/operator.md.

    python docs/images/operator_page.py [--out docs/images/operator-page.jpg]

Fits a small model, starts `edgeflame inspect` with two cameras and golden parts, and has Chromium (with Playwright)
look at it: operator-page.jpg, operator-page-upkeep.jpg of the tab Health, and teach.jpg of a product that was learnt.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

from boards.camera import Camera
from boards.dataset import BoardStream
from edgeflame.images import write_image

CLEAR = 0.7
"""Severity of the golden bad parts: 0 is faint, 1 is glaring."""
ADDRESS = "127.0.0.1:8765"
CONFIG = """
[products]
warm_wood = "{model}"

[cameras.infeed]
source = "boards:warm_wood?site=1&defect_rate=0.12"

[cameras.outfeed]
source = "boards:warm_wood?site=1&defect_rate=0.05"

[web]
listen = "{address}"
stale_after_s = 600

[self_test]
folder = "{golden}"
"""


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "edgeflame", *map(str, arguments)], check=True)


def golden_parts(folder: Path) -> None:
    for kind, rate in (("good", 0.0), ("bad", 1.0)):
        (folder / kind).mkdir(parents=True)
        stream = BoardStream(texture="warm_wood", seed=9, camera=Camera.for_site(1, 0), defect_rate=rate)
        clear = (part for part in stream if kind == "good" or part.severity > CLEAR)
        for index, part in enumerate(itertools.islice(clear, 3)):
            write_image(folder / kind / f"{index}.png", part.image_bgr)


def teach(token: str) -> None:
    """Collect boards on the outfeed, and learn them."""

    def order(**what: object) -> dict[str, object]:
        body = json.dumps({"product": "walnut-board", **what}).encode()
        connection = http.client.HTTPConnection(ADDRESS, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", "/api/teaching", body, {"X-EdgeFlame-Token": token})
            return json.load(connection.getresponse())

    order(action="new", camera="outfeed")
    order(action="region", region=[12, 12, 232, 232])
    order(action="collect")
    while order(action="status")["num_parts"] < 34:
        time.sleep(0.5)
    order(action="stop")
    time.sleep(2)  # what was being written when it stopped
    order(action="learn")
    while order(action="status")["learning"] is not None:
        time.sleep(1)


def photograph(out: Path, token: str, *, all_looks: bool) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    looks = {
        "": {"viewport": {"width": 1500, "height": 1130}, "color_scheme": "light"},
        "-dark": {"viewport": {"width": 1500, "height": 1130}, "color_scheme": "dark"},
        "-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, look in looks.items():
            page = browser.new_page(**look)
            page.goto(f"http://{ADDRESS}")
            page.locator("#recent li").nth(7).wait_for()
            if not name:
                page.locator("#order-token").fill(token)
                page.get_by_role("tab", name="Health").click()
                page.get_by_role("button", name="Test photographs").click()
                page.locator("#golden-message").get_by_text("golden parts judged").wait_for()
                page.locator("#done").evaluate("node => { node.textContent = ''; }")
                page.get_by_role("tab", name="Inspect").click()
            page.wait_for_timeout(1500)  # pictures of the newest parts
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=out.with_name(f"{out.stem}{name}.jpg"), full_page=bool(name), type="jpeg", quality=78)
            if not name:
                page.get_by_role("tab", name="Health").click()
                file = out.with_name(f"{out.stem}-upkeep.jpg")
                page.screenshot(path=file, full_page=True, type="jpeg", quality=78)
                teach(token)
                page.get_by_role("tab", name="Teach").click()
                page.locator("#suspects img").nth(5).wait_for()
                page.wait_for_timeout(4000)
                page.screenshot(path=out.with_name("teach.jpg"), full_page=True, type="jpeg", quality=78)
            page.close()
            if not all_looks:
                break
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("operator-page.jpg"))
    parser.add_argument("--work", type=Path, help="Keep data and model here for another time.")
    parser.add_argument("--all-looks", action="store_true", help="Dark and as a phone as well, to be judged by eye.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(exist_ok=True)
        model, state = work / "boards.edgeflame", Path(temporary) / "state"
        if not model.exists():
            run("demo-data", "--out", work / "data", "--texture", "warm_wood", "--parts", 60)
            run("fit", "--data", work / "data", "--out", model, "--method", "none")
        golden_parts(Path(temporary) / "golden")
        config = Path(temporary) / "line.toml"
        config.write_text(CONFIG.format(model=model, address=ADDRESS, golden=Path(temporary) / "golden"))
        command = [
            sys.executable,
            "-m",
            "edgeflame",
            "inspect",
            "--config",
            config,
            "--state",
            state,
            "--device",
            "cpu",
        ]
        token = "for-the-photograph"  # noqa: S105 - of a daemon that lives for a minute
        daemon = subprocess.Popen(
            [*map(str, command)], env={**os.environ, "EDGEFLAME_OPERATOR_TOKEN": token}, stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"http://{ADDRESS}/api/view", timeout=5) as answer:
                        if len(json.load(answer)["view"]["recent"]) >= 8:
                            break
                except OSError:
                    time.sleep(0.5)
            photograph(options.out, token, all_looks=options.all_looks)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)


if __name__ == "__main__":
    main()
