"""Writes the reference pages from the code: every configuration key, every command and its options.

    python docs/make_reference.py          (make reference)

The pages are committed, so that they can be read beside the code; a test compares them with what this makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgeflame.bounds import BASIC, bounds, is_marked

DOCS = Path(__file__).resolve().parent
PAGES = DOCS / "reference"

_MADE = "<!-- Made by docs/make_reference.py from the code: run `make reference`, do not edit. -->\n"

TAG_MEANING = "Which of the alternatives this is."


@dataclass(frozen=True)
class Key:
    """A key of a TOML file as a reader meets it."""

    name: str
    type: str
    default: str
    meaning: str
    """In Markdown; empty if the code says nothing."""
    is_basic: bool = False
    """Whether somebody who begins needs it."""


@dataclass(frozen=True)
class Section:
    """A table of a TOML file; the topmost has an empty name."""

    name: str
    meaning: str
    keys: tuple[Key, ...]
    kind: type[msgspec.Struct]


def sections(kind: type[msgspec.Struct], name: str = "", meaning: str = "") -> Iterator[Section]:
    """A configuration's tables, the topmost first, each before those inside it."""
    docs = attribute_docstrings(kind)
    keys: list[Key] = []
    below: list[tuple[type[msgspec.Struct], str, str]] = []
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        meaning_here = docs.get(field.name, "")
        structs, many = _structs(hints[field.name])
        inner = f"{name}.{field.name}" if name else field.name
        if many:
            inner += ".NAME"
        below += [(struct, inner, meaning_here) for struct in structs]
        if not structs:
            hint, default = hints[field.name], "required" if field.required else _literal(field)
            keys.append(Key(field.name, _type(hint), default, _markdown(meaning_here), is_marked(hint, BASIC)))
    tag = kind.__struct_config__.tag
    if tag is not None:
        keys.insert(
            0, Key(str(kind.__struct_config__.tag_field), f"`{tag!r}`".replace("'", '"'), "required", TAG_MEANING)
        )
    yield Section(name, _markdown(meaning), tuple(keys), kind)
    # What is there once comes before what may be there many times.
    for struct, inner, meaning_here in sorted(below, key=lambda entry: entry[1].endswith(".NAME")):
        yield from sections(struct, inner, " ".join(filter(None, (meaning_here, _about(struct)))))


def attribute_docstrings(kind: type) -> dict[str, str]:
    """The strings under a class's attributes, by attribute, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is object or base.__module__.startswith("msgspec"):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for statement, after in zip(node.body, node.body[1:], strict=False):
            match statement, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = inspect.cleandoc(text)
                case _:
                    pass
    return found


def configuration_page() -> str:
    """``configuration.md``."""
    lines = [
        _MADE,
        "# Configuration keys",
        "",
        "Every key of every TOML file, from the code that reads them. A key that is not here is refused by name, and",
        "so is a value of another type or out of bounds. What may be left out has a default; so may a whole section.",
        "",
        *_basic_keys(),
    ]
    described: dict[type[msgspec.Struct], str] = {}
    for command, about, kind in _files():
        lines += [f"## edgeflame {command}", "", about, ""]
        inside_another = ""
        for section in sections(kind):
            if inside_another and section.name.startswith(inside_another):
                continue
            title = f"`[{section.name}]` of {command}" if section.name else f"edgeflame {command}"
            if section.name:
                lines += [f"### {title}", ""]
            if section.meaning:
                lines += [section.meaning, ""]
            if section.kind in described:
                before = described[section.kind]
                lines += [
                    f"Its keys, and those of the sections inside it, are those of [{before}](#{_anchor(before)}).",
                    "",
                ]
                inside_another = f"{section.name}."
                continue
            described[section.kind] = title
            if section.keys:
                lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
                lines += [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in section.keys]
                lines.append("")
    return "\n".join(lines)


def _basic_keys() -> list[str]:
    """A table of the keys to start with, for each command that has such keys."""
    lines = ["## Start with these", "", "All other keys can wait.", ""]
    for command, _, kind in _files():
        rows = [
            f"| `{f'[{section.name}] ' if section.name else ''}{key.name}` | {key.default} | {key.meaning} |"
            for section in sections(kind)
            for key in section.keys
            if key.is_basic and not section.name.startswith(("fleet", "cameras.NAME."))
        ]
        if rows:
            lines += [f"| key of `edgeflame {command}` | default | meaning |", "|---|---|---|", *rows, ""]
    return lines


def command_line_page() -> str:
    """``command-line.md``."""
    from cli import COMMANDS, cli

    lines = [
        _MADE,
        "# Command line",
        "",
        "What `edgeflame COMMAND --help` says, for all commands. Results go to standard output, logs and progress to",
        "standard error; [exit codes](../exit-codes.md) are stable.",
        "",
        "## edgeflame",
        "",
        "Options before the command:",
        "",
        *_options(cli),
    ]
    with click.Context(cli, info_name="edgeflame") as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            lines += _command(f"edgeflame {name}", command)
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """All pages by their file's name."""
    return {"configuration.md": configuration_page(), "command-line.md": command_line_page()}


