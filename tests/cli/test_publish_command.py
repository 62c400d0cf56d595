"""``edgeflame model publish|withdraw|status`` where there is nobody to take anything, or nothing worth taking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import EdgeFlameError, NegativeAnswerError, PackageError, UsageError
from edgeflame.signing import write_keys
from tests.support.brokers import BrokerProcess
from tests.support.signing_keys import Keys

pytestmark = pytest.mark.timeout(60)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["model", *map(str, arguments)])


def error(result: Result) -> EdgeFlameError:
    assert isinstance(result.exception, EdgeFlameError), result.output
    return result.exception


def test_an_unsigned_package_is_not_published(package_file: Path) -> None:
    # No broker is there: it is refused before one is looked for.
    result = run("publish", package_file, "--broker", "mqtt://127.0.0.1:1", "--fleet", "boards")
    assert isinstance(error(result), PackageError)
    assert "not signed" in str(error(result))


def test_a_package_of_another_key_is_not_published(signed: Path, tmp_path: Path) -> None:
    write_keys(tmp_path)
    key = tmp_path / "edgeflame-key.pub"
    result = run("publish", signed, "--broker", "mqtt://127.0.0.1:1", "--fleet", "boards", "--public-key", key)
    assert isinstance(error(result), PackageError)
    assert "is signed with key" in str(error(result))


def test_a_line_cannot_be_called_anything(signed: Path) -> None:
    result = run("publish", signed, "--broker", "mqtt://127.0.0.1:1", "--fleet", "boards", "--lines", "line/1")
    assert isinstance(error(result), UsageError)


def test_nobody_to_take_it_is_an_answer(signed: Path, keys: Keys, embedded: BrokerProcess) -> None:
    where = ("--broker", embedded.url, "--fleet", "nobody")
    result = run("publish", signed, "--public-key", keys.public, *where)
    assert isinstance(error(result), NegativeAnswerError)
    assert "no line of the fleet nobody has said that it runs the product 'test piece'" in str(error(result))
    result = run("status", "--json", *where)
    assert isinstance(error(result), NegativeAnswerError)
    assert json.loads(result.stdout)["releases"] == [], "nothing was announced"
    assert isinstance(error(run("withdraw", "test piece", *where)), NegativeAnswerError)


def test_a_line_that_never_comes_is_named_and_the_announcement_stays(signed: Path, embedded: BrokerProcess) -> None:
    where = ("--broker", embedded.url, "--fleet", "late")
    result = run("publish", signed, "--lines", "line-1", "--timeout", 1, *where)
    assert "1 of 1 lines do not have it: line-1 not heard of" in str(error(result))
    first = json.loads(run("status", "--json", *where).stdout)["releases"][0]
    run("publish", signed, "--lines", "line-1", "--timeout", 1, *where)
    again = json.loads(run("status", "--json", *where).stdout)["releases"][0]
    assert first == again, "the same release goes on"
    assert run("withdraw", "test piece", *where).exit_code == 0
    assert json.loads(run("status", "--json", *where).stdout)["releases"][0]["withdrawn"]
