"""Writes docs/configuration.md and docs/commands.md from the schema and the parsers of the command line.

python docs/make_reference.py            writes both pages
python docs/make_reference.py --check    exit code 1 if a page is not what the schema or the parsers give now
"""

import argparse
import contextlib
import importlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moe_train.cli.main import SUBCOMMANDS
from moe_train.config.data import MixtureEntry
from moe_train.config.machine import Host, Link, Machine, Network, Product
from moe_train.config.root import Config

DOCS = Path(__file__).resolve().parent
ORIGIN = "<!-- Written by docs/make_reference.py: change the docstrings there are in {where}, then run it. -->\n"
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}

CONFIGURATION = """# Configuration

Every field of a configuration file, from the schema in `moe_train/config/`. A file is YAML with one mapping a section;
on the command line a field is `--section.field=value` (or `--section.field value`), which stands above the file.
`--config base.yaml --config experiment.yaml` merges files in this order, and training prints what
the later one changes.

Paths are relative to the folder in which the command was started, also those in a file. `~` and `~name` are home
folders in every field and option; `$NAME` is replaced by the shell alone, and refused where it is left. Remote paths by
fsspec (`s3://`, `gs://`, `hf://`; a message names the package to install) are taken by `data.paths` and by
`moe-train checkpoint export`; everything else must be on a mounted file system. A configuration that lies in the folder
of a run which was moved or copied is refused until `--train.run_dir` says which folder is meant.

A value is read by the type of its field, alike in a file and on the command line: `None`, `null` and `~` are no value;
`1e3` is a whole number; `yes` and `on` are switches and no numbers; `010` is refused for a number; a date is text. A
text in double quotes is that text. On the command line mappings are JSON; for a list, what is no JSON list is one item
(`--data.paths=a,b.txt` is one file), a repeated option adds items, and numbers and names may stand in a row with
commas.

A section without keys has its defaults. A key that is there twice is refused with both lines. Keys at the top that
begin with `x-` are left out: they may hold anchors. Under `deepspeed`, where no field decides, a word such as `yes` or
`010` is refused without quotes, and so is a key that DeepSpeed does not read.

Unknown keys are refused, and so is a field that has no effect in the mode that the others choose. A field that has none
because of the number of steps or ranks is named in a line "remark: ..." when training begins. A run writes the
resolved configuration, with every default in it, to `config.yaml` of its folder.
"""
MACHINE = """## A machine file

What `moe-train plan --device FILE` reads, and what stands under `machine` in the last line of
`moe-train doctor --json`: JSON or YAML.
"""
COMMANDS = """# Commands

`moe-train SUBCOMMAND --help` prints what stands here, from the same parsers. Options that name a field of the
configuration (`--train.steps=100`) are not repeated: [Configuration](configuration.md) has them.
`moe-train --version` prints the version.

Exit codes: 0 done; 1 a command that compares or verifies found a difference or damage; 2 bad usage, configuration or
input, said in one message. Those of a training are in [Stopping, and starting again](restarts.md). With `--json` the
last line of the output is one JSON object.
"""


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words, with its bounds: "int, at least 1", "`auto`, or int above 0"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if origin is Literal:
        return alternatives([f"`{value}`" for value in arguments])
    if origin in (Union, types.UnionType):
        some = [type_text(each, metadata) for each in arguments if each is not type(None)]
        return alternatives(some + (["None"] if type(None) in arguments else []))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {type_text(arguments[0])}"
        return f"[{', '.join(type_text(each) for each in arguments)}]"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{anchor(annotation)})"
    name = {Any: "anything"}.get(annotation) or annotation.__name__
    return " ".join([name, *bounds(metadata)])


def alternatives(texts: list[str]) -> str:
    """Several texts, of which one is meant."""
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    """The bounds of a number in words."""
    items = [each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [
        f"{words} {getattr(item, key):g}"
        for item in items
        for key, words in BOUNDS.items()
        if getattr(item, key, None) is not None
    ]
    if found:
        yield " and ".join(found)


def default_text(field: FieldInfo) -> str:
    """The default as one would write it on the command line."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None or isinstance(value, bool | str):
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def anchor(section: type[BaseModel]) -> str:
    """Where a section of a list or of a machine stands on the page."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", section.__name__).lower()


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, if it is one."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def cell(text: str) -> str:
    """A text on one line, for a table."""
    return " ".join(text.split()).replace("|", "\\|")


