"""Logging: one logger for everything, events with fields, on standard error.

A log line is an event's name and its fields, as text for people, as JSON for programs, or with the level's prefix
for systemd's journal, which has the time itself. Progress is reported through :class:`Progress`, without knowledge
of a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from typing import Any, Protocol, TextIO

import msgspec

from edgeflame.masking import without_secrets

LOGGER_NAME = "edgeflame"


_JOURNAL_PREFIX = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>", logging.DEBUG: "<7>"}


def printable(text: str) -> str:
    """Text of somebody else's, fit for one line of a log or a terminal: what does not print is escaped as in Python.

    Line feeds would begin a line of their own, escape sequences write over others, and marks of direction turn them
    around.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


_NOT_ASCII = re.compile(r"[^\x20-\x7e\n]+")


def printable_json(data: bytes) -> bytes:
    """A JSON document in which what does not print is escaped, as JSON itself only asks of a few."""
    if data.isascii() and b"\x7f" not in data:
        return data
    return _NOT_ASCII.sub(lambda found: "".join(map(_json_character, found[0])), data.decode()).encode()


def _json_character(one: str) -> str:
    return one if one.isprintable() else json.dumps(one)[1:-1] if one != "\x7f" else "\\u007f"


class Progress(Protocol):
    """A task's progress; ``trainer`` and others report through it without knowing the terminal."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def no_progress(done: int, total: int, note: str = "") -> None:
    """Discard the report."""


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = self.head(record) + " ".join(
            [record.getMessage(), *(f"{key}={_short(value)}" for key, value in _fields(record).items())]
        )
        if record.exc_info:
            text += _traceback(self.formatException(record.exc_info))
        return text

    def head(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{stamp} {record.levelname.lower():7} "


class _JournalFormatter(_TextFormatter):
    """For systemd's journal, which has the time, and takes the level from a prefix (``sd-daemon(3)``)."""

    def head(self, record: logging.LogRecord) -> str:
        return _JOURNAL_PREFIX.get(record.levelno, "<6>")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        try:
            encoded = msgspec.json.encode(entry, enc_hook=str)
        except UnicodeEncodeError:
            # A file's name that is no UTF-8.
            encoded = json.dumps(entry, default=str).encode()
        return printable_json(encoded).decode()


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is *now*: a progress bar puts itself in its place, to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _traceback(text: str) -> str:
    # Set in, so that no line of an exception's text passes for one of the log.
    return "".join(f"\n    {printable(line)}" for line in text.split("\n"))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    if not isinstance(fields, dict):
        return {}
    return {key: without_secrets(value) if isinstance(value, str) else value for key, value in fields.items()}


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = printable(text)
    if " " not in text:
        return text
    return '"' + text.replace('"', '\\"') + '"'


def configure_logging(*, log_format: str, verbosity: int) -> None:
    """Set up EdgeFlame's one logger on standard error.

    Args:
        log_format: ``text`` for people, ``json`` for one JSON object a line.
        verbosity: 0 shows warnings and notable events, 1 and more shows details.
    """
    handler = _Handler()
    text = _JournalFormatter() if _is_journal() else _TextFormatter()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    root = logging.getLogger(LOGGER_NAME)
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbosity else logging.INFO)
    root.propagate = False


def error_prefix() -> str:
    """What stands before an error's line on standard error: its level, for the journal; nothing for people."""
    return _JOURNAL_PREFIX[logging.ERROR] if _is_journal() else ""


def _is_journal() -> bool:
    """Whether standard error is systemd's journal; ``JOURNAL_STREAM`` names its device and inode."""
    try:
        stream = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


class EventLog:
    """Logs an event name and fields: ``log.info("round_started", round=3, sites=5)``."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{LOGGER_NAME}.{name}")

    def debug(self, event: str, **fields: object) -> None:
        self._logger.debug(event, extra={"fields": fields})

    def info(self, event: str, **fields: object) -> None:
        self._logger.info(event, extra={"fields": fields})

    def warning(self, event: str, **fields: object) -> None:
        self._logger.warning(event, extra={"fields": fields})

    def error(self, event: str, **fields: object) -> None:
        self._logger.error(event, extra={"fields": fields})
