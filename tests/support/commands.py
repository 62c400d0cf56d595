"""Commands as a user types them, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import EdgeFlameError


def edgeflame(*arguments: object) -> Result:
    """Run a command; its error, if any, is in the result."""
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def error_of(result: Result) -> EdgeFlameError:
    """The expected error, of one line, that a command ended with."""
    assert isinstance(result.exception, EdgeFlameError), result.output
    assert "\n" not in str(result.exception)
    return result.exception
