"""The command line as a whole: help, start-up time's cause, errors as one line, exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import edgeflame.errors
from cli import COMMANDS, cli, main
from edgeflame.errors import EdgeFlameError
from tests.support.paths import REPOSITORY


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgeflame", *arguments], capture_output=True, text=True, timeout=60)


def families() -> list[type[EdgeFlameError]]:
    return [
        kind
        for kind in vars(edgeflame.errors).values()
        if isinstance(kind, type) and issubclass(kind, EdgeFlameError) and kind is not EdgeFlameError
    ]


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {re.escape(name)}  ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: edgeflame {name}")
    assert result.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.cli.main(['--help'], standalone_mode=True)\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy','cv2','torch','msgspec','rich','paho'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def path_options(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    """A command's options that are paths, and those of the commands in it, with the command's name."""
    for option in command.params:
        if isinstance(option.type, click.Path):
            yield command.name or "", option
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from path_options(inner)


def test_no_path_may_be_empty() -> None:
    """A variable that is not set leaves nothing, which would name the current folder."""
    options = list(path_options(cli))
    assert len(options) > 80
    for command, option in options:
        with pytest.raises(click.BadParameter, match="was a variable not set"):
            option.type.convert("", option, click.Context(click.Command(command)))


def test_an_empty_source_is_not_the_current_folder(signed: Path) -> None:
    result = run("inspect", "--model", str(signed), "--source", "")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--source: it is empty" in result.stderr


def test_unknown_command_is_a_usage_error() -> None:
    result = run("fly")
    assert result.returncode == 2
    assert "No such command 'fly'" in result.stderr


def test_an_expected_error_is_one_line_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for kind in families():

        def fail(*args: object, kind: type[EdgeFlameError] = kind, **kwargs: object) -> None:
            raise kind("expected this, got that")

        monkeypatch.setattr(cli, "main", fail)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == kind.exit_code
        assert capsys.readouterr().err == "edgeflame: expected this, got that\n"


def test_exit_codes_are_distinct_and_documented() -> None:
    codes = [kind.exit_code for kind in families()]
    assert len(codes) == len(set(codes))
    drawn = dict(re.findall(r"[├└]── (\w+)\s+(\d+)", edgeflame.errors.__doc__ or ""))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in families()}
    documented = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    for kind in families():
        assert re.search(rf"^\| {kind.exit_code} \|", documented, re.MULTILINE), kind


def test_interruption_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "edgeflame: interrupted\n"


def test_an_unexpected_error_is_not_mistaken_for_no(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_journal_gets_levels_and_no_second_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeflame", "inspect", "--model", "gone", "--source", "gone"]
    code = "from edgeflame.log import *; configure_logging(log_format='text', verbosity=1); log = EventLog('x')\n"
    code += "log.info('told', a=1); log.warning('warned'); log.debug('hidden')"
    with (tmp_path / "log").open("wb") as stream:
        # As systemd says which stream is its own: device and inode.
        inode = os.fstat(stream.fileno())
        known = {**os.environ, "JOURNAL_STREAM": f"{inode.st_dev}:{inode.st_ino}"}
        subprocess.run([sys.executable, "-c", code], stderr=stream, env=known, check=True, timeout=60)
        subprocess.run(command, stderr=stream, env=known, timeout=60)
    first, second, third, error = (tmp_path / "log").read_text().splitlines()
    assert (first, second, third) == ("<6>told a=1", "<4>warned", "<7>hidden")
    assert error.startswith("<3>edgeflame: ")
    # Any other stream is for people.
    done = subprocess.run(command, capture_output=True, text=True, env=known, timeout=60)
    assert done.stderr.startswith("edgeflame: ")
