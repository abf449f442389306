"""The command line of a configuration: an option for every field, and `--config FILE` any number of times.

A value is text, and the type of its field decides what it means:
- None, null and ~ are no value, as in a file; a value that is a JSON string, in double quotes, is the text inside;
- for a section or a mapping, the value is JSON;
- for a list, it is a JSON list, or else one item; an option that is repeated adds its items. Numbers and names of parts
  may also stand in a row with commas.
"""

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moe_train.config.base import field_values, merge
from moe_train.config.errors import UsageError, one_line
from moe_train.config.part_options import nested, take_part_options
from moe_train.config.registry import PartName
from moe_train.config.root import Config
from moe_train.config.values import is_mapping, plain_types
from moe_train.config.yaml_text import NULL_WORDS


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError with one message, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        message = one_line(message)
        option, _, rest = message.removeprefix("argument ").partition(": ")
        if rest.startswith("expected one argument"):
            option = option.partition("/")[0]
            raise UsageError(f"{option}: has no value; write {_example(option)}")
        raise UsageError(message)


def _example(option: str) -> str:
    is_switch = any(f"--{name}" == option and bool in plain_types(field.annotation) for name, field in _fields())
    return f"{option}=true or {option}=false" if is_switch else f"{option}=VALUE"


@dataclass(frozen=True)
class CommandLine:
    """What a command line says.

    Attributes:
        files: Configuration files, in their order.
        values: Values of the options, as nested sections.
        names: Dotted names of the options that are given.
    """

    files: tuple[str, ...]
    values: dict[str, Any]
    names: tuple[str, ...] = ()


def read_command_line(arguments: Sequence[str], *, program: str, description: str = "") -> CommandLine:
    """Read a command line; --help prints every field and exits.

    Args:
        arguments: The command line without the program's name.
        program: Name shown in the help text.
        description: What the program does, for the help text.

    Raises:
        UsageError: If an option is unknown, has no value, or has one that is not JSON where only JSON can be meant.
    """
    arguments, of_parts = take_part_options(arguments)
    options, unknown = _make_parser(program, description).parse_known_args(arguments)
    if unknown:
        _refuse(unknown)
    values: dict[str, Any] = {}
    names = [name for name, _ in field_values(of_parts)]
    for name, field in _fields():
        if (texts := _texts(options, name)) is not None:
            values = merge(values, nested(name.split("."), _read_field(name, field, texts)), is_one_layer=True)
            names.append(name)
    return CommandLine(tuple(_texts(options, "config") or ()), merge(values, of_parts, is_one_layer=True), tuple(names))


def _texts(options: argparse.Namespace, name: str) -> list[str] | None:
    """Return what is given for an option; argparse of Python 3.11 makes an empty list of the value "--"."""
    given = getattr(options, name)
    return None if given is None else [each if isinstance(each, str) else "--" for each in given]


def _make_parser(program: str, description: str) -> Parser:
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    what = (
        "YAML file with the sections below; repeated, a later file overrides an earlier one, and options override all"
    )
    parser.add_argument("--config", action="append", metavar="FILE", help=what)
    # DeepSpeed's launcher hands this to every script; the rank is read from the environment instead.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for name, field in _fields():
        section = _section(field)
        description = " ".join((field.description or "").split()).replace("%", "%%")
        if section is not None:
            groups[name] = parser.add_argument_group(f"{name} options", description.replace("%%", "%"))
            groups[name].add_argument(f"--{name}", action="append", metavar="JSON", help="all settings of the section")
            continue
        default = "required" if field.is_required() else f"default: {field.get_default(call_default_factory=True)}"
        group = groups.get(name.rpartition(".")[0], parser)
        text = f"{description} ({default.replace('%', '%%')})"
        group.add_argument(f"--{name}", action="append", metavar=_metavar(field), help=text)
    return parser


def _metavar(field: FieldInfo) -> str:
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    shown = []
    for kind in plain_types(field.annotation):
        if get_origin(kind) is tuple:
            shown.append("LIST")
        elif is_mapping(kind):
            shown.append("JSON")
        elif kind is not type(None):
            shown += [names[kind]] if kind in names else [str(value) for value in get_args(kind)]
    return "|".join(shown)


def _fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every section and field of the configuration with its dotted name, a section before its fields."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if (inner := _section(field)) is not None:
            yield from _fields(inner, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _refuse(unknown: Sequence[str]) -> NoReturn:
    option, _, value = unknown[0].partition("=")
    if not option.startswith("--"):
        raise UsageError(f"unexpected {unknown[0]!r}: options are --section.field=value; --help lists every option")
    value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("--") else "")
    known = ["--config", *(f"--{name}" for name, _ in _fields())]
    near = difflib.get_close_matches(option, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists every option"
    raise UsageError(f"unknown option {option}" + (f" (value {value!r})" if value else "") + hint)


def _read_field(name: str, field: FieldInfo, texts: Sequence[str]) -> Any:
    """Read what is given for a field, each time that it is given."""
    types = list(plain_types(field.annotation))
    lists = [each for each in types if get_origin(each) is tuple]
    if any(is_mapping(each) for each in types):
        read: dict[str, Any] = {}
        for text in texts:
            read = merge(read, _read_json(name, text, dict, "a mapping") or {})
        return read
    if not lists:
        return _read_text(texts[-1])
    if len(types) > 2 or (len(types) == 2 and type(None) not in types):  # one number too: the last option counts
        return _read_items(name, get_args(lists[0])[0], texts[-1], may_be_one=True)
    items: Any = []
    for text in texts:
        found = _read_items(name, get_args(lists[0])[0], text)
        items = None if found is None else [*(items or []), *found]
    return items


def _read_text(text: str) -> str | None:
    if text in NULL_WORDS:
        return None
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _read_items(name: str, item: Any, text: str, may_be_one: bool = False) -> Any:
    if text in NULL_WORDS:
        return None
    if any(is_mapping(kind) for kind in plain_types(item)):
        return _read_json(name, text, list, "a list of mappings")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        return found
    is_row = item is PartName or int in plain_types(item)  # no path, which may have any character
    if is_row and text.startswith("["):
        raise UsageError(f"{name} ({text!r}): must be a JSON list: texts in double quotes, numbers without")
    if is_row and "," in text:
        return [_read_text(part.strip()) for part in text.split(",")]
    return _read_text(text) if may_be_one else [_read_text(text)]


def _read_json(name: str, text: str, kind: type, what: str) -> Any:
    if text in NULL_WORDS:
        return None
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(name, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name} ({text!r}): cannot be read; give {what} as JSON") from error
    if not isinstance(found, kind):
        raise UsageError(f"{name} ({text!r}): must be {what}; give it as JSON")
    return found


def _once(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of pairs; a key that is there twice is refused, as in a file."""
    for place, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:place]):
            raise UsageError(f"{name}: key {key!r} is there twice")
    return dict(pairs)
