"""Command-line options of parts, such as --model.NAME.setting, where NAME is a mixer.

They are taken out of the command line before it is parsed, because the settings of a part are known only after its
import.
"""

from collections.abc import Sequence
from typing import Any

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.registry import PartGroup, is_part
from moe_train.config.yaml_text import parse_yaml

# Sections that contain settings of parts, with the group of these parts.
PLACES: dict[str, PartGroup] = {
    "model.moe.balance": "balance",
    "model.moe": "routers",
    "model": "mixers",
    "optim": "optimizers",
    "telemetry": "sinks",
}


def take_part_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the options of parts out of a command line.

    Args:
        arguments: The command line.

    Returns:
        The other arguments, and the values that the options of parts set, as nested sections.

    Raises:
        UsageError: If an option has no value, or one that is not YAML.
    """
    others: list[str] = []
    values: dict[str, Any] = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, text = argument.partition("=")
        path = _part_path(option)
        if path is None:
            others.append(argument)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise UsageError(f"{option}: has no value; write {option}=VALUE")
            text = left.pop(0)
        values = merge(values, nested(path, _read(option, text)))
    return others, values


def _part_path(option: str) -> list[str] | None:
    """Find the keys that an option of a part sets; None: the option belongs to no part."""
    for section, group in PLACES.items():
        rest = option.removeprefix(f"--{section}.")
        name, _, setting = rest.partition(".")
        if rest != option and setting and is_part(group, name):
            return [*section.split("."), name, *setting.split(".")]
    return None


def _read(option: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{option} ({text!r}): {error}") from error


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Put a value into nested mappings with one key each."""
    for key in reversed(path):
        value = {key: value}
    return value
