"""Addresses of sources: their options, as in ``camera:0?width=1280&fps=30``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import parse_qsl

from edgeflame.errors import UsageError
from edgeflame.masking import without_secrets


class AddressQuery:
    """The options of one address; unknown options, and options given twice, are refused.

    Args:
        address: the whole address, for messages, which show it without secrets.
        text: the text after the question mark.
        known: names of the options.
        syntax: how such an address is written, for messages.

    Raises:
        UsageError: it is not of that form; so in every method.
    """

    def __init__(self, address: str, text: str, *, known: Collection[str], syntax: str) -> None:
        self._address = address
        self._syntax = syntax
        try:
            pairs = parse_qsl(text, strict_parsing=True, keep_blank_values=True) if text else []
        except ValueError as exc:
            raise self.wrong(str(exc)) from exc
        self._options = dict(pairs)
        if len(self._options) != len(pairs):
            raise self.wrong("an option is given twice")
        unknown = sorted(self._options.keys() - set(known))
        if unknown:
            raise self.wrong(f"unknown option {', '.join(unknown)}")

    @property
    def options(self) -> Mapping[str, str]:
        return self._options

    def wrong(self, what: str) -> UsageError:
        """The error with what is wrong and how the address is written."""
        return UsageError(f"--source {without_secrets(f'{self._address}: {what}')}; it is written {self._syntax}")

    def text(self, name: str, default: str) -> str:
        return self._options.get(name, default)

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """A number from ``least`` to ``most``."""
        text = self._options.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError as exc:
            raise self.wrong(f"{name} is a number, not {text!r}") from exc
        if not least <= value <= most:
            raise self.wrong(f"{name} lies between {least:g} and {most:g}, not {text}")
        return value

    def whole_number(self, name: str, default: int, *, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.number(name, default, least=least, most=most)
        if value != int(value):
            raise self.wrong(f"{name} is a whole number, not {self._options[name]}")
        return int(value)

    def yes_or_no(self, name: str, *, default: bool) -> bool:
        text = self._options.get(name, "yes" if default else "no").lower()
        if text not in ("yes", "no"):
            raise self.wrong(f"{name} is yes or no, not {text!r}")
        return text == "yes"
