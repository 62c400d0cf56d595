"""``edgeflame model fetch``: a released package as a file, from its publisher."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeflame.errors import NegativeAnswerError, PackageError
from edgeflame.signing import write_keys
from tests.support.brokers import BrokerProcess
from tests.support.commands import edgeflame, error_of
from tests.support.publishing import published
from tests.support.signing_keys import Keys

pytestmark = pytest.mark.timeout(120)


def test_what_is_released_is_fetched_whole(signed: Path, keys: Keys, broker: BrokerProcess, tmp_path: Path) -> None:
    out = tmp_path / "got.edgeflame"
    where = ("--broker", broker.url, "--fleet", "boards")
    with published(signed, *where):
        result = edgeflame("model", "fetch", "test piece", "--out", out, "--public-key", keys.public, *where)
        assert result.exit_code == 0, result.output
        assert out.read_bytes() == signed.read_bytes()
        assert [path.name for path in tmp_path.iterdir() if "got" in path.name] == [out.name], "nothing else is left"
        # Of another key: refused, and what was there stays.
        write_keys(tmp_path / "others")
        error = error_of(
            edgeflame(
                "model", "fetch", "test piece", "--out", out, "--public-key", tmp_path / "others/edgeflame-key.pub",
                *where,
            )
        )  # fmt: skip
        assert isinstance(error, PackageError)
        assert "is signed with key" in str(error)
        assert out.read_bytes() == signed.read_bytes()
        assert isinstance(error_of(edgeflame("model", "fetch", "lid", "--out", out, *where)), NegativeAnswerError)
    # The announcement stays on the broker, and nobody answers.
    error = error_of(edgeflame("model", "fetch", "test piece", "--out", tmp_path / "b", "--timeout", 1, *where))
    assert isinstance(error, NegativeAnswerError)
    assert "nobody has served 'test piece' for 1 s (0 of " in str(error)
    assert not (tmp_path / "b").exists()
