"""Loading of a configuration: YAML files, dotted command-line options that override them, all errors in one message."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from moe_train.config.base import field_values, merge
from moe_train.config.command_line import CommandLine, read_command_line
from moe_train.config.errors import UsageError
from moe_train.config.messages import describe_errors
from moe_train.config.paths import local_path
from moe_train.config.root import Config
from moe_train.config.yaml_text import parse_yaml, write_yaml

_MISSING = object()


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
    read: list[tuple[str, dict[str, Any]]] = []
    naming = None  # file that train.run_dir comes from
    for number, file in enumerate(line.files):
        added = read_yaml(file)
        if number:
            say(_describe_merge(line.files[number - 1], file, values, added))
        values = merge(values, added)
        read.append((file, added))
        if isinstance(section := added.get("train"), dict) and "run_dir" in section:
            naming = file
    config = validate_config(
        merge(merge(defaults or {}, values), line.values), origin_of=partial(_origin, line=line, read=read)
    )
    if naming is not None and "run_dir" not in line.values.get("train", {}):
        config.note_moved_run(naming)
    return config


def _origin(path: Sequence[str | int], line: CommandLine, read: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Name the option or the file that a bad value comes from; for a section, all that can have set its fields."""
    files = [file for file, _ in read]
    given = _look_up(line.values, path)
    if isinstance(given, dict):
        return " + ".join([*files, "options"]) if files and given else " + ".join(files)
    if given is not _MISSING:
        names = [name for name in line.names if name.split(".") == list(path[: name.count(".") + 1])]
        return f"--{max(names, key=len)}" if names else ""
    values = {file: found for file, each in read if (found := _look_up(each, path)) is not _MISSING}
    return next((file for file in reversed(values) if not isinstance(values[file], dict)), " + ".join(files))


def _look_up(values: Any, path: Sequence[str | int]) -> Any:
    """Return the value under some keys, or _MISSING."""
    for key in path:
        try:
            values = values[key]
        except (LookupError, TypeError):
            return _MISSING
    return values


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


def validate_config(
    values: dict[str, Any],
    *,
    origin: str | None = None,
    origin_of: Callable[[Sequence[str | int]], str] | None = None,
) -> Config:
    """Make a checked configuration from plain values.

    Args:
        values: Sections by name.
        origin: File that the values come from, named in the message.
        origin_of: Instead of `origin`, the file or option of the value that some keys lead to.

    Raises:
        UsageError: If a value is bad; it names the field and the value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_errors(error, Config, origin_of=origin_of or (lambda path: origin or ""))) from error


def dump_yaml(config: Config) -> str:
    """Convert a configuration to YAML text, which loads to an equal configuration."""
    return write_yaml(config.model_dump(mode="json", exclude_unset=False))
