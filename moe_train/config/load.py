"""Loading of a configuration: YAML files, dotted command-line options that override them, all errors in one message."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from moe_train.config.base import field_values, merge
from moe_train.config.command_line import read_command_line
from moe_train.config.errors import UsageError
from moe_train.config.messages import describe_errors
from moe_train.config.paths import local_path
from moe_train.config.root import Config
from moe_train.config.yaml_text import parse_yaml, write_yaml


def load_config(
    arguments: Sequence[str],
    *,
    program: str,
    description: str = "",
    defaults: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Config:
    """Load the configuration of every `--config FILE`, in their order, overridden by the dotted options.

    Args:
        arguments: The command line without the program's name; "--help" prints every field and exits.
        program: Name shown in the help text.
        description: What the program does, for the help text.
        defaults: Values that the files and the options override, for fields that the program does not need.
        say: Function that is called with a line if several files are merged; it names what each changes.

    Returns:
        The checked configuration.

    Raises:
        UsageError: If fields are bad; one message names every bad field and its value.
    """
    line = read_command_line(arguments, program=program, description=description)
    values: dict[str, Any] = {}
    naming = None  # file that train.run_dir comes from
    for number, file in enumerate(line.files):
        added = read_yaml(file)
        if number:
            say(_describe_merge(line.files[number - 1], file, values, added))
        values = merge(values, added)
        if isinstance(section := added.get("train"), dict) and "run_dir" in section:
            naming = file
    origin = " + ".join(line.files) or None
    config = validate_config(merge(merge(defaults or {}, values), line.values), origin=origin)
    if naming is not None and "run_dir" not in line.values.get("train", {}):
        config.note_moved_run(naming)
    return config


def _describe_merge(below: str, file: str, old: dict[str, Any], added: dict[str, Any]) -> str:
    before, after = dict(field_values(old)), dict(field_values(merge(old, added)))
    changes = [
        f"{name} {_word(before[name])} -> {_word(after[name])}"
        for name in after
        if name in before and before[name] != after[name]
    ]
    new = [f"{name} {_word(after[name])}" for name in after if name not in before]
    parts = [f"changes {', '.join(changes)}"] if changes else []
    parts += [f"adds {', '.join(new)}"] if new else []
    return f"configuration: {file} after {below}: {'; '.join(parts) or 'changes nothing'}"


def _word(value: Any) -> str:
    return write_yaml(value, in_one_line=True)


def read_yaml(file: str | os.PathLike[str], what: str = "--config") -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        file: Path of the file, as the user wrote it.
        what: What names the file, for messages.

    Raises:
        UsageError: If the file cannot be read, is not YAML, has a key twice, or is not a mapping of names.
    """
    path = local_path(os.fspath(file), what)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        raise UsageError(f"{what} {path}: cannot be read: {error}") from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{what} {path}: {error}") from error
    if values is None and text.strip():
        return {}  # everything is commented out, as in an empty section
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{what} {path}: must be a mapping of sections, and is {found}")
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
    return write_yaml(config.model_dump(mode="json", exclude_unset=False))
