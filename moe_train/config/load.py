"""Loading of a configuration: a YAML file, dotted command-line options that override it, all errors in one message."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.messages import describe_errors
from moe_train.config.part_options import take_part_options
from moe_train.config.root import Config


class _CommandLine(BaseSettings, Config):  # type: ignore[misc]  # both have a model_config, of kindred types
    """The configuration as command-line options; the environment is never read."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError with the nearest known option, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        known = [option for action in self._actions for option in action.option_strings]
        if unknown:
            option, _, value = unknown[0].partition("=")
            value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("--") else "")
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists every option"
            raise UsageError(f"unknown option {option}" + (f" (value {value!r})" if value else "") + hint)
        raise UsageError(message)


def load_config(
    arguments: Sequence[str], *, program: str, description: str = "", defaults: dict[str, Any] | None = None
) -> Config:
    """Load the configuration of `--config FILE`, overridden by the dotted options of the command line.

    Args:
        arguments: The command line without the program's name; "--help" prints every field and exits.
        program: Name shown in the help text.
        description: What the program does, for the help text.
        defaults: Values that the file and the options override, for fields that the program does not need.

    Returns:
        The checked configuration.

    Raises:
        UsageError: If fields are bad; one message names every bad field and its value.
    """
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections below; options override it")
    # DeepSpeed's launcher hands this to every script; the rank is read from the environment instead.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    arguments, of_parts = take_part_options(arguments)
    overrides = merge(_parse_overrides(parser, arguments), of_parts)
    path = overrides.pop("config", None)
    overrides.pop("local_rank", None)
    values = merge(merge(defaults or {}, read_yaml(Path(path)) if path else {}), overrides)
    return validate_config(values, origin=path)


def _parse_overrides(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    arguments = _last_only(arguments, "--model.kv_layers")
    try:
        source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
            _CommandLine,
            cli_parse_args=list(arguments),
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="None",
            root_parser=parser,
        )
        values = dict(source())
    except SettingsError as error:
        raise UsageError(_describe_unreadable(str(error), arguments)) from error
    options = parser.parse_args(list(arguments))
    for name, given in vars(options).items():
        # pydantic-settings 2.16 makes a list of every value of a list field, even of None or a number.
        if given == ["None"] or (name == "model.kv_layers" and len(given or ()) == 1 and given[0].strip().isdigit()):
            section, _, field = name.rpartition(".")
            values[section][field] = None if given == ["None"] else int(given[0])
    values["config"], values["local_rank"] = options.config, options.local_rank
    return values


def _last_only(arguments: Sequence[str], option: str) -> list[str]:
    """Drop all occurrences of an option but the last, because pydantic-settings would join their values in one list."""
    spans = []
    for place, argument in enumerate(arguments):
        if argument == option or argument.startswith(f"{option}="):
            spans.append(range(place, place + (2 if argument == option else 1)))
    dropped = {place for span in spans[:-1] for place in span}
    return [argument for place, argument in enumerate(arguments) if place not in dropped]


def _describe_unreadable(message: str, arguments: Sequence[str]) -> str:
    # pydantic-settings names the field in its message, but not what was given for it.
    named = re.search(r'for (?:field ")?([\w.]+)', message)
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if named and option == f"--{named[1]}":
            value = value or "".join(arguments[place + 1 : place + 2])
            return f"{named[1]} ({value!r}): cannot be read; give it as JSON"
    return message


def read_yaml(path: Path, what: str = "--config") -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        path: The file.
        what: What names the file, for messages.

    Raises:
        UsageError: If the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{what} {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{what} {path}: must be a mapping of sections, not {type(values).__name__}")
    return values


def validate_config(values: dict[str, Any], *, origin: str | None = None) -> Config:
    """Make a checked configuration from plain values.

    Args:
        values: Sections by name.
        origin: File that the values come from, named in the message.

    Raises:
        UsageError: If a value is bad; it names the field and the value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        where = f"{origin}: " if origin else ""
        raise UsageError(where + describe_errors(error, Config)) from error


def dump_yaml(config: Config) -> str:
    """Convert a configuration to YAML text, which loads to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=False), sort_keys=False)
