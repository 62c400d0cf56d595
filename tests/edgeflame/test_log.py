"""What others say, in a log and on a terminal: it begins no line of its own and moves no cursor."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import msgspec
import pytest

from cli.output import cell, echo, print_findings, print_json
from edgeflame.errors import NegativeAnswerError
from edgeflame.findings import problem
from edgeflame.log import EventLog, configure_logging, printable, printable_json

FORGED = 'gone"\n12:00:00 INFO    run_done outcome=good\r\x1b[2K\x9b1A\u202e\u2028\x7f\ud800'
"""A second line, an erased one, a cursor moved up, text turned around, and half a character."""


@pytest.fixture
def our_logger() -> Iterator[None]:
    logger = logging.getLogger("edgeflame")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text[:-1].isprintable()


@pytest.mark.usefixtures("our_logger")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_field_writes_no_line_of_its_own(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure_logging(log_format=log_format, verbosity=0)
    EventLog("test").warning("site_failed", site="a", reason=FORGED, figure=0.5)
    said = capsys.readouterr().err
    assert is_one_line(said)
    if log_format == "json":
        assert json.loads(said)["reason"] == FORGED
    else:
        assert r'reason="gone\"\n12:00:00 INFO' in said


@pytest.mark.usefixtures("our_logger")
def test_an_exceptions_text_is_set_in(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="text", verbosity=0)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("edgeflame.test").exception("failed")
    _, *rest = capsys.readouterr().err.split("\n")[:-1]
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_what_prints_is_left_as_it_is() -> None:
    plain = "Prüfling 7, ≥ 3 µm: 不良 ✓"
    assert printable(plain) == plain
    document = msgspec.json.encode({"a": plain})
    assert printable_json(document) == document
    odd = {"a": "\x7f\u202e\U000e0001\xa0" + plain}
    escaped = printable_json(msgspec.json.encode(odd))
    assert escaped.decode().isprintable()
    assert json.loads(escaped) == odd


def test_the_terminal_is_no_place_for_it_either(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"line-1: {FORGED}")
    echo(FORGED, err=True)
    print_json({"reason": FORGED.replace("\ud800", "")})
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
    assert cell(FORGED).plain.isprintable()
    with pytest.raises(NegativeAnswerError):
        print_findings([problem("broker", FORGED, FORGED)], as_json=False)
    assert [line.isprintable() for line in capsys.readouterr().out.split("\n")] == [True, True, True]