def prose(text: str) -> str:
    """A docstring as Markdown: what stands between backquotes is code, and nothing else is markup."""
    parts = text.split("`")
    return cell(
        "`".join(re.sub(r"([*<>\[\]])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts))
    )


def section_table(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The rows of a section's fields; with a prefix, the sections in it have tables of their own."""
    rows = ["| field | type | default | what |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if prefix and nested(field) is not None:
            continue
        assert field.description, f"{section.__name__}.{name} has no docstring"
        kind, default = type_text(field.annotation, tuple(field.metadata)), default_text(field)
        rows.append(f"| `{prefix}{name}` | {cell(kind)} | {cell(default)} | {prose(field.description)} |")
    return [*rows, ""]


def sections(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the configuration by its dotted name, outer ones first."""
    for name, field in section.model_fields.items():
        if (inner := nested(field)) is not None:
            yield f"{prefix}{name}", inner
            yield from sections(inner, f"{prefix}{name}.")


def configuration_page() -> str:
    """The page of the configuration."""
    lines = [CONFIGURATION, "| section | what |", "|---|---|"]
    found = list(sections())
    lines += [f"| [`{name}`](#{name.replace('.', '-')}) | {prose(inner.__doc__ or '')} |" for name, inner in found]
    raw = {name: field for name, field in Config.model_fields.items() if nested(field) is None}
    lines += [f"| `{name}` | {prose(field.description or '')} |" for name, field in raw.items()]
    for name, inner in found:
        lines += ["", f"({name.replace('.', '-')})=", f"## {name}", "", prose(inner.__doc__ or ""), ""]
        lines += section_table(inner, f"{name}.")
        if name == "data":
            lines += [
                f"({anchor(MixtureEntry)})=",
                "### An entry of data.mixture",
                "",
                prose(MixtureEntry.__doc__ or ""),
                "",
            ]
            lines += section_table(MixtureEntry)
    lines += ["## deepspeed", "", *field_paragraph("deepspeed", Config.model_fields["deepspeed"])]
    lines += [MACHINE]
    for inner in (Machine, Host, Network, Link, Product):
        lines += [f"({anchor(inner)})=", f"### {inner.__name__}", "", prose(inner.__doc__ or ""), ""]
        lines += section_table(inner)
    return ORIGIN.format(where="moe_train/config/") + "\n" + "\n".join(lines).strip() + "\n"


def field_paragraph(name: str, field: FieldInfo) -> list[str]:
    """A field that is no part of a section."""
    kind, default = type_text(field.annotation), default_text(field)
    return [f"`{name}`: {kind}, default {default}. {prose(field.description or '')}", ""]


class _Shown(BaseException):
    """Raised in place of printing a help text; not an Exception, so that nothing catches it."""


def parsers_of(name: str) -> list[argparse.ArgumentParser]:
    """The parsers that a subcommand makes for its arguments; the last one is that whose help it would print.

    Some read their own options first, by a parser without a help text, and leave the rest to that of the fields.
    """
    made: list[argparse.ArgumentParser] = []
    begin = argparse.ArgumentParser.__init__

    def note(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        made.append(self)

    def show(self: argparse.ArgumentParser, file: Any = None) -> None:
        made.append(self)
        raise _Shown

    run: Callable[[list[str]], int] = importlib.import_module(f"moe_train.cli.{name.replace('-', '_')}").run
    replaced = mock.patch.multiple(argparse.ArgumentParser, __init__=note, print_help=show)
    with replaced, contextlib.suppress(_Shown):
        run(["--help"])
        raise AssertionError(f"moe-train {name} --help shows no help")
    return [parser for parser in made if not parser.add_help] + made[-1:]


def config_options() -> frozenset[str]:
    """The options that name a field of the configuration, or one of its sections."""
    names = {"--deepspeed"}
    for prefix, section in sections():
        names |= {f"--{prefix}", *(f"--{prefix}.{name}" for name in section.model_fields)}
    return frozenset(names)


def option_rows(parsers: list[argparse.ArgumentParser], hidden: frozenset[str]) -> list[str]:
    """A table of some parsers' arguments, without those that name fields; empty if there are none."""
    rows = []
    for parser, action in [(each, action) for each in parsers for action in each._actions]:
        is_field = bool(action.option_strings) and all(option in hidden for option in action.option_strings)
        is_other = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        if action.help == argparse.SUPPRESS or is_other or is_field:
            continue
        rows.append(f"| {invocation(action)} | {help_text(parser, action)} |")
    rows = list(dict.fromkeys(rows))  # a parser may have been made twice
    return ["| argument | what |", "|---|---|", *rows, ""] if rows else []


def invocation(action: argparse.Action) -> str:
    """How an argument is given."""
    value = "" if action.nargs == 0 else f" {value_name(action)}"
    if not action.option_strings:
        return f"`{value.strip()}{' ...' if action.nargs in ('+', '*', argparse.REMAINDER) else ''}`"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def value_name(action: argparse.Action) -> str:
    """What stands for an argument's value."""
    if action.metavar:
        return str(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return action.dest.upper()


def help_text(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an argument, with what argparse would put into it, and whether it must be given."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return prose(text + ("; required" if action.required and action.option_strings else ""))


def takes_fields(parsers: list[argparse.ArgumentParser]) -> bool:
    """Whether fields of the configuration are options of the command: by its parser, or as its description says."""
    fields = config_options()
    options = (option for parser in parsers for action in parser._actions for option in action.option_strings)
    return any(option in fields for option in options) or "ny training option" in (parsers[-1].description or "")


def command_lines(
    title: str, parsers: list[argparse.ArgumentParser], hidden: frozenset[str], level: int = 2
) -> list[str]:
    """A command's part of the page."""
    parser = parsers[-1]
    lines = [f"{'#' * level} {title}", "", prose(parser.description or ""), ""]
    lines += option_rows(parsers, hidden)
    if takes_fields(parsers):
        lines += ["Fields of the [configuration](configuration.md) may be given too.", ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                lines += command_lines(f"{title} {name}", [inner], hidden, level + 1)
    return lines


def commands_page() -> str:
    """The page of the commands."""
    lines = [COMMANDS, "| command | what |", "|---|---|"]
    for name, text in SUBCOMMANDS.items():
        lines.append(f"| [`moe-train {name}`](#moe-train-{name}) | {text} |")
    lines.append("")
    hidden = config_options()
    for name in SUBCOMMANDS:
        lines += command_lines(f"moe-train {name}", parsers_of(name), hidden)
    return ORIGIN.format(where="moe_train/cli/") + "\n" + "\n".join(lines).strip() + "\n"


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration_page, "commands.md": commands_page}


def main() -> int:
    """Write the pages, or compare them."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    is_check = options.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not is_check:
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"docs/{name} {'is out of date: run python docs/make_reference.py' if is_check else 'written'}")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