def main() -> None:
    """Write them."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text)


def _files() -> list[tuple[str, str, type[msgspec.Struct]]]:
    from aggregator.config import AggregateConfig
    from aggregator.simulation.config import SimulationConfig
    from cli.train import SiteFile
    from edge.config import InspectConfig
    from edgeflame.methods import Learning

    see = "`edgeflame {0} --config {0}.toml`, see [{1}](../{2}.md)."
    site = "`edgeflame train --config site.toml`: its options, so that they need not stand on the command line"
    return [
        ("inspect", see.format("inspect", "inspection", "inspection") + " Options win.", InspectConfig),
        ("fit", see.format("fit", "methods", "methods") + " The options `--method` and `--preset` win.", Learning),
        ("aggregate", see.format("aggregate", "a fleet", "fleet") + " Options win.", AggregateConfig),
        ("train", f"{site}. Options win. What is learnt is the aggregator's to say.", SiteFile),
        ("simulate", see.format("simulate", "simulation", "simulation"), SimulationConfig),
    ]


def _structs(hint: Any) -> tuple[list[type[msgspec.Struct]], bool]:
    """The structs that a key's value may be, and whether the value is a table of them by name."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint], False
    if typing.get_origin(hint) is dict:
        return _structs(typing.get_args(hint)[1])[0], True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [_structs(option) for option in typing.get_args(hint)]
        return [struct for structs, _ in found for struct in structs], any(many for _, many in found)
    return [], False


def _type(hint: Any) -> str:
    """A type in a TOML writer's words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return ", ".join(filter(None, (_type(options[0]), _markdown(bounds(hint)))))
    if origin is typing.Literal:
        return " or ".join(f'`"{option}"`' if isinstance(option, str) else f"`{option}`" for option in options)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in options if option not in (type(None), msgspec.UnsetType))
    if origin in (tuple, list, frozenset):
        inner = [option for option in options if option is not Ellipsis]
        if Ellipsis in options or len(inner) == 1:
            return f"list of {_many(inner[0])}"
        if len(set(inner)) == 1:
            return f"list of {len(inner)} {_many(inner[0])}"
        return "list of " + ", ".join(_type(option) for option in inner)
    if origin is dict:
        return f"table of {_many(options[1])} by name"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}.get(hint, f"`{hint}`")


def _many(hint: Any) -> str:
    plain = {str: "texts", int: "integers", float: "numbers"}
    return plain.get(hint) or _type(hint).replace("list of", "lists of").replace(" or ", ", ")


def _literal(field: Any) -> str:
    """A default as TOML has it."""
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None or value is msgspec.UNSET:
        return "none"
    if isinstance(value, frozenset):
        value = sorted(value)
    return f"`{msgspec.json.encode(value).decode()}`".replace(",", ", ")


def _about(kind: type) -> str:
    """A struct's docstring without what only repeats its name; empty if it only says whose keys these are."""
    text = re.sub(r"^Section ``[^`]+``[.:;,]?\s*", "", inspect.cleandoc(kind.__doc__ or ""))
    return "" if text.startswith("The keys of") else text[:1].upper() + text[1:]


def _markdown(text: str) -> str:
    """A docstring as one line of Markdown that may stand in a table."""
    text = re.sub(r":\w+:`~?([^`<]+?)(?:\s*<[^>]*>)?`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _anchor(title: str) -> str:
    """Of a heading, as MkDocs and GitHub both make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _command(path: str, command: click.Command) -> list[str]:
    with click.Context(command, info_name=path) as context:
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        lines = [f"## {path}", "", "```text", usage, "```", ""]
        help_text = inspect.cleandoc(command.help or "").replace("\b\n", "")
        lines += [*(_prose(paragraph) + "\n" for paragraph in help_text.split("\n\n")), *_options(command)]
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                if not inner.hidden:
                    lines += _command(f"{path} {name}", inner)
    return lines


def _options(command: click.Command) -> list[str]:
    rows = []
    with click.Context(command) as context:
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is None:
                continue
            names, text = record
            rows.append(f"| `{names}` | {_prose(text)} |".replace("\\|", "|"))
    rows = [_table_row(row) for row in rows]
    return ["| option | meaning |", "|---|---|", *rows, ""] if rows else []


def _table_row(row: str) -> str:
    """A row whose cells may hold ``|``: all but the three that part the cells are escaped."""
    first, _, rest = row[2:-2].partition("` | ")
    return f"| {first.replace('|', chr(92) + '|')}` | {rest.replace('|', chr(92) + '|')} |"


def _prose(text: str) -> str:
    """Help text in Markdown: placeholders in angle brackets are no tags."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    main()
