"""A product taught on the operator's page: over real HTTP, and in Chromium, with a real line, fit and models."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.config.outputs import WebConfig
from edge.delivery.sinks import of_production
from edge.web.history import PartHistory
from edge.web.marks import PartMarks
from edge.web.metrics import LineMetrics
from edge.web.page import OperatorPage
from edge.web.server import serve_page
from tests.edge.web.test_page import browser
from tests.support.taught_line import HEIGHT, WIDTH, TaughtLine, bad_part, part, taught_line
from tests.support.waiting import wait_for

__all__ = ["browser"]
TOKEN = "let-me-teach"


@contextlib.contextmanager
def taught_page(folder: Path, package: Path | None, **keys: Any) -> Iterator[tuple[TaughtLine, str]]:
    """A line with a teacher, and its page."""
    config = WebConfig(listen="127.0.0.1:0")
    with taught_line(folder / "state", package, **keys) as line:
        history = PartHistory(config)
        sink = of_production(history)

        class Shown:
            def on_part(self, _captured: object, inspected: Any) -> None:
                sink.accept(inspected)

        line.worker.add_listener(Shown())
        page = OperatorPage(
            config,
            line.control,
            history=history,
            metrics=LineMetrics(line.control.statuses, deliverers=[]),
            marks=PartMarks(line.marks, history, line.control.statuses),
            teacher=line.teacher,
            deliverers=[],
            token=TOKEN,
        )
        with serve_page(page, config) as address:
            yield line, address


def ask(address: str, path: str, order: object = None, *, token: str | None = TOKEN) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        body = None if order is None else order if isinstance(order, bytes) else msgspec.json.encode(order)
        headers = {"X-EdgeFlame-Token": token} if token else {}
        connection.request("GET" if order is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def test_orders_over_http(tmp_path: Path, package_file: Path) -> None:
    with taught_page(tmp_path, package_file) as (line, address):
        path = "/api/teaching"
        assert ask(address, path, {"action": "new", "product": "cap"}, token=None)[0] == 401
        assert ask(address, path, {"action": "new", "product": "cap"}, token="guess")[0] == 401
        for junk in (b"", b"\xff", b"[" * 500, b"[]", b'{"action": "explode", "product": "x"}', b'{"action": "new"}'):
            assert ask(address, path, junk)[0] == 400
        assert ask(address, path, {"action": "new", "product": "cap", "colour": "red"})[0] == 400
        assert ask(address, path, {"action": "region", "product": "cap", "region": [0, 0, 1]})[0] == 400
        status, answer = ask(address, path, {"action": "new", "product": "cap"})
        assert (status, msgspec.json.decode(answer)["stage"]) == (200, "stopped")
        assert ask(address, path, {"action": "new", "product": "cap"})[0] == 400
        assert ask(address, path, {"action": "learn", "product": "cap"})[0] == 409
        line.collect(2)
        told = msgspec.json.decode(ask(address, path)[1])
        assert [one["num_parts"] for one in told["products"]] == [2]
        assert told["frames"] == {"camera": [WIDTH, HEIGHT]}
        for picture in ("photographs/00001.png?side=64", "photographs/00001.png", "heat/00001.png"):
            status, data = ask(address, f"/api/teaching/cap/{picture}")
            assert (status, data[:2]) == (200, b"\xff\xd8")
        assert ask(address, "/api/teaching/frame.jpg?camera=camera")[1][:2] == b"\xff\xd8"
        for gone in (
            "frame.jpg?camera=none", "frame.jpg?camera=camera&side=0", "cap/photographs/..%2Frecord.json",
            "cap/photographs/record.json", "cap/other/00001.png", "nothing/photographs/00001.png",
            "cap/photographs/99999.png", "%2e%2e/photographs/00001.png",
        ):  # fmt: skip
            assert ask(address, f"/api/teaching/{gone}")[0] == 404, gone
        assert ask(address, "/api/teaching/cap/scores")[0] == 409


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_product_is_taught_in_the_browser(
    browser: Any, tmp_path: Path, package_file: Path, width: int, height: int
) -> None:
    complaints: list[str] = []
    with taught_page(tmp_path, package_file) as (line, address):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        line.feed(part(1))
        page.goto(address)
        page.get_by_role("tab", name="Teach").click()
        page.get_by_text("learnt from some thirty good parts").wait_for()
        # Without the token nothing begins; with it, it does.
        page.locator("#begin-name").fill("cap")
        page.get_by_role("button", name="Begin").click()
        page.locator("#done").get_by_text("Not done: this needs the operator's token.").wait_for()
        page.locator("#order-token").fill(TOKEN)
        page.get_by_role("button", name="Begin").click()
        page.locator("#step-collect").wait_for()
        # Drag the region on the live picture.
        picture = page.locator("#live-frame")
        wait_for(lambda: picture.evaluate("e => e.complete && e.naturalWidth") == WIDTH, "the live picture")
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.9 * box["height"])
        page.mouse.up()
        page.locator("#region-told").get_by_text(re.compile(r"10\d × 7\d of 128 × 96 pixels")).wait_for()
        # By numbers too, where it is refused outside of the picture, and said.
        page.get_by_text("by numbers").click()
        page.locator("#region-x").fill("100")
        page.locator("#region-form button").click()
        page.locator("#done.wrong").get_by_text("reaches beyond the camera's picture of 128x96 pixels").wait_for()
        # Collect: good ones, a bad one, and a picture that is left out.
        page.locator("#collect").click()
        page.locator("#collect-stop").wait_for()
        for seed in range(100, 112):
            line.feed(bad_part(7) if seed == 105 else part(seed))
            page.locator("#num-parts").get_by_text(str(seed - 99), exact=True).wait_for()
        line.feed(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        page.locator("#left-out-told").get_by_text("1 picture left out").wait_for()
        page.locator("#collect-stop").click()
        page.locator("#done.good").get_by_text("No more parts are taken.").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Two photographs of one part, by the keyboard.
        for index in (0, 1):
            page.locator("#photographs button").nth(index).press("Enter")
        page.get_by_role("button", name="Are one part").press("Enter")
        page.locator("#num-told").get_by_text("good parts in 12 photographs").wait_for()
        # Learn, while parts pass.
        page.locator("#learn").click()
        page.locator("#learn-cancel").wait_for()
        assert line.feed(part(300)).verdict != "unknown"
        page.locator("#step-look").wait_for(timeout=300_000)
        page.locator("#promise").get_by_text("good photographs rejected").wait_for()
        # It comes into view by itself, and the next step is named.
        page.locator("#steps [aria-current=step]").get_by_text("Look").wait_for()
        # Not by Playwright's wait_for_function, whose polling the page's Content-Security-Policy forbids.
        place = "Math.abs(document.querySelector('#step-look').getBoundingClientRect().top) < innerHeight / 2"
        wait_for(lambda: page.evaluate(place), "the step Look in view")
        page.get_by_text("00006.png moves the threshold by itself").wait_for()
        # The bad one stands first: out with it, and again.
        worst = page.locator("#suspects button").first
        assert "00006.png" in (worst.get_attribute("aria-label") or "")
        worst.click()
        page.locator("#outdated").wait_for()
        page.locator("#learn").click()
        page.locator("#learn-cancel").wait_for()
        page.locator("#learn-cancel").wait_for(state="hidden", timeout=300_000)
        page.locator("#outdated").wait_for(state="hidden")
        # Another threshold, by the keyboard; of what was learnt now, without the one that is out.
        page.locator("#threshold-told").get_by_text("of the 10 good parts collected").wait_for()
        slider = page.locator("#threshold")
        slider.focus()
        slider.press("ArrowLeft")
        page.locator("#done.good").get_by_text("This threshold is taken.").wait_for()
        assert line.order("status").learnt.chosen is not None  # type: ignore[union-attr]
        page.locator("#threshold-own").click()
        page.locator("#done.good").get_by_text("as it was learnt").wait_for()
        # Try alone: marked, and in view. Then live, and back.
        page.locator("#try-alone").click()
        page.locator("#end-trial").wait_for()
        line.feed(part(301))
        page.locator("#chips").get_by_text("· trial").wait_for()
        page.locator("#go-live").click()
        page.locator("#go-live").get_by_text("Sure?").click()
        page.locator("#trial-told").get_by_text("Live since").wait_for()
        assert line.feed(bad_part(8)).verdict == "fail"
        page.locator("#chips .fail").wait_for()
        page.locator("#product").get_by_text("cap", exact=True).wait_for()
        page.locator("#go-back").click()
        page.locator("#go-back").get_by_text("Sure?").click()
        page.locator("#done.good").get_by_text("Gone back").wait_for()
        line.feed(part(302))
        page.locator("#product").get_by_text("tile", exact=True).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()
    assert [text for text in complaints if not re.search(r"\b(401|400)\b", text)] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_what_was_marked_is_learnt_from_in_the_browser(
    browser: Any, tmp_path: Path, package_file: Path, width: int, height: int
) -> None:
    region = (8, 8, 112, 80)
    with taught_page(tmp_path, package_file) as (line, address):
        line.order("new")
        line.feed(part(1))
        line.order("region", region=region)
        line.collect(13)
        assert line.learn().problem is None
        complaints: list[str] = []
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.get_by_role("tab", name="Teach").click()
        page.locator("#order-token").fill(TOKEN)
        page.locator("#learn-told").get_by_text("learnt from 13 photographs").wait_for()
        assert not page.locator("#learn-marks").is_visible()
        line.mark_parts(region)
        page.reload()
        page.get_by_role("tab", name="Teach").click()
        page.locator("#order-token").fill(TOKEN)
        page.locator("#learn-told").get_by_text("; 10 marks (2 good, 8 bad) now").wait_for()
        assert page.locator("#prior option").all_inner_texts() == [
            "these parts alone",
            "these parts, and what tile knows",
        ]
        page.locator("#learn-marks").click()
        page.locator("#learn-cancel").wait_for()
        page.locator("#learn-cancel").wait_for(state="hidden", timeout=300_000)
        page.locator("#learn-told").get_by_text("learnt from 13 photographs and 10 marks (2 good, 8 bad),").wait_for()
        told = page.locator("#compared")
        told.get_by_text("Compared with the present model: would have caught").wait_for()
        told.get_by_text("1 left out: of another product than cap.").wait_for()
        # The pictures of marks are shown, and lead to where they are corrected.
        of_mark = page.locator("#suspects button").filter(has_text="marked good").first
        of_mark.scroll_into_view_if_needed()
        picture = of_mark.locator("img")
        wait_for(lambda: picture.evaluate("e => e.complete && e.naturalWidth") == region[2], "the picture")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        of_mark.click()
        page.locator("#marks-found").wait_for()
        page.close()
        assert complaints == []
